package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// The load of the ring of eight is an open loop: a call is due when it is due, however long
// others take.
const (
	eightShards   = 8
	eightKeys     = 200 // of each cell
	eightInterval = 60 * time.Microsecond
	eightFor      = 75 * time.Second
	eightMended   = 66 * time.Second // so that the first one is away for a minute
	eightBudget   = 20 * time.Millisecond
	eightAtOnce   = 8192 // calls under way
	eightP99      = 10 * time.Millisecond
	eightBack     = time.Minute
)

// eightFaults are what happens to the first three shards, and when.
var eightFaults = []struct {
	at    time.Duration
	stops bool // SIGSTOP instead of SIGKILL
}{{at: 5 * time.Second}, {at: 15 * time.Second, stops: true}, {at: 25 * time.Second}}

// eightRun is the ring of eight at work.
type eightRun struct {
	servers  []*redistest.Server
	ring     *ringfence.Ring
	registry *prometheus.Registry
	cells    []*eightCell

	began    time.Time
	due      int // calls
	refused  atomic.Int64
	late     time.Duration
	spread   time.Duration   // how long after they were due the last calls began
	back     [3]atomic.Int64 // ns after mending
	sent     [3]int          // operations and probes in its first minute away
	mendedAt time.Time
}

// eightCell is one limiter; calls are told apart by number.
type eightCell struct {
	cellID
	limiter *ringfence.Limiter
	keys    []string
	on      []int // key -> which of the faults its shard has, or -1

	took    []time.Duration // by call: its own time
	since   []time.Duration // by call: since it was due
	answers []byte          // by call: bits below
	mu      sync.Mutex
	err     error // guarded by mu
}

const (
	answerAllowed byte = 1 << iota
	answerPrimary
)

func runEight(ctx context.Context, _ *runner, f fault) []outcome {
	s := &scene{}
	defer s.stop()
	e, err := startEight(ctx, s, f)
	if err != nil {
		return failed(f.cells(), err)
	}
	defer e.ring.Close()
	if err := e.play(ctx); err != nil {
		return failed(f.cells(), err)
	}
	start := time.Now()
	_ = e.ring.Close() // a cut connection may say so
	closing := time.Since(start)
	leak := leaked(ours)
	var out []outcome
	for _, c := range e.cells {
		o := e.judge(c)
		if leak != nil {
			complainOf(&o, "a goroutine outlives Close: %v", leak)
		}
		if closing > 2100*time.Millisecond {
			complainOf(&o, "Close took %s, want at most 2s", closing)
		}
		out = append(out, o)
	}
	return out
}

func complainOf(o *outcome, format string, args ...any) {
	o.OK = false
	o.Problems = append(o.Problems, fmt.Sprintf(format, args...))
}

