package ringfence_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// What happens to callers when Redis breaks. Every test starts real servers, and every
// one holds callers to the same: no error, an answer within the budget, and a Source and
// a Cause that say who answered and why.

// budget is the time a caller waits by default; patient is that of tests that are not
// about it, on machines that may be busy.
const (
	budget  = 20 * time.Millisecond
	patient = 250 * time.Millisecond
)

var (
	hundredAMinute = ringfence.SlidingLog{Limit: 100, Window: time.Minute}
	bucketOf100    = ringfence.TokenBucket{Rate: 100, Per: time.Minute, Burst: 100}
	quick          = ringfence.BreakerConfig{MaxOpenPeriod: 400 * time.Millisecond}
)

// recovery is the longest it may take from the end of a fault to exact answers.
func recovery(c ringfence.BreakerConfig) time.Duration {
	longest := c.MaxOpenPeriod
	if longest == 0 {
		longest = 5 * time.Second
	}
	return 2*longest + 1100*time.Millisecond
}

// Of a limit of 100 a minute 40 units are used when the primary goes. Four processes then
// get 200 calls each. Looking at the replica alone would admit all 800, looking less
// one's own count 240; the shares admit the 60 that are left.
func TestFourProcessesTogetherAdmitWhatWasLeftWhenThePrimaryWentAway(t *testing.T) {
	const processes, calls, before = 4, 200, 40
	faults := []struct {
		name  string
		cause func(*redistest.Server)
	}{
		{"killed", (*redistest.Server).Kill},
		{"silent", (*redistest.Server).Pause},
	}
	for _, limit := range []ringfence.Limit{hundredAMinute, bucketOf100} {
		for _, fault := range faults {
			t.Run(fmt.Sprintf("%s, %T", fault.name, limit), func(t *testing.T) {
				s := startPair(t)
				limiters := make([]*ringfence.Limiter, processes)
				for i := range limiters {
					ring := open(t, ringfence.Config{
						Shards: []ringfence.ShardConfig{s.config()}, Instances: processes,
						InstanceID: fmt.Sprint("process ", i),
						// So that all that is admitted comes out of a share.
						Policy: ringfence.PolicyClosed, Breaker: quick,
					})
					limiters[i] = limiter(t, ring, limit)
				}
				began := time.Now()
				take(t, s.config(), limit, before, "user")
				s.sync(t)
				fault.cause(s.primary)

				// A share begins with a look at the replica, for which a quarter of the budget
				// is kept; on a busy machine that can take more than one call.
				for _, l := range limiters {
					eventually(t, 5*time.Second, "a share is dealt out", func() bool {
						d, err := l.Peek(t.Context(), "user")
						must(t, err)
						return d.Source == ringfence.SourceReplica
					})
				}

				told := newAnswers(t)
				machine, start := watchMachine(), time.Now()
				var wg sync.WaitGroup
				for _, l := range limiters {
					wg.Go(func() {
						for range calls {
							told.allow(l, "user")
						}
					})
				}
				wg.Wait()
				elapsed := time.Since(start)
				slack := machine.slack()
				t.Logf("%s, in %s: %s", fault.name, elapsed, told)

				left, most := 100-before, 100-before
				if limit == ringfence.Limit(bucketOf100) {
					// Tokens come back meanwhile, and did while the 40 were used.
					most += processes + int(time.Since(began).Seconds()*100/60)
				}
				if n := told.count("allowed"); n < left || n > most {
					t.Errorf("admitted %d, want %d to %d: the shares of what was left", n, left, most)
				}
				if n := told.count("replica"); n != processes*calls {
					t.Errorf("%d answers came out of a share, want %d", n, processes*calls)
				}
				if _, _, longest := told.quantiles(); longest > budget+slack {
					t.Errorf("a call took %s, want at most %s", longest, budget+slack)
				}
			})
		}
	}
}

