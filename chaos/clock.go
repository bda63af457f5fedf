package main

import (
	"context"
	"sync"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

const (
	clockPromise = "keys x what the limit admits in the time the cell took, and keys x limit more for a step forward; recovery: the first call admitted to each key after the step, at most a window"
	clockWindow  = 4 * time.Second
	clockLimit   = 20
	clockRate    = 120 // calls a second and cell, three times what is admitted
)

// runClock steps the primaries' clocks while the limit is in use, over several windows.
func runClock(ctx context.Context, r *runner, f fault) []outcome {
	s := &scene{}
	defer s.stop()
	t, err := s.servers(ctx, redistest.Options{Clock: true})
	if err != nil {
		return failed(f.cells(), err)
	}
	f.patient = true
	s.seat(f)
	defer func() { _ = each(s.cells, func(c *cell) error { c.close(); return nil }) }()
	p := &performance{fault: f, scene: s, plan: r.plan, lastSent: map[*cell][2][]int{}, dialed: map[*cell]int{}}
	err = each(s.cells, func(c *cell) error {
		c.limit = ringfence.TokenBucket{Rate: clockLimit, Per: clockWindow, Burst: clockLimit}
		if c.algorithm == slidingLog {
			c.limit = ringfence.SlidingLog{Limit: clockLimit, Window: clockWindow}
		}
		if err := c.chooseKeys(ctx); err != nil {
			return err
		}
		return c.open(ctx)
	})
	if err != nil {
		return failed(f.cells(), err)
	}
	begin := time.Now()
	stepped := begin.Add(r.plan.steady)
	for _, c := range s.cells {
		c.since = stepped
	}
	p.during = int((r.plan.steady + r.plan.clock) * clockRate / time.Second)
	watch := watchMachine()
	var load sync.WaitGroup
	for _, c := range s.cells {
		load.Go(func() { c.pace(ctx, p.during, clockRate, true) })
	}
	sleepUntil(ctx, stepped)
	p.countCalls(false)
	err = t.both(func(server *redistest.Server) error { return server.Step(f.step) })
	load.Wait()
	p.countCalls(true)
	p.late = watch.worst()
	elapsed := time.Since(begin)
	_ = each(s.cells, func(c *cell) error { c.close(); return nil })
	if err != nil {
		return failed(f.cells(), err)
	}
	leak := leaked(ours)
	var out []outcome
	for _, c := range s.cells {
		if leak != nil {
			c.problem("a goroutine outlives Close: %v", leak)
		}
		out = append(out, c.judgeClock(p, elapsed))
	}
	return out
}

// judgeClock compares with the promise: at most one limit more for a step forward, at most a
// window of starvation for one back.
func (c *cell) judgeClock(p *performance, elapsed time.Duration) outcome {
	t, admitted, _ := c.snapshot()
	took := sorted(t.took)
	most := int(c.limit.WorstCase(elapsed))
	if p.fault.step > 0 {
		most += clockLimit
	}
	r := result{
		Fault: c.fault, Policy: c.policy, Algorithm: c.algorithm, Admitted: admitted, Bound: keyCount * most,
		P50: quantile(took, 0.5).Microseconds(), P999: quantile(took, 0.999).Microseconds(), Max: quantile(took, 1).Microseconds(),
		ShardCalls: c.calls,
	}
	for _, key := range c.keys {
		if n := t.admitted[key]; n > most {
			c.problem("key %q: %d admitted, want at most %d", key, n, most)
		}
		first, ok := c.first[key]
		if !ok {
			c.problem("key %q: nothing was admitted after the step", key)
			continue
		}
		r.Recovery = max(r.Recovery, first.Milliseconds())
	}
	// Calls for one key come 67 ms apart.
	if within := clockWindow + p.allowance(500*time.Millisecond); r.Recovery > within.Milliseconds() {
		c.problem("starved for %d ms after the step, want at most a window: %s", r.Recovery, within)
	}
	if t.others > 0 {
		c.problem("%d answers did not come from the primary, which was there", t.others)
	}
	c.checkLongest(p, took)
	r.OK = len(c.problems) == 0
	return outcome{result: r, Problems: c.problems, late: p.late}
}
