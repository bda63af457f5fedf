package ringfence_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// inStep lets the clock of rings stand where the servers' stand; step moves both.
func inStep(p *suitePlace) (adjust func(*ringfence.Config), step func(time.Duration)) {
	var at atomic.Int64 // rings read it in the background
	at.Store(p.now)
	adjust = func(c *ringfence.Config) {
		c.Now = func() time.Time { return time.UnixMicro(at.Load()) }
		// The ring's alarm goes by the machine's timer, so that a budget after the first call it
		// would take the time of all that began at the same standing instant for over.
		c.Budget, c.OperationTimeout = time.Minute, time.Minute
	}
	return adjust, func(by time.Duration) {
		p.step(by)
		at.Store(p.now)
	}
}

// The same calls at the same instants admit the same with and without denials kept here,
// on one shard and on four, in batches of one and of 64; and nobody is told to wait longer.
func TestTheSameCallsAreAdmittedWithAndWithoutTheNearCache(t *testing.T) {
	type variant struct {
		near          int
		shards, batch int
	}
	variants := []variant{{-1, 1, 64}, {0, 1, 64}, {0, 1, 1}, {0, 4, 64}, {4, 4, 1}}
	onEachPlace(t, 4, func(t *testing.T, p *suitePlace) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rings := make([]map[string]*ringfence.Limiter, len(variants))
		together, step := inStep(p)
		for i, v := range variants {
			r := p.open(t, together, func(c *ringfence.Config) {
				c.Shards, c.MaxBatch, c.NearCacheKeys = p.shards[:v.shards], v.batch, v.near
				c.Prefix = fmt.Sprint("variant-", i)
			})
			rings[i] = map[string]*ringfence.Limiter{}
			for _, k := range suiteKinds {
				rings[i][k.name] = suiteLimiter(t, r, strings.ReplaceAll(k.name, " ", "-"), k.limit(9, 100*time.Millisecond))
			}
		}
		rnd := rand.New(rand.NewPCG(seed, 0))
		key := func() string { return fmt.Sprint("k", rnd.IntN(8)) }
		admitted, cached := 0, 0
		for i := range 600 {
			step(time.Duration(rnd.IntN(12_000)) * time.Microsecond)
			kind := suiteKinds[rnd.IntN(len(suiteKinds))].name
			var call func(l *ringfence.Limiter) ([]ringfence.Decision, error)
			switch k, cost := key(), 1+rnd.Int64N(9); rnd.IntN(24) {
			case 0:
				call = func(l *ringfence.Limiter) ([]ringfence.Decision, error) { return nil, l.Reset(context.Background(), k) }
			case 1, 2, 3, 4:
				reqs := make([]ringfence.Request, 1+rnd.IntN(20))
				for j := range reqs {
					reqs[j] = ringfence.Request{Key: key(), Cost: 1 + rnd.Int64N(4)}
				}
				call = func(l *ringfence.Limiter) ([]ringfence.Decision, error) {
					return l.AllowMany(context.Background(), reqs)
				}
			default:
				call = func(l *ringfence.Limiter) ([]ringfence.Decision, error) {
					d, err := l.AllowN(context.Background(), k, cost)
					return []ringfence.Decision{d}, err
				}
			}
			var first []ringfence.Decision
			for v, limiters := range rings {
				got, err := call(limiters[kind])
				suiteMust(t, err)
				for j := range got {
					fromCache := got[j].Source == ringfence.SourceCache
					if fromCache {
						cached++
						if got[j].RetryAfter > first[j].RetryAfter || got[j].RetryAfter <= 0 {
							t.Fatalf("call %d, entry %d: %+v waits longer than %+v", i, j, got[j], first[j])
						}
						// Smaller calls may have been admitted since the denial.
						allowed := got[j].Allowed
						got[j] = first[j]
						got[j].Allowed = allowed
					}
					exactly(t, got[j])
					got[j].Shard = ""
					if v == 0 && got[j].Allowed {
						admitted++
					}
					if v > 0 && got[j] != first[j] {
						t.Fatalf("call %d, %s, entry %d: %+v with %+v (from the cache: %t), but %+v with %+v",
							i, kind, j, got[j], variants[v], fromCache, first[j], variants[0])
					}
				}
				if v == 0 {
					first = got
				}
			}
		}
		if admitted < 100 || cached < 100 {
			t.Errorf("%d admitted and %d answered from the cache: the calls do not press the limits", admitted, cached)
		}
	})
}