// The answers stay quick while the primary is away, hardly anything is sent to it, no key
// moves, and it is used again soon after it is back.
func TestCallersHardlyWaitWhileAPrimaryIsAwayAndAreExactSoonAfter(t *testing.T) {
	const keys, calls, every = 64, 2500, time.Millisecond
	faults := []struct {
		name        string
		cause, heal func(*testing.T, *redistest.Server, *redistest.Proxy)
	}{
		{"killed, then restarted empty",
			func(_ *testing.T, s *redistest.Server, _ *redistest.Proxy) { s.Kill() },
			func(t *testing.T, s *redistest.Server, _ *redistest.Proxy) { must(t, s.Restart(t.Context())) }},
		{"silent, then resumed",
			func(_ *testing.T, s *redistest.Server, _ *redistest.Proxy) { s.Pause() },
			func(_ *testing.T, s *redistest.Server, _ *redistest.Proxy) { s.Resume() }},
		{"behind a network that swallows everything, then healed",
			func(_ *testing.T, _ *redistest.Server, p *redistest.Proxy) { p.Blackhole(true) },
			func(_ *testing.T, _ *redistest.Server, p *redistest.Proxy) { p.Blackhole(false) }},
	}
	for _, fault := range faults {
		t.Run(fault.name, func(t *testing.T) {
			s := startPair(t)
			address := s.primary.Addr()
			shard := s.config()
			var proxy *redistest.Proxy
			if fault.name[0] == 'b' {
				proxy = startProxy(t, s.primary)
				address = proxy.Addr()
				shard.Primary = "redis://" + address
			}
			var opened dials
			registry := prometheus.NewRegistry()
			ring := open(t, ringfence.Config{Shards: []ringfence.ShardConfig{shard}, Dialer: opened.dial, Registerer: registry})
			l := limiter(t, ring, ringfence.SlidingLog{Limit: 1000, Window: time.Minute})
			key := func(i int) string { return fmt.Sprint("user ", i%keys) }
			allExact := func() bool {
				for i := range keys {
					if !exact(t, l, key(i)) {
						return false
					}
				}
				return ring.Stats()[0].Breaker.State == ringfence.BreakerClosed
			}

			told := newAnswers(t)
			pace(4*keys, 4, every, func(i int) { told.allow(l, key(i)) })
			eventually(t, 10*time.Second, "the primary decides", allExact)
			s.sync(t)
			var places [keys][2]string
			for i := range places {
				places[i][0], places[i][1] = l.Locate(key(i))
			}

			dialsBefore, probesBefore := opened.count(address), metric(t, registry, "circuit_probes_total")
			fault.cause(t, s.primary, proxy)
			told = newAnswers(t)
			machine, start := watchMachine(), time.Now()
			pace(calls, 4, every, func(i int) { told.allow(l, key(i)) })
			elapsed := time.Since(start)
			slack, late := machine.slack(), machine.p99()
			sent := opened.count(address) - dialsBefore
			probes := metric(t, registry, "circuit_probes_total") - probesBefore
			t.Logf("away for %s: %s; connections to the dead primary %d, probes %.0f; this machine's timers late by p99 %s", elapsed, told, sent, probes, late)

			_, p99, longest := told.quantiles()
			if p99 > 10*time.Millisecond+late {
				t.Errorf("p99 is %s, want below 10ms (and the %s by which this machine's timers are late)", p99, late)
			}
			if longest > budget+slack {
				t.Errorf("a call took %s, want at most the budget of %s and %s", longest, budget, slack)
			}
			// Where this machine held up the look that a share begins with, the policy
			// answered.
			if n := told.count("replica"); n < calls*9/10 || n+told.count("policy") != calls {
				t.Errorf("%d of %d answers came out of a share", n, calls)
			}
			// The open periods are at least 75, 150, 300, 600, 1200, 2400 and 3750 ms.
			allowed, at := 0, 0.0
			for period := 0.075; at < elapsed.Seconds(); period = min(2*period, 3.75) {
				allowed, at = allowed+1, at+period
			}
			if probes > float64(allowed) {
				t.Errorf("%.0f probes in %s, want at most %d", probes, elapsed, allowed)
			}
			if most := allowed + 4 + 1; sent > most { // 4 operations in flight, and a check-up
				t.Errorf("%d connections to the dead primary in %s, want at most %d", sent, elapsed, most)
			}

			fault.heal(t, s.primary, proxy)
			took := eventually(t, recovery(ringfence.BreakerConfig{}), "the primary decides again", func() bool { return exact(t, l, key(0)) })
			t.Logf("exact again %s after the fault ended", took)
			eventually(t, 10*time.Second, "the primary decides for all keys", allExact)
			for i := range keys {
				if shard, name := l.Locate(key(i)); places[i] != [2]string{shard, name} {
					t.Errorf("key %d moved from %v to %s %s", i, places[i], shard, name)
				}
			}
		})
	}
}

func startProxy(t *testing.T, s *redistest.Server) *redistest.Proxy {
	t.Helper()
	p, err := redistest.NewProxy(s.Addr())
	must(t, err)
	t.Cleanup(p.Close)
	return p
}

