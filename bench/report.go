package main

import (
	"fmt"
	"slices"
	"strings"
)

// document writes docs/benchmarks.md and the charts beside it, by file name. It depends
// on its arguments alone: the same results give the same bytes.
func document(rows []result, a about) (text string, charts map[string]string) {
	d := &writer{table: rows}
	d.head(a)
	d.targets()
	charts = d.charts()
	for _, w := range workloads {
		if !strings.HasPrefix(w.id, "shards-") && d.has(w.id) {
			d.workload(w)
		}
	}
	d.shards()
	d.method(a)
	return d.String(), charts
}

type writer struct {
	strings.Builder
	table table
}

func (d *writer) line(format string, args ...any) { fmt.Fprintf(d, format+"\n", args...) }

func (d *writer) has(workload string) bool {
	return slices.ContainsFunc(d.table, func(r result) bool { return r.Workload == workload })
}

func (d *writer) head(a about) {
	d.line("# Benchmarks")
	d.line("")
	d.line("Written by `make bench` out of [results.json](../%s) and [run.json](../%s); do not edit. Why it is measured like this: [0020](adr/0020-benchmarks.md).", resultsFile, aboutFile)
	d.line("")
	d.line("Ratios within one run are the result. Absolute numbers are this machine's, with clients and servers on the same processors, and move by a third from day to day.")
	d.line("")
	d.line("| | |")
	d.line("|---|---|")
	d.line("| machine | %s, GOMAXPROCS %d |", orUnknown(a.Machine), a.CPUs)
	d.line("| system | %s |", a.System)
	d.line("| Go, Redis | %s, %s (no persistence, io-threads 1, loopback TCP) |", a.Go, orUnknown(a.Redis))
	modules := make([]string, 0, len(a.Modules))
	for m, v := range a.Modules {
		modules = append(modules, m+" "+v)
	}
	slices.Sort(modules)
	d.line("| modules | %s |", strings.Join(modules, ", "))
	d.line("| run | %s, %s, `%s`; %d rounds of %s (open loop %s) after %s of warm-up |", a.Date, a.Took, a.Command, a.Rounds, a.Cell, a.Open, a.Warm)
	cells, disturbed := 0, 0
	for _, r := range d.table {
		cells, disturbed = cells+r.Rounds, disturbed+r.Disturbed
	}
	d.line("| cells | %d, of which other programs took more than %.0f %% of the machine during %d, after repeats |", cells, 100*disturbedAbove, disturbed)
	d.line("")
	if len(a.Problems) > 0 {
		d.line("Could not be measured:")
		d.line("")
		for _, p := range a.Problems {
			d.line("- %s", cellText(p))
		}
		d.line("")
	}
	d.line("## Systems")
	d.line("")
	d.line("| system | what it is |")
	d.line("|---|---|")
	for _, s := range systems {
		note := ""
		if s.name == leased && !d.measured(leased) {
			note = " (not in this run)"
		}
		d.line("| %s | %s%s |", s.name, s.about, note)
	}
	d.line("")
	d.line("They are not all the same algorithm: a fixed window does less and lets through twice its limit around the end of a window. Left out, for the module registry does not give them: %s.", strings.Join(leftOut, ", "))
	d.line("")
}

func (d *writer) measured(system string) bool {
	return slices.ContainsFunc(d.table, func(r result) bool { return r.System == system })
}

func (d *writer) targets() {
	d.line("## Targets")
	d.line("")
	d.line("Set before anything was measured. \"Best rival\" is the rival with the best figure in that row among those that granted the right number and decided at least %.1f %% of their calls; ringfence is held to the same. \"Within the spread\" is said of \"no slower\" alone, where the medians say slower but the ranges of the rounds overlap.", 100*(1-undecidedMost))
	d.line("")
	d.line("| workload | callers | system | figure | against %s: wanted | reached | | against the best rival: wanted | reached | |", baseline)
	d.line("|---|--:|---|---|--:|--:|---|--:|--:|---|")
	for _, x := range targets {
		mine, ok := d.table.row(x.workload, x.callers, x.system)
		cells := make([]string, 0, 6)
		add := func(wanted float64, other result, found bool, name bool) {
			switch {
			case wanted == 0:
				cells = append(cells, "–", "–", "")
			case !ok || !found:
				cells = append(cells, x.wanted(wanted), "–", "not measured")
			default:
				ratio, words := x.verdict(mine, other, wanted)
				if name {
					words += " (" + other.System + ")"
				}
				cells = append(cells, x.wanted(wanted), ratioText(ratio), words)
			}
		}
		base, found := d.table.row(x.workload, x.callers, baseline)
		add(x.toBaseline, base, found, false)
		best, found := d.table.best(x.workload, x.callers, x.metric)
		add(x.toBest, best, found, true)
		d.line("| `%s` | %d | %s | %s | %s |", x.workload, x.callers, x.system, x.metric.name, strings.Join(cells, " | "))
	}
	d.line("")
	d.limit()
}

