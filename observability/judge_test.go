package observability_test

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/annotations"
)

// The judge evaluates rules as Prometheus 3 does, with its parser and its engine, over
// series that are held in memory; only "pending, then firing after for" is written here.
// It is quick enough to judge hundreds of mutants. The same cases are given to the
// promtool of Debian (Prometheus 2.42) as files, so that this code has a second opinion.

// memory is a storage.Queryable over a few series.
type memory struct {
	byName map[string][]*memorySeries
	byKey  map[uint64]*memorySeries
}

type memorySeries struct {
	labels  labels.Labels
	samples []chunks.Sample
}

type memorySample struct {
	t int64
	v float64
}

func (s memorySample) T() int64                      { return s.t }
func (s memorySample) ST() int64                     { return 0 }
func (s memorySample) F() float64                    { return s.v }
func (s memorySample) H() *histogram.Histogram       { return nil }
func (s memorySample) FH() *histogram.FloatHistogram { return nil }
func (s memorySample) Type() chunkenc.ValueType      { return chunkenc.ValFloat }
func (s memorySample) Copy() chunks.Sample           { return s }

func newMemory() *memory {
	return &memory{byName: map[string][]*memorySeries{}, byKey: map[uint64]*memorySeries{}}
}

func (m *memory) add(l labels.Labels, at time.Time, v float64) {
	key := l.Hash()
	s := m.byKey[key]
	if s == nil {
		s = &memorySeries{labels: l}
		m.byKey[key] = s
		m.byName[l.Get(nameLabel)] = append(m.byName[l.Get(nameLabel)], s)
	}
	s.samples = append(s.samples, memorySample{at.UnixMilli(), v})
}

// Querier implements storage.Queryable.
func (m *memory) Querier(mint, maxt int64) (storage.Querier, error) {
	return memoryQuerier{m, mint, maxt}, nil
}

type memoryQuerier struct {
	m          *memory
	mint, maxt int64
}

func (memoryQuerier) LabelValues(context.Context, string, *storage.LabelHints, ...*labels.Matcher) ([]string, annotations.Annotations, error) {
	return nil, nil, nil
}

func (memoryQuerier) LabelNames(context.Context, *storage.LabelHints, ...*labels.Matcher) ([]string, annotations.Annotations, error) {
	return nil, nil, nil
}

func (memoryQuerier) Close() error { return nil }

func (q memoryQuerier) Select(_ context.Context, _ bool, _ *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
	var from []*memorySeries
	for _, m := range matchers {
		if m.Name == nameLabel && m.Type == labels.MatchEqual {
			from = q.m.byName[m.Value]
		}
	}
	set := &memorySet{at: -1}
next:
	for _, s := range from {
		for _, m := range matchers {
			if !m.Matches(s.labels.Get(m.Name)) {
				continue next
			}
		}
		first := sort.Search(len(s.samples), func(i int) bool { return s.samples[i].T() >= q.mint })
		last := sort.Search(len(s.samples), func(i int) bool { return s.samples[i].T() > q.maxt })
		if first < last {
			set.series = append(set.series, storage.NewListSeries(s.labels, s.samples[first:last]))
		}
	}
	slices.SortFunc(set.series, func(a, b storage.Series) int { return labels.Compare(a.Labels(), b.Labels()) })
	return set
}

type memorySet struct {
	series []storage.Series
	at     int
}

func (s *memorySet) Next() bool                      { s.at++; return s.at < len(s.series) }
func (s *memorySet) At() storage.Series              { return s.series[s.at] }
func (*memorySet) Err() error                        { return nil }
func (*memorySet) Warnings() annotations.Annotations { return nil }

// promQL is the language as a plain Prometheus 3 has it, nothing experimental.
var promQL = parser.NewParser(parser.Options{})

var engine = promql.NewEngine(promql.EngineOpts{
	MaxSamples: 10_000_000, Timeout: time.Minute, LookbackDelta: 5 * time.Minute, Parser: promQL,
	EnableAtModifier: true, EnableNegativeOffset: true,
})

// ask evaluates a query at one moment.
func (m *memory) ask(expr string, at time.Time) (promql.Vector, error) {
	q, err := engine.NewInstantQuery(context.Background(), m, nil, expr, at)
	if err != nil {
		return nil, err
	}
	defer q.Close()
	r := q.Exec(context.Background())
	if r.Err != nil {
		return nil, fmt.Errorf("%s: %w", expr, r.Err)
	}
	switch v := r.Value.(type) {
	case promql.Vector:
		return slices.Clone(v), nil
	case promql.Scalar:
		return promql.Vector{{F: v.V}}, nil
	}
	return nil, fmt.Errorf("%s: a %s", expr, r.Value.Type())
}

