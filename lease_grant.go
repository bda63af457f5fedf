package ringfence

import (
	"context"
	"sync/atomic"
	"time"
)

// grant is quota that was taken ahead: one lease. It is as long as a cache line of most
// processors.
type grant struct {
	left      atomic.Int64  // -1-n: it was closed with n left
	until     int64         // ns of the ring's clock
	asked     int64         // before the charge left
	remaining int64         // what the primary had left then
	reset     time.Duration // until nothing is used, as of asked
	score     int64         // log: of its units
	units     int32         // MaxLogCost at most
	low       int32         // with so much left, the next one is asked for
	ahead     atomic.Bool   // it has been
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

// open undoes close, unless the lease was never closed with so much left.
func (g *grant) open(rest int64) bool { return rest > 0 && g.left.CompareAndSwap(-1-rest, rest) }

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

	asking atomic.Bool                   // one asks at a time
	way    atomic.Uint32                 // what is on its way for him: toHere, toThere
	back   atomic.Int64                  // the server's us at which units were last returned
	landed atomic.Pointer[chan struct{}] // closed when it has arrived, if anybody waits for it
	call   atomic.Pointer[manyEntry]     // the first entry of the AllowMany that asks

	// What follows is his who asks.
	second bool  // the next lease is not the first
	cost   int64 // of the call that last asked
	chunk  int64 // units that the last lease was meant to have; 0: none yet
	given  int64 // units that there were to use since
}

// What can be on its way between this process and the primary.
const (
	toHere  uint32 = 1 << iota // a lease
	toThere                    // units that are returned
)

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
	k.way.Store(0)
	k.call.Store(nil)
	k.asking.Store(false)
	if c := k.landed.Swap(nil); c != nil {
		close(*c)
	}
	k.of.claims.leave()
}

// await waits until what is on its way has arrived, for as long as there is time.
func (k *leaseKey) await(ctx context.Context, left time.Duration) {
	own := make(chan struct{})
	c := &own
	for !k.landed.CompareAndSwap(nil, c) {
		if is := k.landed.Load(); is != nil {
			c = is
			break
		}
	}
	if k.way.Load() == 0 { // it has, perhaps before anybody could tell
		return
	}
	t := time.NewTimer(left)
	defer t.Stop()
	select {
	case <-*c:
	case <-t.C:
	case <-ctx.Done():
	}
}

// add keeps a lease, and says whether it may be used. The caller has claimed the key.
func (k *leaseKey) add(g *grant) bool {
	if g.asked <= k.reset.Load() {
		return false
	}
	if !k.put(g) { // what is there has been used up, or nearly
		k.grants[1].Store(g)
	}
	k.given += int64(g.units)
	return g.asked > k.reset.Load()
}

// put puts a lease where there is room.
func (k *leaseKey) put(g *grant) bool {
	return k.grants[0].CompareAndSwap(nil, g) || k.grants[1].CompareAndSwap(nil, g)
}

// due says whether something is left of a lease that has not ended and began by then.
func (k *leaseKey) due(begun, now int64) bool {
	for i := range k.grants {
		if g := k.grants[i].Load(); g.rest(now) > 0 && g.asked <= begun {
			return true
		}
	}
	return false
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
