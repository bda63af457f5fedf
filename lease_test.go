package ringfence_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

func withLease(most int64) ringfence.LimiterOption {
	return ringfence.WithLease(ringfence.Lease{Max: most})
}

func leaseLimiter(t testing.TB, r *ringfence.Ring, limit ringfence.Limit, opts ...ringfence.LimiterOption) *ringfence.Limiter {
	t.Helper()
	l, err := r.Limiter("l", limit, opts...)
	suiteMust(t, err)
	return l
}

func leaseAllow(t testing.TB, l *ringfence.Limiter) ringfence.Decision {
	t.Helper()
	d, err := l.Allow(context.Background(), "k")
	suiteMust(t, err)
	return d
}

// The same calls at one instant admit the same with leases as without, each by each.
func TestTheSameCallsAreAdmittedWithAndWithoutLeases(t *testing.T) {
	variants := [][]ringfence.LimiterOption{nil, {withLease(1000)}, {withLease(5)}, {withLease(64), ringfence.WithNearCache(0)}}
	onEachPlace(t, 2, func(t *testing.T, p *suitePlace) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rnd := rand.New(rand.NewPCG(seed, 0))
		together, step := inStep(p)
		limiters := map[string][]*ringfence.Limiter{}
		for i, v := range variants {
			r := p.open(t, together, func(c *ringfence.Config) {
				c.Prefix, c.NearCacheKeys = fmt.Sprint("variant-", i), 0
			})
			for _, k := range suiteKinds {
				l, err := r.Limiter(strings.ReplaceAll(k.name, " ", "-"), k.limit(400, time.Minute), v...)
				suiteMust(t, err)
				limiters[k.name] = append(limiters[k.name], l)
			}
		}
		leased, denied := 0, 0
		for i := range 3000 {
			kind := suiteKinds[rnd.IntN(len(suiteKinds))].name
			key, cost := fmt.Sprint("k", rnd.IntN(3)), 1+rnd.Int64N(9)*rnd.Int64N(2)
			var want []bool
			reqs := make([]ringfence.Request, rnd.IntN(6)*max(0, rnd.IntN(8)-6))
			for j := range reqs {
				reqs[j] = ringfence.Request{Key: key, Cost: 1 + rnd.Int64N(6)}
			}
			reset := rnd.IntN(700) == 0
			if reset || i%100 == 0 { // nor is the time of all calls over at one instant, see inStep
				step(time.Microsecond) // what is asked for at the instant of a Reset is not used
			}
			left := remainingOf(t, limiters[kind][0], key)
			for v, l := range limiters[kind] {
				// What was asked for in advance is to have arrived.
				for deadline := time.Now().Add(10 * time.Second); remainingOf(t, l, key) != left; {
					if time.Now().After(deadline) {
						t.Fatalf("call %d: %d remain with variant %d, but %d without leases", i, remainingOf(t, l, key), v, left)
					}
				}
				var got []ringfence.Decision
				var err error
				switch {
				case reset:
					err = l.Reset(t.Context(), key)
				case len(reqs) > 0:
					got, err = l.AllowMany(t.Context(), reqs)
				default:
					got = make([]ringfence.Decision, 1)
					got[0], err = l.AllowN(t.Context(), key, cost)
				}
				suiteMust(t, err)
				for j, d := range got {
					switch {
					case v == 0:
						want = append(want, d.Allowed)
						if !d.Allowed {
							denied++
						}
					case d.Allowed != want[j]:
						t.Fatalf("call %d, %s, entry %d of %d, cost %d, variant %d: %+v, but allowed %t without leases; %d were left", i, kind, j, len(got), cost, v, d, want[j], left)
					}
					if d.Source == ringfence.SourceLease {
						leased++
						if d.Remaining < 0 || d.Remaining > d.Limit || d.ResetAfter <= 0 || d.RetryAfter != 0 {
							t.Fatalf("%+v", d)
						}
					}
				}
			}
			if reset {
				step(time.Microsecond)
			}
		}
		if leased < 300 || denied < 100 {
			t.Errorf("%d out of leases and %d denied: that shows little", leased, denied)
		}
	})
}

