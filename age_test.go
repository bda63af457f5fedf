package ringfence

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// The worked number of Decision.Age: a replica that had last heard of its primary 1 s
// before it was asked, 2 s ago.
func TestADecisionOutOfAShareSaysHowOldWhatItRestsOnIs(t *testing.T) {
	primary := redistest.Start(t, redistest.Options{Args: []string{"repl-diskless-sync no"}})
	replica := redistest.Start(t, redistest.Options{ReplicaOf: primary, Args: []string{"repl-diskless-sync no"}})
	aclMust(t, replica.WaitInSync(t.Context()))
	var ahead atomic.Int64
	ring, err := Open(t.Context(), Config{
		Shards:  []ShardConfig{{ID: "a", Primary: primary.URL(), Replicas: []string{replica.URL()}}},
		HashKey: []byte("0123456789abcdef"), Logger: (&sink{}).logger(), Policy: PolicyLocal, Instances: 1,
		Budget: 10 * time.Second, OperationTimeout: 10 * time.Second,
		Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) },
	})
	aclMust(t, err)
	defer ring.Close()
	l, err := ring.Limiter("api", SlidingLog{Limit: 100, Window: time.Hour})
	aclMust(t, err)
	// Nothing is slower than the slack of 1 s that a busy machine is given.
	want := func(what string, d Decision, err error, source Source, age time.Duration) {
		t.Helper()
		if err != nil || d.Source != source || d.Age < age || d.Age > age+time.Second || (age == 0 && d.Age != 0) {
			t.Errorf("%s: %+v, %v; want %s and an age of %s", what, d, err, source, age)
		}
	}
	d, err := l.Allow(t.Context(), "k")
	want("primary", d, err, SourcePrimary, 0)
	aclMust(t, replica.WaitInSync(t.Context()))
	aclMust(t, ring.ForceBreaker("a", BreakerForcedOpen))
	s := ring.all()[0]
	s.mu.Lock()
	s.lag = time.Second
	s.mu.Unlock()
	d, err = l.Peek(t.Context(), "k")
	want("just asked", d, err, SourceReplica, time.Second)
	ahead.Add(int64(2 * time.Second))
	d, err = l.Allow(t.Context(), "k")
	want("2 s later", d, err, SourceReplica, 3*time.Second)
	many, err := l.AllowMany(t.Context(), []Request{{"k", 1}, {"another", 1}})
	aclMust(t, err)
	want("among many", many[0], nil, SourceReplica, 3*time.Second)
	want("another key, asked now", many[1], nil, SourceReplica, time.Second)
	replica.Kill()
	d, err = l.Allow(t.Context(), "k")
	want("the share goes on", d, err, SourceReplica, 3*time.Second)
	d, err = l.Allow(t.Context(), "a third")
	want("nobody to ask", d, err, SourceLocal, 0)
}

// What a replica says of itself is what Age begins with.
func TestAReplicasLagIsKnownFromEveryServerThatWasAsked(t *testing.T) {
	cluster := redistest.StartCluster(t, redistest.ClusterOptions{ReplicasPer: 1, NodeTimeout: time.Minute})
	primary := redistest.Start(t, redistest.Options{Args: []string{"repl-diskless-sync no"}})
	replica := redistest.Start(t, redistest.Options{ReplicaOf: primary, Args: []string{"repl-diskless-sync no"}})
	aclMust(t, replica.WaitInSync(t.Context()))
	aclMust(t, cluster.WaitReady(t.Context()))
	for _, c := range []struct {
		shard    ShardConfig
		primary  *redistest.Server
		resolved func(*Ring) *shard
	}{
		{ShardConfig{ID: "a", Primary: primary.URL(), Replicas: []string{replica.URL()}}, primary, func(r *Ring) *shard { return r.all()[0] }},
		{ShardConfig{ID: "c", Primary: cluster.URL()}, cluster.MasterOf(0), func(r *Ring) *shard {
			k := r.members[0].cluster
			return (*k.list.Load())[k.slots.Load()[0]]
		}},
	} {
		ring, err := Open(t.Context(), Config{
			Shards: []ShardConfig{c.shard}, HashKey: []byte("0123456789abcdef"), Logger: (&sink{}).logger(),
			OperationTimeout: 500 * time.Millisecond,
		})
		aclMust(t, err)
		defer ring.Close()
		s := c.resolved(ring)
		c.primary.Pause()
		deadline := time.Now().Add(20 * time.Second)
		for s.replicaLag() < time.Second {
			if time.Now().After(deadline) {
				t.Fatalf("%s: the replica's lag is still %s", c.shard.ID, s.replicaLag())
			}
			s.resolveSoon()
			time.Sleep(20 * time.Millisecond)
		}
		c.primary.Resume()
	}
}
