package ringfence_test

import (
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// clusterRing opens a ring on a whole Redis Cluster.
func clusterRing(t *testing.T, c *redistest.Cluster, config ringfence.Config) *ringfence.Ring {
	t.Helper()
	config.Shards = []ringfence.ShardConfig{{ID: "c", Primary: c.URL()}}
	return open(t, config)
}

func TestEveryMasterOfAClusterIsAShardAndTheLimitIsExactOnAll(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, redistest.ClusterOptions{})
	ring := clusterRing(t, c, ringfence.Config{Budget: 5 * time.Second, Policy: ringfence.PolicyClosed, NearCacheKeys: -1})
	for name, limit := range map[string]ringfence.Limit{
		"log":    ringfence.SlidingLog{Limit: 10, Window: time.Hour},
		"bucket": ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 10},
	} {
		l, err := ring.Limiter(name, limit)
		must(t, err)
		const keys, callers = 60, 16
		var mu sync.Mutex
		admitted, shards := map[string]int{}, map[string]bool{}
		var wg sync.WaitGroup
		for range callers {
			wg.Go(func() {
				for k := range keys {
					key := fmt.Sprintf("k%d", k)
					d, err := l.Allow(t.Context(), key)
					if err != nil || d.Source != ringfence.SourcePrimary {
						t.Errorf("%+v, %v", d, err)
						return
					}
					mu.Lock()
					shards[d.Shard] = true
					if d.Allowed {
						admitted[key]++
					}
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		for k := range keys {
			if n := admitted[fmt.Sprintf("k%d", k)]; n != 10 {
				t.Errorf("%s: key %d: %d of %d admitted, want 10", limit, k, n, callers)
			}
		}
		if want := map[string]bool{"c-0": true, "c-1": true, "c-2": true}; !maps.Equal(shards, want) {
			t.Errorf("answers came from %v, want %v", shards, want)
		}
		// One call for many keys, on all masters; repeats in order.
		reqs := make([]ringfence.Request, 0, 200)
		for i := range 100 {
			reqs = append(reqs, ringfence.Request{Key: fmt.Sprintf("m%d", i), Cost: 7}, ringfence.Request{Key: fmt.Sprintf("m%d", i), Cost: 4})
		}
		out, err := l.AllowMany(t.Context(), reqs)
		must(t, err)
		for i, d := range out {
			if d.Allowed != (i%2 == 0) || d.Source != ringfence.SourcePrimary {
				t.Errorf("entry %d: %+v", i, d)
			}
		}
		if d, err := l.Peek(t.Context(), "m0"); err != nil || d.Remaining != 3 {
			t.Errorf("peek: %+v, %v", d, err)
		}
		must(t, l.Reset(t.Context(), "m0"))
		if d, err := l.Peek(t.Context(), "m0"); err != nil || d.Remaining != 10 {
			t.Errorf("after reset: %+v, %v", d, err)
		}
	}
	sum := 0.0
	for _, s := range ring.Stats() {
		sum += s.Share
	}
	if sum < 0.999 || sum > 1.001 {
		t.Errorf("the shards own %v of the keys together: %+v", sum, ring.Stats())
	}
}

// A slot with its keys moves to another master and back while callers go on.
func TestASlotThatMovesUnderLoadCostsNoErrorAndNoCharge(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, redistest.ClusterOptions{})
	ring := clusterRing(t, c, ringfence.Config{Budget: 5 * time.Second, Policy: ringfence.PolicyClosed, NearCacheKeys: -1})
	l := limiter(t, ring, ringfence.SlidingLog{Limit: 1000, Window: time.Hour})
	_, name := l.Locate("k")
	slot := int(must1(t)(c.Masters()[0].Client().ClusterKeySlot(t.Context(), name).Result()))
	var stop atomic.Bool
	var asked, admitted atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for !stop.Load() {
				d, err := l.Allow(t.Context(), "k")
				if err != nil || d.Source != ringfence.SourcePrimary {
					t.Errorf("%+v, %v", d, err)
					return
				}
				asked.Add(1)
				if d.Allowed {
					admitted.Add(1)
				}
			}
		})
	}
	home := c.MasterOf(slot)
	for range 2 {
		for _, to := range c.Masters() {
			must(t, c.MoveSlot(t.Context(), slot, to))
		}
	}
	must(t, c.MoveSlot(t.Context(), slot, home))
	eventually(t, 30*time.Second, "the limit is used up", func() bool { return asked.Load() >= 1200 })
	stop.Store(true)
	wg.Wait()
	if admitted.Load() != 1000 {
		t.Errorf("%d of %d admitted, want 1000", admitted.Load(), asked.Load())
	}
	held := must1(t)(c.MasterOf(slot).Client().ZCard(t.Context(), name).Result())
	if held != 1000 {
		t.Errorf("the log holds %d units, want the 1000 that were admitted", held)
	}
}