// judged is a rule while it is evaluated.
type judged struct {
	rulefmt.Rule
	pending map[string]time.Time
	wrote   map[string]labels.Labels
}

// evaluate evaluates the rules once, in the order of the file.
func (m *memory) evaluate(rules []*judged, at time.Time) error {
	for _, r := range rules {
		result, err := m.ask(r.Expr, at)
		if err != nil {
			return err
		}
		wrote := map[string]labels.Labels{}
		pending := map[string]time.Time{}
		write := func(l labels.Labels, v float64) {
			wrote[l.String()] = l
			m.add(l, at, v)
		}
		for _, s := range result {
			b := labels.NewBuilder(s.Metric)
			for name, v := range r.Labels {
				b.Set(name, v)
			}
			if r.Record != "" {
				write(b.Set(nameLabel, r.Record).Labels(), s.F)
				continue
			}
			l := b.Set(nameLabel, "ALERTS").Set("alertname", r.Alert).Labels()
			since, was := r.pending[l.String()]
			if !was {
				since = at
			}
			pending[l.String()] = since
			state := "pending"
			if at.Sub(since) >= time.Duration(r.For) {
				state = "firing"
			}
			write(labels.NewBuilder(l).Set("alertstate", state).Labels(), 1)
		}
		for _, key := range slices.Sorted(maps.Keys(r.wrote)) {
			if _, still := wrote[key]; !still {
				m.add(r.wrote[key], at, math.Float64frombits(value.StaleNaN))
			}
		}
		r.wrote, r.pending = wrote, pending
	}
	return nil
}

func parseRules(text string) ([]*judged, error) {
	groups, errs := rulefmt.Parse([]byte(text), false, model.UTF8Validation, promQL, slog.New(slog.DiscardHandler))
	if len(errs) > 0 {
		return nil, errs[0]
	}
	var all []*judged
	for _, g := range groups.Groups {
		for _, r := range g.Rules {
			all = append(all, &judged{Rule: r})
		}
	}
	return all, nil
}

// parsed are the series of the cases: each text is parsed once, not for every mutant.
var parsed sync.Map

func parseSeries(name, values string) (labels.Labels, []parser.SequenceValue, error) {
	type result struct {
		l labels.Labels
		v []parser.SequenceValue
	}
	key := name + " " + values
	if r, ok := parsed.Load(key); ok {
		return r.(result).l, r.(result).v, nil
	}
	l, v, err := promQL.ParseSeriesDesc(key)
	if err == nil {
		parsed.Store(key, result{l, v})
	}
	return l, v, err
}

// play plays a case. It says what is not as it must be.
func (c ruleCase) play(text string) (said []string, err error) {
	rules, err := parseRules(text)
	if err != nil {
		return nil, err
	}
	start := time.Unix(0, 0).UTC()
	step := time.Duration(c.step) * time.Minute
	m := newMemory()
	for name, values := range c.series {
		l, samples, err := parseSeries(name, values)
		if err != nil {
			return nil, err
		}
		for i, s := range samples {
			if !s.Omitted {
				m.add(l, start.Add(time.Duration(i)*step), s.Value)
			}
		}
	}
	last := 0
	for _, k := range c.checks {
		last = max(last, k.at)
	}
	for i := 0; i <= last; i++ {
		at := start.Add(time.Duration(i) * step)
		if err := m.evaluate(rules, at); err != nil {
			return nil, err
		}
		for _, k := range c.checks {
			if k.at != i {
				continue
			}
			got, err := m.ask(k.query(), at)
			if err != nil {
				return nil, err
			}
			if a, b := asText(got), wantText(k.want); a != b {
				said = append(said, fmt.Sprintf("%s, step %d (%s):\n\tfires %s\n\twant  %s", c.name, i, at.Sub(start), a, b))
			}
		}
		if len(said) > 0 {
			return said, nil
		}
	}
	return nil, nil
}

func asText(v promql.Vector) string {
	var all []string
	for _, s := range v {
		all = append(all, s.Metric.String())
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

func wantText(want []string) string {
	var all []string
	for _, w := range want {
		l, err := promQL.ParseMetric(w)
		if err != nil {
			panic(err)
		}
		all = append(all, l.String())
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// query counts the alerts that a check looks at.
func (k ruleCheck) query() string {
	return fmt.Sprintf(`count by (%s) (ALERTS{alertstate="firing",%s})`, k.by, k.of)
}