func TestWithoutAReplicaTheFailurePolicyAnswers(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	ring := open(t, ringfence.Config{Shards: []ringfence.ShardConfig{alone(server)}, Instances: 4, Breaker: quick})
	limit := ringfence.SlidingLog{Limit: 20, Window: time.Minute}
	limiters := map[ringfence.FailurePolicy]*ringfence.Limiter{}
	for _, p := range []ringfence.FailurePolicy{ringfence.PolicyOpen, ringfence.PolicyClosed, ringfence.PolicyLocal} {
		l, err := ring.Limiter(p.String(), limit, ringfence.WithPolicy(p))
		must(t, err)
		limiters[p] = l
		eventually(t, 5*time.Second, "the primary decides", func() bool { return exact(t, l, "user") })
	}
	server.Kill()
	told := newAnswers(t)
	for range 5 {
		told.allow(limiters[ringfence.PolicyOpen], "opens the breaker")
	}

	tests := []struct {
		policy  ringfence.FailurePolicy
		source  ringfence.Source
		allowed int // of 100 calls
	}{
		{ringfence.PolicyOpen, ringfence.SourcePolicy, 100},
		{ringfence.PolicyClosed, ringfence.SourcePolicy, 0},
		{ringfence.PolicyLocal, ringfence.SourceLocal, 5}, // 20 / 4
	}
	for _, c := range tests {
		t.Run(c.policy.String(), func(t *testing.T) {
			l, allowed := limiters[c.policy], 0
			for range 100 {
				d, err := l.Allow(t.Context(), "user")
				must(t, err)
				if d.Allowed {
					allowed++
				}
				if d.Source != c.source || d.Shard != "a" || d.Limit != 20 || (d.Cause != ringfence.CauseBreaker && d.Cause != ringfence.CauseError) {
					t.Fatalf("%+v, want source %s, cause breaker or error", d, c.source)
				}
				if (d.Remaining == ringfence.Unknown) != (c.source == ringfence.SourcePolicy) {
					t.Fatalf("%+v: a policy does not know what remains, a local count does", d)
				}
				if !d.Allowed && d.RetryAfter <= 0 {
					t.Fatalf("%+v does not say when to come again", d)
				}
			}
			if allowed != c.allowed {
				t.Errorf("admitted %d of 100, want %d", allowed, c.allowed)
			}
			if d, err := l.Peek(t.Context(), "user"); err != nil || d.Source != c.source || d.Allowed != (c.policy == ringfence.PolicyOpen) {
				t.Errorf("Peek: %+v, %v", d, err)
			}
			many, err := l.AllowMany(t.Context(), []ringfence.Request{{Key: "x", Cost: 1}, {Key: "y", Cost: 6}})
			must(t, err)
			for i, want := range []bool{c.policy != ringfence.PolicyClosed, c.policy == ringfence.PolicyOpen} {
				if many[i].Allowed != want || many[i].Source != c.source {
					t.Errorf("AllowMany[%d]: %+v, want allowed %t by %s", i, many[i], want, c.source)
				}
			}
			if err := l.Reset(t.Context(), "user"); !errors.Is(err, ringfence.ErrUnavailable) {
				t.Errorf("Reset: %v, want ErrUnavailable", err)
			}
		})
	}

	t.Run("a policy set for the shard wins", func(t *testing.T) {
		must(t, ring.SetPolicy("a", ringfence.PolicyClosed))
		if d, err := limiters[ringfence.PolicyOpen].Allow(t.Context(), "user"); err != nil || d.Allowed || d.Source != ringfence.SourcePolicy {
			t.Errorf("with the shard's policy closed: %+v, %v", d, err)
		}
		must(t, ring.ClearPolicy("a"))
		if d, err := limiters[ringfence.PolicyOpen].Allow(t.Context(), "user"); err != nil || !d.Allowed {
			t.Errorf("with the limiter's policy again: %+v, %v", d, err)
		}
	})

	t.Run("a Reset that fails hands out no second share", func(t *testing.T) {
		l := limiters[ringfence.PolicyLocal]
		for range 10 {
			_ = l.Reset(t.Context(), "user")
			if d, err := l.Allow(t.Context(), "user"); err != nil || d.Allowed {
				t.Fatalf("%+v, %v; the share of 5 was used up", d, err)
			}
		}
	})
}

func TestWhenPrimaryAndReplicaAreGoneSharesDealtOutGoOnAndThePolicyAnswersForOtherKeys(t *testing.T) {
	for _, silent := range []bool{false, true} {
		t.Run(fmt.Sprintf("silent %t", silent), func(t *testing.T) {
			s := startPair(t)
			ring := open(t, ringfence.Config{Shards: []ringfence.ShardConfig{s.config()}, Policy: ringfence.PolicyClosed, Breaker: quick})
			l := limiter(t, ring, ringfence.SlidingLog{Limit: 10, Window: time.Minute})
			take(t, s.config(), ringfence.SlidingLog{Limit: 10, Window: time.Minute}, 4, "known")
			s.sync(t)
			s.primary.Kill()
			eventually(t, time.Second, "a share is dealt out", func() bool {
				d, err := l.Peek(t.Context(), "known")
				must(t, err)
				return d.Source == ringfence.SourceReplica
			})
			if silent {
				s.replica.Pause()
			} else {
				s.replica.Kill()
			}
			told := newAnswers(t)
			machine := watchMachine()
			for range 100 {
				told.allow(l, "known")
				told.allow(l, "other")
			}
			slack := machine.slack()
			t.Log(told)
			if n := told.count("allowed"); n != 6 || told.count("allowed", "replica") != 6 {
				t.Errorf("admitted %d, want the 6 that were left: %s", n, told)
			}
			if n := told.count("denied", "policy"); n != 100 {
				t.Errorf("the policy answered %d times, want once for each call of the other key: %s", n, told)
			}
			if _, _, longest := told.quantiles(); longest > budget+slack {
				t.Errorf("a call took %s, want at most %s", longest, budget+slack)
			}
		})
	}
}

