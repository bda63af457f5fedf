package ringfence

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// checkupEvery is how often each shard's servers are asked how they are.
const checkupEvery = 5 * time.Second

// Ring is a set of Redis shards over which keys are spread by consistent hashing, and the
// limiters that live on it. All methods may be called from many goroutines.
//
// The type of the same name in go-redis does the opposite when a shard fails: it moves
// the shard's keys to others. Here a fault never moves a key.
type Ring struct {
	config      Config
	table       *hashRing
	members     []member
	space       keySpace
	requests    *sync.Pool // of *request
	hashKey     [16]byte
	instance    keyer
	fingerprint string
	metrics     *metrics
	log         *events
	local       *localTable
	near        *nearCache
	leases      leaseTable
	began       time.Time
	lastCount   atomic.Int64 // see instances.go
	steady      bool         // the clock is the system's

	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	calls  *gates

	mu       sync.Mutex // guards limiters
	limiters map[string]*Limiter
}

// callGate counts calls under way, so that Close can wait for them. Closing moves the
// count below zero for good.
type callGate struct {
	count atomic.Int64
	idle  chan struct{} // closed when the last call has left a closed gate
	once  sync.Once
}

const gateClosed = math.MinInt64 / 2

// enter counts a call in, unless the gate is closed.
func (g *callGate) enter() bool {
	if g.count.Add(1) < 0 {
		g.leave()
		return false
	}
	return true
}

func (g *callGate) leave() {
	if g.count.Add(-1) == gateClosed {
		g.once.Do(func() { close(g.idle) })
	}
}

func (g *callGate) closed() bool { return g.count.Load() < 0 }

// close closes the gate and says whether it was open.
func (g *callGate) close() bool {
	for {
		n := g.count.Load()
		if n < 0 {
			return false
		}
		if g.count.CompareAndSwap(n, n+gateClosed) {
			if n == 0 {
				g.once.Do(func() { close(g.idle) })
			}
			return true
		}
	}
}

// Open checks the configuration and the shards, all shards at once, and returns the ring.
// Shards that cannot be reached or are too old are logged; with Config.Strict they are an
// error that matches ErrUnreachable, and no ring is returned. Checking takes at most
// twice Config.OperationTimeout. ctx bounds Open alone, not the ring.
func Open(ctx context.Context, c Config) (*Ring, error) {
	if ctx == nil {
		return nil, invalid("ctx", verbatim("nil"), "must be a context; take context.Background()")
	}
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	steady := c.Now == nil
	if steady {
		c.Now = time.Now
	}
	if c.Rand == nil {
		c.Rand = rand.Uint64
	}
	r := &Ring{
		config: c, space: newKeySpace(c.Prefix), requests: newRequestPool(),
		local: newLocalTable(c.MaxLocalKeys), near: newNearCache(c.NearCacheKeys), limiters: map[string]*Limiter{},
		log: newEvents(c.Logger, c.Now), began: c.Now(), steady: steady, hashKey: publishedHashKey,
		calls: newGates(stripeCount()),
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	if err := r.build(); err != nil {
		r.cancel()
		return nil, errors.Join(err, r.closeShards(time.Now(), time.Now()))
	}
	down := r.checkShards(ctx, true)
	if down != nil && c.Strict {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrUnreachable, down), r.Close())
	}
	go r.keepUp()
	return r, nil
}

func (r *Ring) build() error {
	c := r.config
	if len(c.HashKey) > 0 {
		copy(r.hashKey[:], c.HashKey)
	} else {
		r.log.warn("", "hashkey", "Config.HashKey is not set: whoever chooses keys can aim them at one shard; set 16 secret random bytes, the same in every process")
	}
	if c.InstanceID == "" {
		c.InstanceID = fmt.Sprintf("%016x%016x", c.Rand(), c.Rand())
	}
	r.instance = newKeyer(r.hashKey, "instance", c.InstanceID)
	members := make([]ringMember, len(c.Shards))
	for i, s := range c.Shards {
		members[i] = ringMember{id: s.ID, weight: s.Weight}
	}
	var err error
	if r.table, err = buildRing(members); err != nil {
		return err
	}
	print := newKeyer(r.hashKey, "fingerprint", fmt.Sprintf("%016x", r.table.fingerprint())).hash(storageVersion)
	r.fingerprint = fmt.Sprintf("%016x%016x", print.hi, print.lo)
	r.metrics = newMetrics(c)
	for i, sc := range c.Shards {
		m, err := newMember(r, sc, i)
		if err != nil {
			return err
		}
		r.members = append(r.members, m)
	}
	if r.metrics != nil {
		r.metrics.ring = r
		return r.metrics.register(c.Registerer)
	}
	return nil
}

