package ringfence

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

var medianStat = regexp.MustCompile(`latency_percentiles_usec_evalsha:p50=([0-9.]+)`)

// BenchmarkScriptCost is what Redis itself spends: "redis-us/decision" is the median time
// inside EVALSHA by INFO latencystats (which, unlike the mean of commandstats, does not
// grow when something else takes the processor), divided by the entries.
// docs/performance-scripts.md is made of it.
//
//	go test -run '^$' -bench ScriptCost -benchtime 1000x -count 5 .
func BenchmarkScriptCost(b *testing.B) {
	ctx, day := context.Background(), 24*time.Hour
	s := redistest.Start(b, redistest.Options{})
	n, err := newRedisNode(s.URL(), nodeConfig{timeout: 30 * time.Second, poolSize: 1, loaded: func() {}}, false)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = n.close() }()
	if err := n.load(ctx); err != nil {
		b.Fatal(err)
	}
	for _, k := range []struct {
		name    string
		limit   Limit
		fill    int64 // units used beforehand
		keys    int
		allowed bool
	}{
		{"bucket/allowed", TokenBucket{Rate: 1000, Per: time.Second, Burst: 1_000_000}, 1, 8192, true},
		{"bucket/denied", TokenBucket{Rate: 1, Per: day, Burst: 1}, 1, 2048, false},
		{"log-0/allowed", SlidingLog{Limit: 1000, Window: time.Millisecond}, 1, 2048, true},
		{"log-100/allowed", SlidingLog{Limit: 100_000, Window: day}, 100, 2048, true},
		{"log-100/denied", SlidingLog{Limit: 100, Window: day}, 100, 2048, false},
		{"log-10000/allowed", SlidingLog{Limit: 1_000_000, Window: day}, 10_000, 64, true},
		{"log-10000/denied", SlidingLog{Limit: 10_000, Window: day}, 10_000, 64, false},
	} {
		rl, err := k.limit.compile()
		if err != nil {
			b.Fatal(err)
		}
		for _, batch := range []int{1, 16, 64} {
			b.Run(fmt.Sprintf("%s/batch=%d", k.name, batch), func(b *testing.B) {
				space, key := newKeySpace("rf"), 0
				reqs := make([]*request, batch)
				call := func(cost int64, want bool) {
					for i := range reqs {
						key = (key + 1) % k.keys
						reqs[i] = freshRequest().begin(opCharge, rl, keyHash{uint64(key), uint64(key) * 0x9e3779b97f4a7c15}, space, cost)
					}
					if err := n.charge(ctx, reqs); err != nil {
						b.Fatal(err)
					}
					for _, r := range reqs {
						if (r.granted > 0) != want || r.status != statusDecided {
							b.Fatalf("status %d, %d granted", r.status, r.granted)
						}
						r.release()
						r.release()
					}
				}
				if err := s.Client().FlushAll(ctx).Err(); err != nil {
					b.Fatal(err)
				}
				for left := k.fill; left > 0; left -= 1000 {
					for i := 0; i < k.keys; i += batch {
						call(min(left, 1000), true)
					}
				}
				if err := s.Client().ConfigResetStat(ctx).Err(); err != nil {
					b.Fatal(err)
				}
				b.ResetTimer()
				for range b.N {
					call(1, k.allowed)
				}
				b.StopTimer()
				text, err := s.Client().Info(ctx, "latencystats").Result()
				if err != nil {
					b.Fatal(err)
				}
				m := medianStat.FindStringSubmatch(text)
				if m == nil {
					b.Fatalf("no median of EVALSHA in %q", text)
				}
				us, err := strconv.ParseFloat(m[1], 64)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(us/float64(batch), "redis-us/decision")
			})
		}
	}
}