// limit is the share of what the server can do at all.
func (d *writer) limit() {
	mine, ok := d.table.row("limit", 512, own)
	most, found := d.table.row("limit", 512, raw)
	if !ok || !found || most.DecisionsPerSecond == 0 {
		d.line("The physical limit was not measured.")
		d.line("")
		return
	}
	share := mine.DecisionsPerSecond / most.DecisionsPerSecond
	words := "reached"
	switch {
	case share < shareOfLimit || !mine.sound():
		words = "**not reached**"
	case share > 1:
		words = "more than there is: these cells were disturbed, measure again"
	}
	d.line("The physical limit: the same script straight onto sockets, %d connections with %d calls of %d keys under way on each, makes %s decisions a second; ringfence at 512 callers makes %.0f %% of that (wanted: at least %.0f %%, %s).",
		rawConns, rawDepth, batchKeys, count(most.DecisionsPerSecond), 100*share, 100*shareOfLimit, words)
	d.line("")
}

func (d *writer) charts() map[string]string {
	charts := map[string]string{}
	add := func(file, title, unit string, callers int, ids []string, m metric) {
		var groups []chartGroup
		for _, id := range ids {
			g := chartGroup{name: id}
			for _, s := range systems {
				if r, ok := d.table.row(id, callers, s.name); ok && m.value(r) > 0 && s.name != raw && s.name != "noop" {
					g.bars = append(g.bars, chartBar{s.name, m.value(r)})
				}
			}
			if len(g.bars) > 0 {
				groups = append(groups, g)
			}
		}
		if len(groups) == 0 {
			return
		}
		charts[file] = chart(title, unit, groups)
		d.line("![%s](%s)", title, file)
		d.line("")
	}
	closed := []string{"distinct", "hot", "denied", "zipf", "lease"}
	add("benchmarks-throughput-64.svg", "Decisions a second, 64 callers (more is better)", "/s", 64, closed, throughput)
	add("benchmarks-throughput-512.svg", "Decisions a second, 512 callers (more is better)", "/s", 512, closed, throughput)
	add("benchmarks-p99-64.svg", "p99 latency, 64 callers (less is better)", " µs", 64, closed, tailTime)
	return charts
}

func (d *writer) workload(w workload) {
	d.line("## `%s`", w.id)
	d.line("")
	d.line("%s.", strings.ToUpper(w.about[:1])+w.about[1:])
	d.line("")
	for _, callers := range w.callers {
		base, hasBase := d.table.row(w.id, callers, baseline)
		begun := false
		for _, s := range systems {
			r, ok := d.table.row(w.id, callers, s.name)
			if !ok {
				continue
			}
			if !begun {
				begun = true
				if w.open {
					d.line("Up to %d calls under way:", callers)
				} else if callers == 1 {
					d.line("1 caller:")
				} else {
					d.line("%d callers:", callers)
				}
				d.line("")
				d.line("| system | decisions/s | min–max | × %s | p50 / p99 / p99.9 µs | client µs | Redis µs | allocs, B | granted / expected | remarks |", baseline)
				d.line("|---|--:|--:|--:|--:|--:|--:|--:|--:|---|")
			}
			ratio := "–"
			if hasBase && base.DecisionsPerSecond > 0 && !w.open {
				ratio = ratioText(r.DecisionsPerSecond / base.DecisionsPerSecond)
			}
			d.line("| %s | %s | %s–%s | %s | %s / %s / %s | %.2f | %.2f | %.1f, %.0f | %d / %d | %s |",
				r.System, count(r.DecisionsPerSecond), count(r.Slowest), count(r.Fastest), ratio,
				timeText(r.P50), timeText(r.P99), timeText(r.P999), r.ClientCPU, r.RedisCPU, r.Allocs, r.Bytes, r.Granted, r.Expected, r.remarks())
		}
		if begun {
			d.line("")
		}
	}
}