// admission is a call that was admitted at some instant between the two.
type admission struct{ from, to time.Duration }

// worst is the highest number of units that were surely admitted within a span.
func worst(all []admission, span time.Duration) (most int) {
	slices.SortFunc(all, func(a, b admission) int { return int(a.from - b.from) })
	for i, first := range all {
		n := 0
		for _, a := range all[i:] {
			if a.from >= first.from+span {
				break
			}
			if a.to < first.from+span {
				n++
			}
		}
		most = max(most, n)
	}
	return most
}

// press calls one key from several rings for a while, some with leases and some without,
// in bursts with pauses, and returns what was admitted.
func press(t *testing.T, url string, limit ringfence.Limit, leases []int64, for_ time.Duration) (all []admission, leased int) {
	t.Helper()
	var mu sync.Mutex
	var wg sync.WaitGroup
	var out atomic.Int64
	began := time.Now()
	for i, most := range leases {
		c := exactConfig(ringfence.ShardConfig{ID: "a", Primary: url})
		c.NearCacheKeys = 0
		r, err := ringfence.Open(t.Context(), c)
		suiteMust(t, err)
		defer r.Close()
		var opts []ringfence.LimiterOption
		if most > 0 {
			opts = append(opts, withLease(most))
		}
		l := leaseLimiter(t, r, limit, opts...)
		for j := range 2 {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(i), uint64(j)))
				var mine []admission
				for time.Since(began) < for_ {
					for range rnd.IntN(60) {
						from := time.Since(began)
						d, err := l.Allow(context.Background(), "k")
						if err != nil {
							t.Error(err)
							return
						}
						if d.Allowed {
							mine = append(mine, admission{from, time.Since(began)})
						}
						if d.Source == ringfence.SourceLease {
							out.Add(1)
						}
					}
					time.Sleep(time.Duration(rnd.IntN(30)) * time.Millisecond) // a pause is the load, not a wait
				}
				mu.Lock()
				defer mu.Unlock()
				all = append(all, mine...)
			})
		}
	}
	wg.Wait()
	return all, int(out.Load())
}

// However leases are taken, used, returned and lost, by some of the rings or by all, no
// window of a log ever holds more than the limit.
func TestNoWindowOfALogHoldsMoreThanTheLimitWithLeases(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	for _, leases := range [][]int64{{64, 64, 64}, {20, 0, 64}, {7, 0, 0}} {
		t.Run(fmt.Sprint(leases), func(t *testing.T) {
			s.Client().FlushAll(t.Context())
			const limit, window = 600, 250 * time.Millisecond
			all, leased := press(t, s.URL(), ringfence.SlidingLog{Limit: limit, Window: window}, leases, 2*time.Second)
			most := worst(all, window)
			t.Logf("%d admitted, %d of them out of leases; at most %d in a window", len(all), leased, most)
			if most > limit {
				t.Errorf("%d units within %s, the limit is %d", most, window, limit)
			}
			if leased < 100 || most < limit/2 {
				t.Errorf("the calls do not press the limit, or hardly out of leases")
			}
		})
	}
}

// A bucket admits no more than Burst + Rate x T + what is outstanding.
func TestABucketWithLeasesStaysWithinItsBound(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	const rate, burst, most, rings = 1000, 500, 40, 3
	all, leased := press(t, s.URL(), ringfence.TokenBucket{Rate: rate, Per: time.Second, Burst: burst}, []int64{most, most, most}, 2*time.Second)
	t.Logf("%d admitted, %d of them out of leases", len(all), leased)
	for _, span := range []time.Duration{10 * time.Millisecond, 100 * time.Millisecond, 500 * time.Millisecond, 2 * time.Second} {
		bound := burst + int(rate*span/time.Second) + rings*most
		if n := worst(all, span); n > bound {
			t.Errorf("%d within %s, want at most %d", n, span, bound)
		}
	}
	if leased < 100 {
		t.Error("hardly any call was admitted out of a lease")
	}
}

