package histories

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/ringfence/ringfence"
)

// year is a window that a simulation does not see the end of.
const year = 300 * 24 * time.Hour

// simulation is one run: some rings, as of some processes, over some shards.
type simulation struct {
	seed     uint64
	plan     draws
	recorder *Recorder
	shards   []*simShard
	servers  map[string]*simServer
	rings    []*simProcess
	keys     []string
	costs    [2]int64      // of calls; more kinds would only make the judge slow
	longest  time.Duration // open period of a breaker
	timeout  time.Duration // of an operation
	budget   time.Duration
	replicas bool
	faults   int           // kinds of them, see storm
	lull     time.Duration // the longest between two
	fair     weather       // between two
	round    uint64

	processes int
	policy    ringfence.FailurePolicy
	failures  int // at least so many open a breaker
	limits    func(process int) []simLimit

	mu     sync.Mutex
	broken []error // promises, other than those of the history
}

// simShard is a primary and, in half of the runs, a replica that lags behind.
type simShard struct {
	id string

	mu      sync.Mutex // guards who is who, and what the replica has
	primary *simServer
	replica *simServer
	// first and second are their addresses in the beginning.
	first, second string
}

// simProcess is what one process of a service has.
type simProcess struct {
	ring     *ringfence.Ring
	metrics  *prometheus.Registry
	limiters []*ringfence.Limiter
	closed   bool // in the middle of a run
}

// simLimit is a limiter of a process.
type simLimit struct {
	name    string
	limit   ringfence.Limit
	options []ringfence.LimiterOption
}

// outcome is what came of a run.
type outcome struct {
	events []Event
	broken []error
}

// err is what is wrong with it.
func (o outcome) err() error {
	return errors.Join(append([]error{Check(o.events)}, o.broken...)...)
}

// trace is the history as text, by client: what a run has to do again when it is replayed.
func (o outcome) trace() string {
	clients := map[int]*strings.Builder{}
	most := 0
	for _, e := range o.events {
		if clients[e.Client] == nil {
			clients[e.Client] = &strings.Builder{}
		}
		fmt.Fprintln(clients[e.Client], e)
		most = max(most, e.Client)
	}
	var all strings.Builder
	for c := -1; c <= most; c++ {
		if b := clients[c]; b != nil {
			all.WriteString(b.String())
		}
	}
	return all.String()
}

// simulate runs a seed in virtual time.
//
// The race detector makes the scheduler choose at random, and so does a second processor.
// Events are therefore spread out to nanoseconds, so that there is hardly ever a choice;
// one processor takes away most of the rest.
func simulate(t *testing.T, seed uint64, bug plant) (o outcome) {
	t.Helper()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	// go-redis and ringfence keep timers and channels for reuse, and those of one bubble
	// are of no use in another: the second collection empties their pools.
	runtime.GC()
	runtime.GC()
	synctest.Test(t, func(t *testing.T) {
		s := newSimulation(seed, bug)
		if err := s.open(); err != nil {
			s.close()
			t.Fatal(err)
		}
		for range 2 + s.plan.IntN(3) {
			s.play(s.plan.between(3*time.Second, 15*time.Second))
			s.heal()
		}
		o = outcome{events: s.recorder.Events()}
		s.count(o.events)
		s.close()
		o.broken = s.broken
	})
	return o
}