func (r result) remarks() string {
	var all []string
	if !r.Right {
		all = append(all, "**grants wrongly**")
	}
	if r.Away > 0 {
		all = append(all, fmt.Sprintf("%d calls answered by the failure policy, not counted", r.Away))
	}
	if r.Failed > 0 {
		all = append(all, fmt.Sprintf("%d errors, not counted: %s", r.Failed, cellText(r.Error)))
	}
	if r.Disturbed > 0 {
		all = append(all, fmt.Sprintf("%d of %d rounds disturbed", r.Disturbed, r.Rounds))
	}
	return strings.Join(all, "; ")
}

func (d *writer) shards() {
	begun := false
	for _, callers := range []int{64, 512} {
		one, _ := d.table.row("shards-1", callers, own)
		for _, w := range workloads {
			r, ok := d.table.row(w.id, callers, own)
			if w.shards == 0 || !ok {
				continue
			}
			if !begun {
				begun = true
				d.line("## More shards")
				d.line("")
				d.line("`distinct` on rings of several servers, all on this one machine: what more shards cost, not what they bring. Calls that would share a batch on one shard share smaller ones on several; on machines of their own the servers work at the same time.")
				d.line("")
				d.line("| callers | shards | decisions/s | min–max | × one shard | p50 / p99 µs | client µs | Redis µs | granted / expected | remarks |")
				d.line("|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|")
			}
			ratio := "–"
			if one.DecisionsPerSecond > 0 {
				ratio = ratioText(r.DecisionsPerSecond / one.DecisionsPerSecond)
			}
			d.line("| %d | %d | %s | %s–%s | %s | %s / %s | %.2f | %.2f | %d / %d | %s |", callers, w.shards, count(r.DecisionsPerSecond),
				count(r.Slowest), count(r.Fastest), ratio, timeText(r.P50), timeText(r.P99), r.ClientCPU, r.RedisCPU, r.Granted, r.Expected, r.remarks())
		}
	}
	if begun {
		d.line("")
	}
}

func (d *writer) method(a about) {
	d.line("## How it is measured")
	d.line("")
	d.line("- Closed loop: every caller calls again as soon as it has its answer. One reading of the clock a decision; every caller has a histogram of its own, exact to 1/64, and a context of its own. The row `noop` says what that costs.")
	d.line("- Every cell has an empty server and a client opened for it. The systems take turns, every round beginning with another one. A row is the median of %d rounds, each figure by itself; granted and expected are those of the round with the median throughput.", a.Rounds)
	d.line("- Client µs is the CPU time of the whole process (getrusage), Redis µs that of all servers (INFO cpu), both per decision, like the allocations. The process also runs the measurement; the thread that keeps the instants of the open loop is left out (on Linux).")
	d.line("- Expected is what the limit admits in the server time of the cell, by the system's own kind of limit, given how often each key was called. Where all are allowed granted must be equal to it. For `denied` a bucket must not exceed it and may stay 2 below (the first and the last instant are not known better), a fixed window may be one window off; for `zipf` 3 %% less is right, for calls are not evenly spread over time. A row with a wrong round is marked and counts for no target.")
	d.line("- Calls that a fallback answers or that end with an error are no decisions: they are in no throughput and in no latency, and a row with more than %.1f %% of them counts for no target.", 100*undecidedMost)
	d.line("- A cell during which other programs took more than %.0f %% of the machine (/proc/stat) is run again, if there are not too many; what is still disturbed is kept and marked.", 100*disturbedAbove)
	d.line("")
	d.line("To repeat it: `make bench`, or `make bench ARGS=-short` for a few minutes, or, in bench/, `go run . -workloads zipf -systems ringfence,redis_rate` for a part, which writes nothing. `make bench ARGS=-report` writes this document anew from the stored results.")
}

func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

// cellText makes text fit into a table.
func cellText(s string) string {
	return strings.NewReplacer("|", "/", "\n", " ").Replace(s)
}

// count writes a number with three digits that matter.
func count(v float64) string {
	switch {
	case v >= 9.995e6:
		return fmt.Sprintf("%.1fM", v/1e6)
	case v >= 999_500:
		return fmt.Sprintf("%.2fM", v/1e6)
	case v >= 99_950:
		return fmt.Sprintf("%.0fk", v/1e3)
	case v >= 1000:
		return fmt.Sprintf("%.1fk", v/1e3)
	}
	return fmt.Sprintf("%.0f", v)
}

func timeText(us float64) string {
	if us < 10 {
		return fmt.Sprintf("%.2f", us)
	}
	return fmt.Sprintf("%.0f", us)
}

func ratioText(v float64) string {
	if v >= 10 {
		return fmt.Sprintf("%.0f×", v)
	}
	return fmt.Sprintf("%.2f×", v)
}
