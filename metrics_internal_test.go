package ringfence

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
)

// pooledNode is a server of which only the connection pool is asked.
type pooledNode struct {
	node
	stats redis.PoolStats
}

func (n *pooledNode) pool() *redis.PoolStats { return &n.stats }

func TestPoolCountersNeverFallWhenAnotherServerBecomesThePrimary(t *testing.T) {
	m := newMetrics(Config{Registerer: prometheus.NewRegistry()})
	a, b := &pooledNode{}, &pooledNode{}
	s := &shard{id: "a", nodes: []node{a, b}}
	collect := func() map[string]float64 {
		got := map[string]float64{}
		m.collectPools(s, func(name string, _ prometheus.ValueType, v float64, labels ...string) {
			got[name+" "+labels[1]] += v
		})
		return got
	}
	want := func(when string, primaryTimeouts, replicaTimeouts, primarySeconds float64) {
		t.Helper()
		got := collect()
		for name, want := range map[string]float64{
			"redis_pool_timeouts_total primary":     primaryTimeouts,
			"redis_pool_timeouts_total replica":     replicaTimeouts,
			"redis_pool_wait_seconds_total primary": primarySeconds,
		} {
			if got[name] != want {
				t.Errorf("%s: %s is %v, want %v", when, name, got[name], want)
			}
		}
	}
	want("at the start", 0, 0, 0)
	a.stats.Timeouts, b.stats.Timeouts, a.stats.WaitDurationNs = 7, 2, 3e9
	want("before the failover", 7, 2, 3)
	s.primary.Store(1)
	want("just after it", 7, 2, 3)
	a.stats.Timeouts, b.stats.Timeouts, b.stats.WaitDurationNs = 8, 5, 1e9
	want("later", 10, 3, 4)
}

// BenchmarkMetricsPerDecision is what counting one decision costs, and what having no
// Registerer saves.
func BenchmarkMetricsPerDecision(b *testing.B) {
	rule, err := TokenBucket{Rate: 100, Per: time.Second, Burst: 200}.compile()
	if err != nil {
		b.Fatal(err)
	}
	for _, row := range []struct {
		name string
		c    Config
	}{
		{"with a Registerer", Config{Registerer: prometheus.NewRegistry(), LatencyObjective: 5 * time.Millisecond}},
		{"without", Config{}},
	} {
		m := newMetrics(row.c)
		s := &shard{id: "a", metrics: m.forShard("a")}
		l := m.forLimiter("api", rule)
		d := Decision{Allowed: true, Limit: 200, Remaining: 150, Source: SourcePrimary, Shard: "a"}
		b.Run(row.name+"/alone", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				l.decided(s, &d, 1, 180*time.Microsecond)
			}
		})
		b.Run(row.name+"/parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				d := d
				for pb.Next() {
					l.decided(s, &d, 1, 180*time.Microsecond)
				}
			})
		})
	}
}
