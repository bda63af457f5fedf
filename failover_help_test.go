package ringfence_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// quiet takes the log lines: outages are what these tests are about.
var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// pair is a primary and its replica, in step.
type pair struct{ primary, replica *redistest.Server }

func startPair(t *testing.T) pair {
	t.Helper()
	// With a transfer by file the first synchronisation takes a third of a second.
	p := redistest.Start(t, redistest.Options{Args: []string{"repl-diskless-sync no"}})
	r := redistest.Start(t, redistest.Options{ReplicaOf: p, Args: []string{"repl-diskless-sync no"}})
	s := pair{p, r}
	s.sync(t)
	return s
}

// sync waits until the replica has all that the primary has.
func (p pair) sync(t *testing.T) {
	t.Helper()
	must(t, p.replica.WaitInSync(t.Context()))
}

func (p pair) config() ringfence.ShardConfig {
	return ringfence.ShardConfig{ID: "a", Primary: p.primary.URL(), Replicas: []string{p.replica.URL()}}
}

func alone(s *redistest.Server) ringfence.ShardConfig {
	return ringfence.ShardConfig{ID: "a", Primary: s.URL()}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// open opens a ring and closes it, in time, when the test ends: every fault of this file
// is also a test of Close.
func open(t *testing.T, c ringfence.Config) *ringfence.Ring {
	t.Helper()
	if c.HashKey == nil {
		c.HashKey = []byte("0123456789abcdef")
	}
	if c.Logger == nil {
		c.Logger = quiet
	}
	if c.Instances == 0 { // tests open further rings to prepare a fault
		c.Instances = 1
	}
	redistest.NoLeaks(t)
	ring, err := ringfence.Open(t.Context(), c)
	must(t, err)
	t.Cleanup(func() { closeInTime(t, ring) })
	return ring
}

func closeInTime(t *testing.T, ring *ringfence.Ring) {
	t.Helper()
	start := time.Now()
	_ = ring.Close() // a cut connection may say so
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("Close took %s, want at most 2s", took)
	}
}

func limiter(t *testing.T, ring *ringfence.Ring, l ringfence.Limit) *ringfence.Limiter {
	t.Helper()
	lim, err := ring.Limiter("api", l)
	must(t, err)
	return lim
}

// eventually polls until ok, and returns how long that took.
func eventually(t *testing.T, within time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for tick := time.NewTicker(2 * time.Millisecond); ; <-tick.C {
		if ok() {
			tick.Stop()
			return time.Since(start)
		}
		if time.Since(start) > within {
			t.Fatalf("not within %s: %s", within, what)
		}
	}
}

// take has n units of a key charged, by a process that can wait: before the fault a busy
// machine must not be taken for one.
func take(t *testing.T, s ringfence.ShardConfig, limit ringfence.Limit, n int, keys ...string) {
	t.Helper()
	ring := open(t, ringfence.Config{Shards: []ringfence.ShardConfig{s}, Budget: 5 * time.Second, OperationTimeout: 5 * time.Second})
	l := limiter(t, ring, limit)
	for _, key := range keys {
		for range n {
			d, err := l.Allow(t.Context(), key)
			must(t, err)
			if !d.Allowed || d.Source != ringfence.SourcePrimary {
				t.Fatalf("before the fault: %+v", d)
			}
		}
	}
}

// exact says whether the primary decides, and fails the test on an error.
func exact(t *testing.T, l *ringfence.Limiter, key string) bool {
	t.Helper()
	d, err := l.Peek(t.Context(), key)
	must(t, err)
	return d.Source == ringfence.SourcePrimary
}

// answers counts what callers were told, as "allowed primary" or "denied replica
// breaker", and how long they waited.
type answers struct {
	t    *testing.T
	mu   sync.Mutex
	told map[string]int
	took []time.Duration
}

func newAnswers(t *testing.T) *answers {
	return &answers{t: t, told: map[string]int{}}
}

// allow makes one call. An error fails the test: no fault of Redis is a caller's error.
func (a *answers) allow(l *ringfence.Limiter, key string) ringfence.Decision {
	start := time.Now()
	d, err := l.Allow(context.Background(), key)
	took := time.Since(start)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.t.Errorf("Allow: %v; a fault must not be the caller's error", err)
	}
	a.told[describe(d)]++
	a.took = append(a.took, took)
	return d
}

