package observability

// Client is the dashboard of what limiting costs the processes that do it.
func Client() (classic, error) {
	l := newLayout("Ringfence / Client", "ringfence-client",
		"What limiting costs the processes: connections, waiting, fallbacks, CPU, memory, garbage collection. Go's own metrics come from client_golang's collectors on the same registry.",
		"client")
	const (
		decisions = `ratelimiter_decisions_total{` + process + `}`
		pool      = `{` + ofShards + `}`
	)

	l.row("Decisions")
	l.plot(panel{
		title: "Decisions by process", w: 8, h: 8, unit: "ops", noData: "no decisions",
		about:   "Decisions a second of each process. One that gets far more than the others gets their share of the load, too.",
		queries: []query{{perSecond("instance", decisions), "{{instance}}"}},
	})
	l.plot(panel{
		title: "Not decided", w: 8, h: 8, unit: "ops", noData: "no decisions",
		about:   "Calls a second that got no decision. error: the call was wrong (empty key, cost too high, ring closed); canceled: the caller's own context ended.",
		queries: []query{{perSecond("instance, outcome", `ratelimiter_decisions_total{`+process+`,outcome=~"error|canceled"}`), "{{instance}} {{outcome}}"}},
	})
	l.plot(panel{
		title: "Fallbacks by process", w: 8, h: 8, unit: "ops", noData: "no decisions",
		about:   "Decisions a second that another than the primary made, by process. One process alone: its network or its CPU.",
		queries: []query{{perSecond("instance", `ratelimiter_fallback_decisions_total`+pool), "{{instance}}"}},
	})

	l.row("Connections")
	l.plot(panel{
		title: "Connections by process", w: 8, h: 8, unit: "short", noData: "no shards",
		about:   "Connections of each process, in use and idle.",
		queries: []query{{`sum by (instance, state) (ratelimiter_redis_pool_connections` + pool + `)`, "{{instance}} {{state}}"}},
	})
	l.plot(panel{
		title: "Waiting for a connection", w: 8, h: 8, unit: "percentunit", noData: "no shards",
		about:   "Seconds a second that calls spent waiting for a free connection, all calls of the process together. Much above 0: the pool is too small, or the server too slow.",
		queries: []query{{perSecond("instance", `ratelimiter_redis_pool_wait_seconds_total`+pool), "{{instance}}"}},
	})
	l.plot(panel{
		title: "No connection in time", w: 8, h: 8, unit: "ops", noData: "no shards",
		about:   "Calls a second that found no free connection in time: see RingfencePoolExhausted in the playbook.",
		queries: []query{{perSecond("instance, role", `ratelimiter_redis_pool_timeouts_total`+pool), "{{instance}} {{role}}"}},
	})

	l.row("The process")
	l.add(l.lines(panel{
		title: "CPU per decision", w: 8, h: 8, unit: "s", noData: "no process collector",
		about:   "CPU time of the whole process for each decision: an upper bound of what limiting costs, since the service's own work is in it.",
		queries: []query{{perSecond("instance", `process_cpu_seconds_total{`+process+`}`) + ` / ` + perSecond("instance", decisions), "{{instance}}"}},
	}).ScaleDistribution(logarithmic()))
	l.plot(panel{
		title: "CPU", w: 8, h: 8, unit: "percentunit", noData: "no process collector",
		about:   "CPU of each process, 100 % is one core. A process at its quota answers late, and its callers count as slow decisions.",
		queries: []query{{perSecond("instance", `process_cpu_seconds_total{`+process+`}`), "{{instance}}"}},
	})
	l.plot(panel{
		title: "Memory", w: 8, h: 8, unit: "bytes", noData: "no Go collector",
		about:   "Bytes of the Go heap in use, by process.",
		queries: []query{{`sum by (instance) (go_memstats_heap_inuse_bytes{` + process + `})`, "{{instance}}"}},
	})
	l.add(l.lines(panel{
		title: "Longest pause of the garbage collector", w: 8, h: 8, unit: "s", noData: "no Go collector",
		about:   "The longest of the recent pauses, by process. Pauses of milliseconds show in the latency of decisions.",
		queries: []query{{`max by (instance) (go_gc_duration_seconds{` + process + `,quantile="1"})`, "{{instance}}"}},
	}).ScaleDistribution(logarithmic()))
	l.plot(panel{
		title: "Goroutines", w: 8, h: 8, unit: "short", noData: "no Go collector",
		about:   "Goroutines of each process. ringfence has a fixed number of its own; growth is callers that wait.",
		queries: []query{{`sum by (instance) (go_goroutines{` + process + `})`, "{{instance}}"}},
	})
	l.plot(panel{
		title: "Keys counted locally", w: 8, h: 8, unit: "short", noData: "no processes",
		about:   "Keys that a process counts in its own memory for shares and for the policy local. Bounded by Config.MaxLocalKeys.",
		queries: []query{{`sum by (instance) (ratelimiter_local_keys{` + process + `})`, "{{instance}}"}},
	})
	l.row("Deployed")
	l.rows(panel{
		title: "Versions", w: 12, h: 6, unit: "none", noData: "no processes",
		about:   "How many processes run which version of ringfence, built from which revision by which Go.",
		queries: []query{{`count by (job, version, revision, goversion) (ratelimiter_build_info{` + process + `})`, "processes"}},
	}, column{"job", "Job", ""}, column{"version", "Version", ""}, column{"revision", "Revision", ""}, column{"goversion", "Go", ""}, column{"Value", "Processes", "none"})
	l.plot(panel{
		title: "Shards by state", w: 12, h: 6, unit: "short", noData: "no processes",
		about:   "Shards by the state of their breaker, on average over the processes.",
		queries: []query{{`avg by (state) (ratelimiter_ring_shards{` + process + `})`, "{{state}}"}},
	})
	return l.build()
}
