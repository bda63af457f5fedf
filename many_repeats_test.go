package ringfence

import (
	"fmt"
	"testing"
	"time"
)

// An AllowMany may name a key in all its entries, of costs by turns so that no two of them are
// one, or every key twice. The entries are decided in their order, and in time, although each
// repeat has to undo what the first entry of its key has begun for a lease: who is out of time
// is not answered by the primary.
func TestAnAllowManyOfRepeatedKeysIsDecidedInOrderAndInTime(t *testing.T) {
	const units = 2 * MaxMany
	for name, limit := range map[string]Limit{
		"bucket": TokenBucket{Rate: 1, Per: time.Hour, Burst: units}, "log": SlidingLog{Limit: units, Window: time.Hour},
	} {
		for _, keys := range []int{1, MaxMany / 2} {
			t.Run(fmt.Sprint(name, " ", keys), func(t *testing.T) {
				r, _ := patientRing(t, limit, Lease{Max: 1000})
				l, err := r.Limiter("many", limit, WithLease(Lease{Max: 1000}), WithBudget(time.Second))
				aclMust(t, err)
				reqs := make([]Request, MaxMany)
				left := map[string]int64{}
				for i := range reqs {
					key := fmt.Sprint("k", i%keys)
					reqs[i], left[key] = Request{Key: key, Cost: 1 + int64(i)%2}, units
				}
				// Of one key the first call takes three quarters, the second the rest.
				for call := range 2 {
					out, err := l.AllowMany(t.Context(), reqs)
					aclMust(t, err)
					for i, d := range out {
						q := reqs[i]
						fits := q.Cost <= left[q.Key]
						if fits {
							left[q.Key] -= q.Cost
						}
						if d.Allowed != fits || d.Source != SourcePrimary || d.Remaining != left[q.Key] {
							t.Fatalf("call %d, entry %d, %d of %s: %+v, want %t with %d left", call, i, q.Cost, q.Key, d, fits, left[q.Key])
						}
					}
				}
				if keys == 1 && left["k0"] != 0 {
					t.Errorf("%d units are left", left["k0"])
				}
			})
		}
	}
}
