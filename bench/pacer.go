package main

import (
	"iter"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// early is how long before an arrival the pacer wakes: about as long as the kernel took to
// run its thread when its time had come. What is left it spins away, so that this is also
// the longest it spins for one arrival. At 16,700 arrivals a second the pacer takes a fifth
// of a core all told, of which spinning is less than a fifth: most is sleeping and waking.
const early = 20 * time.Microsecond

// pacer keeps the instants of the open loop. Go's timers do not: an idle process waits for
// them in whole milliseconds.
type pacer struct {
	began time.Time // of the cell
	t     timing
	cpu   time.Duration // what its thread took in the measured part, see deal
}

// deal gives a turn at each arrival, from a thread of its own, and returns after the last.
// It works out what that thread took of the processors: sleeping, spinning and waking
// whoever has the turn.
func (p *pacer) deal(all []arrival, turn func()) {
	// Never unlocked: the thread ends with this goroutine, and what was set for it too.
	runtime.LockOSThread()
	p.keep(newThreadClock(p.began), all, turn)
}

// instants is the clock that a pacer goes by. All are since the cell began.
type instants interface {
	now() time.Duration
	sleep(until time.Duration)
	cpu() time.Duration // the thread's, so far
}

// keep gives a turn at each arrival by the clock.
func (p *pacer) keep(clock instants, all []arrival, turn func()) {
	measured, before := false, time.Duration(0)
	for _, a := range all {
		if !measured && p.t.within(a.due) {
			measured, before = true, clock.cpu()
		}
		if clock.now() < a.due-early {
			clock.sleep(a.due - early)
		}
		for clock.now() < a.due {
			continue
		}
		turn()
	}
	if measured {
		p.cpu = clock.cpu() - before
	}
}

// play has the calls of a schedule made by so many workers and returns when all of them
// have returned. deal is called once and gives a turn for each arrival. The next arrival
// belongs to whichever worker is free first, so none waits for the answer to another unless
// all workers are busy; then they wait in order, and deal does not wait.
func play(all []arrival, workers int, deal func(turn func()), work func(n int, mine iter.Seq[arrival])) {
	// There is room for every turn, so giving one never blocks. A turn is no value, only the
	// right to the next arrival, and so the room takes no memory.
	turns := make(chan struct{}, len(all))
	var taken atomic.Int64
	mine := func(yield func(arrival) bool) {
		for range turns {
			if !yield(all[taken.Add(1)-1]) {
				return
			}
		}
	}
	var wg sync.WaitGroup
	for n := range workers {
		wg.Go(func() { work(n, mine) })
	}
	wg.Go(func() {
		defer close(turns)
		deal(func() { turns <- struct{}{} })
	})
	wg.Wait()
}
