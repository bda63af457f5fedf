package ringfence

import (
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Every metric is named in this file, and nowhere else. All label sets that a ring can
// produce exist from the start, because rate() does not see a counter's first step. A
// caller's key is never a label.

const namespace = "ratelimiter"

// outcome is the value of the label "outcome".
type outcome uint8

const (
	outcomeAllowed outcome = iota
	outcomeDenied
	outcomeError
	outcomeCanceled
	outcomes
)

var outcomeNames = [outcomes]string{"allowed", "denied", "error", "canceled"}

// fallbackMode is the value of the label "mode": which rung of the ladder answered.
type fallbackMode uint8

const (
	modeReplica fallbackMode = iota // a replica was asked just then
	modeShare                       // a share that was dealt out before
	modeOpen
	modeClosed
	modeLocal
	fallbackModes
)

var fallbackModeNames = [fallbackModes]string{"replica", "share", "open", "closed", "local"}

// The SLOs. sloObjective is the part of events that must be good.
const (
	sloAvailability = "redis_availability"
	sloLatency      = "decision_latency"
	sloObjective    = 0.999
)

// latencyBounds are fine around what Redis needs and coarse where only the order of
// magnitude matters; SLO rules read 0.0002, 0.0005, 0.001 and 0.005.
var latencyBounds = []float64{
	50e-6, 75e-6, 100e-6, 150e-6, 200e-6, 300e-6, 500e-6, 750e-6,
	1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3, 1, 2.5, 5,
}

// metrics are the metrics of one ring, and its collector. A nil *metrics keeps none.
type metrics struct {
	ring  *Ring // for what is read at scrape time; set before registration
	descs map[string]*prometheus.Desc
	vecs
	none *shardVecs // of no shard: what misuse costs

	decisions     *prometheus.CounterVec
	requested     *prometheus.CounterVec
	granted       *prometheus.CounterVec
	nearLimit     *prometheus.CounterVec
	nearHits      *prometheus.CounterVec
	capacity      *prometheus.GaugeVec
	window        *prometheus.GaugeVec
	sloEvents     *prometheus.CounterVec
	sloBad        *prometheus.CounterVec
	latencyLimit  time.Duration
	availability  [2]prometheus.Counter // events, bad
	latencyEvents [2]prometheus.Counter

	mu    sync.Mutex // guards the following
	pools map[node]poolWaits
	waits map[*shard][2]poolWaits // by role: primary, replica
}

// vecs are families of series that are collected together.
type vecs struct {
	labels prometheus.Labels
	all    []prometheus.Collector
}

// shardVecs are one shard's part of the families with the label shard_id. Every shard has
// its own, so that the series of a master of a Cluster that owns no slots any more are not
// collected, and go on from where they were should it own some again.
type shardVecs struct {
	vecs

	latency     *latencyVec
	commands    *prometheus.HistogramVec
	redisErrors *prometheus.CounterVec
	transitions *prometheus.CounterVec
	rejections  *prometheus.CounterVec
	probes      *prometheus.CounterVec
	fallbacks   *prometheus.CounterVec
	unknown     *prometheus.CounterVec
	settled     *prometheus.CounterVec
	settleLost  *prometheus.CounterVec
	batches     *prometheus.HistogramVec
	scriptLoads *prometheus.CounterVec
}

// poolWaits is what a pool has counted since it was made.
type poolWaits struct{ timeouts, seconds float64 }

// metricHelp is the list of names: what each counts.
var metricHelp = map[string]string{
	"decisions_total":                "Decisions by limit, outcome and who answered.",
	"request_latency_seconds":        "How long callers waited for a decision; shard_id is empty when no shard was concerned. Of answers from the sources cache and lease in quick succession one in 64 is timed, for all of them.",
	"redis_command_duration_seconds": "How long one script call to a shard took, whether or not its callers had waited.",
	"redis_errors_total":             "Operations and probes that failed, by kind of error.",
	"circuit_state":                  "State of the circuit breaker: 0 closed, 1 open, 2 half-open.",
	"circuit_transitions_total":      "Changes of the circuit breaker's state.",
	"circuit_rejections_total":       "Decisions that the circuit breaker kept from the shard.",
	"circuit_probes_total":           "Probes of a shard whose circuit breaker was open.",
	"fallback_decisions_total":       "Decisions the primary did not make, by who made them and why.",
	"settled_charges_total":          "Units admitted out of shares of which the shard has been told since.",
	"settle_lost_total":              "Units admitted out of shares of which nobody knows whether the shard has been told, or that it had not been told at Close.",
	"unknown_charges_total":          "Units of calls whose charge may or may not have been made.",
	"tokens_requested_total":         "Units asked for.",
	"tokens_granted_total":           "Units admitted.",
	"near_limit_total":               "Decisions of the primary after which at most 20 % of the limit was left.",
	"limit_capacity":                 "Most units a key can have left.",
	"limit_window_seconds":           "Window of the limit; for a token bucket the time to fill.",
	"batch_entries":                  "Calls carried by one operation.",
	"inflight_operations":            "Operations under way.",
	"queue_entries":                  "Calls waiting for an operation.",
	"near_cache_entries":             "Denials that are repeated without asking the primary, as long as they hold.",
	"lease_outstanding":              "Units that were taken ahead and have not been used, returned or lost, of all keys.",
	"lease_bound":                    "Most units of one key that this process takes ahead.",
	"lease_returned_total":           "Units that were taken ahead and went back unused.",
	"near_cache_hits_total":          "Calls denied without asking the primary, because it had said so.",
	"local_keys":                     "Keys counted in this process's own memory.",
	"redis_pool_connections":         "Connections by role of the server and state.",
	"redis_pool_timeouts_total":      "Times no connection was free in time.",
	"redis_pool_wait_seconds_total":  "Time spent waiting for a connection.",
	"script_loads_total":             "Times a server had to be given a script.",
	"shard_up":                       "1 if the shard's primary answered when last asked.",
	"shard_split_brain":              "1 if two servers of the shard say they are the primary and it is undecidable which is.",
	"redis_clock_offset_seconds":     "The primary's clock less this process's, half a round trip taken off.",
	"replica_lag_seconds":            "Longest time since a replica heard of its primary.",
	"ring_shards":                    "Shards by the state of their circuit breaker.",
	"ring_key_share_ratio":           "Part of the keys that the shard owns.",
	"config_mismatch":                "1 if another process uses another HashKey or ring.",
	"slo_events_total":               "Events of the SLO.",
	"error_budget_consumed_total":    "Bad events of the SLO.",
	"slo_objective_ratio":            "Part of the SLO's events that must be good.",
	"build_info":                     "Always 1; what was built.",
}

// liveMetrics are read when scraped: name and labels.
var liveMetrics = map[string][]string{
	"circuit_state":                 {"shard_id"},
	"inflight_operations":           {"shard_id"},
	"queue_entries":                 {"shard_id"},
	"local_keys":                    {},
	"near_cache_entries":            {"limit"},
	"lease_outstanding":             {"limit"},
	"lease_bound":                   {"limit"},
	"lease_returned_total":          {"limit"},
	"redis_pool_connections":        {"shard_id", "role", "state"},
	"redis_pool_timeouts_total":     {"shard_id", "role"},
	"redis_pool_wait_seconds_total": {"shard_id", "role"},
	"shard_up":                      {"shard_id"},
	"shard_split_brain":             {"shard_id"},
	"redis_clock_offset_seconds":    {"shard_id"},
	"replica_lag_seconds":           {"shard_id"},
	"ring_shards":                   {"state"},
	"ring_key_share_ratio":          {"shard_id"},
	"config_mismatch":               {"shard_id"},
	"slo_objective_ratio":           {"slo_name"},
	"build_info":                    {"version", "revision", "goversion"},
}

func newMetrics(c Config) *metrics {
	if c.Registerer == nil {
		return nil
	}
	m := &metrics{
		descs: map[string]*prometheus.Desc{}, latencyLimit: c.LatencyObjective,
		pools: map[node]poolWaits{}, waits: map[*shard][2]poolWaits{},
	}
	if c.Name != "" {
		m.labels = prometheus.Labels{"ring": c.Name}
	}
	m.none = m.newShardVecs("")
	m.decisions = m.counter("decisions_total", "limit", "outcome", "source")
	m.requested = m.counter("tokens_requested_total", "limit")
	m.granted = m.counter("tokens_granted_total", "limit")
	m.nearLimit = m.counter("near_limit_total", "limit")
	m.nearHits = m.counter("near_cache_hits_total", "limit")
	m.capacity = m.gauge("limit_capacity", "limit")
	m.window = m.gauge("limit_window_seconds", "limit")
	m.sloEvents = m.counter("slo_events_total", "slo_name")
	m.sloBad = m.counter("error_budget_consumed_total", "slo_name")
	for name, labels := range liveMetrics {
		m.descs[name] = prometheus.NewDesc(namespace+"_"+name, metricHelp[name], labels, m.labels)
	}
	m.availability = [2]prometheus.Counter{m.sloEvents.WithLabelValues(sloAvailability), m.sloBad.WithLabelValues(sloAvailability)}
	m.latencyEvents = [2]prometheus.Counter{m.sloEvents.WithLabelValues(sloLatency), m.sloBad.WithLabelValues(sloLatency)}
	return m
}

func (m *metrics) newShardVecs(shard string) *shardVecs {
	v := &shardVecs{vecs: vecs{labels: m.labels}}
	v.latency = newLatencyVec(shard, m.labels)
	v.all = append(v.all, v.latency)
	v.commands = v.histogram("redis_command_duration_seconds", latencyBounds, "shard_id", "command")
	v.redisErrors = v.counter("redis_errors_total", "shard_id", "error_type")
	v.transitions = v.counter("circuit_transitions_total", "shard_id", "from", "to")
	v.rejections = v.counter("circuit_rejections_total", "shard_id")
	v.probes = v.counter("circuit_probes_total", "shard_id", "result")
	v.fallbacks = v.counter("fallback_decisions_total", "shard_id", "mode", "reason")
	v.unknown = v.counter("unknown_charges_total", "shard_id")
	v.settled = v.counter("settled_charges_total", "shard_id")
	v.settleLost = v.counter("settle_lost_total", "shard_id")
	v.batches = v.histogram("batch_entries", []float64{1, 2, 4, 8, 16, 32, 64, 128, 256}, "shard_id")
	v.scriptLoads = v.counter("script_loads_total", "shard_id")
	return v
}

func (f *vecs) counter(name string, labels ...string) *prometheus.CounterVec {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: namespace, Name: name, Help: metricHelp[name], ConstLabels: f.labels}, labels)
	f.all = append(f.all, v)
	return v
}

