package ringfence

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence/internal/redistest"
)

// leanRing is a ring of one shard behind a proxy.
func leanRing(t *testing.T, change func(c *Config)) (*Ring, *Limiter, *redistest.Server, *redistest.Proxy) {
	t.Helper()
	s := redistest.Start(t, redistest.Options{})
	p, err := redistest.NewProxy(s.Addr())
	aclMust(t, err)
	t.Cleanup(p.Close)
	c := Config{
		Shards: []ShardConfig{{ID: "a", Primary: "redis://" + p.Addr()}}, HashKey: []byte("0123456789abcdef"),
		Logger: (&sink{}).logger(), Budget: 20 * time.Second, OperationTimeout: 20 * time.Second, Policy: PolicyClosed,
	}
	if change != nil {
		change(&c)
	}
	r, err := Open(t.Context(), c)
	aclMust(t, err)
	t.Cleanup(func() { aclMust(t, r.Close()) })
	l, err := r.Limiter("l", SlidingLog{Limit: 1000, Window: time.Hour})
	aclMust(t, err)
	d, err := l.Allow(t.Context(), "warm") // makes the connection
	if err != nil || d.Source != SourcePrimary {
		t.Fatalf("%+v, %v", d, err)
	}
	return r, l, s, p
}

// waitFor waits until something is so.
func waitFor(t *testing.T, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !so(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it does not happen that %s", what)
		}
	}
}

func (r *Ring) leanForTest() *direct { return r.members[0].shard.charges.direct() }

// A caller who carries its own operation leaves when its budget is spent; the operation
// goes on, its reply is read, and its connection serves the next.
func TestACallerWhoCarriesItsOperationLeavesInTimeAndTheReplyIsReadAllTheSame(t *testing.T) {
	r, l, s, p := leanRing(t, nil)
	hurried, err := r.Limiter("hurried", SlidingLog{Limit: 1000, Window: time.Hour}, WithBudget(50*time.Millisecond))
	aclMust(t, err)
	n := r.leanForTest()
	for _, c := range []struct {
		name string
		l    *Limiter
		call func() (Decision, error)
		want error
	}{
		{"its budget is spent", hurried, func() (Decision, error) { return hurried.Allow(t.Context(), "k") }, nil},
		{"its context is canceled", l, func() (Decision, error) {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(20*time.Millisecond, cancel)
			return l.Allow(ctx, "k")
		}, context.Canceled},
	} {
		t.Run(c.name, func(t *testing.T) {
			waitFor(t, "nothing is in flight", func() bool { return r.Stats()[0].InFlight == 0 })
			all, _ := n.wires.counts()
			p.SetDelay(500 * time.Millisecond)
			start := time.Now()
			d, err := c.call()
			took := time.Since(start)
			p.SetDelay(0)
			if !errors.Is(err, c.want) || (err == nil && d.Cause != CauseBudget) {
				t.Fatalf("%+v, %v", d, err)
			}
			if took > 400*time.Millisecond {
				t.Errorf("it took %s", took)
			}
			if got := r.Stats()[0].InFlight; got != 1 {
				t.Errorf("%d operations in flight, want the one that was left", got)
			}
			waitFor(t, "the operation ends", func() bool { return r.Stats()[0].InFlight == 0 })
			if now, idle := n.wires.counts(); now != all || idle != all {
				t.Errorf("%d connections, %d idle; want %d of both", now, idle, all)
			}
			_, name := c.l.Locate("k")
			if n := s.Client().ZCard(t.Context(), name).Val(); n != 1 {
				t.Errorf("charged %d times: it was on its way, once", n)
			}
		})
	}
}

