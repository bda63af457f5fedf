package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence/alerts"
)

// rehearse drills and returns what was written.
func rehearse(ctx context.Context, t *testing.T, plan drillPlan, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	t.Setenv("TMPDIR", t.TempDir())
	var out, errs strings.Builder
	code = runDrill(ctx, args, plan, &out, &errs)
	for _, m := range regexp.MustCompile(`shard-\d at (127\.0\.0\.1:\d+)`).FindAllStringSubmatch(out.String(), -1) {
		t.Logf("real redis-server %s", m[1])
	}
	t.Logf("exit code %d\n%s%s", code, out.String(), errs.String())
	left, err := os.ReadDir(os.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		if strings.HasPrefix(e.Name(), "ringfence-") {
			t.Errorf("%s is left behind", e.Name())
		}
	}
	return code, out.String(), errs.String()
}

// The whole incident, on real servers, Prometheus and Alertmanager.
func TestTheDrillGoesFromTheFaultToTheResolvedPage(t *testing.T) {
	code, out, errs := rehearse(t.Context(), t, drillPlan{scale: 100})
	if code != exitOK || errs != "" {
		t.Fatalf("exit code %d, stderr %q", code, errs)
	}
	wantText(t, out, "FAULT on shard-2", "breakers open in all 3 apps", "PAGE", "slo_name=redis_availability",
		"mitigation in every app: ForceBreaker", "all admitted, by the policy", "fault over",
		"the primary of shard-2 has answered all 3 apps", "no page is left", "0 errors", "The drill held.")
	// The events of the summary happened one after the other; the page may come while the
	// last app's breaker is about to open.
	last := 0.0
	for _, event := range []string{"page received", "mitigated", "fault over", "recovered", "pages resolved"} {
		m := regexp.MustCompile(event + ` +([0-9.]+) s`).FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("the summary does not say when: %s", event)
		}
		at, err := strconv.ParseFloat(m[1], 64)
		if err != nil || at < last {
			t.Errorf("%s at %s s, the event before at %g s", event, m[1], last)
		}
		last = at
	}
}

func TestTheDrillFailsWhenCallersGetErrors(t *testing.T) {
	plan := drillPlan{scale: 120, mishap: func(step string, d *drill) {
		if step == "mitigate" {
			if err := d.apps[1].ring.Close(); err != nil {
				t.Error(err)
			}
		}
	}}
	code, out, errs := rehearse(t.Context(), t, plan)
	if code != exitFailed || !strings.Contains(errs, "FAILED: mitigate:") || !strings.Contains(errs, "had errors") {
		t.Errorf("exit code %d, stderr %q", code, errs)
	}
	if strings.Contains(out, "The drill held") {
		t.Error("it says that it held")
	}
}

func TestAnInterruptedDrillStopsEverything(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	code, out, errs := rehearse(ctx, t, drillPlan{scale: 60, mishap: func(step string, _ *drill) {
		if step == "page" {
			cancel()
		}
	}})
	if code != exitInterrupted || !strings.Contains(errs, "everything is stopped") || strings.Contains(out, "Summary") {
		t.Errorf("exit code %d, stderr %q", code, errs)
	}
}

func TestTheDrillNamesThePrograms(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	code, _, errs := rehearse(t.Context(), t, standardDrill)
	if code != exitUsage {
		t.Errorf("exit code %d, want %d", code, exitUsage)
	}
	for _, want := range []string{"apt-get install prometheus prometheus-alertmanager", "redis-server 7.0"} {
		if !strings.Contains(errs, want) {
			t.Errorf("stderr does not say %q: %s", want, errs)
		}
	}
}

func TestTheDrillRefusesWhatItCannotDo(t *testing.T) {
	for _, args := range [][]string{{"--scale=0"}, {"--scale=19"}, {"--scale=121"}, {"--scale=x"}, {"extra"}, {"--nope"}} {
		if code, out, errs := rehearse(t.Context(), t, standardDrill, args...); code != exitUsage || errs == "" || out != "" {
			t.Errorf("%v: exit code %d, stdout %q, stderr %q", args, code, out, errs)
		}
	}
	if code, out, errs := rehearse(t.Context(), t, standardDrill, "-h"); code != exitOK || !strings.Contains(out, "-scale") || errs != "" {
		t.Errorf("-h: exit code %d, stderr %q", code, errs)
	}
}

