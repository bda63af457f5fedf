package ringfence_test

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// The benchmarks here compare an Allow with the least anybody could do instead: one
// EVALSHA a call, of the token bucket that tutorials show, through go-redis as it comes.
// On a machine that does other things as well look at BenchmarkAllowBesidePlainEvalsha,
// which takes turns every few ms and compares medians:
//
//	go test -run '^$' -bench 'Allow|PlainEvalsha' -benchmem -count=10 .

// naiveBucket is inexact, trusts its clock and holds no promise of ringfence's; it is
// the price of a round trip with a script that reads and writes one HASH.
const naiveBucket = `
local rate, burst, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local state = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens, at = tonumber(state[1] or burst), tonumber(state[2] or now)
tokens = math.min(burst, tokens + math.max(0, now - at) * rate)
local allowed = tokens >= cost
if allowed then tokens = tokens - cost end
redis.call('HSET', KEYS[1], 'tokens', tokens, 'at', now)
redis.call('EXPIRE', KEYS[1], math.ceil(burst / rate) + 1)
return { allowed and 1 or 0, math.floor(tokens) }`

// benchKeys are the keys of a benchmark: many, as in life, so that no two calls of a
// batch need the same one.
var benchKeys = func() (out [1024]string) {
	for i := range out {
		out[i] = "user:" + strconv.Itoa(i)
	}
	return out
}()

// eachCallers runs a benchmark alone and with 64 callers.
func eachCallers(b *testing.B, call func(ctx context.Context, key string) error) {
	ctx := context.Background()
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			b.ReportAllocs()
			suiteMust(b, call(ctx, "warm"))
			var done atomic.Int64
			errs := make(chan error, callers)
			b.ResetTimer()
			for range callers {
				go func() {
					for i := done.Add(1); i <= int64(b.N); i = done.Add(1) {
						if err := call(ctx, benchKeys[i%int64(len(benchKeys))]); err != nil {
							errs <- err
							return
						}
					}
					errs <- nil
				}()
			}
			for range callers {
				if err := <-errs; err != nil {
					b.Error(err)
				}
			}
		})
	}
}

func BenchmarkAllow(b *testing.B) {
	for _, k := range []struct {
		name  string
		limit ringfence.Limit
	}{
		{"token-bucket", ringfence.TokenBucket{Rate: 1_000_000, Per: time.Second, Burst: 1_000_000}},
		{"sliding-log", ringfence.SlidingLog{Limit: 100, Window: 10 * time.Millisecond}},
		{"denied", ringfence.TokenBucket{Rate: 1, Per: 24 * time.Hour, Burst: 1}},
	} {
		b.Run(k.name, func(b *testing.B) {
			s := redistest.Start(b, redistest.Options{})
			r, err := ringfence.Open(context.Background(), exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()}))
			suiteMust(b, err)
			defer r.Close()
			l := suiteLimiter(b, r, "bench", k.limit)
			eachCallers(b, func(ctx context.Context, key string) error {
				d, err := l.Allow(ctx, key)
				if err == nil && d.Source != ringfence.SourcePrimary {
					err = fmt.Errorf("answered by %s because of %s", d.Source, d.Cause)
				}
				return err
			})
		})
	}
}

// plainCall is one EVALSHA a call.
func plainCall(b *testing.B, s *redistest.Server) func(ctx context.Context, key string) error {
	c := redis.NewClient(&redis.Options{
		Addr: s.Addr(), PoolSize: 64, // a connection for each caller
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	})
	b.Cleanup(func() { _ = c.Close() })
	script := redis.NewScript(naiveBucket)
	suiteMust(b, script.Load(context.Background(), c).Err())
	return func(ctx context.Context, key string) error {
		return script.EvalSha(ctx, c, []string{"plain:" + key}, 1_000_000, 1_000_000, 1).Err()
	}
}

func BenchmarkPlainEvalsha(b *testing.B) {
	eachCallers(b, plainCall(b, redistest.Start(b, redistest.Options{})))
}

// Allow and plain EVALSHA in turns on one server: one iteration is 256 calls of each.
// "x-plain" is the median time of ours over the median time of theirs.
func BenchmarkAllowBesidePlainEvalsha(b *testing.B) {
	s := redistest.Start(b, redistest.Options{})
	plain := plainCall(b, s)
	r, err := ringfence.Open(context.Background(), exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()}))
	suiteMust(b, err)
	defer r.Close()
	l := suiteLimiter(b, r, "bench", ringfence.TokenBucket{Rate: 1_000_000, Per: time.Second, Burst: 1_000_000})
	ours := func(ctx context.Context, key string) error {
		d, err := l.Allow(ctx, key)
		if err == nil && d.Source != ringfence.SourcePrimary {
			err = fmt.Errorf("answered by %s because of %s", d.Source, d.Cause)
		}
		return err
	}
	const calls = 256
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			block := func(call func(ctx context.Context, key string) error) time.Duration {
				start := time.Now()
				var wg sync.WaitGroup
				for c := range callers {
					wg.Go(func() {
						for i := range calls / callers {
							if err := call(context.Background(), benchKeys[c*calls/callers+i]); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				return time.Since(start) / calls
			}
			var took [2][]time.Duration
			block(ours)
			block(plain)
			for b.Loop() {
				took[0] = append(took[0], block(ours))
				took[1] = append(took[1], block(plain))
			}
			median := func(d []time.Duration) float64 { slices.Sort(d); return float64(d[len(d)/2]) }
			b.ReportMetric(median(took[0]), "ns/allow")
			b.ReportMetric(median(took[1]), "ns/plain")
			b.ReportMetric(median(took[0])/median(took[1]), "x-plain")
		})
	}
}
