package observability_test

import (
	"fmt"
	"strings"
)

// An alert about a cause is a condition on a few series of something: a shard, a limit.
// What all of them must do is the same, so it is written once, in terms of how far the
// thing is from the alert's threshold: 1 is exactly there.

// thing is what an alert is about.
type thing struct{ job, ring, instance, id string }

func (e thing) process() string {
	return `job="` + e.job + `",ring="` + e.ring + `",instance="` + e.instance + `"`
}

var (
	concerned = thing{"svc", "x", "a", "s0"}
	// Everything that differs in one label, or in the process: all of it is well.
	others = []thing{{"svc", "x", "a", "s1"}, {"svc", "y", "a", "s0"}, {"job2", "x", "a", "s0"}}
)

// causeSpec describes an alert about a cause.
type causeSpec struct {
	alert string
	// id is the label that names the thing; more are further labels of the alert.
	id, more string
	// window is that of the rates, in minutes; 0 if the alert reads gauges.
	window, forN int
	// put writes the series of a thing over n minutes, with x times the threshold at i.
	put func(into map[string]string, e thing, n int, x func(i int) float64)
	// few writes them with so little traffic that x times the least that counts happens
	// in a window, all of it bad. nil: there is no least.
	few func(into map[string]string, e thing, n int, x float64)
}

func (c causeSpec) fires(at int, yes bool) ruleCheck {
	k := ruleCheck{at: at, of: `alertname="` + c.alert + `"`, by: "job, ring, instance, role, severity, " + c.id}
	if yes {
		k.want = []string{`{job="svc", ring="x", ` + c.id + `="s0", severity="ticket"` + c.more + `}`}
	}
	return k
}

func (c causeSpec) cases() (cases []ruleCase) {
	add := func(name string, series map[string]string, checks ...ruleCheck) {
		cases = append(cases, ruleCase{c.alert + ": " + name, c.alert, 1, series, checks})
	}
	series := func(n int, x func(i int) float64) map[string]string {
		s := map[string]string{}
		c.put(s, concerned, n, x)
		for _, o := range others {
			c.put(s, o, n, same(0))
		}
		return s
	}
	w, first := c.window, 0
	if w > 0 {
		first = 1 // a rate takes two samples
	}
	if w > 0 && c.few == nil {
		// An increase is extrapolated over what there is of the window: let it fill.
		first = w + 1
	}
	n := first + c.forN + w + 6
	// One per cent to both sides. An alert on an increase, not on a ratio, fires when its
	// window has filled.
	add("just above the threshold", series(n, same(1.01)), c.fires(c.forN-1, false), c.fires(first+c.forN, true), c.fires(n-1, true))
	add("just below the threshold", series(n, same(0.99)), c.fires(first+c.forN, false), c.fires(n-1, false))
	add("nothing happens", series(n, same(0)), c.fires(n-1, false))
	add("no series", map[string]string{`up{job="svc",instance="a"}`: constant(n, 1)}, c.fires(n-1, false))

	// Something lasts for a while. It is above the threshold when nine tenths of the window
	// hold it, and for begins then.
	calm := 2*w + 5
	during := w + c.forN + 20
	episode := func(i int) float64 {
		if i > calm && i <= calm+during {
			return 1.1
		}
		return 0
	}
	early, late := calm+int(float64(w-1)/1.1)+c.forN, calm+w+1+c.forN
	if w == 0 {
		early, late = calm+c.forN, calm+1+c.forN
	}
	add("begins and ends", series(calm+during+w+10, episode),
		c.fires(calm, false), c.fires(early, false), c.fires(late, true), c.fires(calm+during, true), c.fires(calm+during+max(2, w/3), false), c.fires(calm+during+w+5, false))
	// It must last for all of for: it is over a minute before.
	if c.forN > 1 {
		add("is over before the end of for", series(calm+w+2*c.forN, func(i int) float64 {
			if i > calm && i <= calm+w+c.forN/2 {
				return 1.1
			}
			return 0
		}), c.fires(calm+w+c.forN/2, false), c.fires(calm+w+c.forN, false), c.fires(calm+w+2*c.forN-1, false))
	}

	// A process that restarts counts from zero again.
	if w > 0 {
		for x, yes := range map[float64]bool{0.8: false, 1.6: true} {
			s := series(n, same(x))
			for name, values := range s {
				s[name] = again(name, values)
			}
			add(fmt.Sprintf("a restart at %.1f of the threshold", x), s, c.fires(n-1, yes), c.fires(n+1, yes), c.fires(n+w, yes))
		}
	}
	if c.few != nil {
		for x, yes := range map[float64]bool{0.99: false, 1.01: true} {
			s := map[string]string{}
			c.few(s, concerned, w+c.forN+8, x)
			add(fmt.Sprintf("%.2f of the least that counts", x), s, c.fires(w+c.forN+7, yes))
		}
	}
	return cases
}

