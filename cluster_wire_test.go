package ringfence

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence/internal/redistest"
)

// wiredCluster is a ring on a real cluster, seen from one of its masters.
type wiredCluster struct {
	*redistest.Cluster
	ring     *Ring
	limiter  *Limiter
	registry *prometheus.Registry

	from  *redistest.Server // the master
	shard *shard            // that it is
	node  *clusterNode
	keys  []string // of it, in different slots
	spare string   // one more
}

func startWired(t *testing.T, o redistest.ClusterOptions, change func(c *Config)) *wiredCluster {
	t.Helper()
	w := &wiredCluster{Cluster: redistest.StartCluster(t, o), registry: prometheus.NewRegistry()}
	redistest.NoLeaks(t)
	c := Config{
		Shards: []ShardConfig{{ID: "c", Primary: w.URL()}}, HashKey: []byte("0123456789abcdef"), Logger: (&sink{}).logger(),
		Budget: 20 * time.Second, OperationTimeout: 20 * time.Second, Policy: PolicyClosed, Strict: true, Registerer: w.registry,
		NearCacheKeys: -1,
	}
	if change != nil {
		change(&c)
	}
	var err error
	w.ring, err = Open(t.Context(), c)
	aclMust(t, err)
	t.Cleanup(func() { w.ring.Close() })
	w.limiter, err = w.ring.Limiter("l", SlidingLog{Limit: 20, Window: time.Hour})
	aclMust(t, err)
	w.from = w.Masters()[0]
	slots := map[int]bool{}
	for i := 0; len(w.keys) <= 40; i++ {
		key := fmt.Sprint("k", i)
		if slot := w.slot(key); w.MasterOf(slot) == w.from && !slots[slot] {
			slots[slot] = true
			w.keys = append(w.keys, key)
		}
	}
	w.keys, w.spare = w.keys[:40], w.keys[40]
	w.shard = w.ring.owner(w.limiter.keys.hash(w.keys[0]))
	w.node = w.shard.nodes[0].(*clusterNode)
	// Makes the connection, so that what follows finds one.
	if d, err := w.limiter.Allow(t.Context(), w.spare); err != nil || d.Source != SourcePrimary {
		t.Fatalf("%+v, %v", d, err)
	}
	return w
}

func (w *wiredCluster) name(key string) string {
	_, name := w.limiter.Locate(key)
	return name
}

func (w *wiredCluster) slot(key string) int { return slotOf(tagOf([]byte(w.name(key)))) }

// charges is how often a key was charged, on whichever master.
func (w *wiredCluster) charges(t *testing.T, key string) (n int64) {
	t.Helper()
	for _, s := range w.Masters() {
		for _, name := range s.Client().Keys(t.Context(), w.name(key)).Val() {
			// A slot on the move is at home where its keys are.
			held, err := s.Client().Eval(t.Context(), "return redis.call('ZCARD', KEYS[1])", []string{name}).Int64()
			if err != nil {
				pipe := s.Client().Pipeline()
				pipe.Do(t.Context(), "asking")
				card := pipe.ZCard(t.Context(), name)
				_, _ = pipe.Exec(t.Context())
				held = card.Val()
			}
			n += held
		}
	}
	return n
}

// allow charges each key once, in one operation, and wants the primary's word of each.
func (w *wiredCluster) allow(t *testing.T, what string, keys ...string) {
	t.Helper()
	reqs := make([]Request, len(keys))
	for i, k := range keys {
		reqs[i] = Request{Key: k, Cost: 1}
	}
	ds, err := w.limiter.AllowMany(t.Context(), reqs)
	aclMust(t, err)
	for i, d := range ds {
		if d.Source != SourcePrimary || !d.Allowed {
			t.Errorf("%s: %s: %+v", what, keys[i], d)
		}
	}
}

func (w *wiredCluster) charged(t *testing.T, what string, times int64, keys ...string) {
	t.Helper()
	for _, k := range keys {
		if n := w.charges(t, k); n != times {
			t.Errorf("%s: %s was charged %d times, want %d", what, k, n, times)
		}
	}
}

// setslot begins to move a slot to another master.
func (w *wiredCluster) setslot(t *testing.T, slot int, to *redistest.Server) {
	t.Helper()
	id := func(s *redistest.Server) string {
		id, err := s.Client().Do(t.Context(), "cluster", "myid").Text()
		aclMust(t, err)
		return id
	}
	aclMust(t, to.Client().Do(t.Context(), "cluster", "setslot", slot, "importing", id(w.from)).Err())
	aclMust(t, w.from.Client().Do(t.Context(), "cluster", "setslot", slot, "migrating", id(to)).Err())
}

