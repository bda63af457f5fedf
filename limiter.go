package ringfence

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Limiter decides over the keys of one limit. Get one from Ring.Limiter and keep it. All
// methods may be called from many goroutines.
//
// A Redis fault is never an error of Allow, AllowN, AllowMany and Peek: it is a Source
// and a Cause in the Decision. Their errors are misuse (ErrInvalid, ErrClosed) and the
// caller's own context, canceled or expired; no quota is taken then, except by a call
// that was canceled while its charge was on the way.
type Limiter struct {
	ring    *Ring
	name    string
	limit   Limit
	rule    *rule
	keys    keyer
	policy  FailurePolicy
	budget  time.Duration
	metrics *limiterMetrics
	top     *limiterTop

	nearLife int64    // ns a denial may be kept; 0: not at all
	asLeased Lease    // as it was given
	lease    *leasing // nil: none
}

// Request is one entry of AllowMany.
type Request struct {
	// Key is who is limited: 1 to MaxKeyBytes bytes, any bytes.
	Key string
	// Cost is how many units it asks for: 1 to the limit's highest cost.
	Cost int64
}

// Name returns the name given to Ring.Limiter.
func (l *Limiter) Name() string { return l.name }

// Limit returns the limit given to Ring.Limiter.
func (l *Limiter) Limit() Limit { return l.limit }

// String shows the name, the limit and what its leases add to that, and nothing of the
// secret with which keys are hashed.
func (l *Limiter) String() string {
	return fmt.Sprintf("ringfence.Limiter{%s: %s%s}", l.name, l.limit, l.lease)
}

// GoString is String, so that %#v shows no secret either.
func (l *Limiter) GoString() string { return l.String() }

// Format writes String whatever the verb.
func (l *Limiter) Format(f fmt.State, verb rune) { printSafely(f, verb, l) }

// Allow asks for one unit: AllowN with a cost of 1.
func (l *Limiter) Allow(ctx context.Context, key string) (Decision, error) {
	return l.AllowN(ctx, key, 1)
}

// AllowN asks for cost units of the key's quota, all or none. Being denied is not an
// error. It answers within the limiter's budget, or just before ctx's deadline if that
// is earlier, and up to 2 ms after ctx is canceled.
func (l *Limiter) AllowN(ctx context.Context, key string, cost int64) (Decision, error) {
	if err := l.check(ctx, key, cost); err != nil {
		l.refuse(ctx, nil, err, 1, l.ring.clock())
		return Decision{}, err
	}
	h := l.keys.hash(key)
	if l.lease != nil {
		l.ring.leases.fetch(h) // meanwhile there is something to do that needs no memory
	}
	start := l.ring.clock()
	at := place()
	gate := l.ring.calls.at(at)
	if !gate.enter() {
		l.refuse(ctx, nil, ErrClosed, 1, start)
		return Decision{}, ErrClosed
	}
	defer gate.leave()
	s := l.ring.owner(h)
	deadline, err := l.deadline(ctx, start)
	if err != nil {
		l.refuse(ctx, s, err, 1, start)
		return Decision{}, err
	}
	d, ok := l.leased(s, h, cost, start)
	if !ok {
		d, ok = l.near(s, h, cost, start)
	}
	if ok {
		l.decidedHere(ctx, s, key, &d, cost, start, at)
		return d, nil
	}
	cause, left, since, err := l.ask(ctx, s, opCharge, h, cost, start, s.split(start, deadline), &d)
	if err == nil && cause == CauseNone && l.lease != nil {
		err = l.orHeld(ctx, s, h, &d, cost, since, deadline)
	}
	if err != nil {
		l.refuse(ctx, s, err, 1, start)
		return Decision{}, err
	}
	if cause != CauseNone {
		d = s.fallBack(ctx, l, h, cost, deadline, cause, true)
		s.part(left, &d)
	}
	l.decided(ctx, s, key, &d, cost, start)
	return d, nil
}

