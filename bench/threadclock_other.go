//go:build !linux

package main

import "time"

// threadClock is as good as Go's timers are.
type threadClock struct{ began time.Time }

func newThreadClock(began time.Time) threadClock { return threadClock{began} }

func (c threadClock) now() time.Duration { return time.Since(c.began) }

func (c threadClock) sleep(until time.Duration) { time.Sleep(until - time.Since(c.began)) }

// cpu is 0: what the pacer takes is not known, and stays in the time of the process.
func (c threadClock) cpu() time.Duration { return 0 }
