package ringfence

import (
	"fmt"
	"math/big"
	"math/rand/v2"
	"testing"
	"time"
)

func TestPartsAreDealtOutOnAverageAndNoneIsMoreThanItsShareRoundedUp(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, c := range []struct {
		units     int64
		instances int
	}{{0, 4}, {1, 4}, {3, 4}, {4, 4}, {60, 4}, {62, 4}, {7, 1}, {1, 1000}, {999, 1000}, {1_000_003, 3}} {
		const draws = 10_000
		sum := new(big.Float)
		for range draws {
			part := divide(c.units, c.instances, rnd.Uint64())
			least := c.units / int64(c.instances)
			if most := least + 1; part < least || part > most || (c.units%int64(c.instances) == 0 && part != least) {
				t.Fatalf("%d among %d: a part of %d", c.units, c.instances, part)
			}
			sum.Add(sum, big.NewFloat(float64(part)))
		}
		mean, _ := sum.Quo(sum, big.NewFloat(draws)).Float64()
		want := float64(c.units) / float64(c.instances)
		if off := mean - want; off > 0.02 || off < -0.02 {
			t.Errorf("%d among %d: %.4f on average, want %.4f", c.units, c.instances, mean, want)
		}
	}
}

// bucketModel is the dumbest way to say what a share of a bucket may admit: fractions of
// a unit, exactly, a step at a time.
type bucketModel struct {
	level, most, perNS *big.Rat
	at                 int64
}

func newBucketModel(l TokenBucket, whole int64, instances int) *bucketModel {
	perNS := big.NewRat(l.Rate, int64(l.Per))
	return &bucketModel{
		level: big.NewRat(whole, 1), most: big.NewRat(whole, 1),
		perNS: perNS.Quo(perNS, big.NewRat(int64(instances), 1)),
	}
}

func (m *bucketModel) advance(now int64) {
	m.level.Add(m.level, new(big.Rat).Mul(m.perNS, big.NewRat(now-m.at, 1)))
	if m.at = now; m.level.Cmp(m.most) > 0 {
		m.level.Set(m.most)
	}
}

func TestAShareOfABucketNeverAdmitsMoreThanTheModelAndHardlyLess(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	limits := []TokenBucket{
		{Rate: 100, Per: time.Minute, Burst: 100}, {Rate: 7, Per: time.Second, Burst: 20},
		{Rate: 3, Per: 7 * time.Microsecond, Burst: 1000}, {Rate: 1, Per: 24 * time.Hour, Burst: 5},
	}
	for run := range 60 {
		l := limits[run%len(limits)]
		r := compiled(t, l)
		instances, draw := 1+rnd.IntN(6), rnd.Uint64()
		whole := divide(l.Burst, instances, draw)
		model := newBucketModel(l, whole, instances)
		var s localState
		now := int64(rnd.IntN(1_000_000))
		model.at = now
		if rnd.IntN(2) == 0 { // a replica said what is left
			left := rnd.Int64N(l.Burst + 1)
			missing := (l.Burst - left) * r.p
			s.reseed(r, now, instances, draw, state{a: missing / r.n, b: missing % r.n})
			share := divide(left, instances, draw)
			model.level.SetInt64(min(share, whole))
		}
		step := int64(l.Per) / l.Rate * int64(instances)
		tight := 0
		for i := range 150 {
			now += rnd.Int64N(step) / (1 + rnd.Int64N(20))
			model.advance(now)
			cost := 1 + rnd.Int64N(1+l.Burst/8)
			fits := model.level.Cmp(big.NewRat(cost, 1)) >= 0
			ok, left, retry, _ := s.take(r, now, cost, instances, draw, true)
			switch {
			case ok && !fits:
				t.Fatalf("run %d call %d: %d admitted of %s by %v among %d", run, i, cost, model.level.FloatString(3), l, instances)
			case ok:
				model.level.Sub(model.level, big.NewRat(cost, 1))
			case fits:
				// Rounded up by a nanosecond a call.
				spare := new(big.Rat).Sub(model.level, big.NewRat(cost, 1))
				if spare.Cmp(new(big.Rat).Mul(model.perNS, big.NewRat(int64(2*i+3), 1))) > 0 {
					t.Fatalf("run %d call %d: %d denied with %s there by %v among %d", run, i, cost, model.level.FloatString(3), l, instances)
				}
				tight++
			}
			if big.NewRat(left, 1).Cmp(model.level) > 0 {
				t.Fatalf("run %d call %d: says %d are left of %s", run, i, left, model.level.FloatString(3))
			}
			if !ok && retry > 0 {
				after := s // a copy: the state of a bucket holds no references
				if again, _, _, _ := after.take(r, now+retry, cost, instances, draw, true); !again {
					t.Fatalf("run %d call %d: denied again after the %d ns it named", run, i, retry)
				}
			}
		}
	}
}

