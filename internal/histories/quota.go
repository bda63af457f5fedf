package histories

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ringfence/ringfence"
)

// Quota is what the judge of quota knows of a limiter.
type Quota struct {
	// Limit is the limit itself.
	Limit ringfence.Limit
	// Life is how long a lease can live in any process; 0: there are none.
	Life time.Duration
	// Ahead is the most units of a key that each process may hold, by its number.
	Ahead []int64
	// All is the sum of that over the processes that are open at a time.
	All int64
}

// Calm is a part of a history: no fault, no Reset, no call that is canceled, and no
// charge on its way or quota used when it begins.
type Calm struct{ From, To time.Duration }

// rounding is what two instants may seem to be nearer than they are: a server's clock has
// whole microseconds.
const rounding = 2 * time.Microsecond

// use is quota that was used at an instant between two.
type use struct {
	from, to time.Duration
	units    int64
	event    Event
}

// CheckQuota returns nil if what was admitted by primaries and out of leases keeps to the
// limits by the instants at which it was admitted, wherever it came from, or an error that
// shows the first stretch of time with too much:
//
//   - Of a sliding log, no window holds more than Limit units.
//   - Of a token bucket, no time T more than Burst + Rate x T + what was held when T began;
//     nothing was before a key's first call.
//
// A shard that forgets allows as much as the limit once more, and so do a clock that steps
// forward and a Reset. What a lease admits is no older than it may live, nor than the last
// Reset of the key in its own process.
//
// Of a call all that is known is that it was decided between its beginning and its end, so
// only what certainly lies in a stretch counts. Shares and policies are not judged here.
func CheckQuota(events []Event, of map[string]Quota) error {
	for _, e := range events {
		if err := checkLease(e, of[e.Key.Limiter]); err != nil {
			return err
		}
	}
	if err := checkResets(events); err != nil {
		return err
	}
	for _, k := range keysOf(events) {
		q := of[k.Limiter]
		var uses []use
		first := time.Duration(-1)
		for _, e := range events {
			if e.Kind != Charge || e.Key != k {
				continue
			}
			if first < 0 || e.Began < first {
				first = e.Began
			}
			if admits(e) {
				uses = append(uses, use{e.Began, e.Began + e.Took, e.Cost, e})
			}
		}
		slices.SortStableFunc(uses, func(a, b use) int { return cmp.Compare(a.to, b.to) })
		if err := q.check(k, uses, excuses(events, k), first); err != nil {
			return err
		}
	}
	return nil
}

// keysOf are the keys that a history charges, in the order in which they come up.
func keysOf(events []Event) (keys []Key) {
	for _, e := range events {
		if e.Kind == Charge && !slices.Contains(keys, e.Key) {
			keys = append(keys, e.Key)
		}
	}
	return keys
}

// admits says whether an event used quota that the primary had given.
func admits(e Event) bool {
	return e.Kind == Charge && e.Err == nil && e.Decision.Allowed &&
		(e.Decision.Source == ringfence.SourcePrimary || e.Decision.Source == ringfence.SourceLease)
}

// checkLease looks for what no answer out of a lease may say.
func checkLease(e Event, q Quota) error {
	d := e.Decision
	if e.Kind != Charge || e.Err != nil || d.Source != ringfence.SourceLease {
		return nil
	}
	switch {
	case !d.Allowed, d.Cause != ringfence.CauseNone, d.Limit != e.Key.Limit,
		d.Remaining < 0, d.Remaining > d.Limit, d.RetryAfter != 0:
	case q.Ahead[e.Process] < e.Cost:
	case d.Age > q.Life:
	default:
		return nil
	}
	return fmt.Errorf("histories: no lease says this, age %v, life %v, %d held at most: %v", d.Age, q.Life, q.Ahead[e.Process], e)
}

// checkResets looks for leases that a Reset in the same process ought to have ended.
func checkResets(events []Event) error {
	for _, r := range events {
		if r.Kind != Reset || r.Err != nil {
			continue
		}
		for _, e := range events {
			asked := e.Began + e.Took - e.Decision.Age
			if e.Kind == Charge && e.Err == nil && e.Decision.Source == ringfence.SourceLease &&
				e.Key == r.Key && e.Process == r.Process && e.Call > r.Return && asked < r.Began-rounding {
				return fmt.Errorf("histories: a lease that was asked for at %v is used\n  %v\nafter\n  %v", asked, e, r)
			}
		}
	}
	return nil
}

// excuses are the events after which there may be as much again as the limit.
func excuses(events []Event, k Key) (out []use) {
	for _, e := range events {
		if e.Kind >= Wipe {
			if e.Shard != k.Shard || e.Kind == Step && e.Forward <= 0 || e.Kind == Quiet {
				continue
			}
		} else if e.Kind != Reset || e.Key != k {
			continue
		}
		x := use{e.Began, e.Began + e.Took, k.Limit, e}
		if e.Err != nil { // it may be done later, but not once nothing is on its way
			x.to = 1<<63 - 1
			for _, q := range events {
				if q.Kind == Quiet && q.Call > e.Return {
					x.to = q.Began
					break
				}
			}
		}
		out = append(out, x)
	}
	return out
}

