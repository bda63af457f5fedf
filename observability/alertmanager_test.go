package observability_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

const alertmanagerConfig = alerts + "/alertmanager.example.yml"

func amtool(args ...string) (string, error) {
	out, err := exec.Command("amtool", args...).Output()
	return strings.TrimSpace(string(out)), err
}

func TestPagesGoToThePagerAndTicketsToTheTickets(t *testing.T) {
	if out, err := amtool("check-config", alertmanagerConfig); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	wanted := map[string]string{"page": "pager", "ticket": "tickets"}
	routed := map[string]int{}
	for _, f := range ruleFiles(t) {
		for _, r := range f.rules() {
			if r.Alert == "" {
				continue
			}
			out, err := amtool("config", "routes", "test", "--config.file="+alertmanagerConfig,
				"alertname="+r.Alert, "severity="+r.Labels["severity"], "job=checkout")
			if want := wanted[r.Labels["severity"]]; err != nil || out != want {
				t.Errorf("%s (%s) goes to %q, want %q: %v", r.Alert, r.Labels["severity"], out, want, err)
			}
			routed[out]++
		}
	}
	if routed["pager"] == 0 || routed["tickets"] == 0 {
		t.Errorf("routed: %v", routed)
	}
	if out, err := amtool("config", "routes", "test", "--config.file="+alertmanagerConfig, "alertname=DiskFull", "severity=page"); err != nil || out != "default" {
		t.Errorf("an alert of others goes to %q: %v", out, err)
	}
}

// startAlertmanager starts an Alertmanager with the example and returns its address.
func startAlertmanager(t testing.TB) string {
	t.Helper()
	return startDaemon(t, alertmanagerListens, "prometheus-alertmanager", "--config.file="+alertmanagerConfig, "--storage.path="+t.TempDir(),
		"--web.listen-address=127.0.0.1:0", "--cluster.listen-address=", "--log.format=logfmt")
}

var alertmanagerListens = regexp.MustCompile(`address=(127\.0\.0\.1:\d+)`)

type amAlert struct {
	Labels map[string]string `json:"labels"`
	Status struct {
		State string `json:"state"`
	} `json:"status"`
}