func TestAShareOfALogNeverAdmitsMoreThanTheModelInAnyWindow(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	type hit struct{ at, units int64 }
	for run := range 60 {
		l := []SlidingLog{{Limit: 100, Window: time.Minute}, {Limit: 7, Window: time.Millisecond}, {Limit: 1000, Window: time.Hour}}[run%3]
		r := compiled(t, l)
		instances, draw := 1+rnd.IntN(6), rnd.Uint64()
		whole := divide(l.Limit, instances, draw)
		window := int64(l.Window)
		var s localState
		now := rnd.Int64N(int64(time.Hour))
		share, until := whole, int64(0)
		if rnd.IntN(2) == 0 {
			known := rnd.Int64N(l.Limit + 1)
			until = now + rnd.Int64N(window)/1000*1000
			share = divide(l.Limit-known, instances, draw)
			s.reseed(r, now, instances, draw, state{a: known, c: (until - now) / 1000})
		}
		var hits []hit
		for i := range 150 {
			now += rnd.Int64N(window/8) / (1 + rnd.Int64N(20))
			most := whole
			if now < until {
				most = min(whole, share)
			}
			inWindow, a64thLonger := int64(0), int64(0)
			for _, h := range hits {
				if h.at+window > now {
					inWindow += h.units
				}
				if h.at+window+window/slicesPerWindow+1 > now {
					a64thLonger += h.units
				}
			}
			cost := 1 + rnd.Int64N(1+l.Limit/8)
			ok, left, retry, _ := s.take(r, now, cost, instances, draw, true)
			switch {
			case ok && inWindow+cost > most:
				t.Fatalf("run %d call %d: %d admitted beside %d of %d", run, i, cost, inWindow, most)
			case !ok && a64thLonger+cost <= most:
				t.Fatalf("run %d call %d: %d denied beside %d of %d", run, i, cost, a64thLonger, most)
			case ok:
				hits = append(hits, hit{now, cost})
				inWindow += cost
			}
			if left > most-inWindow {
				t.Fatalf("run %d call %d: says %d are left of %d", run, i, left, most-inWindow)
			}
			if !ok && cost <= whole && retry <= 0 {
				t.Fatalf("run %d call %d: denied %d of %d without saying until when", run, i, cost, whole)
			}
		}
	}
}