// check looks at every stretch from the beginning of a call to the end of another.
func (q Quota) check(k Key, uses, excuses []use, first time.Duration) error {
	for _, start := range uses {
		from, sum := start.from, int64(0)
		for _, u := range uses {
			if u.from < from {
				continue
			}
			if l, ok := q.Limit.(ringfence.SlidingLog); ok && u.to+rounding >= from+l.Window {
				break
			}
			sum += u.units
			most := q.most(from, u.to, first)
			if float64(sum) <= most { // as a rule
				continue
			}
			for _, x := range excuses {
				if x.from <= u.to && x.to >= from-q.Life {
					most += float64(x.units)
				}
			}
			if float64(sum) > most {
				return q.exceeded(k, uses, excuses, from, u.to, sum, most)
			}
		}
	}
	return nil
}

// most is how much may be admitted in a stretch without any fault.
func (q Quota) most(from, to, first time.Duration) float64 {
	switch l := q.Limit.(type) {
	case ringfence.TokenBucket:
		most := float64(l.Burst) + float64(l.Rate)*float64(to-from+rounding)/float64(l.Per)
		if from > first {
			most += float64(q.All)
		}
		return most
	case ringfence.SlidingLog:
		return float64(l.Limit)
	}
	return 0
}

func (q Quota) exceeded(k Key, uses, excuses []use, from, to time.Duration, sum int64, most float64) error {
	var b strings.Builder
	fmt.Fprintf(&b, "histories: %s/%s: %d units are admitted from %v to %v, and at most %.3f may be of %v (leases of %v, %d held in all):\n",
		k.Limiter, k.Name, sum, from, to, most, q.Limit, q.Life, q.All)
	for _, u := range uses {
		if u.from >= from && u.to <= to {
			fmt.Fprintf(&b, "  %v\n", u.event)
		}
	}
	for _, x := range excuses {
		if x.from <= to && x.to >= from-q.Life {
			fmt.Fprintf(&b, "  and %v\n", x.event)
		}
	}
	return fmt.Errorf("%s", b.String())
}

// CheckDenials returns nil if no call of a calm stretch was denied by a primary too early.
// With leases it may be:
//
//   - for what the other processes can hold, but not for what its own does;
//   - of a log, for a unit as long as a lease can live after a window has passed since it
//     was used.
//
// Charges nobody knows the fate of count as made, and each counts as long as it can. So
// what was taken and is lost is an early denial here. Denials that are repeated out of the
// near cache are not judged.
func CheckDenials(events []Event, of map[string]Quota, in Calm) error {
	for _, k := range keysOf(events) {
		q := of[k.Limiter]
		if k.span(q) >= in.To-in.From { // nothing says that it was unused in the beginning
			continue
		}
		var uses []use
		for _, e := range events {
			if e.Kind == Charge && e.Key == k && e.Began >= in.From && e.Began < in.To &&
				(admits(e) || !byPrimary(e) && e.Decision.Source != ringfence.SourceCache && mayBeSent(e)) {
				uses = append(uses, use{e.Began, e.Began + e.Took, e.Cost, e})
			}
		}
		slices.SortStableFunc(uses, func(a, b use) int { return cmp.Compare(a.to, b.to) })
		for _, e := range events {
			if e.Kind != Charge || e.Key != k || !byPrimary(e) || e.Decision.Allowed || e.Began < in.From || e.Began >= in.To {
				continue
			}
			left := q.left(uses, in.From, e.Began, e.Began+e.Took) - float64(q.All-q.Ahead[e.Process])
			if left < float64(e.Cost) {
				continue
			}
			var b strings.Builder
			fmt.Fprintf(&b, "histories: %s/%s: denied, and yet at least %.3f are left of %v, with no more than %d held by other processes (leases of %v):\n  %v\nafter\n",
				k.Limiter, k.Name, left, q.Limit, q.All-q.Ahead[e.Process], q.Life, e)
			for _, u := range uses {
				if u.from <= e.Began+e.Took && u.to >= e.Began-k.span(q)-q.Life {
					fmt.Fprintf(&b, "  %v\n", u.event)
				}
			}
			return fmt.Errorf("%s", b.String())
		}
	}
	return nil
}

// span is how far back what was used matters to those who read of it.
func (Key) span(q Quota) time.Duration {
	switch l := q.Limit.(type) {
	case ringfence.TokenBucket:
		return time.Duration(float64(l.Burst) / float64(l.Rate) * float64(l.Per))
	case ringfence.SlidingLog:
		return l.Window
	}
	return 0
}

// left is the least that there can have been of a limit, at any instant between two, if
// nobody held anything.
func (q Quota) left(uses []use, begin, from, to time.Duration) float64 {
	switch l := q.Limit.(type) {
	case ringfence.SlidingLog:
		left := l.Limit
		for _, u := range uses {
			if u.from <= to && u.to+l.Window+q.Life+rounding > from {
				left -= u.units
			}
		}
		return float64(left)
	case ringfence.TokenBucket:
		left, at := float64(l.Burst), begin
		gain := func(until time.Duration) {
			if until > at {
				left = min(float64(l.Burst), left+float64(l.Rate)*float64(until-at)/float64(l.Per))
				at = until
			}
		}
		for _, u := range uses { // as late as possible
			if u.to <= from {
				gain(u.to)
				left -= float64(u.units)
			} else if u.from <= to {
				left -= float64(u.units) // gained up to from only
			}
		}
		gain(from)
		return left - float64(l.Rate)*float64(rounding)/float64(l.Per)
	}
	return 0
}
