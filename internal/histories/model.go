package histories

import (
	"cmp"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"

	"github.com/anishathalye/porcupine"

	"github.com/ringfence/ringfence"
)

// maxCost is the highest cost that the model keeps apart.
const maxCost = 4

// counter is one thing that a key's state can be.
type counter struct {
	used   int16 // of the limit
	told   int16 // units that shares admitted, and that may be charged yet
	resets int16 // Resets that failed, and that may be done yet
	// maybe are the calls that may be charged yet, by cost.
	maybe [maxCost + 1]int16
}

// covers says whether whatever may become of o may become of c too.
func (c counter) covers(o counter) bool {
	if c.used != o.used || c.told < o.told || c.resets < o.resets {
		return false
	}
	for i := range c.maybe {
		if c.maybe[i] < o.maybe[i] {
			return false
		}
	}
	return true
}

// reach calls f with c after some of what may be charged yet has been, for every way to
// have used want units exactly.
//
// Only the ways that leave most for later are tried. A call that did not fit is as if it
// had never been executed; what a failed Reset wiped need not have been charged before it;
// and of units that are told beyond the limit the surplus may as well be told later.
func (c counter) reach(want int16, f func(counter)) {
	c.add(want, maxCost, f)
	if c.resets > 0 {
		c.resets--
		c.used = 0
		c.add(want, maxCost, f)
	}
}

// add tries the calls of this cost and below, and then what is told.
func (c counter) add(want int16, cost int, f func(counter)) {
	most := c.used + c.told
	for i := 1; i <= cost; i++ {
		most += c.maybe[i] * int16(i)
	}
	if c.used > want || most < want {
		return
	}
	if cost == 0 {
		c.told -= want - c.used
		c.used = want
		f(c)
		return
	}
	for {
		c.add(want, cost-1, f)
		if c.maybe[cost] == 0 {
			return
		}
		c.maybe[cost]--
		c.used += int16(cost)
	}
}

// counters is all that a key's state can be: a set, without those that others cover.
type counters struct {
	all  []counter // sorted
	hash uint64
}

var hashSeed = maphash.MakeSeed()

func newCounters(all []counter) *counters {
	slices.SortFunc(all, counter.compare)
	all = slices.Compact(all)
	kept := all[:0]
	same := 0 // where those with as many used begin
	for _, c := range all {
		if same < len(kept) && kept[same].used != c.used {
			same = len(kept)
		}
		if !slices.ContainsFunc(kept[same:], func(k counter) bool { return k.covers(c) }) {
			kept = append(kept, c)
		}
	}
	return sorted(kept)
}

// compare puts whoever covers another before it.
func (c counter) compare(o counter) int {
	if d := cmp.Or(int(c.used)-int(o.used), int(o.told)-int(c.told), int(o.resets)-int(c.resets)); d != 0 {
		return d
	}
	for i := range c.maybe {
		if d := int(o.maybe[i]) - int(c.maybe[i]); d != 0 {
			return d
		}
	}
	return 0
}

func sorted(all []counter) *counters {
	var h maphash.Hash
	h.SetSeed(hashSeed)
	for _, c := range all {
		maphash.WriteComparable(&h, c)
	}
	return &counters{all, h.Sum64()}
}

// model is the counter of a key with this limit, as porcupine wants it. It follows all the
// ways a history may have gone at once (the power set of a nondeterministic model), because
// most of them can be told to lead nowhere else than others.
func model(limit int64) porcupine.Model {
	return porcupine.Model{
		Init: func() any { return newCounters([]counter{{}}) },
		Step: func(state, input, _ any) (bool, any) {
			next := step(state.(*counters).all, input.(Event), int16(limit))
			return len(next.all) > 0, next
		},
		Equal: func(a, b any) bool {
			return a.(*counters).hash == b.(*counters).hash && slices.Equal(a.(*counters).all, b.(*counters).all)
		},
		Hash: func(s any) uint64 { return s.(*counters).hash },
	}
}

// step is what a key's state can be after an event, given what it could be before it.
func step(before []counter, e Event, limit int16) *counters {
	if onlyOpens(e) {
		return open(before, e)
	}
	var after []counter
	keep := func(c counter) { after = append(after, c) }
	for _, c := range before {
		switch {
		case e.Kind == Wipe, e.Kind == Reset && e.Err == nil:
			c.used = 0
			keep(c)
		case e.Kind == Lag:
			for used := range limit + 1 { // what it had had at the most, it may have lost
				c.reach(used, func(c counter) {
					for c.used >= 0 {
						keep(c)
						c.used--
					}
				})
			}
		case e.Kind == Quiet:
			for used := range limit + 1 {
				c.reach(used, func(c counter) {
					c.maybe, c.resets = [maxCost + 1]int16{}, 0
					keep(c)
				})
			}
		default:
			if e.Decision.Limit != int64(limit) || e.Decision.Remaining < 0 || e.Decision.Remaining > int64(limit) {
				continue
			}
			left, cost := int16(e.Decision.Remaining), int16(e.Cost)
			used := limit - left
			switch {
			case e.Kind == Look && e.Decision.Allowed == (left >= cost),
				e.Kind == Charge && !e.Decision.Allowed && left < cost:
				c.reach(used, keep)
			case e.Kind == Charge && e.Decision.Allowed && used >= cost:
				c.reach(used-cost, func(c counter) {
					c.used = used
					keep(c)
				})
			}
		}
	}
	return newCounters(after)
}

