package ringfence

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// BenchmarkCallsOutOfLeases is what 512 callers pay for calls that leases answer, all on one
// machine and none waiting for a server: with a thousand keys the work, with more of them
// that and waiting for memory. The leases are put there and live longer than the benchmark.
func BenchmarkCallsOutOfLeases(b *testing.B) {
	const callers, most = 512, 100_000
	ring, err := Open(context.Background(), Config{
		Shards: []ShardConfig{{ID: "a", Primary: redistest.Start(b, redistest.Options{}).URL()}}, HashKey: []byte("0123456789abcdef"),
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = ring.Close() })
	l, err := ring.Limiter("l", TokenBucket{Rate: 1000, Per: time.Minute, Burst: 1_000_000}, WithLease(Lease{Max: MaxLogCost}))
	if err != nil {
		b.Fatal(err)
	}
	var text strings.Builder // one string, as the benchmarks of bench/ have it
	for i := range most {
		fmt.Fprintf(&text, "user:%05d", i)
	}
	name := func(i uint32) string { return text.String()[int(i)*len("user:00000"):][:len("user:00000")] }
	for _, keys := range []uint32{1000, 10_000, most} {
		b.Run(fmt.Sprintf("keys=%d", keys), func(b *testing.B) {
			random := rand.New(rand.NewPCG(1, 2))
			order := make([]uint32, 1<<20)
			for i := range order {
				order[i] = random.Uint32N(keys)
			}
			put := func() {
				now := ring.clock()
				for i := range keys {
					if k := ring.leases.key(l.lease, l.keys.hash(name(i)), now); k != nil {
						k.here.begin(terms{units: grantMask, asked: now + int64(time.Hour), reset: int64(time.Hour)})
					}
				}
			}
			var away [callers]int
			b.ReportAllocs()
			b.ResetTimer()
			for at := 0; at < b.N; {
				some := min(b.N-at, 1<<20) // few enough for the units of one key
				b.StopTimer()
				put()
				b.StartTimer()
				var wg sync.WaitGroup
				for c := range callers {
					wg.Go(func() {
						ctx, cancel := context.WithCancel(context.Background())
						defer cancel()
						for i := c * some / callers; i < (c+1)*some/callers; i++ {
							if d, err := l.Allow(ctx, name(order[i])); err != nil || d.Source != SourceLease {
								away[c]++
							}
						}
					})
				}
				wg.Wait()
				at += some
			}
			b.StopTimer()
			all := 0
			for _, n := range away {
				all += n
			}
			b.ReportMetric(100*float64(all)/float64(b.N), "%without")
		})
	}
}
