package ringfence

import (
	"sync"
	"sync/atomic"
	"testing"
)

func TestACallerKeepsToItsPlaceAndCallersSpread(t *testing.T) {
	const callers = 64
	var all sync.WaitGroup
	var places [callers]uint
	together := make(chan struct{})
	for c := range callers {
		all.Go(func() {
			for i := range 100 {
				is := place()
				if i > 0 && is != places[c] {
					t.Errorf("a caller moved from %d to %d", places[c], is)
				}
				places[c] = is
			}
			<-together // as long as all are alive no two have the same stack
		})
	}
	close(together)
	all.Wait()
	used := map[uint]int{}
	for _, p := range places {
		used[p%minStripes]++
	}
	if len(used) < minStripes/2 {
		t.Errorf("%d callers take %d of %d stripes: %v", callers, len(used), minStripes, used)
	}
}

// Whoever entered is waited for, whoever comes later does not enter, and idle tells once,
// when the last one has left.
func TestGatesCloseTogether(t *testing.T) {
	for range 200 {
		g := newGates(minStripes)
		var inside, after atomic.Int64
		var done atomic.Bool
		var all sync.WaitGroup
		for c := range uint(2 * minStripes) {
			all.Go(func() {
				for range 50 {
					mine, late := g.at(c), done.Load()
					if !mine.enter() {
						continue
					}
					if late {
						after.Add(1)
					}
					inside.Add(1)
					inside.Add(-1)
					mine.leave()
				}
			})
		}
		held := g.at(3)
		if !held.enter() {
			t.Fatal("an open gate lets nobody in")
		}
		if !g.close() {
			t.Fatal("they were closed before")
		}
		done.Store(true)
		if g.close() {
			t.Fatal("they close twice")
		}
		all.Wait()
		select {
		case <-g.idle:
			t.Fatal("idle with a call under way")
		default:
		}
		held.leave()
		<-g.idle
		if n := after.Load(); n > 0 {
			t.Fatalf("%d entered after they were closed", n)
		}
		if !g.closed() || inside.Load() != 0 {
			t.Fatal("they are not closed")
		}
	}
}
