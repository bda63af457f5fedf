package ringfence

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// everywhere tells all nodes of a cluster, the master first, until all of them say that the
// slot is owned, or is not. What was on its way from node to node may have undone it.
func (w *wiredCluster) everywhere(t *testing.T, slot int, owned bool, tell func(s *redistest.Server)) {
	t.Helper()
	nodes := append([]*redistest.Server{w.from}, w.Nodes()...)
	is := func(s *redistest.Server) bool {
		shards, err := s.Client().ClusterShards(t.Context()).Result()
		aclMust(t, err)
		for _, shard := range shards {
			for _, r := range shard.Slots {
				if int64(slot) >= r.Start && int64(slot) <= r.End {
					return true
				}
			}
		}
		return false
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		agreed := true
		for _, s := range nodes {
			if is(s) != owned {
				agreed = false
				tell(s)
			}
		}
		if agreed {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the nodes do not agree that slot %d is owned: %t", slot, owned)
		}
	}
}

// The calls of a slot that no master owns take the ladder and say why; those of other slots of
// the same master are answered by it, in the same operation too; and the slot is back as soon
// as somebody owns it.
func TestASlotThatNobodyOwnsHarmsNoOther(t *testing.T) {
	w := startWired(t, redistest.ClusterOptions{Args: []string{"cluster-require-full-coverage no"}}, func(c *Config) {
		c.Budget, c.OperationTimeout = 5*time.Second, 5*time.Second
	})
	lost, others := w.keys[0], w.keys[1:5]
	slot := w.slot(lost)
	w.allow(t, "before", append(slices.Clone(others), lost)...)
	w.everywhere(t, slot, false, func(s *redistest.Server) {
		aclMust(t, s.Client().Do(t.Context(), "cluster", "delslots", slot).Err())
	})
	fellBack := func(what string, d Decision, err error) {
		t.Helper()
		if err != nil || d.Allowed || d.Source != SourcePolicy || d.Cause != CauseError {
			t.Errorf("%s: %+v, %v", what, d, err)
		}
	}
	for i := range 3 {
		d, err := w.limiter.Allow(t.Context(), lost)
		fellBack(fmt.Sprint("alone, call ", i), d, err)
		w.allow(t, fmt.Sprint("others, time ", i), others...)
		many := []Request{{Key: others[0], Cost: 1}, {Key: lost, Cost: 1}, {Key: others[1], Cost: 1}}
		ds, err := w.limiter.AllowMany(t.Context(), many)
		aclMust(t, err)
		fellBack(fmt.Sprint("among others, call ", i), ds[1], err)
		for _, n := range []int{0, 2} {
			if d := ds[n]; !d.Allowed || d.Source != SourcePrimary {
				t.Errorf("beside it, call %d: %s: %+v", i, many[n].Key, d)
			}
		}
	}
	if st := w.shard.breaker.stats(); st.State != BreakerClosed {
		t.Errorf("the breaker is %s: %s", st.State, st.LastError)
	}
	w.charged(t, "others", 7, others[:2]...)
	w.charged(t, "others", 4, others[2:]...)
	w.everywhere(t, slot, true, func(s *redistest.Server) {
		if s == w.from {
			aclMust(t, s.Client().Do(t.Context(), "cluster", "addslots", slot).Err())
		} // the others hear of it
	})
	w.allow(t, "when it is owned again", append(slices.Clone(others), lost)...)
	w.charged(t, "when it is owned again", 2, lost)
}
