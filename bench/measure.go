package main

import (
	"context"
	"fmt"
	"iter"
	"runtime"
	"runtime/metrics"
	"sync"
	"time"
)

// timing is how long a cell takes.
type timing struct{ warm, measured time.Duration }

// within says whether an instant since the start lies in the measured part.
func (t timing) within(at time.Duration) bool { return at >= t.warm && at < t.warm+t.measured }

// patience is how long after the end of a cell its callers may still wait for their last
// answer: longer than every time-out of every client here.
const patience = 30 * time.Second

// caller is what one caller of a cell keeps; nobody else touches it before the end.
type caller struct {
	latency  histogram // measured decisions only
	finished int64     // decisions that came while it was measured
	attempts int64     // all calls, from the first one on
	granted  int64     // of those, allowed by the limit
	away     int64     // of those, answered by a fallback
	failed   int64     // of those, answered with an error
	lastErr  error
	_        [64]byte // no two callers share a cache line
}

// note counts one call. at is when it counts, end is when it ended, since the cell's start.
func (c *caller) note(t timing, at, end, latency time.Duration, a answer, err error) {
	c.attempts++
	switch {
	case err != nil:
		c.failed++
		c.lastErr = err
		return
	case a == elsewhere:
		c.away++
		return
	case a == allowed:
		c.granted++
	}
	if t.within(at) {
		c.latency.record(latency)
	}
	if t.within(end) {
		c.finished++
	}
}

// sums is what a cell adds up to.
type sums struct {
	latency       histogram
	finished      int64   // in the measured part
	attempts      []int64 // by caller
	decided       int64   // of the attempts, by the limit
	granted       int64
	away, failed  int64
	lastErr       error
	before, after usage         // around the measured part
	pacer         time.Duration // CPU time of the open loop's pacer, a part of the client's
}

func addUp(callers []caller) *sums {
	s := &sums{attempts: make([]int64, len(callers))}
	for i := range callers {
		c := &callers[i]
		s.latency.add(&c.latency)
		s.attempts[i] = c.attempts
		s.finished += c.finished
		s.decided += c.attempts - c.away - c.failed
		s.granted += c.granted
		s.away += c.away
		s.failed += c.failed
		if c.lastErr != nil {
			s.lastErr = c.lastErr
		}
	}
	return s
}

// usage is what had been used at one instant.
type usage struct {
	at             time.Time
	client, server time.Duration // CPU time: this process, all servers
	machine, total time.Duration // CPU time of the whole machine: busy, and busy or not
	allocs, bytes  uint64
}

// heap reads how much this process has allocated, without stopping it.
func heap() (allocs, bytes uint64) {
	samples := []metrics.Sample{{Name: "/gc/heap/allocs:objects"}, {Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(samples)
	return samples[0].Value.Uint64(), samples[1].Value.Uint64()
}

// watch calls body, which runs the callers to their end, and reads the usage at the
// beginning and the end of the measured part meanwhile.
func (b *bench) watch(ctx context.Context, t timing, began time.Time, body func()) (before, after usage, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		body()
	}()
	read := func(at time.Duration) (usage, error) {
		time.Sleep(time.Until(began.Add(at)))
		return b.usage(ctx)
	}
	if before, err = read(t.warm); err == nil {
		after, err = read(t.warm + t.measured)
	}
	select {
	case <-done:
	case <-time.After(patience):
		return before, after, fmt.Errorf("callers still wait %s after the end of the cell", patience)
	}
	return before, after, err
}

// closed runs a closed loop: every caller calls again as soon as it has its answer. One
// reading of the clock ends a call and begins the next. Every caller has a context of its
// own, as every request of a server has: who waits for one that all share waits for its lock.
func (b *bench) closed(ctx context.Context, i *instance, c *calls, callers int, t timing) (*sums, error) {
	all := make([]caller, callers)
	var wg sync.WaitGroup
	began := time.Now()
	body := func() {
		for n := range all {
			wg.Go(func() {
				ctx, cancel := context.WithCancel(ctx)
				defer cancel()
				me, at, end := &all[n], c.start(n, callers), t.warm+t.measured
				for from := time.Since(began); from < end; at++ {
					a, err := i.allow(ctx, c.at(at))
					to := time.Since(began)
					me.note(t, to, to, to-from, a, err)
					from = to
				}
			})
		}
		wg.Wait()
	}
	before, after, err := b.watch(ctx, t, began, body)
	if err != nil {
		return nil, err
	}
	s := addUp(all)
	s.before, s.after = before, after
	return s, nil
}

// openLoop makes rate calls a second at random instants, whether or not earlier ones have
// been answered; at most workers are under way at once, what is due beyond them waits.
// Latency counts from the intended arrival.
func (b *bench) openLoop(ctx context.Context, i *instance, c *calls, workers int, rate float64, t timing) (*sums, error) {
	arrivals := schedule(c, workers, rate, t.warm+t.measured)
	// A thread that sleeps in the kernel keeps its P until the runtime takes notice, which
	// short sleeps escape. With one more the systems have as many as in the closed loop.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1))
	all := make([]caller, workers)
	p := &pacer{began: time.Now(), t: t}
	began := p.began
	body := func() {
		play(arrivals, workers, func(turn func()) { p.deal(arrivals, turn) }, func(n int, mine iter.Seq[arrival]) {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			me := &all[n]
			for next := range mine {
				a, err := i.allow(ctx, c.at(int(next.place)))
				// Latency counts by the intended arrival, so that lateness cannot
				// push slow calls out of the measured part; throughput by the end.
				end := time.Since(began)
				me.note(t, next.due, end, end-next.due, a, err)
			}
		})
	}
	before, after, err := b.watch(ctx, t, began, body)
	if err != nil {
		return nil, err
	}
	s := addUp(all)
	// Keys are those of the callers whose arrivals they were, whoever made the calls.
	s.attempts = attempts(arrivals, workers)
	s.before, s.after, s.pacer = before, after, p.cpu
	return s, nil
}
