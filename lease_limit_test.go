package ringfence

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// With 30 units left of a key that is new to this process, 30 calls are admitted, whether they
// come as one AllowMany or side by side.
func TestTheLastUnitsAreAdmittedWithLeases(t *testing.T) {
	for name, limit := range map[string]Limit{
		"bucket": TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, "log": SlidingLog{Limit: 1000, Window: time.Hour},
	} {
		_, l := patientRing(t, limit, Lease{Max: 100})
		for run := range 20 {
			for _, many := range []bool{true, false} {
				key := fmt.Sprint(run, many)
				if d, err := l.AllowN(t.Context(), key, 970); err != nil || !d.Allowed {
					t.Fatalf("%+v, %v", d, err)
				}
				var n atomic.Int64
				count := func(d Decision, err error) {
					if err == nil && d.Allowed {
						n.Add(1)
					}
				}
				if many {
					reqs := make([]Request, 30)
					for i := range reqs {
						reqs[i] = Request{Key: key, Cost: 1}
					}
					out, err := l.AllowMany(t.Context(), reqs)
					for _, d := range out {
						count(d, err)
					}
				} else {
					var wg sync.WaitGroup
					for range 30 {
						wg.Go(func() { count(l.Allow(context.Background(), key)) })
					}
					wg.Wait()
				}
				if n.Load() != 30 {
					t.Errorf("%s, AllowMany %t: %d of 30 admitted with 30 left", name, many, n.Load())
				}
			}
		}
	}
}

// The calls of an AllowMany for one key take nothing ahead: a later one, of another cost, would
// find quota in two places, and neither enough for it.
func TestRepeatsInAnAllowManyTakeNothingAhead(t *testing.T) {
	r, l := patientRing(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 100}, Lease{Max: 10})
	reqs := []Request{{"twice", 1}, {"once", 1}, {"twice", 2}, {"twice", 1}}
	out, err := l.AllowMany(t.Context(), reqs)
	aclMust(t, err)
	for i, want := range []int64{99, 99, 97, 96} {
		if d := out[i]; !d.Allowed || d.Remaining != want {
			t.Errorf("entry %d: %+v, want %d remaining", i, d, want)
		}
	}
	for key, want := range map[string]int64{"twice": 0, "once": 10} {
		if rest := r.leases.find(l.keys.hash(key)).rest(r.clock()); rest != want {
			t.Errorf("%d units are held of %q, want %d", rest, key, want)
		}
	}
}

