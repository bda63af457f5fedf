package ringfence

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// shard is one member of the ring: the primary and its replicas, the operations on the
// way to them, and the breaker.
type shard struct {
	id    string
	ring  *Ring
	index int    // of the ring's member it is, or is part of
	nodes []node // the primary of the configuration first

	cluster *redisClusterShards // whose master it is; nil for a shard of its own

	// primary is the index of the node that takes writes, as far as we know.
	primary  atomic.Int32
	charges  *dispatcher // to the primary
	looks    *dispatcher // to the replicas; nil when there are none
	breaker  *breaker
	replicas *breaker // of the replicas taken together, so that dead ones cost nothing
	turn     atomic.Uint32

	// epoch counts the times the primary answered after it had not: what a replica said
	// in an earlier epoch is out of date.
	epoch    atomic.Uint64
	degraded atomic.Bool
	policy   atomic.Int32 // run-time failure policy; -1: none

	ledger   ledger // what this process admitted and the shard has not been told
	settling atomic.Bool
	trying   atomic.Bool

	counted atomic.Int64 // processes that share the ring, see instances.go; 0: unknown
	heard   atomic.Int64 // what the last heartbeat was told
	known   atomic.Bool  // the shard itself has told

	resolving atomic.Bool
	checking  atomic.Bool
	metrics   *shardMetrics

	cutOnce sync.Once
	cutErr  error // of cutOnce

	mu        sync.Mutex // guards the following
	said      []nodeInfo // by each server, when it last answered
	up        bool
	splitView bool
	lag       time.Duration
	offset    time.Duration
	mismatch  bool
}

const noPolicy = -1

// newShard makes the shard of one server and its replicas, or of a Sentinel set.
func newShard(r *Ring, c ShardConfig, index int) (*shard, error) {
	return newShardOf(r, c.ID, index, func(s *shard) error {
		conf := nodeConfig{
			timeout: r.config.OperationTimeout, poolSize: r.config.InFlight + 4,
			dialer: r.config.Dialer, tls: c.TLS, loaded: s.metrics.scriptLoaded,
			gate: newRefusals(r.config),
		}
		if c.Client != nil {
			s.nodes = append(s.nodes, newClientNode(c.Client, conf, c.PlainScripts))
		}
		urls := c.Replicas
		if c.Client == nil {
			urls = append([]string{c.Primary}, c.Replicas...)
		}
		for _, u := range urls {
			nodes, err := nodesOf(u, conf, c.PlainScripts)
			if err != nil {
				return fmt.Errorf("ringfence: shard %s: %w", c.ID, err)
			}
			s.nodes = append(s.nodes, nodes...)
		}
		for _, client := range c.ReplicaClients {
			s.nodes = append(s.nodes, newClientNode(client, conf, c.PlainScripts))
		}
		return nil
	})
}

// nodesOf are the servers that a URL names: one, or what a Sentinel set calls its master
// and its replicas.
func nodesOf(raw string, c nodeConfig, plain bool) ([]node, error) {
	t, err := parseTarget(raw)
	if err != nil {
		return nil, err
	}
	if t.kind == sentinelSet {
		return newSentinelNodes(t, c), nil
	}
	n, err := newLeanNode(raw, c, plain)
	if err != nil {
		return nil, err
	}
	return []node{n}, nil
}

// newShardOf makes a shard whose servers fill puts in, the primary first.
func newShardOf(r *Ring, id string, index int, fill func(s *shard) error) (*shard, error) {
	s := &shard{id: id, ring: r, index: index}
	s.policy.Store(noPolicy)
	s.metrics = r.metrics.forShard(id)
	if err := fill(s); err != nil {
		return nil, err
	}
	s.said = make([]nodeInfo, len(s.nodes))
	s.breaker = newBreaker(r.config.Breaker, r.config.Now, r.config.Rand, s.probe, s.moved)
	budget := r.config.Budget
	if len(s.nodes) > 1 {
		budget -= budget / 4 // see split
	}
	s.charges = s.dispatch(s.breaker, r.config.InFlight, budget, s.exec)
	s.charges.direct = func() *direct {
		if n, ok := s.nodes[s.primary.Load()].(directNode); ok {
			return n.straight()
		}
		return nil
	}
	if len(s.nodes) > 1 {
		s.replicas = newBreaker(r.config.Breaker, r.config.Now, r.config.Rand, s.probeReplicas, func(_, _ BreakerState) {})
		s.looks = s.dispatch(s.replicas, min(2, r.config.InFlight), r.config.Budget/4, s.execReplica)
	}
	return s, nil
}