func TestADenialIsRepeatedAsLongAsItHoldsAndNoLonger(t *testing.T) {
	onEachKind(t, 1, 10, 100*time.Millisecond, func(t *testing.T, p *suitePlace, _ *ringfence.Ring, l *ringfence.Limiter) {
		together, step := inStep(p)
		r := p.open(t, together, func(c *ringfence.Config) { c.NearCacheKeys = 0 })
		l = suiteLimiter(t, r, l.Name(), l.Limit())
		ask := func(what string, cost int64, allowed bool, source ringfence.Source) ringfence.Decision {
			t.Helper()
			d, err := l.AllowN(t.Context(), "k", cost)
			suiteMust(t, err)
			if d.Allowed != allowed || d.Source != source {
				t.Errorf("%s: %+v, want allowed %t by %s", what, d, allowed, source)
			}
			return d
		}
		const primary, cache = ringfence.SourcePrimary, ringfence.SourceCache
		ask("all", 10, true, primary)
		wait := ask("denied", 5, false, primary).RetryAfter
		if d := ask("again", 5, false, cache); d.RetryAfter != wait {
			t.Errorf("the wait is %s, was %s", d.RetryAfter, wait)
		}
		ask("more", 6, false, cache)
		ask("less", 4, false, primary)
		step(time.Millisecond)
		if d := ask("1 ms later", 5, false, cache); d.RetryAfter != wait-time.Millisecond {
			t.Errorf("the wait is %s, want %s", d.RetryAfter, wait-time.Millisecond)
		}
		suiteMust(t, l.Reset(t.Context(), "k"))
		ask("after Reset", 10, true, primary)
		step(time.Microsecond)
		wait = ask("denied again", 1, false, primary).RetryAfter
		step(wait - 1)
		step(time.Microsecond)
		ask("when the wait is over", 1, true, primary)
	})
}

// Whatever is Reset by one and denied to others at the same time: once Reset has returned,
// the next call is decided by what the primary holds.
func TestALateDenialDoesNotOutliveAReset(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	c := exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()})
	c.NearCacheKeys = 0
	r, err := ringfence.Open(t.Context(), c)
	suiteMust(t, err)
	defer r.Close()
	l, err := r.Limiter("l", ringfence.SlidingLog{Limit: 1, Window: time.Hour}, ringfence.WithNearCache(ringfence.MaxNearCache))
	suiteMust(t, err)
	stop := make(chan struct{})
	var cached atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				d, err := l.AllowN(context.Background(), "k", 1)
				if err != nil {
					t.Error(err)
					return
				}
				if d.Source == ringfence.SourceCache {
					cached.Add(1)
				}
			}
		})
	}
	// With a limit of one, whoever comes first after a Reset is admitted: long before a denial
	// ends somebody must be.
	for range 200 {
		suiteMust(t, l.Reset(context.Background(), "k"))
		admitted := false
		for end := time.Now().Add(ringfence.MaxNearCache / 2); !admitted && time.Now().Before(end); {
			d, err := l.Peek(context.Background(), "k")
			suiteMust(t, err)
			admitted = d.Remaining == 0
		}
		if !admitted {
			t.Fatal("nobody is admitted after a Reset: a late denial was kept")
		}
	}
	close(stop)
	wg.Wait()
	if cached.Load() == 0 {
		t.Error("the cache was never used")
	}
}

