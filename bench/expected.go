package main

import "time"

// shape is how a system counts, as far as the number of calls it grants depends on it.
type shape uint8

const (
	bucket shape = iota // token bucket or GCRA: burst at once, refilled all the time
	window              // fixed window: burst in every per, beginning with the first call
)

// slackCalls and slackPart are what a system may grant less than expected and be right: two
// calls, for the instants of the first and the last one are known to a millisecond or so
// only, and 3 % where keys are called at random instants.
const (
	slackCalls = 2
	slackPart  = 0.03
)

// expect is how many of the calls on each key a limiter of this shape grants within
// elapsed of its server's time, beginning with nothing used. It is exact where calls
// never pause: for a key that is called more often than its limit and for one that may
// be called as often as it is. In between, calls are taken as evenly spread.
func (s shape) expect(l limit, counts []int64, elapsed time.Duration) int64 {
	var sum int64
	for _, n := range counts {
		sum += s.expectKey(l, n, elapsed)
	}
	return sum
}

func (s shape) expectKey(l limit, n int64, elapsed time.Duration) int64 {
	if s == bucket {
		return min(n, l.burst+int64(float64(l.rate)*float64(elapsed)/float64(l.per)))
	}
	full := int64(elapsed / l.per)
	if full == 0 {
		return min(n, l.burst)
	}
	perWindow := float64(n) * float64(l.per) / float64(elapsed)
	rest := float64(n) - perWindow*float64(full)
	return int64(min(perWindow, float64(l.burst))*float64(full) + min(rest, float64(l.burst)))
}

// right says whether a system that granted this many kept to the limit. Where everybody
// is allowed there is no doubt. Elsewhere more than expected is wrong, and so is less by
// more than the slack. In the random mix a fixed window may also be above, for its
// windows begin with each key's own first call. undecided is how many calls were answered
// by a fallback or with an error: each may have taken a grant away.
func (s shape) right(w workload, granted, expected, undecided int64) bool {
	if w.allowed {
		return granted == expected
	}
	below, above := float64(slackCalls+undecided), 0.0
	if w.keys > 1 {
		below += slackPart * float64(expected)
		if s == window {
			above = slackPart * float64(expected)
		}
	} else if s == window {
		above, below = float64(w.limit.burst), below+float64(w.limit.burst) // a window may just have begun
	}
	return float64(granted) <= float64(expected)+above && float64(granted) >= float64(expected)-below
}
