package observability_test

import (
	"fmt"
	"math"
	"strconv"
)

// fixtureLimits are the limits of the service: their part of the traffic, and what is
// configured. leased is the part of what the primary would admit that leases do.
var fixtureLimits = []fixtureLimit{
	{"api", 0.7, 6000, 60, 0.6}, {"login", 0.25, 5, 300, 0}, {"export", 0.05, 20, 3600, 0},
}

type fixtureLimit struct {
	name             string
	part             float64
	capacity, window float64
	leased           float64
}

// shardMoment is what one process sees of a shard in one step.
type shardMoment struct {
	labels, id     string
	n, p           int
	decisions      float64
	fell           float64 // decided without the primary
	state          float64
	slow           bool
	opened         float64
	median, spread float64 // of what callers wait
	share          float64 // of the keys
}

type counting func(family, series string, add float64)

func isTrue(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// addShard adds the rest of what a process exports about a shard.
func (f *fixture) addShard(count counting, m shardMoment) {
	const r = "ratelimiter_"
	l := "{" + m.labels
	away := m.state != 0
	noise := 1 + 0.05*math.Sin(float64(m.n*7+m.p))
	gauge := func(name, more string, v float64) { f.add(r+name, "gauge", r+name+l+more+"}", v) }
	counter := func(name, more string, add float64) { count(r+name, r+name+"_total"+l+more+"}", add) }

	// Probes come every five seconds while the breaker is open; the last one is ok.
	for _, from := range []string{"closed", "open", "half_open"} {
		for _, to := range []string{"closed", "open", "half_open"} {
			probes := 0.0
			if away && from != to && from != "closed" && to != "closed" {
				probes = 6
			}
			if from != to && (from != "closed" || to != "open") {
				counter("circuit_transitions", `,from="`+from+`",to="`+to+`"`, probes)
			}
		}
	}
	counter("circuit_probes", `,result="failed"`, 6*isTrue(away))
	counter("circuit_probes", `,result="ok"`, m.opened)
	counter("circuit_rejections", "", m.fell*isTrue(away))
	counter("unknown_charges", "", 0.01*m.fell*isTrue(m.slow))
	counter("settled_charges", "", 0.3*m.fell)
	counter("settle_lost", "", 0.001*m.fell)
	counter("script_loads", "", isTrue(m.n == 1)+m.opened)

	commands := m.decisions - m.fell*isTrue(away)
	batch := 3.2 * noise
	f.addHistogram("ratelimiter_redis_command_duration_seconds", m.labels+`,command="charge"`, commands/batch, m.median*0.8, m.spread)
	f.addHistogram("ratelimiter_redis_command_duration_seconds", m.labels+`,command="look"`, 3, m.median*0.7, m.spread)
	f.addHistogram("ratelimiter_batch_entries", m.labels, commands/batch, batch, 0.6)

	gauge("inflight_operations", "", math.Round(2*noise+30*isTrue(m.slow)))
	gauge("queue_entries", "", math.Round(1*noise+400*isTrue(m.slow)))
	gauge("shard_up", "", 1-isTrue(away))
	gauge("shard_split_brain", "", 0)
	gauge("config_mismatch", "", 0)
	gauge("ring_key_share_ratio", "", m.share)
	gauge("redis_clock_offset_seconds", "", 0.0004*noise+0.0002*m.share*float64(m.p))
	gauge("replica_lag_seconds", "", 0.4*noise)
	for _, role := range []string{"primary", "replica"} {
		used := 3 * noise * isTrue(role == "primary")
		if m.slow && role == "primary" {
			used = 30
		}
		gauge("redis_pool_connections", `,role="`+role+`",state="used"`, math.Round(used))
		gauge("redis_pool_connections", `,role="`+role+`",state="idle"`, math.Round(math.Max(2, 8-used)))
		counter("redis_pool_timeouts", `,role="`+role+`"`, 15*isTrue(m.slow && role == "primary"))
		waits := 0.02 * noise
		if m.slow && role == "primary" {
			waits = 40
		}
		counter("redis_pool_wait_seconds", `,role="`+role+`"`, waits)
	}

	if m.p == 0 { // redis_exporter, once for each server
		busy := 0.22 * noise * m.share * 4
		if m.slow || away && m.id == "eu-2" {
			busy = 0.97
		}
		e := `{job="redis",instance="` + m.id + `:9121",shard_id="` + m.id + `"}`
		count("redis_cpu_user_seconds", "redis_cpu_user_seconds_total"+e, 30*busy*0.7)
		count("redis_cpu_sys_seconds", "redis_cpu_sys_seconds_total"+e, 30*busy*0.3)
		f.add("redis_memory_used_bytes", "gauge", "redis_memory_used_bytes"+e, math.Round(180e6*noise))
		f.add("redis_memory_max_bytes", "gauge", "redis_memory_max_bytes"+e, 1<<30)
		f.slow[m.id] += isTrue(m.n%40 == 3) + 25*isTrue(busy > 0.9)
		f.add("redis_slowlog_last_id", "gauge", "redis_slowlog_last_id"+e, f.slow[m.id])
	}
}

// addHistogram adds n observations of a log-normal distribution.
func (f *fixture) addHistogram(name, l string, n, median, spread float64) {
	bounds := f.bounds[name]
	add := func(series string, v float64) {
		f.sums[series] += v
		f.add(name, "histogram", series, math.Round(f.sums[series]))
	}
	for _, b := range bounds {
		cdf := 0.5 * math.Erfc(-math.Log(b/median)/spread/math.Sqrt2)
		add(name+`_bucket{`+l+`,le="`+strconv.FormatFloat(b, 'g', -1, 64)+`"}`, n*cdf)
	}
	add(name+`_bucket{`+l+`,le="+Inf"}`, n)
	add(name+`_count{`+l+`}`, n)
	key := name + "_sum{" + l + "}"
	f.sums[key] += n * median * math.Exp(spread*spread/2)
	f.add(name, "histogram", key, f.sums[key])
}

// addLimit adds what a process exports about a limit, beside its decisions.
func (f *fixture) addLimit(count counting, l string, limit fixtureLimit, decided, allowed, cached, leased float64, n int) {
	const r = "ratelimiter_"
	wave := 1 + 0.1*math.Sin(float64(n)/30+limit.part*20)
	count(r+"tokens_requested", r+"tokens_requested_total{"+l+"}", decided*1.3)
	count(r+"tokens_granted", r+"tokens_granted_total{"+l+"}", allowed*1.25)
	count(r+"near_limit", r+"near_limit_total{"+l+"}", decided*0.08*wave)
	count(r+"near_cache_hits", r+"near_cache_hits_total{"+l+"}", cached)
	f.add(r+"near_cache_entries", "gauge", r+"near_cache_entries{"+l+"}", math.Round(60*wave*isTrue(limit.name != "export")))
	if limit.leased > 0 { // the others export nothing about leases
		f.add(r+"lease_outstanding", "gauge", r+"lease_outstanding{"+l+"}", math.Round(leased*0.08*wave))
		f.add(r+"lease_bound", "gauge", r+"lease_bound{"+l+"}", 64)
		count(r+"lease_returned", r+"lease_returned_total{"+l+"}", leased*0.35*wave)
	}
	f.add(r+"limit_capacity", "gauge", r+"limit_capacity{"+l+"}", limit.capacity)
	f.add(r+"limit_window_seconds", "gauge", r+"limit_window_seconds{"+l+"}", limit.window)
}

// addProcess adds what a process exports about itself, and the alerts that fire.
func (f *fixture) addProcess(count counting, who string, n, p int, decided, bad float64) {
	l := "{" + who
	at := n * fixtureStep
	incident := at >= slowFrom && at < openUntil
	noise := 1 + 0.05*math.Sin(float64(n*3+p))
	f.add("ratelimiter_local_keys", "gauge", "ratelimiter_local_keys"+l+"}", math.Round(40*noise+3000*isTrue(incident)))
	for state, v := range map[string]float64{"closed": 4 - isTrue(at >= openFrom && at < openUntil), "open": isTrue(at >= openFrom && at < openUntil), "half_open": 0} {
		f.add("ratelimiter_ring_shards", "gauge", `ratelimiter_ring_shards`+l+`,state="`+state+`"}`, v)
	}
	count("process_cpu_seconds", "process_cpu_seconds_total"+l+"}", decided*18e-6*noise+bad*2e-6)
	f.add("go_goroutines", "gauge", "go_goroutines"+l+"}", math.Round(140*noise+500*isTrue(at >= slowFrom && at < openFrom)))
	f.add("go_memstats_heap_inuse_bytes", "gauge", "go_memstats_heap_inuse_bytes"+l+"}", math.Round(48e6*noise))
	f.add("go_gc_duration_seconds", "summary", `go_gc_duration_seconds`+l+`,quantile="1"}`, 180e-6*noise)
	// A new version is deployed to process b in the middle of the incident.
	newVersion := p == 1 && at >= openFrom+1200
	for version, is := range map[string]bool{"v0.1.0": !newVersion, "v0.1.1": newVersion} {
		v := math.NaN()
		if is {
			v = 1
		}
		f.add("ratelimiter_build_info", "gauge", fmt.Sprintf(`ratelimiter_build_info%s,version="%s",revision="unknown",goversion="go1.26"}`, l, version), v)
	}
	if p == 0 {
		for _, a := range []struct {
			labels   string
			from, to int
		}{
			{`alertname="RingfenceErrorBudgetBurn",severity="page",slo_name="redis_availability",long="1h",short="5m"`, slowFrom + 300, openUntil + 180},
			{`alertname="RingfenceShardsOpen",severity="page"`, openFrom + 60, openUntil},
			{`alertname="RingfenceShardOpen",severity="ticket",shard_id="eu-2"`, openFrom + 300, openUntil},
		} {
			v := math.NaN()
			if at >= a.from && at < a.to {
				v = 1
			}
			f.add("ALERTS", "gauge", `ALERTS{job="checkout",alertstate="firing",`+a.labels+`}`, v)
		}
	}
}
