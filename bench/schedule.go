package main

import (
	"cmp"
	"slices"
	"time"
)

// arrival is one call of the open loop.
type arrival struct {
	due    time.Duration // since the cell began
	caller uint32        // the one whose Poisson process it belongs to
	place  uint32        // of its key in the sequence of the calls
}

// schedule returns the arrivals of all callers until an end, in order: each caller's are a
// Poisson process of rate/callers a second with a seed of its own, and so are all of them
// together one of rate. Every caller's keys are those that follow one another from where it
// starts. At the longest cell there are 1.2 million arrivals of 16 bytes.
func schedule(c *calls, callers int, rate float64, end time.Duration) []arrival {
	all := make([]arrival, 0, int(1.05*rate*end.Seconds()))
	for n := range callers {
		gap, place := gaps(uint64(n), rate/float64(callers)), uint32(c.start(n, callers))
		for due := gap(); due < end; due, place = due+gap(), place+1 {
			all = append(all, arrival{due: due, caller: uint32(n), place: place})
		}
	}
	slices.SortFunc(all, func(a, b arrival) int {
		return cmp.Or(cmp.Compare(a.due, b.due), cmp.Compare(a.caller, b.caller))
	})
	return all
}

// attempts is how many arrivals each caller has.
func attempts(all []arrival, callers int) []int64 {
	n := make([]int64, callers)
	for _, a := range all {
		n[a.caller]++
	}
	return n
}
