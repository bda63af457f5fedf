package observability_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"go.yaml.in/yaml/v3"
)

// A case is written as it happens: what is counted each minute (or five), and which
// alerts fire when. They are turned into promtool's own files, so that what judges is
// what runs at users'. A case in which something must stay silent has a twin beside it in
// which the same thing is loud: a rule that is never loaded is silent, too.
type ruleCase struct {
	name   string
	slice  string // the rules it is about, see rulesInParts
	step   int    // minutes between samples
	series map[string]string
	checks []ruleCheck
}

// ruleCheck: at step at, the alerts that fire are exactly these.
type ruleCheck struct {
	at   int
	of   string // matchers that choose the alerts looked at
	by   string // labels looked at
	want []string
}

// alertsFile is promtool's format of a test.
type alertsFile struct {
	RuleFiles          []string     `yaml:"rule_files"`
	EvaluationInterval string       `yaml:"evaluation_interval"`
	GroupEvalOrder     []string     `yaml:"group_eval_order"`
	Tests              []alertsTest `yaml:"tests"`
}

type alertsTest struct {
	Name     string         `yaml:"name"`
	Interval string         `yaml:"interval"`
	Series   []alertsSeries `yaml:"input_series"`
	Checks   []alertsCheck  `yaml:"promql_expr_test"`
}

type alertsSeries struct {
	Series string `yaml:"series"`
	Values string `yaml:"values"`
}

type alertsCheck struct {
	Expr    string         `yaml:"expr"`
	At      string         `yaml:"eval_time"`
	Samples []alertsSample `yaml:"exp_samples"`
}

type alertsSample struct {
	Labels string  `yaml:"labels"`
	Value  float64 `yaml:"value"`
}

// counter is what a counter shows over n steps that add add(i) in step i.
func counter(n int, add func(i int) float64) string {
	var b strings.Builder
	total := 0.0
	for i := range n {
		if i > 0 {
			total += add(i)
		}
		b.WriteString(strconv.FormatFloat(total, 'f', -1, 64) + " ")
	}
	return b.String()
}

// same is a gauge, or a counter's step, that stays.
func same(v float64) func(int) float64 { return func(int) float64 { return v } }

func constant(n int, v float64) string { return fmt.Sprintf("%gx%d", v, n-1) }

const objective = 0.999

// perStep is the traffic of a busy service in one step.
const perStep = 100_000

// slo are the three series of an SLO in one process. burn says how many times too fast
// the budget is spent in step i.
func slo(into map[string]string, labels, name string, n int, events float64, burn func(i int) float64) {
	l := `{` + labels + `,slo_name="` + name + `"}`
	into["ratelimiter_slo_events_total"+l] = counter(n, same(events))
	into["ratelimiter_error_budget_consumed_total"+l] = counter(n, func(i int) float64 { return events * (1 - objective) * burn(i) })
	into["ratelimiter_slo_objective_ratio"+l] = constant(n, objective)
}

const one = `job="svc",instance="a"`

// window is one of the four burn alerts in the steps of its cases: small enough for the
// short window to hold several samples, large enough for a case to be judged in no time.
type window struct {
	long          string
	step          int // minutes
	longN, shortN int // steps in the windows
	threshold     float64
	forN          int    // steps in for
	apart         int    // steps, fewer than shortN and more than forN
	labels        string // what the alert says besides job, ring and slo_name
}

var windows = []window{
	{"1h", 1, 60, 5, 14.4, 2, 4, `severity="page", long="1h", short="5m", exhaustion="2 days"`},
	{"6h", 5, 72, 6, 6, 3, 5, `severity="page", long="6h", short="30m", exhaustion="5 days"`},
	{"1d", 15, 96, 8, 3, 4, 7, `severity="ticket", long="1d", short="2h", exhaustion="10 days"`},
	{"3d", 30, 144, 12, 1, 6, 11, `severity="ticket", long="3d", short="6h", exhaustion="30 days"`},
}

const budgetBurn = `alertname="RingfenceErrorBudgetBurn"`

// burns is a check of the alert about availability with all of its labels.
func (w window) burns(at int, fires bool, more ...string) ruleCheck {
	c := ruleCheck{at: at, of: budgetBurn, by: "job, ring, instance, slo_name, severity, long, short, exhaustion"}
	if fires {
		c.want = []string{`{` + strings.Join(append([]string{`job="svc"`, `slo_name="redis_availability"`, w.labels}, more...), ", ") + `}`}
	}
	return c
}

