package ringfence

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence/internal/redistest"
)

// What shares admitted while the primary was away is lost when the process ends before it is
// back; that is counted and said.
func TestWhatCloseLeavesUntoldIsCounted(t *testing.T) {
	for name, limit := range map[string]Limit{
		"log": SlidingLog{Limit: 5000, Window: time.Hour}, "bucket": TokenBucket{Rate: 1, Per: time.Hour, Burst: 5000},
	} {
		t.Run(name, func(t *testing.T) {
			primary := redistest.Start(t, redistest.Options{})
			replica := redistest.Start(t, redistest.Options{ReplicaOf: primary})
			aclMust(t, replica.WaitInSync(t.Context()))
			redistest.NoLeaks(t)
			lines := &sink{}
			r, err := Open(t.Context(), Config{
				Shards:  []ShardConfig{{ID: "a", Primary: primary.URL(), Replicas: []string{replica.URL()}}},
				HashKey: []byte("0123456789abcdef"), Instances: 1, InstanceID: "1", Policy: PolicyClosed,
				Budget: 5 * time.Second, OperationTimeout: 5 * time.Second, Logger: lines.logger(), Strict: true,
				Registerer: prometheus.NewRegistry(),
			})
			aclMust(t, err)
			defer r.Close()
			l, err := r.Limiter("l", limit)
			aclMust(t, err)
			primary.Kill()
			// More than one debit of a log holds.
			for _, c := range []struct {
				key  string
				cost int64
			}{{"one", 3}, {"two", 900}, {"two", 900}} {
				d, err := l.AllowN(t.Context(), c.key, c.cost)
				if err != nil || !d.Allowed || d.Source != SourceReplica {
					t.Fatalf("%+v, %v", d, err)
				}
			}
			lost := r.members[0].shard.metrics.unpaid
			aclMust(t, r.Close())
			after := prometheus.NewRegistry() // Close has unregistered it from the ring's
			aclMust(t, after.Register(lost))
			if text := exposition(t, after); !strings.Contains(text, "ratelimiter_settle_lost_total{shard_id=\"a\"} 1803\n") {
				t.Errorf("want 1803 units lost:\n%s", text)
			}
			if text := lines.String(); !strings.Contains(text, "before the shard had been told") || !strings.Contains(text, "units=1803 keys=2") {
				t.Errorf("the log says:\n%s", text)
			}
		})
	}
}
