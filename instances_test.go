package ringfence

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"

	"github.com/ringfence/ringfence/internal/redistest"
)

// counting opens a ring that counts the processes of its shards.
func counting(t *testing.T, id string, shards ...ShardConfig) *Ring {
	t.Helper()
	ring, err := Open(t.Context(), Config{
		Shards: shards, HashKey: []byte("0123456789abcdef"), InstanceID: id, Logger: (&sink{}).logger(),
		Policy: PolicyClosed, Budget: 10 * time.Second, OperationTimeout: 10 * time.Second,
		Breaker: BreakerConfig{Failures: 1, MaxOpenPeriod: time.Second},
	})
	aclMust(t, err)
	t.Cleanup(func() { ring.Close() })
	return ring
}

// round makes every ring see to its shards, as it does every few seconds.
func round(rings ...*Ring) {
	for _, r := range rings {
		_ = r.checkShards(context.Background(), false) // who is away is part of the tests
	}
}

func wantInstances(t *testing.T, what string, r *Ring, want ...int) {
	t.Helper()
	var got []int
	for _, s := range r.Stats() {
		got = append(got, s.Instances)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: the shards' keys are divided by %v, want %v", what, got, want)
	}
}

func TestAHeartbeatTellsHowManyProcessesThereAre(t *testing.T) {
	server := redistest.Start(t, redistest.Options{Clock: true})
	here := miniredis.RunT(t)
	for _, c := range []struct {
		name, url string
		plain     bool
		step      func(time.Duration)
	}{
		{"redis", server.URL(), false, func(d time.Duration) { aclMust(t, server.Step(d)) }},
		{"embedded", "redis://" + here.Addr(), true, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, err := newRedisNode(c.url, nodeConfig{timeout: 10 * time.Second, poolSize: 2}, c.plain)
			aclMust(t, err)
			defer n.close()
			const name = "rf:1:{instances}"
			want := func(member string, want int64) {
				t.Helper()
				if got, err := n.beat(t.Context(), name, member); err != nil || got != want {
					t.Errorf("%s is told of %d, %v; want %d", member, got, err, want)
				}
			}
			want("a", 1)
			want("b", 2)
			want("a", 2) // again: no other process
			want("c", 3)
			if got, err := n.beats(t.Context(), name); err != nil || got != 3 {
				t.Errorf("a replica would know of %d, %v; want 3", got, err)
			}
			if ttl := n.client.PTTL(t.Context(), name).Val(); ttl <= 0 || ttl > beatsKept {
				t.Errorf("the heartbeats live for %s", ttl)
			}
			if c.step == nil {
				return
			}
			c.step(goneAfter - time.Second)
			want("a", 3)
			c.step(2 * time.Second) // b and c have said nothing for longer than they may
			want("a", 1)
			want("b", 2)
			c.step(-time.Hour)
			want("c", 3)
			want("a", 3)
		})
	}
}

