package ringfence_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// fixedKinds are limits out of which nothing comes back while a test runs.
func fixedKinds(n int64) map[string]ringfence.Limit {
	return map[string]ringfence.Limit{
		// The first token comes back after more than an hour.
		"token-bucket": ringfence.TokenBucket{Rate: n, Per: time.Duration(n) * 100 * time.Minute, Burst: n},
		"sliding-log":  ringfence.SlidingLog{Limit: n, Window: 24 * time.Hour},
	}
}

// childEnv makes this test binary a process with a ring of its own on the server that it
// names: see exactChild.
const childEnv = "RINGFENCE_EXACT_CHILD"

func init() {
	if url := os.Getenv(childEnv); url != "" {
		if err := exactChild(url); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

const (
	exactProcesses  = 4
	exactGoroutines = 16 // of each process
	exactCalls      = 10 // of each goroutine
	exactLimit      = 400
)

func exactConfig(shards ...ringfence.ShardConfig) ringfence.Config {
	return ringfence.Config{
		Shards: shards, HashKey: suiteHashKey, Policy: ringfence.PolicyClosed,
		Budget: 5 * time.Second, OperationTimeout: 5 * time.Second, Strict: true,
		Logger: slog.New(slog.DiscardHandler), NearCacheKeys: -1,
	}
}

// exactRings are the features with which a child can answer.
var exactRings = map[string]func(*ringfence.Config){
	"plain":  func(*ringfence.Config) {},
	"near":   func(c *ringfence.Config) { c.NearCacheKeys = 0 },
	"single": func(c *ringfence.Config) { c.NearCacheKeys, c.MaxBatch = 0, 1 },
	"leased": func(*ringfence.Config) {},
}

// exactChild reads lines "limiter key ring" and answers each with the number of calls that
// were admitted.
func exactChild(url string) error {
	rings := map[string]*ringfence.Ring{}
	for name, with := range exactRings {
		c := exactConfig(ringfence.ShardConfig{ID: "a", Primary: url})
		with(&c)
		r, err := ringfence.Open(context.Background(), c)
		if err != nil {
			return err
		}
		defer r.Close()
		rings[name] = r
	}
	limits := fixedKinds(exactLimit)
	in := bufio.NewScanner(os.Stdin)
	fmt.Println("ready")
	for in.Scan() {
		words := strings.Fields(in.Text())
		if len(words) != 3 || rings[words[2]] == nil {
			return fmt.Errorf("not an order: %q", in.Text())
		}
		kind, key := words[0], words[1]
		var opts []ringfence.LimiterOption
		if words[2] == "leased" {
			opts = append(opts, ringfence.WithLease(ringfence.Lease{Max: 20}))
		}
		l, err := rings[words[2]].Limiter(kind, limits[kind], opts...)
		if err != nil {
			return err
		}
		var admitted, failed atomic.Int64
		var wg sync.WaitGroup
		for range exactGoroutines {
			wg.Go(func() {
				for range exactCalls {
					d, err := l.Allow(context.Background(), key)
					if err != nil || (d.Source != ringfence.SourcePrimary && d.Source != ringfence.SourceCache && d.Source != ringfence.SourceLease) {
						failed.Add(1)
					} else if d.Allowed {
						admitted.Add(1)
					}
				}
			})
		}
		wg.Wait()
		if n := failed.Load(); n > 0 {
			return fmt.Errorf("%d calls were not answered by the primary", n)
		}
		fmt.Println(admitted.Load())
	}
	return in.Err()
}

// exactProcess is one child.
type exactProcess struct {
	in  io.WriteCloser
	out *bufio.Scanner
}

func startExactChild(t *testing.T, url string) *exactProcess {
	t.Helper()
	self, err := os.Executable()
	suiteMust(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childEnv+"="+url)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	suiteMust(t, err)
	out, err := cmd.StdoutPipe()
	suiteMust(t, err)
	suiteMust(t, cmd.Start())
	t.Cleanup(func() {
		_ = in.Close() // it ends when there is nothing more to read
		if err := cmd.Wait(); err != nil {
			t.Errorf("a child ended with %v", err)
		}
	})
	return &exactProcess{in, bufio.NewScanner(out)}
}

func (p *exactProcess) read(t *testing.T) string {
	t.Helper()
	if !p.out.Scan() {
		t.Fatalf("a child said nothing more: %v", p.out.Err())
	}
	return p.out.Text()
}

// exactFamily are the processes, ready to call.
type exactFamily []*exactProcess

func startExactFamily(t *testing.T, url string) exactFamily {
	t.Helper()
	children := make(exactFamily, exactProcesses)
	for i := range children {
		children[i] = startExactChild(t, url)
	}
	for _, c := range children {
		if line := c.read(t); line != "ready" {
			t.Fatalf("a child said %q", line)
		}
	}
	return children
}

// run makes all of them call one key, with the features in turn, and returns how many calls
// were admitted.
func (f exactFamily) run(t *testing.T, kind, key string, with []string) (total int) {
	t.Helper()
	for i, c := range f {
		_, err := fmt.Fprintf(c.in, "%s %s %s\n", kind, key, with[i%len(with)])
		suiteMust(t, err)
	}
	for _, c := range f {
		n, err := strconv.Atoi(c.read(t))
		suiteMust(t, err)
		total += n
	}
	return total
}

func TestManyProcessesTogetherAdmitExactlyTheLimit(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	children := startExactFamily(t, s.URL())
	// All processes with the same features, and each with others.
	features := [][]string{{"plain"}, {"near"}, {"single"}, {"plain", "near", "single", "near"}}
	for kind := range fixedKinds(exactLimit) {
		for run := range 20 {
			with := features[run%len(features)]
			total := children.run(t, kind, fmt.Sprint("run-", run), with)
			if total != exactLimit {
				t.Errorf("%s, run %d, %v: %d of %d calls admitted, the limit is %d", kind, run, with,
					total, exactProcesses*exactGoroutines*exactCalls, exactLimit)
			}
		}
	}
}

// With leases, in all processes or in some, never more than the limit is admitted; what is
// missing was held by one process when another was denied, and comes back.
func TestManyProcessesWithLeasesAdmitNoMoreThanTheLimit(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	children := startExactFamily(t, s.URL())
	look, err := ringfence.Open(t.Context(), exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()}))
	suiteMust(t, err)
	defer look.Close()
	features := [][]string{{"leased"}, {"leased", "plain"}, {"leased", "near", "single", "leased"}}
	for kind, limit := range fixedKinds(exactLimit) {
		l, err := look.Limiter(kind, limit)
		suiteMust(t, err)
		for run := range 12 {
			with, key := features[run%len(features)], fmt.Sprint("run-", run)
			total := children.run(t, kind, key, with)
			if total > exactLimit || total < exactLimit-exactProcesses*20 {
				t.Errorf("%s, run %d, %v: %d calls admitted, the limit is %d", kind, run, with, total, exactLimit)
			}
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
				d, err := l.Peek(t.Context(), key)
				suiteMust(t, err)
				if d.Remaining == int64(exactLimit-total) {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s, run %d, %v: %d of %d are left after %d calls were admitted", kind, run, with, d.Remaining, exactLimit, total)
				}
			}
		}
	}
}

