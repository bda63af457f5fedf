package ringfence

import (
	"errors"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// A Reset whose caller has left is executed when the server comes round to it. What was
// denied after its caller left and before that may be admitted now.
func TestAResetThatIsExecutedLateForgetsDenialsOnceMore(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	r, err := Open(t.Context(), Config{
		Shards: []ShardConfig{{ID: "a", Primary: s.URL()}}, HashKey: []byte("0123456789abcdef"),
		Logger: (&sink{}).logger(), Budget: 50 * time.Millisecond, OperationTimeout: 20 * time.Second, Policy: PolicyClosed, Strict: true,
	})
	aclMust(t, err)
	t.Cleanup(func() { aclMust(t, r.Close()) })
	l, err := r.Limiter("l", SlidingLog{Limit: 1, Window: time.Hour}, WithNearCache(MaxNearCache), WithBudget(50*time.Millisecond))
	aclMust(t, err)
	waitFor(t, "the primary admits the only unit", func() bool {
		d, err := l.Allow(t.Context(), "k")
		aclMust(t, err)
		return d.Source == SourcePrimary
	})
	s.Pause()
	if err := l.Reset(t.Context(), "k"); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a silent server: %v, want ErrUnavailable", err)
	}
	// What the primary would say to a call that it decides before the Reset.
	h := l.keys.hash("k")
	hour := int64(time.Hour / time.Microsecond)
	said := state{a: 1, b: hour, c: hour}
	now := r.clock()
	r.near.add(h, l.rule, 1, said, now, l.nearLife)
	if r.near.find(h, l.rule, 1, now) == nil {
		t.Fatal("the denial was not kept")
	}
	s.Resume()
	waitFor(t, "the Reset ends", func() bool { return r.Stats()[0].InFlight == 0 })
	waitFor(t, "the denial is forgotten", func() bool { return r.near.find(h, l.rule, 1, now) == nil })
	waitFor(t, "a unit is admitted again", func() bool {
		d, err := l.Allow(t.Context(), "k")
		aclMust(t, err)
		return d.Allowed && d.Source == SourcePrimary
	})
}
