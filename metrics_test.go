package ringfence_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/embedded"
)

// contract is what dashboards and alerts of users are built on: a name, its type and its
// labels, each with all values it can have; nil: any.
type contract struct {
	name   string
	kind   string
	labels map[string][]string
}

var (
	errorTypeValues = []string{
		"timeout", "refused", "dial", "eof", "pool_timeout", "loading", "readonly", "masterdown",
		"clusterdown", "moved", "noreplicas", "oom", "misconf", "busy", "noscript", "auth", "noperm",
		"wrongtype", "protocol", "other",
	}
	outcomeValues = []string{"allowed", "denied", "error", "canceled"}
	stateValues   = []string{"closed", "open", "half_open"}
	roleValues    = []string{"primary", "replica"}
	sloValues     = []string{"redis_availability", "decision_latency"}
	anything      []string // whatever the configuration says
)

var contracts = []contract{
	{"decisions_total", "COUNTER", map[string][]string{"limit": anything, "outcome": outcomeValues, "source": {"primary", "replica", "local", "policy", "lease", "cache", "none"}}},
	{"request_latency_seconds", "HISTOGRAM", map[string][]string{"shard_id": anything, "outcome": outcomeValues}},
	{"redis_command_duration_seconds", "HISTOGRAM", map[string][]string{"shard_id": anything, "command": {"charge", "look"}}},
	{"redis_errors_total", "COUNTER", map[string][]string{"shard_id": anything, "error_type": errorTypeValues}},
	{"circuit_state", "GAUGE", map[string][]string{"shard_id": anything}},
	{"circuit_transitions_total", "COUNTER", map[string][]string{"shard_id": anything, "from": stateValues, "to": stateValues}},
	{"circuit_rejections_total", "COUNTER", map[string][]string{"shard_id": anything}},
	{"circuit_probes_total", "COUNTER", map[string][]string{"shard_id": anything, "result": {"ok", "failed"}}},
	{"fallback_decisions_total", "COUNTER", map[string][]string{"shard_id": anything, "mode": {"replica", "share", "open", "closed", "local"}, "reason": {"breaker", "budget", "error", "corrupt"}}},
	{"unknown_charges_total", "COUNTER", map[string][]string{"shard_id": anything}},
	{"tokens_requested_total", "COUNTER", map[string][]string{"limit": anything}},
	{"tokens_granted_total", "COUNTER", map[string][]string{"limit": anything}},
	{"near_limit_total", "COUNTER", map[string][]string{"limit": anything}},
	{"near_cache_entries", "GAUGE", map[string][]string{"limit": anything}},
	{"near_cache_hits_total", "COUNTER", map[string][]string{"limit": anything}},
	{"lease_outstanding", "GAUGE", map[string][]string{"limit": anything}},
	{"lease_returned_total", "COUNTER", map[string][]string{"limit": anything}},
	{"limit_capacity", "GAUGE", map[string][]string{"limit": anything}},
	{"limit_window_seconds", "GAUGE", map[string][]string{"limit": anything}},
	{"batch_entries", "HISTOGRAM", map[string][]string{"shard_id": anything}},
	{"inflight_operations", "GAUGE", map[string][]string{"shard_id": anything}},
	{"queue_entries", "GAUGE", map[string][]string{"shard_id": anything}},
	{"redis_pool_connections", "GAUGE", map[string][]string{"shard_id": anything, "role": roleValues, "state": {"idle", "used"}}},
	{"redis_pool_timeouts_total", "COUNTER", map[string][]string{"shard_id": anything, "role": roleValues}},
	{"redis_pool_wait_seconds_total", "COUNTER", map[string][]string{"shard_id": anything, "role": roleValues}},
	{"script_loads_total", "COUNTER", map[string][]string{"shard_id": anything}},
	{"shard_up", "GAUGE", map[string][]string{"shard_id": anything}},
	{"shard_split_brain", "GAUGE", map[string][]string{"shard_id": anything}},
	{"redis_clock_offset_seconds", "GAUGE", map[string][]string{"shard_id": anything}},
	{"replica_lag_seconds", "GAUGE", map[string][]string{"shard_id": anything}},
	{"ring_shards", "GAUGE", map[string][]string{"state": stateValues}},
	{"ring_key_share_ratio", "GAUGE", map[string][]string{"shard_id": anything}},
	{"config_mismatch", "GAUGE", map[string][]string{"shard_id": anything}},
	{"settled_charges_total", "COUNTER", map[string][]string{"shard_id": anything}},
	{"settle_lost_total", "COUNTER", map[string][]string{"shard_id": anything}},
	{"slo_events_total", "COUNTER", map[string][]string{"slo_name": sloValues}},
	{"error_budget_consumed_total", "COUNTER", map[string][]string{"slo_name": sloValues}},
	{"slo_objective_ratio", "GAUGE", map[string][]string{"slo_name": sloValues}},
	{"build_info", "GAUGE", map[string][]string{"version": anything, "revision": anything, "goversion": anything}},
	// Beyond the contract: how much a limiter may hold, and the one map whose size callers choose.
	{"lease_bound", "GAUGE", map[string][]string{"limit": anything}},
	{"local_keys", "GAUGE", map[string][]string{}},
}