// A call that was denied although it had brought back what was held is not asked again, nor are
// those that were denied beside it.
func TestACallDoesNotAskAgainForItsOwnReturn(t *testing.T) {
	r, l := patientRing(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	server := r.owner(keyHash{}).nodes[0].(*leanNode).client.(*redis.Client)
	calls := func() (n int) {
		stats := server.Info(t.Context(), "commandstats").Val()
		_, text, _ := strings.Cut(stats, "cmdstat_evalsha:calls=")
		text, _, _ = strings.Cut(text, ",")
		n, err := strconv.Atoi(text)
		aclMust(t, err)
		return n
	}
	for _, c := range []struct {
		name string
		call func(key string) (Decision, error)
		most int
	}{
		{"AllowN", func(key string) (Decision, error) { return l.AllowN(t.Context(), key, 1000) }, 1},
		{"AllowMany", func(key string) (Decision, error) {
			reqs := make([]Request, 1000)
			for i := range reqs {
				reqs[i] = Request{Key: key, Cost: int64(1000 - i%3)} // of one cost they were one entry
			}
			out, err := l.AllowMany(t.Context(), reqs)
			return out[500], err
		}, 20},
	} {
		d, err := l.Allow(t.Context(), c.name)
		aclMust(t, err)
		k := r.leases.find(l.keys.hash(c.name))
		if held := k.rest(r.clock()); !d.Allowed || held != 50 {
			t.Fatalf("%s: %+v, %d units are held", c.name, d, held)
		}
		before := calls()
		if d, err = c.call(c.name); err != nil || d.Allowed || k.rest(r.clock()) != 0 {
			t.Errorf("%s: %+v, %v", c.name, d, err)
		}
		if n := calls() - before; n > c.most {
			t.Errorf("%s: %d script calls, want at most %d", c.name, n, c.most)
		}
	}
}

// Nobody is asked again when there is no time for it.
func TestADenialIsNotAskedAgainAfterItsTime(t *testing.T) {
	denied := Decision{Limit: 1000, Remaining: 900, Source: SourcePrimary, Shard: "a", RetryAfter: time.Hour}
	r, l := patientRing(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	_, err := l.Allow(t.Context(), "k")
	aclMust(t, err)
	h := l.keys.hash("k")
	now := r.clock()
	d := denied
	if err := l.orHeld(t.Context(), r.owner(h), h, &d, 930, math.MaxInt64, now); err != nil || d != denied {
		t.Errorf("%+v, %v", d, err)
	}
	d = denied
	if err := l.orHeld(t.Context(), r.owner(h), h, &d, 930, math.MaxInt64, now+int64(time.Minute)); err != nil || !d.Allowed || d.Remaining != 69 {
		t.Errorf("with time: %+v, %v", d, err)
	}
}

// holding makes the process hold 50 units of a key, and puts them onto a request that takes
// them back.
func holding(t *testing.T, r *Ring, l *Limiter, key string) (k *leaseKey, q *request) {
	t.Helper()
	d, err := l.Allow(t.Context(), key)
	aclMust(t, err)
	h := l.keys.hash(key)
	k = r.leases.find(h)
	if rest := k.rest(r.clock()); !d.Allowed || rest != 50 {
		t.Fatalf("%+v, %d units are held", d, rest)
	}
	now := r.clock()
	chunk, ok := k.claim(0, now)
	if !ok {
		t.Fatal("somebody else asks")
	}
	if q = l.lease.conclude(r.owner(h), k, chunk, now); q == nil || q.back != 50 || k.rest(now) != 0 {
		t.Fatalf("%+v", q)
	}
	return k, q
}

// What certainly was not sent is used here again. What perhaps was is not.
func TestAReturnThatWasNotSentIsUndone(t *testing.T) {
	for name, limit := range map[string]Limit{
		"bucket": TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, "log": SlidingLog{Limit: 1000, Window: time.Hour},
	} {
		for i, c := range []struct {
			err    error
			before func(r *Ring, l *Limiter, key string, k *leaseKey)
			want   int64
		}{
			{err: errQueueFull, want: 50},
			{err: errBudget, want: 50},
			{err: serverError("LOADING Redis is loading the dataset in memory"), want: 50},
			{err: errors.New("read: connection reset by peer"), want: 0},
			{err: errQueueFull, want: 0, before: func(r *Ring, l *Limiter, key string, _ *leaseKey) { aclMust(t, l.Reset(t.Context(), key)) }},
			{err: errQueueFull, want: 0, before: func(r *Ring, l *Limiter, key string, _ *leaseKey) {
				l.lease.mu.Lock()
				defer l.lease.mu.Unlock()
				l.lease.ended = true // as by Close
			}},
		} {
			t.Run(fmt.Sprint(name, " ", i), func(t *testing.T) {
				r, l := patientRing(t, limit, Lease{Max: 50})
				k, q := holding(t, r, l, "k")
				if c.before != nil {
					c.before(r, l, "k", k)
				}
				r.owner(k.hash).charges.settle(q, c.err)
				q.release()
				q.release()
				if rest := k.rest(r.clock()); rest != c.want {
					t.Fatalf("%d units are held after %q, want %d", rest, c.err, c.want)
				}
				if c.want == 0 {
					return
				}
				if d, err := l.AllowN(t.Context(), "k", 20); err != nil || d.Source != SourceLease || d.Remaining != 979 {
					t.Errorf("%+v, %v", d, err)
				}
				// And it goes back after all, when the calls stop.
				eventually(t, "what is left is returned", func() bool {
					d, err := l.Peek(t.Context(), "k")
					aclMust(t, err)
					return k.rest(r.clock()) == 0 && d.Remaining == 979 && l.lease.returned.Load() >= 30
				})
			})
		}
	}
}

// A return of a lease that has ended is not undone: what it had counts for nobody any more.
func TestAReturnIsNotUndoneOnceTheLeaseHasEnded(t *testing.T) {
	r, l := patientRing(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	k, q := holding(t, r, l, "k")
	end := l.lease.end(q.lent[0].grant.asked.Load())
	if l.lease.reopen(q.lent[0], end) || k.rest(r.clock()) != 0 {
		t.Errorf("%d units are held", k.rest(r.clock()))
	}
	if !l.lease.reopen(q.lent[0], end-1) || k.rest(r.clock()) != 50 {
		t.Errorf("%d units are held before that", k.rest(r.clock()))
	}
	if l.lease.reopen(q.lent[0], end-1) || k.rest(r.clock()) != 50 {
		t.Errorf("%d units are held after a second time", k.rest(r.clock()))
	}
	q.release()
	q.release()
}

// Leases of a shard that keeps callers waiting are looked at again soon, and do not keep those
// of other shards from being returned, nor end behind them.
func TestLeasesOfASickShardAreLookedAtAgain(t *testing.T) {
	ls := &leasing{life: int64(time.Second)}
	k := func(n uint64) *leaseKey { return &leaseKey{hash: keyHash{n, n}} }
	first, second, third := k(1), k(2), k(3)
	q := &ls.queue
	q.first.push(first, 100)
	q.first.push(second, 110)
	q.first.push(third, 5000)
	if q.pop(99) != nil || q.pop(100) != first {
		t.Fatal("the first is not due when it is due")
	}
	q.again.push(first, 100+50)
	if q.next() != 110 || q.pop(200) != second || q.next() != 150 || q.pop(149) != nil || q.pop(150) != first {
		t.Error("a lease that is to be looked at again is not before those that are due later")
	}
	if q.pop(4999) != nil || q.pop(5000) != third || q.next() != never {
		t.Error("the last one is not left")
	}
}

func TestDueLeasesWaitForAShardThatIsNotWell(t *testing.T) {
	r, l := patientRing(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	_, err := l.Allow(t.Context(), "k")
	aclMust(t, err)
	h := l.keys.hash("k")
	s, k, ls := r.owner(h), r.leases.find(h), l.lease
	at := k.here.asked.Load() + ls.patience()
	s.degraded.Store(true)
	if back, more := ls.due(at); len(back) != 0 || more || k.rest(at) != 50 {
		t.Fatalf("%d returns, %d units are held", len(back), k.rest(at))
	}
	s.degraded.Store(false)
	if back, _ := ls.due(at + ls.pause() - 1); len(back) != 0 {
		t.Fatalf("%d returns before the pause is over", len(back))
	}
	back, _ := ls.due(at + ls.pause())
	if len(back) != 1 || back[0].req.back != 50 {
		t.Fatalf("%d returns once the shard is well", len(back))
	}
	ls.sendAll(back, r.clock()+int64(time.Second))
	if n := ls.returned.Load(); n != 50 {
		t.Errorf("%d units were returned", n)
	}
}

// A denial that overtakes the lease of another call is no denial.
func TestADenialWaitsForALeaseThatIsOnItsWay(t *testing.T) {
	denied := Decision{Limit: 1000, Source: SourcePrimary, Shard: "a", RetryAfter: time.Hour}
	r, l := patientRing(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	h := l.keys.hash("k")
	s, now := r.owner(h), r.clock()
	k := r.leases.key(l.lease, h, now)
	if _, ok := k.claim(1, now); !ok {
		t.Fatal("somebody else asks")
	}
	q := r.newRequest(opCharge, l.rule, h, 1)
	q.heir = k
	l.lease.want(q, k, 2, now)
	var wg sync.WaitGroup
	var admitted atomic.Int64
	for range 3 {
		wg.Go(func() {
			d := denied
			err := l.orHeld(t.Context(), s, h, &d, 1, now, now+int64(time.Minute))
			if err != nil {
				t.Error(err)
			}
			if d.Allowed && d.Source == SourceLease {
				admitted.Add(1)
			}
		})
	}
	q.granted, q.extra, q.whole = 1, 2, state{a: l.rule.bq, b: l.rule.br}
	q.inherit()
	q.release()
	q.release()
	wg.Wait()
	if admitted.Load() != 2 {
		t.Errorf("%d calls admitted out of 2 units", admitted.Load())
	}
	// Nothing is on its way: nobody waits.
	d := denied
	if err := l.orHeld(t.Context(), s, h, &d, 1, r.clock(), now+int64(time.Minute)); err != nil || d != denied {
		t.Errorf("%+v, %v", d, err)
	}
}

// Nobody waits longer than there is time.
func TestADenialDoesNotWaitBeyondItsTime(t *testing.T) {
	r, l := patientRing(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	now := r.clock()
	k := r.leases.key(l.lease, l.keys.hash("k"), now)
	if _, ok := k.claim(1, now); !ok {
		t.Fatal("somebody else asks")
	}
	k.way.Or(toHere)
	k.await(t.Context(), time.Millisecond)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	k.await(over, time.Hour)
	k.asked()
	k.await(t.Context(), time.Hour)
}

// A denial is not kept while something of the key is held or on its way.
func TestADenialIsNotKeptWhileSomethingIsHeld(t *testing.T) {
	r, l := patientRing(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	h := l.keys.hash("k")
	kept := func() bool {
		q := r.newRequest(opCharge, l.rule, h, 900)
		q.state = state{a: l.rule.bq, b: l.rule.br}
		now := r.clock()
		l.denied(q, now)
		q.release()
		q.release()
		defer r.near.drop(h, now-1)
		return r.near.find(h, l.rule, 900, now) != nil
	}
	if !kept() {
		t.Fatal("a denial of a key that has no leases is not kept")
	}
	k := r.leases.key(l.lease, h, r.clock())
	if _, ok := k.claim(1, r.clock()); !ok || !kept() {
		t.Fatal("a denial is not kept while a call without a lease is asked for")
	}
	for _, way := range []uint32{toHere, toThere} {
		if k.way.Store(asking | way); kept() {
			t.Errorf("a denial is kept with something on its way (%d)", way)
		}
	}
	k.asked()
	_, err := l.Allow(t.Context(), "k")
	aclMust(t, err)
	if kept() {
		t.Error("a denial is kept while something is held")
	}
}

// Units that go back are on their way before they are held no more: who looks at what is held
// first never finds neither.
func TestUnitsAreHeldOrOnTheirWayAtEveryInstant(t *testing.T) {
	r, l := patientRing(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	h, now := l.keys.hash("k"), r.clock()
	k := r.leases.key(l.lease, h, now)
	if _, ok := k.claim(1, now); !ok {
		t.Fatal("somebody else asks")
	}
	// Odd while a lease that was held goes back, and either is the case.
	var phase, seen atomic.Int64
	var ended atomic.Bool
	var watcher sync.WaitGroup
	watcher.Go(func() {
		for !ended.Load() {
			before := phase.Load()
			rest, way := k.rest(now), k.onItsWay()
			if before%2 == 0 || phase.Load() != before {
				continue
			}
			seen.Add(1)
			if rest == 0 && way == 0 {
				t.Error("units are neither held nor on their way")
				return
			}
		}
	})
	for end := time.Now().Add(10 * time.Second); seen.Load() < 20_000 && !t.Failed() && time.Now().Before(end); {
		k.here.begin(terms{units: 5, asked: now})
		k.given = 5
		phase.Add(1)
		q := r.newRequest(opCharge, l.rule, h, 1)
		l.lease.giveBack(q, k, now)
		if k.rest(now) != 0 || k.onItsWay() != toThere || q.back != 5 {
			t.Fatalf("%d units held, way %d, %d on the request", k.rest(now), k.onItsWay(), q.back)
		}
		phase.Add(1)
		k.way.Store(asking)
		q.release()
		q.release()
	}
	ended.Store(true)
	watcher.Wait()
	if seen.Load() < 100 {
		t.Errorf("looked %d times: that shows little", seen.Load())
	}
	k.asked()
}