func describe(d ringfence.Decision) string {
	verdict := "denied"
	if d.Allowed {
		verdict = "allowed"
	}
	return strings.TrimSpace(verdict + " " + d.Source.String() + " " + d.Cause.String())
}

// count adds up the answers whose description contains all words.
func (a *answers) count(words ...string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for told, times := range a.told {
		fits := true
		for _, w := range words {
			fits = fits && strings.Contains(" "+told+" ", " "+w+" ")
		}
		if fits {
			n += times
		}
	}
	return n
}

// quantiles returns the median, the 99th percentile and the longest wait.
func (a *answers) quantiles() (p50, p99, most time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return quantiles(a.took)
}

func quantiles(took []time.Duration) (p50, p99, most time.Duration) {
	if len(took) == 0 {
		return 0, 0, 0
	}
	sorted := slices.Sorted(slices.Values(took))
	return sorted[len(sorted)/2], sorted[len(sorted)*99/100], sorted[len(sorted)-1]
}

// String is one line for the log of the test.
func (a *answers) String() string {
	p50, p99, most := a.quantiles()
	a.mu.Lock()
	defer a.mu.Unlock()
	var parts []string
	for told, n := range a.told {
		parts = append(parts, fmt.Sprintf("%s %d", told, n))
	}
	slices.Sort(parts)
	return fmt.Sprintf("%d calls, p50 %s p99 %s max %s; %s", len(a.took), p50, p99, most, strings.Join(parts, ", "))
}

// machine measures how late this machine itself is with a timer of a millisecond, while
// a test measures calls: on two cores shared with others that is the larger part. What
// the tests add to a bound is this and nothing else.
type machine struct {
	stop func()
	late []time.Duration
}

func watchMachine() *machine {
	m := &machine{}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		timer := time.NewTimer(0)
		defer timer.Stop()
		for {
			start := time.Now()
			timer.Reset(time.Millisecond)
			select {
			case <-timer.C:
				m.late = append(m.late, time.Since(start)-time.Millisecond)
			case <-stop:
				return
			}
		}
	}()
	m.stop = sync.OnceFunc(func() { close(stop); <-stopped })
	return m
}

// slack is what to add to a bound: three times the worst lateness, since a call is two
// goroutines and a timer, and 10 ms.
func (m *machine) slack() time.Duration {
	m.stop()
	_, _, most := quantiles(m.late)
	return 3*most + 10*time.Millisecond
}

func (m *machine) p99() time.Duration {
	m.stop()
	_, p99, _ := quantiles(m.late)
	return p99
}

// pace calls f n times from some callers, one call every interval over all of them, and
// returns when all have ended.
func pace(n, callers int, every time.Duration, f func(i int)) {
	var next atomic.Int64
	start := time.Now()
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if wait := time.Until(start.Add(time.Duration(i) * every)); wait > 0 {
					time.Sleep(wait) // the pace is the load, not a hope
				}
				f(i)
			}
		})
	}
	wg.Wait()
}

// dials counts the connections opened to each address.
type dials struct {
	mu sync.Mutex
	to map[string]int
}

func (d *dials) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d.mu.Lock()
	if d.to == nil {
		d.to = map[string]int{}
	}
	d.to[addr]++
	d.mu.Unlock()
	var dialer net.Dialer
	return dialer.DialContext(ctx, network, addr)
}

func (d *dials) count(addr string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.to[addr]
}

// metric adds up the samples of a metric.
func metric(t *testing.T, g prometheus.Gatherer, name string) float64 {
	t.Helper()
	families, err := g.Gather()
	must(t, err)
	sum := 0.0
	for _, f := range families {
		if f.GetName() != "ratelimiter_"+name {
			continue
		}
		for _, m := range f.GetMetric() {
			sum += m.GetCounter().GetValue()
		}
	}
	return sum
}

// used is how many units the log of "user" holds on a server.
func used(t *testing.T, s *redistest.Server, l *ringfence.Limiter) int {
	t.Helper()
	_, name := l.Locate("user")
	n, err := s.Client().ZCard(t.Context(), name).Result()
	must(t, err)
	return int(n)
}