// leaseRings are two rings on one server, of which only the first has leases.
func leaseRings(t *testing.T, url string, limit ringfence.Limit, c ringfence.Lease) (holder *ringfence.Ring, l, look *ringfence.Limiter) {
	t.Helper()
	open := func() *ringfence.Ring {
		r, err := ringfence.Open(t.Context(), exactConfig(ringfence.ShardConfig{ID: "a", Primary: url}))
		suiteMust(t, err)
		t.Cleanup(func() { suiteMust(t, r.Close()) })
		return r
	}
	holder = open()
	other := open()
	return holder, leaseLimiter(t, holder, limit, ringfence.WithLease(c)), leaseLimiter(t, other, limit)
}

var leaseKinds = map[string]ringfence.Limit{
	"bucket": ringfence.TokenBucket{Rate: 1000, Per: time.Hour, Burst: 1000},
	"log":    ringfence.SlidingLog{Limit: 1000, Window: time.Hour},
}

// hold calls until something is held, and returns the calls made.
func hold(t *testing.T, l *ringfence.Limiter) (calls int64) {
	t.Helper()
	for source := ringfence.SourcePrimary; calls < 40 || source != ringfence.SourceLease; calls++ {
		d := leaseAllow(t, l)
		if !d.Allowed {
			t.Fatalf("call %d: %+v", calls, d)
		}
		source = d.Source
		if calls > 2000 {
			t.Fatal("no call was admitted out of a lease")
		}
	}
	return calls
}

func remaining(t *testing.T, l *ringfence.Limiter) int64 { return remainingOf(t, l, "k") }

func remainingOf(t *testing.T, l *ringfence.Limiter, key string) int64 {
	t.Helper()
	d, err := l.Peek(t.Context(), key)
	suiteMust(t, err)
	return d.Remaining
}

// settles waits until the primary has taken back all but what was used.
func settles(t *testing.T, look *ringfence.Limiter, used int64) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		// A bucket refills meanwhile, by 1 unit in 3.6 s.
		n := remaining(t, look)
		if n >= 1000-used && n <= 1000-used+3 {
			return
		}
		if n > 1000-used+3 {
			t.Fatalf("%d remain of 1000 after %d calls: more was returned than was taken", n, used)
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d remain of 1000 after %d calls: not all was returned", n, used)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestWhatIsNotUsedGoesBackWhenTheCallsStop(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	for name, limit := range leaseKinds {
		t.Run(name, func(t *testing.T) {
			s.Client().FlushAll(t.Context())
			_, l, look := leaseRings(t, s.URL(), limit, ringfence.Lease{Max: 100})
			used := hold(t, l)
			if n := remaining(t, look); n >= 1000-used {
				t.Fatalf("%d remain after %d calls: nothing was held", n, used)
			}
			settles(t, look, used)
		})
	}
}

func TestCloseReturnsWhatIsHeld(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	for name, limit := range leaseKinds {
		t.Run(name, func(t *testing.T) {
			s.Client().FlushAll(t.Context())
			holder, l, look := leaseRings(t, s.URL(), limit, ringfence.Lease{Max: 100})
			used := hold(t, l)
			suiteMust(t, holder.Close())
			if n := remaining(t, look); n < 1000-used || n > 1000-used+1 {
				t.Errorf("%d remain of 1000 after %d calls and Close", n, used)
			}
			if _, err := l.Allow(t.Context(), "k"); !errors.Is(err, ringfence.ErrClosed) {
				t.Errorf("after Close: %v", err)
			}
		})
	}
}

func TestResetDropsWhatIsHeld(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	for name, limit := range leaseKinds {
		t.Run(name, func(t *testing.T) {
			s.Client().FlushAll(t.Context())
			holder, l, look := leaseRings(t, s.URL(), limit, ringfence.Lease{Max: 100})
			hold(t, l)
			suiteMust(t, l.Reset(t.Context(), "k"))
			if d := leaseAllow(t, l); d.Source != ringfence.SourcePrimary || !d.Allowed {
				t.Errorf("after Reset: %+v", d)
			}
			settles(t, look, 1)
			suiteMust(t, holder.Close())
			settles(t, look, 1)
		})
	}
}