// Four processes count each other, and together admit what was left when a primary goes.
// A fifth that starts meanwhile changes the count of the shard that is there alone.
func TestSharesAreDividedByTheProcessesCountedBeforeTheShardWentAway(t *testing.T) {
	limit := SlidingLog{Limit: 100, Window: time.Hour}
	primary := redistest.Start(t, redistest.Options{Args: []string{"repl-diskless-sync no"}})
	replica := redistest.Start(t, redistest.Options{ReplicaOf: primary, Args: []string{"repl-diskless-sync no"}})
	other := redistest.Start(t, redistest.Options{})
	aclMust(t, replica.WaitInSync(t.Context()))
	shards := []ShardConfig{
		{ID: "a", Primary: primary.URL(), Replicas: []string{replica.URL()}},
		{ID: "b", Primary: other.URL()},
	}
	var rings []*Ring
	var limiters []*Limiter
	for i := range 4 {
		r := counting(t, fmt.Sprint("process ", i), shards...)
		wantInstances(t, "at Open", r, i+1, i+1) // itself and those before it
		l, err := r.Limiter("api", limit)
		aclMust(t, err)
		rings, limiters = append(rings, r), append(limiters, l)
	}
	round(rings...)
	for _, r := range rings {
		wantInstances(t, "after a round", r, 4, 4)
	}
	key := ""
	for i := 0; key == ""; i++ {
		if id, _ := limiters[0].Locate(fmt.Sprint(i)); id == "a" {
			key = fmt.Sprint(i)
		}
	}
	for range 40 {
		d, err := limiters[0].Allow(t.Context(), key)
		aclMust(t, err)
		if !d.Allowed || d.Source != SourcePrimary {
			t.Fatalf("%+v", d)
		}
	}
	aclMust(t, replica.WaitInSync(t.Context()))
	primary.Kill()

	all := func() (admitted int) {
		var mu sync.Mutex
		var wg sync.WaitGroup
		for _, l := range limiters {
			wg.Go(func() {
				for range 100 {
					d, err := l.Allow(context.Background(), key)
					if err != nil || d.Source != SourceReplica {
						t.Errorf("%+v, %v", d, err)
					}
					if d.Allowed {
						mu.Lock()
						admitted++
						mu.Unlock()
					}
				}
			})
		}
		wg.Wait()
		return admitted
	}
	if n := all(); n != 60 {
		t.Errorf("four processes admitted %d, want the 60 that were left", n)
	}
	// One that starts now: from the other shard it learns of all five, of the four before
	// it from the replica.
	late := counting(t, "process 4", shards...)
	wantInstances(t, "started in the outage", late, 5, 5)
	round(rings...)
	for _, r := range rings {
		wantInstances(t, "one more in the outage", r, 4, 5)
	}
	if n := all(); n != 0 {
		t.Errorf("%d more admitted because the count of another shard has changed", n)
	}
	aclMust(t, primary.Restart(t.Context()))
	deadline := time.Now().Add(20 * time.Second)
	for rings[0].Stats()[0].Breaker.State != BreakerClosed {
		if time.Now().After(deadline) {
			t.Fatal("the breaker has not closed")
		}
		time.Sleep(5 * time.Millisecond)
	}
	round(late)
	round(rings[0])
	wantInstances(t, "after the outage", rings[0], 5, 5)
}

func TestAProcessThatStartsAloneInAnOutageLearnsOfTheOthersFromTheReplica(t *testing.T) {
	primary := redistest.Start(t, redistest.Options{Args: []string{"repl-diskless-sync no"}})
	replica := redistest.Start(t, redistest.Options{ReplicaOf: primary, Args: []string{"repl-diskless-sync no"}})
	aclMust(t, replica.WaitInSync(t.Context()))
	shard := ShardConfig{ID: "a", Primary: primary.URL(), Replicas: []string{replica.URL()}}
	counting(t, "0", shard)
	counting(t, "1", shard)
	aclMust(t, replica.WaitInSync(t.Context()))
	primary.Kill()
	wantInstances(t, "in the outage", counting(t, "2", shard), 3)
	replica.Kill()
	wantInstances(t, "with nobody to ask", counting(t, "3", shard), 1)
}

func TestSentinelSetsAndClustersCountProcessesToo(t *testing.T) {
	cluster := redistest.StartCluster(t, redistest.ClusterOptions{})
	set := redistest.StartSentinel(t, redistest.SentinelOptions{})
	for _, c := range []struct {
		url  string
		want []int
	}{{cluster.URL(), []int{2, 2, 2}}, {set.URL(), []int{2}}} {
		shard := ShardConfig{ID: "s", Primary: c.url}
		a, b := counting(t, "a", shard), counting(t, "b", shard)
		round(a)
		wantInstances(t, c.url, a, c.want...)
		wantInstances(t, c.url, b, c.want...)
	}
}

func TestInstancesThatAreSetAreNotCounted(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	shard := ShardConfig{ID: "a", Primary: server.URL()}
	counting(t, "0", shard)
	counting(t, "1", shard)
	for set, warns := range map[int]bool{2: true, 3: false, 40: false} {
		lines := &sink{}
		r, err := Open(t.Context(), Config{
			Shards: []ShardConfig{shard}, Instances: set, InstanceID: "2", Logger: lines.logger(),
			HashKey: []byte("0123456789abcdef"), Budget: 10 * time.Second, OperationTimeout: 10 * time.Second,
		})
		aclMust(t, err)
		wantInstances(t, "set", r, set)
		if got := strings.Contains(lines.String(), "more processes share the ring than Config.Instances says"); got != warns {
			t.Errorf("Instances %d of 3: warned %t, want %t\n%s", set, got, warns, lines)
		}
		aclMust(t, r.Close())
	}
	round(counting(t, "0", shard))
}