// Peek says what Allow would answer now, without taking anything: Allowed, Remaining and
// ResetAfter are as of before such a call. It is not counted as a decision.
func (l *Limiter) Peek(ctx context.Context, key string) (Decision, error) {
	if err := l.check(ctx, key, 1); err != nil {
		return Decision{}, err
	}
	if !l.ring.enter() {
		return Decision{}, ErrClosed
	}
	defer l.ring.leave()
	start := l.ring.clock()
	h := l.keys.hash(key)
	s := l.ring.owner(h)
	deadline, err := l.deadline(ctx, start)
	if err != nil {
		return Decision{}, err
	}
	var d Decision
	cause, left, _, err := l.ask(ctx, s, opLook, h, 1, start, s.split(start, deadline), &d)
	if err != nil {
		return Decision{}, err
	}
	if cause != CauseNone {
		s.part(left, nil)
		d = s.fallBack(ctx, l, h, 1, deadline, cause, false)
	}
	l.addHeld(&d, h)
	return d, nil
}

// Reset forgets what the key has used, on its shard and in this process. It returns an
// error that matches ErrUnavailable when the shard did not confirm it within the budget:
// nobody knows then whether it was done.
func (l *Limiter) Reset(ctx context.Context, key string) error {
	if err := l.check(ctx, key, 1); err != nil {
		return err
	}
	if !l.ring.enter() {
		return ErrClosed
	}
	defer l.ring.leave()
	start := l.ring.clock()
	h := l.keys.hash(key)
	s := l.ring.owner(h)
	deadline, err := l.deadline(ctx, start)
	if err != nil {
		return err
	}
	if !s.breaker.closed.Load() {
		return fmt.Errorf("%w: shard %s: its circuit breaker is open", ErrUnavailable, s.id)
	}
	r := l.ring.newRequest(opReset, l.rule, h, 1)
	l.ring.leases.drop(h, start) // so that nothing is returned to what the others begin anew
	if err := s.charges.send(r, deadline); err != nil {
		r.release()
		r.release()
		return fmt.Errorf("%w: shard %s: %w", ErrUnavailable, s.id, err)
	}
	_, err = s.charges.wait(ctx, r)
	r.release()
	// Whether it was done or nobody knows: what was denied before may be admitted now.
	l.ring.near.drop(h, l.ring.clock())
	l.ring.leases.drop(h, l.ring.clock())
	if canceled(ctx, err) {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("%w: shard %s: %w", ErrUnavailable, s.id, err)
	}
	// Not before the shard has done it: while it is away, a Reset that fails would
	// otherwise hand out this process's share again each time.
	l.ring.local.forget(h)
	return nil
}

// check refuses misuse before any I/O. A nil context is one too.
func (l *Limiter) check(ctx context.Context, key string, cost int64) error {
	if ctx == nil {
		return invalid("ctx", verbatim("nil"), "must be a context; take context.Background()")
	}
	return l.checkEntry("key", "cost", key, cost)
}

func (l *Limiter) checkEntry(keyField, costField, key string, cost int64) error {
	if key == "" {
		return invalid(keyField, key, "must not be empty: callers without a name would share one quota")
	}
	if len(key) > MaxKeyBytes {
		return invalid(keyField, verbatim(fmt.Sprintf("(%d bytes)", len(key))), "must be at most %d bytes; hash longer ones yourself", MaxKeyBytes)
	}
	if cost < 1 {
		return invalid(costField, cost, "must be at least 1; to look without taking use Peek")
	}
	if cost > l.rule.maxCost {
		return invalid(costField, cost, "can never be admitted: limiter %q takes at most %d a call (%s)", l.name, l.rule.maxCost, l.limit)
	}
	return nil
}

