package main

import (
	"iter"
	"math"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// openCalls are those of the workload open, with a schedule of two seconds.
func openCalls(t *testing.T) (*calls, []arrival) {
	t.Helper()
	w, err := workloadNamed("open")
	if err != nil {
		t.Fatal(err)
	}
	c := newCalls(w)
	return c, schedule(c, openCallers, openRate, 2*time.Second)
}

func TestArrivalsAreInOrderAndTheSameEachTime(t *testing.T) {
	c, all := openCalls(t)
	if !slices.IsSortedFunc(all, func(a, b arrival) int { return int(a.due - b.due) }) {
		t.Error("some arrival comes before an earlier one")
	}
	if all[0].due < 0 || all[len(all)-1].due >= 2*time.Second {
		t.Errorf("arrivals from %s to %s, want them within 2s", all[0].due, all[len(all)-1].due)
	}
	if !slices.Equal(all, schedule(c, openCallers, openRate, 2*time.Second)) {
		t.Error("the same seeds give other arrivals")
	}
}

// TestAllArrivalsTogetherArePoisson: the gaps between arrivals of all callers have the mean
// and the deviation of an exponential distribution, and as many are longer than it says.
func TestAllArrivalsTogetherArePoisson(t *testing.T) {
	_, all := openCalls(t)
	mean := 1 / float64(openRate)
	var sum, squares, long, last float64
	for _, a := range all {
		gap := a.due.Seconds() - last
		last = a.due.Seconds()
		sum, squares = sum+gap, squares+gap*gap
		if gap > 2*mean {
			long++
		}
	}
	n := float64(len(all))
	if want := 2 * float64(openRate); math.Abs(n-want) > 5*math.Sqrt(want) {
		t.Errorf("%g arrivals in 2 s, want %g", n, want)
	}
	if got := sum / n; math.Abs(got/mean-1) > 0.03 {
		t.Errorf("gaps of %g s on average, want %g", got, mean)
	}
	if got := math.Sqrt(squares/n - sum/n*sum/n); math.Abs(got/mean-1) > 0.05 {
		t.Errorf("the gaps' deviation is %g s, want %g", got, mean)
	}
	if got := long / n; math.Abs(got-math.Exp(-2)) > 0.01 {
		t.Errorf("%g of the gaps are longer than two means, want %g", got, math.Exp(-2))
	}
}

// TestEveryCallerKeepsItsOwnArrivals: taken out of all again, a caller's are the Poisson
// process of its seed, with the keys that follow one another from where it starts.
func TestEveryCallerKeepsItsOwnArrivals(t *testing.T) {
	c, all := openCalls(t)
	counts := attempts(all, openCallers)
	for _, n := range []int{0, 1, 500, openCallers - 1} {
		gap, due, made := gaps(uint64(n), float64(openRate)/openCallers), time.Duration(0), int64(0)
		for _, a := range all {
			if int(a.caller) != n {
				continue
			}
			due += gap()
			if want := c.start(n, openCallers) + int(made); a.due != due || int(a.place) != want {
				t.Fatalf("caller %d, arrival %d: at %s in place %d, want %s and %d", n, made, a.due, a.place, due, want)
			}
			made++
		}
		if made == 0 || counts[n] != made {
			t.Errorf("caller %d has %d arrivals, counted as %d", n, made, counts[n])
		}
	}
}

// TestALateAnswerDelaysNobodyElse: the first answer takes an hour and the others one and a
// half gaps each, so three workers are enough for all others to be taken at their instants.
// The bubble ends only when every goroutine in it has.
func TestALateAnswerDelaysNobodyElse(t *testing.T) {
	const arrivals, gap = 1000, time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		all := evenly(arrivals+1, gap)[1:]
		deal := func(turn func()) {
			for _, a := range all {
				time.Sleep(a.due - time.Since(began))
				turn()
			}
		}
		var made atomic.Int64
		play(all, 3, deal, func(_ int, mine iter.Seq[arrival]) {
			for a := range mine {
				if now := time.Since(began); now != a.due {
					t.Errorf("due at %s, taken at %s", a.due, now)
				}
				made.Add(1)
				if a.due == gap {
					time.Sleep(time.Hour)
				}
				time.Sleep(gap + gap/2)
			}
		})
		if made.Load() != arrivals {
			t.Errorf("%d of %d arrivals were taken", made.Load(), arrivals)
		}
		if took := time.Since(began); took != time.Hour+gap+gap+gap/2 {
			t.Errorf("all was over after %s, want it with the last answer", took)
		}
	})
}

