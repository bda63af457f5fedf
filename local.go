package ringfence

import (
	"math"
	"math/bits"
	"sync"
)

// This file counts in this process's own memory, for shares of a limit while a shard is
// away. It may deny a little early (a nanosecond a call for a bucket, a 64th of the
// window for a log) and never admits more than the share. Times are ns of one monotonic
// clock of this process, given as a parameter.

// divide deals out units among instances: the whole part to each, and the remainder by
// draw, which differs for every instance and key, so that it is neither lost nor always
// with the same process. The parts add up to units on average over keys.
func divide(units int64, instances int, draw uint64) int64 {
	n := int64(instances)
	part := units / n
	if left := units % n; left > 0 {
		if hi, _ := bits.Mul64(draw, uint64(n)); int64(hi) < left {
			part++
		}
	}
	return part
}

// seed is what a replica said of a key: what this process may admit of the rest.
type seed struct {
	share int64 // units of what is left
	until int64 // log: when everything the replica knew of has left the window
}

// localState is one key's count. The zero value has admitted nothing.
type localState struct {
	// full is, for a bucket, when the share is whole again, and known when what the
	// replica knew to be missing is made up for; what lies between was admitted here.
	full, known int64
	told        int64 // of the deficit that was admitted here, sent to the shard since
	instances   int   // of which this is one: what ns are worth depends on it
	// slices are, for a log, what was admitted in each 64th of a window, oldest first.
	slices []localSlice
	live   int64

	seed   seed
	seeded bool
}

type localSlice struct {
	number int64 // now / length of a slice
	units  int64
	told   int64 // of units, sent to the shard since; see settle.go
}

const slicesPerWindow = 64

// bucketCost is the ns that n units are worth to one of the instances, rounded up;
// saturating.
func bucketCost(r *rule, units int64, instances int) int64 {
	hi, lo := bits.Mul64(uint64(units), uint64(r.p))
	if hi > 0 {
		return maxNs
	}
	hi, lo = bits.Mul64(lo, uint64(instances)*1000)
	if hi >= uint64(r.n) {
		return maxNs
	}
	q, rem := bits.Div64(hi, lo, uint64(r.n))
	if rem > 0 {
		q++
	}
	return int64(min(q, maxNs))
}

// maxNs is where durations saturate: a few of them can be added up.
const maxNs = math.MaxInt64 / 4

// divideBy makes the count one among so many instances. What a bucket admitted before is
// kept in units, which are worth more ns the more instances there are.
func (s *localState) divideBy(instances int, now int64) {
	if own := s.full - max(now, s.known); own > 0 {
		s.full += rescale(own, s.instances, instances) - own
	}
	s.told = rescale(s.told, s.instances, instances)
	s.instances = instances
}

// reseed starts from what a replica says now. What was admitted here before and may not
// be known to the replica stays counted.
func (s *localState) reseed(r *rule, now int64, instances int, draw uint64, from state) {
	s.divideBy(instances, now)
	left := divide(r.remaining(from), instances, draw)
	if r.algo == algoSlidingLog {
		s.seed = seed{share: left, until: now + from.c*1000}
	} else {
		whole := divide(r.capacity, instances, draw)
		missing := bucketCost(r, max(0, whole-left), instances)
		// What the replica said before is replaced, not added to, or a shard that comes
		// and goes would seem emptier each time.
		own := max(0, s.full-max(now, s.known))
		s.known = now + missing
		s.full = s.known + own
	}
	s.seeded = true
}

// take decides one call out of the share. A changed number of instances takes effect with
// the next share, or when this one is whole again. It returns what is left of the share, and the
// ns until the call would fit when it does not (0 if it never will), and until the
// share is whole.
func (s *localState) take(r *rule, now, cost int64, instances int, draw uint64, charge bool) (ok bool, left, retry, reset int64) {
	if s.instances == 0 || s.idle(r, now) {
		s.divideBy(instances, now)
	}
	instances = s.instances
	whole := divide(r.capacity, instances, draw)
	if r.algo == algoSlidingLog {
		return s.takeLog(r, now, cost, whole, charge)
	}
	room := bucketCost(r, whole, instances)
	s.full = min(max(s.full, now), now+room)
	price := bucketCost(r, cost, instances)
	if after := s.full + price - now; after <= room {
		if charge {
			s.full += price
		}
		ok = true
	} else if cost <= whole {
		retry = after - room
	}
	one := max(1, bucketCost(r, 1, instances))
	return ok, min(whole, max(0, room-(s.full-now))/one), retry, s.full - now
}