// again plays a series twice, as after a restart.
func again(_, values string) string {
	if strings.Contains(values, "x") { // a constant, "1x20"
		return values + " " + values
	}
	return values + values
}

const (
	answeredBy = "ratelimiter_request_latency_seconds_count{"
	fellBackBy = "ratelimiter_fallback_decisions_total{"
)

// answers are the decisions for a shard; what was canceled is none.
func answers(into map[string]string, e thing, n int, each float64) {
	l := answeredBy + e.process() + `,shard_id="` + e.id + `",outcome="`
	into[l+`allowed"}`] = counter(n, same(each*0.6))
	into[l+`denied"}`] = counter(n, same(each*0.4))
	into[l+`canceled"}`] = counter(n, same(each*5))
}

func shardCases() (cases []ruleCase) {
	// Half of the processes, and one per cent less.
	open := causeSpec{alert: "RingfenceShardOpen", id: "shard_id", forN: 5,
		put: func(into map[string]string, e thing, n int, x func(i int) float64) {
			for p := range 100 {
				e.instance = fmt.Sprint(p)
				into[`ratelimiter_circuit_state{`+e.process()+`,shard_id="`+e.id+`"}`] = gauge(n, func(i int) float64 {
					if float64(p+1) <= 50*x(i)+1e-9 {
						return float64(1 + p%2)
					}
					return 0
				})
			}
		}}
	cases = append(cases, open.cases()...)

	flapping := causeSpec{alert: "RingfenceShardFlapping", id: "shard_id", window: 15, forN: 5,
		put: func(into map[string]string, e thing, n int, x func(i int) float64) {
			for _, instance := range []string{"a", "b"} {
				e.instance = instance
				l := e.process() + `,shard_id="` + e.id + `"`
				into[`ratelimiter_circuit_state{`+l+`}`] = constant(n, 0)
				into[`ratelimiter_circuit_transitions_total{`+l+`,from="closed",to="open"}`] = counter(n, func(i int) float64 { return x(i) * 3 / 15 })
				into[`ratelimiter_circuit_transitions_total{`+l+`,from="half_open",to="open"}`] = counter(n, same(2))
				into[`ratelimiter_circuit_transitions_total{`+l+`,from="closed",to="half_open"}`] = counter(n, same(2))
			}
		}}
	cases = append(cases, flapping.cases()...)

	const decisions = 10000
	fallback := causeSpec{alert: "RingfenceFallbackActive", id: "shard_id", window: 5, forN: 10,
		put: func(into map[string]string, e thing, n int, x func(i int) float64) {
			answers(into, e, n, decisions)
			l := fellBackBy + e.process() + `,shard_id="` + e.id + `",mode="`
			for _, m := range []string{`share",reason="breaker"}`, `replica",reason="budget"}`, `open",reason="error"}`, `local",reason="corrupt"}`} {
				into[l+m] = counter(n, func(i int) float64 { return decisions * 0.01 * x(i) / 4 })
			}
		},
		few: func(into map[string]string, e thing, n int, x float64) {
			answers(into, e, n, 5*x/5)
			into[fellBackBy+e.process()+`,shard_id="`+e.id+`",mode="closed",reason="breaker"}`] = counter(n, same(5*x/5))
		}}
	cases = append(cases, fallback.cases()...)

	// The ratio stays while the traffic falls to a tenth, and while it grows tenfold.
	for _, now := range []float64{0.1, 10} {
		s := map[string]string{}
		total := func(part float64) string {
			return counter(50, func(i int) float64 {
				if i > 25 {
					return part * decisions * now
				}
				return part * decisions
			})
		}
		l := concerned.process() + `,shard_id="s0",`
		s[answeredBy+l+`outcome="allowed"}`] = total(1)
		s[fellBackBy+l+`mode="share",reason="breaker"}`] = total(0.011)
		cases = append(cases, ruleCase{fmt.Sprintf("RingfenceFallbackActive: traffic becomes %g times what it was", now), fallback.alert, 1, s,
			[]ruleCheck{fallback.fires(25, true), fallback.fires(27, true), fallback.fires(29, true), fallback.fires(33, true), fallback.fires(49, true)}})
	}

	open1 := causeSpec{alert: "RingfenceFailingOpen", id: "shard_id", window: 5, forN: 5,
		put: func(into map[string]string, e thing, n int, x func(i int) float64) {
			answers(into, e, n, decisions)
			l := fellBackBy + e.process() + `,shard_id="` + e.id + `",mode="`
			into[l+`open",reason="breaker"}`] = counter(n, func(i int) float64 { return decisions * 0.01 * x(i) })
			into[l+`closed",reason="breaker"}`] = counter(n, same(decisions*0.3))
		},
		few: func(into map[string]string, e thing, n int, x float64) {
			answers(into, e, n, 5)
			into[fellBackBy+e.process()+`,shard_id="`+e.id+`",mode="open",reason="breaker"}`] = counter(n, same(5*x/5))
			into[fellBackBy+e.process()+`,shard_id="`+e.id+`",mode="closed",reason="breaker"}`] = counter(n, same(3))
		}}
	cases = append(cases, open1.cases()...)

	// The load of a shard that owns a tenth of the keys of its ring: twice that is a fifth.
	// x is the load over twice the share.
	hot := causeSpec{alert: "RingfenceHotShard", id: "shard_id", window: 15, forN: 15,
		put: func(into map[string]string, e thing, n int, x func(i int) float64) {
			const total = 100000
			part := func(i int) float64 { return 0.2 * x(i) }
			l := answeredBy + e.process() + `,shard_id="`
			for _, o := range []string{"allowed", "denied"} {
				into[l+e.id+`",outcome="`+o+`"}`] = counter(n, func(i int) float64 { return total * part(i) / 2 })
				if e == concerned || e.ring == "y" || e.job != "svc" {
					into[l+`rest",outcome="`+o+`"}`] = counter(n, func(i int) float64 { return total * (1 - part(i)) / 2 })
				}
				into[l+`",outcome="`+o+`"}`] = counter(n, same(total))
			}
			into[l+e.id+`",outcome="canceled"}`] = counter(n, same(total))
			into[`ratelimiter_ring_key_share_ratio{`+e.process()+`,shard_id="`+e.id+`"}`] = constant(n, 0.1)
			into[`ratelimiter_ring_key_share_ratio{`+e.process()+`,shard_id="rest"}`] = constant(n, 0.8)
		},
		few: func(into map[string]string, e thing, n int, x float64) {
			l := answeredBy + e.process() + `,shard_id="` + e.id + `",outcome="`
			each := 9000.0 * x / 15
			into[l+`allowed"}`] = counter(n, same(each*0.9))
			into[l+`denied"}`] = counter(n, same(each*0.1))
			into[l+`canceled"}`] = counter(n, same(each*3))
			into[`ratelimiter_ring_key_share_ratio{`+e.process()+`,shard_id="`+e.id+`"}`] = constant(n, 0.1)
		}}
	return append(cases, hot.cases()...)
}

