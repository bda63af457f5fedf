package ringfence

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// seen are the buckets of a histogram in full: classic ones by bound, native ones by key.
func seen(t *testing.T, m prometheus.Metric) (all map[string]uint64, h *dto.Histogram) {
	t.Helper()
	var out dto.Metric
	if err := m.Write(&out); err != nil {
		t.Fatal(err)
	}
	h = out.Histogram
	all = map[string]uint64{"count": h.GetSampleCount(), "zero": h.GetZeroCount()}
	for _, b := range h.GetBucket() {
		all[fmt.Sprint("le ", b.GetUpperBound())] = b.GetCumulativeCount()
	}
	key, n, at := int32(0), int64(0), 0
	for _, span := range h.GetPositiveSpan() {
		key += span.GetOffset()
		for range span.GetLength() {
			n += h.GetPositiveDelta()[at]
			if n != 0 {
				all[fmt.Sprint("key ", key)] = uint64(n)
			}
			key, at = key+1, at+1
		}
	}
	return all, h
}

// Our histogram against that of client_golang, which is fed each call by itself.
func TestLatenciesAreCountedAsClientGolangCountsThem(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for _, row := range []struct {
		name string
		draw func() time.Duration
	}{
		{"nothing", func() time.Duration { return 0 }},
		{"what callers wait", func() time.Duration { return time.Duration(1<<rnd.IntN(34)) * time.Duration(1+rnd.IntN(7)) / 4 }},
		{"the bounds and beside them", func() time.Duration {
			bound := latencyBounds[rnd.IntN(len(latencyBounds))]
			return time.Duration(bound*1e9) + time.Duration(rnd.IntN(3)-1)
		}},
		{"few", func() time.Duration { return time.Duration(100+rnd.IntN(2)) * time.Nanosecond }},
		{"from 1 ns to 1,000 s", func() time.Duration { return time.Duration(1<<rnd.IntN(39)) * time.Duration(1+rnd.IntN(3)) }},
	} {
		t.Run(row.name, func(t *testing.T) {
			theirs := prometheus.NewHistogram(prometheus.HistogramOpts{
				Name: "h", Buckets: latencyBounds, NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 160})
			ours := newLatencyVec("a", nil).of[0]
			for range 300 {
				took, calls := row.draw(), 1+rnd.IntN(64)
				ours.add(took, int64(calls))
				for range calls {
					theirs.Observe(took.Seconds())
				}
			}
			want, wantH := seen(t, theirs)
			got, gotH := seen(t, ours)
			if gotH.GetSchema() != wantH.GetSchema() {
				t.Errorf("schema %d, want %d", gotH.GetSchema(), wantH.GetSchema())
			}
			for _, of := range []map[string]uint64{want, got} {
				for name := range of {
					if got[name] != want[name] {
						t.Errorf("%s: %d, want %d", name, got[name], want[name])
					}
				}
			}
			if a, b := gotH.GetSampleSum(), wantH.GetSampleSum(); max(a, b)-min(a, b) > 1e-9*b {
				t.Errorf("the sum is %v, want %v", a, b)
			}
			if gotH.GetCreatedTimestamp() == nil {
				t.Error("it does not say since when it counts")
			}
		})
	}
}

func TestLatenciesShowNoMoreBucketsThanPromised(t *testing.T) {
	l := newLatencyVec("a", nil).of[0]
	for _, bin := range latencyBins[:len(latencyBins)-1] {
		l.add(time.Duration(bin.upTo*1e9), 1)
	}
	l.add(-time.Second, 1) // a clock that steps back
	got, h := seen(t, l)
	native := 0
	for _, d := range h.GetPositiveSpan() {
		native += int(d.GetLength())
	}
	if native > 160 || native < 80 || h.GetSchema() != 2 {
		t.Errorf("%d buckets of schema %d", native, h.GetSchema())
	}
	if n := uint64(len(latencyBins)); got["count"] != n {
		t.Errorf("%d counted of %d", got["count"], n)
	}
}