func (f *vecs) gauge(name string, labels ...string) *prometheus.GaugeVec {
	v := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: name, Help: metricHelp[name], ConstLabels: f.labels}, labels)
	f.all = append(f.all, v)
	return v
}

func (f *vecs) histogram(name string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	v := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: namespace, Name: name, Help: metricHelp[name], ConstLabels: f.labels, Buckets: buckets,
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 160,
	}, labels)
	f.all = append(f.all, v)
	return v
}

// register puts the ring's metrics on its Registerer, all or none.
func (m *metrics) register(r prometheus.Registerer) error {
	err := r.Register(m)
	var taken prometheus.AlreadyRegisteredError
	if errors.As(err, &taken) {
		return invalid("Config.Name", m.labels["ring"], "another ring with this name has its metrics on the same Registerer; give each ring a Name of its own")
	}
	if err != nil {
		return fmt.Errorf("ringfence: Config.Registerer refused the metrics (two rings on one Registerer need a Config.Name each): %w", err)
	}
	return nil
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range slices.Concat(m.all, m.none.all) {
		c.Describe(ch)
	}
	for _, d := range m.descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	shards, limiters := m.ring.all(), m.ring.allLimiters()
	for _, s := range shards {
		m.gatherShard(s.metrics)
	}
	for _, l := range limiters {
		m.gatherLimiter(l.metrics)
	}
	parts := [][]prometheus.Collector{m.all, m.none.all}
	for _, s := range shards {
		parts = append(parts, s.metrics.all)
	}
	for _, c := range slices.Concat(parts...) {
		c.Collect(ch)
	}
	emit := func(name string, kind prometheus.ValueType, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(m.descs[name], kind, v, labels...)
	}
	gauge := func(name string, v float64, labels ...string) { emit(name, prometheus.GaugeValue, v, labels...) }
	var states [3]int
	for _, s := range shards {
		state := s.breaker.stats().State
		states[state]++
		gauge("circuit_state", float64(state), s.id)
		gauge("inflight_operations", float64(s.charges.inFlight()), s.id)
		gauge("queue_entries", float64(s.charges.waiting.Load()), s.id)
		gauge("ring_key_share_ratio", m.ring.share(s), s.id)
		s.mu.Lock()
		up, split, offset, lag, mismatch := s.up, s.splitView, s.offset, s.lag, s.mismatch
		s.mu.Unlock()
		gauge("shard_up", number(up), s.id)
		gauge("shard_split_brain", number(split), s.id)
		gauge("redis_clock_offset_seconds", offset.Seconds(), s.id)
		gauge("replica_lag_seconds", lag.Seconds(), s.id)
		gauge("config_mismatch", number(mismatch), s.id)
		m.collectPools(s, emit)
	}
	for state, n := range states {
		gauge("ring_shards", float64(n), BreakerState(state).String())
	}
	gauge("local_keys", float64(m.ring.local.len()))
	now := m.ring.clock()
	denials, held := m.ring.near.count(now), m.ring.leases.outstanding(now)
	for _, l := range limiters {
		gauge("near_cache_entries", float64(denials[l.rule]), l.name)
		if l.lease != nil {
			gauge("lease_outstanding", float64(held[l.lease]), l.name)
			gauge("lease_bound", float64(l.lease.bound), l.name)
			emit("lease_returned_total", prometheus.CounterValue, float64(l.lease.returned.Load()), l.name)
		}
	}
	gauge("slo_objective_ratio", sloObjective, sloAvailability)
	gauge("slo_objective_ratio", sloObjective, sloLatency)
	version, revision := buildVersion()
	gauge("build_info", 1, version, revision, runtime.Version())
}

