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

	"github.com/prometheus/client_golang/prometheus"
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

// ignore is an Observer that looks at nothing: what telling one costs.
type ignore struct{}

func (ignore) Observe(context.Context, ringfence.Observation) {}

// What metrics, top-K and an observer add to a decision, in turns: "bare" is the median
// time of a decision without, "watched" with. "primary" is 64 callers answered by a
// shard's primary; "local" is one caller whose shard's breaker is forced open, so that no
// round trip hides anything: what is left is the library's own path. Blocks are short, so
// that few of them are interrupted by whatever else the machine does.
//
//	go test -run '^$' -bench WatchedBesideBare/local -benchtime=5000x .
//	go test -run '^$' -bench WatchedBesideBare/primary -benchtime=150x .
func BenchmarkWatchedBesideBare(b *testing.B) {
	s := redistest.Start(b, redistest.Options{})
	top := ringfence.TopConfig{Keys: 256}
	for _, k := range []struct {
		name   string
		adjust func(*ringfence.Config)
	}{
		{"nothing", func(*ringfence.Config) {}},
		{"metrics", func(c *ringfence.Config) { c.Registerer = prometheus.NewRegistry() }},
		{"top", func(c *ringfence.Config) { c.Top = top }},
		{"observer", func(c *ringfence.Config) { c.Observers = []ringfence.Observer{ignore{}} }},
		{"all", func(c *ringfence.Config) {
			c.Registerer, c.Top, c.Observers = prometheus.NewRegistry(), top, []ringfence.Observer{ignore{}}
		}},
	} {
		for _, path := range []string{"local", "primary"} {
			b.Run(path+"/"+k.name, func(b *testing.B) {
				callers, calls := 64, 1024
				if path == "local" {
					callers, calls = 1, 256
				}
				var limiters [2]*ringfence.Limiter
				for i := range limiters {
					c := exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()})
					if i == 1 {
						k.adjust(&c)
					}
					r, err := ringfence.Open(context.Background(), c)
					suiteMust(b, err)
					defer r.Close()
					limiters[i] = suiteLimiter(b, r, "bench", ringfence.TokenBucket{Rate: 1_000_000, Per: time.Second, Burst: 1_000_000})
					if path == "local" {
						suiteMust(b, r.ForceBreaker("a", ringfence.BreakerForcedOpen))
					}
				}
				var took [2][]float64
				for i := range limiters { // past the point where top-K counts every call
					for range 8192 / calls {
						watchedBlock(b, limiters[i], callers, calls)
					}
				}
				allocs := testing.AllocsPerRun(10, func() { watchedBlock(b, limiters[1], callers, calls) }) -
					testing.AllocsPerRun(10, func() { watchedBlock(b, limiters[0], callers, calls) })
				for b.Loop() {
					for i := range limiters {
						took[i] = append(took[i], watchedBlock(b, limiters[i], callers, calls))
					}
				}
				median := func(d []float64) float64 { slices.Sort(d); return d[len(d)/2] }
				b.ReportMetric(median(took[0]), "ns/bare")
				b.ReportMetric(median(took[1]), "ns/watched")
				b.ReportMetric(median(took[1])/median(took[0]), "x-bare")
				b.ReportMetric(allocs/float64(calls), "allocs-more")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

// watchedBlock is the time of one call, of this many by this many callers.
func watchedBlock(b *testing.B, l *ringfence.Limiter, callers, calls int) float64 {
	one := func(c int) {
		for i := range calls / callers {
			if _, err := l.Allow(context.Background(), benchKeys[(c*calls/callers+i)%len(benchKeys)]); err != nil {
				b.Error(err)
				return
			}
		}
	}
	start := time.Now()
	if callers == 1 {
		one(0)
		return float64(time.Since(start)) / float64(calls)
	}
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() { one(c) })
	}
	wg.Wait()
	return float64(time.Since(start)) / float64(calls)
}
