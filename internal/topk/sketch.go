package topk

import (
	"cmp"
	"hash/maphash"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// Stripes is how many locks a Sketch has. A key belongs to one of them, so that its
	// count is in one place.
	Stripes = 4
	// OneIn is how many calls one counted call stands for, once ExactPerStripe are
	// counted.
	OneIn = 64
	// ExactPerStripe is how many calls of a half window every stripe counts one by one.
	ExactPerStripe = 1024
)

// Sketch finds the most frequent keys of the last while: of half a window to a whole one.
// It keeps a Summary of the present half window and one of the half before it, and forgets
// whole halves.
//
// Calls are counted one by one until one of the stripes has had ExactPerStripe of them in
// the present half window. From then on one call in OneIn, drawn at random, counts for
// OneIn: a key with f calls gets a count of mean f and standard deviation
// sqrt((OneIn-1) x f), 8 % for 10,000 calls. All other calls take no lock and allocate
// nothing.
//
// Add and Top may be called from many goroutines.
type Sketch struct {
	half    int64 // ns
	seed    maphash.Seed
	sample  atomic.Int64 // before this instant one call in OneIn counts: the end of a half window
	stripes [Stripes]stripe
}

type stripe struct {
	mu       sync.Mutex // guards the following
	epoch    int64
	present  *Summary
	past     *Summary
	counted  int // calls of the present half
	sampled  bool
	sampling bool     // of the past half
	_        [64]byte // a cache line of its own
}

// Entry is one key of the result: in what was counted it weighs AtLeast to AtMost.
type Entry struct {
	Key             string
	AtLeast, AtMost uint64
}

// List is what Top returns.
type List struct {
	// Entries are sorted by AtLeast, then AtMost, descending.
	Entries []Entry
	// Total is the weight of all calls.
	Total uint64
	// Span is how far back it reaches, on the clock of the caller's now.
	Span time.Duration
	// Sampled says that a part of it was counted one in OneIn.
	Sampled bool
}

// NewSketch returns a Sketch of this many counters in each half window, rounded up to a
// multiple of Stripes.
func NewSketch(counters int, window time.Duration) *Sketch {
	s := &Sketch{half: max(1, int64(window/2)), seed: maphash.MakeSeed()}
	each := (counters + Stripes - 1) / Stripes
	for i := range s.stripes {
		s.stripes[i].present, s.stripes[i].past = NewSummary(each), NewSummary(each)
	}
	return s
}

// Add counts one call for a key at the instant now, in ns on any clock that begins at 0.
// draw are 32 random bits; whoever adds to two Sketches can draw once for both.
func (s *Sketch) Add(key string, now int64, draw uint32) {
	// This is all that most calls of a busy limiter cost: small enough to be inlined.
	if draw%OneIn != 0 && now < s.sample.Load() {
		return
	}
	s.count(key, now, draw)
}

// count counts a call for itself, or for OneIn if it is drawn.
func (s *Sketch) count(key string, now int64, draw uint32) {
	weight := uint64(1)
	if now < s.sample.Load() {
		if draw%OneIn != 0 {
			return // sampling has just begun
		}
		weight = OneIn
	}
	t := &s.stripes[maphash.String(s.seed, key)%Stripes]
	t.mu.Lock()
	defer t.mu.Unlock()
	s.turn(t, now)
	t.present.Add(key, weight)
	t.sampled = t.sampled || weight > 1
	t.counted++
	// Not only at the first call past the bound: another stripe that is still in the half
	// window before may have overwritten it.
	if end := (t.epoch + 1) * s.half; t.counted >= ExactPerStripe && s.sample.Load() < end {
		s.sample.Store(end)
	}
}

// turn begins a new half window when it is time. A clock that goes back begins none.
func (s *Sketch) turn(t *stripe, now int64) {
	epoch := now / s.half
	if epoch <= t.epoch {
		return
	}
	next := epoch == t.epoch+1
	t.present, t.past, t.sampling = t.past, t.present, t.sampled
	t.present.Reset()
	if !next {
		t.past.Reset()
		t.sampling = false
	}
	t.epoch, t.counted, t.sampled = epoch, 0, false
}

// Top returns at most n keys of those that keep accepts, the most frequent first. keep is
// called without a lock.
func (s *Sketch) Top(now int64, n int, keep func(key string) bool) List {
	var out List
	for i := range s.stripes {
		t := &s.stripes[i]
		t.mu.Lock()
		s.turn(t, now)
		out.Total += t.present.Total() + t.past.Total()
		out.Sampled = out.Sampled || t.sampled || t.sampling
		out.Entries = append(out.Entries, merge(t.present, t.past)...)
		t.mu.Unlock()
	}
	out.Entries = slices.DeleteFunc(out.Entries, func(e Entry) bool { return !keep(e.Key) })
	slices.SortFunc(out.Entries, func(a, b Entry) int {
		return cmp.Or(cmp.Compare(b.AtLeast, a.AtLeast), cmp.Compare(b.AtMost, a.AtMost), cmp.Compare(a.Key, b.Key))
	})
	out.Entries = slices.Clip(out.Entries[:min(max(n, 0), len(out.Entries))])
	out.Span = time.Duration(min(now, now%s.half+s.half))
	return out
}

// merge adds two summaries. A key that has a counter in one of them only may have had up
// to Unseen in the other (Agarwal et al.: "Mergeable Summaries", PODS 2012).
func merge(a, b *Summary) []Entry {
	out := make([]Entry, 0, len(a.heap)+len(b.heap))
	for _, c := range a.heap {
		e := Entry{Key: c.key, AtLeast: c.count - c.over, AtMost: c.count}
		if j, both := b.index[c.key]; both {
			o := b.heap[j]
			e.AtLeast, e.AtMost = e.AtLeast+o.count-o.over, e.AtMost+o.count
		} else {
			e.AtMost += b.Unseen()
		}
		out = append(out, e)
	}
	for _, c := range b.heap {
		if _, both := a.index[c.key]; !both {
			out = append(out, Entry{Key: c.key, AtLeast: c.count - c.over, AtMost: c.count + a.Unseen()})
		}
	}
	return out
}