// deadline is the latest instant, on the ring's clock, at which the caller must have an
// answer: the end of the budget, or just before ctx's own deadline.
func (l *Limiter) deadline(ctx context.Context, start int64) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	end := start + int64(l.budget)
	if at, ok := ctx.Deadline(); ok {
		const margin = time.Millisecond
		left := l.ring.until(at, start)
		if left <= 0 {
			return 0, context.DeadlineExceeded
		}
		left -= min(margin, left/2)
		end = min(end, start+int64(left))
	}
	return end, nil
}

// split is the instant at which the primary has had its time: when there is a replica, a
// quarter of the budget is kept for it.
func (s *shard) split(start, deadline int64) int64 {
	if s.looks == nil {
		return deadline
	}
	return deadline - (deadline-start)/4
}

// ask puts one question to the primary. The cause is set when the ladder must answer; an
// error is the caller's own context. A request that was sent and not answered in time is
// handed on as left, for part. since is for orHeld.
func (l *Limiter) ask(ctx context.Context, s *shard, kind opKind, h keyHash, cost, start, deadline int64, d *Decision) (cause Cause, left *request, since int64, err error) {
	if !s.breaker.closed.Load() {
		return CauseBreaker, nil, 0, nil
	}
	r := l.ring.newRequest(kind, l.rule, h, cost)
	if s.owing() {
		if known, ok := s.untold(l, r); ok {
			r.release()
			r.release()
			*d = known
			return CauseNone, nil, 0, nil
		}
	}
	if kind == opCharge {
		l.lease.begin(r, start)
	}
	queued, unsent, err := s.charges.call(ctx, r, start, deadline)
	if !queued {
		s.charges.settle(r, err)
		r.release()
		r.release()
		return causeOf(err), nil, 0, nil
	}
	return l.hear(ctx, s, r, start, unsent, err, d)
}

// part releases a request that its caller left. d is what the ladder answered instead, nil
// if nothing was charged.
func (s *shard) part(left *request, d *Decision) {
	if left == nil {
		return
	}
	if d != nil && d.Allowed && d.Source == SourceReplica {
		s.conclude(left, fateShared)
	}
	left.release()
}

// hear makes a decision of the answer to a request that was sent, and releases it unless it
// is left. start is when the call began; unsent and err are what waiting for it ended with;
// since is for orHeld.
func (l *Limiter) hear(ctx context.Context, s *shard, r *request, start int64, unsent bool, err error, d *Decision) (cause Cause, left *request, since int64, _ error) {
	if err != nil {
		if canceled(ctx, err) {
			r.release()
			return CauseNone, nil, 0, ctx.Err()
		}
		if !unsent && errors.Is(err, errBudget) {
			return causeOf(err), r, 0, nil
		}
		r.release()
		return causeOf(err), nil, 0, nil
	}
	defer r.release()
	switch r.status {
	case statusDecided:
		if r.kind == opCharge {
			l.denied(r, start)
		}
		*d = l.rule.decide(r.state, r.granted > 0, r.cost)
		d.Source, d.Shard = SourcePrimary, s.id
		if since = r.now; r.back > 0 { // its own return it knows
			since++
		}
		return CauseNone, nil, since, nil
	case statusWrongType:
		s.metrics.wrongType()
	case statusRefused:
		// Not the key's fault: the user may not read, in most cases.
		s.ring.log.warn(s.id, "refused", "Redis refuses to let the script read a key; the failure policy answers. Does its user have the permissions of docs/security.md?",
			"shard", s.id, "limiter", l.name)
		return CauseError, nil, 0, nil
	}
	s.ring.log.warn(s.id, "corrupt", "a key holds what ringfence did not write; the failure policy answers for it until it is Reset",
		"shard", s.id, "limiter", l.name, "status", r.status)
	return CauseCorrupt, nil, 0, nil
}

// canceled says whether a wait ended because the caller canceled. That its deadline
// passed meanwhile is no reason to give it an error instead of an answer.
func canceled(ctx context.Context, err error) bool {
	return errors.Is(err, context.Canceled) && errors.Is(ctx.Err(), context.Canceled)
}