// TestArrivalsWaitInOrderWhileAllAreBusy: the pacer ends although nobody takes anything,
// then everything is taken once, and in order.
func TestArrivalsWaitInOrderWhileAllAreBusy(t *testing.T) {
	all := evenly(1000, 1)
	dealt := make(chan struct{})
	deal := everythingIsDue(all)
	var got []arrival
	play(all, 1, func(turn func()) { deal(turn); close(dealt) }, func(_ int, mine iter.Seq[arrival]) {
		<-dealt
		got = slices.AppendSeq(got, mine)
	})
	if !slices.Equal(got, all) {
		t.Errorf("%d arrivals were taken, not the %d there were in their order", len(got), len(all))
	}
}

func everythingIsDue(all []arrival) func(func()) {
	return func(turn func()) {
		for range all {
			turn()
		}
	}
}

// TestThePacerIsNeverEarly deals real instants, some past when it begins.
func TestThePacerIsNeverEarly(t *testing.T) {
	const arrivals, every = 100, 500 * time.Microsecond
	p := &pacer{began: time.Now(), t: timing{measured: arrivals * every}}
	all := evenly(arrivals, every)
	var made atomic.Int64
	play(all, 4, func(turn func()) { p.deal(all, turn) }, func(_ int, mine iter.Seq[arrival]) {
		for a := range mine {
			if now := time.Since(p.began); now < a.due {
				t.Errorf("due at %s, taken at %s", a.due, now)
			}
			made.Add(1)
		}
	})
	if made.Load() != arrivals {
		t.Errorf("%d of %d arrivals", made.Load(), arrivals)
	}
	if took := time.Since(p.began); p.cpu < 0 || p.cpu > took {
		t.Errorf("the pacer's thread has used %s of CPU in %s", p.cpu, took)
	}
}

// TestAThreadSleepsUntilItsTime: how much longer it sleeps is up to the machine.
func TestAThreadSleepsUntilItsTime(t *testing.T) {
	runtime.LockOSThread() // never unlocked, see deal
	clock := newThreadClock(time.Now().Add(-time.Hour))
	for range 20 {
		until := clock.now() + time.Millisecond
		clock.sleep(until)
		if now := clock.now(); now < until {
			t.Fatalf("awake at %s, %s too early", now, until-now)
		}
	}
}

// standIn is a clock that goes on by a step with every look at it and wakes a sleeper late.
// The thread works whenever it does not sleep.
type standIn struct {
	at, step, late, slept time.Duration
	sleeps                int
}

func (c *standIn) now() time.Duration { c.at += c.step; return c.at }

func (c *standIn) sleep(until time.Duration) {
	c.sleeps++
	c.slept += until + c.late - c.at
	c.at = until + c.late
}

func (c *standIn) cpu() time.Duration { return c.at - c.slept }

// TestThePacerSleepsAndSpinsOnlyAtTheEnd: it sleeps before each arrival that is not about
// to come, to shortly before it, and what it takes of the processor is the rest.
func TestThePacerSleepsAndSpinsOnlyAtTheEnd(t *testing.T) {
	const arrivals, every, step, late = 1000, 500 * time.Microsecond, 100 * time.Nanosecond, 5 * time.Microsecond
	for _, c := range []struct {
		name          string
		every, begins time.Duration
		sleeps        int
		most          time.Duration // CPU time for an arrival
	}{
		{"far apart", every, 0, arrivals - 1, early - late + 4*step}, // the first is due at once
		{"closer than it can sleep", early / 2, 0, 0, early/2 + 2*step},
		{"all overdue", every, arrivals * every, 0, 3 * step},
	} {
		t.Run(c.name, func(t *testing.T) {
			clock := &standIn{at: c.begins, step: step, late: late}
			p := &pacer{t: timing{measured: arrivals * c.every}}
			all, made := evenly(arrivals, c.every), 0
			p.keep(clock, all, func() {
				over := clock.at - all[made].due
				if over < 0 || (c.begins == 0 && over > 2*step) {
					t.Errorf("due at %s, given at %s", all[made].due, clock.at)
				}
				made++
			})
			if made != arrivals || clock.sleeps != c.sleeps {
				t.Errorf("%d turns and %d sleeps, want %d and %d", made, clock.sleeps, arrivals, c.sleeps)
			}
			if p.cpu <= 0 || p.cpu > arrivals*c.most || p.cpu != clock.cpu()-c.begins {
				t.Errorf("%s of CPU for %d arrivals, want at most %s for each", p.cpu, arrivals, c.most)
			}
		})
	}
}

// evenly are arrivals that far from one another, the first at once.
func evenly(n int, every time.Duration) []arrival {
	all := make([]arrival, n)
	for i := range all {
		all[i].due = time.Duration(i) * every
	}
	return all
}