func (m *metrics) collectPools(s *shard, emit func(name string, kind prometheus.ValueType, v float64, labels ...string)) {
	// What a pool counted since the last scrape goes to the role its server has now. The
	// sums over the servers of a role would fall at a failover, and rate() would take that
	// for a restart and count everything once more.
	m.mu.Lock()
	defer m.mu.Unlock()
	waits := m.waits[s]
	var idle, used [2]float64
	roles := [2]string{"primary", "replica"}
	primary := int(s.primary.Load())
	for i, n := range s.nodes {
		role := 1
		if i == primary {
			role = 0
		}
		p := n.pool()
		idle[role] += float64(p.IdleConns)
		used[role] += float64(p.TotalConns) - float64(p.IdleConns)
		now := poolWaits{float64(p.Timeouts), float64(p.WaitDurationNs) / 1e9}
		before := m.pools[n]
		m.pools[n] = now
		waits[role].timeouts += now.timeouts - before.timeouts
		waits[role].seconds += now.seconds - before.seconds
	}
	m.waits[s] = waits
	for role, name := range roles {
		emit("redis_pool_connections", prometheus.GaugeValue, idle[role], s.id, name, "idle")
		emit("redis_pool_connections", prometheus.GaugeValue, max(0, used[role]), s.id, name, "used")
		emit("redis_pool_timeouts_total", prometheus.CounterValue, waits[role].timeouts, s.id, name)
		emit("redis_pool_wait_seconds_total", prometheus.CounterValue, waits[role].seconds, s.id, name)
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// buildVersion is the version of this module and the revision of the main one.
func buildVersion() (version, revision string) {
	version, revision = "unknown", "unknown"
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return version, revision
	}
	const module = "github.com/ringfence/ringfence"
	if info.Main.Path == module {
		version = info.Main.Version
	}
	for _, d := range info.Deps {
		if d.Path == module {
			version = d.Version
		}
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			revision = s.Value
		}
	}
	return version, revision
}

