package ringfence

import (
	"context"
	"math"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

func leaseRing(t *testing.T, url string, limit Limit, lease Lease) (*Ring, *Limiter) {
	t.Helper()
	r, err := Open(context.Background(), Config{
		Shards: []ShardConfig{{ID: "a", Primary: url}}, HashKey: []byte("0123456789abcdef"), Instances: 1, InstanceID: "1",
	})
	aclMust(t, err)
	t.Cleanup(func() { aclMust(t, r.Close()) })
	l, err := r.Limiter("l", limit, WithLease(lease))
	aclMust(t, err)
	return r, l
}

// Where most keys are called once, a lease costs a return and saves nothing.
func TestNewKeysGetNoLeaseWhereFirstLeasesAreNotUsed(t *testing.T) {
	_, l := leaseRing(t, redistest.Start(t, redistest.Options{}).URL(), TokenBucket{Rate: 1000, Per: time.Minute, Burst: 1000}, Lease{Max: 64})
	ls := l.lease
	withLease := func(keys int) (n int) {
		for range keys {
			if ls.start() > 1 {
				n++
			}
		}
		return n
	}
	if n := withLease(160); n != 160 {
		t.Errorf("%d of 160 keys begin with a lease before anything is known", n)
	}
	for range 200 {
		ls.learn(0)
	}
	if n := withLease(160); n != 10 {
		t.Errorf("%d of 160 keys begin with a lease when none is used, want one in 16", n)
	}
	for range 200 {
		ls.learn(30)
	}
	if n := withLease(160); n != 160 {
		t.Errorf("%d of 160 keys begin with a lease when each saves calls", n)
	}
}

func TestTheChunkOfAKeyFollowsItsDemand(t *testing.T) {
	_, l := leaseRing(t, redistest.Start(t, redistest.Options{}).URL(), TokenBucket{Rate: 1000, Per: time.Minute, Burst: 1000}, Lease{Max: 64})
	k := &leaseKey{of: l.lease, here: &grant{}}
	for _, c := range []struct {
		used    int64
		caller  bool // one of them by the call that asked
		elapsed time.Duration
		want    int64
	}{
		{0, true, 0, 64}, // the first: nothing is known
		{10, true, time.Second, 40},
		{10, false, time.Millisecond, 64},
		{1, false, time.Second, 4}, // a lease that saved a call is worth its renewal
		{2, true, time.Second, 8},
		{1, true, time.Second, 1}, // one that saved none is not
		{1, true, time.Second, 1}, // and one call in a life is no demand
		{1, true, 600 * time.Millisecond, 4},
		{0, false, time.Second, 1},
		{2, true, time.Second, 8},
		{1, false, time.Hour, 1},
		{1, true, time.Microsecond, 64},
	} {
		k.cost, k.caller = 1, c.caller
		if k.size(c.used, int64(c.elapsed)); int64(k.chunk) != c.want {
			t.Errorf("%d used in %s, asked by a call %t: %d units, want %d", c.used, c.elapsed, c.caller, k.chunk, c.want)
		}
	}
}

// A lease that saved a call is renewed, however it was asked for; one that was asked for by a call
// and used by no other is not.
func TestALeaseThatSavedACallIsRenewed(t *testing.T) {
	_, l := leaseRing(t, redistest.Start(t, redistest.Options{}).URL(), TokenBucket{Rate: 1000, Per: time.Minute, Burst: 1000}, Lease{Max: 64})
	ls := l.lease
	type life struct {
		own   int64 // units of the call that asked for the lease; 0: it was asked for in advance
		taken int64 // out of the lease
		next  int64 // units that the one after it is to have
	}
	for _, lives := range [][]life{
		{{1, 1, 8}, {0, 1, 4}, {0, 1, 4}, {0, 0, 1}},
		{{1, 0, 1}},
		{{1, 5, 24}, {0, 0, 1}},
		{{3, 3, 24}, {0, 3, 12}, {0, 0, 1}},
	} {
		now := int64(time.Hour)
		k := &leaseKey{of: ls, here: &grant{}}
		k.room.Store(1000)
		k.reset.Store(math.MinInt64)
		claim := func(own int64) (chunk int64) {
			chunk, ok := k.claim(own, now)
			if !ok {
				t.Fatal("the key is claimed already")
			}
			return chunk
		}
		claim(lives[0].own)
		for i, c := range lives {
			k.add(terms{units: 64, asked: now}, now)
			k.asked()
			if _, _, ok := k.here.take(k.hash, ls, c.taken, now); !ok {
				t.Fatalf("%v: %d units are not there", lives, c.taken)
			}
			now += ls.patience()
			if got := claim(0); got != c.next {
				t.Errorf("%v: after life %d %d units, want %d", lives, i, got, c.next)
			}
		}
		k.asked()
	}
}

// Takers and the one who returns the rest are never given the same unit.
func TestUnitsOfALeaseAreGivenOutOnce(t *testing.T) {
	ls := &leasing{life: 1000}
	for range 200 {
		g := &grant{}
		w := g.begin(terms{units: 1000, asked: 1})
		var taken, returned atomic.Int64
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(i), 0))
				for range 100 {
					cost := 1 + rnd.Int64N(5)
					if _, _, ok := g.take(keyHash{}, ls, cost, 2); ok {
						taken.Add(cost)
					}
				}
				if lent, _, ok := g.lend(keyHash{}, ls, 2); ok {
					returned.Add(lent.left())
				}
			})
		}
		wg.Wait()
		if n := taken.Load() + returned.Load(); n != 1000 || g.rest(keyHash{}, ls, 2) != 0 || g.bare().unused() != 0 || g.bare().number() != w.number() {
			t.Fatalf("%d of 1000 were given out, %d of them taken; then %d can be taken and %d are unused", n, taken.Load(), g.rest(keyHash{}, ls, 2), g.bare().unused())
		}
	}
}

