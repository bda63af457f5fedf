package ringfence

import (
	"cmp"
	"context"
	"errors"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// This file tells a shard, once its primary answers again, what this process admitted out
// of its share meanwhile. It goes as the debit of an entry that grants nobody anything
// (count 0), or of the first call for the key if that comes earlier; at most once: a debit
// whose fate is unknown is dropped and counted, never sent again. What a failure policy
// admitted is not told.

// owed is what one key's shard has not been told. A bucket's is the deficit that is left
// after refilling at this process's part of the rate, a log's what is still in the window.
type owed struct {
	units     int64
	ns        int64        // bucket: how long this process's part of the rate takes for it
	instances int          // of which this process was one
	slices    []localSlice // log
}

// takeOwed takes what the key owes and has not been told. It stays counted: whether the
// shard learns of it is not known yet, and what a replica said before must not be dealt
// out a second time. Of a log it is at most MaxLogCost units at a time, so that no debit
// holds Redis for longer than a call may.
func (s *localState) takeOwed(r *rule, now int64) (o owed) {
	if r.algo == algoSlidingLog {
		s.expire(r, now)
		for i := range s.slices {
			c := &s.slices[i]
			if part := min(c.units-c.told, MaxLogCost-o.units); part > 0 {
				o.slices = append(o.slices, localSlice{number: c.number, units: part})
				o.units += part
				c.told += part
			}
		}
		return o
	}
	own := max(0, s.full-max(now, s.known))
	o.ns, o.instances = own-min(own, s.told), s.instances
	s.told = own
	if o.ns > 0 {
		one := max(1, bucketCost(r, 1, s.instances))
		o.units = min(r.capacity, (o.ns+one-1)/one)
	}
	return o
}

// more says whether something is left to tell, as it is of a log that owed more than one
// debit holds.
func (s *localState) more() bool {
	for i := range s.slices {
		if s.slices[i].units > s.slices[i].told {
			return true
		}
	}
	return false
}

// confirmed drops what the shard knows of now. The share ends with it, unless more is to be
// told: the next one is made of what a replica says then.
func (s *localState) confirmed(now int64, o owed) {
	if ns := rescale(o.ns, o.instances, s.instances); ns > 0 {
		s.full -= min(ns, max(0, s.full-max(now, s.known)))
		s.told = max(0, s.told-ns)
	}
	s.each(o, func(c *localSlice, units int64) {
		units = min(units, c.units)
		c.units -= units
		c.told = max(0, c.told-units)
		s.live -= units
		s.seed.share = max(0, s.seed.share-units)
	})
	s.seeded = s.seeded && s.more()
}

// giveBack makes it owed again, when the shard certainly was not told.
func (s *localState) giveBack(o owed) {
	s.told = max(0, s.told-rescale(o.ns, o.instances, s.instances))
	s.each(o, func(c *localSlice, units int64) { c.told = max(0, c.told-units) })
}

// each calls f on the slices that are left of what was owed.
func (s *localState) each(o owed, f func(c *localSlice, units int64)) {
	for _, was := range o.slices {
		for i := range s.slices {
			if s.slices[i].number == was.number {
				f(&s.slices[i], was.units)
			}
		}
	}
}

// debit is what the script takes; see scripts/frame.lua.
func (o owed) debit(r *rule, now int64) string {
	if r.algo != algoSlidingLog {
		return strconv.FormatInt(o.units, 10)
	}
	var b strings.Builder
	length := r.sliceLength()
	for _, c := range o.slices {
		// As young as it can be: rather a 64th of a window too long than too short.
		age := max(0, now-(c.number+1)*length) / 1000
		for left := c.units; left > 0; left -= MaxLogCost {
			if b.Len() > 0 {
				b.WriteByte(',')
			}
			b.WriteString(strconv.FormatInt(min(left, MaxLogCost), 10))
			b.WriteByte('@')
			b.WriteString(strconv.FormatInt(age, 10))
		}
	}
	return b.String()
}

// refund takes back what was counted here and has been charged by the primary after all.
func (s *localState) refund(r *rule, now, cost int64) {
	if r.algo != algoSlidingLog {
		own := max(0, s.full-max(now, s.known))
		s.full -= min(own, bucketCost(r, cost, max(1, s.instances)))
		return
	}
	for k := len(s.slices) - 1; k >= 0 && cost > 0; k-- {
		part := min(cost, s.slices[k].units)
		s.slices[k].units -= part
		s.slices[k].told = min(s.slices[k].told, s.slices[k].units)
		s.live -= part
		cost -= part
	}
}

// The fates of a request whose caller left after it was sent. Two sides come to know one
// half each, in either order; the second draws the conclusion.
const (
	fateOpen    uint32 = iota
	fateShared         // the ladder took it out of the share
	fateCharged        // the primary charged it
	fateEnded          // it did not, or nobody knows
)

// conclude notes one half. If the call was charged twice, the local half is taken back.
// Until the other half is known nothing of the key is told: it could be that half.
func (s *shard) conclude(r *request, half uint32) {
	other := s.ledger.conclude(r, half)
	if other == fateOpen || half == fateShared && other != fateCharged {
		return
	}
	if half != fateEnded {
		now := s.ring.clock()
		s.ring.local.find(r.hash, func(e *localEntry) { e.refund(r.rule, now, r.cost) })
	}
	if half != fateShared && s.ledger.unhold(r) {
		s.catchUp()
	}
}

// ledger are the keys of one shard that owe, or whose debit is on its way.
type ledger struct {
	count atomic.Int64 // of keys; lets callers pass by without the lock

	mu   sync.Mutex // guards keys and what they hold; taken before localTable.mu
	keys map[keyHash]*debt
}

// debt is what one key's shard is to be told.
type debt struct {
	of      *Limiter
	owes    bool // the shard is to be told
	telling bool // a debit is on its way
	held    int  // calls that the primary may still turn out to have charged itself
}

// ready says whether a debit may go.
func (d *debt) ready() bool { return d.owes && !d.telling && d.held == 0 }

// conclude notes one half of a request's fate and returns the other. Of a call out of the
// share that may turn out to be charged the key is held.
func (g *ledger) conclude(r *request, half uint32) (other uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	other = r.fate.Swap(half)
	if d := g.keys[r.hash]; half == fateShared && other == fateOpen && d != nil {
		d.held++
		r.holds = true
	}
	return other
}

// unhold takes the request's hold off, if it has one, and says whether a debit may go now.
func (g *ledger) unhold(r *request) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	d := g.keys[r.hash]
	if d == nil || !r.holds {
		return false
	}
	r.holds = false
	if d.held = max(0, d.held-1); !d.owes && !d.telling && d.held == 0 {
		delete(g.keys, r.hash)
		g.count.Store(int64(len(g.keys)))
	}
	return d.ready()
}

