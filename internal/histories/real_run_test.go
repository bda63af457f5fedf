package histories

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// realRun is some rings over real servers, called by clients while something happens to the
// first shard.
type realRun struct {
	t        *testing.T
	recorder *Recorder
	servers  []*redistest.Server // primaries, of shards a and b
	rings    []*simProcess
	clients  []redis.UniversalClient // given to the rings ready-made
	calls    atomic.Int64            // made so far

	mu     sync.Mutex
	broken []error
}

// realSetup says what a run differs in. The zero value is two plain servers, given by URL.
type realSetup struct {
	options  redistest.Options
	proxy    *redistest.Proxy // before shard a, or nil
	replica  *redistest.Server
	primary  *redistest.Server // shard a, started already; nil: one with options
	hook     redis.Hook        // of ready-made clients; nil: shards are given by URL
	retrying bool              // ready-made clients that repeat what fails
}

const (
	realProcesses = 3
	realCallers   = 3 // a process
	realCalls     = 250
	realLongest   = time.Second
	realBudget    = 50 * time.Millisecond
	realTimeout   = 250 * time.Millisecond
)

func startReal(t *testing.T, o realSetup) *realRun {
	t.Helper()
	a := o.primary
	if a == nil {
		a = redistest.Start(t, o.options)
	}
	r := &realRun{t: t, recorder: NewRecorder(), servers: []*redistest.Server{a, redistest.Start(t, redistest.Options{})}}
	shards := []ringfence.ShardConfig{{ID: "a"}, {ID: "b", Primary: r.servers[1].URL()}}
	addr := a.Addr()
	if o.proxy != nil {
		addr = o.proxy.Addr()
	}
	if o.replica != nil {
		shards[0].Replicas = []string{o.replica.URL()}
	}
	for i := range realProcesses {
		if o.hook == nil && !o.retrying {
			shards[0].Primary = "redis://" + addr
		} else {
			shards[0].Client = r.readyMade(addr, o)
		}
		p := &simProcess{metrics: prometheus.NewRegistry()}
		p.ring = openReal(t, shards, i, p.metrics)
		p.limiters = realLimiters(t, p.ring)
		r.rings = append(r.rings, p)
	}
	return r
}

// readyMade is a client as a user may have it.
func (r *realRun) readyMade(addr string, o realSetup) redis.UniversalClient {
	c := redis.NewClient(&redis.Options{
		Addr: addr, MaxRetries: map[bool]int{false: -1, true: 3}[o.retrying],
		// Repeated so soon that callers still wait: what they are told is exact then.
		MinRetryBackoff: time.Millisecond, MaxRetryBackoff: time.Millisecond,
		DialTimeout: realTimeout, ReadTimeout: realTimeout, WriteTimeout: realTimeout, PoolTimeout: realTimeout,
		DialerRetries: 1, DisableIdentity: true, PoolSize: 64,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	})
	if o.hook != nil {
		c.AddHook(o.hook)
	}
	r.t.Cleanup(func() { _ = c.Close() })
	r.clients = append(r.clients, c)
	return c
}

func openReal(t *testing.T, shards []ringfence.ShardConfig, number int, metrics *prometheus.Registry) *ringfence.Ring {
	t.Helper()
	ring, err := ringfence.Open(t.Context(), ringfence.Config{
		Shards: append([]ringfence.ShardConfig(nil), shards...), HashKey: []byte("sixteen bytes..."), /* not a secret */
		Instances: realProcesses, InstanceID: fmt.Sprint(number), Registerer: metrics,
		Budget: realBudget, OperationTimeout: realTimeout, Breaker: ringfence.BreakerConfig{MaxOpenPeriod: realLongest},
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ring.Close() })
	return ring
}

func realLimiters(t *testing.T, ring *ringfence.Ring) []*ringfence.Limiter {
	t.Helper()
	const limit = 500
	var out []*ringfence.Limiter
	for _, l := range []struct {
		name  string
		limit ringfence.Limit
	}{
		{"bucket", ringfence.TokenBucket{Rate: 1, Per: (year / limit).Truncate(time.Second), Burst: limit}},
		{"log", ringfence.SlidingLog{Limit: limit, Window: year}},
	} {
		limiter, err := ring.Limiter(l.name, l.limit)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, limiter)
	}
	return out
}

// keys are keys of both shards, more of them on the first.
func (r *realRun) keys() []string {
	var out []string
	var on [2]int
	for i := 0; len(out) < 4; i++ {
		k := fmt.Sprintf("key%d", i)
		shard, _ := r.rings[0].limiters[0].Locate(k)
		other, _ := r.rings[0].limiters[1].Locate(k)
		if n := strings.Index("ab", shard); shard == other && on[n] < 3-2*n {
			on[n]++
			out = append(out, k)
		}
	}
	return out
}

