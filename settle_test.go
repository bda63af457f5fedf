package ringfence_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// The experiment of the ladder, with its end: L = 100 a minute, 40 used, the primary dies,
// four processes ask for 200 each, the replica is promoted, everybody asks again. Without
// settling the promoted replica would admit the 60 left a second time.
func TestWhatSharesAdmittedIsSettledWithThePromotedReplica(t *testing.T) {
	for _, c := range []struct {
		name  string
		limit ringfence.Limit
	}{
		{"sliding log", ringfence.SlidingLog{Limit: 100, Window: time.Minute}},
		{"token bucket", ringfence.TokenBucket{Rate: 100, Per: time.Hour, Burst: 100}},
	} {
		t.Run(c.name, func(t *testing.T) {
			primary := redistest.Start(t, redistest.Options{})
			replica := redistest.Start(t, redistest.Options{ReplicaOf: primary})
			if err := replica.WaitInSync(t.Context()); err != nil {
				t.Fatal(err)
			}
			const instances = 4
			var limiters []*ringfence.Limiter
			registry := prometheus.NewRegistry()
			for i := range instances {
				redistest.NoLeaks(t)
				ring, err := ringfence.Open(t.Context(), ringfence.Config{
					Shards:    []ringfence.ShardConfig{{ID: "a", Primary: primary.URL(), Replicas: []string{replica.URL()}}},
					HashKey:   []byte("0123456789abcdef"),
					Instances: instances, InstanceID: fmt.Sprint(i), Policy: ringfence.PolicyClosed,
					Registerer: registry, Name: fmt.Sprintf("ring-%d", i),
					Budget: 200 * time.Millisecond,
				})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = ring.Close() })
				l, err := ring.Limiter("l", c.limit)
				if err != nil {
					t.Fatal(err)
				}
				limiters = append(limiters, l)
			}
			ask := func(l *ringfence.Limiter, n int) (admitted int, sources map[ringfence.Source]int) {
				sources = map[ringfence.Source]int{}
				for range n {
					d, err := l.Allow(context.Background(), "user")
					if err != nil {
						t.Fatal(err)
					}
					sources[d.Source]++
					if d.Allowed {
						admitted++
					}
				}
				return admitted, sources
			}
			if n, _ := ask(limiters[0], 40); n != 40 {
				t.Fatalf("%d of 40 admitted before the fault", n)
			}
			if err := replica.WaitInSync(t.Context()); err != nil {
				t.Fatal(err)
			}
			primary.Kill()
			during := 0
			for _, l := range limiters {
				n, sources := ask(l, 200)
				during += n
				if sources[ringfence.SourceReplica] == 0 {
					t.Errorf("nothing came from a share: %v", sources)
				}
			}
			// Parts are dealt out by chance where they do not divide; 60 does.
			if during != 60 {
				t.Errorf("%d admitted while the primary was dead, want the 60 that were left", during)
			}
			if err := replica.Promote(t.Context()); err != nil {
				t.Fatal(err)
			}
			// Nobody asks anything meanwhile: probes find the new primary, and the shares are
			// told in the background.
			deadline := time.Now().Add(20 * time.Second)
			for total(t, registry, "ratelimiter_settled_charges_total") < 60 {
				if time.Now().After(deadline) {
					t.Fatalf("only %v units were settled", total(t, registry, "ratelimiter_settled_charges_total"))
				}
				time.Sleep(5 * time.Millisecond)
			}
			for i, l := range limiters {
				n, sources := ask(l, 20)
				if n != 0 {
					t.Errorf("process %d: %d admitted after the promotion, although all of the limit was used (%v)", i, n, sources)
				}
				if first := sources[ringfence.SourcePrimary]; first == 0 || first+sources[ringfence.SourceCache] != 20 {
					t.Errorf("process %d: the promoted replica did not answer: %v", i, sources)
				}
			}
			if got := total(t, registry, "ratelimiter_settled_charges_total"); got != 60 {
				t.Errorf("%v units settled, want 60", got)
			}
			if got := total(t, registry, "ratelimiter_settle_lost_total"); got != 0 {
				t.Errorf("%v units lost in settling, want none", got)
			}
		})
	}
}

// While the debit of a key is on its way, a call for it on another connection could be
// decided without it. So the share goes on answering, and what it admits is told next.
func TestNoCallOvertakesTheDebitOfItsKey(t *testing.T) {
	for _, limit := range []ringfence.Limit{hundredAMinute, ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 100}} {
		t.Run(fmt.Sprintf("%T", limit), func(t *testing.T) {
			s := startPair(t)
			far := startProxy(t, s.primary)
			registry := prometheus.NewRegistry()
			ring := open(t, ringfence.Config{
				Shards:     []ringfence.ShardConfig{{ID: "a", Primary: "redis://" + far.Addr(), Replicas: []string{s.replica.URL()}}},
				Registerer: registry, Policy: ringfence.PolicyClosed, Instances: 1,
				Budget: 5 * time.Second, OperationTimeout: 5 * time.Second, NearCacheKeys: -1,
			})
			l := limiter(t, ring, limit)
			admitted := 0
			allow := func(want ringfence.Source, cause ringfence.Cause) bool {
				t.Helper()
				d, err := l.Allow(t.Context(), "user")
				must(t, err)
				if d.Source != want || d.Cause != cause {
					t.Fatalf("%+v, want source %s, cause %s", d, want, cause)
				}
				if d.Allowed {
					admitted++
				}
				return d.Allowed
			}
			for range 40 {
				allow(ringfence.SourcePrimary, ringfence.CauseNone)
			}
			s.sync(t)
			must(t, ring.ForceBreaker("a", ringfence.BreakerForcedOpen))
			for range 20 {
				allow(ringfence.SourceReplica, ringfence.CauseBreaker)
			}
			far.SetDelay(time.Second) // each way
			must(t, ring.ForceBreaker("a", ringfence.BreakerAuto))
			eventually(t, 5*time.Second, "the debit is on its way", func() bool { return ring.Stats()[0].InFlight > 0 })
			if d, err := l.Peek(t.Context(), "user"); err != nil || d.Source != ringfence.SourceReplica || d.Remaining != 40 {
				t.Errorf("Peek: %+v, %v", d, err)
			}
			many, err := l.AllowMany(t.Context(), []ringfence.Request{{Key: "user", Cost: 5}, {Key: "user", Cost: 5}})
			must(t, err)
			for _, d := range many {
				if !d.Allowed || d.Source != ringfence.SourceReplica || d.Cause != ringfence.CauseBudget {
					t.Errorf("AllowMany: %+v", d)
				}
				admitted += 5
			}
			for allow(ringfence.SourceReplica, ringfence.CauseBudget) {
			}
			if admitted != 100 {
				t.Errorf("%d admitted, want 100: 40 by the primary, 60 out of the share", admitted)
			}
			far.SetDelay(0)
			eventually(t, 10*time.Second, "all 60 are settled", func() bool {
				return total(t, registry, "ratelimiter_settled_charges_total") == 60
			})
			for range 20 {
				if allow(ringfence.SourcePrimary, ringfence.CauseNone) {
					t.Error("the primary admits what had been used up")
				}
			}
			if got := total(t, registry, "ratelimiter_settle_lost_total"); got != 0 {
				t.Errorf("%v units lost in settling", got)
			}
		})
	}
}

func total(t *testing.T, g prometheus.Gatherer, name string) (sum float64) {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}
