package observability

import (
	"fmt"

	"github.com/grafana/grafana-foundation-sdk/go/common"
)

// slos are the SLOs and what their events are.
var slos = []struct{ name, short string }{
	{"redis_availability", "Availability"},
	{"decision_latency", "Latency"},
}

// SLO is the dashboard of the promises: how much may go wrong, how much did, and how long
// the rest lasts.
func SLO() (classic, error) {
	l := newLayout("Ringfence / SLO", "ringfence-slo",
		"The two promises, redis_availability and decision_latency: objective, events, bad events, how fast the error budget is spent over each pair of windows that an alert watches, and when it will be gone.",
		"slo")
	const (
		bad       = `ratelimiter_error_budget_consumed_total{` + process + `}`
		events    = `ratelimiter_slo_events_total{` + process + `}`
		objective = `max by (slo_name) (ratelimiter_slo_objective_ratio{` + process + `})`
		left      = `1 - sum by (slo_name) (increase(` + bad + `[30d])) / sum by (slo_name) (increase(` + events + `[30d])) / (1 - ` + objective + `)`
		burn6h    = `sum by (slo_name) (rate(` + bad + `[6h])) / sum by (slo_name) (rate(` + events + `[6h])) / (1 - ` + objective + `)`
		answered  = `{` + ofShards + `,outcome=~"allowed|denied"`
	)

	l.row("Now")
	l.number(panel{
		title: "Objective", w: 4, h: 5, unit: "percentunit", noData: "no SLO exported",
		about:   "Part of the events that must be good, as the processes export it. The alerts read the same metric.",
		queries: []query{{objective, "{{slo_name}}"}},
	}, 2, steps("text"))
	l.number(panel{
		title: "Events, 30 days", w: 4, h: 5, unit: "short", noData: "no decisions",
		about:   "Decisions that count for the SLO in the last 30 days or since the metrics began.",
		queries: []query{{`sum by (slo_name) (increase(` + events + `[30d]))`, "{{slo_name}}"}},
	}, 1, steps("text"))
	l.number(panel{
		title: "Bad events, 30 days", w: 4, h: 5, unit: "short", noData: "no decisions",
		about:   "Decisions that broke the promise: made by another than the primary (redis_availability), or slower than Config.LatencyObjective (decision_latency).",
		queries: []query{{`sum by (slo_name) (increase(` + bad + `[30d]))`, "{{slo_name}}"}},
	}, 1, steps("text"))
	l.number(panel{
		title: "Budget left, 30 days", w: 4, h: 5, unit: "percentunit", noData: "no decisions",
		about:   "What is left of the bad events that the SLO allows. Below zero the promise is broken; then only a better month helps.",
		queries: []query{{left, "{{slo_name}}"}},
	}, 1, steps("red", step{0, "orange"}, step{0.25, "green"}))
	l.number(panel{
		title: "Time to exhaustion", w: 4, h: 5, unit: "s", noData: "nothing is being spent",
		about:   "How long the rest of the budget lasts at the pace of the last 6 hours. 0: it is gone.",
		queries: []query{{`clamp_min(` + left + `, 0) * 2592000 / ((` + burn6h + `) > 0)`, "{{slo_name}}"}},
	}, 1, steps("red", step{86400, "orange"}, step{864000, "green"}))
	l.number(panel{
		title: "Within 0.2 ms", w: 4, h: 5, unit: "percentunit", noData: "no decisions",
		about:   "Part of the callers of the last hour that waited at most 0.2 ms for a decision: about one round trip to a Redis nearby.",
		queries: []query{{`sum(rate(ratelimiter_request_latency_seconds_bucket` + answered + `,le="0.0002"}[1h])) / sum(rate(ratelimiter_request_latency_seconds_count` + answered + `}[1h]))`, "within"}},
	}, 1, steps("text"))

	for _, slo := range slos {
		l.row(slo.short + ": burn rate by pair of windows")
		for _, w := range BurnWindows {
			p := panel{
				title: fmt.Sprintf("%s %s / %s", slo.short, w.Long, w.Short), w: 6, h: 7, unit: "suffix:x", noData: "no decisions",
				about: fmt.Sprintf("The %s of %s fires when both lines are above %g for %s: the long one shows that it matters, the short one that it still goes on. Values below 0.01 are drawn as 0.01.", w.Severity, slo.name, w.Burn, w.For),
			}
			for _, window := range []string{w.Long, w.Short} {
				sel := process + `,slo_name="` + slo.name + `"`
				p.queries = append(p.queries, query{
					fmt.Sprintf(`clamp_min(sum(rate(ratelimiter_error_budget_consumed_total{%s}[%s])) / sum(rate(ratelimiter_slo_events_total{%s}[%s])) / (1 - max(ratelimiter_slo_objective_ratio{%s})), 0.01)`,
						sel, window, sel, window, sel),
					window})
			}
			b := l.lines(p).ScaleDistribution(logarithmic()).Min(0.01).AxisSoftMax(100).
				Thresholds(steps("transparent", step{w.Burn, "red"})).
				ThresholdsStyle(common.NewGraphThresholdsStyleConfigBuilder().Mode(common.GraphThresholdsStyleModeDashed))
			painted(b, w.Long, "orange")
			painted(b, w.Short, "blue")
			l.add(b)
		}
	}

	l.row("Over time")
	l.add(l.lines(panel{
		title: "Error budget left over time", w: 8, h: 8, unit: "percentunit", noData: "no decisions",
		about:   "The budget of 30 days as it was left at each moment. A step down is an incident; it recovers when the incident is 30 days old.",
		queries: []query{{left, "{{slo_name}}"}},
	}))
	l.plot(panel{
		title: "Bad events by process", w: 8, h: 8, unit: "ops", noData: "no decisions",
		about:   "Bad events a second. One process alone points at that process or its network, all of them at a shard.",
		queries: []query{{perSecond("slo_name, instance", bad), "{{slo_name}} {{instance}}"}},
	})
	speed := panel{
		title: "Decisions within a time", w: 8, h: 8, unit: "percentunit", noData: "no decisions",
		about: "Part of the callers that waited at most so long, whoever decided.",
	}
	for _, le := range [][2]string{{"0.0002", "0.2 ms"}, {"0.0005", "0.5 ms"}, {"0.001", "1 ms"}, {"0.005", "5 ms"}} {
		speed.queries = append(speed.queries, query{
			`sum(rate(ratelimiter_request_latency_seconds_bucket` + answered + `,le="` + le[0] + `"}[$__rate_interval])) / sum(rate(ratelimiter_request_latency_seconds_count` + answered + `}[$__rate_interval]))`,
			le[1]})
	}
	l.add(l.lines(speed).Min(0).Max(1))
	return l.build()
}