// S2.7, a thousand times: of 200 calls at once against a limit of 100, exactly 100.
func TestExactly100Of200CallsAtOnceAreAdmitted(t *testing.T) {
	const limit, calls, runs = 100, 200, 1000
	s := redistest.Start(t, redistest.Options{})
	r, err := ringfence.Open(t.Context(), exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()}))
	suiteMust(t, err)
	defer r.Close()
	kinds := []*ringfence.Limiter{}
	for name, limit := range fixedKinds(limit) {
		kinds = append(kinds, suiteLimiter(t, r, name, limit))
	}
	for run := range runs {
		l := kinds[run%len(kinds)]
		key := fmt.Sprint("run-", run)
		begin := make(chan struct{})
		var admitted, strange atomic.Int64
		var wg sync.WaitGroup
		for range calls {
			wg.Go(func() {
				<-begin
				d, err := l.Allow(context.Background(), key)
				if err != nil || d.Source != ringfence.SourcePrimary {
					strange.Add(1)
				} else if d.Allowed {
					admitted.Add(1)
				}
			})
		}
		close(begin)
		wg.Wait()
		if admitted.Load() != limit || strange.Load() != 0 {
			t.Fatalf("run %d, %s: %d admitted, %d not answered by the primary", run, l.Name(), admitted.Load(), strange.Load())
		}
	}
}

