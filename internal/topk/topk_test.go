package topk

import (
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"
)

func all(string) bool { return true }

// zipf is a stream of n keys out of 100,000.
func zipf(seed uint64, s float64, n int) []string {
	z := rand.NewZipf(rand.New(rand.NewPCG(seed, 1)), s, 1, 99_999)
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("user-%d", z.Uint64())
	}
	return out
}

func TestASummaryIsNeverFurtherOffThanItsBound(t *testing.T) {
	for _, skew := range []float64{1.01, 1.2, 1.5, 2} {
		for _, m := range []int{1, 16, 64, 1000} {
			exact := map[string]uint64{}
			s := NewSummary(m)
			r := rand.New(rand.NewPCG(7, 7))
			total := uint64(0)
			for _, key := range zipf(3, skew, 50_000) {
				w := uint64(1 + r.IntN(3))
				s.Add(key, w)
				exact[key] += w
				total += w
			}
			if s.Total() != total || len(s.heap) > m || len(s.index) != len(s.heap) {
				t.Fatalf("skew %g, m %d: total %d of %d, %d counters, %d indexed", skew, m, s.Total(), total, len(s.heap), len(s.index))
			}
			bound := total / uint64(m)
			for i, c := range s.heap {
				if s.index[c.key] != i {
					t.Fatalf("skew %g, m %d: %s is at %d, indexed at %d", skew, m, c.key, i, s.index[c.key])
				}
				if c.count < exact[c.key] || c.count-c.over > exact[c.key] || c.over > bound {
					t.Errorf("skew %g, m %d: %s has %d, summary says %d to %d, bound %d", skew, m, c.key, exact[c.key], c.count-c.over, c.count, bound)
				}
			}
			for key, n := range exact {
				if _, has := s.index[key]; !has && n > s.Unseen() {
					t.Errorf("skew %g, m %d: %s has %d and no counter; the most unseen is %d", skew, m, key, n, s.Unseen())
				}
			}
			if s.Unseen() > bound {
				t.Errorf("skew %g, m %d: unseen up to %d, bound %d", skew, m, s.Unseen(), bound)
			}
		}
	}
}

// Below the point where sampling begins everything that a Sketch says is certain.
func TestASketchOfFewCallsBoundsEveryKey(t *testing.T) {
	const counters = 64
	s := NewSketch(counters, 20)
	exact := map[string]uint64{}
	stream := zipf(11, 1.2, ExactPerStripe-1) // so no stripe has more
	for i, key := range stream {
		s.Add(key, int64(i*20/len(stream)), rand.Uint32()) // over both halves
		exact[key]++
	}
	list := s.Top(19, 1<<30, all)
	if list.Sampled || list.Total != uint64(len(stream)) || list.Span != 19 {
		t.Fatalf("sampled %t, total %d of %d, span %d", list.Sampled, list.Total, len(stream), list.Span)
	}
	bound := uint64(Stripes * len(stream) / counters)
	listed := map[string]bool{}
	for i, e := range list.Entries {
		listed[e.Key] = true
		if n := exact[e.Key]; n < e.AtLeast || n > e.AtMost || e.AtMost-e.AtLeast > bound {
			t.Errorf("%s has %d, sketch says %d to %d, bound %d", e.Key, n, e.AtLeast, e.AtMost, bound)
		}
		if i > 0 && e.AtLeast > list.Entries[i-1].AtLeast {
			t.Errorf("entry %d is above the one before", i)
		}
	}
	for key, n := range exact {
		if n > bound && !listed[key] {
			t.Errorf("%s has %d, more than %d, and is not listed", key, n, bound)
		}
	}
}

// A draw that is 6 standard deviations off happens in 2 of 10^9 runs.
func TestSampledCountsAreWithinTheStatedDeviation(t *testing.T) {
	s := NewSketch(256, 10)
	exact := map[string]float64{}
	for _, key := range zipf(5, 1.5, 300_000) {
		s.Add(key, 0, rand.Uint32())
		exact[key]++
	}
	list := s.Top(0, 10, all)
	if !list.Sampled || len(list.Entries) != 10 {
		t.Fatalf("sampled %t, %d entries", list.Sampled, len(list.Entries))
	}
	if off := math.Abs(float64(list.Total) - 300_000); off > 6*math.Sqrt((OneIn-1)*300_000) {
		t.Errorf("total %d of 300000", list.Total)
	}
	for _, e := range list.Entries {
		six := 6 * math.Sqrt((OneIn-1)*exact[e.Key])
		if n := exact[e.Key]; n < float64(e.AtLeast)-six || n > float64(e.AtMost)+six {
			t.Errorf("%s has %.0f, sketch says %d to %d, 6 deviations are %.0f", e.Key, n, e.AtLeast, e.AtMost, six)
		}
	}
}

