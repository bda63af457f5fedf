package observability_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/embedded"
	"github.com/ringfence/ringfence/internal/redistest"
)

// metric is what a limiter exports under one name.
type metric struct {
	kind   string                     // COUNTER, GAUGE, HISTOGRAM
	values map[string]map[string]bool // by label, the values that were seen
}

// catalog is every name that a query may use, series names of histograms included.
type catalog map[string]metric

// exported is the catalog of a limiter that has been through everything that can be had
// without a server: it is gathered, never written down, so it cannot be out of date.
func exported(t testing.TB) catalog {
	t.Helper()
	redistest.NoLeaks(t)
	c, err := gatherOnce()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("embedded redis: gathered from shards of that kind")
	all := maps.Clone(c)
	maps.Copy(all, foreign)
	return all
}

var gatherOnce = sync.OnceValues(gather)

func gather() (catalog, error) {
	shards, err := embedded.Start(2)
	if err != nil {
		return nil, err
	}
	defer shards.Close()
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	ctx := context.Background()
	ring, err := ringfence.Open(ctx, ringfence.Config{
		Shards: shards.Config(), Registerer: reg, Name: "main", Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Budget: 2 * time.Second, OperationTimeout: 2 * time.Second,
	})
	if err != nil {
		return nil, err
	}
	defer ring.Close()
	api, err := ring.Limiter("api", ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 5})
	if err != nil {
		return nil, err
	}
	busy, err := ring.Limiter("busy", ringfence.TokenBucket{Rate: 1, Per: time.Second, Burst: 1000}, ringfence.WithLease(ringfence.Lease{Max: 50}))
	if err != nil {
		return nil, err
	}
	for range 20 {
		if _, err := busy.Allow(ctx, "user"); err != nil {
			return nil, err
		}
	}
	for round := range 2 {
		// Other keys each time: denials are repeated without asking a shard, dead or alive.
		for i := range 160 {
			if _, err := api.Allow(ctx, fmt.Sprint("user:", round, ":", i%20)); err != nil {
				return nil, err
			}
		}
		if _, err := api.Allow(ctx, ""); !errors.Is(err, ringfence.ErrInvalid) {
			return nil, fmt.Errorf("an empty key: %w", err)
		}
		if err := shards.Kill(0); err != nil {
			return nil, err
		}
	}
	families, err := reg.Gather()
	if err != nil {
		return nil, err
	}
	if fellBack := total(families, "ratelimiter_fallback_decisions_total"); fellBack == 0 {
		return nil, errors.New("a shard was killed, and nothing fell back: the limiter was not exercised")
	}
	if leased := total(families, "ratelimiter_decisions_total", "source", "lease"); leased == 0 {
		return nil, errors.New("20 calls of one key, and none was answered out of a lease: leases were not exercised")
	}
	c := catalog{}
	for _, f := range families {
		m := metric{f.GetType().String(), map[string]map[string]bool{}}
		for _, x := range f.GetMetric() {
			for _, l := range x.GetLabel() {
				if m.values[l.GetName()] == nil {
					m.values[l.GetName()] = map[string]bool{}
				}
				m.values[l.GetName()][l.GetValue()] = true
			}
		}
		if m.kind == "SUMMARY" {
			quantiles := metric{m.kind, maps.Clone(m.values)}
			quantiles.values["quantile"] = map[string]bool{}
			for _, q := range f.GetMetric()[0].GetSummary().GetQuantile() {
				quantiles.values["quantile"][fmt.Sprint(q.GetQuantile())] = true
			}
			c[f.GetName()] = quantiles
			continue
		}
		if m.kind != "HISTOGRAM" {
			c[f.GetName()] = m
			continue
		}
		c[f.GetName()+"_count"], c[f.GetName()+"_sum"] = m, m
		bucket := metric{m.kind, maps.Clone(m.values)}
		bucket.values["le"] = map[string]bool{"+Inf": true}
		for _, b := range f.GetMetric()[0].GetHistogram().GetBucket() {
			bucket.values["le"][fmt.Sprint(b.GetUpperBound())] = true
		}
		c[f.GetName()+"_bucket"] = bucket
	}
	return c, nil
}