// notYet are names of the contract that nothing can count yet, with what they wait for.
// Whoever builds it moves the line up; until then the name must not be taken.
var notYet = map[string]string{
	"shadow_denied_total": "there is no shadow mode yet",
}

// marker is in every key of these tests, so that it can be looked for where no key may be.
const marker = "key-of-somebody-7f3a"

var noLog = slog.New(slog.NewTextHandler(io.Discard, nil))

// metered is a ring on embedded shards, with its metrics.
type metered struct {
	*ringfence.Ring
	reg    *prometheus.Registry
	shards *embedded.Shards
	bucket *ringfence.Limiter // 10 at once
	log    *ringfence.Limiter
}

func openMetered(t testing.TB, n int, adjust func(*ringfence.Config)) *metered {
	t.Helper()
	shards, err := embedded.Start(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = shards.Close() })
	for i := range n {
		addr, err := shards.Addr(i)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("embedded redis %s", addr)
	}
	m := &metered{reg: prometheus.NewRegistry(), shards: shards}
	c := ringfence.Config{Shards: shards.Config(), Registerer: m.reg, Logger: noLog, Budget: 2 * time.Second, OperationTimeout: 2 * time.Second}
	if adjust != nil {
		adjust(&c)
	}
	if m.Ring, err = ringfence.Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	m.bucket = m.limiter(t, "bucket", ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 10})
	m.log = m.limiter(t, "log", ringfence.SlidingLog{Limit: 5, Window: time.Hour})
	return m
}