// The others in a batch whose carrier leaves are answered when the reply comes.
func TestWhoIsCarriedByACallerWhoLeavesIsAnswered(t *testing.T) {
	r, l, _, p := leanRing(t, func(c *Config) { c.InFlight = 1 })
	hurried, err := r.Limiter("hurried", SlidingLog{Limit: 1000, Window: time.Hour}, WithBudget(100*time.Millisecond))
	aclMust(t, err)
	p.SetDelay(300 * time.Millisecond)
	d := r.members[0].shard.charges
	var callers sync.WaitGroup
	// Two that wait in the queue while a slot is taken; then the hurried one carries all.
	waitFor(t, "the slot is free", func() bool { return d.busy.Load() == 0 })
	s := d.acquire()
	for range 2 {
		callers.Go(func() {
			if d, err := l.Allow(t.Context(), "k"); err != nil || d.Source != SourcePrimary {
				t.Errorf("carried: %+v, %v", d, err)
			}
		})
	}
	waitFor(t, "both wait", func() bool { return d.waiting.Load() == 2 })
	s.taken.Store(false)
	d.busy.Add(-1)
	d.gate.leave()
	start := time.Now()
	got, err := hurried.Allow(t.Context(), "k")
	if err != nil || got.Cause != CauseBudget {
		t.Errorf("the carrier: %+v, %v", got, err)
	}
	if took := time.Since(start); took > 290*time.Millisecond {
		t.Errorf("it took %s", took)
	}
	callers.Wait()
}

// A broken connection fails the operation on it, as of unknown fate, and no other's.
func TestABrokenConnectionFailsItsOperationAlone(t *testing.T) {
	registry := prometheus.NewRegistry()
	r, l, s, p := leanRing(t, func(c *Config) { c.Registerer, c.MaxBatch = registry, 1 })
	n := r.leanForTest()
	var ok, failed atomic.Int64
	var callers sync.WaitGroup
	waitFor(t, "there are three connections", func() bool {
		for range 3 {
			callers.Go(func() { _, _ = l.Allow(t.Context(), "other") })
		}
		callers.Wait()
		all, idle := n.wires.counts()
		return all >= 3 && idle == all
	})
	p.SetDelay(2 * time.Second) // of replies, under way meanwhile
	for range 3 {
		callers.Go(func() {
			d, err := l.Allow(t.Context(), "k")
			aclMust(t, err)
			if d.Source == SourcePrimary {
				ok.Add(1)
			} else if d.Cause == CauseError {
				failed.Add(1)
			}
		})
	}
	waitFor(t, "three operations are in flight", func() bool { return r.Stats()[0].InFlight == 3 })
	waitFor(t, "all are charged", func() bool {
		_, name := l.Locate("k")
		return s.Client().ZCard(t.Context(), name).Val() == 3
	})
	n.wires.mu.Lock()
	for w := range n.wires.all {
		if !slices.Contains(n.wires.idle, w) {
			_ = w.conn.Close()
			break
		}
	}
	n.wires.mu.Unlock()
	callers.Wait()
	p.SetDelay(0)
	if ok.Load() != 2 || failed.Load() != 1 {
		t.Errorf("%d answered, %d failed; want 2 and 1", ok.Load(), failed.Load())
	}
	text := exposition(t, registry)
	if line := `ratelimiter_unknown_charges_total{shard_id="a"} 1` + "\n"; !strings.Contains(text, line) {
		t.Errorf("want %q", line)
	}
	_, name := l.Locate("k")
	if got := s.Client().ZCard(t.Context(), name).Val(); got != 3 {
		t.Errorf("%d charges of 3 calls", got)
	}
}