func (s *shard) dispatch(b *breaker, inFlight int, budget time.Duration, exec func(ctx context.Context, reqs []*request) error) *dispatcher {
	c := s.ring.config
	d := newDispatcher(dispatchConfig{
		inFlight: inFlight, maxBatch: c.MaxBatch, queue: c.Queue,
		timeout: c.OperationTimeout, budget: budget, clock: s.ring.clock,
	})
	d.exec = exec
	d.begin = b.begin
	primary := d
	d.verdict = func(kind opKind, err error) error {
		switch {
		case err != nil && classify(err).trips:
			return err
		case err != nil, primary == s.charges && kind != opCharge:
			// A server that is out of memory takes no charge and yet answers all else:
			// that must not keep the breaker closed.
			return errNotCounted
		default:
			return nil
		}
	}
	d.ended = func(kind opKind, n int, took time.Duration, err error) {
		s.metrics.operation(kind, n, took, err)
		if err != nil {
			s.failed(err)
		} else if primary == s.charges {
			s.answered()
		}
	}
	d.lost = s.lost
	d.told = s.settled
	return d
}

// exec runs requests of one kind on the primary.
func (s *shard) exec(ctx context.Context, reqs []*request) error {
	return perform(ctx, s.nodes[s.primary.Load()], reqs)
}

// perform runs requests of one kind on a server.
func perform(ctx context.Context, n node, reqs []*request) error {
	switch reqs[0].kind {
	case opLook:
		return n.look(ctx, reqs)
	case opReset:
		return n.reset(ctx, reqs)
	default:
		return n.charge(ctx, reqs)
	}
}

// execReplica looks on the replica that answered last, and if it fails on the others:
// looking changes nothing, so it may be done again.
func (s *shard) execReplica(ctx context.Context, reqs []*request) error {
	var err error
	for range len(s.nodes) - 1 {
		turn := s.turn.Load()
		i := int(turn) % (len(s.nodes) - 1)
		if i >= int(s.primary.Load()) {
			i++
		}
		if err = s.nodes[i].look(ctx, reqs); err == nil {
			return nil
		}
		s.turn.CompareAndSwap(turn, turn+1)
		if ctx.Err() != nil {
			break
		}
	}
	return err
}

// answered notes that the primary did.
func (s *shard) answered() {
	if s.degraded.Load() && s.degraded.CompareAndSwap(true, false) {
		s.epoch.Add(1)
		s.settleSoon()
	}
}

// failed notes an operation's error, once an operation.
func (s *shard) failed(err error) {
	if errors.Is(err, errOpen) {
		return
	}
	t := classify(err)
	if s.cluster != nil && (t.trips || t.moved) {
		// go-redis looks at its own topology every second, and not because of an error.
		s.cluster.refreshSoon()
	}
	switch {
	case t.moved:
		s.resolveSoon()
	case t.refused:
		s.ring.log.warn(s.id, "refused", "Redis refuses ringfence's commands; the failure policy answers",
			"shard", s.id, "error_type", t.name, "error", err.Error())
	case t == typeOther:
		s.ring.log.warn(s.id, "other", "Redis answered with an error that ringfence does not know",
			"shard", s.id, "error", err.Error())
	}
}

// lost hears of a request whose caller did not get to know what became of it. A late reply
// corrects the local count: what the primary did charge need not be told to it again. The
// end of a late Reset makes this process forget once more what the primary denied.
func (s *shard) lost(r *request, err error, late bool) {
	switch {
	case r.kind == opReset:
		if late && !notSent(err) {
			// It was done now, and not before its caller left: what was denied in between
			// may be admitted.
			s.ring.near.drop(r.hash, s.ring.clock())
			s.ring.leases.drop(r.hash, s.ring.clock())
		}
	case r.kind != opCharge:
	case err != nil:
		if !notSent(err) && classify(err).ran {
			s.metrics.unknownCharge(r.cost * (r.count + r.wants))
		}
		s.conclude(r, fateEnded)
	case late && r.status == statusDecided && r.granted > 0:
		s.conclude(r, fateCharged)
	case late:
		s.conclude(r, fateEnded)
	}
}

func (s *shard) moved(from, to BreakerState) {
	s.metrics.transition(from, to)
	switch {
	case to == BreakerOpen && from == BreakerClosed:
		st := s.breaker.stats()
		s.setUp()
		s.ring.log.warn(s.id, "opened", "circuit breaker opened; answers come from a replica, a local share or the failure policy",
			"shard", s.id, "failures", st.Failures, "last_error", st.LastError)
	case to == BreakerClosed:
		s.setUp()
		// A probe has been answered: what replicas said before is out of date.
		s.epoch.Add(1)
		s.degraded.Store(false)
		s.settleSoon()
		s.ring.log.info(s.id, "closed", "circuit breaker closed", "shard", s.id)
	}
}

// setUp reads the state itself: two changes may tell of themselves in the wrong order.
func (s *shard) setUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.up = s.breaker.closed.Load()
}