func newSimulation(seed uint64, bug plant) *simulation {
	s := &simulation{
		seed: seed, plan: stream(seed, 0), recorder: NewRecorder(), servers: map[string]*simServer{},
		faults: 9, lull: 8 * time.Second, failures: 1,
	}
	s.longest = s.plan.between(500*time.Millisecond, 5*time.Second)
	s.timeout = s.plan.between(50*time.Millisecond, 400*time.Millisecond)
	s.budget = s.plan.between(5*time.Millisecond, 40*time.Millisecond)
	s.replicas = s.plan.IntN(2) == 0
	s.costs = [2]int64{1 + s.plan.Int64N(2), 3 + s.plan.Int64N(maxCost-2)}
	for i := range 1 + s.plan.IntN(2) {
		shard := &simShard{id: string(rune('a' + i))}
		shard.primary = newSimServer(shard.id+".test:6379", mix(seed, uint64(i), 1), true)
		shard.primary.replID = shard.id
		shard.primary.plant = bug
		s.servers[shard.primary.addr] = shard.primary
		if s.replicas {
			shard.replica = newSimServer(shard.id+"-replica.test:6379", mix(seed, uint64(i), 2), false)
			shard.replica.replID = shard.id
			s.servers[shard.replica.addr] = shard.replica
		}
		shard.first = shard.primary.addr
		if s.replicas {
			shard.second = shard.replica.addr
		}
		s.shards = append(s.shards, shard)
	}
	for i := range 1 + s.plan.IntN(3) {
		s.keys = append(s.keys, fmt.Sprintf("key%d", i))
	}
	s.processes = 1 + s.plan.IntN(3)
	limit := int64(8 + s.plan.IntN(40))
	s.policy = ringfence.FailurePolicy(s.plan.IntN(3))
	s.limits = func(int) []simLimit {
		return []simLimit{
			{name: "bucket", limit: ringfence.TokenBucket{Rate: 1, Per: (year / time.Duration(limit)).Truncate(time.Second), Burst: limit}},
			{name: "log", limit: ringfence.SlidingLog{Limit: limit, Window: year}},
		}
	}
	return s
}

func (s *simulation) open() error {
	for _, server := range s.servers {
		if err := server.start(); err != nil {
			return err
		}
	}
	for i := range s.processes {
		p, err := s.openProcess(i, s.plan)
		if err != nil {
			return err
		}
		s.rings = append(s.rings, p)
		time.Sleep(s.plan.between(0, time.Second)) // or they would check up on the shards together
	}
	return nil
}

// openProcess opens what a process has. No two have the same number.
func (s *simulation) openProcess(number int, draw draws) (*simProcess, error) {
	var shards []ringfence.ShardConfig
	for _, shard := range s.shards {
		c := ringfence.ShardConfig{ID: shard.id, Primary: "redis://" + shard.first}
		if shard.replica != nil {
			c.Replicas = []string{"redis://" + shard.second}
		}
		shards = append(shards, c)
	}
	chance := mix(s.seed, 4, uint64(number))
	var calls sync.Mutex
	p := &simProcess{metrics: prometheus.NewRegistry()}
	ring, err := ringfence.Open(context.Background(), ringfence.Config{
		Shards: shards, HashKey: binary.LittleEndian.AppendUint64(make([]byte, 8), s.seed),
		Instances: s.processes, InstanceID: fmt.Sprint(number), Policy: s.policy,
		Budget: s.budget, OperationTimeout: s.timeout, InFlight: 1 + draw.IntN(4), MaxBatch: 1 + draw.IntN(16),
		Breaker:    ringfence.BreakerConfig{MaxOpenPeriod: s.longest, Failures: s.failures + draw.IntN(4)},
		Registerer: p.metrics, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Dialer: func(ctx context.Context, _, addr string) (net.Conn, error) { return s.servers[addr].dial(ctx) },
		Rand: func() uint64 {
			calls.Lock()
			defer calls.Unlock()
			chance = mix(chance)
			return chance
		},
	})
	if err != nil {
		return nil, err
	}
	p.ring = ring
	for _, l := range s.limits(number) {
		limiter, err := ring.Limiter(l.name, l.limit, l.options...)
		if err != nil {
			_ = ring.Close()
			return nil, err
		}
		p.limiters = append(p.limiters, limiter)
	}
	return p, nil
}

// play lets clients call and faults happen for a while.
func (s *simulation) play(length time.Duration) {
	s.round++
	end := time.Now().Add(length)
	var all sync.WaitGroup
	client := 0
	for i, p := range s.rings {
		for range 1 + s.plan.IntN(2) {
			c := &Caller{Recorder: s.recorder, Process: i, Client: client, Budget: s.budget, Broken: s.breaks}
			draw := stream(s.seed, 5, s.round, uint64(client))
			all.Go(func() { s.call(c, p, draw, end) })
			client++
		}
	}
	s.storms(&all, end)
	all.Wait()
}