// Whose callers leave while the connection is being made is not sent.
func TestWhoLeavesWhileTheConnectionIsMadeIsNotSent(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	held := make(chan struct{})
	var hold atomic.Bool
	r, err := Open(t.Context(), Config{
		Shards: []ShardConfig{{ID: "a", Primary: s.URL()}}, HashKey: []byte("0123456789abcdef"),
		Logger: (&sink{}).logger(), Policy: PolicyClosed, Budget: 30 * time.Millisecond, OperationTimeout: 20 * time.Second,
		InFlight: 1,
		Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if hold.Load() {
				<-held
			}
			return new(net.Dialer).DialContext(ctx, network, addr)
		},
	})
	aclMust(t, err)
	t.Cleanup(func() { aclMust(t, r.Close()) })
	l, err := r.Limiter("l", TokenBucket{Rate: 1, Per: time.Hour, Burst: 5})
	aclMust(t, err)
	patient, err := r.Limiter("p", TokenBucket{Rate: 1, Per: time.Hour, Burst: 5}, WithBudget(20*time.Second))
	aclMust(t, err)
	hold.Store(true)
	for range 3 {
		if d, err := l.Allow(t.Context(), "k"); err != nil || d.Source == SourcePrimary {
			t.Errorf("%+v, %v", d, err)
		}
	}
	var callers sync.WaitGroup
	callers.Go(func() {
		if d, err := patient.Allow(t.Context(), "k"); err != nil || d.Source != SourcePrimary || d.Remaining != 4 {
			t.Errorf("who waited: %+v, %v", d, err)
		}
	})
	waitFor(t, "the patient one waits", func() bool { return r.members[0].shard.charges.waiting.Load() == 1 })
	hold.Store(false)
	close(held)
	callers.Wait()
	waitFor(t, "nothing is in flight", func() bool { return r.Stats()[0].InFlight == 0 })
	_, name := l.Locate("k")
	if n := s.Client().Exists(t.Context(), name).Val(); n != 0 {
		t.Error("a call whose caller had left before anything was sent was charged")
	}
}

// Idle connections that a restart of the server closed are noticed before they are used:
// nothing is of unknown fate.
func TestConnectionsThatTheServerClosedAreNotUsed(t *testing.T) {
	registry := prometheus.NewRegistry()
	s := redistest.Start(t, redistest.Options{})
	r, err := Open(t.Context(), Config{
		Shards: []ShardConfig{{ID: "a", Primary: s.URL()}}, HashKey: []byte("0123456789abcdef"), Registerer: registry,
		Logger: (&sink{}).logger(), Budget: 20 * time.Second, OperationTimeout: 20 * time.Second,
	})
	aclMust(t, err)
	t.Cleanup(func() { aclMust(t, r.Close()) })
	l, err := r.Limiter("l", TokenBucket{Rate: 1, Per: time.Hour, Burst: 50})
	aclMust(t, err)
	for range 3 {
		if d, err := l.Allow(t.Context(), "k"); err != nil || d.Source != SourcePrimary {
			t.Fatalf("%+v, %v", d, err)
		}
		s.Kill()
		aclMust(t, s.Restart(t.Context()))
		time.Sleep(2 * sureOf) // a connection that was used just now is taken to be well
	}
	if text := exposition(t, registry); !strings.Contains(text, `ratelimiter_unknown_charges_total{shard_id="a"} 0`+"\n") {
		t.Error("a charge is of unknown fate")
	}
}

// script is a server that says what it is told to, once for each command.
func scriptedServer(t *testing.T, say func(conn net.Conn, words string)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	aclMust(t, err)
	var conns sync.WaitGroup
	t.Cleanup(func() { _ = ln.Close(); conns.Wait() })
	conns.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer conn.Close()
				b := make([]byte, 64<<10)
				for {
					n, err := conn.Read(b)
					if err != nil {
						return
					}
					say(conn, string(b[:n]))
				}
			})
		}
	})
	return ln.Addr().String()
}