var errProbeLost = errors.New("ringfence: the probe did not end")
var errNotPrimary = errors.New("ringfence: no server of the shard is a primary")

// probe finds out, in the background and without any caller, whether the shard is back.
func (s *shard) probe() {
	if !s.ring.enter() {
		return
	}
	defer s.ring.leave()
	report, err := s.breaker.beginProbe()
	if err != nil {
		return
	}
	result := errProbeLost
	defer func() {
		s.metrics.probed(result)
		if result != nil && classify(result).refused {
			s.failed(result)
		}
		if result == nil { // the first call of all is to tell what its key owes
			s.degraded.Store(false)
		}
		report(result)
	}()
	if s.cluster != nil { // its slots say who is master by now
		s.cluster.refreshIn(s.ring.ctx, s.ring.config.OperationTimeout)
	}
	var v view
	s.inTime(func(ctx context.Context) { v = s.resolve(ctx)[s.primary.Load()] })
	switch {
	case v.err != nil && classify(v.err).trips:
		result = v.err // one call is enough to know that it is still away
	case v.err == nil && !v.primary:
		result = errNotPrimary
	default:
		// In a time of its own: a silent replica has used up the other, and would keep
		// the breaker from ever closing. With the script that charges, because a server
		// that is out of memory, cannot write its disk or misses its replicas goes on
		// answering those that look.
		s.inTime(func(ctx context.Context) { result = s.nodes[s.primary.Load()].charge(ctx, nil) })
	}
}

// inTime calls f with the time that one operation has.
func (s *shard) inTime(f func(ctx context.Context)) {
	ctx, cancel := context.WithTimeout(s.ring.ctx, s.ring.config.OperationTimeout)
	defer cancel()
	f(ctx)
}

func (s *shard) probeReplicas() {
	if !s.ring.enter() {
		return
	}
	defer s.ring.leave()
	report, err := s.replicas.beginProbe()
	if err != nil {
		return
	}
	result := errProbeLost
	defer func() { report(result) }()
	s.inTime(func(ctx context.Context) { result = s.execReplica(ctx, nil) })
}

// resolveSoon asks the servers who is primary, in the background, one asking at a time.
func (s *shard) resolveSoon() {
	if len(s.nodes) == 1 || !s.ring.enter() {
		return
	}
	if !s.resolving.CompareAndSwap(false, true) {
		s.ring.leave()
		return
	}
	go func() {
		defer s.ring.leave()
		defer s.resolving.Store(false)
		s.inTime(func(ctx context.Context) { s.resolve(ctx) })
	}()
}

// view is what one server said of itself, or why it did not; then the rest is what it
// last said.
type view struct {
	nodeInfo
	err error
}

// resolve asks the servers and goes over to the one that is the primary. ringfence never
// promotes a server itself.
func (s *shard) resolve(ctx context.Context) []view {
	current := int(s.primary.Load())
	views := make([]view, len(s.nodes))
	var wg sync.WaitGroup
	for i, n := range s.nodes {
		wg.Go(func() { views[i].nodeInfo, views[i].err = n.info(ctx) })
	}
	wg.Wait()
	s.mu.Lock()
	for i := range views {
		if views[i].err == nil {
			s.said[i] = views[i].nodeInfo
		} else {
			views[i].nodeInfo = s.said[i]
		}
	}
	chosen, split := choosePrimary(current, views)
	s.splitView = split
	s.lag = 0
	for i, v := range views {
		if i != chosen && v.err == nil && !v.primary {
			s.lag = max(s.lag, v.lag)
		}
	}
	s.mu.Unlock()
	if split {
		s.ring.log.warn(s.id, "split", "two servers of the shard say they are the primary and neither follows from the other; staying with the present one. Make one a replica of the other",
			"shard", s.id, "primary", s.nodes[chosen].addr())
	}
	if chosen != current && s.primary.CompareAndSwap(int32(current), int32(chosen)) {
		s.ring.log.warn(s.id, "promoted", "another server of the shard is the primary now", "shard", s.id, "primary", s.nodes[chosen].addr())
	}
	return views
}

// replicaLag is the longest time since a replica heard of its primary, as last said.
func (s *shard) replicaLag() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lag
}

// choosePrimary says which server to take for the primary, given what each says, and
// whether that is undecidable. Of two that say they are, the one promoted later remembers
// the other's replication id as its second. One whose place the present primary took does
// not get it back because that is silent: it knows nothing of what was charged since.
func choosePrimary(current int, views []view) (chosen int, split bool) {
	chosen = -1
	now := views[current]
	for i, v := range views {
		replaced := now.primary && v.replID != "" && v.replID == now.replID2
		if v.err != nil || !v.primary || replaced {
			continue
		}
		if chosen < 0 {
			chosen = i
			continue
		}
		a, b := views[chosen], v
		switch {
		case b.replID != "" && b.replID == a.replID: // one server by two names
		case b.replID2 != "" && b.replID2 == a.replID:
			chosen = i
		case a.replID2 != "" && a.replID2 == b.replID:
		default:
			return current, true
		}
	}
	if chosen < 0 {
		return current, false
	}
	return chosen, false
}