// Who looks at a lease while another takes its place sees one or the other, and takes units of
// the one that he has looked at.
func TestAPlaceIsUsedForOneLeaseAfterAnother(t *testing.T) {
	ls := &leasing{life: 1_000_000}
	const leases, units = 20_000, 7
	g := &grant{}
	var taken atomic.Int64
	begun, returned := int64(0), int64(0)
	var ended atomic.Bool
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 1))
			for !ended.Load() {
				cost := 1 + rnd.Int64N(3)
				w, told, ok := g.take(keyHash{}, ls, cost, 0)
				if !ok {
					runtime.Gosched() // or the one who begins leases waits for a time slice
					continue
				}
				taken.Add(cost)
				// What a lease was told is a function of its number here.
				if n := int64(w.number()); told.asked != n || told.remaining != 2*n || told.reset != 3*n {
					t.Errorf("lease %d was asked for at %d, with %d remaining and %d to go", n, told.asked, told.remaining, told.reset)
					return
				}
			}
		})
	}
	for n := int64(1); n <= leases && !t.Failed(); n++ {
		w := g.begin(terms{units: units, asked: n, remaining: 2 * n, reset: 3 * n, score: 4 * n})
		begun += units
		if n%2 == 0 {
			runtime.Gosched()
		}
		switch lent, score, ok := g.lend(keyHash{}, ls, 0); {
		case !ok: // all of it was taken
		case score != 4*n || lent.number() != w.number():
			t.Errorf("lease %d is returned with the score of another, %d", n, score)
		case n%3 == 0: // it was not sent
			if !g.open(lent) || g.open(lent) {
				t.Errorf("lease %d is not opened once", n)
			}
			again, _, _ := g.lend(keyHash{}, ls, 0)
			returned += again.left()
		default:
			returned += lent.left()
			if n%5 == 0 {
				g.begin(terms{asked: n}) // another lease has begun
				if g.open(lent) {
					t.Errorf("lease %d is opened in the place of another", n)
				}
				n++
			}
		}
	}
	ended.Store(true)
	wg.Wait()
	if n := taken.Load(); n+returned != begun || n < units || returned < units {
		t.Errorf("of %d units %d were taken and %d returned", begun, n, returned)
	}
}

// What a call is told of the newer of two leases is of one of them.
func TestNobodyIsToldOfALeaseThatHasHalfBegun(t *testing.T) {
	k := &leaseKey{of: &leasing{life: 1_000_000_000}, here: &grant{}}
	places := []*grant{k.here, {}}
	k.spare.Store(places[1])
	var ended atomic.Bool
	var taken atomic.Int64
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for !ended.Load() {
				g, _, told, _ := k.take(k.of, 1, 0)
				if g == nil {
					runtime.Gosched()
					continue
				}
				taken.Add(1)
				if told.remaining != 2*told.asked || told.reset != 3*told.asked {
					t.Errorf("of the lease asked for at %d: %d remaining, %d to go", told.asked, told.remaining, told.reset)
					return
				}
			}
		})
	}
	for n := int64(1); n <= 400_000 && !t.Failed(); n++ {
		places[n%2].begin(terms{units: 7, asked: n, remaining: 2 * n, reset: 3 * n})
		if n%64 == 0 {
			runtime.Gosched()
		}
	}
	ended.Store(true)
	wg.Wait()
	if taken.Load() < 1000 {
		t.Errorf("%d units were taken: that shows little", taken.Load())
	}
}