func burnCases() (cases []ruleCase) {
	for _, w := range windows {
		add := func(name string, series map[string]string, checks ...ruleCheck) {
			cases = append(cases, ruleCase{w.long + ": " + name, w.long, w.step, series, checks})
		}
		pair := func(n int, events float64, burn func(i int) float64) map[string]string {
			s := map[string]string{}
			slo(s, one, "redis_availability", n, events, burn)
			slo(s, one, "decision_latency", n, events, same(0.5))
			return s
		}

		// One per cent to both sides of the threshold. The first rate is there after one
		// step; then for.
		n := w.forN + 6
		add("a steady burn just above the threshold", pair(n, perStep, same(w.threshold*1.01)),
			w.burns(w.forN, false), w.burns(w.forN+1, true), w.burns(n-1, true))
		add("a steady burn just below the threshold", pair(n, perStep, same(w.threshold*0.99)), w.burns(n-1, false))
		add("no burn", pair(n, perStep, same(0)), w.burns(n-1, false))

		// An outage after a long calm, such that the long window reaches the threshold when
		// the outage fills 72 % of it. When it is over, the short window lets go after 28 %
		// of its own length, long before the long one would.
		const part = 0.72
		calm, during := w.longN+10, w.longN+20
		s := pair(calm+during+w.longN/2, perStep, func(i int) float64 {
			if i > calm && i <= calm+during {
				return w.threshold / part
			}
			return 0
		})
		begins := calm + int(part*float64(w.longN)) + w.forN
		ends := calm + during + int((1-part)*float64(w.shortN)) + 2
		add("an outage begins and ends", s, w.burns(calm, false), w.burns(begins-1, false), w.burns(begins+3, true),
			w.burns(calm+during, true), w.burns(ends, false), w.burns(calm+during+w.longN/4, false))

		// What the long window remembers does not fire once the short one has got better,
		// though it is only just below the threshold.
		for times, fires := range map[float64]bool{0.985: false, 1.02: true} {
			after := w.longN / 6
			add(fmt.Sprintf("after the worst, %.3f of the threshold", times),
				pair(w.longN+after+1, perStep, func(i int) float64 {
					if i <= w.longN {
						return w.threshold * 3
					}
					return w.threshold * times
				}), w.burns(w.longN+after, fires))
		}

		// The long window is just below while the short one is above.
		add("the short window is above, the long one just below",
			pair(w.longN+w.forN+8, perStep, func(i int) float64 {
				if i > w.longN+2 {
					return w.threshold * 1.1
				}
				return w.threshold * 0.985
			}), w.burns(w.longN+w.forN+6, false))

		// A quiet service, one decision a step. The bad ones come so far apart that the
		// short window always holds one: the ratios are above every threshold. Four are not
		// worth an alert, seven are.
		first := w.longN + 10
		last := first + 6*w.apart
		few := func(bad int) func(i int) float64 {
			return func(i int) float64 {
				if i <= last && i > last-bad*w.apart && (last-i)%w.apart == 0 {
					return 1 / (1 - objective)
				}
				return 0
			}
		}
		for bad, fires := range map[int]bool{4: false, 7: true} {
			add(fmt.Sprintf("%d bad decisions of a quiet service", bad), pair(last+w.forN+1, 1, few(bad)), w.burns(last+w.forN, fires))
		}
		// Four now and seven before the long window.
		s = pair(last+w.longN+w.longN/2, 1, few(7))
		slo(s, one, "redis_availability", last+w.longN*2, 1, func(i int) float64 { return few(7)(i) + few(4)(i-w.longN-6*w.apart) })
		end := last + w.longN + 6*w.apart + w.forN
		add("what is older than the long window does not count", s, w.burns(end, false))

		// One per cent to both sides of five bad events in the long window, all of them bad.
		for times, fires := range map[float64]bool{0.99: false, 1.01: true} {
			each := 5 * times / float64(w.longN)
			add(fmt.Sprintf("%.2f bad decisions in the long window", 5*times),
				pair(w.longN+w.forN+4, each, same(1/(1-objective))), w.burns(w.longN+w.forN+3, fires))
		}

		// No decisions: no ratio, no alert. And no series at all, or no objective.
		add("no traffic", pair(n, 0, same(0)), w.burns(n-1, false))
		add("no series", map[string]string{`up{` + one + `}`: constant(n, 1)}, w.burns(n-1, false))

		// A process that restarts counts from zero again.
		for times, fires := range map[float64]bool{0.5: false, 1.5: true} {
			l := `{` + one + `,slo_name="redis_availability"}`
			twice := func(step float64) string { return counter(n, same(step)) + counter(n, same(step)) }
			add(fmt.Sprintf("a restart, at %.1f of the threshold", times), map[string]string{
				"ratelimiter_slo_events_total" + l:            twice(perStep),
				"ratelimiter_error_budget_consumed_total" + l: twice(perStep * (1 - objective) * w.threshold * times),
				"ratelimiter_slo_objective_ratio" + l:         constant(2*n, objective),
			}, w.burns(n-1, fires), w.burns(n, fires), w.burns(n+1, fires), w.burns(2*n-1, fires))
		}

		// The ratio stays while the traffic falls to a tenth, and while it grows tenfold: the
		// bad and all decisions must be counted over the same time.
		for _, now := range []float64{0.1, 10} {
			calm, total := w.longN+10, 2*w.longN+10
			step := func(part float64) func(i int) float64 {
				return func(i int) float64 {
					if i > calm {
						return perStep * part * now
					}
					return perStep * part
				}
			}
			l := `{` + one + `,slo_name="redis_availability"}`
			add(fmt.Sprintf("traffic becomes %g times what it was", now), map[string]string{
				"ratelimiter_slo_events_total" + l:            counter(total, step(1)),
				"ratelimiter_error_budget_consumed_total" + l: counter(total, step((1-objective)*w.threshold*1.1)),
				"ratelimiter_slo_objective_ratio" + l:         constant(total, objective),
			}, w.burns(calm, true), w.burns(calm+w.shortN/2, true), w.burns(calm+w.shortN+2, true), w.burns(calm+w.longN/4, true), w.burns(calm+w.longN-5, true))
		}

		// A job is the sum of its processes; rings and jobs are kept apart.
		s = map[string]string{}
		slo(s, `job="svc",instance="a"`, "redis_availability", n, perStep, same(w.threshold*1.9))
		slo(s, `job="svc",instance="b"`, "redis_availability", n, perStep, same(0))
		add("one process of two, too little for the job", s, w.burns(n-1, false))
		s = map[string]string{}
		slo(s, `job="svc",instance="a"`, "redis_availability", n, perStep, same(w.threshold*2.1))
		slo(s, `job="svc",instance="b"`, "redis_availability", n, perStep, same(0))
		add("one process of two, enough for the job", s, w.burns(n-1, true))
		s = map[string]string{}
		slo(s, `job="svc",instance="a",ring="x"`, "redis_availability", n, perStep, same(w.threshold*1.5))
		slo(s, `job="svc",instance="a",ring="y"`, "redis_availability", n, perStep, same(0))
		slo(s, `job="other",instance="a",ring="x"`, "redis_availability", n, perStep, same(0))
		add("rings and jobs are kept apart", s, w.burns(n-1, true, `ring="x"`))
	}

	// With all rules in place: the worst outage of the other SLO fires all four.
	s := map[string]string{}
	slo(s, one, "redis_availability", 200, perStep, same(0.5))
	slo(s, one, "decision_latency", 200, perStep, same(20))
	all := ruleCheck{at: 199, of: budgetBurn, by: "job, slo_name, severity, long, short, exhaustion"}
	for _, w := range windows {
		all.want = append(all.want, `{job="svc", slo_name="decision_latency", `+w.labels+`}`)
	}
	return append(cases, ruleCase{"all windows of the other SLO", "", 1, s, []ruleCheck{all}})
}

