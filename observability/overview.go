package observability

import (
	"fmt"
	"time"

	"github.com/grafana/grafana-foundation-sdk/go/common"
)

// BurnWindow is a pair of windows over which an SLO's error budget is watched, and how
// many times faster than planned it may be spent. The alerts use the same.
type BurnWindow struct {
	// Long is the window that shows that it matters, Short that it still goes on.
	Long, Short string
	// Burn is the rate above which the alert fires: at 14.4 the budget of 30 days is
	// gone in 30 / 14.4 = 2.08 days.
	Burn float64
	// For is how long it must last.
	For time.Duration
	// Severity is "page" or "ticket".
	Severity string
}

// BurnWindows are the four pairs for an SLO over 30 days.
var BurnWindows = []BurnWindow{
	{"1h", "5m", 14.4, 2 * time.Minute, "page"},
	{"6h", "30m", 6, 15 * time.Minute, "page"},
	{"1d", "2h", 3, time.Hour, "ticket"},
	{"3d", "6h", 1, 3 * time.Hour, "ticket"},
}

// Overview is the dashboard to look at first: is the service's promise kept, and if not,
// which shard is it.
func Overview() (classic, error) {
	l := newLayout("Ringfence / Overview", "ringfence-overview",
		"Is the limiter's promise kept, and if not: which shard, which error, who answers instead. The sections of alerts/playbook.md begin here.",
		"overview")
	const (
		bad      = `ratelimiter_error_budget_consumed_total{` + process
		events   = `ratelimiter_slo_events_total{` + process
		answered = `ratelimiter_request_latency_seconds_count{` + ofShards + `,outcome=~"allowed|denied"}`
		buckets  = `ratelimiter_request_latency_seconds_bucket{` + ofShards + `,outcome=~"allowed|denied"}`
	)

	l.row("Now")
	l.number(panel{
		title: "Availability, last hour", w: 4, h: 4, unit: "percentunit", noData: "no decisions",
		about: "Part of the decisions that the shard's primary made within the budget. A decision counts as bad when a replica, a local share or the failure policy had to answer, so an outage looks no better once the breaker is open. Objective: 99.9 %.",
		queries: []query{{
			`1 - sum(rate(` + bad + `,slo_name="redis_availability"}[1h])) / sum(rate(` + events + `,slo_name="redis_availability"}[1h]))`,
			"availability"}},
	}, 3, steps("red", step{0.99, "orange"}, step{0.999, "green"}))
	l.number(panel{
		title: "Error budget left, 30 days", w: 5, h: 4, unit: "percentunit", noData: "no decisions",
		about: "What is left of the bad events that each SLO allows in 30 days, from the events of the last 30 days or since the metrics began. Below zero the promise is broken.",
		queries: []query{{
			`1 - sum by (slo_name) (increase(` + bad + `}[30d])) / sum by (slo_name) (increase(` + events + `}[30d])) / (1 - max by (slo_name) (ratelimiter_slo_objective_ratio{` + process + `}))`,
			"{{slo_name}}"}},
	}, 1, steps("red", step{0, "orange"}, step{0.25, "green"}))
	l.number(panel{
		title: "p99 latency", w: 3, h: 4, unit: "s", noData: "no decisions",
		about: "99 of 100 callers waited at most this long for a decision, whoever made it.",
		queries: []query{{
			`histogram_quantile(0.99, sum by (le) (rate(` + buckets + `[$__rate_interval])))`,
			"p99"}},
	}, 2, steps("green", step{0.005, "orange"}, step{0.02, "red"}))
	l.number(panel{
		title: "Denied", w: 3, h: 4, unit: "percentunit", noData: "no decisions",
		about: "Part of the decisions that denied. Being denied is a success of the limiter; a jump means a caller gone wild, a limit set too low, or a shard whose policy is closed.",
		queries: []query{{
			`sum(rate(ratelimiter_decisions_total{` + process + `,outcome="denied"}[$__rate_interval])) / sum(rate(ratelimiter_decisions_total{` + process + `,outcome=~"allowed|denied"}[$__rate_interval]))`,
			"denied"}},
	}, 2, steps("text"))
	l.number(panel{
		title: "Shards open", w: 3, h: 4, unit: "short", noData: "no shards",
		about: "Shards whose circuit breaker is not closed in at least half of the processes. Their keys are answered by the ladder of fallbacks.",
		queries: []query{{
			`sum((avg by (shard_id) (ratelimiter_circuit_state{` + ofShards + `} != bool 0)) >= bool 0.5)`,
			"open"}},
	}, 0, steps("green", step{1, "red"}))
	l.number(panel{
		title: "By fallback", w: 3, h: 4, unit: "percentunit", noData: "no decisions",
		about: "Part of the decisions that a replica, a local share or the failure policy made. They are not exact.",
		queries: []query{{
			`sum(rate(ratelimiter_fallback_decisions_total{` + ofShards + `}[$__rate_interval])) / sum(rate(` + answered + `[$__rate_interval]))`,
			"fallback"}},
	}, 2, steps("green", step{0.0001, "orange"}, step{0.01, "red"}))

	l.number(panel{
		title: "Alerts firing", w: 3, h: 4, unit: "short", noData: "no rules",
		about: "Alerts of ringfence that fire for the jobs shown, pages and tickets. It needs the rules of alerts/; without them it shows 0.",
		queries: []query{{
			`count(ALERTS{alertname=~"Ringfence.+",alertstate="firing",job=~"$job"}) or vector(0)`,
			"firing"}},
	}, 0, steps("green", step{1, "red"}))

	l.row("Error budget")
	for _, slo := range []struct{ name, title, about string }{
		{"redis_availability", "Burn rate: availability", "How many times faster than planned the error budget of redis_availability is spent."},
		{"decision_latency", "Burn rate: latency", "How many times faster than planned the error budget of decision_latency (decisions slower than Config.LatencyObjective, 5 ms by default) is spent."},
	} {
		p := panel{
			title: slo.title, w: 12, h: 8, unit: "suffix:x", noData: "no decisions",
			about: slo.about + " At 1 it is gone after 30 days. The lines at 1, 3, 6 and 14.4 are where the alert fires for the windows 3d, 1d, 6h and 1h. Burn rates below 0.01 are drawn as 0.01.",
		}
		for _, w := range BurnWindows {
			p.queries = append(p.queries, query{
				fmt.Sprintf(`clamp_min(sum(rate(%s,slo_name="%s"}[%s])) / sum(rate(%s,slo_name="%s"}[%s])) / (1 - max(ratelimiter_slo_objective_ratio{%s,slo_name="%s"})), 0.01)`,
					bad, slo.name, w.Long, events, slo.name, w.Long, process, slo.name),
				w.Long})
		}
		b := l.lines(p).ScaleDistribution(logarithmic()).Min(0.01).
			Thresholds(steps("transparent", step{1, "yellow"}, step{3, "orange"}, step{6, "semi-dark-red"}, step{14.4, "dark-red"})).
			ThresholdsStyle(common.NewGraphThresholdsStyleConfigBuilder().Mode(common.GraphThresholdsStyleModeDashed))
		for _, c := range [][2]string{{"1h", "red"}, {"6h", "orange"}, {"1d", "yellow"}, {"3d", "blue"}} {
			painted(b, c[0], c[1])
		}
		l.add(b)
	}

	l.row("Shards")
	l.timeline(panel{
		title: "Circuit breakers", w: 12, h: 8, unit: "percentunit", noData: "no shards",
		about: "Each shard: the part of the processes whose breaker is not closed (open, or half-open while it probes). One process alone points at that process or its network; most of them at the shard.",
		queries: []query{{
			`avg by (shard_id) (ratelimiter_circuit_state{` + ofShards + `} != bool 0)`,
			"{{shard_id}}"}},
	},
		span(0, 0, "closed", "green", 0),
		span(0.0001, 0.4999, "open in some", "yellow", 1),
		span(0.5, 0.9999, "open in most", "orange", 2),
		span(1, 1, "open", "red", 3))
	l.add(l.lines(panel{
		title: "p99 latency by shard", w: 12, h: 8, unit: "s", noData: "no decisions",
		about: "What 99 of 100 callers waited at most, by the shard that owns the key. Callers never wait longer than the budget (20 ms by default); when a breaker opens, the line drops below that of a healthy shard, because nobody is asked.",
		queries: []query{{
			`histogram_quantile(0.99, sum by (shard_id, le) (rate(` + buckets + `[$__rate_interval])))`,
			"{{shard_id}}"}},
	}).ScaleDistribution(logarithmic()).DataLinks(toShard()))
	l.add(l.lines(panel{
		title: "Errors by type", w: 12, h: 8, unit: "ops", noData: "no errors",
		about: "Operations that failed, a second, by kind. timeout: the server or the network is slow; refused, dial, eof: it is gone; loading, readonly, masterdown: it is restarting or was demoted; auth, noperm: its ACL refuses us; pool_timeout: our own connections are used up. Kinds that did not occur are not drawn.",
		queries: []query{{
			`sum by (error_type) (rate(ratelimiter_redis_errors_total{` + ofShards + `}[$__rate_interval])) > 0`,
			"{{error_type}}"}},
	}).Min(0).LineWidth(0).FillOpacity(70).Stacking(stacked()))
	l.add(l.lines(panel{
		title: "Imbalance", w: 12, h: 8, unit: "suffix:x", noData: "no decisions",
		about: "Decisions of each shard over the mean of all shards shown. 1 is even. A shard that stays above 1.3 without a larger weight has hot keys, or somebody aims keys at it (set Config.HashKey).",
		queries: []query{{
			`sum by (shard_id) (rate(` + answered + `[$__rate_interval])) / on () group_left () avg(sum by (shard_id) (rate(` + answered + `[$__rate_interval])))`,
			"{{shard_id}}"}},
	}).Min(0).AxisSoftMax(2).DataLinks(toShard()))

	l.row("Traffic")
	traffic := l.lines(panel{
		title: "Decisions by outcome", w: 12, h: 8, unit: "ops", noData: "no decisions",
		about: "Decisions a second. error: the call was wrong (empty key, cost too high, ring closed); canceled: the caller's own context ended.",
		queries: []query{{
			`sum by (outcome) (rate(ratelimiter_decisions_total{` + process + `}[$__rate_interval]))`,
			"{{outcome}}"}},
	}).Min(0).LineWidth(0).FillOpacity(70).Stacking(stacked())
	for _, c := range [][2]string{{"allowed", "green"}, {"denied", "yellow"}, {"error", "red"}, {"canceled", "text"}} {
		painted(traffic, c[0], c[1])
	}
	l.add(traffic)
	sources := l.lines(panel{
		title: "Decisions by source", w: 12, h: 8, unit: "ops", noData: "no decisions",
		about: "Who decided, decisions a second. Only primary is exact; cache: a denial of the primary, repeated here for as long as it holds; lease: out of units that this process took from the primary ahead; replica: this process's share of what a replica said was left; local: limit / Config.Instances; policy: nobody knew, the failure policy admitted or denied; none: the call was wrong or canceled.",
		queries: []query{{
			`sum by (source) (rate(ratelimiter_decisions_total{` + process + `}[$__rate_interval]))`,
			"{{source}}"}},
	}).Min(0).LineWidth(0).FillOpacity(70).Stacking(stacked())
	for _, c := range [][2]string{{"primary", "green"}, {"cache", "yellow"}, {"lease", "dark-green"}, {"replica", "blue"}, {"local", "purple"}, {"policy", "orange"}, {"none", "text"}} {
		painted(sources, c[0], c[1])
	}
	l.add(sources)

	return l.build()
}
