package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence"
)

// The size of a cell.
const (
	processes = 2
	keyCount  = 8
	perKey    = 100 // the limit of each key
	workers   = 12  // callers at once
)

// cell is a row of the matrix at work: two processes that share the quota of eight keys.
type cell struct {
	cellID
	place     *place
	failure   ringfence.FailurePolicy
	limit     ringfence.Limit
	patient   bool // callers wait until they are answered: nothing is away
	keys      []string
	processes []*process

	mu       sync.Mutex // guards the following
	told     tally
	problems []string

	begun    atomic.Int64 // calls under measurement
	begunBad int          // of them when the fault had begun

	since time.Time                // of the clock's step
	first map[string]time.Duration // by key: from then until a call was admitted

	tookOver time.Duration // when another server had taken over; 0 where none does

	calls    int           // of the busiest process, while the shard was away
	recovery time.Duration // of the slowest process
}

// tally is what callers were told.
type tally struct {
	admitted, acked map[string]int // by key: by anybody, and by the primary
	shared          int            // admitted out of a share
	byPolicy        int            // admitted by a policy
	unsure          int            // answered by others, when the request may have left
	primary, others int            // answers by the primary, and by others
	took            []time.Duration
}

// process is one ring, as a process of a service has it.
type process struct {
	ring     *ringfence.Ring
	limiter  *ringfence.Limiter
	registry *prometheus.Registry
	dials    *dials
}

var hashKey = []byte("0123456789abcdef")

// limitOf has a window so long that, for as long as a cell lives, what was used stays used.
func limitOf(algorithm string) ringfence.Limit {
	if algorithm == slidingLog {
		return ringfence.SlidingLog{Limit: perKey, Window: time.Hour}
	}
	return ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: perKey}
}

func failurePolicy(policy string) ringfence.FailurePolicy {
	switch policy {
	case policyOpen:
		return ringfence.PolicyOpen
	case policyLocal:
		return ringfence.PolicyLocal
	default: // behind the share nobody admits
		return ringfence.PolicyClosed
	}
}

func newCell(id cellID, p *place) *cell {
	c := &cell{cellID: id, place: p, failure: failurePolicy(id.policy), limit: limitOf(id.algorithm), first: map[string]time.Duration{}}
	c.told.admitted, c.told.acked = map[string]int{}, map[string]int{}
	return c
}

// limiterName is the same in all processes of the cell, and the cell's alone.
func (c *cell) limiterName() string { return c.policy + "-" + c.algorithm }

func (c *cell) problem(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if text := fmt.Sprintf(format, args...); !slices.Contains(c.problems, text) {
		c.problems = append(c.problems, text)
	}
}

