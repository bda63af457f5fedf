package observability_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The fixture is six hours of a service with two processes and four shards, written down
// in a second. In the first half all is well. In the second, shard eu-2 becomes slow, its
// breakers open for half an hour, and for a while one process loses eu-3.
const (
	fixtureStart  = 1767225600 // 2026-01-01 00:00 UTC
	fixtureStep   = 30         // seconds
	fixtureLength = 6 * 3600
	slowFrom      = 3*3600 + 1200
	openFrom      = slowFrom + 240
	openUntil     = openFrom + 1800
	cutFrom       = 4*3600 + 2400 // process b loses eu-3
	cutUntil      = cutFrom + 600
)

type fixture struct {
	families map[string]*family
	order    []string
	bounds   map[string][]float64 // of histograms
	sums     map[string]float64
	slow     map[string]float64 // entries of a server's slow log
}

type family struct {
	kind   string
	series map[string][]float64
	order  []string
}

// add puts a sample at the end of a series.
func (f *fixture) add(name, kind, series string, v float64) {
	fam := f.families[name]
	if fam == nil {
		fam = &family{kind: kind, series: map[string][]float64{}}
		f.families[name], f.order = fam, append(f.order, name)
	}
	if fam.series[series] == nil {
		fam.order = append(fam.order, series)
	}
	fam.series[series] = append(fam.series[series], v)
}

// write writes it as OpenMetrics, family by family as that wants it.
func (f *fixture) write(path string) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	w := bufio.NewWriter(file)
	for _, name := range f.order {
		fam := f.families[name]
		if fam.kind == "summary" {
			fam.kind = "unknown" // a quantile alone is no summary for promtool
		}
		fmt.Fprintf(w, "# TYPE %s %s\n", name, fam.kind)
		for _, s := range fam.order {
			for i, v := range fam.series[s] {
				if !math.IsNaN(v) { // there was no such series then
					fmt.Fprintf(w, "%s %s %d\n", s, strconv.FormatFloat(v, 'f', -1, 64), fixtureStart+i*fixtureStep)
				}
			}
		}
	}
	fmt.Fprintln(w, "# EOF")
	return w.Flush()
}

// histogramBounds are the bounds that limiters export, in order.
func histogramBounds(c catalog, name string) (bounds []float64) {
	for le := range c[name+"_bucket"].values["le"] {
		if v, err := strconv.ParseFloat(le, 64); err == nil && !math.IsInf(v, 0) {
			bounds = append(bounds, v)
		}
	}
	slices.Sort(bounds)
	return bounds
}