func TestWhenAMasterOfAClusterDiesItsReplicaAnswersAndThenTakesOver(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, redistest.ClusterOptions{ReplicasPer: 1, NodeTimeout: time.Second})
	ring := clusterRing(t, c, ringfence.Config{Policy: ringfence.PolicyClosed})
	l := limiter(t, ring, ringfence.SlidingLog{Limit: 100, Window: time.Hour})
	_, name := l.Locate("k")
	slot := int(must1(t)(c.Masters()[0].Client().ClusterKeySlot(t.Context(), name).Result()))
	before, _ := l.Locate("k")
	admitted := 0
	eventually(t, 10*time.Second, "40 units are used", func() bool {
		d, err := l.Allow(t.Context(), "k")
		must(t, err)
		if d.Allowed && d.Source == ringfence.SourcePrimary {
			admitted++
		}
		return admitted == 40
	})
	must(t, c.WaitReady(t.Context()))
	dead := c.MasterOf(slot)
	at := time.Now()
	dead.Kill()
	sources := map[ringfence.Source]int{}
	var back time.Duration
	eventually(t, 20*time.Second, "the replica has taken over", func() bool {
		d, err := l.Allow(t.Context(), "k")
		must(t, err)
		sources[d.Source]++
		if d.Allowed {
			admitted++
		}
		if d.Source == ringfence.SourcePrimary {
			back = time.Since(at)
		}
		return d.Source == ringfence.SourcePrimary
	})
	if sources[ringfence.SourceReplica] == 0 {
		t.Errorf("no answer came from a share: %v", sources)
	}
	for range 200 {
		d, err := l.Allow(t.Context(), "k")
		must(t, err)
		if d.Allowed {
			admitted++
		}
	}
	t.Logf("took over after %s; answers meanwhile %v; admitted %d of 100", back, sources, admitted)
	if admitted > 100 {
		t.Errorf("%d admitted, want at most 100: what the share admitted is settled", admitted)
	}
	if after, _ := l.Locate("k"); after != before {
		t.Errorf("the key moved from %s to %s because of a fault", before, after)
	}
	if back > 6500*time.Millisecond { // node timeout + 5.5 s
		t.Errorf("the primary answered again only after %s", back)
	}
}

func TestASentinelSetIsFollowedToItsNewMaster(t *testing.T) {
	t.Parallel()
	set := redistest.StartSentinel(t, redistest.SentinelOptions{})
	ring := open(t, ringfence.Config{
		Shards: []ringfence.ShardConfig{{ID: "s", Primary: set.URL()}}, Policy: ringfence.PolicyClosed,
	})
	l := limiter(t, ring, ringfence.SlidingLog{Limit: 100, Window: time.Hour})
	admitted := 0
	eventually(t, 10*time.Second, "40 units are used", func() bool {
		d, err := l.Allow(t.Context(), "k")
		must(t, err)
		if d.Allowed && d.Source == ringfence.SourcePrimary {
			admitted++
		}
		return admitted == 40
	})
	must(t, set.WaitReady(t.Context()))
	at := time.Now()
	set.Master(t.Context()).Kill()
	sources := map[ringfence.Source]int{}
	eventually(t, 30*time.Second, "the new master answers", func() bool {
		d, err := l.Allow(t.Context(), "k")
		must(t, err)
		sources[d.Source]++
		if d.Allowed {
			admitted++
		}
		return d.Source == ringfence.SourcePrimary
	})
	t.Logf("the new master answered after %s; answers meanwhile %v", time.Since(at), sources)
	for range 200 {
		d, err := l.Allow(t.Context(), "k")
		must(t, err)
		if d.Allowed {
			admitted++
		}
	}
	if admitted > 100 {
		t.Errorf("%d admitted, want at most 100: what the share admitted is settled", admitted)
	}
	if sources[ringfence.SourceReplica] == 0 {
		t.Errorf("no answer came from a share: %v", sources)
	}
}

// must1 is must for a call that returns a value too.
func must1(t *testing.T) func(int64, error) int64 {
	return func(v int64, err error) int64 {
		t.Helper()
		must(t, err)
		return v
	}
}