// checkShards asks all shards whose breaker is closed how they are. A check-up that does
// not end in time, as one over a client that was given to us may not, is left behind.
func (r *Ring) checkShards(ctx context.Context, first bool) error {
	ctx, cancel := context.WithTimeout(ctx, 2*r.config.OperationTimeout)
	defer cancel()
	type result struct {
		shard int
		err   error
	}
	for _, m := range r.members {
		if m.cluster != nil {
			m.cluster.refreshIn(ctx, r.config.OperationTimeout)
		}
	}
	shards := r.all()
	results := make(chan result, len(shards))
	errs, asked := make([]error, len(shards)), make([]bool, len(shards))
	pending := 0
	for i, s := range shards {
		if (!first && !s.breaker.closed.Load()) || !s.checking.CompareAndSwap(false, true) {
			continue
		}
		if !r.enter() {
			break
		}
		pending++
		asked[i] = true
		errs[i] = fmt.Errorf("shard %s: %w", s.id, errCheckup)
		go func() {
			defer r.leave()
			defer s.checking.Store(false)
			err := s.checkup(ctx, first)
			if err != nil {
				err = fmt.Errorf("shard %s: %w", s.id, err)
			}
			results <- result{i, err}
		}()
	}
	over, late := ctx.Done(), (<-chan time.Time)(nil)
	for pending > 0 {
		select {
		case done := <-results:
			errs[done.shard] = done.err
			pending--
		case <-over: // those that heed it end a moment later
			over, late = nil, time.After(20*time.Millisecond)
		case <-late:
			pending = 0
		}
	}
	r.count(shards, func(i int) bool { return asked[i] && errs[i] == nil })
	for i, err := range errs {
		if s := shards[i]; err != nil {
			r.log.warn(s.id, "checkup", "a shard does not answer its check-up", "shard", s.id, "error", err.Error())
		}
	}
	return errors.Join(errs...)
}

var errCheckup = errors.New("the check-up did not end in time")

// keepUp asks the shards every few seconds until Close.
func (r *Ring) keepUp() {
	if !r.enter() {
		return
	}
	defer r.leave()
	tick := time.NewTicker(checkupEvery)
	defer tick.Stop()
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-tick.C:
			// Whoever does not answer has been logged.
			_ = r.checkShards(r.ctx, false)
		}
	}
}

// clock is ns since Open, monotonic.
func (r *Ring) clock() int64 {
	if r.steady { // half the price of time.Now, for it leaves out the time of day
		return int64(time.Since(r.began))
	}
	return int64(r.config.Now().Sub(r.began))
}

// until is how long until at, when the ring's clock shows now. Two instants of the system's
// monotonic clock are compared without reading it; what has none is the time of day, which
// may have been set anew since Open.
func (r *Ring) until(at time.Time, now int64) time.Duration {
	if r.steady && at != at.Round(0) {
		return at.Sub(r.began) - time.Duration(now)
	}
	return time.Until(at)
}

func (r *Ring) owner(h keyHash) *shard {
	m := &r.members[0]
	if len(r.members) > 1 { // else the table of slots would cost a cache line for nothing
		m = &r.members[r.table.owner(h.hi)]
	}
	if m.cluster != nil {
		return m.cluster.owner(h)
	}
	return m.shard
}

// member is what one ShardConfig became: a shard, or a Redis Cluster of them.
type member struct {
	shard   *shard
	cluster *redisClusterShards
}

func newMember(r *Ring, c ShardConfig, index int) (m member, err error) {
	if c.Client == nil {
		t, err := parseTarget(c.Primary)
		if err == nil && t.kind == redisCluster {
			m.cluster, err = newCluster(r, c, t, index)
			return m, err
		}
	}
	m.shard, err = newShard(r, c, index)
	return m, err
}

// all are the shards of the ring, those of clusters as known by now.
func (r *Ring) all() []*shard {
	out := make([]*shard, 0, len(r.members))
	for _, m := range r.members {
		if m.cluster != nil {
			out = append(out, m.cluster.active()...)
		} else {
			out = append(out, m.shard)
		}
	}
	return out
}

// ever are all shards there have been, for closing them.
func (r *Ring) ever() []*shard {
	out := make([]*shard, 0, len(r.members))
	for _, m := range r.members {
		if m.cluster != nil {
			out = append(out, *m.cluster.list.Load()...)
		} else {
			out = append(out, m.shard)
		}
	}
	return out
}

// share is the part of the keys that the shard owns.
func (r *Ring) share(s *shard) float64 {
	part := r.table.share(s.index)
	if s.cluster != nil {
		part *= s.cluster.share(s)
	}
	return part
}