func makeFixture(c catalog) *fixture {
	f := &fixture{families: map[string]*family{}, bounds: map[string][]float64{}, sums: map[string]float64{}, slow: map[string]float64{}}
	for _, name := range []string{"ratelimiter_request_latency_seconds", "ratelimiter_redis_command_duration_seconds", "ratelimiter_batch_entries"} {
		f.bounds[name] = histogramBounds(c, name)
	}
	bounds := f.bounds["ratelimiter_request_latency_seconds"]
	shards := []struct {
		id     string
		weight float64
	}{{"eu-1", 1.0}, {"eu-2", 1.05}, {"eu-3", 0.97}, {"eu-4", 0.98}}
	errorTypes := []string{"timeout", "refused", "dial", "eof", "loading", "other"}
	sums := f.sums
	count := func(family, series string, add float64) {
		sums[series] += add
		v := sums[series]
		if !strings.HasSuffix(family, "_seconds") {
			v = math.Round(v)
		}
		f.add(family, "counter", series, v)
	}
	for n := range fixtureLength / fixtureStep {
		at := n * fixtureStep
		wave := 1 + 0.25*math.Sin(float64(at)/4000) + 0.02*math.Sin(float64(n)*1.7)
		for p, process := range []string{"a", "b"} {
			who := `job="checkout",instance="` + process + `:9090"`
			var decided, bad, slow, allowed, denied, open float64
			for s, shard := range shards {
				l := who + `,shard_id="` + shard.id + `"`
				rate := 420 * wave * shard.weight * (1 + 0.02*math.Sin(float64(n+7*s+3*p)))
				k := rate * fixtureStep
				isSlow := shard.id == "eu-2" && at >= slowFrom && at < openFrom
				isOpen := shard.id == "eu-2" && at >= openFrom && at < openUntil
				isCut := shard.id == "eu-3" && p == 1 && at >= cutFrom && at < cutUntil
				median, spread, fell := 210e-6*(1+0.05*float64(s)), 0.45, 0.0
				errs := map[string]float64{}
				if (n+5*s+11*p)%97 == 0 {
					errs["timeout"], fell = 1, 2 // a hiccup now and then
				}
				state := 0.0
				switch {
				case isSlow:
					median, spread, fell = 9e-3, 0.7, k*0.3
					errs["timeout"] = 40
				case isOpen, isCut:
					median, spread, fell, state = 9e-6, 0.5, k, 1
					errs["refused"], errs["dial"] = 5, 1
					if isOpen {
						errs["refused"], errs["timeout"] = 1, 5
					}
					if n%9 == 4 {
						state = 2
					}
				}
				f.add("ratelimiter_circuit_state", "gauge", "ratelimiter_circuit_state{"+l+"}", state)
				opened := 0.0
				if at == openFrom && shard.id == "eu-2" || at == cutFrom && isCut {
					opened = 1
				}
				count("ratelimiter_circuit_transitions", `ratelimiter_circuit_transitions_total{`+l+`,from="closed",to="open"}`, opened)
				reason := "breaker"
				if state == 0 {
					reason = "budget"
				}
				for _, r := range []string{"breaker", "budget"} {
					for _, mode := range []string{"open", "share"} {
						add := 0.0
						if r == reason && (mode == "open") == (shard.id == "eu-3") {
							add = fell
						}
						count("ratelimiter_fallback_decisions", `ratelimiter_fallback_decisions_total{`+l+`,mode="`+mode+`",reason="`+r+`"}`, add)
					}
				}
				for _, e := range errorTypes {
					count("ratelimiter_redis_errors", `ratelimiter_redis_errors_total{`+l+`,error_type="`+e+`"}`, errs[e])
				}
				f.addShard(count, shardMoment{labels: l, id: shard.id, n: n, p: p, decisions: k, fell: fell, state: state, slow: isSlow,
					opened: opened, median: median, spread: spread, share: shard.weight / 4})
				deny := 0.04 + 0.01*math.Sin(float64(at)/1500)
				if isOpen {
					deny = 0.15
				}
				for outcome, part := range map[string]float64{"allowed": 1 - deny, "denied": deny, "canceled": 0.0002} {
					lo := l + `,outcome="` + outcome + `"`
					const name = "ratelimiter_request_latency_seconds"
					bucket := func(le string, part float64) {
						series := name + `_bucket{` + lo + `,le="` + le + `"}`
						sums[series] += part
						f.add(name, "histogram", series, math.Round(sums[series]))
					}
					for _, b := range bounds {
						cdf := 0.5 * math.Erfc(-math.Log(b/median)/spread/math.Sqrt2)
						if b >= 0.025 {
							cdf = 1 // nobody waits beyond the budget
						}
						bucket(strconv.FormatFloat(b, 'g', -1, 64), k*part*cdf)
						if b == 0.005 && outcome != "canceled" {
							slow += k * part * (1 - cdf)
						}
					}
					bucket("+Inf", k*part)
					sums[name+lo] += k * part
					f.add(name, "histogram", name+`_count{`+lo+`}`, math.Round(sums[name+lo]))
					f.add(name, "histogram", name+`_sum{`+lo+`}`, sums[name+lo]*median)
				}
				decided, bad, allowed, denied = decided+k, bad+fell, allowed+k*(1-deny), denied+k*deny
				if shard.id == "eu-3" {
					open += fell
				}
			}
			slow *= 0.9999 // the last hiccups are rounded away
			for _, limit := range fixtureLimits {
				part := limit.part
				// Callers that are denied come again at once, but for those of export; what the
				// primary denied is repeated without asking it.
				cached := (denied - bad*0.15) * 0.6 * (1 + 0.1*math.Sin(float64(n)/30+part*20)) * isTrue(limit.name != "export")
				known := allowed - bad*0.85 // by the primary, now or ahead
				leased := known * limit.leased
				l := who + `,limit="` + limit.name + `"`
				for _, x := range []struct {
					outcome, source string
					add             float64
				}{
					{"allowed", "primary", known - leased}, {"denied", "primary", denied - bad*0.15 - cached},
					{"denied", "cache", cached}, {"allowed", "lease", leased},
					{"allowed", "replica", (bad - open) * 0.85}, {"denied", "replica", (bad - open) * 0.15},
					{"allowed", "policy", open}, {"denied", "policy", 0}, {"allowed", "local", 0}, {"denied", "local", 0},
					{"error", "none", 3}, {"canceled", "none", decided * 0.0002},
				} {
					count("ratelimiter_decisions", `ratelimiter_decisions_total{`+l+`,outcome="`+x.outcome+`",source="`+x.source+`"}`, part*math.Max(0, x.add))
				}
				f.addLimit(count, l, limit, part*decided, part*allowed, part*cached, part*leased, n)
			}
			f.addProcess(count, who, n, p, decided, bad)
			for name, b := range map[string]float64{"redis_availability": bad, "decision_latency": slow} {
				l := who + `,slo_name="` + name + `"}`
				count("ratelimiter_slo_events", `ratelimiter_slo_events_total{`+l, decided)
				count("ratelimiter_error_budget_consumed", `ratelimiter_error_budget_consumed_total{`+l, b)
				f.add("ratelimiter_slo_objective_ratio", "gauge", `ratelimiter_slo_objective_ratio{`+l, 0.999)
			}
		}
	}
	return f
}