// play has all callers call, and does what is to happen after a third of their calls.
func (r *realRun) play(happen func()) {
	keys := r.keys()
	third := make(chan struct{})
	var once sync.Once
	var all sync.WaitGroup
	for i, p := range r.rings {
		for j := range realCallers {
			n := i*realCallers + j
			c := r.caller(i, n)
			draw := stream(uint64(n), 1)
			all.Go(func() {
				for range realCalls {
					r.callOnce(c, p, keys, draw)
					if r.calls.Add(1) > realProcesses*realCallers*realCalls/3 {
						once.Do(func() { close(third) })
					}
					time.Sleep(draw.between(0, 6*time.Millisecond)) // callers have other things to do
				}
			})
		}
	}
	<-third
	happen()
	all.Wait()
}

func (r *realRun) caller(process, client int) *Caller {
	return &Caller{
		Recorder: r.recorder, Process: process, Client: client,
		// Only who hangs is found here; how long calls take is measured elsewhere, on a
		// quiet machine, and exactly in the simulation.
		Budget: realBudget, Slack: 5 * time.Second,
		Broken: func(err error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.broken = append(r.broken, err)
		},
	}
}

func (r *realRun) callOnce(c *Caller, p *simProcess, keys []string, draw draws) {
	l := p.limiters[draw.IntN(2)]
	key := keys[draw.IntN(len(keys))]
	ctx := context.Background()
	switch n := draw.IntN(50); {
	case n == 0:
		c.Reset(ctx, l, key)
	case n < 8:
		c.Peek(ctx, l, key)
	case n < 12:
		c.AllowMany(ctx, l, []ringfence.Request{
			{Key: key, Cost: 1}, {Key: keys[draw.IntN(len(keys))], Cost: 1 + 2*draw.Int64N(2)}, {Key: key, Cost: 3},
		})
	default:
		c.AllowN(ctx, l, key, 1+2*draw.Int64N(2)) // two costs: more would only make the judge slow
	}
}

// recovered waits until every ring's every key is decided by a primary again.
func (r *realRun) recovered() {
	r.t.Helper()
	// Twice the longest open period, and what a busy machine takes.
	deadline := time.Now().Add(2*realLongest + 10*time.Second)
	for i, p := range r.rings {
		c := r.caller(i, 100+i)
		for _, l := range p.limiters {
			for _, k := range r.keys() {
				for c.AllowN(context.Background(), l, k, 1).Source != ringfence.SourcePrimary {
					if time.Now().After(deadline) {
						r.t.Fatalf("process %d: %s/%s is not decided by its primary again: %+v", i, l.Name(), k, p.ring.Stats())
					}
					time.Sleep(10 * time.Millisecond)
				}
			}
		}
	}
}

// finish compares the metrics, closes the rings, waits until the servers have done all they
// were sent, and looks at every key a last time. It returns what is wrong.
func (r *realRun) finish(current ...*redistest.Server) error {
	r.t.Helper()
	var errs []error
	for i, p := range r.rings {
		got, err := decisions(p.metrics)
		errs = append(errs, err, differ(got, counted(r.recorder.Events(), i)), p.ring.Close())
	}
	for _, c := range r.clients {
		errs = append(errs, c.Close())
	}
	if len(current) == 0 {
		current = r.servers
	}
	shards := make([]ringfence.ShardConfig, len(current))
	for i, s := range current {
		shards[i] = ringfence.ShardConfig{ID: string(rune('a' + i)), Primary: s.URL()}
		awaitAlone(r.t, s)
	}
	r.recorder.Quiet()
	last := openReal(r.t, shards, 0, prometheus.NewRegistry())
	for _, l := range realLimiters(r.t, last) {
		for _, k := range r.keys() {
			deadline := time.Now().Add(10 * time.Second)
			for r.caller(0, 200).Peek(r.t.Context(), l, k).Source != ringfence.SourcePrimary {
				if time.Now().After(deadline) {
					r.t.Fatalf("%s/%s is not decided by its primary", l.Name(), k)
				}
			}
		}
	}
	errs = append(errs, last.Close(), Check(r.recorder.Events()))
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(append(errs, r.broken...)...)
}

// awaitAlone waits until a server has no clients but ours, the test's, and so has done all
// that was sent to it: it reads what a connection carried before it sees that it is closed.
func awaitAlone(t *testing.T, s *redistest.Server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		list, err := s.Client().Do(ctx, "CLIENT", "LIST", "TYPE", "normal").Text()
		if err == nil && strings.Count(strings.TrimSpace(list), "\n")+1 <= 1 {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("the server still has clients: %v\n%s", err, list)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
