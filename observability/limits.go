package observability

import "github.com/grafana/grafana-foundation-sdk/go/common"

// LeaseOvershoot is where the alert RingfenceLeaseOvershoot begins: the part of one key's
// limit that all processes together may hold in leases.
const LeaseOvershoot = 0.5

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
		about:   "Decisions a second by who made them. Only primary is exact; cache repeats a denial of the primary for as long as it holds, and lease admits out of units that were taken from the primary ahead, both without asking it.",
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

	l.row("Leases")
	const (
		noLeases = "no limiter of this ring takes leases"
		bound    = `ratelimiter_lease_bound{` + ofLimits + `}`
		returned = `ratelimiter_lease_returned_total{` + ofLimits + `}`
		leased   = `ratelimiter_decisions_total{` + ofLimits + `,outcome="allowed",source="lease"}`
	)
	l.plot(panel{
		title: "Answered out of leases", w: 12, h: 8, unit: "percentunit", noData: noLeases,
		about:   "Part of the decisions that were made out of units taken ahead, without a round trip; of limiters with leases. It falls while a shard is away, near the limit, and where keys are called too seldom.",
		queries: []query{{perSecond("limit", leased) + " / " + perSecond("limit", decided) + " and sum by (limit) (" + bound + ")", "{{limit}}"}},
	})
	l.plot(panel{
		title: "Units held ahead", w: 12, h: 8, unit: "short", noData: noLeases,
		about:   "Units that the processes took ahead and have not used or returned, of all keys together. Of a key nobody else can use them, for Lease.TTL at most.",
		queries: []query{{`sum by (limit) (ratelimiter_lease_outstanding{` + ofLimits + `})`, "{{limit}}"}},
	})
	l.plot(panel{
		title: "Leased units that went back unused", w: 12, h: 8, unit: "percentunit", noData: noLeases,
		about:   "Returned units over those and the calls admitted out of leases; where calls cost more than 1 it shows too much. Up to four fifths is by design: a lease of a key in use has four times what was used in a life, and what goes back travels with the request for the next, at no cost. More: most leases are taken for keys that are not called again.",
		queries: []query{{perSecond("limit", returned) + " / (" + perSecond("limit", returned) + " + " + perSecond("limit", leased) + ")", "{{limit}}"}},
	})
	l.add(l.lines(panel{
		title: "All leases of one key, at most", w: 12, h: 8, unit: "percentunit", noData: noLeases,
		about: "What the processes shown may hold of one key, all of them together, over its limit: their bounds summed. Above 50 % calls can be denied that much too early, and a TokenBucket can admit that much more; RingfenceLeaseOvershoot fires if as many units are held.",
		queries: []query{{"sum by (job, limit) (" + bound + ") / max by (job, limit) (ratelimiter_limit_capacity{" + ofLimits + "})",
			"{{job}} {{limit}}"}},
	}).Min(0).AxisSoftMax(0.6).Thresholds(steps("transparent", step{LeaseOvershoot, "orange"})).
		ThresholdsStyle(common.NewGraphThresholdsStyleConfigBuilder().Mode(common.GraphThresholdsStyleModeDashed)))

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
