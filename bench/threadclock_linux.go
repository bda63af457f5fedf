package main

import (
	"time"

	"golang.org/x/sys/unix"
)

// threadClock is the clock of the thread that made it; no other may use it.
type threadClock struct {
	began time.Time
	zero  int64 // CLOCK_MONOTONIC, in ns, when the cell began
}

func newThreadClock(began time.Time) threadClock {
	// By itself the kernel lets a thread sleep 50 us longer than asked, to wake several at
	// once. Should it refuse, the pacer is late by that, which the row noop shows.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	var now unix.Timespec
	since := time.Since(began)
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // this clock is always there
	return threadClock{began: began, zero: now.Nano() - int64(since)}
}

func (c threadClock) now() time.Duration { return time.Since(c.began) }

// sleep returns at an instant since the cell began. Until an absolute time: what comes
// between asking for the time and going to sleep does not add to it.
func (c threadClock) sleep(until time.Duration) {
	at := unix.NsecToTimespec(c.zero + int64(until))
	for unix.ClockNanosleep(unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, &at, nil) == unix.EINTR {
		continue // Go interrupts threads by signals
	}
}

// cpu is the CPU time that the thread has used so far.
func (c threadClock) cpu() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_THREAD, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