// breakers are the states of n shards in some processes: state(shard, process) at step i.
func breakers(n, shards, processes int, state func(shard, process, i int) int) map[string]string {
	out := map[string]string{}
	for s := range shards {
		for p := range processes {
			var b strings.Builder
			for i := range n {
				b.WriteString(strconv.Itoa(state(s, p, i)) + " ")
			}
			out[fmt.Sprintf(`ratelimiter_circuit_state{job="svc",instance="%d",shard_id="s%d"}`, p, s)] = b.String()
		}
	}
	return out
}

func causeCases() (cases []ruleCase) {
	slice := "RingfenceShardsOpen"
	add := func(name string, series map[string]string, checks ...ruleCheck) {
		cases = append(cases, ruleCase{name, slice, 1, series, checks})
	}
	shardsOpen := func(at int, fires bool) ruleCheck {
		c := ruleCheck{at: at, of: `alertname="RingfenceShardsOpen"`, by: "job, severity, shard_id"}
		if fires {
			c.want = []string{`{job="svc", severity="page"}`}
		}
		return c
	}
	for _, row := range []struct {
		open, of int
		fires    bool
	}{{1, 3, true}, {1, 4, true}, {1, 5, false}, {2, 5, true}, {1, 9, false}, {2, 9, true}, {2, 10, false}, {3, 10, true}, {3, 15, false}, {4, 15, true}, {0, 3, false}, {100, 500, false}, {101, 500, true}} {
		add(fmt.Sprintf("%d shards of %d are open", row.open, row.of),
			breakers(6, row.of, max(1, 3-row.of/100), func(s, _, _ int) int {
				if s < row.open {
					return 1
				}
				return 0
			}), shardsOpen(0, false), shardsOpen(1, row.fires), shardsOpen(5, row.fires))
	}
	for _, row := range []struct {
		in, of int
		state  int
		fires  bool
	}{{1, 4, 1, false}, {2, 4, 1, true}, {1, 2, 1, true}, {2, 5, 1, false}, {3, 5, 1, true}, {4, 4, 2, true}, {99, 200, 1, false}, {100, 200, 1, true}} {
		add(fmt.Sprintf("a shard of two is in state %d in %d of %d processes", row.state, row.in, row.of),
			breakers(6, 2, row.of, func(s, p, _ int) int {
				if s == 0 && p < row.in {
					return row.state
				}
				return 0
			}), shardsOpen(5, row.fires))
	}
	add("shards come back", breakers(20, 3, 2, func(s, _, i int) int {
		if s == 0 && i >= 5 && i < 10 {
			return 1 + i%2
		}
		return 0
	}), shardsOpen(4, false), shardsOpen(5, false), shardsOpen(6, true), shardsOpen(9, true), shardsOpen(10, false))

	// Each ring of each job for itself.
	s := map[string]string{}
	for _, e := range []struct {
		job, ring string
		open      int
	}{{"svc", "x", 3}, {"svc", "y", 0}, {"job2", "x", 0}} {
		for i := range 9 {
			s[fmt.Sprintf(`ratelimiter_circuit_state{job="%s",ring="%s",instance="a",shard_id="%d"}`, e.job, e.ring, i)] = constant(6, isTrue(i < e.open))
		}
	}
	add("rings and jobs are kept apart", s, ruleCheck{at: 5, of: `alertname="RingfenceShardsOpen"`, by: "job, ring, severity, shard_id",
		want: []string{`{job="svc", ring="x", severity="page"}`}})

	slice = "RingfenceFailingOpen"
	failing := func(at int, shards ...string) ruleCheck {
		c := ruleCheck{at: at, of: `alertname="RingfenceFailingOpen"`, by: "job, shard_id, severity"}
		for _, s := range shards {
			c.want = append(c.want, `{job="svc", shard_id="`+s+`", severity="ticket"}`)
		}
		return c
	}
	// Each minute decisions of a shard, and of these so many by a mode of the ladder.
	// Canceled calls are no decisions: a flood of them must not thin the others out.
	answered := func(n int, decisions, fallback float64, mode string) map[string]string {
		l := `{job="svc",instance="a",shard_id="s0"`
		return map[string]string{
			"ratelimiter_request_latency_seconds_count" + l + `,outcome="allowed"}`:               counter(n, same(decisions*0.75)),
			"ratelimiter_request_latency_seconds_count" + l + `,outcome="denied"}`:                counter(n, same(decisions*0.25)),
			"ratelimiter_request_latency_seconds_count" + l + `,outcome="canceled"}`:              counter(n, same(decisions*9)),
			"ratelimiter_fallback_decisions_total" + l + `,mode="` + mode + `",reason="breaker"}`: counter(n, same(fallback*0.5)),
			"ratelimiter_fallback_decisions_total" + l + `,mode="` + mode + `",reason="budget"}`:  counter(n, same(fallback*0.5)),
		}
	}
	add("just above 1 % fails open", answered(20, 10000, 101, "open"), failing(4), failing(7, "s0"), failing(19, "s0"))
	add("just below 1 % fails open", answered(20, 10000, 99, "open"), failing(7), failing(19))
	add("everything fails closed", answered(20, 10000, 10000, "closed"), failing(19))
	add("everything is decided locally", answered(20, 10000, 10000, "local"), failing(19))
	for _, mode := range []string{"closed", "local"} {
		s := answered(20, 10000, 9000, mode)
		s[`ratelimiter_fallback_decisions_total{job="svc",instance="a",shard_id="s0",mode="open",reason="error"}`] = counter(20, same(50))
		add("half a per cent fails open, and most of the rest "+mode, s, failing(19))
	}
	add("one call a minute fails open", answered(20, 2, 0.8, "open"), failing(19))
	add("a few calls a minute fail open", answered(20, 4, 1.4, "open"), failing(19, "s0"))
	s = answered(40, 10000, 0, "open")
	s[`ratelimiter_fallback_decisions_total{job="svc",instance="a",shard_id="s0",mode="open",reason="error"}`] = counter(40, func(i int) float64 {
		if i > 5 && i <= 20 {
			return 5000
		}
		return 0
	})
	add("failing open ends", s, failing(5), failing(10), failing(13, "s0"), failing(20, "s0"), failing(25))

	slice = "RingfenceMetricsAbsent"
	absent := func(at int, want ...string) ruleCheck {
		return ruleCheck{at: at, of: `alertname="RingfenceMetricsAbsent"`, by: "job, severity, scope", want: want}
	}
	const all = `{severity="ticket", scope="all"}`
	events := func(job, values string) map[string]string {
		return map[string]string{`ratelimiter_slo_events_total{job="` + job + `",instance="a",slo_name="redis_availability"}`: values}
	}
	gone := counter(61, same(1)) + strings.Repeat("_ ", 200)
	add("nobody exports anything", map[string]string{`up{job="svc",instance="a"}`: constant(30, 1)}, absent(9), absent(10, all), absent(25, all))
	add("somebody exports", events("svc", counter(30, same(0))), absent(25))
	s = events("svc", gone)
	for name, v := range events("other", counter(261, same(1))) {
		s[name] = v
	}
	// The last sample is at minute 60; Prometheus still sees it for 5 minutes.
	add("one job of two vanishes", s, absent(60), absent(72), absent(77, `{job="svc", severity="ticket", scope="job"}`),
		absent(120, `{job="svc", severity="ticket", scope="job"}`), absent(128))
	add("the only job vanishes", events("svc", gone), absent(72),
		absent(80, `{job="svc", severity="ticket", scope="job"}`, all), absent(200, all))
	add("no job vanishes", events("svc", counter(261, same(1))), absent(80), absent(200))
	return cases
}

