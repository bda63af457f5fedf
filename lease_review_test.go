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

// A call that asks for a lease has saved nothing yet.
func TestKeysThatAreCalledOnceSoonBeginWithoutALease(t *testing.T) {
	limit := TokenBucket{Rate: 1000, Per: time.Hour, Burst: 100_000}
	for _, cost := range []int64{1, 10} {
		t.Run(fmt.Sprint("cost ", cost), func(t *testing.T) {
			r, l := leaseRing(t, redistest.Start(t, redistest.Options{}).URL(), limit, Lease{Max: 64, TTL: 20 * time.Millisecond})
			const keys = 200
			for i := range keys {
				_, err := l.AllowN(t.Context(), fmt.Sprint(i), cost)
				aclMust(t, err)
			}
			eventually(t, "all leases have ended", func() bool { return r.leases.outstanding(r.clock())[l.lease] == 0 })
			if w := l.lease.worth.Load(); w >= worthUnit {
				t.Errorf("first leases of %d keys that were called once are said to save %d/%d calls each", keys, w, worthUnit)
			}
		})
	}
}

// One call in a life is no demand, whatever it costs.
func TestALeaseThatOnlyItsOwnCallUsedIsNotRenewed(t *testing.T) {
	r, l := leaseRing(t, redistest.Start(t, redistest.Options{}).URL(), TokenBucket{Rate: 1000, Per: time.Hour, Burst: 1000}, Lease{Max: 100, TTL: 50 * time.Millisecond})
	for _, cost := range []int64{1, 2, 10} {
		key := fmt.Sprint(cost)
		_, err := l.AllowN(context.Background(), key, cost)
		aclMust(t, err)
		k := r.leases.find(l.keys.hash(key))
		eventually(t, "the lease is looked at", func() bool { // who holds the claim may read the rest
			if !k.asking.CompareAndSwap(false, true) {
				return false
			}
			defer k.asked()
			return k.second
		})
		if k.asking.CompareAndSwap(false, true) {
			if k.chunk != 1 {
				t.Errorf("cost %d: the next lease is to have %d units", cost, k.chunk)
			}
			k.asked()
		}
	}
}