func TestTheFixtureHoldsOnlyWhatALimiterExports(t *testing.T) {
	c := exported(t)
	for _, family := range makeFixture(c).families {
		for _, s := range family.order {
			if strings.HasPrefix(s, "ALERTS{") {
				continue // they have whatever labels the rules give them
			}
			if e := parse(t, s); e != nil {
				for _, bad := range c.check(e) {
					t.Errorf("%s: %s", s, bad)
				}
			}
		}
	}
}

// history is a Prometheus that has seen the fixture.
type history struct{ url string }

func startHistory(t testing.TB) history {
	t.Helper()
	dir := t.TempDir()
	text, blocks, config := filepath.Join(dir, "fixture.txt"), filepath.Join(dir, "blocks"), filepath.Join(dir, "prometheus.yml")
	if err := makeFixture(exported(t)).write(text); err != nil {
		t.Fatal(err)
	}
	if out, err := promtool("tsdb", "create-blocks-from", "openmetrics", text, blocks); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.WriteFile(config, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	h := history{startDaemon(t, listening, "prometheus", "--config.file="+config, "--storage.tsdb.path="+blocks, "--storage.tsdb.retention.time=100y",
		"--web.listen-address=127.0.0.1:0", "--log.format=logfmt")}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) { // it says when, but only to those who ask
		r, err := http.Get(h.url + "/-/ready")
		if err == nil {
			_ = r.Body.Close()
			if r.StatusCode == http.StatusOK {
				return h
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("prometheus is not ready after a minute: %v", err)
		}
	}
}

var listening = regexp.MustCompile(`msg="Listening on" address=(127\.0\.0\.1:\d+)`)

// ask returns the values of each series of a query between two times, gaps left out.
func (h history) ask(expr string, from, to int) (map[string][]float64, error) {
	q := url.Values{"query": {expr}, "start": {strconv.Itoa(fixtureStart + from)}, "end": {strconv.Itoa(fixtureStart + to)}, "step": {"60"}}
	r, err := http.Get(h.url + "/api/v1/query_range?" + q.Encode())
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct {
			Result []struct {
				Metric map[string]string
				Values [][2]any
			}
		}
	}
	if err := json.NewDecoder(r.Body).Decode(&answer); err != nil {
		return nil, err
	}
	if answer.Status != "success" {
		return nil, fmt.Errorf("%s", answer.Error)
	}
	out := map[string][]float64{}
	for _, s := range answer.Data.Result {
		for _, v := range s.Values {
			if x, err := strconv.ParseFloat(fmt.Sprint(v[1]), 64); err == nil && !math.IsNaN(x) && !math.IsInf(x, 0) {
				out[fmt.Sprint(s.Metric)] = append(out[fmt.Sprint(s.Metric)], x)
			}
		}
	}
	return out, nil
}

