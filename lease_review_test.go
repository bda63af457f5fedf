package ringfence

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// eventually waits for what happens in the background.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("not within 10 s: " + what)
		}
		time.Sleep(time.Millisecond)
	}
}

// patientRing is leaseRing with callers who wait for as long as a busy machine takes.
func patientRing(t *testing.T, limit Limit, lease Lease) (*Ring, *Limiter) {
	t.Helper()
	r, err := Open(context.Background(), Config{
		Shards:  []ShardConfig{{ID: "a", Primary: redistest.Start(t, redistest.Options{}).URL()}},
		HashKey: []byte("0123456789abcdef"), Instances: 1, InstanceID: "1", Budget: 5 * time.Second, OperationTimeout: 5 * time.Second,
	})
	aclMust(t, err)
	t.Cleanup(func() { aclMust(t, r.Close()) })
	l, err := r.Limiter("l", limit, WithLease(lease))
	aclMust(t, err)
	return r, l
}

// callOnce calls a key for the first time and ends the lease of that, if there is one, as it
// is ended after seven eighths of its life. It returns the units that are asked for next.
func callOnce(t *testing.T, r *Ring, l *Limiter, key string, cost int64) (next int64) {
	t.Helper()
	_, err := l.AllowN(t.Context(), key, cost)
	aclMust(t, err)
	h := l.keys.hash(key)
	k := r.leases.find(h)
	w, asked := k.here.look(h)
	if w.units() == 0 {
		return 0
	}
	at := asked + l.lease.patience()
	chunk, ok := k.claim(0, at)
	if !ok {
		t.Fatal("somebody else asks")
	}
	if q := l.lease.conclude(r.owner(h), k, chunk, at); q != nil {
		next = q.wants
		q.release()
		q.release()
	}
	return next
}

// A call that asks for a lease has saved nothing yet.
func TestKeysThatAreCalledOnceSoonBeginWithoutALease(t *testing.T) {
	for _, cost := range []int64{1, 10} {
		t.Run(fmt.Sprint("cost ", cost), func(t *testing.T) {
			r, l := patientRing(t, TokenBucket{Rate: 1000, Per: time.Hour, Burst: 1000}, Lease{Max: 64})
			for i := range 100 {
				callOnce(t, r, l, fmt.Sprint(i), cost)
			}
			if w := l.lease.worth.Load(); w >= worthUnit {
				t.Errorf("first leases of keys that were called once are said to save %d/%d calls each", w, worthUnit)
			}
		})
	}
}

// One call in a life is no demand, whatever it costs.
func TestALeaseThatOnlyItsOwnCallUsedIsNotRenewed(t *testing.T) {
	r, l := patientRing(t, TokenBucket{Rate: 1000, Per: time.Hour, Burst: 1000}, Lease{Max: 100})
	for _, cost := range []int64{1, 2, 10} {
		if next := callOnce(t, r, l, fmt.Sprint(cost), cost); next != 0 {
			t.Errorf("cost %d: %d units are asked for next", cost, next)
		}
	}
}