// With mixed costs the limit may not be met to the unit, but no denied call would have
// fitted into what was left at the end.
func TestMixedCostsFillTheLimitAsFarAsTheyFit(t *testing.T) {
	const limit, goroutines, calls = 1000, 32, 20
	s := redistest.Start(t, redistest.Options{})
	r, err := ringfence.Open(t.Context(), exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()}))
	suiteMust(t, err)
	defer r.Close()
	for name, limit := range fixedKinds(limit) {
		l := suiteLimiter(t, r, name, limit)
		for run := range 10 {
			key := fmt.Sprint("run-", run)
			var sum, denied atomic.Int64
			var smallest atomic.Int64
			smallest.Store(1 << 40)
			var wg sync.WaitGroup
			for g := range goroutines {
				wg.Go(func() {
					rnd := rand.New(rand.NewPCG(uint64(run), uint64(g)))
					for range calls {
						cost := 1 + rnd.Int64N(17)
						d, err := l.AllowN(context.Background(), key, cost)
						switch {
						case err != nil || d.Source != ringfence.SourcePrimary:
							t.Errorf("%+v, %v", d, err)
						case d.Allowed:
							sum.Add(cost)
						default:
							denied.Add(1)
							for {
								least := smallest.Load()
								if cost >= least || smallest.CompareAndSwap(least, cost) {
									break
								}
							}
						}
					}
				})
			}
			wg.Wait()
			left := peek(t, l, key).Remaining
			if used := sum.Load(); used+left != l.Limit().WorstCase(0) || left < 0 {
				t.Errorf("%s, run %d: %d used and %d left", name, run, used, left)
			}
			if denied.Load() == 0 || smallest.Load() <= left {
				t.Errorf("%s, run %d: %d were denied, one of cost %d although %d are left", name, run, denied.Load(), smallest.Load(), left)
			}
		}
	}
}

// What is admitted does not depend on how the work is carried: the same calls at the
// same instants have the same answers on one shard and on eight, in batches of one and
// of 64, with one operation in flight and with four.
func TestTheSameCallsHaveTheSameAnswersHoweverTheyAreCarried(t *testing.T) {
	type variant struct{ shards, batch, inFlight int }
	variants := []variant{{1, 1, 1}, {1, 64, 4}, {8, 1, 4}, {8, 64, 1}, {8, 64, 4}, {8, 7, 2}}
	onEachPlace(t, 8, func(t *testing.T, p *suitePlace) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rings := make([]map[string]*ringfence.Limiter, len(variants))
		for i, v := range variants {
			r := p.open(t, func(c *ringfence.Config) {
				c.Shards, c.MaxBatch, c.InFlight = p.shards[:v.shards], v.batch, v.inFlight
				c.Prefix = fmt.Sprint("variant-", i)
			})
			rings[i] = map[string]*ringfence.Limiter{}
			for _, k := range suiteKinds {
				rings[i][k.name] = suiteLimiter(t, r, strings.ReplaceAll(k.name, " ", "-"), k.limit(9, 100*time.Millisecond))
			}
		}
		rnd := rand.New(rand.NewPCG(seed, 0))
		key := func() string { return fmt.Sprint("k", rnd.IntN(20)) }
		admitted, denied := 0, 0
		for i := range 40 {
			p.step(time.Duration(rnd.IntN(40_000)) * time.Microsecond)
			kind := suiteKinds[rnd.IntN(len(suiteKinds))].name
			var call func(l *ringfence.Limiter) ([]ringfence.Decision, error)
			switch k, cost := key(), 1+rnd.Int64N(9); rnd.IntN(8) {
			case 0:
				call = func(l *ringfence.Limiter) ([]ringfence.Decision, error) { return nil, l.Reset(context.Background(), k) }
			case 1:
				call = func(l *ringfence.Limiter) ([]ringfence.Decision, error) {
					d, err := l.Peek(context.Background(), k)
					return []ringfence.Decision{d}, err
				}
			case 2, 3:
				call = func(l *ringfence.Limiter) ([]ringfence.Decision, error) {
					d, err := l.AllowN(context.Background(), k, cost)
					return []ringfence.Decision{d}, err
				}
			default:
				reqs := make([]ringfence.Request, 1+rnd.IntN(200))
				for j := range reqs {
					reqs[j] = ringfence.Request{Key: key(), Cost: 1 + rnd.Int64N(4)}
				}
				call = func(l *ringfence.Limiter) ([]ringfence.Decision, error) {
					return l.AllowMany(context.Background(), reqs)
				}
			}
			var first []ringfence.Decision
			for v, limiters := range rings {
				got, err := call(limiters[kind])
				suiteMust(t, err)
				for j := range got {
					exactly(t, got[j])
					got[j].Shard = ""
					if v == 0 && got[j].Allowed {
						admitted++
					} else if v == 0 {
						denied++
					}
				}
				if v == 0 {
					first = got
					continue
				}
				for j := range got {
					if got[j] != first[j] {
						t.Fatalf("call %d, %s, entry %d: %+v with %+v, but %+v with %+v", i, kind, j, got[j], variants[v], first[j], variants[0])
					}
				}
			}
		}
		if admitted < 100 || denied < 100 {
			t.Errorf("%d admitted and %d denied: the calls do not press the limits", admitted, denied)
		}
	})
}
