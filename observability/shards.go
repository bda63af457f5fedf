package observability

// Shards is the dashboard to find out what is the matter with a shard.
func Shards() (classic, error) {
	l := newLayout("Ringfence / Shards", "ringfence-shards",
		"One shard, or some: breaker, latency, errors, connections, clock. The Redis server itself is in the last row, if redis_exporter is scraped.",
		"shards")
	const (
		buckets  = `ratelimiter_request_latency_seconds_bucket{` + ofShards + `,outcome=~"allowed|denied"}`
		commands = `ratelimiter_redis_command_duration_seconds_bucket{` + ofShards + `,command="charge"}`
	)

	l.row("Breaker")
	l.timeline(panel{
		title: "Breaker by process", w: 12, h: 8, unit: "none", noData: "no shards",
		about:   "The breaker of each shard in each process. Open: nobody asks the shard, the ladder of fallbacks answers. Half-open: a probe is under way.",
		queries: []query{{`max by (shard_id, instance) (ratelimiter_circuit_state{` + ofShards + `})`, "{{shard_id}} {{instance}}"}},
	}, means("0", "closed", "green", 0), means("1", "open", "red", 1), means("2", "half-open", "yellow", 2))
	l.plot(panel{
		title: "Breaker transitions", w: 12, h: 8, unit: "short", noData: "no transitions",
		about:   "Changes of state within each interval, all shards and processes shown together. A breaker that opens again and again flaps: see RingfenceShardFlapping in the playbook.",
		queries: []query{{`sum by (from, to) (increase(ratelimiter_circuit_transitions_total{` + ofShards + `}[$__rate_interval]))`, "{{from}} to {{to}}"}},
	})
	l.plot(panel{
		title: "Kept from the shard", w: 8, h: 7, unit: "ops", noData: "no shards",
		about:   "Decisions a second that an open breaker kept from the shard.",
		queries: []query{{perSecond("shard_id", `ratelimiter_circuit_rejections_total{`+ofShards+`}`), "{{shard_id}}"}},
	})
	l.plot(panel{
		title: "Probes", w: 8, h: 7, unit: "ops", noData: "no probes",
		about:   "Probes a second of shards whose breaker is open. A breaker closes after a probe that is ok.",
		queries: []query{{perSecond("result", `ratelimiter_circuit_probes_total{`+ofShards+`}`), "{{result}}"}},
	})
	l.plot(panel{
		title: "Answered instead", w: 8, h: 7, unit: "ops", noData: "the primaries answer everything",
		about:   "Decisions a second that another than the primary made. replica: asked just then; share: dealt out before; open, closed, local: the failure policy. reason: why the primary did not. What did not occur is not drawn.",
		queries: []query{{perSecond("mode, reason", `ratelimiter_fallback_decisions_total{`+ofShards+`}`) + " > 0", "{{mode}}, {{reason}}"}},
	})

	l.row("Latency")
	l.heat(panel{
		title: "How long callers waited", w: 12, h: 8, unit: "s", noData: "no decisions",
		about:   "Every decision by how long its caller waited: a darker field is more of them. A second band is a second cause.",
		queries: []query{{`sum by (le) (increase(` + buckets + `[$__rate_interval]))`, "{{le}}"}},
	})
	l.add(l.lines(panel{
		title: "Callers: p50, p99, p99.9", w: 12, h: 8, unit: "s", noData: "no decisions",
		about: "What half, 99 of 100 and 999 of 1000 callers waited at most, by shard.",
		queries: []query{
			{`histogram_quantile(0.5, sum by (shard_id, le) (rate(` + buckets + `[$__rate_interval])))`, "{{shard_id}} p50"},
			{`histogram_quantile(0.99, sum by (shard_id, le) (rate(` + buckets + `[$__rate_interval])))`, "{{shard_id}} p99"},
			{`histogram_quantile(0.999, sum by (shard_id, le) (rate(` + buckets + `[$__rate_interval])))`, "{{shard_id}} p99.9"},
		},
	}).ScaleDistribution(logarithmic()))
	l.add(l.lines(panel{
		title: "Commands: p50, p99", w: 8, h: 8, unit: "s", noData: "no commands",
		about: "How long one script call took, whether its callers waited for it or not. Slow here: server or network. Fast here and slow for callers: our own queue or CPU.",
		queries: []query{
			{`histogram_quantile(0.5, sum by (shard_id, le) (rate(` + commands + `[$__rate_interval])))`, "{{shard_id}} p50"},
			{`histogram_quantile(0.99, sum by (shard_id, le) (rate(` + commands + `[$__rate_interval])))`, "{{shard_id}} p99"},
		},
	}).ScaleDistribution(logarithmic()))
	l.plot(panel{
		title: "Under way and waiting", w: 8, h: 8, unit: "short", noData: "no shards",
		about: "Script calls under way and decisions that wait for one, all processes together. Waiting that grows means that Config.InFlight or the CPU is too small.",
		queries: []query{
			{`sum by (shard_id) (ratelimiter_inflight_operations{` + ofShards + `})`, "{{shard_id}} under way"},
			{`sum by (shard_id) (ratelimiter_queue_entries{` + ofShards + `})`, "{{shard_id}} waiting"},
		},
	})
	l.plot(panel{
		title: "Decisions per call", w: 8, h: 8, unit: "short", noData: "no commands",
		about:   "How many decisions one script call carried, on average. It grows with load: that is how a shard stands more.",
		queries: []query{{perSecond("shard_id", `ratelimiter_batch_entries_sum{`+ofShards+`}`) + ` / ` + perSecond("shard_id", `ratelimiter_batch_entries_count{`+ofShards+`}`), "{{shard_id}}"}},
	})

	l.row("Errors")
	l.add(l.lines(panel{
		title: "Errors by shard and type", w: 12, h: 8, unit: "ops", noData: "no errors",
		about:   "Operations and probes a second that failed, by kind. Kinds that did not occur are not drawn.",
		queries: []query{{perSecond("shard_id, error_type", `ratelimiter_redis_errors_total{`+ofShards+`}`) + " > 0", "{{shard_id}} {{error_type}}"}},
	}).Min(0).LineWidth(0).FillOpacity(70).Stacking(stacked()))
	l.plot(panel{
		title: "Units in doubt and made good", w: 6, h: 8, unit: "ops", noData: "no shards",
		about: "Units a second. unknown: charged perhaps, the answer was lost; settled: admitted out of shares, and the shard was told afterwards; lost: nobody knows whether it was told.",
		queries: []query{
			{"sum(rate(" + `ratelimiter_unknown_charges_total{` + ofShards + `}` + "[$__rate_interval]))", "unknown"},
			{"sum(rate(" + `ratelimiter_settled_charges_total{` + ofShards + `}` + "[$__rate_interval]))", "settled"},
			{"sum(rate(" + `ratelimiter_settle_lost_total{` + ofShards + `}` + "[$__rate_interval]))", "lost"},
		},
	})
	l.plot(panel{
		title: "Scripts loaded", w: 6, h: 8, unit: "short", noData: "no shards",
		about:   "Times within each interval that a server had to be given a script. A few after a restart; many mean that the server forgets them: SCRIPT FLUSH, or a proxy that spreads calls.",
		queries: []query{{`sum by (shard_id) (increase(ratelimiter_script_loads_total{` + ofShards + `}[$__rate_interval]))`, "{{shard_id}}"}},
	})

	l.row("Server and connections")
	l.timeline(panel{
		title: "Primary, split brain, configuration", w: 12, h: 8, unit: "none", noData: "no shards",
		about: "down: the primary did not answer when last asked, in at least one process. split brain: two servers say they are the primary. other configuration: another process uses another HashKey or ring, so that keys are counted in two places.",
		queries: []query{
			{`min by (shard_id) (ratelimiter_shard_up{` + ofShards + `}) - 1`, "{{shard_id}} primary"},
			{`max by (shard_id) (ratelimiter_shard_split_brain{` + ofShards + `}) * 2`, "{{shard_id}} split brain"},
			{`max by (shard_id) (ratelimiter_config_mismatch{` + ofShards + `}) * 3`, "{{shard_id}} configuration"},
		},
	}, means("-1", "down", "red", 0), means("0", "good", "green", 1), means("2", "split brain", "purple", 2), means("3", "other configuration", "orange", 3))
	l.plot(panel{
		title: "Connections", w: 12, h: 8, unit: "short", noData: "no shards",
		about:   "Connections of all shards and processes shown, by the role of the server and state.",
		queries: []query{{`sum by (role, state) (ratelimiter_redis_pool_connections{` + ofShards + `})`, "{{role}} {{state}}"}},
	})
	l.add(l.lines(panel{
		title: "Clock offset", w: 8, h: 7, unit: "s", noData: "no shards",
		about:   "The primary's clock less the process's, the largest by amount. Time is the server's while it answers; the offset matters when a replica or a share takes over.",
		queries: []query{{`max by (shard_id) (abs(ratelimiter_redis_clock_offset_seconds{` + ofShards + `}))`, "{{shard_id}}"}},
	}).ScaleDistribution(logarithmic()))
	l.add(l.lines(panel{
		title: "Replica lag", w: 8, h: 7, unit: "s", noData: "no replicas",
		about:   "Longest time since a replica heard of its primary. Shares that are dealt out of what a replica says are off by what happened in that time.",
		queries: []query{{`max by (shard_id) (ratelimiter_replica_lag_seconds{` + ofShards + `})`, "{{shard_id}}"}},
	}).ScaleDistribution(logarithmic()))
	l.plot(panel{
		title: "Part of the keys", w: 8, h: 7, unit: "percentunit", noData: "no shards",
		about:   "Part of all keys that a shard owns. It changes only with the configuration.",
		queries: []query{{`max by (shard_id) (ratelimiter_ring_key_share_ratio{` + ofShards + `})`, "{{shard_id}}"}},
	})

	l.fold("The Redis server (redis_exporter, needs a label shard_id on its targets)")
	const server = `{shard_id=~"$shard_id"}`
	l.plot(panel{
		title: "Redis CPU", w: 8, h: 8, unit: "percentunit", noData: "no redis_exporter",
		about:   "CPU of the server, 100 % is one core. Scripts run on one core: near 100 % the shard is full, whatever the machine has left.",
		queries: []query{{`sum by (shard_id) (rate(redis_cpu_user_seconds_total` + server + `[$__rate_interval])) + sum by (shard_id) (rate(redis_cpu_sys_seconds_total` + server + `[$__rate_interval]))`, "{{shard_id}}"}},
	})
	l.plot(panel{
		title: "Redis memory", w: 8, h: 8, unit: "bytes", noData: "no redis_exporter",
		about: "Memory used, and the most it may use (0: no limit). With a limit and a policy other than noeviction, counters are thrown away.",
		queries: []query{
			{`max by (shard_id) (redis_memory_used_bytes` + server + `)`, "{{shard_id}} used"},
			{`max by (shard_id) (redis_memory_max_bytes` + server + `)`, "{{shard_id}} most"},
		},
	})
	l.plot(panel{
		title: "Redis slow log", w: 8, h: 8, unit: "short", noData: "no redis_exporter",
		about:   "New entries of the slow log within each interval: commands that took longer than slowlog-log-slower-than (10 ms unless set).",
		queries: []query{{`max by (shard_id) (delta(redis_slowlog_last_id` + server + `[$__rate_interval]))`, "{{shard_id}}"}},
	})
	return l.build()
}
