package main

import (
	"math/bits"
	"time"
)

// histogram counts durations in buckets that are at most 1/64 wide, as the HDR histogram
// (Tene) does: a power of two is cut into 64 equal parts. Not safe for concurrent use:
// every caller has its own, and they are added up at the end.
type histogram struct {
	counts [histogramBuckets]uint32
	total  int64
}

const (
	histogramParts = 64 // a power of two: the low 6 bits below the leading one
	// 64 ns and less are exact; the last bucket ends at 2^37 ns, over two minutes.
	histogramBuckets = 32 * histogramParts
)

func bucketOf(ns int64) int {
	if ns < histogramParts {
		return int(max(ns, 0))
	}
	shift := bits.Len64(uint64(ns)) - 7
	return min((shift+1)*histogramParts+int(ns>>shift)-histogramParts, histogramBuckets-1)
}

// bucketTop is the longest duration that a bucket counts, in ns.
func bucketTop(i int) int64 {
	if i < histogramParts {
		return int64(i)
	}
	shift := i/histogramParts - 1
	return (int64(i%histogramParts)+histogramParts+1)<<shift - 1
}

func (h *histogram) record(d time.Duration) {
	h.counts[bucketOf(int64(d))]++
	h.total++
}

func (h *histogram) add(o *histogram) {
	for i, n := range o.counts {
		h.counts[i] += n
	}
	h.total += o.total
}

// quantile is the smallest bucket end that at least q of the durations do not exceed; 0
// if nothing was recorded.
func (h *histogram) quantile(q float64) time.Duration {
	rank := int64(q * float64(h.total))
	if float64(rank) < q*float64(h.total) || rank == 0 {
		rank++
	}
	seen := int64(0)
	for i, n := range h.counts {
		if seen += int64(n); seen >= rank && n > 0 {
			return time.Duration(bucketTop(i))
		}
	}
	return 0
}
