package main

import (
	"slices"
	"sync"
	"time"
)

// machine measures how late this machine is with a timer of a millisecond while a fault is
// on: on a few cores shared with the servers that is part of every call's time.
type machine struct {
	stop func()
	late []time.Duration
}

func watchMachine() *machine {
	m := &machine{}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		timer := time.NewTimer(0)
		defer timer.Stop()
		for {
			start := time.Now()
			timer.Reset(time.Millisecond)
			select {
			case <-timer.C:
				m.late = append(m.late, time.Since(start)-time.Millisecond)
			case <-stop:
				return
			}
		}
	}()
	m.stop = sync.OnceFunc(func() { close(stop); <-stopped })
	return m
}

// worst ends the measurement.
func (m *machine) worst() time.Duration {
	m.stop()
	if len(m.late) == 0 {
		return 0
	}
	return slices.Max(m.late)
}

// quantile is the smallest that at least the part p of them do not exceed.
func quantile(sorted []time.Duration, p float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	i := int(p * float64(len(sorted)))
	return sorted[min(i, len(sorted)-1)]
}
