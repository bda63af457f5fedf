package main

import "fmt"

// metric is a figure of a row that targets speak of.
type metric struct {
	name  string
	value func(result) float64
	less  bool // less is better
}

var (
	throughput = metric{"throughput", func(r result) float64 { return r.DecisionsPerSecond }, false}
	medianTime = metric{"p50", func(r result) float64 { return r.P50 }, true}
	tailTime   = metric{"p99", func(r result) float64 { return r.P99 }, true}
	redisTime  = metric{"Redis CPU", func(r result) float64 { return r.RedisCPU }, true}
)

// target is a ratio to reach: of a system's median to that of redis_rate, and to that of
// the best rival of the run. Where less is better it is the most the ratio may be.
type target struct {
	workload   string
	callers    int
	system     string
	metric     metric
	toBaseline float64
	toBest     float64 // 0: none
}

// targets are the project's own, set before the first run; none is dropped because it is
// not reached.
var targets = []target{
	{"distinct", 1, own, throughput, 1, 1},
	{"distinct", 64, own, throughput, 2.5, 1.3},
	{"distinct", 512, own, throughput, 4, 1.8},
	{"zipf", 64, own, throughput, 4.5, 2.5},
	{"zipf", 512, own, throughput, 10, 4},
	{"hot", 64, own, throughput, 8, 3},
	{"hot", 512, own, throughput, 28, 10},
	{"denied", 64, own, throughput, 100, 50},
	{"lease", 64, leased, throughput, 25, 12},
	{"lease", 512, leased, throughput, 60, 25},
	{"open", openCallers, own, medianTime, 1, 1},
	{"open", openCallers, own, tailTime, 1, 1},
	{"distinct", 64, own, redisTime, 0.45, 0.8},
	{"cluster", 64, own, throughput, 1.8, 0},
}

// shareOfLimit is the part of the raw driver's throughput that ringfence is to reach.
const shareOfLimit = 0.85

// table finds rows.
type table []result

func (t table) row(workload string, callers int, system string) (result, bool) {
	for _, r := range t {
		if r.Workload == workload && r.Callers == callers && r.System == system {
			return r, true
		}
	}
	return result{}, false
}

// best is the rival with the best value among those whose rows are sound.
func (t table) best(workload string, callers int, m metric) (best result, ok bool) {
	for _, r := range t {
		s, err := systemNamed(r.System)
		if r.Workload != workload || r.Callers != callers || err != nil || !s.rival || !r.sound() {
			continue
		}
		if v := m.value(r); !ok || (m.less && v < m.value(best)) || (!m.less && v > m.value(best)) {
			best, ok = r, true
		}
	}
	return best, ok
}

// verdict says in words what became of a target.
func (x target) verdict(mine, other result, wanted float64) (ratio float64, words string) {
	if x.metric.value(other) == 0 {
		return 0, "not measured"
	}
	ratio = x.metric.value(mine) / x.metric.value(other)
	switch {
	case !mine.Right:
		return ratio, "**not reached** (grants wrongly)"
	case !mine.sound():
		return ratio, fmt.Sprintf("**not reached** (%.1f %% of the calls not decided)", 100*mine.undecided())
	case x.metric.less && ratio <= wanted, !x.metric.less && ratio >= wanted:
		return ratio, "reached"
	case wanted == 1 && !x.metric.less && mine.Fastest >= other.Slowest:
		return ratio, "within the spread"
	}
	return ratio, "**not reached**"
}

func (x target) wanted(ratio float64) string {
	if ratio == 0 {
		return "–"
	}
	sign := "≥"
	if x.metric.less {
		sign = "≤"
	}
	return fmt.Sprintf("%s %s", sign, ratioText(ratio))
}
