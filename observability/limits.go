package observability

// Limits is the dashboard of the limiters: which deny, how close to their limits callers
// are, and what is configured.
func Limits() (classic, error) {
	l := newLayout("Ringfence / Limits", "ringfence-limits",
		"Which limits deny, how close the callers are to them, and what is configured. Who is limited is never a label: ask the top-K of the limiter.",
		"limits")
	l.dash.WithVariable(choice("limit", "Limit", `ratelimiter_limit_capacity{job=~"$job",instance=~"$instance"}`, "The name of a limiter."))
	const (
		decided = `ratelimiter_decisions_total{` + ofLimits + `,outcome=~"allowed|denied"}`
		denied  = `ratelimiter_decisions_total{` + ofLimits + `,outcome="denied"}`
		asked   = `ratelimiter_tokens_requested_total{` + ofLimits + `}`
		granted = `ratelimiter_tokens_granted_total{` + ofLimits + `}`
		near    = `ratelimiter_near_limit_total{` + ofLimits + `}`
	)

	l.row("Denied")
	l.plot(panel{
		title: "Most denied", w: 12, h: 8, unit: "ops", noData: "no decisions",
		about:   "The ten limits that deny most, denials a second.",
		queries: []query{{"topk(10, " + perSecond("limit", denied) + ")", "{{limit}}"}},
	})
	l.plot(panel{
		title: "Deny ratio", w: 12, h: 8, unit: "percentunit", noData: "no decisions",
		about:   "Part of the decisions that denied, by limit. A jump: a caller gone wild, a limit set too low, or a shard whose failure policy is closed.",
		queries: []query{{perSecond("limit", denied) + " / " + perSecond("limit", decided), "{{limit}}"}},
	})

	l.row("How close")
	l.plot(panel{
		title: "Near the limit", w: 12, h: 8, unit: "percentunit", noData: "no decisions",
		about:   "Part of the decisions after which the caller had at most 20 % of the limit left. It rises before the denials do.",
		queries: []query{{perSecond("limit", near) + " / " + perSecond("limit", decided), "{{limit}}"}},
	})
	l.plot(panel{
		title: "Granted of what was asked", w: 12, h: 8, unit: "percentunit", noData: "no decisions",
		about:   "Units granted over units asked for. Lower than the decisions suggest: it is the expensive calls that are denied.",
		queries: []query{{perSecond("limit", granted) + " / " + perSecond("limit", asked), "{{limit}}"}},
	})

	l.row("Who decides")
	l.add(l.lines(panel{
		title: "Decisions by limit and source", w: 12, h: 8, unit: "ops", noData: "no decisions",
		about:   "Decisions a second by who made them. Only primary is exact; cache repeats a denial of the primary for as long as it holds, without asking.",
		queries: []query{{perSecond("limit, source", decided) + " > 0", "{{limit}} {{source}}"}},
	}).Min(0).LineWidth(0).FillOpacity(70).Stacking(stacked()))
	l.plot(panel{
		title: "Units", w: 12, h: 8, unit: "ops", noData: "no decisions",
		about: "Units a second, asked for and granted. They are what a cost other than 1 makes of decisions.",
		queries: []query{
			{perSecond("limit", asked), "{{limit}} asked"},
			{perSecond("limit", granted), "{{limit}} granted"},
		},
	})

	l.row("Repeated denials")
	l.plot(panel{
		title: "Near cache", w: 24, h: 8, unit: "short", noData: "no near cache",
		about: "Denials of the primary that are repeated as long as they hold, and how many decisions a second they made without asking the shard.",
		queries: []query{
			{`sum by (limit) (ratelimiter_near_cache_entries{` + ofLimits + `})`, "{{limit}} keys"},
			{perSecond("limit", `ratelimiter_near_cache_hits_total{`+ofLimits+`}`), "{{limit}} hits a second"},
		},
	})

	l.row("Configuration")
	l.rows(panel{
		title: "Limits as configured", w: 24, h: 7, unit: "none", noData: "no limits",
		about: "What the processes shown are configured with. A difference above 0: processes disagree, for example in the middle of a deployment.",
		queries: []query{
			{`count by (limit, job) (ratelimiter_limit_capacity{` + ofLimits + `})`, "processes"},
			{`max by (limit, job) (ratelimiter_limit_capacity{` + ofLimits + `})`, "capacity"},
			{`max by (limit, job) (ratelimiter_limit_window_seconds{` + ofLimits + `})`, "window"},
			{`max by (limit, job) (ratelimiter_limit_capacity{` + ofLimits + `}) - min by (limit, job) (ratelimiter_limit_capacity{` + ofLimits + `})`, "disagreement"},
		},
	}, column{"job", "Job", ""}, column{"limit", "Limit", ""}, column{"Value #A", "Processes", "none"},
		column{"Value #B", "Capacity", "none"}, column{"Value #C", "Window", "s"}, column{"Value #D", "Capacity differs by", "none"})
	return l.build()
}
