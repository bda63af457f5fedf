package ringfence

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Leases: quota of a key that this process takes from the primary in advance, in one
// charge, and admits calls out of without a round trip. A lease ends a life after the
// charge left, by this process's own monotonic clock. What has not been used goes back
// before that, at most once: a return that is lost, or late, is quota that nobody uses.
//
// A lease request is a call's own charge that asks for more calls (see group.go): the
// scripts grant them after all callers, out of an eighth of what those have left. In a
// sliding log its units are scored at the instant at which the lease has ended
// (scripts/sliding_log.lua): they count from before the call that uses one until a window
// after it, so no window ever holds more than the limit. A bucket is charged at once and
// used later: what is admitted in a time T is at most Burst + Rate x T + what was
// outstanding when T began.
//
// Near the limit quota can be in several places, and no call of this process is to be denied
// for that. What is held and too little for a call goes to the primary with it; a denial
// waits for what is on its way, and if units went back meanwhile the primary is asked again
// (orHeld); and no denial is kept in the near cache as long as anything is held or on its way.

// Lease says how much quota a limiter may take ahead, see [WithLease]. The zero value is
// refused: leave the option out for no leases.
type Lease struct {
	// Max is the most units that this process holds of one key: 1 to 1,000 (MaxLogCost).
	// Never more than a tenth of the limit is held, nor is more taken than an eighth of what is
	// left of it at that time, whatever Max says: of a limit of 1,000 never more than 100 units; of one below
	// 20, or with a Max of 1, nothing. With 8 processes and 64, a bucket can admit up to 512
	// units more than Burst + Rate x T in a time T.
	Max int64
	// TTL is how long a lease lives, counted from before the request left: 1 ms up to a
	// tenth of the limit's window (a bucket's: of the time to fill) and to 1 s, whole
	// microseconds; 0: the longest that is allowed. After seven eighths of it what has not
	// been used is returned, and if the key is in use the same request takes the next lease.
	TTL time.Duration
}

const (
	// MaxLease is the longest that a lease can live.
	MaxLease = time.Second

	minLease         = time.Millisecond
	leaseOfWindow    = 10 // a lease lives for a tenth of the window at most
	leaseOfLimit     = 10 // and holds a tenth of the limit
	leaseOfRemaining = 8  // and an eighth of what is left
)

// WithLease lets the limiter take quota in chunks and admit calls out of them without a
// round trip; without it every call asks the primary. The chunk of a key follows its
// demand: four times what is used in a lease's life, and none where it saved no call or was
// used less than once in a life.
// A key that is new to this process begins with all it may have, unless the first leases of
// others saved less than a call on average; so where most keys are called once, all but one
// in 16 soon begin without.
//
// A SlidingLog stays exact: there are never more than Limit units in any window. It can
// deny up to Lease.TTL early, because units taken ahead count for that much longer. A
// TokenBucket admits at most Burst + Rate x T + what all processes hold of the key, Lease.Max
// each. Both can deny what would have been admitted without leases while another process
// holds units that it does not use, for Lease.TTL at most; such a denial may be cached
// ([WithNearCache]). Calls are not denied for what their own process holds: if they would be,
// the primary is asked once more, within the budget. What a process that dies holds is lost:
// a bucket refills it, a log forgets it Lease.TTL later than what was used.
//
// A Reset in another process takes effect here when the lease ends, and what this process
// returns meanwhile, Lease.Max at most, is given to those who called since; so is what was
// on its way back when this process did the Reset. A denial that another process caches
// ([WithNearCache]) does not know of units that come back here. While a shard is away its
// leases are used until they end. A machine that is suspended and wakes up uses its leases
// as if it had not slept.
//
// At most 262,144 keys of a ring have leases at a time; further keys go without, and so do some
// before that, because each can only be in 8 places: of 100,000 keys one in 1,000, of 200,000
// one in 25. The table takes 18 MB of heap from the first limiter with leases on. Where Linux
// gives it huge pages, nearly all of that is in use then; where there are none
// (/sys/kernel/mm/transparent_hugepage/enabled says never, other systems) it is as keys come:
// about 1 MB for the first, 6 MB for 1,000 keys, all for more than 20,000. Each key takes 96 bytes
// besides, 64 more if its lease has ever been renewed early because it was used up, and 16 for each
// lease that was taken in the last Lease.TTL.
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

	worth    atomic.Int64 // what a first lease saves on average, in calls / worthUnit
	begun    atomic.Int64 // keys without a first lease
	returned atomic.Int64 // units
	claims   callGate     // those who ask, so that Close can wait for what they are granted

	mu    sync.Mutex // guards the following; a leaf
	queue leaseQueues
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
		return nil, invalid("Lease.TTL", c.TTL, "cannot be chosen so that it suits this limit: it is %s at least and a tenth of the window at most; leave WithLease out", minLease)
	}
	if c.TTL > longest {
		return nil, invalid("Lease.TTL", c.TTL, "must be at most %s for this limit, a tenth of its window and %s at most", longest, MaxLease)
	}
	if c.TTL == 0 {
		c.TTL = longest
	}
	ls := &leasing{
		of: l, rule: l.rule.ahead(int64(c.TTL) / micro), bound: min(c.Max, l.rule.capacity/leaseOfLimit), life: int64(c.TTL),
		claims: callGate{idle: make(chan struct{})},
	}
	if ls.bound < 2 { // a lease of one unit saves nothing
		ls.bound = 0
	}
	ls.worth.Store(2 * worthUnit)
	return ls, nil
}

