package ringfence

import (
	"sync/atomic"
	"time"
)

// grant is quota that was taken ahead: one lease. What calls need comes first, and it is as
// long as two cache lines of most processors, of which they touch one.
type grant struct {
	left  atomic.Int64 // -1-n: it was closed with n left
	until int64        // ns of the ring's clock
	asked int64        // before the charge left
	low   int64        // with so much left, the next one is asked for
	ahead atomic.Bool  // it has been

	remaining int64         // what the primary had left then
	reset     time.Duration // until nothing is used, as of asked

	key   *leaseKey
	units int64
	score int64 // log: of its units
	due   int64 // when it is to be returned; guarded by leasing.mu
	_     [5]int64
}

// take takes cost units, if there are as many, and returns what is left of them.
func (g *grant) take(cost int64) (left int64, ok bool) {
	for {
		n := g.left.Load()
		if n < cost {
			return 0, false
		}
		if g.left.CompareAndSwap(n, n-cost) {
			return n - cost, true
		}
	}
}

// close takes what is left, for good. Only the first call gets anything.
func (g *grant) close() (rest int64) {
	for {
		n := g.left.Load()
		if n < 0 {
			return 0
		}
		if g.left.CompareAndSwap(n, -1-n) {
			return n
		}
	}
}

// unused is what nobody took, whether it was closed since or not.
func (g *grant) unused() int64 {
	n := g.left.Load()
	if n < 0 {
		return -1 - n
	}
	return n
}

// rest is what can be taken now.
func (g *grant) rest(now int64) int64 {
	if g == nil || now >= g.until {
		return 0
	}
	return max(0, g.left.Load())
}

// leaseKey is what this process holds of one key. What calls need comes first, as in grant.
type leaseKey struct {
	hash   keyHash
	grants [2]atomic.Pointer[grant] // one in use, one that was asked for in advance
	of     *leasing
	// reset is when the key was last Reset: what was asked for before is not used.
	reset atomic.Int64
	room  atomic.Int64 // what was left when the primary was last asked
	since atomic.Int64 // when it was last claimed

	asking atomic.Bool // one asks at a time, and what follows is his
	second bool        // the next lease is not the first
	cost   int64       // of the call that last asked
	chunk  int64       // units that the last lease was meant to have; 0: none yet
	given  int64       // units that there were to use since
	_      [4]int64
}

// take takes cost units out of a lease: of the one that ends first, if both have as many.
// rest is what is left of both, and newest the one that knows what else there is: what it took
// the older one counts as left still.
func (k *leaseKey) take(cost, now int64) (g, newest *grant, left, rest int64) {
	first, second := &k.grants[0], &k.grants[1]
	a, b := first.Load(), second.Load()
	if a == nil || (b != nil && b.until < a.until) {
		first, a, b = second, b, a
	}
	if a == nil {
		return nil, nil, 0, 0
	}
	if newest = b; b == nil {
		newest = a
	}
	if now < a.until {
		if left, ok := a.take(cost); ok {
			if left == 0 {
				first.CompareAndSwap(a, nil) // so that nobody looks at it any more
			}
			return a, newest, left, left + b.rest(now)
		}
	}
	if b != nil && now < b.until {
		if left, ok := b.take(cost); ok {
			return b, newest, left, left + a.rest(now)
		}
	}
	return nil, nil, 0, 0
}

// rest is what can be taken now, in one or two takes.
func (k *leaseKey) rest(now int64) int64 {
	return k.grants[0].Load().rest(now) + k.grants[1].Load().rest(now)
}

// claim begins to ask the primary, for a chunk of units, if nobody does already. Who was
// let in calls asked when it is over. own are the units of the call that asks.
func (k *leaseKey) claim(own, now int64) (chunk int64, ok bool) {
	if !k.asking.CompareAndSwap(false, true) {
		return 0, false
	}
	if !k.of.claims.enter() { // Close returns what there is
		k.asking.Store(false)
		return 0, false
	}
	used, held := k.given, int64(0)
	for i := range k.grants {
		g := k.grants[i].Load()
		if g == nil {
			continue
		}
		rest := g.rest(now)
		used -= g.unused()
		if held += rest; rest == 0 {
			k.grants[i].CompareAndSwap(g, nil)
		}
	}
	k.size(used, max(now-k.since.Load(), int64(time.Microsecond)))
	k.since.Store(now)
	if k.given = own + held; own > 0 {
		k.cost = own
	}
	return min(k.chunk, k.of.bound, k.room.Load()/leaseOfRemaining), true
}

// size says how many units the next lease is to have, when used have been used in the time
// since the last one. A lease that is in use is renewed in one request, however much of it
// goes back, so it may be too large: it is four times what is used in a life. If that is
// no more than one call, there is none.
func (k *leaseKey) size(used, elapsed int64) {
	ls, call := k.of, max(1, k.cost)
	if k.chunk == 0 {
		k.chunk = ls.start()
		return
	}
	demand := float64(used) * float64(ls.life) / float64(elapsed)
	if !k.second && k.chunk > 1 {
		ls.learn((used - k.cost) / call) // but for the call that asked
	}
	k.second = true
	switch {
	case demand < 1.5*float64(call):
		k.chunk = 1
	case demand < float64(ls.bound):
		k.chunk = min(4*int64(demand), ls.bound)
	default:
		k.chunk = ls.bound
	}
}

// asked ends what claim began.
func (k *leaseKey) asked() {
	k.asking.Store(false)
	k.of.claims.leave()
}

// add keeps a lease, and says whether it may be used. The caller has claimed the key.
func (k *leaseKey) add(g *grant) bool {
	if g.asked <= k.reset.Load() {
		return false
	}
	for i := range k.grants {
		if k.grants[i].Load() == nil || i == len(k.grants)-1 {
			k.grants[i].Store(g)
			break
		}
	}
	k.given += g.units
	return g.asked > k.reset.Load()
}

// drop gives up what is held without returning it, and what is on its way.
func (k *leaseKey) drop(now int64) {
	for {
		was := k.reset.Load()
		if was >= now || k.reset.CompareAndSwap(was, now) {
			break
		}
	}
	for i := range k.grants {
		if g := k.grants[i].Load(); g != nil {
			g.close()
		}
	}
}

// retire says whether the key can be forgotten. Then it is claimed for good, so that whoever
// has found it before takes no lease that nobody would find.
func (k *leaseKey) retire(now int64) bool {
	if now-k.since.Load() <= int64(MaxLease) || !k.asking.CompareAndSwap(false, true) {
		return false
	}
	if k.rest(now) > 0 || now-k.since.Load() <= int64(MaxLease) {
		k.asking.Store(false)
		return false
	}
	return true
}