func asked(t *testing.T, s *redistest.Server) bool {
	t.Helper()
	return strings.Contains(s.Client().Info(t.Context(), "commandstats").Val(), "cmdstat_asking:")
}

// Of the calls of one operation, those whose slot is on the move are followed, and all are
// charged once.
func TestACallWhoseSlotMovesIsFollowedAndTheOthersAreAnsweredWhereTheyAre(t *testing.T) {
	w := startWired(t, redistest.ClusterOptions{}, nil)
	to := w.Masters()[1]
	moving := w.keys[7]
	w.setslot(t, w.slot(moving), to)
	if asked(t, to) {
		t.Fatal("somebody has asked already")
	}
	w.allow(t, "on the move", w.keys...)
	if !asked(t, to) {
		t.Error("nobody went where the slot is moving to")
	}
	w.charged(t, "on the move", 1, w.keys...)
	// By a caller who carries it itself, too.
	if d, err := w.limiter.Allow(t.Context(), moving); err != nil || d.Source != SourcePrimary || d.Remaining != 18 {
		t.Errorf("alone: %+v, %v", d, err)
	}
	w.charged(t, "alone", 2, moving)
	if d, err := w.limiter.Peek(t.Context(), moving); err != nil || d.Source != SourcePrimary || d.Remaining != 18 {
		t.Errorf("a look: %+v, %v", d, err)
	}
	aclMust(t, w.limiter.Reset(t.Context(), moving))
	w.charged(t, "after Reset", 0, moving)
	w.allow(t, "after Reset", moving)

	// It has moved, and the ring does not know yet.
	var moves atomic.Int64
	k := w.node.of
	stale := k.slots.Load()
	w.node.say.moved = func() { moves.Add(1); k.refreshSoon() }
	aclMust(t, w.MoveSlot(t.Context(), w.slot(moving), to))
	k.slots.Store(stale)
	k.refreshed.Store(k.ring.clock() - int64(time.Second))
	w.allow(t, "moved", w.keys...)
	w.charged(t, "moved", 2, w.keys...)
	if moves.Load() != 1 {
		t.Errorf("the ring was told %d times that a slot has moved, want once", moves.Load())
	}
	waitFor(t, "the ring knows the new owner", func() bool { return w.ring.owner(w.limiter.keys.hash(moving)) != w.shard })
	w.allow(t, "known", w.keys...)
	w.charged(t, "known", 3, w.keys...)
	if all, _ := w.node.wires.counts(); all == 0 {
		t.Error("there are no connections of our own: this test shows nothing")
	}
}

// inTwoPlaces begins to move the slot of one of the keys, after a call of each, and returns
// another key of that slot, which is not here.
func (w *wiredCluster) inTwoPlaces(t *testing.T) (twin string, slot int, to *redistest.Server) {
	t.Helper()
	to, slot = w.Masters()[1], w.slot(w.keys[3])
	for i := 0; twin == ""; i++ {
		if key := fmt.Sprint("twin", i); w.slot(key) == slot {
			twin = key
		}
	}
	w.allow(t, "before", w.keys...)
	w.setslot(t, slot, to)
	return twin, slot, to
}

// Two keys of a slot of which one is here and one there: TRYAGAIN, until both are there.
func TestACallOfASlotInTwoPlacesIsAnsweredWhenItIsInOne(t *testing.T) {
	w := startWired(t, redistest.ClusterOptions{}, nil)
	twin, slot, to := w.inTwoPlaces(t)
	var callers sync.WaitGroup
	callers.Go(func() { w.allow(t, "in two places", append([]string{twin}, w.keys...)...) })
	waitFor(t, "the others are charged", func() bool { return w.charges(t, w.keys[4]) == 2 })
	if n := w.charges(t, w.keys[3]) + w.charges(t, twin); n != 1 {
		t.Errorf("%d charges in a slot that is in two places, want the one from before", n)
	}
	aclMust(t, w.MoveSlot(t.Context(), slot, to))
	callers.Wait()
	w.charged(t, "in one place", 2, w.keys...)
	w.charged(t, "in one place", 1, twin)
}