func (s *localState) takeLog(r *rule, now, cost, whole int64, charge bool) (ok bool, left, retry, reset int64) {
	window := r.window * 1000
	length := r.sliceLength()
	share := whole
	if s.seeded && now < s.seed.until {
		share = min(whole, s.seed.share)
	}
	s.expire(r, now)
	if s.live+cost <= share {
		ok = true
		if charge {
			number := now / length
			if k := len(s.slices); k > 0 && s.slices[k-1].number >= number {
				s.slices[k-1].units += cost
			} else {
				s.slices = append(s.slices, localSlice{number: number, units: cost})
			}
			s.live += cost
		}
	} else if cost <= whole {
		need := s.live + cost - share
		for _, c := range s.slices {
			if need <= 0 {
				break
			}
			need -= c.units
			retry = (c.number+1)*length + window - now
		}
		if need > 0 { // the share itself grows then
			retry = max(retry, s.seed.until-now)
		}
	}
	if k := len(s.slices); k > 0 {
		reset = (s.slices[k-1].number+1)*length + window - now
	}
	if s.seeded && now < s.seed.until {
		reset = max(reset, s.seed.until-now)
	}
	return ok, max(0, share-s.live), retry, reset
}

// sliceLength is the ns of one slice.
func (r *rule) sliceLength() int64 { return max(1, r.window*1000/slicesPerWindow) }

// expire drops the slices whose last instant is a window ago.
func (s *localState) expire(r *rule, now int64) {
	length, window := r.sliceLength(), r.window*1000
	for len(s.slices) > 0 && (s.slices[0].number+1)*length+window <= now {
		s.live -= s.slices[0].units
		s.slices = s.slices[1:]
	}
	if len(s.slices) == 0 {
		s.slices = nil
	}
}

// idle says whether forgetting the state changes no answer: nothing admitted here counts
// any more.
func (s *localState) idle(r *rule, now int64) bool {
	if r.algo == algoSlidingLog {
		k := len(s.slices)
		length := r.sliceLength()
		return (k == 0 || (s.slices[k-1].number+1)*length+r.window*1000 <= now) && (!s.seeded || s.seed.until <= now)
	}
	return s.full <= now
}

// localTable holds the keys counted in this process, a bounded number of them. An entry
// that still counts is never forgotten: that would hand out its share again. When all
// are in use, new keys share entries, and so may be denied early.
type localTable struct {
	most int

	mu      sync.Mutex // guards all below
	entries map[keyHash]*localEntry
	shared  map[keyHash]*localEntry
}

type localEntry struct {
	rule *rule
	localState
	epoch  uint64 // the shard's when it was seeded
	asOf   int64  // the instant of which that told
	shared bool   // by keys beyond the bound
}

// sharedEntries is how many entries the keys of one limiter beyond the bound share.
const sharedEntries = 256

func newLocalTable(most int) *localTable {
	return &localTable{most: most, entries: map[keyHash]*localEntry{}, shared: map[keyHash]*localEntry{}}
}

// with calls f on the entry of a key, made if need be, while holding the lock.
func (t *localTable) with(h keyHash, r *rule, limiter uint64, now int64, f func(*localEntry)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.entries[h]
	if e == nil {
		common := keyHash{hi: limiter, lo: h.lo % sharedEntries}
		e = t.shared[common]
		switch {
		case e != nil && !e.idle(e.rule, now):
			// This key may have been counted there, and must not start anew.
		case len(t.entries) < t.most || t.sweep(now):
			delete(t.shared, common)
			e = &localEntry{rule: r}
			t.entries[h] = e
		case e == nil:
			e = &localEntry{rule: r, shared: true}
			t.shared[common] = e
		}
	}
	e.rule = r
	f(e)
}

// find calls f on the entry of a key that has one of its own, while holding the lock.
func (t *localTable) find(h keyHash, f func(*localEntry)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.entries[h]; e != nil {
		f(e)
	}
}

// has says whether a key has an entry of its own.
func (t *localTable) has(h keyHash) (ok bool) {
	t.find(h, func(*localEntry) { ok = true })
	return ok
}

// sweep drops idle ones among some entries. Requires t.mu.
func (t *localTable) sweep(now int64) bool {
	looked, dropped := 0, false
	for h, e := range t.entries { // in random order
		if e.idle(e.rule, now) {
			delete(t.entries, h)
			dropped = true
		}
		if looked++; looked >= 128 {
			break
		}
	}
	return dropped
}

func (t *localTable) forget(h keyHash) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.entries, h)
}

func (t *localTable) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.entries) + len(t.shared)
}
