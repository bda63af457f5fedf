package model

import (
	"math/rand/v2"
	"testing"
)

// The referee is small enough to be checked by hand: every number below was.

const us, ms, second = int64(1), int64(1_000), int64(1_000_000)

func one(cost int64) Call { return Call{Cost: cost, Count: 1} }

func TestBucketRefillsEvenlyAndNeverRoundsUp(t *testing.T) {
	limit := BucketLimit{Rate: 3, Per: second, Burst: 2} // a token every 333,333 1/3 us
	const start = int64(1_000_000 * 1_000_000)
	var b Bucket
	for i, step := range []struct {
		at, cost int64
		want     Answer
	}{
		{0, 1, Answer{1, 1, 0, 333_334, 0}},
		{0, 1, Answer{1, 0, 0, 666_667, 0}},
		{0, 1, Answer{0, 0, 333_334, 666_667, 0}},
		{333_333, 1, Answer{0, 0, 1, 333_334, 0}},
		// A token is there, and 2/3 us of the next: 666,666 2/3 - 2/3 us until full.
		{333_334, 1, Answer{1, 0, 0, 666_666, 0}},
	} {
		a, _, _ := b.Charge(limit, start+step.at, one(step.cost))
		if a != step.want {
			t.Errorf("step %d: %+v, want %+v", i, a, step.want)
		}
	}
}

func TestBucketStandsStillForASmallStepBackAndIsAnchoredByALargeOne(t *testing.T) {
	limit := BucketLimit{Rate: 10, Per: second, Burst: 20} // 2 s to fill
	const start = int64(1_000_000 * 1_000_000)
	var b Bucket
	if _, ttl, _ := b.Charge(limit, start, one(20)); ttl != 2000+1+5000 {
		t.Errorf("time to live %dms", ttl)
	}
	a, ttl, tr := b.Charge(limit, start-2*second, one(1))
	if want := (Answer{0, 0, 2*second + 100*ms, 4 * second, 0}); a != want || ttl != 0 || !tr.StoodStill {
		t.Errorf("2s back: %+v, want %+v; %dms; %+v", a, want, ttl, tr)
	}
	a, ttl, tr = b.Charge(limit, start-2*second-us, one(1))
	if want := (Answer{0, 0, 100 * ms, 2 * second, 0}); a != want || ttl == 0 || !tr.Anchored {
		t.Errorf("2s and 1us back: %+v, want %+v; %dms; %+v", a, want, ttl, tr)
	}
	if a, _, _ = b.Charge(limit, start-2*second-us+100*ms, one(1)); a.Granted != 1 {
		t.Errorf("after the wait: %+v", a)
	}
}

func TestBucketOfAnotherLimitKeepsItsTokensRoundedDown(t *testing.T) {
	slow, fast := BucketLimit{Rate: 1, Per: 10 * second, Burst: 4}, BucketLimit{Rate: 1, Per: 3, Burst: 2}
	const start = int64(1_000_000 * 1_000_000)
	var b Bucket
	b.Charge(slow, start, one(4))
	// After 5 s half a token; in thirds of one that is 1/3, so 2/3 of 3 us are missing.
	if a, _ := b.Look(fast, start+5*second, one(1)); a != (Answer{0, 0, 2, 5, 0}) {
		t.Errorf("half a token: %+v", a)
	}
	if a, _ := b.Look(fast, start+35*second, one(1)); a != (Answer{1, 2, 0, 0, 0}) {
		t.Errorf("three and a half tokens: %+v", a)
	}
	if a, _ := b.Look(slow, start+35*second, one(4)); a != (Answer{0, 3, 5 * second, 5 * second, 0}) {
		t.Errorf("a look changed it: %+v", a)
	}
}

func TestLogCountsAHitForExactlyOneWindow(t *testing.T) {
	limit := LogLimit{Limit: 3, Window: second}
	const start = int64(1_000_000 * 1_000_000)
	var g Log
	for i, step := range []struct {
		at, cost int64
		want     Answer
	}{
		{0, 1, Answer{1, 2, 0, second, 0}},
		{10, 2, Answer{1, 0, 0, second, 0}},
		{10, 1, Answer{0, 0, second - 10, second, 0}},
		{10, 2, Answer{0, 0, second, second, 0}},
		{second - 1, 1, Answer{0, 0, 1, 11, 0}},
		{second, 1, Answer{1, 0, 0, second, 0}},
		{second, 4, Answer{0, 0, 0, second, 0}}, // never
		{second + 10, 3, Answer{0, 2, second - 10, second - 10, 0}},
	} {
		if a, _, _ := g.Charge(limit, start+step.at, one(step.cost)); a != step.want {
			t.Errorf("step %d: %+v, want %+v", i, a, step.want)
		}
	}
}

func TestLogsClockWaitsForAWindowAndGoesOnFromThereAfterMore(t *testing.T) {
	limit := LogLimit{Limit: 1, Window: second}
	const start = int64(1_000_000 * 1_000_000)
	var g Log
	g.Charge(limit, start, one(1))
	a, ttl, tr := g.Charge(limit, start-second, one(1))
	if want := (Answer{0, 0, 2 * second, 2 * second, 0}); a != want || ttl != 0 || !tr.StoodStill {
		t.Errorf("a window back: %+v, want %+v; %dms; %+v", a, want, ttl, tr)
	}
	a, ttl, tr = g.Charge(limit, start-second-us, one(1))
	if want := (Answer{0, 0, second, second, 0}); a != want || ttl != 1000+1+5000 || !tr.Anchored {
		t.Errorf("1us more: %+v, want %+v; %dms; %+v", a, want, ttl, tr)
	}
	if a, _, _ = g.Charge(limit, start-us-us, one(1)); a.Granted != 0 || a.RetryAfter != 1 {
		t.Errorf("1us early: %+v", a)
	}
	if a, _, tr = g.Charge(limit, start-us, one(1)); a.Granted != 1 || !tr.Anew {
		t.Errorf("after the wait: %+v, %+v", a, tr)
	}
}