// Those whose calls the master has answered do not wait for one that is followed, be it for
// longer than their budget.
func TestNobodyWaitsForTheCallsOfOthersThatAreFollowed(t *testing.T) {
	w := startWired(t, redistest.ClusterOptions{}, func(c *Config) { c.Budget, c.OperationTimeout = time.Second, 5*time.Second })
	twin, slot, _ := w.inTwoPlaces(t)
	reqs := []Request{{Key: twin, Cost: 1}}
	for _, key := range w.keys {
		reqs = append(reqs, Request{Key: key, Cost: 1})
	}
	out, err := w.limiter.AllowMany(t.Context(), reqs)
	aclMust(t, err)
	for i, d := range out {
		moves := w.slot(reqs[i].Key) == slot
		if d.Source == SourcePrimary == moves {
			t.Errorf("entry %d, its slot in two places %t: %+v", i, moves, d)
		}
	}
	// The operation is under way still; the server is not to blame for that.
	if d, err := w.limiter.Allow(t.Context(), w.keys[4]); err != nil || d.Source != SourcePrimary {
		t.Errorf("the next call: %+v, %v", d, err)
	}
}

// One master that lost its scripts gets the text once, and each call is charged once.
func TestAMasterThatLostItsScriptsGetsThemOnceForAllCalls(t *testing.T) {
	w := startWired(t, redistest.ClusterOptions{}, nil)
	loaded := func(n int) bool {
		return strings.Contains(exposition(t, w.registry), fmt.Sprintf(`ratelimiter_script_loads_total{shard_id="%s"} %d`+"\n", w.shard.id, n))
	}
	const first = 4 // both scripts, for the master and for who looks on replicas
	if !loaded(first) {
		t.Fatalf("not %d scripts loaded at first", first)
	}
	for round := range 3 {
		aclMust(t, w.from.Client().ScriptFlush(t.Context()).Err())
		w.allow(t, "without scripts", w.keys...)
		w.charged(t, "without scripts", int64(round+1), w.keys...)
		if !loaded(first + round + 1) {
			t.Errorf("not one more script loaded, the %d. time", round+1)
		}
	}
}

// cutter is a dialer whose connections end when so many bytes of replies to an EVALSHA have
// arrived, once it is told to.
type cutter struct{ after atomic.Int64 }

type cutConn struct {
	net.Conn
	of   *cutter
	left int64 // 0: as many as come
}

func (c *cutter) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return &cutConn{Conn: conn, of: c}, nil
}

func (c *cutConn) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte("evalsha")) {
		c.left = c.of.after.Swap(0)
	}
	return c.Conn.Write(b)
}

func (c *cutConn) Read(b []byte) (int, error) {
	if c.left == 0 {
		return c.Conn.Read(b)
	}
	n, err := c.Conn.Read(b[:min(int64(len(b)), c.left)])
	if c.left -= int64(n); c.left == 0 {
		_ = c.Conn.Close()
	}
	return n, err
}

// Those whose reply arrived before the connection broke have their answer; the others are of
// unknown fate, and nobody is charged again.
func TestAConnectionThatBreaksBetweenRepliesFailsThoseThatHaveNone(t *testing.T) {
	c := &cutter{}
	w := startWired(t, redistest.ClusterOptions{}, func(conf *Config) {
		conf.Dialer, conf.Instances = c.dial, 1_000_000 // nobody has a share
	})
	reqs := make([]Request, len(w.keys))
	for i, k := range w.keys {
		reqs[i] = Request{Key: k, Cost: 1}
	}
	unknown := 0
	for round, bytes := range []int64{1, 150, 700, 1200} {
		c.after.Store(bytes)
		ds, err := w.limiter.AllowMany(t.Context(), reqs)
		aclMust(t, err)
		answered := 0
		for i, d := range ds {
			switch {
			case d.Source == SourcePrimary && d.Allowed && d.Remaining == int64(19-round):
				answered++
			case d.Source != SourcePrimary && d.Cause == CauseError && !d.Allowed:
				unknown++
			default:
				t.Errorf("after %d bytes: %s: %+v", bytes, w.keys[i], d)
			}
		}
		// A reply here has 56 bytes: see one of them in TestEveryCallOfAnOperation....
		if bytes == 1 != (answered == 0) || answered == len(reqs) || (bytes == 150 && answered < 2) || (bytes == 1200 && answered < 15) {
			t.Errorf("after %d bytes %d of %d are answered", bytes, answered, len(reqs))
		}
		w.charged(t, fmt.Sprintf("after %d bytes", bytes), int64(round+1), w.keys...)
		text := exposition(t, w.registry)
		for _, line := range []string{
			fmt.Sprintf(`ratelimiter_unknown_charges_total{shard_id="%s"} %d`+"\n", w.shard.id, unknown),
			fmt.Sprintf(`ratelimiter_redis_errors_total{error_type="eof",shard_id="%s"} %d`+"\n", w.shard.id, round+1),
		} {
			if !strings.Contains(text, line) {
				t.Errorf("after %d bytes: want %q", bytes, line)
			}
		}
		if st := w.shard.breaker.stats(); st.State != BreakerClosed || st.Failures != uint64(round+1) {
			t.Errorf("after %d bytes: the breaker counts %+v, want a failure each", bytes, st)
		}
		w.allow(t, "in between", w.spare)
	}
}