func TestTheGreetingSaysWhoWeAreAndFailsAsWhatItIs(t *testing.T) {
	const ok = "+OK\r\n"
	tests := []struct {
		name       string
		user, pass string
		db         int
		says       map[string]string // by the command's first word
		want       *errorType        // nil: connected
		heard      string
	}{
		{"plain", "", "", 0, map[string]string{"hello": "*2\r\n$6\r\nserver\r\n$5\r\nredis\r\n"}, nil, "hello 2"},
		{"user, password, database", "u", "p w", 3, map[string]string{"hello": "*0\r\n", "select": ok}, nil, "hello 2 auth u p w, select 3"},
		{"a password alone", "", "x", 0, map[string]string{"hello": "*0\r\n"}, nil, "hello 2 auth default x"},
		{"no HELLO", "u", "p", 1, map[string]string{"hello": "-ERR unknown command 'hello'\r\n", "auth": ok, "select": ok}, nil, "hello 2 auth u p, auth u p, select 1"},
		{"no HELLO and no user", "", "p", 0, map[string]string{"hello": "-ERR unknown command 'hello'\r\n", "auth": ok}, nil, "hello 2 auth default p, auth p"},
		{"no password given", "", "", 0, map[string]string{"hello": "-NOAUTH HELLO must be called ...\r\n"}, typeAuth, "hello 2"},
		{"a wrong one", "u", "p", 0, map[string]string{"hello": "-WRONGPASS invalid\r\n"}, typeAuth, "hello 2 auth u p"},
		{"no permission to select", "", "", 2, map[string]string{"hello": "*0\r\n", "select": "-NOPERM no\r\n"}, typeNoPerm, "hello 2, select 2"},
		{"loading", "", "", 0, map[string]string{"hello": "-LOADING Redis is loading the dataset in memory\r\n"}, typeLoading, "hello 2"},
		{"too many clients", "", "", 0, map[string]string{"hello": "-ERR max number of clients reached\r\n"}, typeDial, "hello 2"},
		{"no Redis", "", "", 0, map[string]string{"hello": "HTTP/1.1 400 Bad Request\r\n\r\n"}, typeProtocol, "hello 2"},
		{"two replies", "", "", 0, map[string]string{"hello": "+OK\r\n+OK\r\n"}, typeProtocol, "hello 2"},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			var mu sync.Mutex
			var heard []string
			addr := scriptedServer(t, func(conn net.Conn, text string) {
				var words []string
				for i, line := range strings.Split(text, "\r\n") {
					if i > 0 && i%2 == 0 {
						words = append(words, line)
					}
				}
				mu.Lock()
				heard = append(heard, strings.TrimSpace(strings.Join(words, " ")))
				mu.Unlock()
				_, _ = io.WriteString(conn, c.says[words[0]])
			})
			p := &wirePool{
				network: "tcp", address: addr, username: c.user, password: c.pass, db: c.db,
				dial: new(net.Dialer).DialContext, all: map[*wire]struct{}{},
			}
			defer p.close()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			w, err := p.connect(ctx)
			if (err == nil) != (c.want == nil) || (err != nil && classify(err) != c.want) || (err != nil) == (w != nil) {
				t.Errorf("%v, want an error of %+v", err, c.want)
			}
			if all, _ := p.counts(); (all == 1) != (c.want == nil) {
				t.Errorf("%d connections are kept", all)
			}
			mu.Lock()
			defer mu.Unlock()
			if got := strings.Join(heard, ", "); got != c.heard {
				t.Errorf("it heard %q, want %q", got, c.heard)
			}
		})
	}
}