func TestDebitIsTakenWithoutAskingAndNotBelowEmpty(t *testing.T) {
	const start = int64(1_000_000 * 1_000_000)
	var b Bucket
	debt := Call{Cost: 1, Count: 1, Debit: []Debit{{Units: 50}}}
	if a, _, _ := b.Charge(BucketLimit{Rate: 1, Per: second, Burst: 10}, start, debt); a != (Answer{0, 0, second, 10 * second, 0}) {
		t.Errorf("bucket: %+v", a)
	}
	var g Log
	debt.Debit = []Debit{{Units: 9, Age: second}, {Units: 2, Age: second - 1}, {Units: 2, Age: 5}}
	if a, _, _ := g.Charge(LogLimit{Limit: 3, Window: second}, start, debt); a != (Answer{0, 0, 1, second - 5, 0}) {
		t.Errorf("log: %+v", a) // 4 of 3 used: two have to leave, both in 1us
	}
}

func TestCallersOfACountAreGrantedInOrderUntilOneDoesNotFit(t *testing.T) {
	const start = int64(1_000_000 * 1_000_000)
	var b Bucket
	if a, _, _ := b.Charge(BucketLimit{Rate: 1, Per: second, Burst: 10}, start, Call{Cost: 3, Count: 5}); a != (Answer{3, 1, 2 * second, 9 * second, 0}) {
		t.Errorf("bucket: %+v", a)
	}
	var g Log
	if a, _, _ := g.Charge(LogLimit{Limit: 10, Window: second}, start, Call{Cost: 3, Count: 5}); a != (Answer{3, 1, second, second, 0}) {
		t.Errorf("log: %+v", a)
	}
}

// The same rate in other words is no changed limit: a denied call writes nothing then.
func TestALimitInOtherWordsIsTheSameLimit(t *testing.T) {
	var b Bucket
	one, other := BucketLimit{Rate: 1000, Per: 1_000_000, Burst: 10}, BucketLimit{Rate: 1, Per: 1000, Burst: 10}
	b.Charge(one, 5000, Call{Cost: 10, Count: 1})
	if a, _, _ := b.Charge(other, 7000, Call{Cost: 10, Count: 1}); a.Granted != 0 || a.Remaining != 2 {
		t.Errorf("denied: %+v", a)
	}
	// Had the denied call written, the clock would stand at 7000 now, with 2 left.
	if a, _, _ := b.Charge(one, 5000, Call{Cost: 1, Count: 1}); a.Granted != 0 || a.Remaining != 0 {
		t.Errorf("after a step back: %+v, want nothing left, as the last call that wrote left it", a)
	}
}

// What is taken ahead is used at any time until the instant it was taken for, and partly given
// back. However that goes, no window of a log holds more than its limit, by the instants at
// which the units were really used.
func TestNoWindowHoldsMoreThanTheLimitWhateverIsTakenAhead(t *testing.T) {
	taken := int64(0)
	for seed := range uint64(2000) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		limit := LogLimit{Limit: 1 + rnd.Int64N(60), Window: 100}
		var g Log
		var used []int64
		var held []Back
		now := int64(1_000_000)
		for range 300 {
			now += rnd.Int64N(12)
			for i := range held { // what is held is used now and then
				if h := &held[i]; h.Units > 0 && now < h.Score && rnd.IntN(3) == 0 {
					h.Units--
					used = append(used, now)
				}
			}
			c := Call{Cost: 1, Count: rnd.Int64N(5)}
			if rnd.IntN(2) == 0 {
				c.More, c.Ahead = 1+rnd.Int64N(5), 1+rnd.Int64N(30)
			}
			if n := len(held); n > 0 && rnd.IntN(3) == 0 {
				i := rnd.IntN(n)
				if held[i].Units > 0 && now < held[i].Score {
					c.Back = []Back{held[i]}
				}
				held = append(held[:i], held[i+1:]...)
			}
			a, _, _ := g.Charge(limit, now, c)
			for range min(a.Granted, c.Count) {
				used = append(used, now)
			}
			if more := a.Granted - c.Count; more > 0 {
				taken += more
				if a.Score < now+c.Ahead {
					t.Fatalf("seed %d: at %d units are taken for %d, %d ahead", seed, now, a.Score, c.Ahead)
				}
				if more > c.More || 8*more > a.Remaining+more {
					t.Fatalf("seed %d: %d of %d taken ahead, %d left", seed, more, c.More, a.Remaining)
				}
				held = append(held, Back{more, a.Score})
			}
		}
		for i, at := range used {
			n := int64(0)
			for _, u := range used[i:] {
				if u < at+limit.Window {
					n++
				}
			}
			if n > limit.Limit {
				t.Fatalf("seed %d: %d of %d used in the window from %d", seed, n, limit.Limit, at)
			}
		}
	}
	if taken < 10_000 {
		t.Errorf("only %d units were taken ahead", taken)
	}
}