// gauge are values that follow a function.
func gauge(n int, v func(i int) float64) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%g ", v(i))
	}
	return b.String()
}

func serverCases() (cases []ruleCase) {
	pool := causeSpec{alert: "RingfencePoolExhausted", id: "shard_id", more: `, role="primary"`, window: 5, forN: 5,
		put: func(into map[string]string, e thing, n int, x func(i int) float64) {
			l := `ratelimiter_redis_pool_timeouts_total{` + e.process() + `,shard_id="` + e.id + `",role="`
			into[l+`primary"}`] = counter(n, func(i int) float64 { return x(i) })
			into[l+`replica"}`] = counter(n, same(0))
		}}
	cases = append(cases, pool.cases()...)
	scripts := causeSpec{alert: "RingfenceScriptStorm", id: "shard_id", window: 15, forN: 5,
		put: func(into map[string]string, e thing, n int, x func(i int) float64) {
			for _, instance := range []string{"a", "b"} {
				e.instance = instance
				l := e.process() + `,shard_id="` + e.id + `"}`
				into[`ratelimiter_circuit_state{`+l] = constant(n, 0)
				into[`ratelimiter_script_loads_total{`+l] = counter(n, func(i int) float64 { return x(i) * 10 / 15 })
			}
		}}
	cases = append(cases, scripts.cases()...)
	for name, spec := range map[string]struct {
		metric string
		forN   int
		value  func(x float64) float64
	}{
		// The clock of the server is behind: the offset is negative.
		"RingfenceClockSkew":      {"ratelimiter_redis_clock_offset_seconds", 10, func(x float64) float64 { return -0.5 * x }},
		"RingfenceSplitBrain":     {"ratelimiter_shard_split_brain", 1, yes},
		"RingfenceConfigMismatch": {"ratelimiter_config_mismatch", 5, yes},
	} {
		c := causeSpec{alert: name, id: "shard_id", forN: spec.forN,
			put: func(into map[string]string, e thing, n int, x func(i int) float64) {
				l := `,shard_id="` + e.id + `"}`
				into[spec.metric+`{`+e.process()+l] = gauge(n, func(i int) float64 { return spec.value(x(i)) })
				e.instance = "b" // one process is enough
				into[spec.metric+`{`+e.process()+l] = constant(n, 0)
			}}
		cases = append(cases, c.cases()...)
	}
	return cases
}

