package ringfence

import (
	"math/rand/v2"
	"testing"
	"time"
)

// What is told of a denial is what the rule makes of the state as time has changed it, as
// long as the denial holds.
func TestADenialIsToldAsTheStateHasBecome(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	kept := 0
	for range 20_000 {
		bucket := rnd.IntN(4) > 0
		var limit Limit = SlidingLog{Limit: 1 + rnd.Int64N(100), Window: time.Second}
		if bucket {
			limit = TokenBucket{Rate: 1 + rnd.Int64N(50), Per: time.Duration(1+rnd.IntN(2_000_000)) * time.Microsecond, Burst: 1 + rnd.Int64N(50)}
		}
		r, err := limit.compile()
		if err != nil {
			t.Fatal(err)
		}
		var s state
		if bucket {
			s = state{a: rnd.Int64N(r.bq + 1), b: rnd.Int64N(r.n)}
			if rnd.IntN(3) == 0 {
				s.c = rnd.Int64N(1_000_000)
			}
		} else {
			wait := 1 + rnd.Int64N(r.window)
			s = state{a: rnd.Int64N(r.capacity + 1), b: wait, c: wait + rnd.Int64N(r.window)}
		}
		least := 1 + rnd.Int64N(r.maxCost)
		if !r.plausible(s) || r.retryAfter(s, least) == 0 {
			continue
		}
		asked := rnd.Int64N(1e9)
		c := newNearCache(4)
		c.add(keyHash{1, 2}, r, least, s, asked, int64(time.Hour))
		set := c.set(keyHash{1, 2})
		if set == nil || set.ways[0].Load() == nil {
			continue
		}
		kept++
		d := set.ways[0].Load()
		cost, now := least+rnd.Int64N(r.maxCost-least+1), asked+rnd.Int64N(d.until-asked)
		if rnd.IntN(3) == 0 {
			cost = least
		}
		passed := (now - asked) / 1000
		if bucket {
			still := min(s.c, passed)
			s.c -= still
			s.a -= passed - still
		} else {
			s.b, s.c = s.b-passed, s.c-passed
		}
		if got, want := d.decision(cost, now), r.decide(s, false, cost); got != want {
			t.Fatalf("%s, denied %d with %+v: after %d us a call of %d is told %+v, want %+v", limit, least, d.state, passed, cost, got, want)
		}
	}
	if kept < 2000 {
		t.Errorf("%d denials were looked at", kept)
	}
}
