package ringfence

import (
	"context"
	"math"
	"sync"
	"time"
)

// leaseLooks is the most leases looked at in one go, while nobody else can add one.
const leaseLooks = 1024

// grantQueue are the leases of a limiter, until they are returned, in the order in which
// they began.
type grantQueue struct {
	all  []*grant
	head int
}

func (q *grantQueue) push(g *grant) { q.all = append(q.all, g) }

// pop takes the first out, if it is due.
func (q *grantQueue) pop(now int64) *grant {
	if q.next() > now {
		return nil
	}
	g := q.all[q.head]
	q.all[q.head] = nil
	if q.head++; 2*q.head >= len(q.all) {
		n := copy(q.all, q.all[q.head:])
		clear(q.all[n:])
		q.all, q.head = q.all[:n], 0
	}
	return g
}

// next is when the first is due, never if there is none.
func (q *grantQueue) next() int64 {
	if q.head == len(q.all) {
		return never
	}
	return q.all[q.head].due
}

// watch sees to it that a lease is returned. It says no once the ring is being closed.
func (ls *leasing) watch(g *grant, now int64) bool {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.ended {
		return false
	}
	g.due = g.asked + ls.life*7/8
	ls.queue.push(g)
	ls.arm(now)
	return true
}

// arm sets the timer for the next look. It does not go off more often than 32 times in a
// life.
func (ls *leasing) arm(now int64) {
	next := ls.queue.next()
	if ls.armed || ls.ended || next == never {
		return
	}
	ls.armed = true
	after := time.Duration(max(next-now, ls.life/32))
	if ls.timer == nil {
		ls.timer = time.AfterFunc(after, ls.look)
	} else {
		ls.timer.Reset(after)
	}
}

// look renews the leases that end soon, or returns them where they have hardly been used.
func (ls *leasing) look() {
	r := ls.of.ring
	if !r.enter() {
		return // Close returns them
	}
	defer r.leave()
	for more := true; more; {
		var back []manyEntry
		now := r.clock()
		back, more = ls.due(now)
		ls.sendAll(back, now+int64(ls.of.budget))
	}
}

// sendAll sends requests and waits for what becomes of them, so that there are never many of
// them before those that callers wait for.
func (ls *leasing) sendAll(back []manyEntry, deadline int64) {
	sendChains(chain(back, func(s *shard) *dispatcher { return s.charges }), back, func(*shard) int64 { return deadline })
	for i := range back {
		if r := back[i].req; r != nil {
			_, _ = back[i].shard.charges.wait(context.Background(), r) // what is lost is lost
			r.release()
		}
	}
}

// due are up to a batch of requests that return or renew the leases that are due; more of
// them if it says so, else it has set the timer.
func (ls *leasing) due(now int64) (back []manyEntry, more bool) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for range leaseLooks {
		if len(back) >= 4*ls.of.ring.config.MaxBatch {
			break
		}
		g := ls.queue.pop(now)
		if g == nil {
			ls.armed = false
			ls.arm(now)
			return back, false
		}
		if g.left.Load() <= 0 || now >= g.until {
			continue
		}
		s := ls.of.ring.owner(g.key.hash)
		if !s.takesReturns() {
			g.due = now + ls.life/32 // it can still be used
			ls.queue.push(g)
			continue
		}
		if r := ls.conclude(s, g, now); r != nil {
			back = append(back, manyEntry{hash: r.hash, shard: s, req: r})
		}
	}
	return back, true
}

// conclude is the request that returns what is held of a key and, if that is in use, asks
// for the next lease; not while the shard has not been told everything, which the lease could
// overtake.
func (ls *leasing) conclude(s *shard, g *grant, now int64) *request {
	chunk, ok := g.key.claim(0, now)
	if !ok {
		r := ls.newRequest(g.key)
		r.heir = nil
		ls.back(r, g, g.close())
		return r.orNothing()
	}
	r := ls.newRequest(g.key)
	ls.giveBack(r, g.key, now)
	if chunk > 1 && !s.owing() {
		ls.want(r, chunk, now)
	}
	return r.orNothing()
}

// orNothing is the request if there is something to ask for.
func (r *request) orNothing() *request {
	if r.debit != "" || r.wants > 0 {
		return r
	}
	r.release()
	r.release()
	return nil
}

// takesReturns says whether the shard is well: nothing is risked on one that is not.
func (s *shard) takesReturns() bool { return s.breaker.closed.Load() && !s.degraded.Load() }

// giveUp returns units of a lease that nobody has seen yet, if there are any.
func (ls *leasing) giveUp(g *grant, units, now int64) {
	if units < 1 {
		return
	}
	r := ls.newRequest(g.key)
	r.heir = nil
	ls.back(r, g, units)
	ls.send(ls.of.ring.owner(r.hash), r, now)
}

// returnLeases returns the leases of all limiters.
func (r *Ring) returnLeases(cut time.Time) {
	var wg sync.WaitGroup
	for _, l := range r.allLimiters() {
		if l.lease != nil {
			wg.Go(func() { l.lease.returnAll(cut) })
		}
	}
	wg.Wait()
}

// returnAll returns everything, for Close: nobody calls any more. It ends by cut. What is
// held goes first, and then what was asked for in advance: a shard that keeps that waiting
// must not keep the others' from being returned.
func (ls *leasing) returnAll(cut time.Time) {
	ls.claims.close()
	ls.returnHeld(cut)
	await(cut, ls.claims.idle)
	ls.mu.Lock()
	ls.ended = true
	if ls.timer != nil {
		ls.timer.Stop()
	}
	ls.mu.Unlock()
	ls.returnHeld(cut)
}

// returnHeld returns what is held now.
func (ls *leasing) returnHeld(cut time.Time) {
	for more := true; more && time.Now().Before(cut); {
		now := ls.of.ring.clock()
		var back []manyEntry
		back, more = ls.allHeld(now)
		ls.sendAll(back, now+int64(time.Until(cut)))
	}
}

// allHeld are requests that return what is held, more of them if it says so.
func (ls *leasing) allHeld(now int64) (back []manyEntry, more bool) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for range leaseLooks {
		g := ls.queue.pop(math.MaxInt64 - 1)
		if g == nil {
			return back, false
		}
		s := ls.of.ring.owner(g.key.hash)
		if now >= g.until || !s.takesReturns() {
			continue
		}
		r := ls.newRequest(g.key)
		r.heir = nil
		ls.back(r, g, g.close())
		if r = r.orNothing(); r != nil {
			back = append(back, manyEntry{hash: r.hash, shard: s, req: r})
		}
	}
	return back, true
}