// add notes that a key owes.
func (g *ledger) add(h keyHash, l *Limiter) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.keys == nil {
		g.keys = map[keyHash]*debt{}
	}
	d := g.keys[h]
	if d == nil {
		d = &debt{}
		g.keys[h] = d
	}
	d.of, d.owes = l, true
	g.count.Store(int64(len(g.keys)))
}

// tidy looks at some keys, and drops those of which nothing is counted any more and which
// therefore owe nothing.
func (g *ledger) tidy(counted func(keyHash) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	looked := 0
	for h, d := range g.keys { // in random order
		if !d.telling && d.held == 0 && !counted(h) {
			delete(g.keys, h)
		}
		if looked++; looked >= 128 {
			break
		}
	}
	g.count.Store(int64(len(g.keys)))
}

// standing says whether a key is in the ledger, and whether a debit of it may go now.
func (g *ledger) standing(h keyHash) (pending, owes bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	d := g.keys[h]
	return d != nil, d != nil && d.ready()
}

// begin notes that the debit of a key is on its way, if it owes and none is yet.
func (g *ledger) begin(h keyHash) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	d := g.keys[h]
	if d == nil || !d.ready() {
		return false
	}
	d.telling, d.owes = true, false
	return true
}

// end notes that the debit has arrived or is given up, and says whether the key owes
// since.
func (g *ledger) end(h keyHash) (owes bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	d := g.keys[h]
	if d == nil {
		return false
	}
	if d.telling = false; !d.owes && d.held == 0 {
		delete(g.keys, h)
		g.count.Store(int64(len(g.keys)))
	}
	return d.owes
}