func TestASketchForgetsByHalvesAndCountsExactlyAgain(t *testing.T) {
	s := NewSketch(64, 10)
	for range Stripes * ExactPerStripe * 4 {
		s.Add("old", 0, rand.Uint32())
	}
	if l := s.Top(4, 10, all); !l.Sampled {
		t.Fatal("a busy sketch does not sample")
	}
	for range 100 {
		s.Add("new", 5, rand.Uint32())
	}
	if l := s.Top(9, 10, all); len(l.Entries) != 2 || l.Entries[0].Key != "old" || l.Entries[1].AtLeast != 100 || !l.Sampled {
		t.Errorf("100 calls later: %+v", l)
	}
	if l := s.Top(10, 10, all); len(l.Entries) != 1 || l.Entries[0].Key != "new" {
		t.Errorf("a window later: %+v", l)
	}
	if l := s.Top(20, 10, all); len(l.Entries) != 0 || l.Total != 0 || l.Sampled {
		t.Errorf("two windows later: %+v", l)
	}
	s.Add("late", 3, 0) // the clock went back, to where one in OneIn is drawn
	if l := s.Top(20, 10, all); len(l.Entries) != 1 || l.Total != OneIn {
		t.Errorf("after a clock that went back: %+v", l)
	}
}

// After a busy half window the next begins with counting every call, whatever is drawn.
func TestAHalfWindowAfterABusyOneCountsItsFirstCalls(t *testing.T) {
	const half, never = 5, 1 // a draw that sampling never takes
	s := NewSketch(16, 2*half)
	for range 2 * ExactPerStripe * Stripes {
		s.Add("busy", 0, 0)
	}
	s.Add("left out", half-1, never)
	s.Add("first", half, never)
	got := map[string]uint64{}
	for _, e := range s.Top(half, 10, all).Entries {
		got[e.Key] = e.AtLeast
	}
	if got["first"] != 1 || got["left out"] != 0 {
		t.Errorf("%v, want the first call of the half window in it and the one left out not", got)
	}
}

func TestAFloodOfKeysTakesBoundedMemory(t *testing.T) {
	const counters, keyBytes = 256, 512
	live := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	// Several, so that what else lives on the heap does not matter.
	var sketches [4]*Sketch
	before := live()
	for k := range sketches {
		s := NewSketch(counters, 10)
		for half := range int64(2) {
			for i := range 20_000 {
				s.Add(fmt.Sprintf("%0*d", keyBytes, int(half)*20_000+i), half*5, rand.Uint32())
			}
		}
		if n := len(s.Top(9, 1<<30, all).Entries); n != 2*counters {
			t.Errorf("%d keys, want all %d counters in use", n, 2*counters)
		}
		sketches[k] = s
	}
	const bound = 2 * counters * (keyBytes + 128)
	if got := (live() - before) / uint64(len(sketches)); got > bound {
		t.Errorf("%d bytes, at most %d are stated", got, bound)
	} else {
		t.Logf("%d bytes of at most %d", got, bound)
	}
	runtime.KeepAlive(sketches)
}

func TestAKeyKeepsNothingOfTheRequestItCameWith(t *testing.T) {
	request := strings.Repeat("a", 1<<20)
	for m := 1; m <= 2; m++ { // taking over a counter, and getting a new one
		s := NewSummary(m)
		s.Add("first", 1)
		s.Add(request[:8], 1)
		for _, c := range s.heap {
			if c.key == request[:8] && unsafe.StringData(c.key) == unsafe.StringData(request) {
				t.Error("the counter holds a part of the request")
			}
		}
	}
}

func TestASketchIsSafeForManyCallers(t *testing.T) {
	s := NewSketch(32, 100*time.Nanosecond)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 5000 {
				s.Add(fmt.Sprintf("%d", (i*g)%50), int64(i/20), rand.Uint32())
				if i%500 == 0 {
					s.Top(int64(i/20), 5, all)
				}
			}
		})
	}
	wg.Wait()
	for i := range s.stripes {
		for _, sum := range []*Summary{s.stripes[i].present, s.stripes[i].past} {
			weight := uint64(0)
			for at, c := range sum.heap {
				weight += c.count
				if sum.index[c.key] != at {
					t.Errorf("%s is at %d, indexed at %d", c.key, at, sum.index[c.key])
				}
			}
			if weight < sum.Total() {
				t.Errorf("counters of %d for a weight of %d", weight, sum.Total())
			}
		}
	}
}

func FuzzSummary(f *testing.F) {
	f.Add(uint8(2), []byte("abcabcaad"))
	f.Fuzz(func(t *testing.T, m uint8, stream []byte) {
		s := NewSummary(int(m))
		exact := map[string]uint64{}
		for _, b := range stream {
			s.Add(string(b), uint64(b%4)+1)
			exact[string(b)] += uint64(b%4) + 1
		}
		for _, c := range s.heap {
			if n := exact[c.key]; n < c.count-c.over || n > c.count || c.over > s.Total()/uint64(s.max) {
				t.Errorf("%q has %d, summary says %d to %d", c.key, n, c.count-c.over, c.count)
			}
		}
	})
}

func BenchmarkAdd(b *testing.B) {
	keys := zipf(1, 1.2, 1<<16)
	b.Run("sampled", func(b *testing.B) {
		s := NewSketch(256, time.Hour)
		for _, k := range keys {
			s.Add(k, 0, rand.Uint32())
		}
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			s.Add(keys[i%len(keys)], 0, rand.Uint32())
		}
	})
	b.Run("every", func(b *testing.B) {
		s := NewSummary(64)
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			s.Add(keys[i%len(keys)], 1)
		}
	})
}