// A process that dies holds no more than Max; in a log that is forgotten.
func TestACrashLosesAtMostWhatIsOutstanding(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	limit := ringfence.SlidingLog{Limit: 1000, Window: 300 * time.Millisecond}
	holder, l, look := leaseRings(t, s.URL(), limit, ringfence.Lease{Max: 50})
	began := time.Now()
	used := hold(t, l)
	suiteMust(t, holder.ForceBreaker("a", ringfence.BreakerForcedOpen)) // it cannot return anything any more
	n := remaining(t, look)
	// On a slow machine the first of them have left the window already; then there is more.
	t.Logf("%s after the first call", time.Since(began))
	if n < 1000-used-50 {
		t.Errorf("%d remain after %d calls, with 50 held at most", n, used)
	}
	for deadline := time.Now().Add(10 * time.Second); remaining(t, look) < 1000; {
		if time.Now().After(deadline) {
			t.Fatalf("%d remain long after the window", remaining(t, look))
		}
		time.Sleep(time.Millisecond)
	}
}

func TestALeaseIsUsedWhileTheShardIsAwayAndNotOnceItHasEnded(t *testing.T) {
	onEachPlace(t, 1, func(t *testing.T, p *suitePlace) {
		together, step := inStep(p)
		r := p.open(t, together)
		l := leaseLimiter(t, r, ringfence.TokenBucket{Rate: 1000, Per: time.Hour, Burst: 1000}, withLease(100))
		hold(t, l)
		suiteMust(t, r.ForceBreaker(p.shards[0].ID, ringfence.BreakerForcedOpen))
		n := 0
		for ; ; n++ {
			if d := leaseAllow(t, l); d.Source != ringfence.SourceLease {
				if d.Source != ringfence.SourcePolicy || d.Allowed {
					t.Fatalf("%+v", d)
				}
				break
			}
		}
		t.Logf("%d more", n)
		if n > 100 {
			t.Errorf("%d calls out of a lease of 100", n)
		}
		suiteMust(t, r.ForceBreaker(p.shards[0].ID, ringfence.BreakerAuto))
		hold(t, l)
		suiteMust(t, r.ForceBreaker(p.shards[0].ID, ringfence.BreakerForcedOpen))
		step(time.Second)
		if d := leaseAllow(t, l); d.Source == ringfence.SourceLease {
			t.Errorf("a lease of 1 s is used 1 s later: %+v", d)
		}
	})
}

// One caller asks for the next lease in advance, and the others go on: few calls go to the
// primary.
func TestMostCallsNeedNoRoundTrip(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	for _, limit := range []ringfence.Limit{
		ringfence.TokenBucket{Rate: 1_000_000, Per: time.Second, Burst: 1_000_000},
		ringfence.SlidingLog{Limit: 200_000, Window: 10 * time.Second},
	} {
		_, l, _ := leaseRings(t, s.URL(), limit, ringfence.Lease{Max: 64})
		sources := map[ringfence.Source]int{}
		for range 20_000 {
			d := leaseAllow(t, l)
			if !d.Allowed {
				t.Fatalf("%+v", d)
			}
			sources[d.Source]++
		}
		t.Log(sources)
		if sources[ringfence.SourceLease] < 15_000 {
			t.Errorf("%v", sources)
		}
		suiteMust(t, l.Reset(t.Context(), "k"))
	}
}

func TestPeekCountsWhatIsHeld(t *testing.T) {
	onEachPlace(t, 1, func(t *testing.T, p *suitePlace) {
		together, _ := inStep(p)
		for name, limit := range leaseKinds {
			r := p.open(t, together, func(c *ringfence.Config) { c.Prefix = name })
			l := leaseLimiter(t, r, limit, withLease(100))
			used := hold(t, l)
			// The next lease may be on its way.
			for deadline := time.Now().Add(10 * time.Second); remaining(t, l) != 1000-used; {
				if time.Now().After(deadline) {
					t.Fatalf("%s: %d remain after %d calls", name, remaining(t, l), used)
				}
			}
		}
	})
}

