package ringfence

import (
	"context"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// Leases: quota of a key that this process takes from the primary in advance, in one
// charge, and admits calls out of without a round trip. A lease ends a life after the
// charge left, by this process's own monotonic clock. What has not been used goes back
// before that, at most once: a return that is lost, or late, is quota that nobody uses.
//
// A lease request is a call's own charge with a higher count (see group.go), so the
// scripts decide it as they decide any number of callers. In a sliding log its units are
// scored at the instant at which the lease has ended (scripts/sliding_log.lua): they count
// from before the call that uses one until a window after it, so no window ever holds more
// than the limit. A bucket is charged at once and used later: what is admitted in a time T
// is at most Burst + Rate x T + what was outstanding when T began.

// Lease says how much quota a limiter may take ahead, see WithLease.
type Lease struct {
	// Max is the most units that this process holds of one key: 1 to 1,000 (MaxLogCost).
	// Never more than a tenth of the limit is held, whatever Max says: of a limit of 100,
	// 10 units; of one below 20 nothing is ever leased. With 8 processes and 64, a bucket
	// can admit up to 512 units more than Burst + Rate x T in a time T.
	Max int64
	// TTL is how long a lease lives, counted from before the request left: 1 ms up to a
	// tenth of the limit's window (a bucket's: of the time to fill) and to 1 s, whole
	// microseconds; 0: the longest that is allowed. Half of it is what a lease is made to
	// last, and three quarters is the longest that units are held unused.
	TTL time.Duration
}

const (
	// MaxLease is the longest that a lease can live.
	MaxLease = time.Second

	minLease         = time.Millisecond
	leaseOfWindow    = 10 // a lease lives for a tenth of the window at most
	leaseOfLimit     = 10 // and holds a tenth of the limit
	leaseOfRemaining = 8  // an eighth of what was left when the primary was last asked
	leaseLooks       = 4  // in a life: unused for as long, it is returned
	leaseWays        = 4
	// leaseKeys is the most keys with leases, as many as fit into so many ways.
	leaseKeys = 1 << 17
	// leaseReturns is the most returns in one go.
	leaseReturns = 1024
)

// WithLease lets the limiter take quota in chunks and admit calls out of them without a
// round trip; without it every call asks the primary. The chunk of a key follows its
// demand, up to Lease.Max, and is nothing when little is left: near the limit every call
// is decided by the primary.
//
// A SlidingLog stays exact: there are never more than Limit units in any window. It can
// deny up to TTL early, because units taken ahead count for that much longer. A
// TokenBucket admits at most Burst + Rate x T + what all processes hold of the key, Max
// each. What a process that dies holds is lost: a bucket refills it, a log forgets it TTL
// later than what was used.
//
// A Reset in another process takes effect here when the lease ends, and what this process
// returns meanwhile, Max at most, is given to those who called since. While a shard is
// away its leases are used until they end.
func WithLease(c Lease) LimiterOption {
	return func(o *limiterOptions) error {
		if c.Max < 1 || c.Max > MaxLogCost {
			return invalid("Lease.Max", c.Max, "must be 1 to %d units; leave WithLease out for no leases", MaxLogCost)
		}
		if c.TTL != 0 && (c.TTL < minLease || c.TTL > MaxLease || c.TTL%time.Microsecond != 0) {
			return invalid("Lease.TTL", c.TTL, "must be whole microseconds, from %s to %s, or 0 for the longest that the limit allows", minLease, MaxLease)
		}
		o.lease = c
		return nil
	}
}

// leasing are the leases of one limiter.
type leasing struct {
	of    *Limiter
	rule  *rule // as the charges of leases say it: a log's scores them ahead
	bound int64 // units of one key at most
	life  int64 // ns

	returned atomic.Int64 // units

	mu    sync.Mutex // guards the following; a leaf
	queue grantQueue
	timer *time.Timer
	armed bool
	ended bool // Close has taken what there was
}

// newLeasing makes the leases of a limiter, or nil if it is to have none.
func newLeasing(l *Limiter, c Lease) (*leasing, error) {
	if c.Max == 0 {
		return nil, nil
	}
	longest := min(MaxLease, time.Duration(l.rule.window/leaseOfWindow)*time.Microsecond)
	if longest < minLease {
		return nil, invalid("Lease.TTL", c.TTL, "has no value for this limit, whose window is too short for leases: a tenth of it must be %s at least", minLease)
	}
	if c.TTL > longest {
		return nil, invalid("Lease.TTL", c.TTL, "must be at most %s for this limit, a tenth of its window and %s at most", longest, MaxLease)
	}
	if c.TTL == 0 {
		c.TTL = longest
	}
	return &leasing{
		of: l, rule: l.rule.ahead(int64(c.TTL) / micro), bound: min(c.Max, l.rule.capacity/leaseOfLimit), life: int64(c.TTL),
	}, nil
}

// grant is quota that was taken ahead: one lease.
type grant struct {
	key   *leaseKey
	units int64
	left  atomic.Int64 // -1-n: it was closed with n left
	asked int64        // before the charge left, ns of the ring's clock
	until int64
	low   int64       // with so much left, the next one is asked for
	ahead atomic.Bool // it has been
	score int64       // log: of its units

	remaining int64         // what the primary had left then
	reset     time.Duration // until nothing is used, as of asked

	seen int64 // left at the last look; guarded by leasing.mu
	due  int64 // of the next look
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
	if n := g.left.Load(); n >= 0 {
		return n
	} else {
		return -1 - n
	}
}

// rest is what can be taken now.
func (g *grant) rest(now int64) int64 {
	if g == nil || now >= g.until {
		return 0
	}
	return max(0, g.left.Load())
}

// leaseKey is what this process holds of one key.
type leaseKey struct {
	hash   keyHash
	grants [2]atomic.Pointer[grant] // one in use, one that was asked for in advance
	// reset is when the key was last Reset: what was asked for before is not used.
	reset atomic.Int64
	since atomic.Int64 // when somebody last asked the primary

	asking atomic.Bool // one asks at a time, and what follows is his
	chunk  int64       // units to ask for
	given  int64       // units that there were to use since

	room atomic.Int64 // what was left when the primary was last asked
}

// take takes cost units out of a lease: of the one that ends first, if both have as many.
// rest is what is left of both.
func (k *leaseKey) take(cost, now int64) (g *grant, left, rest int64) {
	a, b := k.grants[0].Load(), k.grants[1].Load()
	if a == nil || (b != nil && b.until < a.until) {
		a, b = b, a
	}
	if a == nil {
		return nil, 0, 0
	}
	if now < a.until {
		if left, ok := a.take(cost); ok {
			return a, left, left + b.rest(now)
		}
	}
	if b != nil && now < b.until {
		if left, ok := b.take(cost); ok {
			return b, left, left + a.rest(now)
		}
	}
	return nil, 0, 0
}

// rest is what can be taken now, in one or two takes.
func (k *leaseKey) rest(now int64) int64 {
	return k.grants[0].Load().rest(now) + k.grants[1].Load().rest(now)
}

// claim begins to ask the primary, if nobody does already: a call of this cost, and wants
// further ones for the lease. Who was let in calls asked when it is over.
func (k *leaseKey) claim(ls *leasing, cost, now int64) (wants int64, ok bool) {
	if !k.asking.CompareAndSwap(false, true) {
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
	// As much as lasts for half a life, so that it is seldom returned; but at most twice as
	// much as the last time, since a burst says little about what comes.
	elapsed := max(now-k.since.Load(), int64(time.Microsecond))
	demand := float64(used) * float64(ls.life) / 2 / float64(elapsed)
	chunk := min(2*max(k.chunk, 1), ls.bound, k.room.Load()/leaseOfRemaining)
	if demand < float64(chunk) {
		chunk = int64(demand)
	}
	k.chunk = max(chunk, 1)
	k.since.Store(now)
	k.given = cost + held
	if k.chunk < 2 {
		return 0, true
	}
	return max(0, min(k.chunk, ls.bound-held)) / cost, true
}

// asked ends what claim began.
func (k *leaseKey) asked() { k.asking.Store(false) }

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

// idle says whether the key can be forgotten.
func (k *leaseKey) idle(now int64) bool {
	return !k.asking.Load() && k.rest(now) == 0 && now-k.since.Load() > int64(MaxLease)
}

// leaseTable holds a bounded number of keys. Reading takes no lock; a key that finds its
// set full of keys in use gets no leases.
type leaseTable struct {
	made sync.Once
	sets atomic.Pointer[[]leaseSet]
}

type leaseSet [leaseWays]atomic.Pointer[leaseKey]

// find is the key, nil if it is not there. The lower half of the hash is used: the upper
// half picks the shard.
func (t *leaseTable) find(h keyHash) *leaseKey {
	sets := t.sets.Load()
	if sets == nil {
		return nil
	}
	s := &(*sets)[h.lo&uint64(len(*sets)-1)]
	for i := range s {
		if k := s[i].Load(); k != nil && k.hash == h {
			return k
		}
	}
	return nil
}

// key is find, and puts the key there if there is room. It takes no memory until the first.
func (t *leaseTable) key(h keyHash, now int64) *leaseKey {
	t.made.Do(func() {
		sets := make([]leaseSet, leaseKeys/leaseWays)
		t.sets.Store(&sets)
	})
	if k := t.find(h); k != nil {
		return k
	}
	sets := *t.sets.Load()
	s := &sets[h.lo&uint64(len(sets)-1)]
	for i := range s {
		old := s[i].Load()
		if old != nil && !old.idle(now) {
			continue
		}
		k := &leaseKey{hash: h}
		k.room.Store(math.MaxInt64)
		k.reset.Store(math.MinInt64)
		k.since.Store(math.MinInt64 / 2)
		if s[i].CompareAndSwap(old, k) {
			return t.find(h) // another may have put it into another way
		}
	}
	return nil
}

// orHeld is what the primary decided; but what it denied, perhaps for what this process has
// taken ahead meanwhile, is admitted out of that.
func (l *Limiter) orHeld(s *shard, h keyHash, d Decision, cause Cause, cost int64) Decision {
	if l.lease == nil || cause != CauseNone {
		return d
	}
	if !d.Allowed {
		if late, ok := l.leased(s, h, cost, l.ring.clock()); ok {
			return late
		}
	}
	if k := l.ring.leases.find(h); k != nil && d.Source == SourcePrimary {
		k.room.Store(d.Remaining)
	}
	return d
}

// drop gives up what is held of a key, and what is on its way.
func (t *leaseTable) drop(h keyHash, now int64) {
	if k := t.find(h); k != nil {
		k.drop(now)
	}
}

// leased admits a call out of a lease, if there is one with enough left.
func (l *Limiter) leased(s *shard, h keyHash, cost, now int64) (d Decision, ok bool) {
	if l.lease == nil {
		return d, false
	}
	k := l.ring.leases.find(h)
	if k == nil {
		return d, false
	}
	g, left, rest := k.take(cost, now)
	if g == nil {
		return d, false
	}
	if left <= g.low && rest == left && !g.ahead.Load() && g.ahead.CompareAndSwap(false, true) {
		l.lease.prefetch(s, k, now)
	}
	since := max(0, now-g.asked)
	return Decision{
		Allowed: true, Limit: l.rule.capacity, Remaining: min(l.rule.capacity, g.remaining+rest),
		ResetAfter: max(time.Microsecond, g.reset-time.Duration(since).Truncate(time.Microsecond)),
		Source:     SourceLease, Shard: s.id, Age: roundUp(since),
	}, true
}

// begin makes a request for a call ask for a lease too, unless somebody does already. What
// is held and was too little for the call goes back on the way: the primary is to decide
// by all there is. Who gets a key calls its asked when the request is over.
func (ls *leasing) begin(r *request, now int64) *leaseKey {
	if ls == nil || ls.bound < 1 || r.debit != "" {
		return nil
	}
	k := ls.of.ring.leases.key(r.hash, now)
	if k == nil {
		return nil
	}
	wants, ok := k.claim(ls, r.cost, now)
	if !ok {
		return nil
	}
	ls.giveBack(r, k, now)
	if r.debit == "" && wants > 0 {
		r.rule, r.wants = ls.rule, wants
	}
	return k
}

// handIn is begin for an entry of AllowMany, which asks for no lease.
func (ls *leasing) handIn(r *request, now int64) {
	if ls == nil || r.debit != "" {
		return
	}
	k := ls.of.ring.leases.find(r.hash)
	if k == nil || k.rest(now) == 0 || !k.asking.CompareAndSwap(false, true) {
		return
	}
	ls.giveBack(r, k, now)
	k.asked()
}

// giveBack closes what is held of a key and puts it onto a request.
func (ls *leasing) giveBack(r *request, k *leaseKey, now int64) {
	for i := range k.grants {
		if g := k.grants[i].Load(); g != nil && now < g.until {
			n := g.close()
			k.given -= n
			k.grants[i].CompareAndSwap(g, nil)
			ls.back(r, g, n)
		}
	}
}

// back puts units of a lease onto a request that takes them back.
func (ls *leasing) back(r *request, g *grant, units int64) {
	if units > 0 {
		r.back += units
		r.from = ls.of
		r.debit = ls.rule.takeBack(r.debit, r.back, units, g.score)
	}
}

// arrived keeps what a request was granted beyond what its own call needed. The key is
// claimed.
func (ls *leasing) arrived(k *leaseKey, r *request, asked, calls int64) {
	rl := ls.of.rule
	left := rl.remaining(r.whole)
	k.room.Store(left)
	units := calls * r.cost
	until := asked + ls.life - ls.life/1000 // two clocks differ in rate, see near.go
	if units < 1 || ls.of.ring.clock() >= until {
		return
	}
	g := &grant{
		key: k, units: units, seen: units, asked: asked, until: until, low: units / 4, score: r.whole.b,
		remaining: left, reset: time.Duration(rl.resetAfter(r.whole)) * time.Microsecond,
	}
	g.left.Store(units)
	if !k.add(g) || ls.of.ring.leases.find(k.hash) != k || !ls.watch(g) {
		g.close()
	}
}

// prefetch asks for the next lease of a key while there is something left of this one, so
// that nobody waits for it.
func (ls *leasing) prefetch(s *shard, k *leaseKey, now int64) {
	l := ls.of
	if !s.takesReturns() || s.owing() {
		return
	}
	wants, ok := k.claim(ls, 1, now)
	if !ok {
		return
	}
	k.given-- // it is nobody's call
	if wants < 2 || !l.ring.enter() {
		k.asked()
		return
	}
	go func() {
		defer l.ring.leave()
		defer k.asked()
		r := l.ring.newRequest(opCharge, ls.rule, k.hash, 1)
		r.wants = wants - 1
		queued, _, err := s.charges.call(context.Background(), r, now, now+int64(l.budget))
		if !queued {
			r.release()
		} else if err == nil && r.status == statusDecided {
			ls.arrived(k, r, now, r.granted+r.extra)
		}
		r.release()
	}()
}

// grantQueue are leases in the order of their next look.
type grantQueue struct {
	all  []*grant
	head int
}

func (q *grantQueue) push(g *grant) { q.all = append(q.all, g) }

// pop takes the first out, if it is due.
func (q *grantQueue) pop(now int64) *grant {
	if q.head == len(q.all) || q.all[q.head].due > now {
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

func (ls *leasing) interval() int64 { return ls.life / leaseLooks }

// watch sees to it that a lease is returned. It says no once the ring is being closed.
func (ls *leasing) watch(g *grant) bool {
	now := ls.of.ring.clock()
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.ended {
		return false
	}
	g.due = now + ls.interval()
	ls.queue.push(g)
	ls.arm(now)
	return true
}

// arm sets the timer for the next look.
func (ls *leasing) arm(now int64) {
	next := ls.queue.next()
	if ls.armed || ls.ended || next == never {
		return
	}
	ls.armed = true
	after := time.Duration(max(next-now, ls.interval()/8))
	if ls.timer == nil {
		ls.timer = time.AfterFunc(after, ls.look)
	} else {
		ls.timer.Reset(after)
	}
}

// look returns the leases that have not been used since the last look, and those that end
// soon.
func (ls *leasing) look() {
	r := ls.of.ring
	if !r.enter() {
		return // Close returns them
	}
	defer r.leave()
	for {
		back, more := ls.unused(r.clock())
		ls.send(back, r.clock()+int64(ls.of.budget))
		for i := range back {
			if back[i].req != nil {
				back[i].req.release() // nobody waits for what becomes of it
			}
		}
		if !more {
			return
		}
	}
}

// unused takes up to leaseReturns leases out of use, and says whether to come again; else
// it sets the timer.
func (ls *leasing) unused(now int64) (back []manyEntry, more bool) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for len(back) < leaseReturns {
		g := ls.queue.pop(now)
		if g == nil {
			ls.armed = false
			ls.arm(now)
			return back, false
		}
		n := g.left.Load()
		switch {
		case n <= 0 || now >= g.until:
		case n == g.seen || now+ls.interval()*3/2 >= g.until:
			if s := ls.of.ring.owner(g.key.hash); s.takesReturns() {
				back = ls.entry(back, s, g)
				continue
			}
			fallthrough // it can still be used
		default:
			g.seen, g.due = n, now+ls.interval()
			ls.queue.push(g)
		}
	}
	return back, true
}

// takesReturns says whether the shard is well: nothing is risked on one that is not.
func (s *shard) takesReturns() bool { return s.breaker.closed.Load() && !s.degraded.Load() }

// entry adds the return of a lease.
func (ls *leasing) entry(back []manyEntry, s *shard, g *grant) []manyEntry {
	h := g.key.hash
	r := ls.of.ring.newRequest(opCharge, ls.rule, h, 1)
	r.count = 0
	if ls.back(r, g, g.close()); r.debit == "" {
		r.release()
		r.release()
		return back
	}
	return append(back, manyEntry{hash: h, shard: s, req: r})
}

// send sends returns. Those that cannot be sent are given up.
func (ls *leasing) send(back []manyEntry, deadline int64) {
	sendChains(chain(back, func(s *shard) *dispatcher { return s.charges }), back, func(*shard) int64 { return deadline })
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

// addHeld adds what this process holds of a key to what it was told of the primary.
func (l *Limiter) addHeld(d *Decision, h keyHash) {
	if l.lease == nil {
		return
	}
	k := l.ring.leases.find(h)
	if k == nil {
		return
	}
	rest := k.rest(l.ring.clock())
	if d.Remaining != Unknown {
		d.Remaining = min(d.Limit, d.Remaining+rest)
	}
	if rest > 0 && !d.Allowed {
		d.Allowed, d.RetryAfter = true, 0
	}
}

// returnAll returns everything, for Close: nobody calls any more. It ends by cut.
func (ls *leasing) returnAll(cut time.Time) {
	ls.mu.Lock()
	ls.ended = true
	if ls.timer != nil {
		ls.timer.Stop()
	}
	ls.mu.Unlock()
	for time.Now().Before(cut) {
		now := ls.of.ring.clock()
		var back []manyEntry
		ls.mu.Lock()
		for len(back) < leaseReturns {
			g := ls.queue.pop(math.MaxInt64)
			if g == nil {
				break
			}
			if s := ls.of.ring.owner(g.key.hash); now < g.until && s.takesReturns() {
				back = ls.entry(back, s, g)
			}
		}
		done := ls.queue.next() == never
		ls.mu.Unlock()
		ls.send(back, now+int64(time.Until(cut)))
		for i := range back {
			if r := back[i].req; r != nil {
				_, _ = back[i].shard.charges.wait(context.Background(), r) // lost is lost
				r.release()
			}
		}
		if done {
			return
		}
	}
}

// outstanding is what is held of all keys.
func (ls *leasing) outstanding(now int64) (units int64) {
	if ls == nil {
		return 0
	}
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for _, g := range ls.queue.all[ls.queue.head:] {
		units += g.rest(now)
	}
	return units
}
