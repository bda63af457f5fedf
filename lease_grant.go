package ringfence

import (
	"context"
	"math"
	"sync/atomic"
	"time"
)

// grant is quota that was taken ahead, one lease after another in the same place: a lease
// allocates nothing. Nobody takes a lock. The word says which lease it is, so whoever reads the
// rest and then changes the word by compare-and-swap has read what belongs together. While a
// lease begins, its word has no units. A place in the table is given from one key to another:
// that, too, changes the number before anything else, so the rest includes whose it is.
type grant struct {
	hi, lo    atomic.Uint64 // the hash of its key
	word      atomic.Uint64
	asked     atomic.Int64 // before the charge left, ns of the ring's clock
	remaining atomic.Int64 // what the primary had left then
	reset     atomic.Int64 // ns until nothing is used, as of asked
	score     atomic.Int64 // log: of its units
}

// terms are what a lease begins with.
type terms struct {
	units, asked, remaining, reset, score int64
	flags                                 grantWord
}

// grantWord is the number of a lease, counted from the first that was in its place, and what
// is left of it: nothing of one that has not begun.
type grantWord uint64

const (
	grantBits = 12 // MaxLogCost fits in
	grantMask = 1<<grantBits - 1

	grantClosed grantWord = 1 << (2 * grantBits) << iota // nobody takes anything of it
	grantLent                                            // closed, and on the way back
	grantAhead                                           // the next one has been asked for
	grantSecond                                          // of leaseKey.here: spare may have something

	grantNumber grantWord = 1 << 32 // one in the number
)

func (w grantWord) left() int64     { return int64(w & grantMask) }
func (w grantWord) units() int64    { return int64(w >> grantBits & grantMask) }
func (w grantWord) closed() bool    { return w&grantClosed != 0 }
func (w grantWord) number() uint64  { return uint64(w / grantNumber) }
func (w grantWord) next() grantWord { return (w/grantNumber + 1) * grantNumber }

// unused is what nobody took, whether it was closed since or not, unless it is returned.
func (w grantWord) unused() int64 {
	if w&grantLent != 0 {
		return 0
	}
	return w.left()
}

// load is the word of a key's lease. What is another key's by now is closed to it.
func (g *grant) load(h keyHash) grantWord {
	w := g.bare()
	if g.lo.Load() != h.lo || g.hi.Load() != h.hi {
		return grantClosed
	}
	return w
}

// bare is the word, whoever the key is.
func (g *grant) bare() grantWord { return grantWord(g.word.Load()) }

func (g *grant) swap(from, to grantWord) bool {
	return g.word.CompareAndSwap(uint64(from), uint64(to))
}

// clear makes the place one that has no lease: nobody takes anything of what was there.
func (g *grant) clear() (w grantWord) {
	for w = g.bare(); !g.swap(w, w.next()|grantClosed); w = g.bare() {
	}
	return w.next()
}

// belong gives the place to a key. Whoever had it takes nothing any more.
func (g *grant) belong(h keyHash) {
	g.clear()
	g.hi.Store(h.hi)
	g.lo.Store(h.lo)
}

// begin puts a lease in the place of another. The key is claimed.
func (g *grant) begin(t terms) grantWord {
	w := g.clear()
	g.asked.Store(t.asked)
	g.remaining.Store(t.remaining)
	g.reset.Store(t.reset)
	g.score.Store(t.score)
	w |= grantWord(t.units<<grantBits|t.units) | t.flags
	g.word.Store(uint64(w))
	return w
}

// told is what a lease knows of its key, of one that may be replaced meanwhile.
func (g *grant) told() terms {
	return terms{asked: g.asked.Load(), remaining: g.remaining.Load(), reset: g.reset.Load()}
}

// take takes cost units, if there are as many. w is what it made of the lease.
func (g *grant) take(h keyHash, ls *leasing, cost, now int64) (w grantWord, t terms, ok bool) {
	for {
		if w = g.load(h); w.closed() || w.left() < cost {
			return w, t, false
		}
		if t = g.told(); now >= ls.end(t.asked) {
			return w, t, false
		}
		if g.swap(w, w-grantWord(cost)) {
			return w - grantWord(cost), t, true
		}
	}
}

// goAhead says whether the next lease has not been asked for yet, and notes that it is.
func (g *grant) goAhead(w grantWord) bool {
	for is := w; is.number() == w.number() && is&(grantAhead|grantClosed) == 0; is = g.bare() {
		if g.swap(is, is|grantAhead) {
			return true
		}
	}
	return false
}

// close makes nobody take what is left of a lease, which is forgotten.
func (g *grant) close(w grantWord) {
	for is := w; is.number() == w.number() && !is.closed(); is = g.bare() {
		if g.swap(is, is|grantClosed) {
			return
		}
	}
}