func TestEverythingDownAtStartOpensInTimeAndAnswers(t *testing.T) {
	tests := []struct {
		name string
		down func(*testing.T, *redistest.Server) (url string, heal func())
	}{
		{"killed", func(t *testing.T, s *redistest.Server) (string, func()) {
			s.Kill()
			return s.URL(), func() { must(t, s.Restart(t.Context())) }
		}},
		{"silent", func(_ *testing.T, s *redistest.Server) (string, func()) {
			s.Pause()
			return s.URL(), s.Resume
		}},
		{"behind a network that swallows everything", func(t *testing.T, s *redistest.Server) (string, func()) {
			p := startProxy(t, s)
			p.Blackhole(true)
			return "redis://" + p.Addr(), func() { p.Blackhole(false) }
		}},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			primaries := []*redistest.Server{redistest.Start(t, redistest.Options{}), redistest.Start(t, redistest.Options{})}
			replicas := []*redistest.Server{redistest.Start(t, redistest.Options{}), redistest.Start(t, redistest.Options{})}
			var shards []ringfence.ShardConfig
			var heals []func()
			for i := range primaries {
				url, heal := c.down(t, primaries[i])
				replica, healReplica := c.down(t, replicas[i])
				heals = append(heals, heal, healReplica)
				shards = append(shards, ringfence.ShardConfig{ID: fmt.Sprint("s", i), Primary: url, Replicas: []string{replica}})
			}
			const timeout = 100 * time.Millisecond
			config := ringfence.Config{Shards: shards, OperationTimeout: timeout, Breaker: quick}

			machine, start := watchMachine(), time.Now()
			ring := open(t, config)
			if took, most := time.Since(start), 2*timeout+20*time.Millisecond+machine.slack(); took > most {
				t.Errorf("Open took %s, want at most %s", took, most)
			}
			strict := config
			strict.Strict, strict.Logger = true, quiet
			if r, err := ringfence.Open(t.Context(), strict); !errors.Is(err, ringfence.ErrUnreachable) || r != nil {
				t.Errorf("Open with Strict: %v, %v", r, err)
			}

			l := limiter(t, ring, hundredAMinute)
			told := newAnswers(t)
			machine = watchMachine()
			pace(500, 4, time.Millisecond, func(i int) { told.allow(l, fmt.Sprint(i)) })
			slack := machine.slack()
			t.Log(told)
			if n := told.count("allowed", "policy"); n != 500 {
				t.Errorf("the policy admitted %d of 500", n)
			}
			if _, _, longest := told.quantiles(); longest > budget+slack {
				t.Errorf("a call took %s, want at most %s", longest, budget+slack)
			}

			for _, heal := range heals {
				heal()
			}
			// Each pair of servers is two that know nothing of each other, and say so.
			eventually(t, recovery(quick), "both shards decide", func() bool {
				return exact(t, l, "1") && exact(t, l, "2") && exact(t, l, "3") && exact(t, l, "4") &&
					ring.Stats()[0].Up && ring.Stats()[1].Up
			})
		})
	}
}

func TestAFlushedScriptCacheCostsOneLoadAndNoError(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	registry := prometheus.NewRegistry()
	ring := open(t, ringfence.Config{Shards: []ringfence.ShardConfig{alone(server)}, Registerer: registry, Budget: patient})
	l := limiter(t, ring, hundredAMinute)
	told := newAnswers(t)
	told.allow(l, "user")
	loads := metric(t, registry, "script_loads_total")
	must(t, server.Client().ScriptFlush(t.Context()).Err())
	for range 20 {
		told.allow(l, "user")
	}
	if n := told.count("allowed", "primary"); n != 21 {
		t.Errorf("want 21 exact answers: %s", told)
	}
	if n := metric(t, registry, "script_loads_total") - loads; n != 1 {
		t.Errorf("the script was loaded %.0f times, want once", n)
	}
	if n := metric(t, registry, "redis_errors_total"); n != 0 {
		t.Errorf("%.0f errors", n)
	}
	if n := used(t, server, l); n != 21 {
		t.Errorf("21 calls were charged %d times", n)
	}
}

func TestAServerThatRestartsEmptyBetweenCallsIsUsedAtOnce(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	ring := open(t, ringfence.Config{Shards: []ringfence.ShardConfig{alone(server)}, Budget: patient})
	l := limiter(t, ring, hundredAMinute)
	told := newAnswers(t)
	for range 10 {
		told.allow(l, "user")
	}
	must(t, server.Restart(t.Context()))
	for range 10 {
		told.allow(l, "user")
	}
	// A dead connection is noticed before it is used, and the script is sent along.
	if n := told.count("allowed", "primary"); n != 20 {
		t.Errorf("want 20 exact answers: %s", told)
	}
	if n := used(t, server, l); n != 10 {
		t.Errorf("the restarted server holds %d charges, want 10: what it had before is lost", n)
	}
}

func TestAShardWhosePrimaryWasDemotedGoesOverToTheNewOneByItself(t *testing.T) {
	s := startPair(t)
	ring := open(t, ringfence.Config{Shards: []ringfence.ShardConfig{s.config()}, Breaker: quick, Budget: patient})
	l := limiter(t, ring, hundredAMinute)
	take(t, s.config(), hundredAMinute, 10, "user")
	s.sync(t)
	told := newAnswers(t)
	must(t, s.replica.Promote(t.Context()))
	must(t, s.primary.ReplicaOf(t.Context(), s.replica))
	took := eventually(t, recovery(quick), "the promoted replica decides", func() bool {
		told.allow(l, "other") // READONLY is how the ring notices
		return exact(t, l, "user") && ring.Stats()[0].Primary == s.replica.Addr()
	})
	t.Logf("went over in %s: %s", took, told)
	d, err := l.Allow(t.Context(), "user")
	must(t, err)
	if d.Source != ringfence.SourcePrimary || d.Remaining != 89 {
		t.Errorf("%+v, want 89 left: the promoted replica knows of the 10", d)
	}
	if ring.Stats()[0].SplitBrain {
		t.Error("SplitBrain, though there is one primary")
	}
}