func (c *cell) config(s ringfence.ShardConfig, instance string) ringfence.Config {
	return ringfence.Config{
		Shards: []ringfence.ShardConfig{s}, HashKey: hashKey, Policy: c.failure,
		Instances: processes, InstanceID: instance, Budget: budget,
		NearCacheKeys: -1, // every answer is to be the primary's or the ladder's
		Logger:        slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
}

// open opens the processes under test.
func (c *cell) open(ctx context.Context) error {
	for i := range processes {
		p := &process{registry: prometheus.NewRegistry(), dials: &dials{}}
		conf := c.config(c.place.faulty(), fmt.Sprintf("process %d", i))
		conf.Registerer = p.registry
		if c.patient {
			conf.Budget = patience
		}
		if c.place.dialed != "" {
			conf.Dialer = p.dials.dial
		}
		var err error
		if p.ring, err = ringfence.Open(ctx, conf); err != nil {
			return err
		}
		c.processes = append(c.processes, p)
		if p.limiter, err = p.ring.Limiter(c.limiterName(), c.limit); err != nil {
			return err
		}
	}
	return nil
}

// close closes the processes, each within the promised two seconds.
func (c *cell) close() {
	for _, p := range c.processes {
		start := time.Now()
		_ = p.ring.Close() // a cut connection may say so
		if took := time.Since(start); took > 2*time.Second+100*time.Millisecond {
			c.problem("Close took %s, want at most 2s", took.Round(time.Millisecond))
		}
	}
}

// direct lends a limiter of a process that is not under test: it goes around the fault, and
// waits until it is answered.
func (c *cell) direct(ctx context.Context, s ringfence.ShardConfig, f func(*ringfence.Limiter) error) error {
	conf := c.config(s, "the one that looks on")
	conf.Budget, conf.Policy = patience, ringfence.PolicyClosed
	ring, err := ringfence.Open(ctx, conf)
	if err != nil {
		return err
	}
	defer ring.Close()
	l, err := ring.Limiter(c.limiterName(), c.limit)
	if err != nil {
		return err
	}
	return f(l)
}

// chooseKeys takes keys that lie where the fault is.
func (c *cell) chooseKeys(ctx context.Context) error {
	return c.direct(ctx, c.place.direct(), func(l *ringfence.Limiter) error {
		for i := 0; len(c.keys) < keyCount; i++ {
			key := fmt.Sprint("user ", i)
			_, name := l.Locate(key)
			if c.place.fits == nil || c.place.fits(name) {
				c.keys = append(c.keys, key)
			}
			if i > 10_000 {
				return errors.New("no keys lie where the fault is")
			}
		}
		return nil
	})
}

// charge has the primary admit up to n units of every key, and says how many it did.
func (c *cell) charge(ctx context.Context, n int) (charged int, err error) {
	err = c.direct(ctx, c.place.direct(), func(l *ringfence.Limiter) error {
		for _, key := range c.keys {
			for range n {
				d, err := l.Allow(ctx, key)
				if err != nil {
					return err
				}
				if d.Source != ringfence.SourcePrimary {
					return fmt.Errorf("with no fault on, %s answered (%s)", d.Source, d.Cause)
				}
				c.note(key, d, nil, 0, false)
				if !d.Allowed {
					break
				}
				charged++
			}
		}
		return nil
	})
	return charged, err
}

// held is how many units of each key the shard holds.
func (c *cell) held(ctx context.Context) (map[string]int, error) {
	out := map[string]int{}
	err := c.direct(ctx, c.place.direct(), func(l *ringfence.Limiter) error {
		for _, key := range c.keys {
			d, err := l.Peek(ctx, key)
			if err != nil {
				return err
			}
			if d.Source != ringfence.SourcePrimary {
				return fmt.Errorf("with no fault on, %s answered a look (%s)", d.Source, d.Cause)
			}
			out[key] = int(d.Limit - d.Remaining)
		}
		return nil
	})
	return out, err
}

// call makes the i-th call: the processes in turn, and the keys.
func (c *cell) call(i int, measured bool) {
	p, key := c.processes[i%processes], c.keys[i/processes%len(c.keys)]
	if measured {
		c.begun.Add(1)
	}
	start := time.Now()
	d, err := p.limiter.Allow(context.Background(), key)
	c.note(key, d, err, time.Since(start), measured)
}

func (c *cell) note(key string, d ringfence.Decision, err error, took time.Duration, measured bool) {
	if err != nil {
		c.problem("a caller got an error: %v", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	t := &c.told
	if measured {
		t.took = append(t.took, took)
	}
	if d.Source == ringfence.SourcePrimary {
		t.primary++
	} else {
		t.others++
		if d.Cause == ringfence.CauseBudget || d.Cause == ringfence.CauseError {
			t.unsure++
		}
	}
	if !d.Allowed {
		return
	}
	t.admitted[key]++
	if _, ok := c.first[key]; !ok && !c.since.IsZero() && time.Now().After(c.since) {
		c.first[key] = time.Since(c.since)
	}
	switch d.Source {
	case ringfence.SourcePrimary:
		t.acked[key]++
	case ringfence.SourceReplica:
		t.shared++
	default:
		t.byPolicy++
	}
}

// snapshot is a copy of the counts.
func (c *cell) snapshot() (t tally, admitted, acked int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range c.told.admitted {
		admitted += n
	}
	for _, n := range c.told.acked {
		acked += n
	}
	t = c.told
	t.took = slices.Clone(t.took)
	return t, admitted, acked
}

// pace makes n calls, rate a second.
func (c *cell) pace(ctx context.Context, n, rate int, measured bool) {
	var next atomic.Int64
	start := time.Now()
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				sleepUntil(ctx, start.Add(time.Duration(i)*time.Second/time.Duration(rate)))
				c.call(i, measured)
			}
		})
	}
	wg.Wait()
}