// A replica that takes over in a planned way is where the connections go from then on.
func TestConnectionsFollowTheMasterToAnotherAddress(t *testing.T) {
	w := startWired(t, redistest.ClusterOptions{ReplicasPer: 1, NodeTimeout: 5 * time.Second}, nil)
	w.allow(t, "before", w.keys...)
	next := w.ReplicaOf(w.from)
	waitFor(t, "the cluster names the replica", func() bool { // it does once that has heard something
		aclMust(t, w.node.of.refresh(t.Context()))
		w.node.of.mu.Lock()
		defer w.node.of.mu.Unlock()
		return len(w.node.of.servers[w.node.shard]) == 2
	})
	addresses := func() map[string]int {
		out := map[string]int{}
		w.node.wires.mu.Lock()
		defer w.node.wires.mu.Unlock()
		for c := range w.node.wires.all {
			out[c.conn.RemoteAddr().String()]++
		}
		return out
	}
	if got := addresses(); got[w.from.Addr()] == 0 || len(got) != 1 {
		t.Errorf("connections to %v, want all to %s", got, w.from.Addr())
	}
	slot := w.slot(w.keys[0])
	waitFor(t, "the replica has taken over", func() bool {
		_ = next.Client().Do(t.Context(), "cluster", "failover").Err() // refused as long as it is not in sync
		return w.MasterOf(slot) == next
	})
	aclMust(t, w.WaitReady(t.Context()))
	w.allow(t, "after", w.keys...)
	w.charged(t, "after", 2, w.keys...)
	waitFor(t, "the ring knows where the master is", func() bool {
		w.node.wires.mu.Lock()
		defer w.node.wires.mu.Unlock()
		return w.node.wires.address == next.Addr()
	})
	w.allow(t, "with the new address", w.keys...)
	w.charged(t, "with the new address", 3, w.keys...)
	if got := addresses(); got[next.Addr()] == 0 || len(got) != 1 {
		t.Errorf("connections to %v, want all to %s", got, next.Addr())
	}
	if after := w.ring.owner(w.limiter.keys.hash(w.keys[0])); after != w.shard {
		t.Errorf("the key is on %s now, want %s still", after.id, w.shard.id)
	}
}

// terminator speaks TLS for servers that do not.
func terminator(t *testing.T, conf *tls.Config) dialer {
	t.Helper()
	var conns sync.WaitGroup
	t.Cleanup(conns.Wait)
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		server, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		near, far, err := tcpPair() // a net.Pipe has no buffer, and both ends may write at once
		if err != nil {
			_ = server.Close()
			return nil, err
		}
		secure := tls.Server(far, conf)
		conns.Go(func() { _, _ = io.Copy(server, secure); _ = server.Close() })
		conns.Go(func() { _, _ = io.Copy(secure, server); _ = far.Close() })
		return near, nil
	}
}

// tcpPair are both ends of one connection.
func tcpPair() (near, far net.Conn, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	if near, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		return nil, nil, err
	}
	if far, err = ln.Accept(); err != nil {
		_ = near.Close()
	}
	return near, far, err
}

