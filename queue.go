package ringfence

import (
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// inbox is a queue without a lock for those who put in: they push onto a stack, and who
// takes out, one at a time, takes all of it and turns it around.
type inbox struct {
	top atomic.Pointer[request] // the newest

	// The oldest first; for whoever takes out, under the dispatcher's lock.
	head, tail *request
}

func (q *inbox) push(r *request) {
	for {
		top := q.top.Load()
		r.link = top
		if q.top.CompareAndSwap(top, r) {
			return
		}
	}
}

// peek is the oldest, or nil.
func (q *inbox) peek() *request {
	if q.head == nil {
		q.turn()
	}
	return q.head
}

// turn puts what has come since the last time behind what is there.
func (q *inbox) turn() {
	if q.top.Load() == nil {
		return
	}
	newest := q.top.Swap(nil)
	var oldest *request
	for r := newest; r != nil; {
		below := r.link
		r.link, oldest = oldest, r
		r = below
	}
	if q.head == nil {
		q.head = oldest
	} else {
		q.tail.link = oldest
	}
	q.tail = newest
}

// pop takes out what peek showed.
func (q *inbox) pop() {
	r := q.head
	q.head, r.link = r.link, nil
	if q.head == nil {
		q.tail = nil
	}
}

// alarm calls a function at the earliest of the instants it was given since the last call.
// It is one timer for all who wait: setting it costs nobody anything but the one whose
// instant is earlier than all others'.
type alarm struct {
	clock func() int64
	next  atomic.Int64
	f     func(now int64)

	mu    sync.Mutex // guards the following
	timer *time.Timer
	set   int64     // the instant the timer was last set to,
	due   time.Time // and when that is by the real clock
}

const never = math.MaxInt64

func newAlarm(clock func() int64, f func(now int64)) *alarm {
	a := &alarm{clock: clock, f: f}
	a.next.Store(never)
	a.timer = time.AfterFunc(time.Hour, a.ring)
	a.timer.Stop()
	return a
}

// ring calls the function, with an instant that has certainly come: the timer may have gone
// off for a setting that has been replaced, and next may be of somebody who is about to set
// the timer. The clock may stand still, as a test's; then it is the instant that was set.
func (a *alarm) ring() {
	a.mu.Lock()
	if time.Now().Before(a.due) {
		a.mu.Unlock()
		return
	}
	now := max(a.set, a.clock())
	a.next.Store(never)
	a.mu.Unlock()
	a.f(now)
}

// stop makes no call happen that was asked for by now. Who asks later is heard.
func (a *alarm) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.next.Store(never)
	a.timer.Stop()
}

// by makes the call happen at the instant at the latest.
func (a *alarm) by(at int64) {
	for {
		next := a.next.Load()
		if at >= next {
			return
		}
		if a.next.CompareAndSwap(next, at) {
			break
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if next := a.next.Load(); next != never {
		wait := time.Duration(next - a.clock())
		a.set, a.due = next, time.Now().Add(wait)
		a.timer.Reset(wait)
	}
}