// causeRefused is CauseError on the way down the ladder, which then asks no replica: a
// server that refuses our commands does not count either, and needs a human.
const causeRefused Cause = 255

func causeOf(err error) Cause {
	switch {
	case errors.Is(err, errOpen):
		return CauseBreaker
	case errors.Is(err, errBudget), errors.Is(err, errOverdue):
		return CauseBudget
	case classify(err).refused:
		return causeRefused
	default:
		return CauseError
	}
}

// refuse counts entries of a call that gets an error.
func (l *Limiter) refuse(ctx context.Context, s *shard, err error, entries int, start int64) {
	o := outcomeError
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		o = outcomeCanceled
	}
	took := time.Duration(l.ring.clock() - start)
	l.metrics.ended(s, o, entries, took)
	l.refused(ctx, err, entries, took)
}

// AllowMany asks for many keys at once: up to Config.MaxBatch entries of a shard in one round
// trip, more of them in several, Config.InFlight side by side. The decisions are in the
// order of the requests; repeats of a key are decided in that order. It is not
// atomic: some may be admitted and others denied. One invalid entry is an error, and
// nothing is charged. Up to MaxMany entries; none is no error and no decisions.
func (l *Limiter) AllowMany(ctx context.Context, reqs []Request) ([]Decision, error) {
	start := l.ring.clock()
	if err := l.checkMany(ctx, reqs); err != nil {
		// Of a call that is too large MaxMany entries are counted, so that it costs no more
		// than one that is not.
		l.refuse(ctx, nil, err, min(max(1, len(reqs)), MaxMany), start)
		return nil, err
	}
	if len(reqs) == 0 {
		return nil, nil
	}
	if !l.ring.enter() {
		l.refuse(ctx, nil, ErrClosed, len(reqs), start)
		return nil, ErrClosed
	}
	defer l.ring.leave()
	deadline, err := l.deadline(ctx, start)
	if err != nil {
		l.refuse(ctx, nil, err, len(reqs), start)
		return nil, err
	}
	out := make([]Decision, len(reqs))
	entries := l.sendMany(reqs, out, start, deadline)
	patience := deadline
	if l.lease != nil { // no shard's entries use up the time of another's replica
		for i := range entries {
			patience = min(patience, entries[i].shard.split(start, deadline))
		}
	}
	var ended error
	for i := range entries {
		e := &entries[i]
		if e.req == nil {
			continue
		}
		unsent, err := e.shard.charges.wait(ctx, e.req)
		d := &out[i]
		cause, left, since, err := l.hear(ctx, e.shard, e.req, start, unsent, err, d)
		if err == nil && cause == CauseNone && l.lease != nil {
			// What another entry returned in the same operation this one has seen, or could
			// not have: entries are decided in their order.
			err = l.orHeld(ctx, e.shard, e.hash, d, reqs[i].Cost, since+1, patience)
		}
		if err != nil {
			ended = err
		}
		e.cause, e.left = cause, left
	}
	if ended != nil {
		for i := range entries {
			entries[i].shard.part(entries[i].left, nil)
		}
		l.refuse(ctx, nil, ended, len(reqs), start)
		return nil, ended
	}
	l.fallBackMany(ctx, reqs, entries, out, deadline)
	now := l.ring.clock()
	took := time.Duration(now - start)
	for i := range entries {
		l.count(entries[i].shard, reqs[i].Key, &out[i], reqs[i].Cost, took, now)
	}
	l.decidedMany(ctx, reqs, out, took)
	return out, nil
}