// debtor is a key that owes, and whose it is.
type debtor struct {
	hash keyHash
	of   *Limiter
}

// some are up to n of the keys whose debit may go, in the order of their hashes, so that the
// same keys are told in the same way each time.
func (g *ledger) some(n int) []debtor {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]debtor, 0, min(n, len(g.keys)))
	for h, d := range g.keys {
		if len(out) == n {
			break
		}
		if d.ready() {
			out = append(out, debtor{h, d.of})
		}
	}
	slices.SortFunc(out, func(a, b debtor) int {
		return cmp.Or(cmp.Compare(a.hash.hi, b.hash.hi), cmp.Compare(a.hash.lo, b.hash.lo))
	})
	return out
}

// untold answers a call for a key of which the shard has not been told everything: on
// another connection it could overtake the debit, and be admitted out of what is used up.
// Until the debit has arrived the key's share goes on; what it admits now is told next.
// ok is false if the primary is to be asked after all, with the debit on r if there is one.
func (s *shard) untold(l *Limiter, r *request) (d Decision, ok bool) {
	pending, owes := s.ledger.standing(r.hash)
	if !pending {
		return d, false
	}
	charge := r.kind == opCharge
	if owes && charge && !s.degraded.Load() {
		s.attach(r, l)
		if r.debit != "" {
			return d, false
		}
	}
	if owes && s.degraded.Load() {
		// Debits are not risked on a primary that keeps callers waiting.
		s.tryAgain()
	}
	if d, ok = s.decideShare(l, r.hash, r.cost, charge, nil, anyEpoch); !ok {
		return d, false // it has arrived this very moment
	}
	return s.fell(l, d, modeShare, CauseBudget, charge), true
}

// catchUp tells what was left over because no call came along.
func (s *shard) catchUp() {
	switch {
	case !s.owing() || !s.breaker.closed.Load():
	case s.degraded.Load():
		s.tryAgain()
	default:
		s.settleSoon()
	}
}

// tryAgain finds out in the background whether a primary that failed, or kept callers
// waiting, takes charges again: until one probe gets through, or the breaker opens and
// goes on probing, with the breaker's back-off in between.
func (s *shard) tryAgain() {
	if !s.trying.CompareAndSwap(false, true) {
		return
	}
	if !s.ring.enter() {
		s.trying.Store(false)
		return
	}
	go func() {
		defer s.ring.leave()
		defer s.trying.Store(false)
		for try := 1; s.degraded.Load() && s.tryOnce(); try++ {
			c := s.ring.config
			select {
			case <-time.After(openPeriod(c.Breaker, try, c.Rand())):
			case <-s.ring.ctx.Done():
				return
			}
		}
	}()
}

// tryOnce is one probe, reported to the breaker like an operation. It says whether to go
// on.
func (s *shard) tryOnce() bool {
	report, err := s.breaker.begin()
	if err != nil {
		return false
	}
	err = errProbeLost
	defer func() { report(s.charges.verdict(opCharge, err)) }()
	s.inTime(func(ctx context.Context) { err = s.nodes[s.primary.Load()].charge(ctx, nil) })
	if err != nil {
		s.failed(err)
		return true
	}
	s.answered()
	return false
}