// meant is what some panels must show in the calm and in the incident half: the least
// and the greatest value of any series.
var meant = map[string][2]func(least, most float64) bool{
	"Availability, last hour A": {
		func(least, most float64) bool { return least > 0.999 && most <= 1 },
		func(least, _ float64) bool { return least > 0.5 && least < 0.95 }},
	"p99 latency A": {
		func(_, most float64) bool { return most < 0.001 },
		func(_, most float64) bool { return most > 0.005 && most <= 0.025 }},
	"Shards open A": {
		func(_, most float64) bool { return most == 0 },
		func(least, most float64) bool { return least == 0 && most == 1 }},
	"By fallback A": {
		func(_, most float64) bool { return most < 0.001 },
		func(_, most float64) bool { return most > 0.2 && most < 0.3 }},
	"Burn rate: availability A": {
		func(_, most float64) bool { return most < 1 },
		func(_, most float64) bool { return most > 14.4 }},
	"Burn rate: latency A": {
		func(_, most float64) bool { return most < 1 },
		func(_, most float64) bool { return most > 14.4 }},
	"Circuit breakers A": {
		func(_, most float64) bool { return most == 0 },
		func(least, most float64) bool { return least == 0 && most == 1 }},
	// Of a shard that is away nothing is taken ahead.
	"Answered out of leases A": {
		func(least, most float64) bool { return least > 0.56 && most < 0.6 },
		func(least, most float64) bool { return least > 0.4 && least < 0.48 && most < 0.6 }},
	"Leased units that went back unused A": {
		func(least, most float64) bool { return least > 0.2 && most < 0.3 },
		func(least, most float64) bool { return least > 0.2 && most < 0.3 }},
	"Imbalance A": {
		func(least, most float64) bool { return least > 0.9 && most < 1.1 },
		func(least, most float64) bool { return least > 0.9 && most < 1.1 }},
}

func TestEveryPanelShowsSomethingInCalmAndInIncidentHours(t *testing.T) {
	h := startHistory(t)
	halves := []struct {
		name     string
		from, to int
	}{{"calm", 3600, slowFrom - 60}, {"incident", slowFrom, fixtureLength - fixtureStep}}
	looked := 0
	for _, b := range boards(t) {
		for where, expr := range b.asked() {
			if strings.HasPrefix(where, "variable") {
				continue
			}
			for i, half := range halves {
				got, err := h.ask(interpolate(expr, everything), half.from, half.to)
				if err != nil {
					t.Fatalf("%s: %v", where, err)
				}
				if strings.HasPrefix(where, "annotation") {
					if (len(got) > 0) != (half.name == "incident") {
						t.Errorf("%s, %s: %d series", where, half.name, len(got))
					}
					continue
				}
				least, most := math.Inf(1), math.Inf(-1)
				for _, values := range got {
					least, most = min(least, slices.Min(values)), max(most, slices.Max(values))
				}
				if len(got) == 0 {
					t.Errorf("%s: %q shows nothing in the %s hours", b.file, where, half.name)
				}
				if check, ok := meant[where]; ok {
					looked++
					if !check[i](least, most) {
						t.Errorf("%s: %q, %s: from %v to %v", b.file, where, half.name, least, most)
					}
				}
			}
		}
	}
	if looked != 2*len(meant) {
		t.Errorf("only %d of %d expectations were looked at", looked, 2*len(meant))
	}
}
