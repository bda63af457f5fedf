package observability_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/promql/parser"
	"go.yaml.in/yaml/v3"

	"github.com/ringfence/ringfence/observability"
)

const (
	alerts   = "../alerts"
	playbook = "https://github.com/ringfence/ringfence/blob/main/alerts/playbook.md#"
)

// rule is one recording or alerting rule.
type rule struct {
	Record, Alert, Expr, For string
	Labels, Annotations      map[string]string
}

// ruleFile is a file of rules, and its text.
type ruleFile struct {
	path, text string
	Groups     []struct {
		Name  string
		Rules []rule
	}
}

func ruleFiles(t testing.TB) []ruleFile {
	t.Helper()
	paths, err := filepath.Glob(alerts + "/*.rules.yml")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no rules: %v", err)
	}
	var all []ruleFile
	for _, p := range paths {
		text, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		f := ruleFile{path: p, text: string(text)}
		if err := yaml.Unmarshal(text, &f); err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		all = append(all, f)
	}
	return all
}

func (f ruleFile) rules() (all []rule) {
	for _, g := range f.Groups {
		all = append(all, g.Rules...)
	}
	return all
}

// promtool runs the oldest promtool that users may have. It must be there.
func promtool(args ...string) (string, error) {
	out, err := exec.Command("promtool", args...).CombinedOutput()
	return string(out), err
}

