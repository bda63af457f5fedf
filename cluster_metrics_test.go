package ringfence

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence/internal/redistest"
)

// giveAll gives all slots of a master, and none of its keys, to another.
func giveAll(t *testing.T, c *redistest.Cluster, slots []int, from, to *redistest.Server) {
	t.Helper()
	id, err := to.Client().Do(t.Context(), "cluster", "myid").Text()
	aclMust(t, err)
	aclMust(t, from.Client().FlushAll(t.Context()).Err())
	// Its word must weigh more than what is still on its way from the other.
	aclMust(t, to.Client().Do(t.Context(), "cluster", "bumpepoch").Err())
	for _, s := range append([]*redistest.Server{to, from}, c.Nodes()...) {
		pipe := s.Client().Pipeline()
		for _, slot := range slots {
			pipe.Do(t.Context(), "cluster", "setslot", slot, "node", id)
		}
		_, err := pipe.Exec(t.Context())
		aclMust(t, err)
	}
	aclMust(t, c.WaitReady(t.Context()))
}

// The series of a master that owns nothing any more are gone; what it has counted is not,
// should it own slots again.
func TestSeriesOfAMasterWithoutSlotsAreGoneAndGoOnWhenItHasSome(t *testing.T) {
	c := redistest.StartCluster(t, redistest.ClusterOptions{})
	registry := prometheus.NewRegistry()
	redistest.NoLeaks(t)
	ring, err := Open(t.Context(), Config{
		Shards: []ShardConfig{{ID: "c", Primary: c.URL()}}, HashKey: []byte("0123456789abcdef"), Logger: (&sink{}).logger(),
		Registerer: registry, Policy: PolicyClosed, Budget: 10 * time.Second, OperationTimeout: 10 * time.Second,
	})
	aclMust(t, err)
	defer ring.Close()
	l, err := ring.Limiter("api", TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000})
	aclMust(t, err)
	const keys = 60
	ask := func() (of map[string]int) {
		of = map[string]int{}
		for i := range keys {
			d, err := l.Allow(t.Context(), fmt.Sprint(i))
			if err != nil || !d.Allowed || d.Source != SourcePrimary {
				t.Errorf("key %d: %+v, %v", i, d, err)
			}
			of[d.Shard]++
		}
		return of
	}
	// families of the shard, and how often it has been asked by its own count.
	families := func(shard string) map[string]bool {
		out := map[string]bool{}
		all, err := registry.Gather()
		aclMust(t, err)
		for _, f := range all {
			for _, m := range f.GetMetric() {
				for _, label := range m.GetLabel() {
					if label.GetName() == "shard_id" && label.GetValue() == shard {
						out[f.GetName()] = true
					}
				}
			}
		}
		return out
	}
	value := func(sample string) int {
		for line := range strings.Lines(exposition(t, registry)) {
			if rest, ok := strings.CutPrefix(line, sample+" "); ok {
				n, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
				aclMust(t, err)
				return int(n)
			}
		}
		return -1
	}
	decisions := func() int {
		return value(`ratelimiter_decisions_total{limit="api",outcome="allowed",source="primary"}`)
	}
	asked := func(shard string) int {
		return value(`ratelimiter_request_latency_seconds_count{outcome="allowed",shard_id="` + shard + `"}`)
	}

	of := ask()
	const gone = "c-1"
	if of[gone] == 0 || asked(gone) != of[gone] || decisions() != keys {
		t.Fatalf("%d calls of %v counted for %s, %d in all", asked(gone), of, gone, decisions())
	}
	before := families(gone)
	var slots []int
	k := ring.members[0].cluster
	list := *k.list.Load()
	for slot, i := range k.slots.Load() {
		if list[i].id == gone {
			slots = append(slots, slot)
		}
	}
	from := c.MasterOf(slots[0])
	to := c.Masters()[0]
	if to == from {
		to = c.Masters()[1]
	}
	giveAll(t, c, slots, from, to)
	aclMust(t, k.refresh(t.Context()))
	if left := families(gone); len(left) > 0 {
		t.Errorf("series of a master without slots are left: %v", left)
	}
	if of := ask(); of[gone] != 0 || decisions() != 2*keys {
		t.Errorf("%v asked after the slots had moved, %d decisions counted", of, decisions())
	}
	for _, s := range ring.Stats() {
		if s.ID == gone {
			t.Errorf("it is still among the shards: %+v", s)
		}
	}
	giveAll(t, c, slots, to, from)
	aclMust(t, k.refresh(t.Context()))
	was := of[gone]
	of = ask()
	if of[gone] != was || asked(gone) != 2*was || decisions() != 3*keys {
		t.Errorf("after the slots came back %d calls of %v are counted for %s, want %d in all; %d decisions", asked(gone), of, gone, 2*was, decisions())
	}
	for name := range before {
		if !families(gone)[name] {
			t.Errorf("%s has not come back", name)
		}
	}
}