func (l *Limiter) checkMany(ctx context.Context, reqs []Request) error {
	if ctx == nil {
		return invalid("ctx", verbatim("nil"), "must be a context; take context.Background()")
	}
	if len(reqs) > MaxMany {
		return invalid("reqs", len(reqs), "must be at most %d entries; split the call", MaxMany)
	}
	for i, r := range reqs {
		if err := l.checkEntry("Key", "Cost", r.Key, r.Cost); err != nil {
			var f *FieldError
			if errors.As(err, &f) {
				f.Field = fmt.Sprintf("reqs[%d].%s", i, f.Field)
			}
			return err
		}
	}
	return nil
}

// manyEntry is where one entry of an AllowMany stands.
type manyEntry struct {
	hash  keyHash
	shard *shard
	req   *request // nil when it was not sent
	cause Cause
	shown Cause    // cause as the Decision shows it
	left  *request // see ask
}

// chains are requests on their way to one dispatcher, in one chain or, where they do not
// fit into one operation, in as many as can be under way at once. Those of one key are in
// one chain, which keeps their order.
type chains struct {
	d     *dispatcher
	of    []int // entries
	count uint64
	heads []*request
	tails []*request
}

// link adds the request of an entry to the chain of its key.
func (c *chains) link(r *request, k uint64) {
	if c.tails[k] == nil {
		c.heads[k] = r
	} else {
		c.tails[k].next = r
	}
	c.tails[k] = r
}

// chain links the requests of the entries that have one, by dispatcher.
func chain(entries []manyEntry, to func(*shard) *dispatcher) []*chains {
	byDispatcher := map[*dispatcher]*chains{}
	var all []*chains
	for i := range entries {
		if entries[i].req == nil {
			continue
		}
		d := to(entries[i].shard)
		c := byDispatcher[d]
		if c == nil {
			c = &chains{d: d}
			byDispatcher[d] = c
			all = append(all, c)
		}
		c.of = append(c.of, i)
	}
	for _, c := range all {
		c.count = uint64(min(len(c.d.slots), (len(c.of)+c.d.maxBatch-1)/c.d.maxBatch))
		c.heads, c.tails = make([]*request, c.count), make([]*request, c.count)
		for _, i := range c.of {
			c.link(entries[i].req, entries[i].hash.lo%c.count)
		}
	}
	return all
}

// sendChains sends them. What cannot be sent is released and gets its cause.
func sendChains(all []*chains, entries []manyEntry, deadline func(*shard) int64) {
	for _, c := range all {
		for k, head := range c.heads {
			if head == nil {
				continue
			}
			err := c.d.send(head, deadline(entries[c.of[0]].shard))
			if err == nil {
				continue
			}
			for _, i := range c.of {
				if e := &entries[i]; e.hash.lo%c.count == uint64(k) {
					e.req.next = nil
					c.d.settle(e.req, err)
					e.req.release()
					e.req.release()
					e.req, e.cause = nil, causeOf(err)
				}
			}
		}
	}
}

// sendMany queues the entries, but those that it answers in out.
func (l *Limiter) sendMany(reqs []Request, out []Decision, start, deadline int64) []manyEntry {
	entries := make([]manyEntry, len(reqs))
	for i, q := range reqs {
		e := &entries[i]
		e.hash = l.keys.hash(q.Key)
		e.shard = l.ring.owner(e.hash)
		var known bool
		if out[i], known = l.leased(e.shard, e.hash, q.Cost, start); known {
			continue
		}
		if !e.shard.breaker.closed.Load() {
			e.cause = CauseBreaker
			continue
		}
		if out[i], known = l.near(e.shard, e.hash, q.Cost, start); known {
			continue
		}
		e.req = l.ring.newRequest(opCharge, l.rule, e.hash, q.Cost)
		if e.shard.owing() {
			if d, ok := e.shard.untold(l, e.req); ok {
				e.req.release()
				e.req.release()
				e.req, out[i] = nil, d
				continue
			}
		}
		l.lease.beginMany(entries, i, start)
	}
	sendChains(chain(entries, func(s *shard) *dispatcher { return s.charges }), entries,
		func(s *shard) int64 { return s.split(start, deadline) })
	return entries
}