// post hands alerts of an incident to Alertmanager.
func post(t *testing.T, base, incident string, alerts []map[string]string) {
	t.Helper()
	var body []amAlert
	for _, l := range alerts {
		l["incident"] = incident
		body = append(body, amAlert{Labels: l})
	}
	text, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.Post(base+"/api/v2/alerts", "application/json", bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	_ = r.Body.Close()
	if r.StatusCode != http.StatusOK {
		t.Fatalf("posting alerts: %s", r.Status)
	}
}

// inhibited posts alerts of an incident, and says which of them are held back. What holds
// back what is worked out after the posting, in the order of posting; so a last pair of
// which one certainly holds back the other tells when that is over.
func inhibited(t *testing.T, base, incident string, posted []map[string]string) []string {
	t.Helper()
	post(t, base, incident, posted)
	last := incident + ", over"
	pair := func(severity string) map[string]string {
		return map[string]string{"alertname": "RingfenceErrorBudgetBurn", "severity": severity, "job": last, "ring": "x", "slo_name": "redis_availability"}
	}
	post(t, base, last, []map[string]string{pair("page"), pair("ticket")})
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) { // it says when, but only to those who ask
		_, over, whole := heldBack(t, base, last)
		held, all, processed := heldBack(t, base, incident)
		if whole && over == 2 && processed && all == len(posted) {
			if sign, _, _ := heldBack(t, base, last); len(sign) == 1 {
				held, _, _ = heldBack(t, base, incident) // as of after the sign
				return held
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("alerts are not processed after half a minute: %d of %d, held back %v", all, len(posted), held)
		}
	}
}

// heldBack is which alerts of an incident are held back, how many there are, and whether
// all of them have been processed.
func heldBack(t *testing.T, base, incident string) (held []string, all int, processed bool) {
	t.Helper()
	r, err := http.Get(base + "/api/v2/alerts?" + url.Values{"filter": {`incident="` + incident + `"`}}.Encode())
	if err != nil {
		t.Fatal(err)
	}
	var got []amAlert
	err = json.NewDecoder(r.Body).Decode(&got)
	_ = r.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	processed = true
	for _, a := range got {
		processed = processed && a.Status.State != "unprocessed"
		if a.Status.State == "suppressed" {
			held = append(held, fmt.Sprint(a.Labels["alertname"], " ", a.Labels["severity"], " ", a.Labels["slo_name"], a.Labels["shard_id"]))
		}
	}
	slices.Sort(held)
	return held, len(got), processed
}

func TestAPageHoldsBackWhatItExplainsAndNothingElse(t *testing.T) {
	base := startAlertmanager(t)
	alert := func(job, ring, name, severity, label, value string) map[string]string {
		return map[string]string{"alertname": "Ringfence" + name, "severity": severity, "job": job, "ring": ring, label: value}
	}
	const burn, page, ticket = "ErrorBudgetBurn", "page", "ticket"
	for _, c := range []struct {
		name   string
		alerts []map[string]string
		held   []string
	}{
		{"a ticket alone", []map[string]string{
			alert("a1", "x", burn, ticket, "slo_name", "redis_availability"),
			alert("a1", "x", "ErrorBudgetLow", ticket, "slo_name", "redis_availability"),
		}, nil},
		{"a page and tickets", []map[string]string{
			alert("a2", "x", burn, page, "slo_name", "redis_availability"),
			alert("a2", "x", burn, ticket, "slo_name", "redis_availability"),
			alert("a2", "x", "ErrorBudgetLow", ticket, "slo_name", "redis_availability"),
			alert("a2", "x", burn, ticket, "slo_name", "decision_latency"),
			alert("a2", "y", burn, ticket, "slo_name", "redis_availability"),
			alert("b2", "x", burn, ticket, "slo_name", "redis_availability"),
			alert("a2", "x", "FailingOpen", ticket, "shard_id", "s1"),
		}, []string{"RingfenceErrorBudgetBurn ticket redis_availability", "RingfenceErrorBudgetLow ticket redis_availability"}},
		{"many shards", []map[string]string{
			alert("a3", "x", "ShardsOpen", page, "none", ""),
			alert("a3", "x", "ShardOpen", ticket, "shard_id", "s1"),
			alert("a3", "x", "ShardFlapping", ticket, "shard_id", "s2"),
			alert("a3", "x", "FallbackActive", ticket, "shard_id", "s3"),
			alert("a3", "x", "FailingOpen", ticket, "shard_id", "s1"),
			alert("a3", "y", "ShardOpen", ticket, "shard_id", "s1"),
			alert("b3", "x", "ShardOpen", ticket, "shard_id", "s1"),
		}, []string{"RingfenceFallbackActive ticket s3", "RingfenceShardFlapping ticket s2", "RingfenceShardOpen ticket s1"}},
		{"one shard", []map[string]string{
			alert("a4", "x", "ShardOpen", ticket, "shard_id", "s1"),
			alert("a4", "x", "FallbackActive", ticket, "shard_id", "s1"),
			alert("a4", "x", "FallbackActive", ticket, "shard_id", "s2"),
			alert("a4", "y", "FallbackActive", ticket, "shard_id", "s1"),
			alert("a4", "x", "FailingOpen", ticket, "shard_id", "s1"),
		}, []string{"RingfenceFallbackActive ticket s1"}},
	} {
		if got := inhibited(t, base, c.name, c.alerts); !slices.Equal(got, c.held) {
			t.Errorf("%s: held back\n%q, want\n%q", c.name, got, c.held)
		}
	}
}

func TestTheExampleNamesAlertsThatExist(t *testing.T) {
	known := map[string]bool{}
	for _, f := range ruleFiles(t) {
		for _, r := range f.rules() {
			known[r.Alert] = true
		}
	}
	text := readFile(t, alertmanagerConfig)
	names := regexp.MustCompile(`Ringfence[A-Za-z]+`).FindAllString(text, -1)
	if len(names) < 5 {
		t.Errorf("only %d alerts are named", len(names))
	}
	for _, name := range names {
		if !known[name] {
			t.Errorf("%s is no alert", name)
		}
	}
}