// storms begins the bad weather at all servers.
func (s *simulation) storms(all *sync.WaitGroup, end time.Time) {
	for i, shard := range s.shards {
		primary, replica := shard.primary, shard.replica // they may change places
		all.Go(func() { s.storm(shard.id, primary, stream(s.seed, 6, s.round, uint64(i)), end) })
		if replica != nil {
			all.Go(func() { s.storm("", replica, stream(s.seed, 7, s.round, uint64(i)), end) })
			all.Go(func() { s.replicate(shard, stream(s.seed, 8, s.round, uint64(i)), end) })
		}
	}
}

// call is one client.
func (s *simulation) call(c *Caller, p *simProcess, draw draws, end time.Time) {
	for time.Now().Before(end) {
		pause := draw.between(0, 3*time.Second)
		if draw.IntN(3) > 0 { // calls come in bursts
			pause = draw.between(0, 20*time.Millisecond)
		}
		time.Sleep(pause)
		s.callOnce(c, p, draw)
	}
}

func (s *simulation) callOnce(c *Caller, p *simProcess, draw draws) {
	ctx := context.Background()
	switch draw.IntN(20) {
	case 0: // in a hurry
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, draw.between(time.Millisecond, 2*s.budget))
		defer cancel()
	case 1: // changes its mind
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		stop := time.AfterFunc(draw.between(100*time.Microsecond, s.budget), cancel)
		defer stop.Stop()
	}
	l := p.limiters[draw.IntN(2)]
	key := s.keys[draw.IntN(len(s.keys))]
	switch n := draw.IntN(40); {
	case n == 0:
		c.Reset(ctx, l, key)
	case n < 6:
		c.Peek(ctx, l, key)
	case n < 10:
		reqs := make([]ringfence.Request, 1+draw.IntN(5))
		for i := range reqs {
			reqs[i] = ringfence.Request{Key: s.keys[draw.IntN(len(s.keys))], Cost: s.costs[draw.IntN(2)]}
		}
		c.AllowMany(ctx, l, reqs)
	default:
		c.AllowN(ctx, l, key, s.costs[draw.IntN(2)])
	}
}

// storm makes bad weather at a server, with fine days in between. Only the faults of
// primaries are told to the history.
func (s *simulation) storm(shard string, server *simServer, draw draws, end time.Time) {
	for server.set(s.fair); ; {
		time.Sleep(draw.between(100*time.Millisecond, s.lull))
		if !time.Now().Before(end) {
			return
		}
		length := draw.between(20*time.Millisecond, 300*time.Millisecond)
		if draw.IntN(2) == 0 {
			length = draw.between(time.Second, 12*time.Second)
		}
		wait := func() { time.Sleep(min(length, time.Until(end)+draw.between(0, time.Second))) }
		kind := draw.IntN(s.faults)
		if kind > 10 { // the last three twice as often
			kind -= 3
		}
		switch kind {
		case 0:
			server.set(weather{slow: draw.between(0, 4*s.budget)})
			wait()
		case 1:
			server.requests.set(true)
			wait()
			server.requests.set(false)
		case 2:
			server.replies.set(true)
			wait()
			server.replies.set(false)
		case 3:
			server.set(weather{refusing: true, lost: 0.2})
			wait()
		case 4:
			server.set(weather{lost: draw.part()})
			wait()
		case 5:
			server.set(weather{cut: draw.part()})
			wait()
		case 6:
			server.set(weather{says: []string{
				"-LOADING Redis is loading the dataset in memory", "-BUSY Redis is busy running a script.",
				"-OOM command not allowed when used memory > 'maxmemory'.", "-NOREPLICAS Not enough good replicas to write.",
				"-MISCONF Redis is configured to save RDB snapshots", "-NOSCRIPT No matching script. Please use EVAL.",
			}[draw.IntN(6)]})
			wait()
		case 7:
			server.kill()
			wait()
		case 8:
			server.kill()
			if shard != "" {
				s.recorder.Wiped(shard, server.m.FlushAll)
			}
			wait()
		case 9: // from here on only where quota is judged, see leaseRun
			if shard != "" {
				s.step(shard, server, draw)
			}
		case 10:
			if shard != "" {
				s.failOver(shard, server, draw, wait)
			}
		}
		server.set(s.fair)
	}
}