// rulesInParts are the rules in parts that can be judged alone: an alert with what it
// reads, by its name, and those of an error budget by their long window; and "",
// everything. Judging all rules in every case takes minutes, this takes seconds.
func rulesInParts(text string) (map[string]string, error) {
	var f struct{ Groups []map[string]any }
	if err := yaml.Unmarshal([]byte(text), &f); err != nil {
		return nil, err
	}
	out := map[string]string{"": text}
	parts := map[string][]any{}
	burns := 0
	for _, g := range f.Groups {
		rules, _ := g["rules"].([]any)
		for i, r := range rules {
			alert, _ := r.(map[string]any)
			if alert["alert"] == nil {
				continue
			}
			name := fmt.Sprint(alert["alert"])
			if name == "RingfenceErrorBudgetBurn" {
				name = windows[burns].long
				burns++
			}
			parts[name] = append(parts[name], needed(rules[:i], alert)...)
		}
	}
	for name, rules := range parts {
		part, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "part", "rules": rules}}})
		if err != nil {
			return nil, err
		}
		out[name] = string(part)
	}
	return out, nil
}

// needed is a rule and, before it, those that it reads.
func needed(before []any, rule map[string]any) []any {
	out := []any{rule}
	reads := fmt.Sprint(rule["expr"])
	for i := len(before) - 1; i >= 0; i-- {
		r, _ := before[i].(map[string]any)
		if name, ok := r["record"].(string); ok && regexp.MustCompile(regexp.QuoteMeta(name)+`\b`).MatchString(reads) {
			out = append([]any{r}, out...)
			reads += fmt.Sprint(r["expr"])
		}
	}
	return out
}