// A bucket that gives 100 a second gives them to callers who hammer it, whatever is kept.
func TestTheNearCacheDoesNotStarveAHotKey(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	c := exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()})
	c.NearCacheKeys = 0
	r, err := ringfence.Open(t.Context(), c)
	suiteMust(t, err)
	defer r.Close()
	limit := ringfence.TokenBucket{Rate: 1000, Per: time.Second, Burst: 10}
	l := suiteLimiter(t, r, "l", limit)
	var admitted, cached atomic.Int64
	start := time.Now()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for time.Since(start) < time.Second {
				d, err := l.Allow(context.Background(), "k")
				if err != nil {
					t.Error(err)
					return
				}
				if d.Allowed {
					admitted.Add(1)
				} else if d.Source == ringfence.SourceCache {
					cached.Add(1)
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	if most := limit.WorstCase(took); admitted.Load() > most {
		t.Errorf("%d admitted in %s, at most %d may be", admitted.Load(), took, most)
	}
	if admitted.Load() < 100 || cached.Load() == 0 { // on a busy machine callers may come late
		t.Errorf("%d admitted, %d denied from the cache", admitted.Load(), cached.Load())
	}
}

func TestTheNearCacheIsBoundedAndCounted(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	reg := prometheus.NewPedanticRegistry()
	c := exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()})
	c.NearCacheKeys, c.Registerer = 16, reg
	r, err := ringfence.Open(t.Context(), c)
	suiteMust(t, err)
	defer r.Close()
	l := suiteLimiter(t, r, "l", ringfence.SlidingLog{Limit: 1, Window: time.Hour})
	off, err := r.Limiter("off", ringfence.SlidingLog{Limit: 1, Window: time.Hour}, ringfence.WithNearCache(0))
	suiteMust(t, err)
	for i := range 200 {
		for range 2 {
			for _, l := range []*ringfence.Limiter{l, off} {
				_, err := l.Allow(t.Context(), fmt.Sprint(i))
				suiteMust(t, err)
			}
		}
	}
	if d, err := l.Allow(t.Context(), "199"); err != nil || d.Source != ringfence.SourceCache {
		t.Errorf("%+v, %v", d, err)
	}
	if d, err := off.Allow(t.Context(), "199"); err != nil || d.Source != ringfence.SourcePrimary {
		t.Errorf("turned off: %+v, %v", d, err)
	}
	families, err := reg.Gather()
	suiteMust(t, err)
	found := 0
	for _, f := range families {
		for _, m := range f.GetMetric() {
			limit := ""
			for _, p := range m.GetLabel() {
				if p.GetName() == "limit" {
					limit = p.GetValue()
				}
			}
			switch f.GetName() + " " + limit {
			case "ratelimiter_near_cache_entries l":
				found++
				if n := m.GetGauge().GetValue(); n < 1 || n > 16 {
					t.Errorf("%v denials are kept, at most 16 may be", n)
				}
			case "ratelimiter_near_cache_entries off":
				found++
				if n := m.GetGauge().GetValue(); n != 0 {
					t.Errorf("%v denials of a limiter without", n)
				}
			case "ratelimiter_near_cache_hits_total l":
				found++
				if n := m.GetCounter().GetValue(); n < 1 {
					t.Errorf("%v hits", n)
				}
			}
		}
	}
	if found != 3 {
		t.Errorf("%d of 3 metrics found", found)
	}
}

func TestNearCacheOptionsAreChecked(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	c := exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()})
	c.NearCacheKeys = 1<<24 + 1
	if _, err := ringfence.Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), "Config.NearCacheKeys") {
		t.Errorf("too many keys: %v", err)
	}
	c.NearCacheKeys = 0
	r, err := ringfence.Open(t.Context(), c)
	suiteMust(t, err)
	defer r.Close()
	for _, d := range []time.Duration{-1, ringfence.MaxNearCache + 1} {
		if _, err := r.Limiter("l", ringfence.SlidingLog{Limit: 1, Window: time.Hour}, ringfence.WithNearCache(d)); err == nil || !strings.Contains(err.Error(), "WithNearCache") {
			t.Errorf("%s: %v", d, err)
		}
	}
}

// What a denial costs that needs no round trip: alone, and with 64 callers of one key; by
// limit, and with and without metrics. ns/op is the time the process needs for one, all
// callers together: 1e9 divided by it are denials a second.
//
//	go test -run '^$' -bench DeniedFromTheNearCache -count 10 .
func BenchmarkDeniedFromTheNearCache(b *testing.B) {
	s := redistest.Start(b, redistest.Options{})
	for _, watched := range []bool{false, true} {
		c := exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()})
		c.NearCacheKeys = 0
		name := "bare"
		if watched {
			c.Registerer, name = prometheus.NewRegistry(), "metrics"
		}
		r, err := ringfence.Open(b.Context(), c)
		suiteMust(b, err)
		defer r.Close()
		for _, k := range []struct {
			name  string
			limit ringfence.Limit
		}{
			{"token-bucket", ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 1}},
			{"sliding-log", ringfence.SlidingLog{Limit: 1, Window: time.Hour}},
		} {
			l, err := r.Limiter(k.name, k.limit, ringfence.WithNearCache(ringfence.MaxNearCache))
			suiteMust(b, err)
			for _, callers := range []int{1, 64} {
				b.Run(fmt.Sprintf("%s/%s/callers=%d", name, k.name, callers), func(b *testing.B) {
					callDenied(b, l, callers)
				})
			}
		}
	}
}

func callDenied(b *testing.B, l *ringfence.Limiter, callers int) {
	ctx := context.Background()
	for range 2 {
		_, err := l.Allow(ctx, "k")
		suiteMust(b, err)
	}
	b.ReportAllocs()
	b.ResetTimer()
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for range (b.N + c) / callers {
				if d, err := l.Allow(ctx, "k"); err != nil || d.Allowed {
					b.Errorf("%+v, %v", d, err)
					return
				}
			}
		})
	}
	wg.Wait()
}