// attach puts what the key owes onto a request that is about to be sent.
func (s *shard) attach(r *request, l *Limiter) {
	if !s.ledger.begin(r.hash) {
		return
	}
	now := s.ring.clock()
	s.ring.local.find(r.hash, func(e *localEntry) {
		o := e.takeOwed(r.rule, now)
		if o.units > 0 {
			r.owed, r.debit, r.from = o, o.debit(r.rule, now), l
		}
	})
	if r.debit == "" {
		s.ledger.end(r.hash)
	}
}

// settled hears what became of a request with a debit.
func (s *shard) settled(r *request, err error) {
	switch {
	case r.back > 0:
		s.returned(r, err)
		return
	case err == nil && r.status == statusDecided:
		s.metrics.settled(r.owed.units)
		now := s.ring.clock()
		s.ring.local.find(r.hash, func(e *localEntry) { e.confirmed(now, r.owed) })
	case err != nil && (notSent(err) || !classify(err).ran):
		s.ring.local.find(r.hash, func(e *localEntry) { e.giveBack(r.owed) })
		s.ledger.add(r.hash, r.from)
	default:
		s.metrics.settleLost(r.owed.units)
	}
	more := false
	s.ring.local.find(r.hash, func(e *localEntry) { more = e.more() })
	if more {
		s.ledger.add(r.hash, r.from)
	}
	if s.ledger.end(r.hash) && err == nil {
		s.settleSoon() // what was admitted while the debit was on its way
	}
}

// notSent says whether a request failed before anything left this process.
func notSent(err error) bool {
	return errors.Is(err, errOpen) || errors.Is(err, errBudget) || errors.Is(err, errOverdue) || errors.Is(err, errQueueFull) ||
		errors.Is(err, ErrClosed)
}

// forfeit counts, when all operations have ended for good, what the shard has not been told
// and will never be.
func (s *shard) forfeit() {
	now, units := s.ring.clock(), int64(0)
	owing := s.ledger.some(math.MaxInt)
	for _, k := range owing {
		s.ring.local.find(k.hash, func(e *localEntry) {
			for o := e.takeOwed(k.of.rule, now); o.units > 0; o = e.takeOwed(k.of.rule, now) {
				units += o.units
			}
		})
	}
	if units > 0 {
		s.metrics.settleLost(units)
		s.ring.log.warn(s.id, "forfeit", "the ring was closed before the shard had been told all that this process admitted out of shares; the shard admits it once more",
			"shard", s.id, "units", units, "keys", len(owing))
	}
}

// owing says whether any key of the shard is in the ledger.
func (s *shard) owing() bool { return s.ledger.count.Load() > 0 }

// settleSoon tells the shard everything in the background, one batch after another, while
// it answers.
func (s *shard) settleSoon() {
	if s.ledger.count.Load() == 0 || !s.ring.enter() {
		return
	}
	if !s.settling.CompareAndSwap(false, true) {
		s.ring.leave()
		return
	}
	go func() {
		defer s.ring.leave()
		defer s.settling.Store(false)
		for s.breaker.closed.Load() && s.ring.ctx.Err() == nil {
			if !s.settleSome() {
				return
			}
		}
	}()
}

// settleSome tells one batch, and says whether it got through and there is more.
func (s *shard) settleSome() bool {
	most := s.ring.clock() + int64(s.ring.config.OperationTimeout)
	var sent []*request
	some := s.ledger.some(s.ring.config.MaxBatch)
	ok := len(some) > 0
	for _, k := range some {
		r := s.ring.newRequest(opCharge, k.of.rule, k.hash, 1)
		r.count = 0
		s.attach(r, k.of)
		if r.debit == "" {
			r.release()
			r.release()
			continue
		}
		if err := s.charges.send(r, most); err != nil {
			s.settled(r, errOpen)
			r.release()
			r.release()
			ok = false
			break
		}
		sent = append(sent, r)
	}
	for _, r := range sent {
		if _, err := s.charges.wait(context.Background(), r); err != nil {
			ok = false
		}
		r.release()
	}
	return ok
}