func TestRingfenceNeverPromotesAndUsesAReplicaThatWasPromotedByHand(t *testing.T) {
	s := startPair(t)
	ring := open(t, ringfence.Config{Shards: []ringfence.ShardConfig{s.config()}, Breaker: quick})
	l := limiter(t, ring, hundredAMinute)
	take(t, s.config(), hundredAMinute, 40, "user")
	s.sync(t)
	s.primary.Pause()
	told := newAnswers(t)
	pace(600, 2, time.Millisecond, func(int) { told.allow(l, "user") })
	if n := told.count("allowed", "replica"); n != 60 {
		t.Errorf("want the 60 that are left out of the share: %s", told)
	}
	info, err := s.replica.Client().Info(t.Context(), "replication").Result()
	must(t, err)
	if !strings.Contains(info, "role:slave") {
		t.Errorf("the replica was promoted:\n%s", info)
	}

	must(t, s.replica.Promote(t.Context()))
	took := eventually(t, recovery(quick), "the promoted replica decides", func() bool { return exact(t, l, "user") })
	t.Logf("exact %s after the promotion", took)
	// It knows of the 40, and has been told of the 60 that the share admitted.
	eventually(t, recovery(quick), "all 100 are known to be used", func() bool {
		d, err := l.Peek(t.Context(), "user")
		must(t, err)
		return d.Source == ringfence.SourcePrimary && d.Remaining == 0 && ring.Stats()[0].Primary == s.replica.Addr()
	})

	// The old primary comes back and still says it is one. The other was promoted in its
	// place and remembers its replication id: that one is right, and nothing is split.
	s.primary.Resume()
	must(t, s.primary.Client().Ping(t.Context()).Err())
	fresh := open(t, ringfence.Config{Shards: []ringfence.ShardConfig{s.config()}})
	if st := fresh.Stats()[0]; st.Primary != s.replica.Addr() || st.SplitBrain {
		t.Errorf("a process that starts now takes %s, split brain %t, want the promoted %s", st.Primary, st.SplitBrain, s.replica.Addr())
	}

	// Not even while the promoted one is silent does the old one get its place back.
	s.replica.Pause()
	told = newAnswers(t)
	pace(600, 2, time.Millisecond, func(int) { told.allow(l, "user") })
	st := ring.Stats()[0]
	if st.Primary != s.replica.Addr() || st.SplitBrain || told.count("primary") != 0 {
		t.Errorf("went back to the old primary %s, split brain %t: %s", st.Primary, st.SplitBrain, told)
	}
	s.replica.Resume()
	eventually(t, recovery(quick), "the promoted replica decides again", func() bool { return exact(t, l, "user") })
}

func TestTwoPrimariesThatKnowNothingOfEachOtherAreReportedAndTheConfiguredOneStays(t *testing.T) {
	a, b := redistest.Start(t, redistest.Options{}), redistest.Start(t, redistest.Options{})
	var lines bytes.Buffer
	registry := prometheus.NewRegistry()
	ring := open(t, ringfence.Config{
		Shards: []ringfence.ShardConfig{{ID: "a", Primary: a.URL(), Replicas: []string{b.URL()}}}, Budget: patient,
		Logger: slog.New(slog.NewTextHandler(&lines, nil)), Registerer: registry,
	})
	if text := lines.String(); !strings.Contains(text, "level=WARN") || !strings.Contains(text, "two servers of the shard say they are the primary") {
		t.Errorf("no warning:\n%s", text)
	}
	split := func() float64 {
		families, err := registry.Gather()
		must(t, err)
		for _, f := range families {
			if f.GetName() == "ratelimiter_shard_split_brain" {
				return f.GetMetric()[0].GetGauge().GetValue()
			}
		}
		return -1
	}
	if split() != 1 {
		t.Errorf("the gauge shows %v", split())
	}
	l := limiter(t, ring, hundredAMinute)
	told := newAnswers(t)
	told.allow(l, "user")
	if st := ring.Stats()[0]; !st.SplitBrain || st.Primary != a.Addr() {
		t.Errorf("primary %s, split brain %t, want %s and true", st.Primary, st.SplitBrain, a.Addr())
	}
	if told.count("allowed", "primary") != 1 || used(t, a, l) != 1 {
		t.Errorf("the configured primary does not decide: %s", told)
	}
	// Made one, as the warning says.
	must(t, b.ReplicaOf(t.Context(), a))
	eventually(t, 20*time.Second, "nothing is split any more", func() bool { return !ring.Stats()[0].SplitBrain && split() == 0 })
	if st := ring.Stats()[0]; st.Primary != a.Addr() {
		t.Errorf("the primary is %s", st.Primary)
	}
}