// Of two leases the newer one knows what it took itself; to the older one that is there still.
func TestRemainingIsAsOfTheNewestLease(t *testing.T) {
	r, l := leaseRing(t, redistest.Start(t, redistest.Options{}).URL(), TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	h := l.keys.hash("k")
	now := r.clock()
	k := r.leases.key(l.lease, h, now)
	if _, ok := k.claim(1, now); !ok {
		t.Fatal("somebody else asks")
	}
	for _, g := range []terms{
		{units: 50, asked: now, remaining: 949, reset: int64(time.Hour)},
		{units: 38, asked: now + 1, remaining: 911, reset: int64(2 * time.Hour)},
	} {
		k.add(g, now+1)
	}
	if n := k.rest(now + 1); n != 88 {
		t.Fatalf("%d units are kept", n)
	}
	// The claim stands, so that nobody asks for more meanwhile.
	for i := range int64(88) {
		d, ok := l.leased(r.owner(h), h, 1, now+1+i)
		want := Decision{
			Allowed: true, Limit: 1000, Remaining: 911 + 87 - i, ResetAfter: 2*time.Hour - time.Duration(i).Truncate(time.Microsecond),
			Source: SourceLease, Shard: "a", Age: roundUp(i),
		}
		if !ok || d != want {
			t.Fatalf("call %d: %+v, want %+v", i, d, want)
		}
	}
	if d, ok := l.leased(r.owner(h), h, 1, now+100); ok {
		t.Errorf("out of nothing: %+v", d)
	}
}

// What was asked for before a Reset and arrives after it is neither used nor returned.
func TestALeaseThatArrivesAfterAResetIsNotReturned(t *testing.T) {
	for _, reset := range []bool{false, true} {
		t.Run(fmt.Sprint("reset ", reset), func(t *testing.T) {
			r, l := leaseRing(t, redistest.Start(t, redistest.Options{}).URL(), TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 100})
			h := l.keys.hash("k")
			now := r.clock()
			k := r.leases.key(l.lease, h, now)
			if _, ok := k.claim(1, now); !ok {
				t.Fatal("somebody else asks")
			}
			q := r.newRequest(opCharge, l.rule, h, 1)
			q.heir = k
			l.lease.want(q, k, 99, now)
			// The answer of a bucket that had 100 left: now it has none.
			q.granted, q.extra, q.whole = 1, 99, state{a: l.rule.bq, b: l.rule.br}
			if reset {
				aclMust(t, l.Reset(t.Context(), "k"))
			}
			q.inherit()
			q.release()
			q.release()
			if rest := k.rest(r.clock()); rest != 99 && !reset || rest != 0 && reset {
				t.Errorf("%d units are held", rest)
			}
			// A return is queued before this call, and the dispatcher takes them in order.
			d, err := l.AllowN(t.Context(), "other", 1)
			if err != nil || !d.Allowed {
				t.Fatalf("%+v, %v", d, err)
			}
			if n := l.lease.returned.Load(); n != 0 {
				t.Errorf("%d units were returned", n)
			}
		})
	}
}

// What is granted while the ring is being closed goes back, too.
func TestCloseReturnsALeaseThatIsOnItsWay(t *testing.T) {
	for name, limit := range map[string]Limit{
		"bucket": TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, "log": SlidingLog{Limit: 1000, Window: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			server := redistest.Start(t, redistest.Options{})
			r, l := leaseRing(t, server.URL(), limit, Lease{Max: 50})
			other, look := leaseRing(t, server.URL(), limit, Lease{Max: 50})
			_, err := l.Allow(t.Context(), "other") // scripts and connections
			aclMust(t, err)
			server.Pause()
			var d Decision
			eventually(t, "a call leaves before its budget is spent", func() bool {
				d, err = l.Allow(t.Context(), "k")
				if err != nil || d.Source != SourcePolicy {
					t.Fatalf("of a silent primary: %+v, %v", d, err)
				}
				return r.leases.find(l.keys.hash("k")).way.Load() != 0
			})
			closed := make(chan error)
			go func() { closed <- r.Close() }()
			eventually(t, "Close waits for leases", l.lease.claims.closed)
			server.Resume()
			aclMust(t, <-closed)
			d, err = look.Peek(t.Context(), "k")
			if err != nil || d.Source != SourcePrimary || d.Remaining != 999 {
				t.Errorf("after Close: %+v, %v; 1 unit was used", d, err)
			}
			aclMust(t, other.Close())
		})
	}
}