// A cluster over TLS whose nodes want a password, through a dialer of the user's: each node's
// certificate is checked against the address it was dialed at.
func TestAClusterOverTLSWithAPassword(t *testing.T) {
	a := newAuthority(t)
	for _, c := range []struct {
		name string
		ips  []net.IP
		ok   bool
	}{{"good", loopback, true}, {"stray", []net.IP{net.IPv4(127, 0, 0, 9)}, false}} {
		t.Run(c.name, func(t *testing.T) {
			a.server(t, c.name, x509.Certificate{IPAddresses: c.ips})
			cert, err := tls.LoadX509KeyPair(a.path(c.name+".crt"), a.path(c.name+".key"))
			aclMust(t, err)
			dial := terminator(t, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12})
			cluster := redistest.StartCluster(t, redistest.ClusterOptions{Args: []string{"user u on >p ~* &* +@all"}})
			ring, err := Open(t.Context(), Config{
				Shards: []ShardConfig{{
					ID: "c", Primary: "rediss+cluster://u:p@" + strings.TrimPrefix(cluster.URL(), "redis+cluster://"),
					TLS: &tls.Config{RootCAs: a.roots()},
				}},
				HashKey: []byte("0123456789abcdef"), Logger: (&sink{}).logger(), Dialer: dial,
				Budget: 10 * time.Second, OperationTimeout: 10 * time.Second, Policy: PolicyClosed, NearCacheKeys: -1,
			})
			aclMust(t, err)
			defer ring.Close()
			l, err := ring.Limiter("l", TokenBucket{Rate: 1, Per: time.Hour, Burst: 2})
			aclMust(t, err)
			for i := range 20 {
				for n := range 3 {
					d, err := l.Allow(t.Context(), fmt.Sprint(i))
					aclMust(t, err)
					if (d.Source == SourcePrimary) != c.ok || d.Allowed != (c.ok && n < 2) {
						t.Fatalf("%+v", d)
					}
				}
				if !c.ok {
					return
				}
			}
			for _, s := range *ring.members[0].cluster.list.Load() {
				n := s.nodes[0].(*clusterNode)
				n.wires.mu.Lock()
				for w := range n.wires.all {
					if !w.secure {
						t.Error("a connection without TLS")
					}
				}
				if len(n.wires.all) == 0 {
					t.Errorf("shard %s has no connection of its own", s.id)
				}
				n.wires.mu.Unlock()
			}
		})
	}
}

// Many callers of many keys, on all masters, while slots move: every limit is exact.
func TestManyCallersOfAClusterGetExactlyTheLimit(t *testing.T) {
	w := startWired(t, redistest.ClusterOptions{}, nil)
	bucket, err := w.ring.Limiter("b", TokenBucket{Rate: 1, Per: time.Hour, Burst: 20})
	aclMust(t, err)
	for _, l := range []*Limiter{w.limiter, bucket} {
		const keys, callers = 60, 64
		var admitted [keys]atomic.Int64
		var all, mover sync.WaitGroup
		stop := make(chan struct{})
		mover.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				_, name := l.Locate(fmt.Sprint(i % keys))
				if err := w.MoveSlot(t.Context(), slotOf(tagOf([]byte(name))), w.Masters()[i%3]); err != nil {
					t.Errorf("moving: %v", err)
				}
			}
		})
		for c := range callers {
			all.Go(func() {
				for i := range keys {
					k := (i*7 + c) % keys
					d, err := l.Allow(t.Context(), fmt.Sprint(k))
					if err != nil || d.Source != SourcePrimary {
						t.Errorf("%+v, %v", d, err)
						return
					}
					if d.Allowed {
						admitted[k].Add(1)
					}
				}
			})
		}
		all.Wait()
		close(stop)
		mover.Wait()
		for k := range keys {
			if n := admitted[k].Load(); n != 20 {
				t.Errorf("%s: key %d: %d admitted, want 20", l.limit, k, n)
			}
		}
	}
}

// What decisions on a cluster allocate, all of the process counted.
func TestDecisionsOnAClusterAllocateLittle(t *testing.T) {
	w := startWired(t, redistest.ClusterOptions{}, func(c *Config) { c.Registerer = nil })
	l, err := w.ring.Limiter("many", TokenBucket{Rate: 1_000_000, Per: time.Second, Burst: 1_000_000})
	aclMust(t, err)
	var keys [1024]string
	for i := range keys {
		keys[i] = fmt.Sprint("user:", i)
	}
	const callers, each, most = 64, 500, 2.0
	load := func() {
		var all sync.WaitGroup
		for c := range callers {
			all.Go(func() {
				for i := range each {
					d, err := l.Allow(t.Context(), keys[(c*each+i*31)%len(keys)])
					if err != nil || d.Source != SourcePrimary {
						t.Errorf("%+v, %v", d, err)
						return
					}
				}
			})
		}
		all.Wait()
	}
	load() // connections, pools and buffers
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	load()
	runtime.ReadMemStats(&after)
	got := float64(after.Mallocs-before.Mallocs) / (callers * each)
	t.Logf("%.2f allocations a decision", got)
	if got > most {
		t.Errorf("%.2f allocations a decision, want at most %.0f", got, most)
	}
}