// replicate copies what the primary has to the replica, now and then.
func (s *simulation) replicate(shard *simShard, draw draws, end time.Time) {
	for time.Now().Before(end) {
		time.Sleep(draw.between(10*time.Millisecond, 2*time.Second))
		shard.copy()
	}
}

// copy makes the replica have what the primary has.
func (shard *simShard) copy() {
	shard.mu.Lock()
	defer shard.mu.Unlock()
	if shard.primary.now().down {
		return
	}
	from, to := shard.primary.m, shard.replica.m
	to.FlushAll()
	for _, k := range from.Keys() {
		switch from.Type(k) {
		case "hash":
			fields, _ := from.HKeys(k) // it is one
			for _, f := range fields {
				to.HSet(k, f, from.HGet(k, f))
			}
		case "zset":
			members, _ := from.SortedSet(k) // it is one
			for m, score := range members {
				_, _ = to.ZAdd(k, score, m) // it was empty
			}
		}
		to.SetTTL(k, from.TTL(k))
	}
}

// heal ends all faults, and looks whether the rings find their way back.
func (s *simulation) heal() {
	s.calm()
	for i, p := range s.rings {
		c := &Caller{Recorder: s.recorder, Process: i, Client: 100 + i, Budget: s.budget, Broken: s.breaks}
		for _, l := range p.limiters {
			for _, k := range s.keys {
				for _, d := range []ringfence.Decision{
					c.AllowN(context.Background(), l, k, s.costs[0]), c.Peek(context.Background(), l, k),
				} {
					if d.Source != ringfence.SourcePrimary {
						s.breaks(fmt.Errorf("process %d: %s/%s is decided by %s (%s), although the last fault is %v ago",
							i, l.Name(), k, d.Source, d.Cause, 2*s.longest+s.timeout))
					}
				}
			}
		}
	}
}

// calm ends all faults, and looks whether the rings notice.
func (s *simulation) calm() {
	for _, server := range s.servers {
		server.set(weather{})
		server.requests.set(false)
		server.replies.set(false)
	}
	time.Sleep(2 * s.longest)
	for i, p := range s.rings {
		if p.closed {
			continue
		}
		for _, shard := range p.ring.Stats() {
			if shard.Breaker.State != ringfence.BreakerClosed {
				s.breaks(fmt.Errorf("process %d: the breaker of shard %s is %s, %v after the last fault (%v): %s",
					i, shard.ID, shard.Breaker.State, 2*s.longest, time.Since(s.recorder.start)-2*s.longest, shard.Breaker.LastError))
			}
		}
	}
	// Nothing is carried any more, and no operation takes longer than its time-out.
	time.Sleep(s.timeout)
	s.recorder.Quiet()
}

// count compares the metrics with the history.
func (s *simulation) count(events []Event) {
	for i, p := range s.rings {
		if p.closed { // and its metrics gone
			continue
		}
		got, err := decisions(p.metrics)
		if err != nil {
			s.breaks(err)
			continue
		}
		if err := differ(got, counted(events, i)); err != nil {
			s.breaks(fmt.Errorf("process %d: %w", i, err))
		}
	}
}

func (s *simulation) close() {
	for i, p := range s.rings {
		if !p.closed {
			s.closeProcess(i, p)
		}
	}
	for _, server := range s.servers {
		server.close()
	}
}

func (s *simulation) closeProcess(number int, p *simProcess) {
	began := time.Now()
	if err := p.ring.Close(); err != nil {
		s.breaks(fmt.Errorf("process %d: Close: %w", number, err))
	}
	if took := time.Since(began); took > 2*time.Second {
		s.breaks(fmt.Errorf("process %d: Close took %v", number, took))
	}
	p.closed = true
}

func (s *simulation) breaks(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = append(s.broken, err)
}
