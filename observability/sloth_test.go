package observability_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/promql/parser"
	"go.yaml.in/yaml/v3"
)

// Sloth generates multi-window burn-rate alerts for any SLO. Its rules for ours
// (testdata/sloth) are played beside ours over the same series. They differ in two
// things: ours wait (for), and ours want five bad events behind them. Without both, ours
// must page and ticket in the same minutes as sloth's, in every history.

// The three forms of our rules that are played, by the name that their alerts get.
const (
	slothAlert = "Sloth"
	bareAlert  = "Bare"    // neither for nor the guard: must be as sloth's
	guarded    = "Guarded" // without for: must be as sloth's where traffic is not low
	asShipped  = "Shipped" // must never fire while sloth's does not
)

// slothHistory is what is counted in each step of a history.
type slothHistory struct {
	name   string
	step   int // minutes
	n      int
	quiet  bool // the guard must make a difference
	events float64
	burn   func(i int) float64
	fires  []string // severities that must fire at some time under sloth's rules
}

// None of them comes to exactly a threshold, where rounding decides: sloth writes one per
// mille as 0.0009999999999999432.
func slothHistories() []slothHistory {
	between := func(from, to int, burn float64) func(int) float64 {
		return func(i int) float64 {
			if i > from && i <= to {
				return burn
			}
			return 0
		}
	}
	// Random spells of random burn, the same in each run.
	random := func(seed uint64, worst float64, n int) func(int) float64 {
		r := rand.New(rand.NewPCG(seed, 1))
		burns := make([]float64, n)
		for at := 0; at < n; {
			burn := worst * r.Float64() * r.Float64() * r.Float64()
			for end := at + 1 + r.IntN(60); at < min(end, n); at++ {
				burns[at] = burn
			}
		}
		return func(i int) float64 { return burns[i] }
	}
	// Three days and a half in steps of five minutes; the window of five minutes then holds
	// too little for a rate, under both rules, and the other windows are full.
	const days = 3*288 + 144
	all := []slothHistory{
		{"an outage of 40 minutes", 1, 500, false, perStep, between(90, 130, 100), []string{"page", "ticket"}},
		{"seven hours at 8.1", 1, 500, false, perStep, between(60, 480, 8.1), []string{"page", "ticket"}},
		{"ten minutes of 30, twenty of rest", 1, 500, false, perStep, func(i int) float64 { return 30 * isTrue(i%30 < 10) }, []string{"page", "ticket"}},
		{"a day at 4.03 and then rest", 5, days, false, perStep, between(120, 408, 4.03), []string{"ticket"}},
		{"a bad event an hour of a quiet service", 1, 240, true, 1, func(i int) float64 { return 1000 * isTrue(i == 70 || i == 140) }, []string{"page", "ticket"}},
		{"random spells over half a day", 1, 720, false, perStep, random(1, 120, 720), []string{"page", "ticket"}},
		{"milder random spells over half a day", 1, 720, false, perStep, random(2, 30, 720), []string{"ticket"}},
		{"random spells over days", 5, days, false, perStep, random(3, 14, days), []string{"page", "ticket"}},
		{"no traffic", 1, 200, false, 0, same(0), nil},
	}
	for _, w := range windows {
		for _, x := range []float64{0.999, 1.001} {
			step := 1
			if w.step > 5 {
				step = 2
			}
			h := slothHistory{fmt.Sprintf("steadily at %g times %g", x, w.threshold), step, 200, false, perStep, same(x * w.threshold), nil}
			if w.threshold*x > 1 {
				h.fires = append(h.fires, "ticket")
			}
			if w.threshold*x > 6 {
				h.fires = append(h.fires, "page")
			}
			all = append(all, h)
		}
	}
	return all
}