func startEight(ctx context.Context, s *scene, f fault) (*eightRun, error) {
	e := &eightRun{registry: prometheus.NewRegistry()}
	conf := ringfence.Config{
		HashKey: hashKey, Registerer: e.registry, Budget: eightBudget,
		NearCacheKeys: -1, // every answer is to be the primary's or the ladder's
		Logger:        slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	for i := range eightShards {
		server, err := s.server(ctx, redistest.Options{})
		if err != nil {
			return nil, err
		}
		e.servers = append(e.servers, server)
		conf.Shards = append(conf.Shards, ringfence.ShardConfig{ID: shardName(i), Primary: server.URL()})
	}
	var err error
	if e.ring, err = ringfence.Open(ctx, conf); err != nil {
		return nil, err
	}
	e.due = int(eightFor / eightInterval)
	for _, id := range f.cells() {
		c := &eightCell{cellID: id}
		c.limiter, err = e.ring.Limiter(id.policy+"-"+id.algorithm, limitOf(id.algorithm), ringfence.WithPolicy(failurePolicy(id.policy)))
		if err != nil {
			return nil, errors.Join(err, e.ring.Close())
		}
		for k := range eightKeys {
			key := fmt.Sprint("user ", k)
			shard, _ := c.limiter.Locate(key)
			on := -1
			for i := range eightFaults {
				if shard == shardName(i) {
					on = i
				}
			}
			c.keys, c.on = append(c.keys, key), append(c.on, on)
		}
		n := e.due/len(f.cells()) + 1
		c.took, c.since, c.answers = make([]time.Duration, n), make([]time.Duration, n), make([]byte, n)
		e.cells = append(e.cells, c)
	}
	return e, nil
}

func shardName(i int) string { return fmt.Sprint("s", i) }

// play puts the load on and breaks and mends the shards meanwhile.
func (e *eightRun) play(ctx context.Context) error {
	watch := watchMachine()
	defer watch.stop()
	e.began = time.Now()
	var faults sync.WaitGroup
	var broken error
	faults.Go(func() { broken = e.breakAndMend(ctx) })
	e.load(ctx)
	faults.Wait()
	e.late = watch.worst()
	return errors.Join(broken, ctx.Err())
}

// load makes every call in a goroutine of its own, when it is due.
func (e *eightRun) load(ctx context.Context) {
	under := make(chan struct{}, eightAtOnce)
	var calls sync.WaitGroup
	for i := 0; i < e.due && ctx.Err() == nil; {
		due := min(e.due, int(time.Since(e.began)/eightInterval)+1)
		for ; i < due; i++ {
			select {
			case under <- struct{}{}:
			default:
				e.refused.Add(1) // the load could not be offered
				continue
			}
			n := i
			calls.Go(func() {
				e.call(n)
				<-under
			})
		}
		sleepUntil(ctx, e.began.Add(time.Duration(i)*eightInterval+time.Millisecond))
	}
	e.spread = time.Since(e.began) - eightFor
	calls.Wait()
}

func (e *eightRun) call(i int) {
	c := e.cells[i%len(e.cells)]
	n := i / len(e.cells)
	start := time.Now()
	d, err := c.limiter.Allow(context.Background(), c.keys[n%eightKeys])
	end := time.Now()
	if err != nil {
		c.mu.Lock()
		c.err = err
		c.mu.Unlock()
		return
	}
	c.took[n], c.since[n] = end.Sub(start), end.Sub(e.began.Add(time.Duration(i)*eightInterval))
	var a byte
	if d.Allowed {
		a |= answerAllowed
	}
	if d.Source == ringfence.SourcePrimary {
		a |= answerPrimary
	}
	c.answers[n] = a
}

func (e *eightRun) breakAndMend(ctx context.Context) error {
	var counting sync.WaitGroup
	for i, f := range eightFaults {
		sleepUntil(ctx, e.began.Add(f.at))
		if f.stops {
			e.servers[i].Pause()
		} else {
			e.servers[i].Kill()
		}
		before := e.sentTo(i)
		counting.Go(func() {
			sleepUntil(ctx, time.Now().Add(min(time.Minute, eightMended-f.at)))
			e.sent[i] = e.sentTo(i) - before
		})
	}
	counting.Wait()
	var errs []error
	for i, f := range eightFaults {
		if f.stops {
			e.servers[i].Resume()
		} else {
			errs = append(errs, e.servers[i].Restart(ctx))
		}
	}
	e.mendedAt = time.Now()
	var back sync.WaitGroup
	for i := range eightFaults {
		back.Go(func() {
			within, cancel := context.WithTimeout(ctx, eightBack+10*time.Second)
			defer cancel()
			poll(within, func() bool { return e.isBack(within, i) })
			e.back[i].Store(int64(time.Since(e.mendedAt)))
		})
	}
	back.Wait()
	return errors.Join(errs...)
}

// isBack says whether the primary of a shard decides again over the keys of all cells.
func (e *eightRun) isBack(ctx context.Context, fault int) bool {
	if e.ring.Stats()[fault].Breaker.State != ringfence.BreakerClosed {
		return false
	}
	for _, c := range e.cells {
		k := slices.Index(c.on, fault)
		if k < 0 {
			continue
		}
		d, err := c.limiter.Peek(ctx, c.keys[k])
		if err != nil || d.Source != ringfence.SourcePrimary {
			return false
		}
	}
	return true
}

// sentTo is how many operations and probes a shard has been sent so far.
func (e *eightRun) sentTo(fault int) int {
	p := process{registry: e.registry}
	return p.sum("redis_command_duration_seconds", shardName(fault), "charge") + p.sum("circuit_probes_total", shardName(fault))
}

func (e *eightRun) judge(c *eightCell) outcome {
	var o outcome
	o.Fault, o.Policy, o.Algorithm, o.OK, o.late = c.fault, c.policy, c.algorithm, true, e.late
	if c.err != nil {
		complainOf(&o, "a caller got an error: %v", c.err)
	}
	if n := e.refused.Load(); n > 0 || e.spread > time.Second {
		complainOf(&o, "the load was not offered: %d calls not begun, the last %s late", n, e.spread)
	}
	first, mended := eightFaults[0].at, e.mendedAt.Sub(e.began)
	var back time.Duration
	for i := range eightFaults {
		back = max(back, time.Duration(e.back[i].Load()))
	}
	if o.Recovery = back.Milliseconds(); back > eightBack {
		complainOf(&o, "all shards were back only after %s", back)
	}
	offered, strays := 0, 0 // calls for keys of a shard that was away; of one that was not
	var took, since []time.Duration
	for n, a := range c.answers {
		i := n*len(e.cells) + slices.Index(e.cells, c)
		if i >= e.due {
			break
		}
		at := time.Duration(i) * eightInterval
		if a&answerAllowed != 0 {
			o.Admitted++
		}
		on := c.on[n%eightKeys]
		away := on >= 0 && at >= eightFaults[on].at-eightBudget && at <= mended+back
		switch {
		case away:
			offered++
		case a&answerPrimary == 0:
			strays++
		}
		if at >= first && at < mended {
			took, since = append(took, c.took[n]), append(since, c.since[n])
		}
	}
	o.Bound = c.most(offered, strays)
	if o.Admitted > o.Bound {
		complainOf(&o, "%d admitted, want at most %d", o.Admitted, o.Bound)
	}
	if strays*100 > len(c.answers) {
		complainOf(&o, "%d calls of shards that were there were not answered by them", strays)
	}
	slices.Sort(took)
	slices.Sort(since)
	o.P50, o.P999, o.Max = quantile(took, 0.5).Microseconds(), quantile(took, 0.999).Microseconds(), quantile(took, 1).Microseconds()
	p99 := quantile(since, 0.99)
	o.Note = fmt.Sprintf("99th percentile %s after the call was due, timers of this machine up to %s late", p99, e.late)
	if p99 > eightP99 {
		complainOf(&o, "the 99th percentile is %s after the call was due, want %s", p99, eightP99)
	}
	if longest, most := quantile(took, 1), eightBudget+slack(e.late, false); longest > most {
		complainOf(&o, "a call took %s, want at most %s (this machine's timers were late by up to %s)", longest, most, e.late)
	}
	for i, f := range eightFaults {
		o.ShardCalls = max(o.ShardCalls, e.sent[i])
		if most := mostCalls(callsDead, min(time.Minute, eightMended-f.at)); e.sent[i] > most {
			complainOf(&o, "%d operations and probes sent to shard %d while it was away, want at most %d", e.sent[i], i, most)
		}
	}
	return o
}

// most is how many may be admitted: what a shard that was killed held is lost, and for keys
// of shards that were away the policy answered.
func (c *eightCell) most(offered, strays int) int {
	most := 0
	for _, on := range c.on {
		most += perKey
		if on < 0 {
			continue
		}
		if !eightFaults[on].stops {
			most += perKey
		}
		if c.policy == policyLocal {
			most += perKey
		}
	}
	switch c.policy {
	case policyOpen:
		most += offered + strays
	case policyLocal:
		most += strays
	}
	return most
}