// A shard that comes and goes is asked again each time. What the replica says replaces
// what it said before; what was admitted here, which it does not know of, stays counted.
func TestAskingTheReplicaAgainForgetsNothingAndCountsNothingTwice(t *testing.T) {
	now := int64(time.Hour)
	t.Run("bucket", func(t *testing.T) {
		r := compiled(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 100})
		half := state{a: 50 * int64(time.Hour/time.Microsecond)}
		var s localState
		for range 10 {
			s.reseed(r, now, 1, 0, half)
		}
		for i := range 50 {
			if ok, _, _, _ := s.take(r, now+1e6, 1, 1, 0, true); !ok && i < 49 {
				t.Fatalf("denied call %d of the 50 that are left", i)
			}
		}
		s.reseed(r, now+2e6, 1, 0, half)
		if ok, left, _, _ := s.take(r, now+2e6, 2, 1, 0, true); ok {
			t.Errorf("what was admitted here was forgotten: %d left", left)
		}
	})
	t.Run("log", func(t *testing.T) {
		r := compiled(t, SlidingLog{Limit: 100, Window: time.Hour})
		half := state{a: 50, c: int64(time.Hour / time.Microsecond)}
		var s localState
		for range 10 {
			s.reseed(r, now, 1, 0, half)
		}
		for i := range 50 {
			if ok, _, _, _ := s.take(r, now+1, 1, 1, 0, true); !ok {
				t.Fatalf("denied call %d of the 50 that are left", i)
			}
		}
		s.reseed(r, now+2, 1, 0, half)
		if ok, left, _, _ := s.take(r, now+2, 1, 1, 0, true); ok {
			t.Errorf("what was admitted here was forgotten: %d left", left)
		}
	})
}

func TestAStateIsIdleOnceNothingAdmittedHereCounts(t *testing.T) {
	for _, l := range []Limit{TokenBucket{Rate: 10, Per: time.Second, Burst: 10}, SlidingLog{Limit: 10, Window: time.Second}} {
		t.Run(fmt.Sprintf("%T", l), func(t *testing.T) {
			r := compiled(t, l)
			var s localState
			now := int64(time.Hour)
			if !s.idle(r, now) {
				t.Error("a new state is not idle")
			}
			_, _, _, reset := s.take(r, now, 3, 1, 0, true)
			if s.idle(r, now) || s.idle(r, now+int64(290*time.Millisecond)) {
				t.Error("idle while it counts")
			}
			if reset <= 0 || !s.idle(r, now+reset) {
				t.Errorf("not idle after the %d ns it named", reset)
			}
		})
	}
}

func TestAFullTableForgetsNoKeyInUseAndLetsFurtherKeysShare(t *testing.T) {
	r := compiled(t, TokenBucket{Rate: 1, Per: time.Second, Burst: 10})
	table := newLocalTable(100)
	now := int64(time.Hour)
	takeAll := func(key uint64, at int64) (admitted int) {
		for range 20 {
			table.with(keyHash{hi: key, lo: key}, r, 77, at, func(e *localEntry) {
				if ok, _, _, _ := e.take(r, at, 1, 1, 0, true); ok {
					admitted++
				}
			})
		}
		return admitted
	}
	for key := range uint64(100) {
		if n := takeAll(key, now); n != 10 {
			t.Fatalf("key %d: %d admitted, want 10", key, n)
		}
	}
	// Four thousand more keys, which share 256 entries of 10: none gets a fresh count twice.
	total := 0
	for key := range uint64(4_000) {
		total += takeAll(1000+key, now)
	}
	if total != sharedEntries*10 {
		t.Errorf("further keys were admitted %d times, want %d", total, sharedEntries*10)
	}
	for key := range uint64(100) {
		if n := takeAll(key, now); n != 0 {
			t.Errorf("key %d was forgotten: %d admitted again", key, n)
		}
	}
	if n := table.len(); n != 100+sharedEntries {
		t.Errorf("%d entries, want %d", n, 100+sharedEntries)
	}
	// A key that shares an entry goes on sharing it when there is room again, until it is
	// idle: an entry of its own would be a second share.
	table.forget(keyHash{hi: 0, lo: 0})
	if n := takeAll(1000, now); n != 0 {
		t.Errorf("a key that had shared an entry was admitted %d times more in one of its own", n)
	}
	// A key that is idle makes room.
	later := now + int64(time.Minute)
	if n := takeAll(1<<40, later); n != 10 {
		t.Errorf("a new key among idle ones: %d admitted, want 10", n)
	}
	if n := table.len(); n > 100+sharedEntries {
		t.Errorf("%d entries", n)
	}
}