// sleepUntil keeps the pace of the load.
func sleepUntil(ctx context.Context, at time.Time) {
	left := time.Until(at)
	if left <= 0 {
		return
	}
	timer := time.NewTimer(left)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// exact says whether the primary decides over all keys of a process.
func (c *cell) exact(ctx context.Context, p *process, marker string) bool {
	for _, s := range p.ring.Stats() {
		if s.Breaker.State != ringfence.BreakerClosed {
			return false
		}
	}
	if marker != "" {
		d, err := p.limiter.Peek(ctx, marker)
		if err != nil || d.Source != ringfence.SourcePrimary || d.Remaining == d.Limit {
			return false
		}
	}
	for _, key := range c.keys {
		d, err := p.limiter.Peek(ctx, key)
		if err != nil || d.Source != ringfence.SourcePrimary {
			return false
		}
	}
	return true
}

// recover waits until the primary decides in every process, and notes how long that took.
func (c *cell) recover(ctx context.Context, since time.Time, within time.Duration) {
	ctx, cancel := context.WithDeadline(ctx, since.Add(within+10*time.Second))
	defer cancel()
	marker, err := c.mark(ctx)
	if err != nil {
		c.problem("no server took over: %v", err)
	}
	if c.place.tookOver != nil {
		c.tookOver = time.Since(since)
	}
	var wg sync.WaitGroup
	for i, p := range c.processes {
		wg.Go(func() {
			if !poll(ctx, func() bool { return c.exact(ctx, p, marker) }) {
				c.problem("process %d was not answered by the primary for %s", i, time.Since(since).Round(time.Millisecond))
			}
		})
	}
	wg.Wait()
	c.recovery = time.Since(since)
}

// mark leaves a mark on the server that took over, where one does: a process that sees it
// has followed.
func (c *cell) mark(ctx context.Context) (string, error) {
	if c.place.tookOver == nil {
		return "", nil
	}
	var to *ringfence.ShardConfig
	if !poll(ctx, func() bool { to = c.place.tookOver(ctx); return to != nil }) {
		return "", ctx.Err()
	}
	if !c.place.marked {
		return "", nil
	}
	const marker = "marker"
	return marker, c.direct(ctx, *to, func(l *ringfence.Limiter) error {
		d, err := l.Allow(ctx, marker)
		if err == nil && d.Source != ringfence.SourcePrimary {
			err = fmt.Errorf("%s answered (%s)", d.Source, d.Cause)
		}
		return err
	})
}

// poll looks every few milliseconds until ok, and says whether it was before ctx ended.
func poll(ctx context.Context, ok func() bool) bool {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if ok() {
			return true
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
}

// settle waits until the processes have told the shard what they owe it: until nothing has
// been told for half a second.
func (c *cell) settle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	last, at := -1, time.Now()
	poll(ctx, func() bool {
		if now := c.sum("settled_charges_total") + c.sum("settle_lost_total"); now != last {
			last, at = now, time.Now()
		}
		return time.Since(at) > 500*time.Millisecond
	})
}

// sent is how many operations and probes each process has sent to the shard so far, and how
// many connections it has opened.
func (c *cell) sent() (calls, dials []int) {
	for _, p := range c.processes {
		calls = append(calls, p.sum("redis_command_duration_seconds", "charge")+p.sum("circuit_probes_total"))
		dials = append(dials, p.dials.to(c.place.dialed))
	}
	return calls, dials
}

func (c *cell) sum(metric string) int {
	n := 0
	for _, p := range c.processes {
		n += p.sum(metric)
	}
	return n
}

// sum adds up the samples of a metric that have all these values among their labels.
func (p *process) sum(metric string, labels ...string) int {
	families, err := p.registry.Gather()
	if err != nil {
		return 0
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != "ratelimiter_"+metric {
			continue
		}
		for _, m := range f.GetMetric() {
			missing := len(labels)
			for _, l := range m.GetLabel() {
				if slices.Contains(labels, l.GetValue()) {
					missing--
				}
			}
			if missing == 0 {
				sum += m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return int(sum)
}

// dials counts the connections opened to each address.
type dials struct {
	mu sync.Mutex
	n  map[string]int // guarded by mu
}

func (d *dials) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d.mu.Lock()
	if d.n == nil {
		d.n = map[string]int{}
	}
	d.n[addr]++
	d.mu.Unlock()
	var dialer net.Dialer
	return dialer.DialContext(ctx, network, addr)
}

func (d *dials) to(addr string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.n[addr]
}