func TestASilentReplicaKeepsNoBreakerOpen(t *testing.T) {
	s := startPair(t)
	ring := open(t, ringfence.Config{Shards: []ringfence.ShardConfig{s.config()}, Breaker: quick})
	l := limiter(t, ring, hundredAMinute)
	s.replica.Pause()
	s.primary.Kill()
	told := newAnswers(t)
	eventually(t, 2*time.Second, "the breaker opens", func() bool {
		told.allow(l, "user")
		return ring.Stats()[0].Breaker.State == ringfence.BreakerOpen
	})
	must(t, s.primary.Restart(t.Context()))
	// A probe asks everybody, which takes an operation's time-out for the silent one.
	took := eventually(t, recovery(quick), "the primary decides", func() bool { return exact(t, l, "user") })
	t.Logf("exact %s after the primary came back, the replica still silent", took)

	start := time.Now()
	open(t, ringfence.Config{Shards: []ringfence.ShardConfig{s.config()}, Strict: true, OperationTimeout: time.Second})
	t.Logf("Open with a silent replica took %s", time.Since(start))
}

func TestAChargeWhoseReplyIsLostIsNeverSentAgainAndIsCounted(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	proxy := startProxy(t, server)
	registry := prometheus.NewRegistry()
	ring := open(t, ringfence.Config{
		Shards: []ringfence.ShardConfig{{ID: "a", Primary: "redis://" + proxy.Addr()}}, Registerer: registry,
		Breaker: ringfence.BreakerConfig{Failures: 1000}, Budget: patient,
	})
	l := limiter(t, ring, hundredAMinute)
	told := newAnswers(t)
	told.allow(l, "user")
	const rounds = 10
	for range rounds {
		proxy.CutReplies(true)
		told.allow(l, "user")
		proxy.CutReplies(false)
		eventually(t, time.Second, "connected again", func() bool { return exact(t, l, "user") })
	}
	t.Log(told)
	if n := told.count("allowed", "policy", "error") + told.count("allowed", "policy", "budget"); n != rounds {
		t.Errorf("the policy answered %d times, want %d: %s", n, rounds, told)
	}
	if n := used(t, server, l); n != 1+rounds {
		t.Errorf("%d calls were charged %d times", 1+rounds, n)
	}
	if n := metric(t, registry, "unknown_charges_total"); n != rounds {
		t.Errorf("%.0f charges of unknown fate were counted, want %d", n, rounds)
	}
}

// The caller left and was answered out of the share, and then the reply came: the primary
// has charged the call. It is not counted here as well, and not told to the primary again.
func TestALateReplyCorrectsTheLocalCount(t *testing.T) {
	for _, limit := range []ringfence.Limit{hundredAMinute, ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 100}} {
		t.Run(fmt.Sprintf("%T", limit), func(t *testing.T) {
			s := startPair(t)
			far := startProxy(t, s.primary)
			registry := prometheus.NewRegistry()
			ring := open(t, ringfence.Config{
				Shards:     []ringfence.ShardConfig{{ID: "a", Primary: "redis://" + far.Addr(), Replicas: []string{s.replica.URL()}}},
				Registerer: registry, Policy: ringfence.PolicyClosed, Budget: patient, OperationTimeout: 10 * time.Second,
				Breaker: ringfence.BreakerConfig{Failures: 1000},
			})
			l := limiter(t, ring, limit)
			eventually(t, 5*time.Second, "connected", func() bool { return exact(t, l, "user") })
			left := func() int64 {
				d, err := l.Peek(t.Context(), "user")
				must(t, err)
				if d.Source != ringfence.SourcePrimary {
					return -1
				}
				return d.Remaining
			}
			const rounds = 3
			for i := range rounds {
				far.SetDelay(2 * patient)
				d, err := l.Allow(t.Context(), "user")
				must(t, err)
				if !d.Allowed || d.Source != ringfence.SourceReplica || d.Cause != ringfence.CauseBudget {
					t.Fatalf("%+v, want it out of the share", d)
				}
				eventually(t, 10*time.Second, "the reply has come", func() bool { return ring.Stats()[0].InFlight == 0 })
				far.SetDelay(0)
				want := int64(100 - i - 1)
				eventually(t, 10*time.Second, "the primary decides again", func() bool { return left() >= 0 })
				if got := left(); got != want {
					t.Fatalf("%d are left after %d calls, want %d", got, i+1, want)
				}
				s.sync(t)
			}
			if n := metric(t, registry, "settled_charges_total") + metric(t, registry, "settle_lost_total"); n != 0 {
				t.Errorf("%.0f units were told that the primary had charged itself", n)
			}
			// And not kept here either: the share begins with what is left.
			must(t, ring.ForceBreaker("a", ringfence.BreakerForcedOpen))
			admitted := 0
			for range 200 {
				d, err := l.Allow(t.Context(), "user")
				must(t, err)
				if d.Allowed {
					admitted++
				}
			}
			if admitted != 100-rounds {
				t.Errorf("%d admitted out of the share, want the %d that are left", admitted, 100-rounds)
			}
		})
	}
}

