package ringfence

import (
	"math"
	"sync/atomic"
	"time"
	"unsafe"
)

// Answers that need no round trip take less time than counting them one by one would, in
// counters that all callers share. They are counted in stripes, with one addition for the
// limiter and one for the shard, and get into the metrics when those are collected.
//
// Nor is the clock read a second time for each. In a stripe that was not timed for
// timedEvery, and after timedCalls answers, the next one is; its duration counts for those
// since the last one. What is left when the metrics are collected counts with the
// latest. So every call is counted once and by the time of the scrape, callers that come
// slowly are timed one by one, and which call is timed does not depend on how long it takes.
const (
	timedEvery = int64(time.Millisecond)
	timedCalls = 64
)

// limiterTally is one stripe of what a limiter's callers were answered here.
type limiterTally struct {
	calls [2][2]atomic.Int64 // allowed, denied; lease, cache
	more  [2]atomic.Int64    // allowed, denied: units beyond one a call
	_     [cacheLines - 48]byte
}

// shardTally is one stripe of how long the callers of a shard's keys were answered here.
type shardTally struct {
	of [2]struct { // allowed, denied
		untimed atomic.Int64 // calls that are not in the histogram yet
		timed   atomic.Int64 // when a call that was timed began, ns of the ring's clock
		took    atomic.Int64 // and how long it took, ns
	}
	_ [cacheLines - 48]byte
}

// The arrays above are written out, so that a field that is added shows.
const _ = -(unsafe.Sizeof(limiterTally{}) ^ cacheLines) - (unsafe.Sizeof(shardTally{}) ^ cacheLines)

func newShardTallies(n int) []shardTally {
	out := make([]shardTally, n)
	for i := range out {
		for o := range out[i].of {
			out[i].of[o].timed.Store(math.MinInt64 / 2) // long ago
		}
	}
	return out
}

// bySource is the index of the sources that need no round trip.
func bySource(s Source) int { return int(s - SourceLease) }

// decidedHere counts an answer that needed no round trip, to a call that began at start.
func (l *limiterMetrics) decidedHere(s *shard, d *Decision, cost, start int64, at uint) {
	if l == nil {
		return
	}
	o := outcomeDenied
	if d.Allowed {
		o = outcomeAllowed
	}
	mine := &l.here[at&uint(len(l.here)-1)]
	mine.calls[o][bySource(d.Source)].Add(1)
	if cost > 1 {
		mine.more[o].Add(cost - 1)
	}
	all := s.metrics.here
	t := &all[at&uint(len(all)-1)].of[o]
	if n := t.untimed.Add(1); n >= timedCalls || start-t.timed.Load() >= timedEvery {
		took := l.m.ring.clock() - start
		t.timed.Store(start)
		t.took.Store(took)
		l.m.tookHere(s.metrics, o, time.Duration(took), t.untimed.Swap(0))
	}
}

// tookHere counts a duration for calls that have been counted otherwise.
func (m *metrics) tookHere(s *shardMetrics, o outcome, took time.Duration, calls int64) {
	if calls == 0 {
		return
	}
	s.latency[o].add(took, calls)
	m.latencyEvents[0].Add(float64(calls))
	if took > m.latencyLimit {
		m.latencyEvents[1].Add(float64(calls))
	}
}

// gatherShard moves what the stripes of a shard hold into the metrics.
func (m *metrics) gatherShard(s *shardMetrics) {
	for i := range s.here {
		for o := range s.here[i].of {
			t := &s.here[i].of[o]
			calls := t.untimed.Swap(0)
			m.tookHere(s, outcome(o), time.Duration(t.took.Load()), calls)
		}
	}
}

// gatherLimiter moves what the stripes of a limiter hold into the metrics.
func (m *metrics) gatherLimiter(l *limiterMetrics) {
	for i := range l.here {
		mine := &l.here[i]
		for o := range mine.calls {
			units := mine.more[o].Swap(0)
			for _, source := range []Source{SourceLease, SourceCache} {
				calls := mine.calls[o][bySource(source)].Swap(0)
				if calls == 0 {
					continue
				}
				units += calls
				l.decisions[o][source].Add(float64(calls))
				if source == SourceCache {
					l.nearHits.Add(float64(calls))
				}
			}
			l.requested.Add(float64(units))
			if outcome(o) == outcomeAllowed {
				l.granted.Add(float64(units))
			}
		}
	}
}