// shardMetrics are the metrics of one shard, bound to its label. A nil one keeps none.
type shardMetrics struct {
	all         []prometheus.Collector
	latency     *[outcomes]*latencies
	here        []shardTally
	commands    [2]prometheus.Observer // charge, look
	errors      map[*errorType]prometheus.Counter
	transitions [3][3]prometheus.Counter
	rejections  prometheus.Counter
	probes      [2]prometheus.Counter // ok, failed
	fallbacks   [fallbackModes][CauseCorrupt + 1]prometheus.Counter
	unknown     prometheus.Counter
	paid        prometheus.Counter // settled_charges_total
	unpaid      prometheus.Counter // settle_lost_total
	batches     prometheus.Observer
	loads       prometheus.Counter
}

func (m *metrics) forShard(id string) *shardMetrics {
	if m == nil {
		return nil
	}
	v := m.newShardVecs(id)
	s := &shardMetrics{
		all:        v.all,
		latency:    &v.latency.of,
		here:       newShardTallies(stripeCount()),
		commands:   [2]prometheus.Observer{v.commands.WithLabelValues(id, "charge"), v.commands.WithLabelValues(id, "look")},
		errors:     map[*errorType]prometheus.Counter{},
		rejections: v.rejections.WithLabelValues(id),
		probes:     [2]prometheus.Counter{v.probes.WithLabelValues(id, "ok"), v.probes.WithLabelValues(id, "failed")},
		unknown:    v.unknown.WithLabelValues(id),
		paid:       v.settled.WithLabelValues(id),
		unpaid:     v.settleLost.WithLabelValues(id),
		batches:    v.batches.WithLabelValues(id),
		loads:      v.scriptLoads.WithLabelValues(id),
	}
	for _, t := range append([]*errorType{typeBroken}, errorTypes...) {
		s.errors[t] = v.redisErrors.WithLabelValues(id, t.name)
	}
	for from := BreakerClosed; from <= BreakerHalfOpen; from++ {
		for to := BreakerClosed; to <= BreakerHalfOpen; to++ {
			if from != to {
				s.transitions[from][to] = v.transitions.WithLabelValues(id, from.String(), to.String())
			}
		}
	}
	for mode := range fallbackModes {
		for cause := CauseBreaker; cause <= CauseCorrupt; cause++ {
			s.fallbacks[mode][cause] = v.fallbacks.WithLabelValues(id, fallbackModeNames[mode], cause.String())
		}
	}
	return s
}