// onlyOpens says whether an event is nothing but that something may be done from then on.
func onlyOpens(e Event) bool {
	return e.Kind == Charge && !byPrimary(e) || e.Kind == Reset && e.Err != nil
}

func open(before []counter, e Event) *counters {
	after := slices.Clone(before)
	for i := range after { // the same to all, so none comes to cover another
		c := &after[i]
		switch {
		case e.Kind == Reset:
			c.resets++
		case mayBeSent(e):
			c.maybe[e.Cost]++
		}
		if e.Kind == Charge && e.Err == nil && e.Decision.Allowed && e.Decision.Source == ringfence.SourceReplica {
			c.told += int16(e.Cost)
		}
	}
	return sorted(after)
}

func byPrimary(e Event) bool {
	return e.Err == nil && e.Decision.Source == ringfence.SourcePrimary
}

// mayBeSent says whether a call that the primary did not answer can have reached it.
func mayBeSent(e Event) bool { return e.Err != nil || e.Decision.Cause != ringfence.CauseBreaker }

// operations is the part of a history that concerns one key, as porcupine wants it.
//
// A call that may be charged at any time after it began would be an operation that returns
// at the end of time, among which the search would drown. It is one that is over as it
// begins instead, and only says that from then on such a charge is possible.
func operations(events []Event, k Key) []porcupine.Operation {
	var ops []porcupine.Operation
	for _, e := range events {
		end := e.Return
		switch {
		case e.Kind >= Wipe:
			if e.Shard != "" && e.Shard != k.Shard {
				continue
			}
		case e.Key != k:
			continue
		case e.Kind == Look && !byPrimary(e):
			continue
		case onlyOpens(e):
			end = e.Call
		}
		ops = append(ops, porcupine.Operation{ClientId: len(ops), Input: e, Call: e.Call, Return: end})
	}
	return ops
}

// Check returns nil if the history is linearizable, or an error that shows the history of
// the first key that is not, up to where no order could be found any more. All keys must be
// new at the beginning of the history.
func Check(events []Event) error {
	seen := map[Key]bool{}
	for _, e := range events {
		if e.Kind >= Wipe || seen[e.Key] {
			continue
		}
		if e.Cost > maxCost || e.Cost < 1 {
			return fmt.Errorf("histories: the model knows costs of 1 to %d, not %d", maxCost, e.Cost)
		}
		seen[e.Key] = true
	}
	for k := range seen {
		if err := checkKey(events, k); err != nil {
			return err
		}
	}
	return nil
}

func checkKey(events []Event, k Key) error {
	ops := operations(events, k)
	m := model(k.Limit)
	if porcupine.CheckOperations(m, ops) {
		return nil
	}
	_, info := porcupine.CheckOperationsVerbose(m, ops, 0)
	var longest []porcupine.Operation
	for _, l := range info.PartialLinearizationsOperations()[0] {
		if len(l) > len(longest) {
			longest = l
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "histories: %s/%s is not linearizable: no order of its %d entries explains more than these %d:\n",
		k.Limiter, k.Name, len(ops), len(longest))
	const tail = 40
	if n := len(longest) - tail; n > 0 {
		fmt.Fprintf(&b, "  (%d more)\n", n)
	}
	explained := map[int]bool{} // by what operations puts into ClientId
	for _, o := range longest {
		explained[o.ClientId] = true
	}
	for _, o := range longest[max(0, len(longest)-tail):] {
		fmt.Fprintf(&b, "  %v\n", o.Input)
	}
	// Whichever comes first of the rest has to begin before any of them returns.
	first := int64(1<<63 - 1)
	for _, o := range ops {
		if !explained[o.ClientId] {
			first = min(first, o.Return)
		}
	}
	b.WriteString("and then one of:\n")
	for _, o := range ops {
		if !explained[o.ClientId] && o.Call <= first {
			fmt.Fprintf(&b, "  %v\n", o.Input)
		}
	}
	return fmt.Errorf("%s", b.String())
}
