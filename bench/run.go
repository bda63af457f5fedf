package main

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// disturbedAbove is the part of the machine that others may take during a cell.
const disturbedAbove = 0.12

// options say what is run; the zero value of a selection is everything.
type options struct {
	rounds    int
	closed    timing // a cell of a closed loop
	open      timing // a cell of the open loop
	workloads []string
	systems   []string
	callers   []int
	repeats   float64       // disturbed cells run again, as a part of all of a group
	limit     time.Duration // after this only what has no result yet is run
}

// bench is one run.
type bench struct {
	options options
	log     io.Writer

	lone    []*redistest.Server
	cluster *redistest.Cluster
	servers []*redistest.Server // those of the workload that runs

	made map[callsOf]*calls // by calls
}

// callsOf is what the calls of workloads depend on.
type callsOf struct {
	keys int
	skew float64
}

// calls are those of w, made once for all workloads that have the same ones.
func (b *bench) calls(w workload) *calls {
	of := callsOf{w.keys, w.skew}
	if b.made[of] == nil {
		if b.made == nil {
			b.made = map[callsOf]*calls{}
		}
		b.made[of] = newCalls(w)
	}
	return b.made[of]
}

// cell is one system under one workload with one number of callers, once.
type cell struct {
	perSecond         float64
	p50, p99, p999    time.Duration
	client, server    time.Duration // CPU time per decision
	allocs, bytes     float64       // per decision
	granted, expected int64
	right             bool
	calls             int64 // all of them, warm-up included
	away, failed      int64
	lastErr           error
	others            float64 // part of the machine that others took
}

func (b *bench) run(ctx context.Context) (rows []result, problems []string, err error) {
	defer b.stop()
	deadline := time.Now().Add(b.options.limit)
	for _, w := range workloads {
		if !selected(b.options.workloads, w.id) {
			continue
		}
		var chosen []system
		for _, s := range w.of() {
			if selected(b.options.systems, s.name) {
				chosen = append(chosen, s)
			}
		}
		if len(chosen) == 0 {
			continue
		}
		if err := b.start(ctx, w); err != nil {
			return nil, nil, err
		}
		if err := b.flush(ctx); err != nil {
			return nil, nil, err
		}
		at := place{cluster: w.cluster}
		for _, s := range b.servers {
			at.addrs = append(at.addrs, s.Addr())
		}
		if !w.cluster {
			if at.script, err = capture(ctx, at.addrs[0], w.limit); err != nil {
				return nil, nil, err
			}
		}
		c := b.calls(w)
		for _, callers := range w.callers {
			if !w.open && !selected(b.options.callers, callers) {
				continue
			}
			got, troubles := b.group(ctx, w, c, at, chosen, callers, deadline)
			if err := ctx.Err(); err != nil {
				return nil, nil, err
			}
			rows, problems = append(rows, got...), append(problems, troubles...)
		}
	}
	return rows, problems, nil
}

func selected[T comparable](chosen []T, one T) bool {
	return len(chosen) == 0 || slices.Contains(chosen, one)
}

// group runs the systems in turns, each round beginning with another one, and then the
// disturbed cells again.
func (b *bench) group(ctx context.Context, w workload, c *calls, at place, chosen []system, callers int, deadline time.Time) (rows []result, problems []string) {
	cells := make([][]cell, len(chosen))
	failed := make([]bool, len(chosen))
	for round := range b.options.rounds {
		if round > 0 && time.Now().After(deadline) {
			break
		}
		for k := range chosen {
			i := (k + round) % len(chosen)
			if failed[i] || ctx.Err() != nil {
				continue
			}
			one, err := b.cell(ctx, w, c, at, chosen[i], callers)
			if err != nil {
				failed[i] = true
				problems = append(problems, fmt.Sprintf("%s, %s, %d callers: %v", w.id, chosen[i].name, callers, err))
				b.logf("FAILED %s", problems[len(problems)-1])
				continue
			}
			cells[i] = append(cells[i], one)
		}
	}
	again := int(b.options.repeats * float64(b.options.rounds*len(chosen)))
	for i := range cells {
		for j := range cells[i] {
			if again == 0 || cells[i][j].others <= disturbedAbove || time.Now().After(deadline) || ctx.Err() != nil {
				continue
			}
			again--
			if one, err := b.cell(ctx, w, c, at, chosen[i], callers); err == nil && one.others < cells[i][j].others {
				cells[i][j] = one
			}
		}
	}
	for i, s := range chosen {
		if len(cells[i]) > 0 {
			rows = append(rows, summary(w.id, callers, s.name, cells[i]))
		}
	}
	return rows, problems
}

