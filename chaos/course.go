package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/goleak"
)

// plan is how hard and how long a fault is played.
type plan struct {
	before int           // units charged to every key beforehand
	rate   int           // calls a second and cell while the fault is on
	hold   time.Duration // how long it is on
	after  int           // calls afterwards
	// steady and clock are how long before and after the clock's step.
	steady, clock time.Duration
	// busy: the machine does other things meanwhile. Then whatever the time matters for is
	// given as much more as the machine was late, without a bound, and how long servers take
	// to agree on a new primary is not judged.
	busy bool
}

var (
	full = plan{before: 40, rate: 300, hold: 3 * time.Second, after: 100, steady: 5 * time.Second, clock: 9 * time.Second}
	// short is for the tests that run on every change, with the race detector.
	short = plan{before: 40, rate: 150, hold: time.Second, after: 50, steady: 2 * time.Second, clock: 5 * time.Second, busy: true}
)

// lead is how long the load is on before the fault begins.
const lead = 100 * time.Millisecond

// outcome is a result and what was wrong.
type outcome struct {
	result
	Problems []string
	Note     string        // what is worth saying besides
	late     time.Duration // how late the machine's own timers were
}

// again says whether a play says nothing: something is broken, and the machine was too busy.
func again(out []outcome) bool {
	bad, late := false, time.Duration(0)
	for _, o := range out {
		bad, late = bad || !o.OK, max(late, o.late)
	}
	return bad && late > tooLate
}

// runner plays faults.
type runner struct{ plan plan }

// run plays one fault and judges its cells. A fault that cannot be played has failed in all
// of them.
func (r *runner) run(ctx context.Context, f fault) []outcome {
	ctx, cancel := context.WithTimeout(ctx, 8*time.Minute)
	defer cancel()
	present := goleak.IgnoreCurrent()
	play := r.play
	if f.special != nil {
		play = func(ctx context.Context, f fault) []outcome { return f.special(ctx, r, f) }
	}
	out := play(ctx, f)
	for i := 1; i < mostPlays && again(out) && ctx.Err() == nil; i++ {
		out = play(ctx, f)
	}
	if err := leaked(func() error { return goleak.Find(present) }); err != nil {
		complain(out, "a goroutine is left after everything was closed: %v", err)
	}
	return out
}

// complain adds a problem to all.
func complain(out []outcome, format string, args ...any) {
	for i := range out {
		out[i].OK = false
		out[i].Problems = append(out[i].Problems, fmt.Sprintf(format, args...))
	}
}

// failed is what comes of a fault that could not be played.
func failed(ids []cellID, err error) []outcome {
	out := make([]outcome, len(ids))
	for i, id := range ids {
		out[i].result = result{Fault: id.fault, Policy: id.policy, Algorithm: id.algorithm}
	}
	complain(out, "not played: %v", err)
	return out
}

// leaked waits for goroutines on their way out.
func leaked(find func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	var err error
	poll(ctx, func() bool { err = find(); return err == nil })
	return err
}

// ours finds goroutines that run the library's code.
func ours() error {
	all := make([]byte, 1<<22)
	all = all[:runtime.Stack(all, true)]
	for stack := range strings.SplitSeq(string(all), "\n\n") {
		if strings.Contains(stack, "github.com/ringfence/ringfence.") {
			return errors.New(strings.ReplaceAll(stack, "\n", " "))
		}
	}
	return nil
}