// yes is 1 from the threshold on: what is either so or not has no one per cent.
func yes(x float64) float64 {
	if x >= 1 {
		return 1
	}
	return 0
}

func limitCases() (cases []ruleCase) {
	// Denials against yesterday's, in steps of five minutes: a day is 288 of them.
	const day = 288
	anomaly := func(name string, n int, each float64, part func(i int) float64, checks ...ruleCheck) {
		s := map[string]string{}
		for _, e := range append([]thing{concerned}, others...) {
			p := part
			if e != concerned {
				p = same(0.04)
			}
			l := `ratelimiter_decisions_total{` + e.process() + `,limit="` + e.id + `",outcome="`
			s[l+`denied",source="primary"}`] = counter(n, func(i int) float64 { return each * p(i) })
			s[l+`allowed",source="primary"}`] = counter(n, func(i int) float64 { return each * (1 - p(i)) })
			s[l+`error",source="none"}`] = counter(n, same(each*2))
		}
		cases = append(cases, ruleCase{"RingfenceDenyRatioAnomaly: " + name, "RingfenceDenyRatioAnomaly", 5, s, checks})
	}
	fires := causeSpec{alert: "RingfenceDenyRatioAnomaly", id: "limit"}.fires
	const begins = day + 20
	since := func(before, after float64) func(i int) float64 {
		return func(i int) float64 {
			if i > begins {
				return after
			}
			return before
		}
	}
	for _, before := range []float64{0, 0.3} {
		border := 0.05 + 3*before
		anomaly(fmt.Sprintf("just above, yesterday %.1f", before), begins+30, 10000, since(before, border*1.01),
			fires(begins, false), fires(begins+4, false), fires(begins+7, true), fires(begins+29, true))
		anomaly(fmt.Sprintf("just below, yesterday %.1f", before), begins+30, 10000, since(before, border*0.99), fires(begins+29, false))
	}
	anomaly("it is as yesterday", begins+30, 10000, same(0.3), fires(begins+29, false))
	anomaly("there is no yesterday", day-20, 10000, same(0.9), fires(day-25, false))
	anomaly("after a day it is usual", begins+day+30, 10000, since(0, 0.5), fires(begins+day-5, true), fires(begins+day+10, false))
	anomaly("it was so in the night between", begins+30, 10000, func(i int) float64 {
		if i > begins || i > day/2-10 && i < day/2+30 {
			return 0.5
		}
		return 0.01
	}, fires(begins+29, true))
	for x, loud := range map[float64]bool{0.99: false, 1.01: true} {
		// So few that fifty denials in the window decide, all that are made.
		anomaly(fmt.Sprintf("%.2f of the least that counts", x), begins+30, 50*x/3, since(0, 1), fires(begins+29, loud))
	}
	anomaly("no decisions", begins+30, 0, same(0.5), fires(begins+29, false))
	// A restart of the process in between.
	s := map[string]string{}
	l := `ratelimiter_decisions_total{` + concerned.process() + `,limit="s0",outcome="`
	part := since(0, 0.5)
	s[l+`denied",source="primary"}`] = counter(begins+15, func(i int) float64 { return 1000 * part(i) }) + counter(30, same(500))
	s[l+`allowed",source="primary"}`] = counter(begins+15, func(i int) float64 { return 1000 * (1 - part(i)) }) + counter(30, same(500))
	cases = append(cases, ruleCase{"RingfenceDenyRatioAnomaly: a restart", "RingfenceDenyRatioAnomaly", 5, s,
		[]ruleCheck{fires(begins+14, true), fires(begins+16, true), fires(begins+30, true)}})
	for _, now := range []float64{0.1, 10} {
		s := map[string]string{}
		total := func(part func(i int) float64) string {
			return counter(begins+40, func(i int) float64 {
				if i > begins+20 {
					return 10000 * now * part(i)
				}
				return 10000 * part(i)
			})
		}
		l := `ratelimiter_decisions_total{` + concerned.process() + `,limit="s0",outcome="`
		s[l+`denied",source="primary"}`] = total(since(0, 0.055))
		s[l+`allowed",source="primary"}`] = total(since(1, 0.945))
		var checks []ruleCheck
		for i := 18; i < 30; i++ {
			checks = append(checks, fires(begins+i, true))
		}
		cases = append(cases, ruleCase{fmt.Sprintf("RingfenceDenyRatioAnomaly: traffic becomes %g times what it was", now), "RingfenceDenyRatioAnomaly", 5, s, checks})
	}
	cases = append(cases, leaseCases()...)
	anomaly("an hour only", begins+60, 10000, func(i int) float64 {
		if i > begins && i <= begins+12 {
			return 0.5
		}
		return 0
	}, fires(begins+12, true), fires(begins+17, false))
	return cases
}