// casesOf are all cases by the part of the rules that they are about, the short ones
// first: most mistakes show in them.
var casesOf = sync.OnceValue(func() map[string][]ruleCase {
	out := map[string][]ruleCase{}
	for _, c := range slices.Concat(causeCases(), shardCases(), serverCases(), limitCases(), budgetCases(), burnCases()) {
		out[c.slice] = append(out[c.slice], c)
	}
	for _, cases := range out {
		slices.SortStableFunc(cases, func(a, b ruleCase) int { return a.effort() - b.effort() })
	}
	return out
})

func (c ruleCase) last() int {
	last := 0
	for _, k := range c.checks {
		last = max(last, k.at)
	}
	return last
}

func (c ruleCase) effort() int { return c.last() * len(c.series) }

func (c ruleCase) forPromtool() alertsTest {
	test := alertsTest{Name: c.name, Interval: fmt.Sprintf("%dm", c.step)}
	for name, values := range c.series {
		test.Series = append(test.Series, alertsSeries{name, values})
	}
	for _, k := range c.checks {
		check := alertsCheck{Expr: k.query(), At: fmt.Sprintf("%dm", k.at*c.step)}
		for _, l := range k.want {
			check.Samples = append(check.Samples, alertsSample{l, 1})
		}
		test.Checks = append(test.Checks, check)
	}
	return test
}