// slothSets are the rules to play: those that are recorded, sloth's alerts and ours.
func slothSets(t testing.TB) string {
	t.Helper()
	var out []any
	seen := map[string]bool{}
	add := func(name, text string, change func(rule map[string]any)) {
		var f struct{ Groups []map[string]any }
		if err := yaml.Unmarshal([]byte(text), &f); err != nil {
			t.Fatal(err)
		}
		var rules []any
		for _, g := range f.Groups {
			rules = append(rules, g["rules"].([]any)...)
		}
		alerts := 0
		for i, r := range rules {
			alert := r.(map[string]any)
			if alert["alert"] != "RingfenceErrorBudgetBurn" {
				continue
			}
			alerts++
			for _, r := range needed(rules[:i], alert) {
				rule := r.(map[string]any)
				if record, ok := rule["record"].(string); ok {
					if !seen[record] {
						seen[record] = true
						out = append(out, rule)
					}
					continue
				}
				delete(rule, "annotations")
				rule["alert"] = name
				change(rule)
				out = append(out, rule)
			}
		}
		if want := map[bool]int{true: 2, false: 4}[name == slothAlert]; alerts != want {
			t.Fatalf("%s: %d alerts, want %d", name, alerts, want)
		}
	}
	ours := mainRules(t)
	add(slothAlert, readFile(t, "testdata/sloth/generated.yml"), func(rule map[string]any) {
		if rule["for"] != nil {
			t.Error("sloth's alerts wait: the comparison must, too")
		}
	})
	add(asShipped, ours, func(map[string]any) {})
	add(guarded, ours, func(rule map[string]any) { delete(rule, "for") })
	add(bareAlert, ours, func(rule map[string]any) {
		delete(rule, "for")
		and, ok := parse(t, fmt.Sprint(rule["expr"])).(*parser.BinaryExpr)
		if !ok || and.Op != parser.LAND || !strings.HasSuffix(and.RHS.String(), "> 5") {
			t.Fatalf("this alert has no guard as its last condition: %s", rule["expr"])
		}
		rule["expr"] = and.LHS.String()
	})
	text, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "both", "rules": out}}})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestPagesAndTicketsComeInTheSameMinutesAsThoseOfSloth(t *testing.T) {
	if raced {
		withoutRaceDetector(t)
		return
	}
	rules := slothSets(t)
	for _, h := range slothHistories() {
		t.Run(h.name, func(t *testing.T) {
			t.Parallel()
			h.play(t, rules)
		})
	}
}

func (h slothHistory) play(t *testing.T, text string) {
	rules, err := parseRules(text)
	if err != nil {
		t.Fatal(err)
	}
	s := map[string]string{}
	slo(s, `job="svc",instance="a"`, "redis_availability", h.n, h.events/2, h.burn)
	slo(s, `job="svc",instance="b"`, "redis_availability", h.n, h.events/2, h.burn)
	slo(s, `job="svc",instance="a"`, "decision_latency", h.n, h.events, same(50))
	start, step := time.Unix(0, 0).UTC(), time.Duration(h.step)*time.Minute
	m := newMemory()
	for name, values := range s {
		l, samples, err := parseSeries(name, values)
		if err != nil {
			t.Fatal(err)
		}
		for i, v := range samples {
			m.add(l, start.Add(time.Duration(i)*step), v.Value)
		}
	}
	fired := map[string]bool{}
	helped, shipped := 0, 0
	for i := range h.n {
		at := start.Add(time.Duration(i) * step)
		if err := m.evaluate(rules, at); err != nil {
			t.Fatal(err)
		}
		// Only of this SLO: sloth's rules know no other.
		v, err := m.ask(`count by (alertname, severity) (ALERTS{alertstate="firing",slo_name=~"|redis_availability"})`, at)
		if err != nil {
			t.Fatal(err)
		}
		now := map[string]string{}
		for _, severity := range []string{"page", "ticket"} {
			for _, sample := range v {
				if sample.Metric.Get("severity") == severity {
					now[sample.Metric.Get("alertname")] += severity + " "
				}
			}
		}
		for _, severity := range strings.Fields(now[slothAlert]) {
			fired[severity] = true
		}
		if now[bareAlert] != now[slothAlert] {
			t.Fatalf("minute %d: ours without for and guard fire %q, sloth's %q", i*h.step, now[bareAlert], now[slothAlert])
		}
		if now[guarded] != now[slothAlert] {
			helped++
			if !h.quiet {
				t.Fatalf("minute %d: ours without for fire %q, sloth's %q", i*h.step, now[guarded], now[slothAlert])
			}
		}
		for _, severity := range strings.Fields(now[asShipped]) {
			shipped++
			if !strings.Contains(now[slothAlert], severity) {
				t.Fatalf("minute %d: our %s fires, and sloth's does not", i*h.step, severity)
			}
		}
	}
	if got, want := slices.Sorted(maps.Keys(fired)), slices.Sorted(slices.Values(h.fires)); !slices.Equal(got, want) {
		t.Errorf("sloth's rules fire %v, want %v: the history is not what it says", got, want)
	}
	if h.quiet && (helped == 0 || shipped > 0) {
		t.Errorf("a quiet service: the guard made a difference in %d minutes, and ours fired in %d", helped, shipped)
	}
	if !h.quiet && len(h.fires) > 0 && shipped == 0 {
		t.Error("ours as shipped never fired")
	}
}
