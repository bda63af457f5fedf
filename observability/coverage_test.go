package observability_test

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/promql/parser"
)

// notDrawn are exported series that no panel shows, with the reason.
var notDrawn = map[string]string{
	"ratelimiter_request_latency_seconds_sum":          "a mean hides what quantiles show",
	"ratelimiter_redis_command_duration_seconds_sum":   "a mean hides what quantiles show",
	"ratelimiter_redis_command_duration_seconds_count": "calls are decisions over decisions per call, both of which are drawn",
	"ratelimiter_batch_entries_bucket":                 "the mean says how far calls are combined",
}

func TestEveryExportedMetricIsOnAPanelOrOnTheListOfExceptions(t *testing.T) {
	drawn := map[string]bool{}
	for _, b := range boards(t) {
		for _, p := range b.Panels {
			for _, q := range p.Targets {
				if e := parse(t, interpolate(q.Expr, everything)); e != nil {
					for _, sel := range parser.ExtractSelectors(e) {
						for _, m := range sel {
							if m.Name == nameLabel {
								drawn[m.Value] = true
							}
						}
					}
				}
			}
		}
	}
	c := exported(t)
	for name := range c {
		if strings.HasPrefix(name, "ratelimiter_") && !drawn[name] && notDrawn[name] == "" {
			t.Errorf("%s is on no panel, and no reason is given", name)
		}
	}
	for name := range notDrawn {
		if _, ok := c[name]; !ok || drawn[name] {
			t.Errorf("%s is listed as not drawn, but is drawn, or not exported", name)
		}
	}
}

var toDashboard = regexp.MustCompile(`/d/([a-z-]+)(?:\?|$)`)

// From the overview to the shard to the playbook, and back by the menu.
func TestLinksLeadToDashboardsAndVariablesThatExist(t *testing.T) {
	variables := map[string][]string{}
	for _, b := range boards(t) {
		for _, v := range b.Templating.List {
			variables[b.UID] = append(variables[b.UID], v.Name)
		}
	}
	check := func(where, link string) {
		m := toDashboard.FindStringSubmatch(link)
		if m == nil || variables[m[1]] == nil {
			t.Errorf("%s: %s leads to no dashboard of ours", where, link)
			return
		}
		for _, v := range regexp.MustCompile(`var-(\w+)=`).FindAllStringSubmatch(link, -1) {
			if !slices.Contains(variables[m[1]], v[1]) {
				t.Errorf("%s: %s has no variable %s", where, m[1], v[1])
			}
		}
	}
	for _, f := range ruleFiles(t) {
		for _, r := range f.rules() {
			if r.Alert != "" {
				check(r.Alert, r.Annotations["dashboard_url"])
			}
		}
	}
	for _, b := range boards(t) {
		toShards, toPlaybook, menu := 0, false, false
		walk(b.raw, func(key string, v any) {
			url, _ := v.(string)
			if key != "url" || url == "" {
				return
			}
			if strings.HasPrefix(url, "/d/") {
				check(b.file, url)
				toShards++
			}
			toPlaybook = toPlaybook || url+"#" == playbook
		})
		walk(b.raw, func(key string, v any) {
			menu = menu || key == "asDropdown" && v == true
		})
		if !toPlaybook || !menu {
			t.Errorf("%s: a link to the playbook (%v) or to the other dashboards (%v) is missing", b.file, toPlaybook, menu)
		}
		if b.UID == "ringfence-overview" && toShards < 3 {
			t.Errorf("%s: only %d panels lead to the shard", b.file, toShards)
		}
	}
}
