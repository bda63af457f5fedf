package ringfence

import (
	"math"
	"slices"
	"sort"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// The histogram request_latency_seconds is ours and not client_golang's for one reason: it
// must take one duration for many calls (see tally.go), and for them all at once.

// The native histogram: eight buckets each time a duration doubles, as client_golang makes
// of a factor of 1.1, from 1 ns up to 1,024 s, of which at most so many are shown: while
// there are more, two become one.
const (
	latencySchema  = 3
	latencyFrom    = -30 // 2^-30 s is 0.93 ns
	latencyTo      = 10
	latencyBuckets = 160
)

// latencyBin is the range of durations up to and including upTo, in seconds, that are in
// one bucket of both kinds.
type latencyBin struct {
	upTo    float64
	classic int // index in latencyBounds; their number: above all of them
	native  int // key; the first bin, of nothing, has none
}

// latencyBins are the bounds of both kinds in one order.
var latencyBins = func() []latencyBin {
	bounds := slices.Clone(latencyBounds)
	for key := latencyFrom << latencySchema; key <= latencyTo<<latencySchema; key++ {
		bounds = append(bounds, nativeBound(key))
	}
	bounds = append(bounds, 0, math.Inf(1))
	slices.Sort(bounds)
	bins := make([]latencyBin, 0, len(bounds))
	for _, upTo := range slices.Compact(bounds) {
		classic, _ := slices.BinarySearch(latencyBounds, upTo)
		native := sort.Search((latencyTo-latencyFrom)<<latencySchema, func(i int) bool {
			return nativeBound(latencyFrom<<latencySchema+i) >= upTo
		})
		bins = append(bins, latencyBin{upTo, classic, latencyFrom<<latencySchema + native})
	}
	return bins
}()

// nativeBound is the upper bound of a bucket.
func nativeBound(key int) float64 {
	const parts = 1 << latencySchema
	whole := key >> latencySchema
	return math.Ldexp(math.Exp2(float64(key-whole*parts)/parts), whole)
}

// binOf is where a duration belongs.
func binOf(took time.Duration) int {
	s := took.Seconds()
	low, high := 0, len(latencyBins)-1
	for low < high {
		if mid := (low + high) / 2; s <= latencyBins[mid].upTo {
			high = mid
		} else {
			low = mid + 1
		}
	}
	return low
}

// latencies is one series of the histogram. A duration is counted with two additions.
type latencies struct {
	desc    *prometheus.Desc
	labels  []string
	created time.Time
	sum     atomic.Int64 // ns
	counts  []atomic.Int64
}

func newLatencies(desc *prometheus.Desc, labels ...string) *latencies {
	return &latencies{desc: desc, labels: labels, created: time.Now(), counts: make([]atomic.Int64, len(latencyBins))}
}

// add counts a duration for so many calls. A clock that steps back makes none of it.
func (l *latencies) add(took time.Duration, calls int64) {
	took = max(0, took)
	l.counts[binOf(took)].Add(calls)
	l.sum.Add(int64(took) * calls)
}

// Desc implements prometheus.Metric.
func (l *latencies) Desc() *prometheus.Desc { return l.desc }

// Write implements prometheus.Metric.
func (l *latencies) Write(out *dto.Metric) error {
	sum := time.Duration(l.sum.Load()).Seconds()
	var count, zero uint64
	classic := make(map[float64]uint64, len(latencyBounds)) // cumulative
	native := map[int]int64{}
	for i := range l.counts {
		bin, n := latencyBins[i], l.counts[i].Load()
		count += uint64(n)
		if bin.classic < len(latencyBounds) {
			classic[latencyBounds[bin.classic]] = count
		}
		switch {
		case i == 0:
			zero = uint64(n)
		case n > 0:
			native[bin.native] += n
		}
	}
	schema := int32(latencySchema)
	for ; len(native) > latencyBuckets; schema-- {
		native = coarser(native)
	}
	m, err := prometheus.NewConstHistogramWithCreatedTimestamp(l.desc, count, sum, classic, l.created, l.labels...)
	if err != nil {
		return err
	}
	if err := m.Write(out); err != nil {
		return err
	}
	if m, err = prometheus.NewConstNativeHistogram(l.desc, count, sum, native, nil, zero, schema, prometheus.DefNativeHistogramZeroThreshold, l.created, l.labels...); err != nil {
		return err
	}
	var part dto.Metric
	if err := m.Write(&part); err != nil {
		return err
	}
	h, n := out.Histogram, part.Histogram
	h.Schema, h.ZeroThreshold, h.ZeroCount = n.Schema, n.ZeroThreshold, n.ZeroCount
	h.PositiveSpan, h.PositiveDelta = n.PositiveSpan, n.PositiveDelta
	return nil
}

// coarser makes one bucket of each two.
func coarser(native map[int]int64) map[int]int64 {
	out := make(map[int]int64, len(native))
	for key, n := range native {
		out[(key+1)>>1] += n
	}
	return out
}

// latencyVec are the series of one shard.
type latencyVec struct {
	desc *prometheus.Desc
	of   [outcomes]*latencies
}

func newLatencyVec(shard string, labels prometheus.Labels) *latencyVec {
	const name = "request_latency_seconds"
	v := &latencyVec{desc: prometheus.NewDesc(namespace+"_"+name, metricHelp[name], []string{"shard_id", "outcome"}, labels)}
	for o := range outcomes {
		v.of[o] = newLatencies(v.desc, shard, outcomeNames[o])
	}
	return v
}

// Describe implements prometheus.Collector.
func (v *latencyVec) Describe(ch chan<- *prometheus.Desc) { ch <- v.desc }

// Collect implements prometheus.Collector.
func (v *latencyVec) Collect(ch chan<- prometheus.Metric) {
	for _, l := range v.of {
		ch <- l
	}
}