func TestScaledRulesDivideDurationsAndNothingElse(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"  expr: rate(x[5m]) > 14.4", "  expr: rate(x[5s]) > 14.4"},
		{"  for: 2m", "  for: 2s"},
		{`    for: "1h30m"`, `    for: "90s"`},
		{"    for: 0s", "    for: 0s"},
		{"    keep_firing_for: 1h", "    keep_firing_for: 60s"},
		{"    interval: 30s", "    interval: 500ms"},
		{"  - for: 15m", "  - for: 15s"},
		{"expr: max_over_time(job:rate5m:x[1d:1h])", "expr: max_over_time(job:rate5m:x[1440s:60s])"},
		{"expr: max_over_time(a[6h:])", "expr: max_over_time(a[360s:])"},
		{"expr: a offset 1h unless b offset -30m", "expr: a offset 60s unless b offset -30s"},
		{"expr: increase(a[3d]) + rate(b[1w]) + c[20ms]", "expr: increase(a[4320s]) + rate(b[10080s]) + c[1ms]"},
		{"      - record: job_slo:burn:rate5m", "      - record: job_slo:burn:rate5m"},
		{`      long: 1h`, `      long: 1h`},
		{`expr: x{window="1h"} == 5`, `expr: x{window="1h"} == 5`},
		{`expr: x{y=~"[5m]"}`, `expr: x{y=~"[5s]"}`}, // the one thing that text cannot tell
		{`  description: "Over [5m] and offset 1h."`, `  description: "Over [5m] and offset 1h."`},
		{"# rate(x[5m])", "# rate(x[5m])"},
		{"expr: histogram_quantile(0.99, x)", "expr: histogram_quantile(0.99, x)"},
		{"a: 1\nfor: 60m\nb: 2", "a: 1\nfor: 60s\nb: 2"},
	} {
		if got := scaleRules(c.in, 60); got != c.want {
			t.Errorf("%q becomes %q, want %q", c.in, got, c.want)
		}
		if got := scaleRules(c.in, 1); c.in != strings.ReplaceAll(got, "5400s", "1h30m") && durationsOf(got) != durationsOf(c.in) {
			t.Errorf("%q divided by 1 becomes %q", c.in, got)
		}
	}
}

// durationsOf is the sum of the durations in a text.
func durationsOf(text string) time.Duration {
	sum := time.Duration(0)
	for _, part := range durationPart.FindAllStringSubmatch(text, -1) {
		n, _ := strconv.Atoi(part[1])
		sum += time.Duration(n) * promUnits[part[2]]
	}
	return sum
}

// The shipped rules keep their number and their meaning, and Prometheus accepts them.
func TestShippedRulesScale(t *testing.T) {
	rules := alerts.Rules()
	if len(rules) == 0 {
		t.Fatal("no rules")
	}
	for name, text := range rules {
		for _, scale := range []int{1, 20, 60, 120} {
			scaled := scaleRules(text, scale)
			if a, b := strings.Count(text, "\n"), strings.Count(scaled, "\n"); a != b {
				t.Errorf("%s / %d: %d lines of %d", name, scale, b, a)
			}
			path := filepath.Join(t.TempDir(), name)
			if err := os.WriteFile(path, []byte(scaled), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("promtool", "check", "rules", path).CombinedOutput(); err != nil {
				t.Errorf("%s / %d: %v\n%s", name, scale, err, out)
			}
		}
		if scaled := scaleRules(text, 60); regexp.MustCompile(`\[[^\]]*[hdw]\]|for: [0-9]+[mhd]`).MatchString(scaled) {
			t.Errorf("%s: a duration was not scaled", name)
		}
	}
}