// total is the sum of all series of a counter, or of those with a label of that value.
func total(families []*dto.MetricFamily, name string, label ...string) (sum float64) {
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if len(label) == 0 || slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool { return l.GetName() == label[0] && l.GetValue() == label[1] }) {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

// series describes a metric that is not gathered: its kind and labels.
func series(kind string, labels ...string) metric {
	m := metric{kind, map[string]map[string]bool{}}
	for _, l := range labels {
		m.values[l] = map[string]bool{}
	}
	return m
}

// foreign are metrics of others that a dashboard may ask for: of redis_exporter, whose
// targets must have been given a label shard_id, and what Prometheus makes itself.
var foreign = catalog{
	"redis_cpu_user_seconds_total": series("COUNTER", "shard_id"),
	"redis_cpu_sys_seconds_total":  series("COUNTER", "shard_id"),
	"redis_memory_used_bytes":      series("GAUGE", "shard_id"),
	"redis_memory_max_bytes":       series("GAUGE", "shard_id"),
	"redis_slowlog_last_id":        series("GAUGE", "shard_id"),
	"up":                           series("GAUGE"),
	"ALERTS": {"GAUGE", map[string]map[string]bool{
		"alertname": {"Ringfence.+": true}, "alertstate": {"firing": true}, "severity": {"page": true, "ticket": true},
		"shard_id": {}, "limit": {}, "slo_name": {}}},
}

// nameLabel is the label that holds a series's name.
const nameLabel = "__name__"

// ofTargets are the labels that Prometheus adds to what it scrapes.
var ofTargets = []string{"job", "instance"}

// chosen are labels whose values users choose; all others have closed sets.
var chosen = []string{"job", "instance", "shard_id", "limit", "ring", "version", "revision", "goversion"}

func parse(t testing.TB, expr string) parser.Expr {
	t.Helper()
	e, err := promQL.ParseExpr(expr)
	if err != nil {
		t.Errorf("%s\n\tdoes not parse: %v", expr, err)
		return nil
	}
	return e
}

// check says what is wrong with a query, given what is exported.
func (c catalog) check(e parser.Expr) (bad []string) {
	say := func(format string, args ...any) { bad = append(bad, fmt.Sprintf(format, args...)) }
	parser.Inspect(e, func(n parser.Node, _ []parser.Node) error {
		switch n := n.(type) {
		case *parser.VectorSelector:
			m, ok := c[n.Name]
			if !ok {
				say("%q is not exported", n.Name)
				return nil
			}
			for _, match := range n.LabelMatchers {
				if match.Name == nameLabel || slices.Contains(ofTargets, match.Name) {
					continue
				}
				seen, ok := m.values[match.Name]
				if !ok {
					say("%s has no label %q", n.Name, match.Name)
					continue
				}
				if slices.Contains(chosen, match.Name) {
					continue
				}
				wanted := []string{match.Value}
				if match.Type == labels.MatchRegexp || match.Type == labels.MatchNotRegexp {
					wanted = strings.Split(match.Value, "|")
				}
				for _, v := range wanted {
					if !seen[v] {
						say("%s is never exported with %s=%q", n.Name, match.Name, v)
					}
				}
			}
		case *parser.AggregateExpr:
			has := c.labels(n.Expr)
			for _, g := range n.Grouping {
				if !slices.Contains(has, g) {
					say("%s groups by %q, which %s does not have", n.Op, g, n.Expr)
				}
			}
		case *parser.BinaryExpr:
			if n.VectorMatching == nil || !n.VectorMatching.On {
				break
			}
			for _, g := range n.VectorMatching.MatchingLabels {
				if !slices.Contains(c.labels(n.LHS), g) || !slices.Contains(c.labels(n.RHS), g) {
					say("on (%s): a side has no such label", g)
				}
			}
		case *parser.Call:
			counts := n.Func.Name == "rate" || n.Func.Name == "increase"
			if !counts {
				break
			}
			sel := parser.ExtractSelectors(n)
			if len(sel) != 1 {
				say("%s of %d selectors", n.Func.Name, len(sel))
				break
			}
			for _, match := range sel[0] {
				if m, ok := c[match.Value]; match.Name == nameLabel && ok && m.kind == "GAUGE" {
					say("%s of the gauge %s", n.Func.Name, match.Value)
				}
			}
		}
		return nil
	})
	return bad
}

// labels are those that the series of a result have.
func (c catalog) labels(e parser.Expr) []string {
	switch e := e.(type) {
	case *parser.VectorSelector:
		return append(slices.Collect(maps.Keys(c[e.Name].values)), ofTargets...)
	case *parser.MatrixSelector:
		return c.labels(e.VectorSelector)
	case *parser.ParenExpr:
		return c.labels(e.Expr)
	case *parser.StepInvariantExpr:
		return c.labels(e.Expr)
	case *parser.AggregateExpr:
		if e.Without {
			return slices.DeleteFunc(c.labels(e.Expr), func(l string) bool { return slices.Contains(e.Grouping, l) })
		}
		if e.Op == parser.TOPK || e.Op == parser.BOTTOMK {
			return c.labels(e.Expr)
		}
		return e.Grouping
	case *parser.BinaryExpr:
		if l := c.labels(e.LHS); len(l) > 0 {
			return l
		}
		return c.labels(e.RHS)
	case *parser.Call:
		for _, a := range e.Args {
			if l := c.labels(a); len(l) > 0 && a.Type() != parser.ValueTypeScalar {
				if e.Func.Name == "histogram_quantile" {
					l = slices.DeleteFunc(slices.Clone(l), func(l string) bool { return l == "le" })
				}
				return l
			}
		}
	}
	return nil
}

func TestAQueryThatAsksForWhatIsNotExportedIsCaught(t *testing.T) {
	c := exported(t)
	for expr, want := range map[string]string{
		`ratelimiter_circuit_state`:                                         "",
		`rate(ratelimiter_request_latency_seconds_bucket{le="0.005"}[5m])`:  "",
		`sum by (job, ring) (ratelimiter_circuit_state)`:                    "",
		`ratelimiter_circuit_status`:                                        "not exported",
		`ratelimiter_circuit_state{shard="a"}`:                              `no label "shard"`,
		`ratelimiter_decisions_total{outcome="rejected"}`:                   `outcome="rejected"`,
		`ratelimiter_decisions_total{outcome=~"allowed|refused"}`:           `outcome="refused"`,
		`rate(ratelimiter_request_latency_seconds_bucket{le="0.004"}[5m])`:  `le="0.004"`,
		`sum by (shard_id) (ratelimiter_decisions_total)`:                   `groups by "shard_id"`,
		`rate(ratelimiter_circuit_state[5m])`:                               "gauge",
		`ratelimiter_circuit_state / on (limit) ratelimiter_limit_capacity`: "on (limit)",
	} {
		got := strings.Join(c.check(parse(t, expr)), "; ")
		if (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", expr, got, want)
		}
	}
}

// interpolate puts values in place of Grafana's variables.
func interpolate(expr string, values map[string]string) string {
	return variable.ReplaceAllStringFunc(expr, func(v string) string {
		if to, ok := values[strings.Trim(v, "${}")]; ok {
			return to
		}
		return v
	})
}

var variable = regexp.MustCompile(`\$\w+|\$\{\w+\}`)

// everything chooses all jobs, instances and shards.
var everything = map[string]string{"job": ".+", "instance": ".+", "shard_id": ".+", "limit": ".+", "__rate_interval": "2m"}