// What one round of check-ups makes of what the shards said.
func TestTheCountOfAShardThatIsAwayIsFrozen(t *testing.T) {
	type said struct{ heard, want int64 } // heard 0: away
	for _, c := range []struct {
		name   string
		rounds [][]said
	}{
		{"all agree", [][]said{{{3, 3}, {3, 3}}}},
		{"the highest is right", [][]said{{{3, 3}, {1, 3}}}},
		{"away: kept, whatever the others say", [][]said{{{3, 3}, {3, 3}}, {{0, 3}, {5, 5}}, {{0, 3}, {1, 5}}, {{0, 3}, {1, 1}}}},
		{"back: follows", [][]said{{{3, 3}, {3, 3}}, {{0, 3}, {5, 5}}, {{5, 5}, {5, 5}}}},
		{"never seen: up with the others, not down", [][]said{{{0, 2}, {2, 2}}, {{0, 7}, {7, 7}}, {{0, 7}, {2, 7}}, {{0, 7}, {2, 2}}, {{2, 2}, {2, 2}}}},
		{"one low round is not believed", [][]said{{{9, 9}}, {{1, 9}}, {{9, 9}}}},
		{"two are", [][]said{{{9, 9}}, {{1, 9}}, {{1, 1}}}},
		{"nobody answers", [][]said{{{4, 4}}, {{0, 4}}, {{0, 4}}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := &Ring{}
			shards := make([]*shard, len(c.rounds[0]))
			for i := range shards {
				shards[i] = &shard{ring: r}
			}
			for k, says := range c.rounds {
				for i, s := range says {
					if s.heard > 0 {
						shards[i].heard.Store(s.heard)
					}
				}
				r.count(shards, func(i int) bool { return says[i].heard > 0 })
				for i, s := range says {
					if got := shards[i].instances(); got != int(s.want) {
						t.Errorf("round %d: shard %d is divided by %d, want %d", k, i, got, s.want)
					}
				}
			}
		})
	}
}

// More or fewer processes change what a unit costs here, not how many were admitted.
func TestAChangedNumberOfInstancesMintsNothing(t *testing.T) {
	for _, limit := range []Limit{TokenBucket{Rate: 1, Per: time.Hour, Burst: 100}, SlidingLog{Limit: 100, Window: time.Hour}} {
		r := compiled(t, limit)
		var s localState
		now := int64(time.Hour)
		take := func(instances int) (n int) {
			for {
				now++
				if ok, _, _, _ := s.take(r, now, 1, instances, 0, true); !ok {
					return n
				}
				n++
			}
		}
		if n := take(4); n != 25 {
			t.Errorf("%T: %d of 100 admitted by one of four, want 25", limit, n)
		}
		if n := take(2); n != 0 {
			t.Errorf("%T: %d more when two are counted, want none of the same share", limit, n)
		}
		o := s.takeOwed(r, now)
		if o.units < 25 || o.units > 26 {
			t.Errorf("%T: owes %d, want the 25 admitted", limit, o.units)
		}
		s.reseed(r, now, 10, 0, state{})
		s.giveBack(o)
		if again := s.takeOwed(r, now); again.units < 25 || again.units > 26 {
			t.Errorf("%T: owes %d as one of ten, want the 25 admitted as one of four", limit, again.units)
		} else if s.confirmed(now, again); s.takeOwed(r, now).units != 0 {
			t.Errorf("%T: still owes after all was confirmed", limit)
		}
	}
}

func TestAWrongNumberOfInstancesIsRefused(t *testing.T) {
	for _, n := range []int{-1, 1_000_001} {
		_, err := Open(t.Context(), Config{Shards: []ShardConfig{{ID: "a", Primary: "redis://127.0.0.1:1"}}, Instances: n})
		var f *FieldError
		if !errors.As(err, &f) || f.Field != "Config.Instances" {
			t.Errorf("%d: %v", n, err)
		}
	}
}