// What is no reply, or stops halfway, fails the operation as of unknown fate and is the end
// of the connection; a server's own word is not.
func TestARepliesErrorsAreWhatTheyAreAndBreakWhatTheyMust(t *testing.T) {
	for _, c := range []struct {
		says  string
		hang  bool
		want  *errorType
		keeps bool
	}{
		{"*3\r\n:1\r\n:1\r\n:1\r\n", false, nil, true},
		{"*7\r\n", false, typeProtocol, false},
		{"*3\r\n:1\r\n:9\r\n:1\r\n", false, typeProtocol, false}, // nine of one granted
		{"*3\r\n:1\r\n", true, typeEOF, false},
		{"", true, typeEOF, false},
		{"*3\r\n:1\r\n", false, typeTimeout, false},
		{"-OOM command not allowed\r\n", false, typeOOM, true},
		{"-READONLY You can't write against a read only replica.\r\n", false, typeReadonly, false},
		{"-NOAUTH Authentication required.\r\n", false, typeAuth, false},
		{"-BUSY Redis is busy\r\n", false, typeBusy, true},
		{"-NOPERM this user has no permissions\r\n", false, typeNoPerm, true},
	} {
		t.Run(c.says, func(t *testing.T) {
			addr := scriptedServer(t, func(conn net.Conn, text string) {
				if strings.Contains(text, "hello") {
					_, _ = io.WriteString(conn, "*0\r\n")
					return
				}
				_, _ = io.WriteString(conn, c.says)
				if c.hang {
					_ = conn.Close()
				}
			})
			n, err := newLeanNode("redis://"+addr, nodeConfig{timeout: time.Second, poolSize: 1, loaded: func() {}}, false)
			aclMust(t, err)
			defer n.close()
			r := freshRequest().begin(opCharge, compiled(t, SlidingLog{Limit: 5, Window: time.Second}), keyHash{1, 2}, newKeySpace("rf"), 1)
			within := 10 * time.Second
			if c.want == typeTimeout {
				within = 100 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), within)
			defer cancel()
			err = n.charge(ctx, []*request{r})
			if (err == nil) != (c.want == nil) || (err != nil && classify(err) != c.want) {
				t.Errorf("%v, want an error of %+v", err, c.want)
			}
			if all, idle := n.wires.counts(); (all == 1) != c.keeps || all != idle {
				t.Errorf("%d connections, %d idle; kept: want %t", all, idle, c.keeps)
			}
		})
	}
}

// A server that lost its scripts gets the text once, and nothing is charged twice.
func TestALostScriptIsGivenAgain(t *testing.T) {
	_, l, s, _ := leanRing(t, nil)
	for i := range 3 {
		aclMust(t, s.Client().ScriptFlush(t.Context()).Err())
		if d, err := l.Allow(t.Context(), "k"); err != nil || d.Source != SourcePrimary || d.Remaining != int64(999-i) {
			t.Errorf("%+v, %v", d, err)
		}
	}
}

func TestTLSDoesNotSurviveAWriteThatStopsHalfway(t *testing.T) {
	near, far := net.Pipe() // nobody reads
	defer far.Close()
	for _, secure := range []bool{false, true} {
		w := &wire{conn: near, secure: secure, out: []byte("frame")}
		ended, err := w.goOn(&wireScripts{}, time.Now().Add(10*time.Millisecond))
		if ended != secure || classify(err) != typeTimeout {
			t.Errorf("TLS %t: ended %t, %v", secure, ended, err)
		}
	}
}

// mostScript is the longest that a script may run.
const mostScript = 5 * time.Millisecond

// timedNode is a server of which timeOf can tell how long it takes.
func timedNode(t *testing.T) (*redistest.Server, *leanNode) {
	t.Helper()
	s := redistest.Start(t, redistest.Options{})
	n, err := newLeanNode(s.URL(), nodeConfig{timeout: 10 * time.Second, poolSize: 1, loaded: func() {}}, false)
	aclMust(t, err)
	t.Cleanup(func() { _ = n.close() })
	aclMust(t, n.load(t.Context()))
	return s, n
}