// each does something with all cells at once.
func each(cells []*cell, f func(c *cell) error) error {
	errs := make([]error, len(cells))
	var wg sync.WaitGroup
	for i, c := range cells {
		wg.Go(func() { errs[i] = f(c) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (r *runner) play(ctx context.Context, f fault) []outcome {
	s := &scene{hold: r.plan.hold, down: func(bool) {}}
	if f.hold > 0 {
		s.hold = f.hold
	}
	defer s.stop()
	if err := f.start(ctx, s); err != nil {
		return failed(f.cells(), err)
	}
	s.seat(f)
	defer func() { _ = each(s.cells, func(c *cell) error { c.close(); return nil }) }()
	p := &performance{fault: f, scene: s, plan: r.plan}
	if f.rate > 0 {
		p.plan.rate = f.rate
	}
	if err := p.perform(ctx); err != nil {
		return failed(f.cells(), err)
	}
	return p.judge()
}

// seat makes the cells, each at its place.
func (s *scene) seat(f fault) {
	for _, id := range f.cells() {
		place := s.lone
		if id.policy == policyShare {
			place = s.pair
		}
		c := newCell(id, place)
		c.patient = f.patient
		s.cells = append(s.cells, c)
	}
}

// performance is one fault being played.
type performance struct {
	fault fault
	scene *scene
	plan  plan

	late     time.Duration // how late the machine's own timers were
	outage   time.Duration
	during   int           // calls offered to a cell
	opening  time.Duration // how long it took to open the processes
	dialed   map[*cell]int // connections opened to the shard while it was away, by one process
	before   map[*cell]int // units charged before
	strays   map[*cell]int
	held     map[*cell]map[string]int
	opened   map[*cell]int // how often breakers opened
	settled  map[*cell]int
	debits   map[*cell]int // lost ones
	later    time.Duration // how late the machine was during recovery
	lastSent map[*cell][2][]int
	mu       sync.Mutex // guards the maps

	recovering sync.WaitGroup
}

func (p *performance) perform(ctx context.Context) error {
	p.dialed, p.before, p.strays = map[*cell]int{}, map[*cell]int{}, map[*cell]int{}
	p.held, p.opened, p.settled, p.debits = map[*cell]map[string]int{}, map[*cell]int{}, map[*cell]int{}, map[*cell]int{}
	p.lastSent = map[*cell][2][]int{}
	if err := p.prepare(ctx); err != nil {
		return fmt.Errorf("before the fault: %w", err)
	}
	f, s := p.fault, p.scene
	watch := watchMachine()
	defer watch.stop()
	since, err := p.breakIt(ctx)
	if err != nil {
		return fmt.Errorf("the fault: %w", err)
	}
	if !f.selfHeal {
		p.recover(ctx, since)
	}
	p.recovering.Wait()
	p.later = watch.worst()
	if f.selfHeal && s.heal != nil {
		if err := s.heal(ctx); err != nil {
			return fmt.Errorf("mending: %w", err)
		}
	}
	if err := p.lookBack(ctx); err != nil {
		return fmt.Errorf("after the fault: %w", err)
	}
	return nil
}

// recover has every cell wait until the primary decides again, on the side.
func (p *performance) recover(ctx context.Context, since time.Time) {
	within := mostRecovery(p.fault.comeback, max(p.outage, p.scene.hold))
	if p.plan.busy {
		within = time.Minute
	}
	for _, c := range p.scene.cells {
		p.recovering.Go(func() { c.recover(ctx, since, within) })
	}
}

// prepare charges what is used beforehand, and opens the processes.
func (p *performance) prepare(ctx context.Context) error {
	f, s := p.fault, p.scene
	err := each(s.cells, func(c *cell) error {
		if err := c.chooseKeys(ctx); err != nil || f.atOpen {
			return err
		}
		n, err := c.charge(ctx, p.plan.before)
		if err == nil && n != keyCount*p.plan.before {
			err = fmt.Errorf("%d of %d units admitted", n, keyCount*p.plan.before)
		}
		p.put(func() { p.before[c] = n })
		return err
	})
	if err != nil {
		return err
	}
	for _, place := range []*place{s.lone, s.pair} {
		if place != nil && place.sync != nil {
			if err := place.sync(ctx); err != nil {
				return err
			}
		}
	}
	if f.atOpen {
		if err := s.inject(ctx); err != nil {
			return err
		}
	}
	for _, c := range s.cells { // one after the other: it is timed
		start := time.Now()
		if err := c.open(ctx); err != nil {
			return err
		}
		p.opening = max(p.opening, time.Since(start)/processes)
	}
	if f.atOpen {
		return nil
	}
	return each(s.cells, func(c *cell) error {
		within, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		for i, process := range c.processes {
			if !poll(within, func() bool { return c.exact(within, process, "") }) {
				return fmt.Errorf("process %d of %s is not answered by the primary", i, c.cellID)
			}
		}
		return nil
	})
}

func (p *performance) put(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

// breakIt puts the load on, the fault in and, if it is ours to mend, mends it. since is when
// recovery begins.
func (p *performance) breakIt(ctx context.Context) (since time.Time, err error) {
	f, s := p.fault, p.scene
	p.during = int(int64(p.plan.rate) * int64(lead+s.hold) / int64(time.Second))
	if f.outages > 0 {
		s.down = func(down bool) { p.countCalls(!down) }
	}
	watch := watchMachine()
	defer watch.stop()
	var load sync.WaitGroup
	begin := time.Now()
	for _, c := range s.cells {
		load.Go(func() { c.pace(ctx, p.during, p.plan.rate, true) })
	}
	sleepUntil(ctx, begin.Add(lead))
	began := time.Now()
	if f.selfHeal {
		p.recover(ctx, began) // which waits for a server that has taken over first
	}
	if s.inject != nil && !f.atOpen {
		if err := s.inject(ctx); err != nil {
			load.Wait()
			p.recovering.Wait()
			return since, errors.Join(err, ctx.Err())
		}
	}
	for _, c := range s.cells {
		c.begunBad = int(c.begun.Load())
	}
	if f.outages == 0 {
		p.countCalls(false)
	}
	load.Wait()
	if f.outages == 0 {
		p.countCalls(true)
	}
	p.late = watch.worst()
	p.outage = time.Since(began)
	since = time.Now()
	if s.heal != nil && !f.selfHeal {
		if err := s.heal(ctx); err != nil {
			return since, err
		}
		p.outage, since = time.Since(began), time.Now()
	}
	if f.selfHeal {
		since = began
	}
	return since, ctx.Err()
}

// countCalls begins to count what is sent to the shard, or ends.
func (p *performance) countCalls(end bool) {
	for _, c := range p.scene.cells {
		calls, dials := c.sent()
		p.mu.Lock()
		if last, ok := p.lastSent[c]; ok && end {
			c.calls += grown(last[0], calls)
			p.dialed[c] += grown(last[1], dials)
		}
		p.lastSent[c] = [2][]int{calls, dials}
		p.mu.Unlock()
	}
}

// grown is by how much the one that grew most did.
func grown(from, to []int) int {
	most := 0
	for i := range from {
		most = max(most, to[i]-from[i])
	}
	return most
}

// lookBack uses up what is left and reads what the shard holds.
func (p *performance) lookBack(ctx context.Context) error {
	return each(p.scene.cells, func(c *cell) error {
		c.settle(ctx)
		was, _, _ := c.snapshot()
		c.pace(ctx, p.plan.after, p.plan.rate, false)
		is, _, _ := c.snapshot()
		opened := 0
		for _, process := range c.processes {
			for _, s := range process.ring.Stats() {
				opened += int(s.Breaker.Opened)
			}
		}
		settled, debits := c.sum("settled_charges_total"), c.sum("settle_lost_total") // Close takes them away
		c.close()
		if _, err := c.charge(ctx, perKey+1); err != nil {
			return err
		}
		held, err := c.held(ctx)
		p.put(func() {
			p.strays[c], p.held[c], p.opened[c], p.settled[c], p.debits[c] = is.others-was.others, held, opened, settled, debits
		})
		return err
	})
}

// judge compares with the promises.
func (p *performance) judge() []outcome {
	leak := leaked(ours)
	var out []outcome
	for _, c := range p.scene.cells {
		if leak != nil {
			c.problem("a goroutine outlives Close: %v", leak)
		}
		r := p.judgeCell(c)
		slices.Sort(c.problems)
		r.OK = len(c.problems) == 0
		out = append(out, outcome{result: r, Problems: c.problems, late: max(p.late, p.later)})
	}
	return out
}

func (p *performance) judgeCell(c *cell) result {
	f := p.fault
	t, admitted, acked := c.snapshot()
	outages := max(1, f.outages)
	s := situation{
		keys: keyCount, limit: perKey, processes: processes, policy: c.policy, replicas: c.place.replicas,
		away: f.away, before: p.before[c], begun: c.begunBad, during: p.during, rate: p.plan.rate, loses: c.place.loses,
		since: f.since, untold: f.untold, outages: outages, strays: p.strays[c],
		debits: p.debits[c], lag: p.allowance(replicationLag),
	}
	r := result{
		Fault: f.name, Policy: c.policy, Algorithm: c.algorithm,
		Admitted: admitted, Bound: mostAdmitted(s), Recovery: c.recovery.Milliseconds(), ShardCalls: c.calls,
	}
	c.checkAdmitted(s, admitted, f)
	t.took = sorted(t.took)
	r.P50, r.P999, r.Max = quantile(t.took, 0.5).Microseconds(), quantile(t.took, 0.999).Microseconds(), quantile(t.took, 1).Microseconds()
	c.checkTimes(p, t.took)

	outage := p.outage
	if f.outages > 0 {
		outage = p.scene.hold / time.Duration(2*f.outages)
	}
	most := mostCalls(f.calls, outage)
	if f.calls != callsFree {
		most *= outages
		if c.calls > most {
			c.problem("%d operations and probes sent to a shard that was away for %s, want at most %d", c.calls, outage.Round(time.Millisecond), most)
		}
		// A check-up of all shards may have been under way.
		if dials := p.dialed[c]; dials > most+inFlight*outages+2 {
			c.problem("%d connections opened to a shard that was away, want at most %d", dials, most+inFlight*outages+2)
		}
	}
	if c.place.loses == losesNothing {
		held := 0
		for key, n := range p.held[c] {
			held += n
			if n < min(t.acked[key], perKey) {
				c.problem("key %q: %d charges were acknowledged and the shard holds %d", key, t.acked[key], n)
			}
		}
		check := conservation{
			charged: held, acked: min(acked, keyCount*perKey), settled: p.settled[c], unsure: t.unsure,
			debits: p.debits[c], strays: p.strays[c], processes: processes, outages: outages, outage: outage, calls: f.calls,
		}
		if f.already {
			check.calls = callsFree
		}
		if err := check.check(); err != nil {
			c.problem("%v", err)
		}
	}
	return r
}

func (c *cell) checkAdmitted(s situation, admitted int, f fault) {
	t := c.told
	if most := mostAdmitted(s); admitted > most {
		c.problem("%d admitted, want at most %d (%d out of shares, %d by a policy, of %d answers by others; %d units of debits lost)",
			admitted, most, t.shared, t.byPolicy, t.others, s.debits)
	}
	exactly := s
	exactly.policy = policyClosed
	if most := mostAdmitted(exactly); admitted-t.byPolicy > most {
		c.problem("%d admitted that no policy answers for, want at most %d (%d out of shares; %d units of debits lost)",
			admitted-t.byPolicy, most, t.shared, s.debits)
	}
	if t.byPolicy > 0 && (c.policy == policyClosed || c.policy == policyShare) {
		c.problem("%d admitted by a policy that admits nobody", t.byPolicy)
	}
	if f.patient && t.others > 0 {
		c.problem("%d answers did not come from the primary, which was there", t.others)
	}
	if f.exact {
		for key, n := range t.admitted {
			if n != perKey {
				c.problem("key %q: %d admitted, want exactly %d", key, n, perKey)
			}
		}
	}
}

func (c *cell) checkTimes(p *performance, took []time.Duration) {
	f, t := p.fault, c.told
	if n := len(took); n != p.during {
		c.problem("%d of %d calls were made", n, p.during)
	}
	c.checkLongest(p, took)
	// Once the breaker is open nobody waits.
	if half, most := quantile(took, 0.5), p.allowance(5*time.Millisecond); f.calls == callsDead && half > most {
		c.problem("half of the calls took %s and more, want %s: callers wait for a dead shard", half, most)
	}
	if most := p.allowance(mostRecovery(f.comeback, p.outage)); c.recovery > most && (f.comeback == 0 || !p.plan.busy) {
		c.problem("the primary decides again after %s, want %s", c.recovery.Round(time.Millisecond), most)
	}
	if most := p.allowance(afterTakeover(c.tookOver, p.plan.busy)); c.tookOver > 0 && c.recovery-c.tookOver > most {
		c.problem("the primary decides again %s after a server has taken over, want %s", (c.recovery - c.tookOver).Round(time.Millisecond), most)
	}
	if most := 2*operationTimeout + slack(p.late, p.plan.busy); f.atOpen && p.opening > most {
		c.problem("Open took %s with everything down, want at most %s", p.opening, most)
	}
	if f.goodput > 0 && t.primary*100 < (t.primary+t.others)*f.goodput {
		c.problem("the primary answered %d calls and others %d, want %d %% by the primary", t.primary, t.others, f.goodput)
	}
	if f.shut && p.opened[c] > 0 {
		c.problem("the breaker opened %d times, for what is not the shard's fault", p.opened[c])
	}
}

func (c *cell) checkLongest(p *performance, took []time.Duration) {
	most := budget + slack(p.late, p.plan.busy)
	if c.patient {
		most += patience - budget
	}
	if longest := quantile(took, 1); longest > most {
		c.problem("a call took %s, want at most %s (this machine's timers were late by up to %s)", longest, most, p.late)
	}
}

// allowance is what may take this long on a machine that does nothing else.
func (p *performance) allowance(d time.Duration) time.Duration {
	if p.plan.busy {
		d += 10 * max(p.late, p.later)
	}
	return d
}

func sorted(took []time.Duration) []time.Duration { return slices.Sorted(slices.Values(took)) }