func (s *shardMetrics) operation(kind opKind, entries int, took time.Duration, err error) {
	if s == nil {
		return
	}
	switch kind {
	case opCharge:
		s.commands[0].Observe(took.Seconds())
		s.batches.Observe(float64(entries))
	case opLook:
		s.commands[1].Observe(took.Seconds())
	}
	if err != nil {
		s.errors[classify(err)].Inc()
	}
}

func (s *shardMetrics) wrongType() {
	if s != nil {
		s.errors[typeWrongType].Inc()
	}
}

func (s *shardMetrics) scriptLoaded() {
	if s != nil {
		s.loads.Inc()
	}
}

func (s *shardMetrics) unknownCharge(units int64) {
	if s != nil {
		s.unknown.Add(float64(units))
	}
}

func (s *shardMetrics) settled(units int64) {
	if s != nil {
		s.paid.Add(float64(units))
	}
}

func (s *shardMetrics) settleLost(units int64) {
	if s != nil {
		s.unpaid.Add(float64(units))
	}
}

func (s *shardMetrics) transition(from, to BreakerState) {
	if s != nil {
		s.transitions[from][to].Inc()
	}
}

func (s *shardMetrics) probed(err error) {
	switch {
	case s == nil:
	case err == nil:
		s.probes[0].Inc()
	case errors.Is(err, errNotPrimary):
		s.probes[1].Inc()
		s.errors[typeReadonly].Inc()
	default:
		s.probes[1].Inc()
		s.errors[classify(err)].Inc()
	}
}