// Limiter returns the limiter of this name, making it if need be. The name, [a-z0-9_.-]
// and at most 64 characters, is a metric label and part of the hash of every key; all
// processes must use the same name for the same limit. Asking again with the same limit
// and options gives the same limiter; with another limit it is an error. At most
// MaxLimiters a ring.
func (r *Ring) Limiter(name string, limit Limit, opts ...LimiterOption) (*Limiter, error) {
	if !namePattern.MatchString(name) {
		return nil, invalid("name", name, "must be 1 to 64 of [a-z0-9_.-]: it is a metric label")
	}
	switch p := limit.(type) { // pointers to limits are limits too: take what they point to
	case *TokenBucket:
		if limit = nil; p != nil {
			limit = *p
		}
	case *SlidingLog:
		if limit = nil; p != nil {
			limit = *p
		}
	}
	if limit == nil {
		return nil, invalid("limit", verbatim("nil"), "must be a TokenBucket or a SlidingLog")
	}
	compiled, err := limit.compile()
	if err != nil {
		return nil, fmt.Errorf("limiter %q: %w", name, err)
	}
	o := limiterOptions{policy: r.config.Policy, budget: r.config.Budget, near: defaultNearCache}
	for _, opt := range opts {
		if opt == nil {
			return nil, invalid("opts", verbatim("nil"), "must be options such as WithPolicy")
		}
		if err := opt(&o); err != nil {
			return nil, fmt.Errorf("limiter %q: %w", name, err)
		}
	}
	if o.budget > r.config.OperationTimeout {
		return nil, invalid("WithBudget", o.budget, "must be at most Config.OperationTimeout (%s)", r.config.OperationTimeout)
	}
	if r.calls.closed() {
		return nil, ErrClosed
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.limiters[name]; l != nil {
		if l.limit != limit || l.policy != o.policy || l.budget != o.budget || l.nearLife != int64(o.near) || l.asLeased != o.lease {
			return nil, invalid("name", name, "is a limiter already, with %s, policy %s, budget %s, near cache %s, leases %+v; give this one another name", l.limit, l.policy, l.budget, time.Duration(l.nearLife), l.asLeased)
		}
		return l, nil
	}
	if len(r.limiters) >= MaxLimiters {
		return nil, invalid("name", name, "would be limiter %d of at most %d; limit per key, not per limiter", len(r.limiters)+1, MaxLimiters)
	}
	l := &Limiter{
		ring: r, name: name, limit: limit, rule: compiled,
		keys:   newKeyer(r.hashKey, algorithmNames[compiled.algo], name),
		policy: o.policy, budget: o.budget, nearLife: int64(o.near),
		top: r.config.Top.forLimiter(), asLeased: o.lease,
	}
	if l.lease, err = newLeasing(l, o.lease); err != nil {
		return nil, fmt.Errorf("limiter %q: %w", name, err)
	}
	if l.lease != nil && l.lease.bound > 0 {
		r.leases.prepare()
	}
	l.metrics = r.metrics.forLimiter(name, compiled)
	r.limiters[name] = l
	return l, nil
}

// allLimiters are the limiters made so far.
func (r *Ring) allLimiters() []*Limiter {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Collect(maps.Values(r.limiters))
}

// enter counts a call in, unless the ring is closed; for those who come seldom, or leave by
// another goroutine. Others take a gate of r.calls.
func (r *Ring) enter() bool { return r.calls.at(0).enter() }

func (r *Ring) leave() { r.calls.at(0).leave() }

// String names the shards. A Ring holds credentials and keys, none of which it shows,
// however it is printed.
func (r *Ring) String() string {
	var ids []string
	for _, s := range r.all() {
		ids = append(ids, s.id)
	}
	return fmt.Sprintf("ringfence.Ring%v", ids)
}

// GoString is String, so that %#v shows no credentials either.
func (r *Ring) GoString() string { return r.String() }

// Format writes String whatever the verb.
func (r *Ring) Format(f fmt.State, verb rune) { printSafely(f, verb, r) }

// Close ends the ring, within 2 s: calls from now on get ErrClosed, those under way are
// answered, leases are returned to shards that answer, operations in flight have a second to
// end, and connections that ringfence opened are closed. Clients given to it stay open.
// Metrics are unregistered. Calling it again does nothing.
func (r *Ring) Close() error {
	if !r.calls.close() {
		return nil
	}
	r.cancel()
	// Callers may have long budgets, and a read from a silent server ends with its
	// time-out or with its connection.
	now := time.Now()
	cut, end := now.Add(time.Second), now.Add(1750*time.Millisecond)
	if !await(cut, r.calls.idle) {
		for _, s := range r.ever() {
			s.disconnect()
		}
		await(now.Add(1500*time.Millisecond), r.calls.idle)
	} else {
		r.returnLeases(cut)
	}
	err := r.closeShards(cut, end)
	if r.metrics != nil {
		r.config.Registerer.Unregister(r.metrics)
	}
	return err
}

func (r *Ring) closeShards(cut, end time.Time) error {
	shards := r.ever()
	errs := make([]error, len(shards))
	var wg sync.WaitGroup
	for i, s := range shards {
		wg.Go(func() { errs[i] = s.close(cut, end) })
	}
	wg.Wait()
	return errors.Join(errs...)
}
