package ringfence

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// This file tells a shard, once its primary answers again, what this process admitted out
// of its share meanwhile. It goes as the debit of an entry that grants nobody anything
// (count 0), or of the first call for the key if that comes earlier; at most once: a debit
// whose fate is unknown is dropped and counted, never sent again. What a failure policy
// admitted is not told.

// owed is what one key's shard has not been told. A bucket's is the deficit that is left
// after refilling at this process's part of the rate, a log's what is still in the window.
type owed struct {
	units  int64
	ns     int64        // bucket: how long this process's part of the rate takes for it
	slices []localSlice // log
}

// takeOwed takes what the key owes and has not been told. It stays counted: whether the
// shard learns of it is not known yet, and what a replica said before must not be dealt
// out a second time.
func (s *localState) takeOwed(r *rule, now int64, instances int) (o owed) {
	if r.algo == algoSlidingLog {
		s.expire(r, now)
		for i := range s.slices {
			c := &s.slices[i]
			if part := c.units - c.told; part > 0 {
				o.slices = append(o.slices, localSlice{number: c.number, units: part})
				o.units += part
				c.told = c.units
			}
		}
		return o
	}
	own := max(0, s.full-max(now, s.known))
	o.ns = own - min(own, s.told)
	s.told = own
	if o.ns > 0 {
		one := max(1, bucketCost(r, 1, instances))
		o.units = min(r.capacity, (o.ns+one-1)/one)
	}
	return o
}

// confirmed drops what the shard knows of now. The share ends with it: the next one is
// made of what a replica says then.
func (s *localState) confirmed(now int64, o owed) {
	s.seeded = false
	if o.ns > 0 {
		part := min(o.ns, max(0, s.full-max(now, s.known)))
		s.full -= part
		s.told = max(0, s.told-o.ns)
	}
	s.each(o, func(c *localSlice, units int64) {
		units = min(units, c.units)
		c.units -= units
		c.told = max(0, c.told-units)
		s.live -= units
	})
}

// giveBack makes it owed again, when the shard certainly was not told.
func (s *localState) giveBack(o owed) {
	s.told = max(0, s.told-o.ns)
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
func (s *localState) refund(r *rule, now, cost int64, instances int) {
	if r.algo != algoSlidingLog {
		own := max(0, s.full-max(now, s.known))
		s.full -= min(own, bucketCost(r, cost, instances))
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
)

// conclude notes one half. If both are true, the call was charged twice, and the local
// half is taken back.
func (s *shard) conclude(r *request, half uint32) {
	if other := r.fate.Swap(half); other == fateOpen || other == half {
		return
	}
	now := s.ring.clock()
	s.ring.local.find(r.hash, func(e *localEntry) { e.refund(r.rule, now, r.cost, s.ring.config.Instances) })
}

// ledger are the keys of one shard that owe.
type ledger struct {
	count atomic.Int64 // of keys; lets callers pass by without the lock

	mu   sync.Mutex // guards keys; taken before localTable.mu
	keys map[keyHash]*Limiter
}

func (g *ledger) add(h keyHash, l *Limiter) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.keys == nil {
		g.keys = map[keyHash]*Limiter{}
	}
	g.keys[h] = l
	g.count.Store(int64(len(g.keys)))
}

func (g *ledger) remove(h keyHash) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, there := g.keys[h]
	delete(g.keys, h)
	g.count.Store(int64(len(g.keys)))
	return there
}

// some are up to n of the keys.
func (g *ledger) some(n int) map[keyHash]*Limiter {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make(map[keyHash]*Limiter, min(n, len(g.keys)))
	for h, l := range g.keys {
		if len(out) == n {
			break
		}
		out[h] = l
	}
	return out
}

// owing says whether calls are to tell debits along the way: not while the primary keeps
// callers waiting, or debits would be lost.
func (s *shard) owing() bool { return s.ledger.count.Load() > 0 && !s.degraded.Load() }

// attach puts what the key owes onto a request that is about to be sent.
func (s *shard) attach(r *request, l *Limiter) {
	if !s.ledger.remove(r.hash) {
		return
	}
	now := s.ring.clock()
	s.ring.local.find(r.hash, func(e *localEntry) {
		o := e.takeOwed(r.rule, now, s.ring.config.Instances)
		if o.units > 0 {
			r.owed, r.debit, r.from = o, o.debit(r.rule, now), l
		}
	})
}

// settled hears what became of a request with a debit.
func (s *shard) settled(r *request, err error) {
	l := r.from
	switch {
	case err == nil && r.status == statusDecided:
		s.metrics.settled(r.owed.units)
		now := s.ring.clock()
		s.ring.local.find(r.hash, func(e *localEntry) { e.confirmed(now, r.owed) })
	case err != nil && (notSent(err) || !classify(err).ran):
		s.ring.local.find(r.hash, func(e *localEntry) { e.giveBack(r.owed) })
		s.ledger.add(r.hash, l)
	default:
		s.metrics.settleLost(r.owed.units)
	}
}

// notSent says whether a request failed before anything left this process.
func notSent(err error) bool {
	return errors.Is(err, errOpen) || errors.Is(err, errBudget) || errors.Is(err, errOverdue) || errors.Is(err, errQueueFull)
}

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
	ok := true
	for h, l := range s.ledger.some(s.ring.config.MaxBatch) {
		r := newRequest(opCharge, l.rule, h, s.ring.space, 1)
		r.count = 0
		s.attach(r, l)
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
	return ok && s.ledger.count.Load() > 0
}