func (m *metered) limiter(t testing.TB, name string, limit ringfence.Limit, opts ...ringfence.LimiterOption) *ringfence.Limiter {
	t.Helper()
	l, err := m.Limiter(name, limit, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// leased is the limiter with leases.
func (m *metered) leased(t testing.TB) *ringfence.Limiter {
	t.Helper()
	return m.limiter(t, "leased", ringfence.TokenBucket{Rate: 1000, Per: time.Hour, Burst: 1000}, ringfence.WithLease(ringfence.Lease{Max: 20}))
}

// exercise takes every way through the limiters that embedded shards can show.
func (m *metered) exercise(t testing.TB) {
	t.Helper()
	ctx := context.Background()
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	closed := m.limiter(t, "closed", ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 10}, ringfence.WithPolicy(ringfence.PolicyClosed))
	local := m.limiter(t, "local", ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 10}, ringfence.WithPolicy(ringfence.PolicyLocal))
	all := []*ringfence.Limiter{m.bucket, m.log, closed, local, m.leased(t)}
	for round := range 2 {
		for _, l := range all {
			for i := range 40 {
				if _, err := l.AllowN(ctx, fmt.Sprintf("%s-%d", marker, i%20), int64(1+i%5)); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := l.AllowMany(ctx, []ringfence.Request{{Key: marker, Cost: 1}, {Key: marker + "2", Cost: 2}}); err != nil {
				t.Fatal(err)
			}
			if _, err := l.Peek(ctx, marker); err != nil {
				t.Fatal(err)
			}
			if _, err := l.AllowN(ctx, marker, -1); !errors.Is(err, ringfence.ErrInvalid) {
				t.Fatal(err)
			}
			if _, err := l.Allow(ctx, strings.Repeat(marker, 100)); !errors.Is(err, ringfence.ErrInvalid) {
				t.Fatal(err)
			}
			if _, err := l.Allow(canceled, marker); !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
		}
		if round == 0 {
			if err := m.shards.Kill(0); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// series are the values of all series by name and labels; a histogram's is its count.
func (m *metered) series(t testing.TB) map[string]float64 {
	t.Helper()
	families, err := m.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, x := range f.GetMetric() {
			var labels []string
			for _, l := range x.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			v := x.GetCounter().GetValue() + x.GetGauge().GetValue() + float64(x.GetHistogram().GetSampleCount())
			out[f.GetName()+"{"+strings.Join(labels, ",")+"}"] = v
		}
	}
	return out
}

func TestEveryMetricOfTheContractExistsWithItsNameTypeAndLabels(t *testing.T) {
	m := openMetered(t, 3, nil)
	m.exercise(t)
	families, err := m.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	unknown := map[string]bool{}
	for _, f := range families {
		unknown[f.GetName()] = true
	}
	for _, c := range contracts {
		name := "ratelimiter_" + c.name
		delete(unknown, name)
		i := 0
		for i < len(families) && families[i].GetName() != name {
			i++
		}
		if i == len(families) {
			t.Errorf("%s does not exist", name)
			continue
		}
		f := families[i]
		if f.GetType().String() != c.kind {
			t.Errorf("%s is a %s, want a %s", name, f.GetType(), c.kind)
		}
		if f.GetHelp() == "" {
			t.Errorf("%s has no help", name)
		}
		want := slices.Sorted(maps.Keys(c.labels))
		for _, x := range f.GetMetric() {
			var got []string
			for _, l := range x.GetLabel() {
				got = append(got, l.GetName())
				if closed := c.labels[l.GetName()]; closed != nil && !slices.Contains(closed, l.GetValue()) {
					t.Errorf("%s has %s=%q, which is not in the closed set", name, l.GetName(), l.GetValue())
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s has the labels %v, want %v", name, got, want)
			}
		}
	}
	for name := range unknown {
		short := strings.TrimPrefix(name, "ratelimiter_")
		if why, early := notYet[short]; early {
			t.Errorf("%s exists, though %s: move it to contracts", name, why)
		} else {
			t.Errorf("%s is not in the contract", name)
		}
	}
}

func TestTheExpositionHasNoLint(t *testing.T) {
	m := openMetered(t, 2, func(c *ringfence.Config) { c.Name = "main" })
	m.exercise(t)
	families, err := m.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestEverySeriesExistsAtZeroBeforeAnyTraffic(t *testing.T) {
	m := openMetered(t, 3, nil)
	for _, name := range []string{"closed", "local"} { // as exercise makes them
		opt := ringfence.WithPolicy(map[string]ringfence.FailurePolicy{"closed": ringfence.PolicyClosed, "local": ringfence.PolicyLocal}[name])
		m.limiter(t, name, ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 10}, opt)
	}
	m.leased(t)
	before := m.series(t)
	count := func(name string) (n int) {
		for s := range before {
			if strings.HasPrefix(s, "ratelimiter_"+name+"{") {
				n++
			}
		}
		return n
	}
	const shards, limiters = 3, 5
	for name, want := range map[string]int{
		"decisions_total":                limiters * (2*6 + 2), // error and canceled have the source none
		"request_latency_seconds":        (shards + 1) * 4,     // and shard_id "" for misuse
		"redis_command_duration_seconds": shards * 2,
		"redis_errors_total":             shards * len(errorTypeValues),
		"circuit_state":                  shards,
		"circuit_transitions_total":      shards * 6,
		"circuit_rejections_total":       shards,
		"circuit_probes_total":           shards * 2,
		"fallback_decisions_total":       shards * 5 * 4,
		"unknown_charges_total":          shards,
		"tokens_requested_total":         limiters,
		"tokens_granted_total":           limiters,
		"near_limit_total":               limiters,
		"near_cache_entries":             limiters,
		"near_cache_hits_total":          limiters,
		"lease_outstanding":              1,
		"lease_bound":                    1,
		"lease_returned_total":           1,
		"limit_capacity":                 limiters,
		"limit_window_seconds":           limiters,
		"batch_entries":                  shards,
		"redis_pool_connections":         shards * 4,
		"ring_shards":                    3,
		"slo_events_total":               2,
		"error_budget_consumed_total":    2,
		"slo_objective_ratio":            2,
		"build_info":                     1,
	} {
		if got := count(name); got != want {
			t.Errorf("%s has %d series before any traffic, want %d", name, got, want)
		}
	}
	for s, v := range before {
		if strings.Contains(s, "_total{") && v != 0 && !strings.HasPrefix(s, "ratelimiter_script_loads_total") && !strings.HasPrefix(s, "ratelimiter_redis_pool") {
			t.Errorf("%s is %v before any traffic", s, v)
		}
	}
	m.exercise(t)
	for s := range m.series(t) {
		if _, ok := before[s]; !ok {
			t.Errorf("%s appeared only with traffic: rate() does not see its first step", s)
		}
	}
}

func TestConfigurationIsExportedAsData(t *testing.T) {
	m := openMetered(t, 1, nil)
	got := m.series(t)
	for s, want := range map[string]float64{
		"ratelimiter_limit_capacity{limit=bucket}":                                        10,
		"ratelimiter_limit_window_seconds{limit=bucket}":                                  36000, // Burst / Rate
		"ratelimiter_limit_capacity{limit=log}":                                           5,
		"ratelimiter_limit_window_seconds{limit=log}":                                     3600,
		"ratelimiter_slo_objective_ratio{slo_name=redis_availability}":                    0.999,
		"ratelimiter_slo_objective_ratio{slo_name=decision_latency}":                      0.999,
		"ratelimiter_ring_key_share_ratio{shard_id=embedded-0}":                           1,
		"ratelimiter_shard_up{shard_id=embedded-0}":                                       1,
		"ratelimiter_redis_pool_connections{role=replica,shard_id=embedded-0,state=idle}": 0,
	} {
		if v, ok := got[s]; !ok || v != want {
			t.Errorf("%s is %v (exists: %t), want %v", s, v, ok, want)
		}
	}
}

// counts are a limiter's decisions by "outcome source".
func (m *metered) counts(t testing.TB, limit string) map[string]float64 {
	t.Helper()
	out := map[string]float64{}
	for s, v := range m.series(t) {
		rest, ok := strings.CutPrefix(s, "ratelimiter_decisions_total{limit="+limit+",outcome=")
		if ok && v != 0 {
			out[strings.ReplaceAll(strings.TrimSuffix(rest, "}"), ",source=", " ")] = v
		}
	}
	return out
}

func TestEachEntryOfEachCallIsCountedExactlyOnce(t *testing.T) {
	ctx := context.Background()
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	late, cancelLate := context.WithDeadline(ctx, time.Now().Add(-time.Hour))
	defer cancelLate()
	many := func(n int, key string) []ringfence.Request {
		out := make([]ringfence.Request, n)
		for i := range out {
			out[i] = ringfence.Request{Key: key, Cost: 1}
		}
		return out
	}
	for _, row := range []struct {
		name string
		call func(t *testing.T, m *metered)
		want map[string]float64
		// Of these, how many are events of redis_availability, and bad ones.
		events, bad float64
	}{
		{"Allow", func(_ *testing.T, m *metered) {
			for range 12 {
				_, _ = m.bucket.Allow(ctx, marker)
			}
		}, map[string]float64{"allowed primary": 10, "denied primary": 1, "denied cache": 1}, 11, 0}, // the last needs no Redis
		{"AllowN", func(_ *testing.T, m *metered) {
			_, _ = m.bucket.AllowN(ctx, marker, 7)
			_, _ = m.bucket.AllowN(ctx, marker, 7)
		}, map[string]float64{"allowed primary": 1, "denied primary": 1}, 2, 0},
		{"AllowMany", func(_ *testing.T, m *metered) {
			_, _ = m.bucket.AllowMany(ctx, many(13, marker))
		}, map[string]float64{"allowed primary": 10, "denied primary": 3}, 13, 0},
		{"AllowMany with nothing to ask", func(_ *testing.T, m *metered) {
			_, _ = m.bucket.AllowMany(ctx, nil)
		}, map[string]float64{}, 0, 0},
		{"Peek and Reset are no decisions", func(_ *testing.T, m *metered) {
			_, _ = m.bucket.Peek(ctx, marker)
			_, _ = m.bucket.Peek(ctx, "")
			_ = m.bucket.Reset(ctx, marker)
		}, map[string]float64{}, 0, 0},
		{"misuse", func(_ *testing.T, m *metered) {
			_, _ = m.bucket.Allow(ctx, "")
			_, _ = m.bucket.AllowN(ctx, marker, 0)
			_, _ = m.bucket.AllowN(ctx, marker, 11)
			_, _ = m.bucket.Allow(nil, marker) //nolint:staticcheck // a nil context is what is tried
		}, map[string]float64{"error none": 4}, 0, 0},
		{"AllowMany with one bad entry", func(_ *testing.T, m *metered) {
			_, _ = m.bucket.AllowMany(ctx, append(many(2, marker), ringfence.Request{}))
		}, map[string]float64{"error none": 3}, 0, 0},
		{"canceled and expired", func(_ *testing.T, m *metered) {
			_, _ = m.bucket.Allow(canceled, marker)
			_, _ = m.bucket.Allow(late, marker)
			_, _ = m.bucket.AllowMany(canceled, many(3, marker))
		}, map[string]float64{"canceled none": 5}, 0, 0},
		{"forced open", func(t *testing.T, m *metered) {
			for i := range 2 {
				if err := m.ForceBreaker(fmt.Sprintf("embedded-%d", i), ringfence.BreakerForcedOpen); err != nil {
					t.Fatal(err)
				}
			}
			_, _ = m.bucket.Allow(ctx, marker)
			_, _ = m.bucket.AllowMany(ctx, many(4, marker))
		}, map[string]float64{"allowed policy": 5}, 5, 5},
		{"both shards gone", func(t *testing.T, m *metered) {
			for i := range 2 {
				if err := m.shards.Kill(i); err != nil {
					t.Fatal(err)
				}
			}
			for range 10 {
				_, _ = m.bucket.Allow(ctx, marker)
			}
			_, _ = m.bucket.AllowMany(ctx, many(4, marker))
		}, map[string]float64{"allowed policy": 14}, 14, 14},
	} {
		t.Run(row.name, func(t *testing.T) {
			m := openMetered(t, 2, nil)
			row.call(t, m)
			if got := m.counts(t, "bucket"); !maps.Equal(got, row.want) {
				t.Errorf("counted %v, want %v", got, row.want)
			}
			all := m.series(t)
			for s, want := range map[string]float64{
				"ratelimiter_slo_events_total{slo_name=redis_availability}":            row.events,
				"ratelimiter_slo_events_total{slo_name=decision_latency}":              row.events + row.want["denied cache"],
				"ratelimiter_error_budget_consumed_total{slo_name=redis_availability}": row.bad,
			} {
				if all[s] != want {
					t.Errorf("%s is %v, want %v", s, all[s], want)
				}
			}
			waited, decided := 0.0, 0.0
			for s, v := range all {
				if strings.HasPrefix(s, "ratelimiter_request_latency_seconds{") {
					waited += v
				}
				if strings.HasPrefix(s, "ratelimiter_decisions_total{") {
					decided += v
				}
			}
			if waited != decided {
				t.Errorf("%v waits were observed for %v decisions", waited, decided)
			}
		})
	}
}

// catching calls caught when a charge is about to be written, and keeps it from leaving
// until released.
type catching struct {
	net.Conn
	armed    *atomic.Bool
	caught   func()
	released <-chan struct{}
}

func (c catching) Write(b []byte) (int, error) {
	if c.armed.Load() && strings.Contains(string(b), "evalsha") {
		c.caught()
		<-c.released
		return 0, io.ErrClosedPipe
	}
	return c.Conn.Write(b)
}

func TestAnEntryWhoseCallerCancelsUnderWayIsCountedExactlyOnceToo(t *testing.T) {
	for _, row := range []struct {
		name string
		call func(l *ringfence.Limiter, ctx context.Context) error
		want float64
	}{
		{"Allow", func(l *ringfence.Limiter, ctx context.Context) error {
			_, err := l.Allow(ctx, marker)
			return err
		}, 1},
		{"AllowMany", func(l *ringfence.Limiter, ctx context.Context) error {
			_, err := l.AllowMany(ctx, []ringfence.Request{{Key: marker, Cost: 1}, {Key: marker, Cost: 1}, {Key: marker, Cost: 1}})
			return err
		}, 3},
	} {
		t.Run(row.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			var armed atomic.Bool
			released := make(chan struct{})
			release := sync.OnceFunc(func() { close(released) })
			m := openMetered(t, 1, func(c *ringfence.Config) {
				c.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
					var d net.Dialer
					conn, err := d.DialContext(ctx, network, addr)
					return catching{conn, &armed, cancel, released}, err
				}
			})
			defer release()
			armed.Store(true)
			if err := row.call(m.bucket, ctx); !errors.Is(err, context.Canceled) {
				t.Fatalf("got %v, want context.Canceled", err)
			}
			if got, want := m.counts(t, "bucket"), map[string]float64{"canceled none": row.want}; !maps.Equal(got, want) {
				t.Errorf("counted %v, want %v", got, want)
			}
			if v := m.series(t)["ratelimiter_error_budget_consumed_total{slo_name=redis_availability}"]; v != 0 {
				t.Errorf("a caller's cancel cost %v of the error budget", v)
			}
		})
	}
}

// keeping remembers the collector, which is unregistered at Close.
type keeping struct {
	prometheus.Registerer
	kept prometheus.Collector
}

func (k *keeping) Register(c prometheus.Collector) error {
	k.kept = c
	return k.Registerer.Register(c)
}

func TestCallsOfAClosedRingAreCountedAsErrorsAndItsMetricsAreGone(t *testing.T) {
	var k *keeping
	m := openMetered(t, 1, func(c *ringfence.Config) {
		k = &keeping{Registerer: c.Registerer}
		c.Registerer = k
	})
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if left := m.series(t); len(left) != 0 {
		t.Errorf("%d series are left after Close", len(left))
	}
	_, err := m.bucket.Allow(t.Context(), marker)
	_, errMany := m.bucket.AllowMany(t.Context(), []ringfence.Request{{Key: marker, Cost: 1}, {Key: marker, Cost: 1}})
	if !errors.Is(err, ringfence.ErrClosed) || !errors.Is(errMany, ringfence.ErrClosed) {
		t.Fatalf("got %v and %v, want ErrClosed", err, errMany)
	}
	m.reg.MustRegister(k.kept)
	if got, want := m.counts(t, "bucket"), map[string]float64{"error none": 3}; !maps.Equal(got, want) {
		t.Errorf("counted %v, want %v", got, want)
	}
}

func TestTwoRingsOnOneRegistererNeedANameEach(t *testing.T) {
	for _, row := range []struct{ first, second, wantErr string }{
		{"", "", `Config.Name = ""`},
		{"a", "a", `Config.Name = "a"`},
		{"", "b", "Config.Name"},
		{"a", "", "Config.Name"},
		{"a", "b", ""},
	} {
		t.Run(fmt.Sprintf("%q and %q", row.first, row.second), func(t *testing.T) {
			m := openMetered(t, 1, func(c *ringfence.Config) { c.Name = row.first })
			open := func(name string) (*ringfence.Ring, error) {
				return ringfence.Open(t.Context(), ringfence.Config{Shards: m.shards.Config(), Registerer: m.reg, Name: name, Logger: noLog})
			}
			second, err := open(row.second)
			if row.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), row.wantErr) {
					t.Errorf("got %v, want an error with %s", err, row.wantErr)
				}
				if len(m.series(t)) == 0 {
					t.Error("the refusal took the first ring's metrics away")
				}
				// Once the first ring is closed, its name is free. (A registry remembers the
				// names of labels for good, so with and without Config.Name never mix.)
				if err := m.Close(); err != nil {
					t.Fatal(err)
				}
				if second, err = open(row.first); err != nil {
					t.Fatalf("after the first ring was closed: %v", err)
				}
				if err := second.Close(); err != nil {
					t.Error(err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{row.first, row.second} {
				if _, ok := m.series(t)["ratelimiter_circuit_state{ring="+name+",shard_id=embedded-0}"]; !ok {
					t.Errorf("there is no series with ring=%q", name)
				}
			}
			if err := second.Close(); err != nil {
				t.Error(err)
			}
			for s := range m.series(t) {
				if strings.Contains(s, "ring="+row.second) {
					t.Errorf("%s is left after Close", s)
				}
			}
			if _, ok := m.series(t)["ratelimiter_circuit_state{ring="+row.first+",shard_id=embedded-0}"]; !ok {
				t.Error("closing the second ring took the first one's metrics away")
			}
		})
	}
}

func TestNoKeyIsInAnyExposition(t *testing.T) {
	m := openMetered(t, 2, nil)
	m.exercise(t)
	families, err := m.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, f := range families {
		all.WriteString(f.String())
	}
	_, redisKey := m.bucket.Locate(marker)
	for _, secret := range []string{marker, redisKey} {
		if strings.Contains(all.String(), secret) {
			t.Errorf("the exposition has %q", secret)
		}
	}
	if !strings.Contains(all.String(), "bucket") {
		t.Error("the exposition has no limiter's name either: the test looks at the wrong text")
	}
}

func TestWhatTheProbesOfADeadShardMeetIsCounted(t *testing.T) {
	m := openMetered(t, 1, func(c *ringfence.Config) {
		c.Breaker = ringfence.BreakerConfig{Failures: 1, OpenPeriod: time.Millisecond, MaxOpenPeriod: time.Millisecond}
	})
	if err := m.shards.Kill(0); err != nil {
		t.Fatal(err)
	}
	if _, err := m.bucket.Allow(t.Context(), marker); err != nil {
		t.Fatal(err)
	}
	// One caller met one error; all that follow are the probes'.
	const failed = `ratelimiter_circuit_probes_total{result=failed,shard_id=embedded-0}`
	deadline := time.Now().Add(10 * time.Second)
	for {
		all := m.series(t)
		errs := 0.0
		for s, v := range all {
			if strings.HasPrefix(s, "ratelimiter_redis_errors_total{") {
				errs += v
			}
		}
		if all[failed] >= 3 && errs >= 4 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v probes failed, and %v errors were counted", all[failed], errs)
		}
	}
}