// What nobody knows the fate of when a server hangs is what was in flight: InFlight
// operations, and those that failed before the breaker opened. An operation carries
// MaxBatch entries; the calls of one key and cost share one, so that of a hot key it
// carries up to 16 times as many calls.
func TestAServerThatHangsForASecondChargesAtMostWhatWasInFlight(t *testing.T) {
	const inFlight, failures, callersAtOnce = 4, 3, 300
	tests := []struct {
		name            string
		keys            int
		maxBatch, calls int // an operation's
	}{
		{"every call with a key of its own", 4096, 16, 16},
		{"all calls with one key", 1, 2, 2 * 16},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			server := redistest.Start(t, redistest.Options{})
			registry := prometheus.NewRegistry()
			ring := open(t, ringfence.Config{
				Shards: []ringfence.ShardConfig{alone(server)}, Registerer: registry,
				InFlight: inFlight, MaxBatch: c.maxBatch,
				Breaker: ringfence.BreakerConfig{Failures: failures, MaxOpenPeriod: quick.MaxOpenPeriod},
			})
			l := limiter(t, ring, ringfence.SlidingLog{Limit: 1_000_000, Window: time.Hour})
			told := newAnswers(t)
			var next atomic.Int64
			var stop atomic.Bool
			var callers sync.WaitGroup
			for range callersAtOnce {
				callers.Go(func() {
					for !stop.Load() {
						told.allow(l, fmt.Sprint("user ", int(next.Add(1))%c.keys))
						time.Sleep(200 * time.Microsecond) // the callers' own work
					}
				})
			}
			exactly := func() int { return told.count("allowed", "primary") }
			eventually(t, 10*time.Second, "calls are answered", func() bool { return exactly() > 2000 })
			server.Pause()
			eventually(t, 2*time.Second, "the breaker opens", func() bool { return ring.Stats()[0].Breaker.State != ringfence.BreakerClosed })
			eventually(t, 2*time.Second, "operations in flight are given up", func() bool { return ring.Stats()[0].InFlight == 0 })
			server.Resume()
			before := exactly()
			eventually(t, recovery(quick), "calls are answered again", func() bool { return exactly() > before+1000 })
			stop.Store(true)
			callers.Wait()
			eventually(t, time.Second, "nothing is in flight", func() bool { return ring.Stats()[0].InFlight == 0 })

			charged, acked := chargedFor(t, server, l, c.keys), exactly()
			unknown := int(metric(t, registry, "unknown_charges_total"))
			late := charged - acked
			t.Logf("%s; charged %d, known to callers %d, unknown %d", told, charged, acked, unknown)
			if late < 0 {
				t.Errorf("%d calls were admitted as exact and %d charged", acked, charged)
			}
			if n := told.count("budget"); late > unknown+n {
				t.Errorf("%d charges nobody was told of, want at most the %d of unknown fate and those of the %d calls answered too late", late, unknown, n)
			}
			if most := (inFlight + failures - 1) * c.calls; unknown > most {
				t.Errorf("%d charges of unknown fate, want at most the %d that %d operations carry", unknown, most, inFlight+failures-1)
			}
		})
	}
}

// chargedFor is how many units the logs of "user 0" and so on hold on a server.
func chargedFor(t *testing.T, s *redistest.Server, l *ringfence.Limiter, keys int) (charged int) {
	t.Helper()
	pipe := s.Client().Pipeline()
	for i := range keys {
		_, name := l.Locate(fmt.Sprint("user ", i))
		pipe.ZCard(t.Context(), name)
	}
	replies, err := pipe.Exec(t.Context())
	must(t, err)
	for _, r := range replies {
		charged += int(r.(*redis.IntCmd).Val())
	}
	return charged
}

// More callers than a slow shard can serve: those it can serve it must go on serving.
// A limiter that makes its callers' time-outs the connections' time-outs, or that serves
// whoever has waited longest, ends up serving nobody.
func TestMoreCallersThanASlowShardCanServeDoNotKeepItFromServing(t *testing.T) {
	tests := []struct {
		name               string
		inFlight, maxBatch int
		perSecond          int // what 40 ms a reply allow, at most
	}{
		{"batches carry all of them", 4, 64, 1600},
		{"20 connections without batches", 20, 1, 500},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			server := redistest.Start(t, redistest.Options{})
			proxy := startProxy(t, server)
			ring := open(t, ringfence.Config{
				Shards: []ringfence.ShardConfig{{ID: "a", Primary: "redis://" + proxy.Addr()}},
				Budget: 100 * time.Millisecond, InFlight: c.inFlight, MaxBatch: c.maxBatch, Policy: ringfence.PolicyClosed,
				// The queue is what is looked at here, and a busy machine must not open it.
				Breaker: ringfence.BreakerConfig{Failures: 1000},
			})
			l := limiter(t, ring, ringfence.SlidingLog{Limit: 1_000_000, Window: time.Hour})
			pace(200, 64, 0, func(int) { _, _ = l.Allow(t.Context(), "user") }) // opens the connections
			eventually(t, 5*time.Second, "connected", func() bool { return exact(t, l, "user") })
			before := used(t, server, l)
			proxy.SetDelay(40 * time.Millisecond)

			told := newAnswers(t)
			const runs = 2 * time.Second
			var callers sync.WaitGroup
			end := time.Now().Add(runs)
			for range 64 {
				callers.Go(func() {
					for time.Now().Before(end) {
						if d := told.allow(l, "user"); !d.Allowed {
							time.Sleep(time.Millisecond) // who is turned away does not come back at once
						}
					}
				})
			}
			callers.Wait()
			proxy.SetDelay(0)
			served := told.count("allowed", "primary")
			charged := used(t, server, l) - before
			t.Logf("served %d, charged %d; %s", served, charged, told)
			// What a busy machine takes away is not the queue's fault; that what is charged
			// is answered in time is its merit.
			if least := charged / 2; served < least {
				t.Errorf("of %d calls charged %d were answered in time, want at least %d", charged, served, least)
			}
			if least := int(runs.Seconds()) * c.perSecond / 5; served < least {
				t.Errorf("served %d in %s, want at least %d", served, runs, least)
			}
		})
	}
}