// mainRules is the file of rules that the cases are about.
func mainRules(t testing.TB) string {
	t.Helper()
	for _, f := range ruleFiles(t) {
		if filepath.Base(f.path) == "ringfence.rules.yml" {
			return f.text
		}
	}
	t.Fatal("there is no ringfence.rules.yml")
	return ""
}

func TestEachAlertFiresWhenItShouldAndOnlyThen(t *testing.T) {
	if raced {
		withoutRaceDetector(t)
		return
	}
	parts, err := rulesInParts(mainRules(t))
	if err != nil {
		t.Fatal(err)
	}
	for name := range casesOf() {
		if parts[name] == "" {
			t.Errorf("there are cases about %q, and no such rules", name)
		}
	}
	for name, rules := range parts {
		fires, silent := 0, 0
		for _, c := range casesOf()[name] {
			said, err := c.play(rules)
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			for _, s := range said {
				t.Errorf("rules %q: %s", name, s)
			}
			for _, k := range c.checks {
				if len(k.want) > 0 {
					fires++
				} else {
					silent++
				}
			}
		}
		// What is silent in every case may never have been loaded.
		if fires < 1 || silent < 1 && name != "" {
			t.Errorf("rules %q: looked at %d times while they must fire, and %d times while they must not", name, fires, silent)
		}
	}
}

// The same by the oldest promtool that users may have: another engine, and Prometheus's
// own code for what becomes of a pending alert.
func TestTheOldestPromtoolComesToTheSameResults(t *testing.T) {
	parts, err := rulesInParts(mainRules(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, cases := range casesOf() {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "ringfence.rules.yml"), []byte(parts[name]), 0o644); err != nil {
			t.Fatal(err)
		}
		byStep := map[int]*alertsFile{}
		for _, c := range cases {
			f := byStep[c.step]
			if f == nil {
				f = &alertsFile{RuleFiles: []string{"ringfence.rules.yml"}, EvaluationInterval: fmt.Sprintf("%dm", c.step)}
				if name == "" {
					f.GroupEvalOrder = []string{"ringfence-slo", "ringfence-shards", "ringfence-servers", "ringfence-limits", "ringfence-meta"}
				}
				byStep[c.step] = f
			}
			f.Tests = append(f.Tests, c.forPromtool())
		}
		for step, f := range byStep {
			text, err := yaml.Marshal(f)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, fmt.Sprintf("cases%d.yml", step))
			if err := os.WriteFile(file, text, 0o644); err != nil {
				t.Fatal(err)
			}
			if out, err := promtool("test", "rules", file); err != nil || !strings.Contains(out, "SUCCESS") {
				t.Errorf("rules %q: %v\n%s", name, err, out)
			}
		}
	}
}