func (s *shardMetrics) fellBack(mode fallbackMode, cause Cause) {
	if s == nil {
		return
	}
	s.fallbacks[mode][cause].Inc()
	if cause == CauseBreaker {
		s.rejections.Inc()
	}
}

// limiterMetrics are the metrics of one limiter, bound to its label. A nil one keeps
// none.
type limiterMetrics struct {
	m         *metrics
	here      []limiterTally
	decisions [outcomes][SourceCache + 1]prometheus.Counter
	requested prometheus.Counter
	granted   prometheus.Counter
	nearLimit prometheus.Counter
	nearHits  prometheus.Counter
}

func (m *metrics) forLimiter(name string, r *rule) *limiterMetrics {
	if m == nil {
		return nil
	}
	l := &limiterMetrics{
		m:         m,
		here:      make([]limiterTally, stripeCount()),
		requested: m.requested.WithLabelValues(name),
		granted:   m.granted.WithLabelValues(name),
		nearLimit: m.nearLimit.WithLabelValues(name),
		nearHits:  m.nearHits.WithLabelValues(name),
	}
	for source := SourcePrimary; source <= SourceCache; source++ {
		for _, o := range []outcome{outcomeAllowed, outcomeDenied} {
			l.decisions[o][source] = m.decisions.WithLabelValues(name, outcomeNames[o], source.String())
		}
	}
	for _, o := range []outcome{outcomeError, outcomeCanceled} {
		l.decisions[o][SourceNone] = m.decisions.WithLabelValues(name, outcomeNames[o], SourceNone.String())
	}
	m.capacity.WithLabelValues(name).Set(float64(r.capacity))
	m.window.WithLabelValues(name).Set((time.Duration(r.window) * time.Microsecond).Seconds())
	return l
}

// decided counts one entry of a call that was answered.
func (l *limiterMetrics) decided(s *shard, d *Decision, cost int64, took time.Duration) {
	if l == nil {
		return
	}
	o := outcomeDenied
	if d.Allowed {
		o = outcomeAllowed
		l.granted.Add(float64(cost))
	}
	l.requested.Add(float64(cost))
	l.decisions[o][d.Source].Inc()
	s.metrics.latency[o].add(took, 1)
	if d.Source == SourceCache {
		l.nearHits.Inc()
	}
	if d.Source != SourceLease && d.Source != SourceCache { // those needed no Redis
		l.m.availability[0].Inc()
		if d.Source != SourcePrimary {
			l.m.availability[1].Inc()
		}
	}
	if d.Source == SourcePrimary && d.Remaining*5 <= d.Limit {
		l.nearLimit.Inc()
	}
	l.m.latencyEvents[0].Inc()
	if took > l.m.latencyLimit {
		l.m.latencyEvents[1].Inc()
	}
}

// ended counts entries of a call that got no decision.
func (l *limiterMetrics) ended(s *shard, o outcome, entries int, took time.Duration) {
	if l == nil {
		return
	}
	l.decisions[o][SourceNone].Add(float64(entries))
	latency := l.m.none.latency.of[o]
	if s != nil {
		latency = s.metrics.latency[o]
	}
	latency.add(took, int64(entries))
}
