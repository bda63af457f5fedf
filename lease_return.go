package ringfence

import (
	"context"
	"math"
	"sync"
	"time"
)

// leaseLooks is the most leases looked at in one go, while nobody else can add one.
const leaseLooks = 1024

// leaseQueue are the keys of a limiter that have leases, once for each lease, in the order in
// which those are due.
type leaseQueue struct {
	all  []dueLease
	head int
}

type dueLease struct {
	key *leaseKey
	at  int64
}

func (q *leaseQueue) push(k *leaseKey, at int64) { q.all = append(q.all, dueLease{k, at}) }

// pop takes the first out.
func (q *leaseQueue) pop() *leaseKey {
	k := q.all[q.head].key
	q.all[q.head].key = nil
	if q.head++; 2*q.head >= len(q.all) {
		n := copy(q.all, q.all[q.head:])
		clear(q.all[n:])
		q.all, q.head = q.all[:n], 0
	}
	return k
}

// next is when the first is due, never if there is none.
func (q *leaseQueue) next() int64 {
	if q.head == len(q.all) {
		return never
	}
	return q.all[q.head].at
}

// leaseQueues are the leases that have not been looked at yet, and those that are to be
// looked at again: each in order.
type leaseQueues struct{ first, again leaseQueue }

func (q *leaseQueues) next() int64 { return min(q.first.next(), q.again.next()) }

// pop takes the first out, if it is due.
func (q *leaseQueues) pop(now int64) *leaseKey {
	switch first, again := q.first.next(), q.again.next(); {
	case min(first, again) > now:
		return nil
	case again <= first:
		return q.again.pop()
	}
	return q.first.pop()
}

// patience is how long a lease is left alone.
func (ls *leasing) patience() int64 { return ls.life * 7 / 8 }

// pause is the least time between two looks.
func (ls *leasing) pause() int64 { return ls.life / 32 }

// watch sees to it that a key is looked at when a lease of it is due. It says no once the
// ring is being closed.
func (ls *leasing) watch(k *leaseKey, at, now int64) bool {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.ended {
		return false
	}
	ls.queue.first.push(k, at)
	ls.arm(now)
	return true
}

// watchAgain is watch for a lease that could not be returned when it was due.
func (ls *leasing) watchAgain(k *leaseKey, now int64) bool {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.ended {
		return false
	}
	ls.queue.again.push(k, now+ls.pause())
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
	after := time.Duration(max(next-now, ls.pause()))
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
		k := ls.queue.pop(now)
		if k == nil {
			ls.armed = false
			ls.arm(now)
			return back, false
		}
		if !k.due(now-ls.patience(), now) {
			continue
		}
		s := ls.of.ring.owner(k.hash)
		if !s.takesReturns() {
			ls.queue.again.push(k, now+ls.pause()) // it can still be used
			continue
		}
		chunk, ok := k.claim(0, now)
		if !ok {
			ls.queue.again.push(k, now+ls.pause())
			continue
		}
		if r := ls.conclude(s, k, chunk, now); r != nil {
			back = append(back, manyEntry{hash: r.hash, shard: s, req: r})
		}
	}
	return back, true
}

// conclude is the request that returns what is held of a key and, if that is in use, asks
// for the next lease; not while the shard has not been told everything, which the lease could
// overtake.
func (ls *leasing) conclude(s *shard, k *leaseKey, chunk, now int64) *request {
	r := ls.newRequest(k)
	ls.giveBack(r, k, now)
	if chunk > 1 && !s.owing() {
		ls.want(r, k, chunk, now)
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

// lent are units of a lease on their way back.
type lent struct {
	key   *leaseKey
	grant *grant
	word  grantWord // as lend left it; 0: nothing
}

func (b lent) units() int64 { return b.word.left() }

// returned hears what became of a request that returns units. Those that certainly have not
// arrived are used here again; of others nobody knows, so that nobody uses them.
func (s *shard) returned(r *request, err error) {
	ls, now, k := r.from.lease, s.ring.clock(), r.lent[0].key
	switch {
	case err == nil && r.status == statusDecided:
		ls.returned.Add(r.back)
		// What was denied meanwhile may be admitted now.
		s.ring.near.drop(r.hash, now)
		k.back.Store(r.now)
	case err == nil || notSent(err) || notBegun(err):
		for _, b := range r.lent {
			if b.key != nil && ls.reopen(b, now) && r.heir == k {
				k.given += int16(b.units())
			}
		}
	}
	if r.heir == k { // last: who sees nothing on its way is to see what came of it
		k.way.And(^toThere)
	}
}

// notBegun says whether the server certainly ran nothing of a script call. Of permissions that
// are missing it finds out in the middle, and of what TLS says after a command nobody knows
// whether that was before it.
func notBegun(err error) bool {
	t := classify(err)
	return !t.ran && t != typeNoPerm && t != typeDial && t != typeWrongType
}

// reopen puts units back where they were, unless the lease has ended or the key was Reset.
func (ls *leasing) reopen(b lent, now int64) bool {
	k, g := b.key, b.grant
	asked := g.asked.Load() // if that is of another lease, open will see it
	if now >= ls.end(asked) || asked <= k.reset.Load() || !g.open(b.word) {
		return false
	}
	if asked <= k.reset.Load() || !ls.watchAgain(k, now) {
		g.close(b.word &^ (grantClosed | grantLent))
		return false
	}
	return true
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
		k := ls.queue.pop(math.MaxInt64 - 1)
		if k == nil {
			return back, false
		}
		s := ls.of.ring.owner(k.hash)
		if !s.takesReturns() {
			continue
		}
		r := ls.newRequest(k)
		r.heir = nil
		ls.takeOut(r, k, now)
		if r = r.orNothing(); r != nil {
			back = append(back, manyEntry{hash: r.hash, shard: s, req: r})
		}
	}
	return back, true
}