// lend takes what is left, to be returned: only the first call gets anything, and nobody once
// the lease has ended.
func (g *grant) lend(h keyHash, ls *leasing, now int64) (w grantWord, score int64, ok bool) {
	for {
		w = g.load(h)
		score = g.score.Load()
		if w.closed() || w.left() == 0 || now >= ls.end(g.asked.Load()) {
			return w, 0, false
		}
		if lent := w | grantClosed | grantLent; g.swap(w, lent) {
			return lent, score, true
		}
	}
}

// open undoes lend, unless another lease has begun. A second one can have been added since.
func (g *grant) open(w grantWord) bool {
	for is := g.bare(); is&^grantSecond == w&^grantSecond; is = g.bare() {
		if g.swap(is, is&^(grantClosed|grantLent)) {
			return true
		}
	}
	return false
}

// mark notes that there is a second lease.
func (g *grant) mark() {
	for w := g.bare(); w&grantSecond == 0 && !g.swap(w, w|grantSecond); w = g.bare() {
	}
}

// look is a key's lease and when it was asked for.
func (g *grant) look(h keyHash) (w grantWord, asked int64) {
	for {
		w = g.load(h)
		asked = g.asked.Load()
		if g.load(h).number() == w.number() {
			return w, asked
		}
	}
}

// rest is what can be taken now.
func (g *grant) rest(h keyHash, ls *leasing, now int64) int64 {
	if g == nil {
		return 0
	}
	w, asked := g.look(h)
	if w.closed() || now >= ls.end(asked) {
		return 0
	}
	return w.left()
}

// settle is how much nobody took, and how much of that can be taken now. If that is nothing,
// the lease is over, and nothing of it is unused from now on.
func (g *grant) settle(h keyHash, ls *leasing, now int64) (unused, rest int64) {
	for {
		w, asked := g.look(h)
		if unused = w.unused(); unused == 0 {
			return 0, 0
		}
		if !w.closed() && now < ls.end(asked) {
			return unused, unused
		}
		if g.swap(w, w&^grantMask|grantClosed) {
			return unused, 0
		}
	}
}

// leaseKey is what this process holds of one key. A call out of a lease does not need it, as
// long as there is no second one: what it needs is in the table.
type leaseKey struct {
	hash keyHash
	of   *leasing
	here *grant // the lease in use: the key's place in the table, until the key retires
	// spare is a second place, there once a lease has been asked for in advance.
	spare atomic.Pointer[grant]

	// reset is when the key was last Reset: what was asked for before is not used.
	reset  atomic.Int64
	since  atomic.Int64                  // when it was last claimed
	back   atomic.Int64                  // the server's us at which units were last returned
	landed atomic.Pointer[chan struct{}] // closed when it has arrived, if anybody waits for it
	call   atomic.Pointer[manyEntry]     // the first entry of the AllowMany that asks
	room   atomic.Int32                  // what was left when the primary was last asked
	way    atomic.Uint32                 // who asks, and what is on its way for him: asking, toHere, toThere

	// What follows is his who asks, in units.
	cost   int16 // of the call that last asked, mostOwn at most
	chunk  int16 // that the last lease was meant to have; 0: none yet
	given  int16 // that there were to use since
	second bool  // the next lease is not the first
	caller bool  // who last asked was a call, which is part of given
}

// mostOwn is the most that is noted of the units of a call: more than a lease can have.
const mostOwn = 1 << 14

// What leaseKey.way says.
const (
	toHere  uint32 = 1 << iota // a lease
	toThere                    // units that are returned
	asking                     // one asks at a time

	underway = toHere | toThere
)

// take takes cost units out of a lease: of the one that ends first, if both have as many.
// w is what is left of that, rest what is left of both. told is of the newer one, which knows
// best what else there is: what it took the older one counts as left still.
func (k *leaseKey) take(ls *leasing, cost, now int64) (g *grant, w grantWord, told terms, rest int64) {
	first, second := k.here, k.spare.Load()
	if second == nil {
		w, told, ok := first.take(k.hash, ls, cost, now)
		if !ok {
			return nil, 0, terms{}, 0
		}
		return first, w, told, w.left()
	}
	if second.asked.Load() < first.asked.Load() {
		first, second = second, first
	}
	w, told, ok := first.take(k.hash, ls, cost, now)
	if ok {
		is := second.load(k.hash)
		newer := second.told()
		if second.load(k.hash).number() == is.number() && is.units() > 0 && newer.asked > told.asked {
			told = newer
		}
		return first, w, told, w.left() + second.rest(k.hash, ls, now)
	}
	if w, told, ok = second.take(k.hash, ls, cost, now); ok {
		return second, w, told, w.left() + first.rest(k.hash, ls, now)
	}
	return nil, 0, terms{}, 0
}

// rest is what can be taken now, in one or two takes.
func (k *leaseKey) rest(now int64) int64 {
	return k.here.rest(k.hash, k.of, now) + k.spare.Load().rest(k.hash, k.of, now)
}