func (b *bench) cell(ctx context.Context, w workload, c *calls, at place, s system, callers int) (one cell, err error) {
	if err := b.flush(ctx); err != nil {
		return one, err
	}
	runtime.GC()
	var i *instance
	if s.open != nil {
		if i, err = s.open(ctx, at, w.limit); err != nil {
			return one, err
		}
		defer i.close()
	}
	from, err := b.serverTime(ctx)
	if err != nil {
		return one, err
	}
	var sum *sums
	t := b.options.closed
	switch {
	case s.open == nil:
		sum, err = b.rawLoop(ctx, at, c, t)
	case w.open:
		t = b.options.open
		sum, err = b.openLoop(ctx, i, c, callers, openRate, t)
	default:
		sum, err = b.closed(ctx, i, c, callers, t)
	}
	if err != nil {
		return one, err
	}
	to, err := b.serverTime(ctx)
	if err != nil {
		return one, err
	}
	one = sum.cell(t)
	one.expected = sum.decided
	if !w.allowed {
		one.expected = s.shape.expect(w.limit, c.counts(sum.attempts), to.Sub(from))
	}
	one.right = s.shape.right(w, one.granted, one.expected, sum.away+sum.failed)
	b.logf("%-10s %4d callers  %-20s %10.0f/s  p99 %8.0f us  granted %d of %d%s",
		w.id, callers, s.name, one.perSecond, micros(one.p99), one.granted, one.expected, one.remarks())
	return one, nil
}

// cell works out what a decision cost. The meters were read a little late on a busy
// machine, so what they say is scaled to the measured time.
func (s *sums) cell(t timing) cell {
	one := cell{
		p50: s.latency.quantile(0.5), p99: s.latency.quantile(0.99), p999: s.latency.quantile(0.999),
		granted: s.granted, calls: s.decided + s.away + s.failed, away: s.away, failed: s.failed, lastErr: s.lastErr,
	}
	one.perSecond = float64(s.finished) / t.measured.Seconds()
	wall := s.after.at.Sub(s.before.at)
	if decisions := float64(s.finished) * float64(wall) / float64(t.measured); decisions > 0 {
		one.client = time.Duration(float64(s.after.client-s.before.client-s.pacer) / decisions)
		one.server = time.Duration(float64(s.after.server-s.before.server) / decisions)
		one.allocs = float64(s.after.allocs-s.before.allocs) / decisions
		one.bytes = float64(s.after.bytes-s.before.bytes) / decisions
	}
	if total := s.after.total - s.before.total; total > 0 {
		ours := s.after.client - s.before.client + s.after.server - s.before.server
		one.others = max(0, float64(s.after.machine-s.before.machine-ours)/float64(total))
	}
	return one
}

func (c cell) remarks() string {
	var b strings.Builder
	if !c.right {
		b.WriteString("  WRONG")
	}
	if c.away > 0 {
		fmt.Fprintf(&b, "  %d by fallback", c.away)
	}
	if c.failed > 0 {
		fmt.Fprintf(&b, "  %d errors (%v)", c.failed, c.lastErr)
	}
	if c.others > disturbedAbove {
		fmt.Fprintf(&b, "  disturbed (%.0f %%)", 100*c.others)
	}
	return b.String()
}

func (b *bench) logf(format string, args ...any) { fmt.Fprintf(b.log, format+"\n", args...) }

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