// A shard that says nothing does not keep Close beyond 2 s, nor what is held of another.
func TestCloseReturnsWhatAnotherShardHolds(t *testing.T) {
	silent, well := redistest.Start(t, redistest.Options{}), redistest.Start(t, redistest.Options{})
	open := func() (*Ring, *Limiter) {
		r, err := Open(t.Context(), Config{
			Shards:  []ShardConfig{{ID: "silent", Primary: silent.URL()}, {ID: "well", Primary: well.URL()}},
			HashKey: []byte("0123456789abcdef"), Instances: 1, InstanceID: "1", OperationTimeout: 5 * time.Second,
		})
		aclMust(t, err)
		t.Cleanup(func() { aclMust(t, r.Close()) })
		l, err := r.Limiter("l", TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, WithLease(Lease{Max: 50}))
		aclMust(t, err)
		return r, l
	}
	r, l := open()
	_, look := open()
	keys := map[string]string{}
	for i := 0; len(keys) < 2; i++ {
		key := fmt.Sprint(i)
		keys[r.owner(l.keys.hash(key)).id] = key
	}
	_, err := l.Allow(t.Context(), keys["silent"]) // scripts and connections
	aclMust(t, err)
	_, err = l.Allow(t.Context(), keys["well"])
	aclMust(t, err)
	aclMust(t, l.Reset(t.Context(), keys["silent"]))
	silent.Pause()
	defer silent.Resume()
	d, err := l.Allow(t.Context(), keys["silent"])
	if err != nil || d.Source != SourcePolicy {
		t.Fatalf("of a silent primary: %+v, %v", d, err)
	}
	began := time.Now()
	aclMust(t, r.Close())
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("Close took %s", took)
	}
	d, err = look.Peek(t.Context(), keys["well"])
	if err != nil || d.Source != SourcePrimary || d.Remaining != 999 {
		t.Errorf("after Close: %+v, %v; 1 unit was used", d, err)
	}
}

// A lease could overtake what the shard has not been told of its key, on another connection.
func TestNoLeaseIsRenewedWhileTheShardIsOwed(t *testing.T) {
	r, l := patientRing(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	for _, owed := range []bool{false, true} {
		key := fmt.Sprint("owed ", owed)
		h := l.keys.hash(key)
		s := r.owner(h)
		if owed {
			s.ledger.add(l.keys.hash("owing"), l)
		}
		for range 10 {
			_, err := l.Allow(t.Context(), key)
			aclMust(t, err)
		}
		k := r.leases.find(h)
		eventually(t, "nobody asks", func() bool { return k.way.Load() == 0 })
		if k.rest(r.clock()) == 0 {
			t.Fatal("nothing is held")
		}
		now := r.clock()
		chunk, ok := k.claim(0, now)
		if !ok {
			t.Fatal("somebody else asks")
		}
		q := l.lease.conclude(s, k, chunk, now)
		if q == nil || q.back == 0 || (q.wants == 0) != owed {
			t.Fatalf("%s: %+v", key, q)
		}
		q.release()
		q.release()
		s.ledger.end(l.keys.hash("owing"))
	}
}

func TestALimiterSaysWhatItsLeasesAddToItsLimit(t *testing.T) {
	r, l := leaseRing(t, redistest.Start(t, redistest.Options{}).URL(), TokenBucket{Rate: 100, Per: time.Second, Burst: 1000}, Lease{Max: 64})
	want := []string{"ringfence.Limiter{l: token bucket: 100 per 1s, burst 1000 (at most 1100 in any 1s), and each process may hold 64 more of a key for 1s}"}
	got := []string{l.String()}
	for name, most := range map[string]int64{"log": 500, "one": 1} {
		l, err := r.Limiter(name, SlidingLog{Limit: 1000, Window: time.Second}, WithLease(Lease{Max: most}))
		aclMust(t, err)
		if most == 1 {
			want = append(want, "ringfence.Limiter{one: sliding log: 1000 per 1s (at most 1000 in any 1s)}")
		} else {
			want = append(want, "ringfence.Limiter{log: sliding log: 1000 per 1s (at most 1000 in any 1s), of which each process may hold 100 ahead for 100ms}")
		}
		got = append(got, l.String())
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%s, want %s", got[i], want[i])
		}
	}
}
