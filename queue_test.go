package ringfence

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// Whoever puts in and whenever it is taken out: nothing is lost, and what one goroutine
// puts in comes out in its order.
func TestAnInboxLosesNothingAndKeepsTheOrderOfEach(t *testing.T) {
	const senders, each = 8, 2000
	var q inbox
	var running atomic.Int64
	running.Store(senders)
	for s := range senders {
		go func() {
			defer running.Add(-1)
			for i := range each {
				q.push(&request{hash: keyHash{uint64(s), uint64(i)}})
			}
		}()
	}
	var next [senders]uint64
	for got := 0; got < senders*each; {
		over := running.Load() == 0
		r := q.peek()
		if r == nil {
			if over {
				t.Fatalf("%d of %d came out", got, senders*each)
			}
			continue
		}
		q.pop()
		if got++; r.hash.lo != next[r.hash.hi] {
			t.Fatalf("sender %d: %d, want %d", r.hash.hi, r.hash.lo, next[r.hash.hi])
		}
		next[r.hash.hi]++
	}
	if q.peek() != nil || q.tail != nil {
		t.Error("something is left")
	}
}

func TestAnAlarmRingsAtTheEarliestInstantItWasGiven(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		clock := func() int64 { return int64(time.Since(began)) }
		var mu sync.Mutex
		var rang []time.Duration
		a := newAlarm(clock, func(now int64) {
			mu.Lock()
			defer mu.Unlock()
			rang = append(rang, time.Duration(now))
		})
		var setters sync.WaitGroup
		for i := range 20 {
			setters.Go(func() { a.by(int64(time.Duration(30-i) * time.Millisecond)) })
		}
		setters.Wait()
		time.Sleep(time.Second)
		a.by(clock() + int64(5*time.Millisecond))
		time.Sleep(time.Second)
		mu.Lock()
		defer mu.Unlock()
		if len(rang) != 2 || rang[0] != 11*time.Millisecond || rang[1] != 1005*time.Millisecond {
			t.Errorf("rang at %v", rang)
		}
	})
}

// A clock that stands still, as a test's may, keeps nobody waiting beyond its budget.
func TestAnAlarmRingsEvenIfTheClockStandsStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rang := make(chan int64, 1)
		a := newAlarm(func() int64 { return 7 }, func(now int64) { rang <- now })
		a.by(1000)
		if now := <-rang; now != 1000 {
			t.Errorf("rang at %d", now)
		}
	})
}

// Whatever it rings for, the instant it tells has come: else callers would be told that
// their time is over when it is not.
func TestAnAlarmDoesNotTellAnInstantThatHasNotCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var rang atomic.Int64
		a := newAlarm(func() int64 { return int64(time.Since(began)) }, func(now int64) { rang.Store(now) })
		a.by(int64(10 * time.Millisecond))
		a.ring() // for a setting that has been replaced
		if got := rang.Load(); got != 0 {
			t.Errorf("rang at %d, before its time", got)
		}
		a.next.Store(int64(5 * time.Second)) // of somebody who has yet to set the timer
		time.Sleep(20 * time.Millisecond)
		if got := time.Duration(rang.Load()); got != 10*time.Millisecond {
			t.Errorf("told %s", got)
		}
		a.timer.Stop()
	})
}

// Requests that wait for company while a slot is free do not wait longer than patience.
func TestWhoWaitsForCompanyDoesNotWaitLong(t *testing.T) {
	inBubble(t, dispatchConfig{inFlight: 4, maxBatch: 64, queue: 100}, func(t *testing.T, b *dispatchBench) {
		b.company.Store(64 * companyUnit) // of late
		b.set(15*time.Millisecond, nil)   // and now an operation that does not come back soon
		var callers sync.WaitGroup
		callers.Go(func() { _, _ = b.call(t.Context(), 1, 20*time.Millisecond) })
		synctest.Wait()
		b.company.Store(64 * companyUnit)
		b.set(0, nil)
		start := time.Now()
		if _, err := b.call(t.Context(), 2, 20*time.Millisecond); err != nil || time.Since(start) != patience {
			t.Errorf("%v after %s", err, time.Since(start))
		}
		// Enough of them wait for nobody.
		synctest.Wait()
		b.company.Store(64 * companyUnit)
		start = time.Now()
		for i := range worthwhile {
			callers.Go(func() {
				if _, err := b.call(t.Context(), int64(10+i), 20*time.Millisecond); err != nil || time.Since(start) != 0 {
					t.Errorf("%v after %s", err, time.Since(start))
				}
			})
			synctest.Wait()
		}
		callers.Wait()
	})
}