func TestPromtoolAcceptsTheRules(t *testing.T) {
	for _, f := range ruleFiles(t) {
		if out, err := promtool("check", "rules", "--lint=all", "--lint-fatal", f.path); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
}

// withRecorded adds what the rules record to what limiters export.
func (c catalog) withRecorded(t testing.TB) catalog {
	t.Helper()
	all := catalog{}
	for name, m := range c {
		all[name] = m
	}
	for _, f := range ruleFiles(t) {
		for _, r := range f.rules() {
			if r.Record == "" {
				continue
			}
			e := parse(t, r.Expr)
			if e == nil {
				continue
			}
			m := metric{"GAUGE", map[string]map[string]bool{}}
			for _, l := range all.labels(e) {
				m.values[l] = map[string]bool{}
			}
			all[r.Record] = m
		}
	}
	return all
}

func TestEveryRuleAsksForWhatALimiterExports(t *testing.T) {
	c := exported(t).withRecorded(t)
	recorded := map[string]bool{}
	used := map[string]bool{}
	for _, f := range ruleFiles(t) {
		for _, r := range f.rules() {
			e := parse(t, r.Expr)
			if e == nil {
				continue
			}
			for _, bad := range c.check(e) {
				t.Errorf("%s%s: %s\n\t%s", r.Record, r.Alert, bad, r.Expr)
			}
			for _, sel := range parser.ExtractSelectors(e) {
				for _, m := range sel {
					used[m.Value] = true
				}
			}
			if r.Record != "" {
				if recorded[r.Record] {
					t.Errorf("%s is recorded twice", r.Record)
				}
				recorded[r.Record] = true
				if !recordName.MatchString(r.Record) {
					t.Errorf("%s is not level:metric:operations", r.Record)
				}
			}
			for _, text := range r.Annotations {
				for _, m := range annotationLabel.FindAllStringSubmatch(text, -1) {
					if !slices.Contains(c.labels(e), m[1]) && r.Labels[m[1]] == "" {
						t.Errorf("%s: an annotation names $labels.%s, which the alert does not have", r.Alert, m[1])
					}
				}
			}
		}
	}
	for name := range recorded {
		if !used[name] {
			t.Errorf("%s is recorded, and no alert reads it", name)
		}
	}
}

var (
	recordName      = regexp.MustCompile(`^[a-z_]+:[a-z_]+:[a-z0-9_]+$`)
	annotationLabel = regexp.MustCompile(`\$labels\.(\w+)`)
)

func TestEveryAlertSaysHowBadItIsAndWhereToLook(t *testing.T) {
	uids := map[string]bool{}
	for _, b := range boards(t) {
		uids[b.UID] = true
	}
	for _, f := range ruleFiles(t) {
		for _, r := range f.rules() {
			if r.Alert == "" {
				continue
			}
			if s := r.Labels["severity"]; s != "page" && s != "ticket" {
				t.Errorf("%s has the severity %q", r.Alert, s)
			}
			for _, key := range []string{"summary", "description", "runbook_url", "dashboard_url"} {
				if r.Annotations[key] == "" {
					t.Errorf("%s lacks the annotation %s", r.Alert, key)
				}
			}
			if got, want := r.Annotations["runbook_url"], playbook+strings.ToLower(r.Alert); got != want {
				t.Errorf("%s: runbook_url is %s, want %s", r.Alert, got, want)
			}
			m := dashboardURL.FindStringSubmatch(r.Annotations["dashboard_url"])
			if m == nil || !uids[m[1]] {
				t.Errorf("%s: dashboard_url %s leads to no dashboard of ours", r.Alert, r.Annotations["dashboard_url"])
			}
			if r.For == "" {
				t.Errorf("%s lacks a for: one odd scrape would fire it", r.Alert)
			}
		}
	}
}

var dashboardURL = regexp.MustCompile(`^/d/([a-z-]+)(\?|$)`)

func TestThePlaybookHasASectionForEachAlertAndNoOther(t *testing.T) {
	text, err := os.ReadFile(alerts + "/playbook.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	for _, s := range strings.Split(string(text), "\n## ")[1:] {
		title, body, _ := strings.Cut(s, "\n")
		sections[title] = body
	}
	fires := map[string]bool{}
	for _, f := range ruleFiles(t) {
		for _, r := range f.rules() {
			if r.Alert != "" {
				fires[r.Alert] = true
				if _, ok := sections[r.Alert]; !ok {
					t.Errorf("the alert %s has no section", r.Alert)
				}
			}
		}
	}
	c := exported(t)
	for title, body := range sections {
		if !fires[title] {
			t.Errorf("the section %s has no alert", title)
		}
		for _, part := range []string{"Meaning", "Impact", "Urgency", "Investigate", "Fix", "False positives"} {
			if !strings.Contains(body, "**"+part+".**") {
				t.Errorf("the section %s does not say: %s", title, part)
			}
		}
		queries := 0
		for _, block := range promqlBlock.FindAllStringSubmatch(body, -1) {
			for line := range strings.Lines(block[1]) {
				line = strings.TrimSpace(line)
				if line == "" || strings.HasPrefix(line, "#") {
					continue
				}
				queries++
				e := parse(t, line)
				if e == nil || strings.HasPrefix(line, "up{") {
					continue
				}
				for _, bad := range c.check(e) {
					t.Errorf("the section %s: %s\n\t%s", title, bad, line)
				}
			}
		}
		if queries == 0 {
			t.Errorf("the section %s has no query to paste", title)
		}
	}
}

var promqlBlock = regexp.MustCompile("(?s)```promql\n(.*?)```")

func TestAlertsAndDashboardWatchTheSameWindows(t *testing.T) {
	var got []string
	for _, f := range ruleFiles(t) {
		for _, r := range f.rules() {
			if r.Alert == "RingfenceErrorBudgetBurn" {
				got = append(got, fmt.Sprint(r.Labels["long"], r.Labels["short"], thresholds.FindAllString(r.Expr, -1), r.For, r.Labels["severity"]))
			}
		}
	}
	var want []string
	for _, w := range observability.BurnWindows {
		over := fmt.Sprintf("> %g", w.Burn)
		dur := strings.TrimSuffix(strings.TrimSuffix(w.For.String(), "0s"), "0m")
		want = append(want, fmt.Sprint(w.Long, w.Short, []string{over, over, "> 5"}, dur, w.Severity))
	}
	if !slices.Equal(got, want) {
		t.Errorf("the alerts watch\n%v\nthe dashboard draws\n%v", got, want)
	}
}

func TestTheAlertOnLeasesBeginsWhereThePanelHasItsLine(t *testing.T) {
	over := fmt.Sprintf("> %g", observability.LeaseOvershoot)
	looked := 0
	for _, f := range ruleFiles(t) {
		for _, r := range f.rules() {
			if r.Alert != "RingfenceLeaseOvershoot" {
				continue
			}
			looked++
			if got := thresholds.FindAllString(r.Expr, -1); !slices.Equal(got, []string{over, over}) {
				t.Errorf("the alert has the thresholds %q, the panel %q", got, over)
			}
		}
	}
	if looked != 1 {
		t.Errorf("%d rules for leases", looked)
	}
}

var thresholds = regexp.MustCompile(`> [0-9.]+`)