func TestCallsOutOfALeaseDoNotAllocate(t *testing.T) {
	_, l := leaseRing(t, redistest.Start(t, redistest.Options{}).URL(), TokenBucket{Rate: 1, Per: time.Microsecond, Burst: 1_000_000}, Lease{Max: 1000})
	ctx := context.Background()
	leased := 0
	allocs := testing.AllocsPerRun(2000, func() {
		d, err := l.Allow(ctx, "k")
		if err != nil || !d.Allowed {
			t.Errorf("%+v, %v", d, err)
		}
		if d.Source == SourceLease {
			leased++
		}
	})
	if allocs != 0 || leased < 1900 {
		t.Errorf("%v allocations a call, %d of 2001 calls out of leases", allocs, leased)
	}
}

// A caller who leaves before the primary has answered does not take the lease with him.
func TestALeaseThatComesLateIsUsed(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	r, l := leaseRing(t, server.URL(), TokenBucket{Rate: 1000, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	ctx := context.Background()
	_, err := l.Allow(ctx, "other") // scripts and connections
	aclMust(t, err)
	server.Pause()
	d, err := l.Allow(ctx, "k")
	server.Resume()
	if err != nil || d.Source != SourcePolicy {
		t.Fatalf("of a silent primary: %+v, %v", d, err)
	}
	k := r.leases.find(l.keys.hash("k"))
	for deadline := time.Now().Add(10 * time.Second); k.way.Load() != 0; {
		if time.Now().After(deadline) {
			t.Fatal("the key is claimed for good")
		}
		time.Sleep(time.Millisecond)
	}
	if d, err = l.Allow(ctx, "k"); err != nil || d.Source != SourceLease || d.Remaining != 998 {
		t.Errorf("after the late answer: %+v, %v", d, err)
	}
}

// The script has run, but nobody hears of it: it is neither sent again nor counted.
func TestAReturnOfUnknownFateIsNotRepeated(t *testing.T) {
	for name, limit := range map[string]Limit{
		"bucket": TokenBucket{Rate: 1000, Per: 24 * time.Hour, Burst: 1000}, "log": SlidingLog{Limit: 1000, Window: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			server := redistest.Start(t, redistest.Options{})
			proxy, err := redistest.NewProxy(server.Addr())
			aclMust(t, err)
			t.Cleanup(proxy.Close)
			_, l := leaseRing(t, "redis://"+proxy.Addr(), limit, Lease{Max: 50, TTL: 300 * time.Millisecond})
			other, err := Open(t.Context(), Config{Shards: []ShardConfig{{ID: "a", Primary: server.URL()}}, HashKey: []byte("0123456789abcdef"), Instances: 1, InstanceID: "2"})
			aclMust(t, err)
			defer other.Close()
			look, err := other.Limiter("l", limit)
			aclMust(t, err)
			left := func() int64 {
				d, err := look.Peek(t.Context(), "k")
				aclMust(t, err)
				return d.Remaining
			}
			d, err := l.Allow(t.Context(), "k")
			if err != nil || d.Source != SourcePrimary {
				t.Fatalf("%+v, %v", d, err)
			}
			if n := left(); n != 949 {
				t.Fatalf("%d left with 50 taken ahead", n)
			}
			proxy.CutReplies(true)
			for deadline := time.Now().Add(10 * time.Second); left() != 999 || proxy.Cuts() == 0; {
				if time.Now().After(deadline) {
					t.Fatalf("%d left and %d replies cut: nothing was returned", left(), proxy.Cuts())
				}
				time.Sleep(time.Millisecond)
			}
			proxy.CutReplies(false)
			// Other calls go on, and none of them carries the return once more.
			for range 20 {
				_, err := l.AllowN(t.Context(), "k", 1)
				aclMust(t, err)
			}
			if n := left(); n > 999 {
				t.Errorf("%d left", n)
			}
			if n := l.lease.returned.Load(); n != 0 {
				t.Errorf("%d units are counted as returned, of which nobody knows", n)
			}
		})
	}
}