func TestCloseEndsInTimeWhateverTheTimeouts(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	redistest.NoLeaks(t)
	ring, err := ringfence.Open(t.Context(), ringfence.Config{
		Shards: []ringfence.ShardConfig{alone(server)}, Logger: quiet,
		Budget: 30 * time.Second, OperationTimeout: 30 * time.Second,
	})
	must(t, err)
	l := limiter(t, ring, hundredAMinute)
	server.Pause()
	var answered, refused atomic.Int64
	var callers sync.WaitGroup
	for i := range 20 {
		callers.Go(func() {
			d, err := l.Allow(context.Background(), fmt.Sprint(i))
			switch {
			case err == nil && d.Allowed && d.Source == ringfence.SourcePolicy:
				answered.Add(1)
			case errors.Is(err, ringfence.ErrClosed): // had not begun when Close did
				refused.Add(1)
			default:
				t.Errorf("%+v, %v", d, err)
			}
		})
	}
	eventually(t, time.Second, "callers wait", func() bool { return ring.Stats()[0].InFlight > 0 })
	closeInTime(t, ring)
	callers.Wait()
	if answered.Load() == 0 {
		t.Errorf("%d callers were answered and %d refused", answered.Load(), refused.Load())
	}
	if _, err := l.Allow(t.Context(), "user"); !errors.Is(err, ringfence.ErrClosed) {
		t.Errorf("after Close: %v, want ErrClosed", err)
	}
}

func TestACallersDeadlineShorterThanTheBudgetIsAnsweredBeforeItEnds(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	ring := open(t, ringfence.Config{
		Shards: []ringfence.ShardConfig{alone(server)}, Budget: 200 * time.Millisecond,
		Breaker: ringfence.BreakerConfig{Failures: 1000},
	})
	l := limiter(t, ring, hundredAMinute)
	server.Pause()
	for range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		d, err := l.Allow(ctx, "user")
		cancel()
		if err != nil || !d.Allowed || d.Source != ringfence.SourcePolicy || d.Cause != ringfence.CauseBudget {
			t.Fatalf("%+v, %v", d, err)
		}
	}
	if n := ring.Stats()[0].Breaker.ConsecutiveFailures; n != 0 {
		t.Errorf("hurried callers counted as %d failures of the shard", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Allow(ctx, "user"); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	ctx, cancel = context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	if _, err := l.Allow(ctx, "user"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("expired before the call: %v", err)
	}
}

// A thousand keys are more than one operation carries. On a server a millisecond away they
// are all decided by the primary; when it is dead, all out of what the replica says is left:
// a policy that admits must not answer for keys that a replica knows to be used up.
func TestAllowManyOfAThousandKeysIsDecidedByThePrimaryAndThenOutOfShares(t *testing.T) {
	s := startPair(t)
	near := must2(redistest.NewProxy(s.primary.Addr()))(t)
	t.Cleanup(near.Close)
	near.SetDelay(time.Millisecond)
	ring := open(t, ringfence.Config{
		Shards: []ringfence.ShardConfig{{ID: "a", Primary: "redis://" + near.Addr(), Replicas: []string{s.replica.URL()}}},
		Budget: 200 * time.Millisecond, OperationTimeout: time.Second, Breaker: quick,
	})
	l := limiter(t, ring, ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 1})
	reqs := make([]ringfence.Request, ringfence.MaxMany)
	for i := range reqs {
		reqs[i] = ringfence.Request{Key: fmt.Sprintf("k%d", i), Cost: 1}
	}
	decide := func() map[string]int {
		out, err := l.AllowMany(t.Context(), reqs)
		must(t, err)
		told := map[string]int{}
		for _, d := range out {
			told[fmt.Sprintf("%t by %s", d.Allowed, d.Source)]++
		}
		return told
	}
	if told := decide(); told["true by primary"] != len(reqs) {
		t.Errorf("healthy: %v", told)
	}
	s.sync(t)
	s.primary.Kill()
	eventually(t, 10*time.Second, "the breaker is open", func() bool {
		_, err := l.Allow(t.Context(), "another")
		must(t, err)
		return ring.Stats()[0].Breaker.State == ringfence.BreakerOpen
	})
	if told := decide(); told["false by replica"] != len(reqs) {
		t.Errorf("primary dead: %v, want all denied out of shares: everything was used up", told)
	}
}

func must2[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		must(t, err)
		return v
	}
}
