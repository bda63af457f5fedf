package ringfence

import (
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// The denied-key cache: what the primary denied is denied here, without a round trip,
// for as long as the primary would certainly do the same. Quota comes back with time
// only, and the primary said how much of that it takes; what others are granted
// meanwhile makes it more. So within RetryAfter, counted from before the call left, a
// call of the same cost or a higher one is denied by the primary too, unless
//
//   - the key is Reset: in this process that drops the entry, elsewhere it takes effect
//     here when the entry ends;
//   - another process brings a limit of the same name that gives more, or returns units it
//     had taken ahead, or the shard loses the key or its clock steps forward: the same, at
//     most WithNearCache's max later.
const (
	// MaxNearCache is the longest that WithNearCache lets a denial live.
	MaxNearCache = 10 * time.Second

	defaultNearCache     = time.Second
	defaultNearCacheKeys = 16384
	maxNearCacheKeys     = 1 << 24
	nearWays             = 4
)

// denial is what the primary said of one key. It is never changed once it can be seen.
type denial struct {
	hash  keyHash
	rule  *rule // the limit it was made under
	cost  int64 // the least that is denied
	state state
	asked int64 // before the call left, ns of the ring's clock
	until int64

	// What a call of that cost was told then, so that no caller works it out again.
	remaining    int64
	retry, reset time.Duration
}

// nearSet holds the denials of the keys that fall into it, in no order.
type nearSet struct {
	ways [nearWays]atomic.Pointer[denial]
	// reset is when one of its keys was last Reset. Of a call that began before, nobody
	// knows whether it was decided before, too.
	reset atomic.Int64
}

// nearCache holds a bounded number of denials. Reading takes no lock; a denial that finds
// its set full takes the place of the one that ends first.
type nearCache struct {
	size int // sets, a power of two; 0: off
	made sync.Once
	sets atomic.Pointer[[]nearSet]
}

// newNearCache makes a cache for at least so many denials; none if that is not positive.
// It takes no memory until the first.
func newNearCache(keys int) *nearCache {
	c := &nearCache{}
	if keys > 0 {
		c.size = 1
		for c.size*nearWays < keys {
			c.size *= 2
		}
	}
	return c
}

// set is where a key belongs. The lower half of its hash is used: the upper half picks
// the shard.
func (c *nearCache) set(h keyHash) *nearSet {
	sets := c.sets.Load()
	if sets == nil {
		return nil
	}
	return &(*sets)[h.lo&uint64(c.size-1)]
}

// make is set, and makes the table if there is none yet.
func (c *nearCache) make(h keyHash) *nearSet {
	c.made.Do(func() {
		sets := make([]nearSet, c.size)
		for i := range sets {
			sets[i].reset.Store(math.MinInt64)
		}
		c.sets.Store(&sets)
	})
	return c.set(h)
}

// find returns the denial that settles a call, nil if there is none.
func (c *nearCache) find(h keyHash, r *rule, cost, now int64) *denial {
	s := c.set(h)
	if s == nil {
		return nil
	}
	for i := range s.ways {
		if d := s.ways[i].Load(); d != nil && d.hash == h {
			if d.rule != r || cost < d.cost || now >= d.until {
				return nil
			}
			return d
		}
	}
	return nil
}

// add keeps what the primary said to a call that began at asked, for at most max.
func (c *nearCache) add(h keyHash, r *rule, cost int64, said state, asked, longest int64) {
	wait := r.retryAfter(said, cost) * int64(time.Microsecond)
	// Clocks of two machines differ in rate, too: by less than 1 in 1000 as long as
	// somebody keeps them (NTP slews by half of that at most).
	life := min(wait-wait/1000, longest)
	if c.size == 0 || life <= 0 {
		return
	}
	s := c.make(h)
	if asked <= s.reset.Load() {
		return
	}
	told := r.decide(said, false, cost)
	d := &denial{
		hash: h, rule: r, cost: cost, state: said, asked: asked, until: asked + life,
		remaining: told.Remaining, retry: told.RetryAfter, reset: told.ResetAfter,
	}
	way, old := s.place(d)
	if way == nil || !way.CompareAndSwap(old, d) {
		return // somebody else was quicker, and theirs is as true
	}
	if asked <= s.reset.Load() {
		way.CompareAndSwap(d, nil)
	}
}

// place chooses the way for a denial: its key's own, an empty one, or that of the denial
// that ends first. It is nil if what is known of the key says more.
func (s *nearSet) place(d *denial) (way *atomic.Pointer[denial], old *denial) {
	for i := range s.ways {
		w := &s.ways[i]
		is := w.Load()
		switch {
		case is != nil && is.hash == d.hash:
			if is.rule == d.rule && is.cost <= d.cost && is.until >= d.until {
				return nil, nil
			}
			return w, is
		case way != nil && old == nil: // an empty one is found already
		case is == nil || old == nil || is.until < old.until:
			way, old = w, is
		}
	}
	return way, old
}

// drop forgets what is known of a key, and what calls that have begun by now will be told.
func (c *nearCache) drop(h keyHash, now int64) {
	if c.size == 0 {
		return
	}
	s := c.make(h) // even if nothing was denied yet: a denial may be on its way
	for {
		was := s.reset.Load()
		if was >= now || s.reset.CompareAndSwap(was, now) {
			break
		}
	}
	for i := range s.ways {
		if d := s.ways[i].Load(); d != nil && d.hash == h {
			s.ways[i].CompareAndSwap(d, nil)
		}
	}
}

// count returns the denials that still hold, by limit.
func (c *nearCache) count(now int64) map[*rule]int {
	out := map[*rule]int{}
	sets := c.sets.Load()
	if sets == nil {
		return out
	}
	for i := range *sets {
		for j := range (*sets)[i].ways {
			if d := (*sets)[i].ways[j].Load(); d != nil && now < d.until {
				out[d.rule]++
			}
		}
	}
	return out
}

// decision is what a caller is told at now: the state as it has become by itself. Until the
// denial ends the waits only get shorter by the time that has passed, and of what is left a
// part of a unit may have come back: none that counts, if one unit was too much.
func (d *denial) decision(cost, now int64) Decision {
	r := d.rule
	passed := max(0, now-d.asked) / int64(time.Microsecond)
	retry, remaining := d.retry, d.remaining
	if cost != d.cost {
		retry = time.Duration(r.retryAfter(d.state, cost)) * time.Microsecond
	}
	if r.algo == algoTokenBucket && d.cost > 1 {
		s := d.state
		// Its clock may stand still first.
		s.a -= passed - min(s.c, passed)
		remaining = r.remaining(s)
	}
	since := time.Duration(passed) * time.Microsecond
	return Decision{
		Limit:      r.capacity,
		Remaining:  remaining,
		RetryAfter: max(time.Microsecond, retry-since),
		ResetAfter: max(time.Microsecond, d.reset-since),
	}
}

// makeWay lets others run while the shard is asked something, at one in 16 of the calls that
// are answered here. Callers who never wait keep a processor for 10 ms at a time, and who
// waits for a reply behind some hundred of them misses its budget. now serves as the dice.
func (s *shard) makeWay(now int64) {
	if now%16 == 0 && s.charges.busy.Load() > 0 {
		runtime.Gosched()
	}
}

// near answers a call that need not go to the primary. While that is away the ladder has
// the say, and nothing is answered here.
func (l *Limiter) near(s *shard, h keyHash, cost, now int64) (d Decision, ok bool) {
	if l.nearLife <= 0 || !s.breaker.closed.Load() {
		return d, false
	}
	known := l.ring.near.find(h, l.rule, cost, now)
	if known == nil {
		return d, false
	}
	s.makeWay(now)
	d = known.decision(cost, now)
	d.Source, d.Shard, d.Age = SourceCache, s.id, roundUp(now-known.asked)
	return d, true
}

// denied notes what the primary said to a request that began at asked.
func (l *Limiter) denied(r *request, asked int64) {
	if l.nearLife > 0 && r.granted == 0 && !l.holds(r) {
		l.ring.near.add(r.hash, l.rule, r.cost, r.state, asked, l.nearLife)
	}
}
