package ringfence

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// A batch of resets of which one server says nothing resets the keys of all others meanwhile,
// and every key is told what became of it.
func TestAResetThatOneMasterDoesNotAnswerFailsForItsKeysAlone(t *testing.T) {
	c := redistest.StartCluster(t, redistest.ClusterOptions{NodeTimeout: time.Minute})
	redistest.NoLeaks(t)
	r, err := Open(t.Context(), Config{
		Shards: []ShardConfig{{ID: "c", Primary: c.URL()}}, HashKey: []byte("0123456789abcdef"), Logger: (&sink{}).logger(),
		Budget: 5 * time.Second, OperationTimeout: 5 * time.Second, Policy: PolicyClosed, Strict: true,
	})
	aclMust(t, err)
	defer r.Close()
	l, err := r.Limiter("l", SlidingLog{Limit: 3, Window: time.Hour})
	aclMust(t, err)
	silent := c.Masters()[0]
	var reqs []*request
	var at []*redistest.Server
	of := map[bool]int{} // keys of the silent one, and of the others
	for i := range 40 {
		key := fmt.Sprint(i)
		d, err := l.Allow(t.Context(), key)
		if err != nil || d.Source != SourcePrimary {
			t.Fatalf("%+v, %v", d, err)
		}
		q := r.newRequest(opReset, l.rule, l.keys.hash(key), 1)
		owner := c.MasterOf(slotOf(tagOf(q.key())))
		reqs, at = append(reqs, q), append(at, owner)
		of[owner == silent]++
	}
	if of[true] < 2 || of[false] < 2 {
		t.Fatalf("%v keys of the silent master and of the others", of)
	}
	n := (*r.members[0].cluster.list.Load())[0].nodes[0]
	reset := func(most time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), most)
		defer cancel()
		return n.reset(ctx, reqs)
	}
	silent.Pause()
	if err := reset(time.Second); err != nil {
		t.Errorf("the whole batch failed: %v", err)
	}
	for i, q := range reqs {
		switch there := at[i] != silent; {
		case there && q.failed != nil:
			t.Errorf("key %d: %v, though its master is there", i, q.failed)
		case !there && (q.failed == nil || classify(q.failed) != typeTimeout):
			t.Errorf("key %d: %v, want a time-out: its master is silent", i, q.failed)
		case there && at[i].Client().Exists(t.Context(), string(q.key())).Val() != 0:
			t.Errorf("key %d is there still", i)
		}
	}
	silent.Resume()
	if err := reset(5 * time.Second); err != nil {
		t.Errorf("with all masters there: %v", err)
	}
	for i, q := range reqs {
		if q.failed != nil || at[i].Client().Exists(t.Context(), string(q.key())).Val() != 0 {
			t.Errorf("key %d, all masters there: %v", i, q.failed)
		}
	}
	for _, s := range c.Masters() {
		s.Pause()
	}
	err = reset(500 * time.Millisecond)
	for _, s := range c.Masters() {
		s.Resume()
	}
	if classify(err) != typeTimeout {
		t.Errorf("no master answers: %v, want a time-out", err)
	}
}
