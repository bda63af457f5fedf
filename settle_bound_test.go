package ringfence

import (
	"errors"
	"io"
	"testing"
	"time"
)

// A log that owes more than one call may cost is told in steps, and goes on out of the same
// share meanwhile.
func TestALogIsToldInStepsOfWhatACallMayCost(t *testing.T) {
	r, err := SlidingLog{Limit: 10_000, Window: time.Hour}.compile()
	if err != nil {
		t.Fatal(err)
	}
	now := int64(time.Hour)
	var s localState
	s.reseed(r, now, 1, 0, state{a: 5_000, c: r.window})
	for range 4 {
		if ok, _, _, _ := s.take(r, now, 1000, 1, 0, true); !ok {
			t.Fatal("the share is used up too early")
		}
	}
	for told := int64(0); told < 4000; told += MaxLogCost {
		o := s.takeOwed(r, now)
		if o.units != MaxLogCost {
			t.Fatalf("%d units in one debit after %d, want %d", o.units, told, MaxLogCost)
		}
		s.confirmed(now, o)
		if more := told+MaxLogCost < 4000; s.more() != more || s.seeded != more {
			t.Fatalf("after %d units: more %t, seeded %t, want %t", told+MaxLogCost, s.more(), s.seeded, more)
		}
		if s.seeded {
			if _, left, _, _ := s.take(r, now, 1, 1, 0, false); left != 1000 {
				t.Fatalf("after %d units the share has %d left, want 1000", told+MaxLogCost, left)
			}
		}
	}
	if o := s.takeOwed(r, now); o.units != 0 {
		t.Fatalf("%d units are owed still", o.units)
	}
}

func TestTheLedgerForgetsKeysOfWhichNothingIsCounted(t *testing.T) {
	var g ledger
	for i := range uint64(100) {
		g.add(keyHash{lo: i}, nil)
	}
	g.begin(keyHash{lo: 1})
	g.tidy(func(h keyHash) bool { return h.lo == 2 })
	if n := g.count.Load(); n != 2 {
		t.Fatalf("%d keys are left, want the one whose debit is on its way and the one that counts", n)
	}
}

// A hold that was never taken is not given back: it would be another call's.
func TestAHoldIsGivenBackByWhoTookIt(t *testing.T) {
	var g ledger
	h := keyHash{lo: 1}
	early, held := &request{hash: h}, &request{hash: h}
	g.conclude(early, fateShared) // nothing was owed yet
	g.add(h, nil)
	g.conclude(held, fateShared)
	g.conclude(early, fateEnded)
	if g.unhold(early) || g.begin(h) {
		t.Fatal("a debit may go while a call may yet turn out to be charged")
	}
	g.conclude(held, fateEnded)
	if !g.unhold(held) || !g.begin(h) {
		t.Fatal("the debit may not go")
	}
}

// When every slot of a call to a Cluster fails, each entry has the fate of its own slot.
func TestAnEntryHasTheErrorOfItsOwnSlot(t *testing.T) {
	d := newDispatcher(dispatchConfig{inFlight: 1, maxBatch: 4, queue: 4, clock: func() int64 { return 0 }})
	told := map[*request]error{}
	d.told = func(r *request, err error) { told[r] = err }
	d.lost = func(*request, error, bool) {}
	down := errors.New("CLUSTERDOWN The cluster is down")
	a, b := freshRequest().begin(opCharge, nil, keyHash{lo: 1}, keySpace{}, 1), freshRequest().begin(opCharge, nil, keyHash{lo: 2}, keySpace{}, 1)
	s := &d.slots[0]
	s.forming.reset()
	for _, r := range []*request{a, b} {
		r.debit = "1"
		r.stage.Store(stageSent)
		s.batch = s.forming.add(s.batch, r)
	}
	a.failed, b.failed = io.EOF, down
	d.answer(s, down)
	if !errors.Is(told[a], io.EOF) || !errors.Is(told[b], down) {
		t.Fatalf("told %v and %v", told[a], told[b])
	}
}