// places are those of leases.
func (k *leaseKey) places(yield func(*grant) bool) {
	if yield(k.here) {
		if g := k.spare.Load(); g != nil {
			yield(g)
		}
	}
}

// noteRoom keeps what the primary has left.
func (k *leaseKey) noteRoom(units int64) { k.room.Store(int32(min(units, math.MaxInt32))) }

// onItsWay is what is on its way for who asks.
func (k *leaseKey) onItsWay() uint32 { return k.way.Load() & underway }

// claim begins to ask the primary, for a chunk of units, if nobody does already. Who was
// let in calls asked when it is over. own are the units of the call that asks.
func (k *leaseKey) claim(own, now int64) (chunk int64, ok bool) {
	if !k.way.CompareAndSwap(0, asking) {
		return 0, false
	}
	if !k.of.claims.enter() { // Close returns what there is
		k.way.Store(0)
		return 0, false
	}
	used, held := int64(k.given), int64(0)
	for g := range k.places {
		unused, rest := g.settle(k.hash, k.of, now)
		used -= unused
		held += rest
	}
	k.size(used, max(now-k.since.Load(), int64(time.Microsecond)))
	k.since.Store(now)
	own = min(own, mostOwn)
	if k.given, k.caller = int16(own+held), own > 0; k.caller {
		k.cost = int16(own)
	}
	return min(int64(k.chunk), k.of.bound, int64(k.room.Load())/leaseOfRemaining), true
}

// size says how many units the next lease is to have, when used have been used in the time
// since the last one. A lease that is in use is renewed in one request, however much of it
// goes back, so it may be too large: it is four times what is used in a life. One that saved a
// call is worth that request; a key without a lease gets one when its next call comes within
// two thirds of a life.
func (k *leaseKey) size(used, elapsed int64) {
	ls, call := k.of, max(1, int64(k.cost))
	if k.chunk == 0 {
		k.chunk = int16(ls.start())
		return
	}
	demand := float64(used) * float64(ls.life) / float64(elapsed)
	saved := used / call
	if k.caller {
		saved = (used - int64(k.cost)) / call
	}
	if !k.second && k.chunk > 1 {
		ls.learn(saved)
	}
	k.second = true
	switch {
	case demand < 1.5*float64(call) && (k.chunk == 1 || saved < 1 || demand < float64(call)):
		k.chunk = 1
	case demand < float64(ls.bound):
		k.chunk = int16(min(4*int64(demand), ls.bound))
	default:
		k.chunk = int16(ls.bound)
	}
}

// asked ends what claim began.
func (k *leaseKey) asked() {
	k.call.Store(nil)
	k.way.Store(0)
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
	if k.onItsWay() == 0 { // it has, perhaps before anybody could tell
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

// add keeps a lease that is watched, unless it may not be used. The caller has claimed the key.
func (k *leaseKey) add(t terms, now int64) {
	if t.asked <= k.reset.Load() {
		return
	}
	g := k.place(now)
	unused, _ := g.settle(k.hash, k.of, now) // what has ended meanwhile was not used
	if g == k.here && k.spare.Load().rest(k.hash, k.of, now) > 0 {
		t.flags = grantSecond
	}
	w := g.begin(t)
	k.given += int16(t.units - unused)
	// After a Reset nothing is returned, either; and after Close nobody would.
	if t.asked <= k.reset.Load() || !k.of.watch(k, t.asked+k.of.patience(), now) {
		g.close(w)
	}
}

// place is where the next lease goes: where nothing is left, or else where the one asked for
// in advance was, of which nearly nothing is. Who looks at the first then looks at the second.
func (k *leaseKey) place(now int64) *grant {
	if k.here.rest(k.hash, k.of, now) == 0 {
		return k.here
	}
	g := k.spare.Load()
	if g == nil {
		g = &grant{}
		g.belong(k.hash)
		k.spare.Store(g)
	}
	k.here.mark()
	return g
}

// due says whether something is left of a lease that has not ended and began by then.
func (k *leaseKey) due(begun, now int64) bool {
	for g := range k.places {
		if w, asked := g.look(k.hash); asked <= begun && !w.closed() && w.left() > 0 && now < k.of.end(asked) {
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
	for g := range k.places {
		g.close(g.load(k.hash))
	}
}

// retire says whether the key can be forgotten. Then it is claimed for good, so that whoever
// has found it before takes no lease that nobody would find; and what it has found is closed
// to it once the place belongs to another.
func (k *leaseKey) retire(now int64) bool {
	if now-k.since.Load() <= int64(MaxLease) || !k.way.CompareAndSwap(0, asking) {
		return false
	}
	if k.rest(now) > 0 || now-k.since.Load() <= int64(MaxLease) {
		k.way.Store(0)
		return false
	}
	return true
}