func TestLeasesThatMakeNoSenseAreRefused(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	r, err := ringfence.Open(t.Context(), exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()}))
	suiteMust(t, err)
	defer r.Close()
	second := ringfence.SlidingLog{Limit: 100, Window: time.Second}
	for i, c := range []struct {
		lease ringfence.Lease
		limit ringfence.Limit
		field string
	}{
		{ringfence.Lease{}, second, "Lease.Max"},
		{ringfence.Lease{Max: -1}, second, "Lease.Max"},
		{ringfence.Lease{Max: 1001}, second, "Lease.Max"},
		{ringfence.Lease{Max: 1, TTL: -1}, second, "Lease.TTL"},
		{ringfence.Lease{Max: 1, TTL: time.Microsecond}, second, "Lease.TTL"},
		{ringfence.Lease{Max: 1, TTL: time.Millisecond + 1}, second, "Lease.TTL"},
		{ringfence.Lease{Max: 1, TTL: 2 * time.Second}, ringfence.SlidingLog{Limit: 100, Window: time.Hour}, "Lease.TTL"},
		{ringfence.Lease{Max: 1, TTL: 101 * time.Millisecond}, second, "Lease.TTL"},
		{ringfence.Lease{Max: 1}, ringfence.SlidingLog{Limit: 100, Window: 9 * time.Millisecond}, "Lease.TTL"},
		{ringfence.Lease{Max: 1, TTL: 100 * time.Millisecond}, second, ""},
		{ringfence.Lease{Max: 1000}, ringfence.TokenBucket{Rate: 100, Per: time.Second, Burst: 1}, ""},
	} {
		_, err := r.Limiter(fmt.Sprint("l", i), c.limit, ringfence.WithLease(c.lease))
		var field *ringfence.FieldError
		switch {
		case c.field == "" && err != nil:
			t.Errorf("%+v: %v", c.lease, err)
		case c.field != "" && (!errors.As(err, &field) || field.Field != c.field):
			t.Errorf("%+v: %v, want an error of %s", c.lease, err, c.field)
		}
	}
	if _, err := r.Limiter("l9", second, withLease(2)); !errors.Is(err, ringfence.ErrInvalid) {
		t.Errorf("another lease under the same name: %v", err)
	}
}

// Callers of one process are not denied for what it took ahead itself, and nothing of it is
// lost: as many units as fit are admitted, and at the end less is left than any call that was
// denied asked for.
func TestCallersAreNotDeniedForWhatTheirProcessHolds(t *testing.T) {
	const limit, callers = 400, 600
	s := redistest.Start(t, redistest.Options{})
	r, err := ringfence.Open(t.Context(), exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()}))
	suiteMust(t, err)
	defer r.Close()
	leased := int64(0)
	for name, kind := range fixedKinds(limit) {
		l, err := r.Limiter(name, kind, withLease(40))
		suiteMust(t, err)
		for run := range 50 {
			key, dearest := fmt.Sprint("run-", run), int64(1+run%2*6) // every other run with mixed costs
			var admitted, ahead atomic.Int64
			var wg sync.WaitGroup
			least := make([]int64, 8) // that was denied, of each caller
			for i := range least {
				least[i] = math.MaxInt64
				wg.Go(func() {
					for j := range int64(callers / 8) {
						cost := 1 + (j+int64(i))%dearest
						d, err := l.AllowN(context.Background(), key, cost)
						switch {
						case err != nil:
							t.Error(err)
						case !d.Allowed:
							least[i] = min(least[i], cost)
						default:
							admitted.Add(cost)
							if d.Source == ringfence.SourceLease {
								ahead.Add(cost)
							}
						}
					}
				})
			}
			wg.Wait()
			n := admitted.Load()
			leased += ahead.Load()
			if n > limit || limit-n >= slices.Min(least) {
				t.Errorf("%s, run %d: %d units of %d admitted, and a call that costs %d denied", name, run, n, limit, slices.Min(least))
			}
			for deadline := time.Now().Add(10 * time.Second); remainingOf(t, l, key) != limit-n; {
				if time.Now().After(deadline) {
					t.Fatalf("%s, run %d: %d of %d are left after %d units were admitted", name, run, remainingOf(t, l, key), limit, n)
				}
			}
		}
	}
	if leased < 10*limit {
		t.Errorf("only %d units out of leases: that shows little", leased)
	}
}
