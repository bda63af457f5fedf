package observability_test

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
	"go.yaml.in/yaml/v3"
)

// mutations are what can be changed in an expression: each is what it would change and
// how. They are found in the tree, so that a new rule is mutated without anybody's doing.
func mutations(e parser.Expr) (all []mutation) {
	add := func(what string, do func()) { all = append(all, mutation{what, do}) }
	selector := func(v *parser.VectorSelector) {
		for i, m := range v.LabelMatchers {
			if m.Name == nameLabel {
				continue
			}
			add("without "+m.String(), func() { v.LabelMatchers = slices.Delete(slices.Clone(v.LabelMatchers), i, i+1) })
			add("another value of "+m.String(), func() {
				v.LabelMatchers = slices.Clone(v.LabelMatchers)
				v.LabelMatchers[i] = labels.MustNewMatcher(m.Type, m.Name, m.Value+"x")
			})
		}
		if v.OriginalOffset != 0 {
			for _, f := range []float64{0.5, 2} {
				add(fmt.Sprintf("offset %s times %g", v.OriginalOffset, f), func() {
					v.OriginalOffset = time.Duration(float64(v.OriginalOffset) * f)
				})
			}
		}
	}
	parser.Inspect(e, func(n parser.Node, _ []parser.Node) error {
		switch n := n.(type) {
		case *parser.NumberLiteral:
			if n.Val == 0 {
				add("1 for 0", func() { n.Val = 1 })
				break
			}
			for _, f := range []float64{0.98, 1.02} {
				add(fmt.Sprintf("%g times %g", n.Val, f), func() { n.Val *= f })
			}
		case *parser.MatrixSelector:
			for _, f := range []float64{0.5, 2} {
				add(fmt.Sprintf("[%s] times %g", n.Range, f), func() { n.Range = time.Duration(float64(n.Range) * f) })
			}
		case *parser.VectorSelector:
			selector(n)
		case *parser.AggregateExpr:
			for i, g := range n.Grouping {
				add(fmt.Sprintf("%s without the label %s", n.Op, g), func() { n.Grouping = slices.Delete(slices.Clone(n.Grouping), i, i+1) })
			}
		case *parser.BinaryExpr:
			to := map[parser.ItemType]parser.ItemType{
				parser.GTR: parser.LSS, parser.LSS: parser.GTR, parser.GTE: parser.LSS, parser.NEQ: parser.EQLC,
				parser.LAND: parser.LUNLESS, parser.LUNLESS: parser.LAND, parser.DIV: parser.MUL, parser.MUL: parser.DIV,
				parser.ADD: parser.SUB, parser.SUB: parser.ADD}[n.Op]
			add(fmt.Sprintf("%s for %s", to, n.Op), func() { n.Op = to })
			if n.VectorMatching != nil && n.VectorMatching.On {
				for i, g := range n.VectorMatching.MatchingLabels {
					add("on without "+g, func() {
						n.VectorMatching.MatchingLabels = slices.Delete(slices.Clone(n.VectorMatching.MatchingLabels), i, i+1)
					})
				}
			}
		}
		return nil
	})
	return all
}

type mutation struct {
	what string
	do   func()
}

// mutant is a part of the rules with one change.
type mutant struct{ part, what, rules string }