// The heaviest operations there can be, on a real server. A busy machine makes each of
// them longer, and none of them shorter: the shortest of several runs is what counts.
func TestNoScriptRunsLongerThanItMay(t *testing.T) {
	s, n := timedNode(t)
	bucket := compiled(t, TokenBucket{Rate: 999_983, Per: time.Hour, Burst: 1_000_000})
	log := compiled(t, SlidingLog{Limit: MaxLogLimit, Window: time.Hour})
	short := compiled(t, SlidingLog{Limit: MaxLogLimit, Window: MinWindow})
	d := newDispatcher(dispatchConfig{inFlight: 1, maxBatch: 256, queue: 10_000, timeout: time.Second, budget: time.Second, clock: func() int64 { return 1 }})
	d.busy.Store(1) // nobody else serves its queue
	for which, c := range []struct {
		name  string
		rule  *rule
		cost  int64
		keys  uint64
		calls int
	}{
		{"buckets", bucket, 3, 256, 5000},
		{"logs of cost 1", log, 1, 256, 5000},
		{"one log, many calls", log, 1, 1, 5000},
		{"logs of cost 7", log, 7, 256, 5000},
		{"the dearest calls", log, MaxLogCost, 3, 3},
		{"a log that forgets as many", short, MaxLogCost, 1, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			least, carried := time.Hour, ""
			for range 8 {
				for i := range c.calls {
					aclMust(t, d.post(freshRequest().begin(opCharge, c.rule, keyHash{uint64(which), uint64(i) % c.keys}, newKeySpace("rf"), c.cost), d.clock(), 1<<62))
				}
				slot := &d.slots[0]
				d.gather(slot, nil)
				least = min(least, timeOf(t, s, n, slot.batch))
				for _, e := range slot.batch {
					if e.status != statusDecided || e.granted != e.count {
						t.Fatalf("status %d, %d granted of %d", e.status, e.granted, e.count)
					}
				}
				entries, calls := len(slot.batch), slot.calls
				d.answer(slot, nil)
				d.drain()
				carried = fmt.Sprintf("%d calls in %d entries", calls, entries)
			}
			t.Logf("%s: %s", carried, least)
			if least > mostScript {
				t.Errorf("it takes %s, want at most %s", least, mostScript)
			}
		})
	}
}

// A lease of a log adds as many units as a call may, and returns as many.
func TestNoLeaseHoldsAScriptForLongerThanItMay(t *testing.T) {
	s, n := timedNode(t)
	_, l := patientRing(t, SlidingLog{Limit: MaxLogLimit, Window: time.Hour}, Lease{Max: MaxLogCost})
	for _, cost := range []int64{1, 7, MaxLogCost} {
		h := keyHash{1, uint64(cost)}
		k := l.ring.leases.key(l.lease, h, l.ring.clock())
		held, score, least := grantWord(MaxLogCost), int64(0), time.Hour
		for run := range 8 {
			r := freshRequest().begin(opCharge, l.rule, h, newKeySpace("rf"), cost)
			if run > 0 {
				l.lease.back(r, lent{key: k, word: held}, score)
			}
			l.lease.want(r, k, MaxLogCost, 1)
			took := timeOf(t, s, n, alone(r))
			if r.granted != 1+r.wants || cost*(1+r.wants) > MaxLogCost {
				t.Fatalf("cost %d: %d granted of 1 and %d ahead", cost, r.granted, r.wants)
			}
			if r.wants > 0 {
				score = r.state.b
			} else { // what is returned next
				q := freshRequest().begin(opCharge, l.rule, h, newKeySpace("rf"), 1)
				l.lease.want(q, k, MaxLogCost, 1)
				aclMust(t, n.charge(t.Context(), alone(q)))
				score = q.state.b
			}
			if run > 0 {
				least = min(least, took)
			}
		}
		t.Logf("cost %d: %s", cost, least)
		if least > mostScript {
			t.Errorf("cost %d: it takes %s, want at most %s", cost, least, mostScript)
		}
	}
}

// alone is a batch of one request.
func alone(r *request) []*request {
	g := newGrouper(1)
	g.reset()
	return g.add(nil, r)
}

// timeOf is how long the server takes for one script call.
func timeOf(t *testing.T, s *redistest.Server, n *leanNode, batch []*request) time.Duration {
	t.Helper()
	aclMust(t, s.Client().ConfigResetStat(t.Context()).Err())
	aclMust(t, n.charge(t.Context(), batch))
	stats := s.Client().Info(t.Context(), "commandstats").Val()
	_, usec, _ := strings.Cut(stats, "cmdstat_evalsha:calls=1,usec=")
	usec, _, _ = strings.Cut(usec, ",")
	us, err := strconv.Atoi(usec)
	aclMust(t, err)
	return time.Duration(us) * time.Microsecond
}