// checkup asks all servers of the shard how they are: at Open, then every few seconds
// while the breaker is closed. first says it is the one at Open.
func (s *shard) checkup(ctx context.Context, first bool) error {
	// Half of the time is for asking all of them: one that is silent takes all it gets.
	asking, cancel := context.WithTimeout(ctx, s.ring.config.OperationTimeout)
	defer cancel()
	var views []view
	if first || len(s.nodes) > 1 {
		views = s.resolve(asking)
	} else {
		info, err := s.nodes[0].info(asking)
		views = []view{{info, err}}
	}
	current := int(s.primary.Load())
	n, v := s.nodes[current], views[current]
	if first {
		var wg sync.WaitGroup
		for i, n := range s.nodes {
			if err := views[i].err; err != nil && classify(err).trips {
				continue // it is down, and asking again would use up the others' time
			}
			// What fails here shows up below, or when it is needed.
			wg.Go(func() { _ = n.load(ctx) })
		}
		wg.Wait()
	}
	before := s.ring.config.Now()
	server, clockErr := n.now(ctx)
	after := s.ring.config.Now()
	s.mu.Lock()
	if clockErr == nil {
		s.offset = server.Sub(before.Add(after.Sub(before) / 2))
	}
	s.up = clockErr == nil && s.breaker.closed.Load()
	s.mu.Unlock()
	if clockErr != nil {
		if first {
			s.countOnReplica(ctx, views)
		}
		return clockErr
	}
	if v.err != nil {
		s.ring.log.warn(s.id, "info", "INFO is refused, so neither version, role nor eviction policy can be checked",
			"shard", s.id, "error", v.err.Error())
	}
	for i, w := range views {
		if i != current && w.err != nil && classify(w.err).refused {
			s.ring.log.warn(s.id, "replica-info", "a replica refuses INFO, so its promotion would not be noticed",
				"shard", s.id, "replica", s.nodes[i].addr(), "error", w.err.Error())
		}
	}
	if v.evictionRule != "" && v.evictionRule != "noeviction" {
		s.ring.log.warn(s.id, "eviction", "the server may evict keys when memory runs out, which forgives limits; set maxmemory-policy noeviction",
			"shard", s.id, "maxmemory_policy", v.evictionRule)
	}
	if err := s.agree(ctx, n); err != nil {
		s.ring.log.warn(s.id, "fingerprint", "cannot compare configurations with other processes",
			"shard", s.id, "error", err.Error())
	}
	s.beat(ctx, n)
	s.catchUp()
	if v.err == nil && v.tooOld() {
		s.ring.log.warn(s.id, "version", "the server is too old; Redis 7.0 or Valkey 7.2 is needed", "shard", s.id, "version", v.version)
		return fmt.Errorf("version %s is too old; Redis 7.0 or Valkey 7.2 is needed", v.version)
	}
	return nil
}

// agree compares the ring and the hash key with other processes'.
func (s *shard) agree(ctx context.Context, n node) error {
	others, err := n.agree(ctx, s.ring.space.fingerprint(), s.ring.fingerprint)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.mismatch = len(others) > 0
	s.mu.Unlock()
	if len(others) > 0 {
		s.ring.log.warn(s.id, "mismatch", "another process uses another HashKey or another ring on this shard with the same prefix; limits are not shared with it",
			"shard", s.id, "others", len(others))
	}
	return nil
}

// close ends the operations and the connections. What has not ended by cut loses its
// connection, and is not waited for beyond end.
func (s *shard) close(cut, end time.Time) error {
	s.breaker.close()
	ended := []<-chan struct{}{s.charges.close()}
	if s.looks != nil {
		s.replicas.close()
		ended = append(ended, s.looks.close())
	}
	await(cut, ended...)
	s.disconnect()
	await(end, ended...)
	s.forfeit()
	return s.cutErr
}

// disconnect closes the connections, which ends the operations that wait for them.
func (s *shard) disconnect() {
	s.cutOnce.Do(func() {
		var errs []error
		for _, n := range s.nodes {
			errs = append(errs, n.close())
		}
		s.cutErr = errors.Join(errs...)
	})
}

// await waits until all have ended, until an instant at most, and says whether they have.
func await(until time.Time, ended ...<-chan struct{}) bool {
	after := time.NewTimer(time.Until(until))
	defer after.Stop()
	for _, c := range ended {
		select {
		case <-c:
		case <-after.C:
			return false
		}
	}
	return true
}