// end is when a lease ends that was asked for at an instant: two clocks differ in rate, see
// near.go.
func (ls *leasing) end(asked int64) int64 { return asked + ls.life - ls.life/1000 }

// String is how the leases stand behind a limit, empty if there are none. What is held of a
// log is part of the limit.
func (ls *leasing) String() string {
	switch {
	case ls == nil || ls.bound == 0:
		return ""
	case ls.rule.algo == algoSlidingLog:
		return fmt.Sprintf(", of which each process may hold %d ahead for %s", ls.bound, time.Duration(ls.life))
	}
	return fmt.Sprintf(", and each process may hold %d more of a key for %s", ls.bound, time.Duration(ls.life))
}

// start is the chunk of a key that is new to this process: all there may be if that has been
// worth the return with other keys, else none but for every 16th key, to see whether that
// still holds.
func (ls *leasing) start() int64 {
	if ls.worth.Load() >= worthUnit || ls.begun.Add(1)%16 == 0 {
		return ls.bound
	}
	return 1
}

// worthUnit is one call in leasing.worth.
const worthUnit = 32

// learn takes notice of how many calls were admitted out of a key's first lease: none, one or
// a few. A lease costs the server as much as a call, and so does returning it.
func (ls *leasing) learn(saved int64) {
	was := ls.worth.Load()
	ls.worth.Store(was + max(0, min(saved, 4)) - was/worthUnit)
}

// leased admits a call out of a lease, if there is one with enough left.
func (l *Limiter) leased(s *shard, h keyHash, cost, now int64) (d Decision, ok bool) {
	if l.lease == nil {
		return d, false
	}
	g, w, told, rest := l.ring.leases.take(l.lease, h, cost, now)
	if g == nil {
		return d, false
	}
	if left := w.left(); left <= w.units()/4 && rest == left && g.goAhead(w) {
		if k := l.ring.leases.find(h); k != nil {
			l.lease.prefetch(s, k, now)
		}
	}
	s.makeWay(now)
	since := max(0, now-told.asked)
	return Decision{
		Allowed: true, Limit: l.rule.capacity, Remaining: min(l.rule.capacity, told.remaining+rest),
		ResetAfter: max(time.Microsecond, time.Duration(told.reset)-time.Duration(since).Truncate(time.Microsecond)),
		Source:     SourceLease, Shard: s.id, Age: roundUp(since),
	}, true
}

// orHeld is what the primary decided; but what it denied, perhaps for what this process has
// taken ahead meanwhile, is admitted out of that, or out of what is still on its way: the
// answer to another call can overtake it. If units have gone back meanwhile, or what is held is
// too little for the call but would do with what the primary has left, the primary is asked
// once more, with that on the way back. The call was denied, so nothing is charged twice.
// since is the server's time from which a return came too late for the denial; nobody waits
// beyond the deadline. The limiter has leases.
func (l *Limiter) orHeld(ctx context.Context, s *shard, h keyHash, d *Decision, cost, since, deadline int64) error {
	if d.Source != SourcePrimary {
		return nil
	}
	k := l.ring.leases.find(h)
	if k == nil {
		return nil
	}
	k.noteRoom(d.Remaining)
	if d.Allowed {
		return nil
	}
	now, seen := l.ring.clock(), uint32(0)
	for range 3 { // something else may leave as soon as that has arrived
		way := k.onItsWay()
		if late, ok := l.leased(s, h, cost, now); ok {
			*d = late
			return nil
		}
		// What was there a moment ago may be on its way by now.
		if way |= k.onItsWay(); way == 0 || now >= deadline {
			break
		}
		seen |= way
		k.await(ctx, time.Duration(deadline-now))
		now = l.ring.clock()
	}
	rest, gone := k.rest(now), seen&toThere != 0 || k.back.Load() >= since
	if !gone && (rest == 0 || rest+d.Remaining < cost) || now >= deadline {
		return nil
	}
	if known, ok := l.near(s, h, cost, now); ok { // another call has asked meanwhile
		*d = known
		return nil
	}
	var late Decision
	cause, left, _, err := l.ask(ctx, s, opCharge, h, cost, now, deadline, &late)
	s.part(left, nil)
	if cause == CauseNone { // else it was denied by one who knows
		*d = late
	}
	return err
}

// holds says whether this process has something of the key, or something is on its way from or
// to it, so that a denial says nothing of the next call. The own request of who asks is over.
func (l *Limiter) holds(r *request) bool {
	if l.lease == nil {
		return false
	}
	k := l.ring.leases.find(r.hash)
	// What is held is on its way before it is held no more, so that is looked at afterwards.
	return k != nil && (k.rest(l.ring.clock()) > 0 || k.onItsWay() != 0 && r.heir != k)
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