// mutantsOf makes every mutant of a part.
func mutantsOf(t testing.TB, part, text string) (all []mutant) {
	t.Helper()
	type document struct {
		Groups []struct {
			Name  string
			Rules []map[string]any
		}
	}
	read := func() (d document) {
		if err := yaml.Unmarshal([]byte(text), &d); err != nil {
			t.Fatal(err)
		}
		return d
	}
	original := read()
	for i, r := range original.Groups[0].Rules {
		name := strings.ReplaceAll(fmt.Sprint(r["alert"], r["record"]), "<nil>", "")
		add := func(what string, change func(rule map[string]any)) {
			d := read()
			change(d.Groups[0].Rules[i])
			out, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "part", "rules": d.Groups[0].Rules}}})
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, mutant{part, name + ": " + what, string(out)})
		}
		expr := fmt.Sprint(r["expr"])
		for j := range mutations(parse(t, expr)) {
			e := parse(t, expr)
			m := mutations(e)[j]
			m.do()
			add(m.what, func(rule map[string]any) { rule["expr"] = e.String() })
		}
		if for_, ok := r["for"]; ok {
			d, err := model.ParseDuration(fmt.Sprint(for_))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range []float64{0.5, 2} {
				to := model.Duration(float64(d) * f)
				if time.Duration(to) < time.Minute {
					to = 0 // rules are evaluated once a minute
				}
				add(fmt.Sprintf("for: %s for %s", to, d), func(rule map[string]any) { rule["for"] = to.String() })
			}
		}
		if l, ok := r["labels"].(map[string]any); ok {
			for key := range l {
				add("without the label "+key, func(rule map[string]any) { delete(rule["labels"].(map[string]any), key) })
				add("another value of the label "+key, func(rule map[string]any) { rule["labels"].(map[string]any)[key] = "other" })
			}
		}
	}
	return all
}

// equivalent are mutants that change nothing anybody could see, with the reason.
var equivalent = map[string]string{}

func TestASmallMistakeInTheRulesIsCaught(t *testing.T) {
	if raced {
		withoutRaceDetector(t)
		return
	}
	parts, err := rulesInParts(mainRules(t))
	if err != nil {
		t.Fatal(err)
	}
	var mutants []mutant
	for name, part := range parts {
		if name != "" {
			mutants = append(mutants, mutantsOf(t, name, part)...)
		}
	}
	if len(mutants) < 300 {
		t.Fatalf("only %d mutants: the rules are not read as they should be", len(mutants))
	}
	survivors := map[string]bool{}
	var mu sync.Mutex
	k := killers{count: map[string]map[int]int{}}
	work := make(chan mutant)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for m := range work {
				if !m.caught(t, &k) {
					mu.Lock()
					survivors[m.part+": "+m.what] = true
					mu.Unlock()
				}
			}
		})
	}
	for _, m := range mutants {
		work <- m
	}
	close(work)
	wg.Wait()
	for what := range survivors {
		if equivalent[what] == "" {
			t.Errorf("not noticed: %s", what)
		}
	}
	for what := range equivalent {
		if !survivors[what] {
			t.Errorf("%q is said to change nothing, but is caught, or is no mutant", what)
		}
	}
	t.Logf("%d mutants, %d of them equivalent", len(mutants), len(equivalent))
}

// caught plays the cases until one breaks, those that caught most so far first.
func (m mutant) caught(t testing.TB, k *killers) (yes bool) {
	cases := casesOf()[m.part]
	for _, i := range k.order(m.part, cases) {
		c := cases[i]
		said, err := c.play(m.rules)
		if err != nil {
			// A mutant that does not match one to one fails at users', loudly.
			if strings.Contains(err.Error(), "many-to-") || strings.Contains(err.Error(), "duplicate series") || strings.Contains(err.Error(), "multiple matches") {
				return true
			}
			t.Errorf("%s: %s: %v", m.part, m.what, err)
			return true
		}
		if len(said) > 0 {
			k.caught(m.part, i)
			return true
		}
	}
	return false
}

// killers remembers how many mutants each case has caught.
type killers struct {
	mu    sync.Mutex
	count map[string]map[int]int
}

func (k *killers) caught(part string, i int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.count[part] == nil {
		k.count[part] = map[int]int{}
	}
	k.count[part][i]++
}

func (k *killers) order(part string, cases []ruleCase) []int {
	k.mu.Lock()
	defer k.mu.Unlock()
	worth := make([]float64, len(cases))
	all := make([]int, len(cases))
	for i, c := range cases {
		all[i], worth[i] = i, float64(1+k.count[part][i])/float64(1+c.effort())
	}
	slices.SortStableFunc(all, func(a, b int) int { return cmp.Compare(worth[b], worth[a]) })
	return all
}
