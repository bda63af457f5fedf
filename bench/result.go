package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// result is one line of results.json: the medians of a cell's rounds. Times are in
// microseconds, costs per decision.
type result struct {
	Workload           string  `json:"workload"`
	Callers            int     `json:"callers"`
	System             string  `json:"system"`
	DecisionsPerSecond float64 `json:"decisions_per_second"`
	P50                float64 `json:"p50_us"`
	P99                float64 `json:"p99_us"`
	P999               float64 `json:"p999_us"`
	ClientCPU          float64 `json:"client_cpu_us"`
	RedisCPU           float64 `json:"redis_cpu_us"`
	// Granted and Expected are those of the round whose throughput is the median (of an
	// even number the lower one), from the first call on, warm-up included.
	Granted  int64 `json:"granted"`
	Expected int64 `json:"expected"`
	// Right: every round granted what the limit says.
	Right     bool    `json:"right"`
	Slowest   float64 `json:"decisions_per_second_min"`
	Fastest   float64 `json:"decisions_per_second_max"`
	Allocs    float64 `json:"allocs"`
	Bytes     float64 `json:"alloc_bytes"`
	Rounds    int     `json:"rounds"`
	Disturbed int     `json:"rounds_disturbed"`
	// Calls, Away and Failed are sums over the rounds, warm-up included: all calls, those
	// that a fallback answered and those that ended with an error. The latter two are no
	// decisions.
	Calls  int64  `json:"calls"`
	Away   int64  `json:"answered_by_fallback"`
	Failed int64  `json:"errors"`
	Error  string `json:"last_error,omitempty"`
}

func summary(workload string, callers int, system string, cells []cell) result {
	of := func(value func(cell) float64) float64 { return median(cells, value) }
	byThroughput := slices.Clone(cells)
	slices.SortFunc(byThroughput, func(a, b cell) int {
		return int(math.Copysign(1, a.perSecond-b.perSecond))
	})
	middle := byThroughput[(len(cells)-1)/2]
	r := result{
		Workload: workload, Callers: callers, System: system,
		DecisionsPerSecond: math.Round(of(func(c cell) float64 { return c.perSecond })),
		P50:                round3(of(func(c cell) float64 { return micros(c.p50) })),
		P99:                round3(of(func(c cell) float64 { return micros(c.p99) })),
		P999:               round3(of(func(c cell) float64 { return micros(c.p999) })),
		ClientCPU:          round3(of(func(c cell) float64 { return micros(c.client) })),
		RedisCPU:           round3(of(func(c cell) float64 { return micros(c.server) })),
		Allocs:             round3(of(func(c cell) float64 { return c.allocs })),
		Bytes:              math.Round(of(func(c cell) float64 { return c.bytes })),
		Granted:            middle.granted,
		Expected:           middle.expected,
		Slowest:            math.Round(byThroughput[0].perSecond),
		Fastest:            math.Round(byThroughput[len(cells)-1].perSecond),
		Rounds:             len(cells),
		Right:              true,
	}
	for _, c := range cells {
		r.Right = r.Right && c.right
		r.Calls += c.calls
		r.Away += c.away
		r.Failed += c.failed
		if c.lastErr != nil {
			r.Error = c.lastErr.Error()
		}
		if c.others > disturbedAbove {
			r.Disturbed++
		}
	}
	return r
}

// undecidedMost is the part of its calls that a system may leave to a fallback or end with
// an error before its figures count for nothing: they are only those of the other calls.
const undecidedMost = 0.001

// undecided is that part.
func (r result) undecided() float64 { return float64(r.Away+r.Failed) / float64(max(1, r.Calls)) }

// sound says whether the row may be compared with others.
func (r result) sound() bool { return r.Right && r.undecided() <= undecidedMost }

func median(cells []cell, value func(cell) float64) float64 {
	values := make([]float64, len(cells))
	for i, c := range cells {
		values[i] = value(c)
	}
	slices.Sort(values)
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}

func round3(v float64) float64 { return math.Round(v*1000) / 1000 }

// about is run.json: how and where the results came about.
type about struct {
	Date     string            `json:"date"`
	Command  string            `json:"command"`
	Rounds   int               `json:"rounds"`
	Cell     string            `json:"cell"`
	Warm     string            `json:"warm_up"`
	Open     string            `json:"open_loop_cell"`
	Took     string            `json:"took"`
	Machine  string            `json:"machine"`
	CPUs     int               `json:"cpus"`
	System   string            `json:"operating_system"`
	Go       string            `json:"go"`
	Redis    string            `json:"redis"`
	Modules  map[string]string `json:"modules"`
	Problems []string          `json:"problems"`
}

const (
	resultsFile = "bench/results.json"
	aboutFile   = "bench/run.json"
)

func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func writeResults(dir string, rows []result, a about) error {
	if err := writeJSON(filepath.Join(dir, resultsFile), rows); err != nil {
		return err
	}
	return writeJSON(filepath.Join(dir, aboutFile), a)
}

func readResults(dir string) (rows []result, a about, err error) {
	if err = readJSON(filepath.Join(dir, resultsFile), &rows); err == nil {
		err = readJSON(filepath.Join(dir, aboutFile), &a)
	}
	return rows, a, err
}

func (a *about) timing(o options, took time.Duration) {
	a.Rounds, a.Cell, a.Warm, a.Open = o.rounds, o.closed.measured.String(), o.closed.warm.String(), o.open.measured.String()
	a.Took = took.Round(time.Second).String()
}