// budgetCases play months, in steps of three hours. x is the burn rate.
func budgetCases() (cases []ruleCase) {
	const month = 240 // steps
	low := func(at int, yes bool) ruleCheck {
		c := ruleCheck{at: at, of: `alertname="RingfenceErrorBudgetLow"`, by: "job, ring, instance, slo_name, severity"}
		if yes {
			c.want = []string{`{job="svc", ring="x", slo_name="redis_availability", severity="ticket"}`}
		}
		return c
	}
	add := func(name string, n int, events float64, burn func(i int) float64, checks ...ruleCheck) {
		s := map[string]string{}
		for _, e := range append([]thing{concerned}, others...) {
			b := burn
			if e != concerned {
				b = same(0)
			}
			slo(s, e.process(), map[bool]string{true: "redis_availability", false: "decision_latency"}[e.id == "s0"], n, events, b)
		}
		cases = append(cases, ruleCase{"RingfenceErrorBudgetLow: " + name, "RingfenceErrorBudgetLow", 180, s, checks})
	}
	for left, fires := range map[float64]bool{0.101: false, 0.099: true} {
		add(fmt.Sprintf("%.3f is left, and spent fast", left), month+5, perStep, same(1-left), low(month+4, fires))
	}
	// An outage ate nearly all; now the pace decides. 9/100 of the month are left after
	// it, for five days at a burn rate of 0.54.
	for pace, fires := range map[float64]bool{0.53: false, 0.55: true, 0: false} {
		add(fmt.Sprintf("9 %% are left, at a pace of %.2f", pace), month+5, perStep, func(i int) float64 {
			switch {
			case i <= month-4:
				return (0.91*month - 8*pace) / (month - 8)
			default:
				return pace
			}
		}, low(month+4, fires))
	}
	add("none is left, and more is spent", month+5, perStep, same(2), low(month+4, true))
	// What is older than the month does not count, what is younger does.
	for ago, fires := range map[int]bool{month * 3 / 2: false, month * 3 / 4: true} {
		add(fmt.Sprintf("a bad week %d days ago", ago/8), 2*month, perStep, func(i int) float64 {
			switch at := 2*month - 10; {
			case i > at-ago-28 && i <= at-ago+28:
				return 5
			case i > at-8:
				return 0.9
			}
			return 0
		}, low(2*month-10, fires))
	}
	for x, fires := range map[float64]bool{0.99: false, 1.01: true} {
		add(fmt.Sprintf("%.2f of the least that counts", x), month+5, 5*x/2, same(1/(1-objective)), low(month+4, fires))
	}
	// For a day nothing has been spent. The pace is that of the last six hours.
	add("it has ended", month+5, perStep, func(i int) float64 {
		if i > month-4 {
			return 0
		}
		return 3
	}, low(month-4, true), low(month-2, false), low(month, false), low(month+4, false))
	// It falls below a tenth from one step to the next, and must stay for six hours.
	add("a step down", month+20, perStep, func(i int) float64 {
		if i == month+1 || i == month+2 {
			return 8
		}
		return 0.88
	}, low(month, false), low(month+2, false), low(month+3, true), low(month+4, true))
	// The pace is that of six hours, not of twelve.
	add("it gets better", month+6, perStep, func(i int) float64 {
		switch {
		case i < month+2:
			return 0.905
		case i == month+2:
			return 4
		}
		return 0.1
	}, low(month+2, true), low(month+4, false))
	// The pace stays while the traffic falls to a twentieth.
	quiet := map[string]string{}
	l := `{` + concerned.process() + `,slo_name="redis_availability"}`
	falls := func(part func(i int) float64) string {
		return counter(month+8, func(i int) float64 {
			if i > month {
				return perStep / 20 * part(i)
			}
			return perStep * part(i)
		})
	}
	quiet["ratelimiter_slo_events_total"+l] = falls(same(1))
	quiet["ratelimiter_slo_objective_ratio"+l] = constant(month+8, objective)
	quiet["ratelimiter_error_budget_consumed_total"+l] = falls(func(i int) float64 {
		if i > month {
			return 0.6 * (1 - objective)
		}
		return 0.91 * (1 - objective)
	})
	cases = append(cases, ruleCase{"RingfenceErrorBudgetLow: traffic becomes 0.05 times what it was", "RingfenceErrorBudgetLow", 180, quiet,
		[]ruleCheck{low(month, true), low(month+1, true), low(month+2, true), low(month+5, true)}})
	add("no traffic", month+5, 0, same(0), low(month+4, false))
	s := map[string]string{`up{job="svc",instance="a"}`: constant(20, 1)}
	cases = append(cases, ruleCase{"RingfenceErrorBudgetLow: no series", "RingfenceErrorBudgetLow", 180, s, []ruleCheck{low(19, false)}})
	return cases
}
