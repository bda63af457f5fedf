package httplimit

import (
	"math/bits"
	"net/http"
	"strconv"
	"time"

	"github.com/ringfence/ringfence"
)

// Headers is a set of families of response header fields. Retry-After does not
// belong to any: every denied response carries it.
type Headers uint8

// The families. Combine them with |.
const (
	// HeadersStandard is RateLimit-Policy and RateLimit.
	HeadersStandard Headers = 1 << iota
	// HeadersLegacy is X-RateLimit-Limit, X-RateLimit-Remaining and
	// X-RateLimit-Reset.
	HeadersLegacy

	// HeadersNone sends neither.
	HeadersNone Headers = 0

	headersAll = HeadersStandard | HeadersLegacy
)

// maxInteger is the largest Integer of RFC 9651, section 3.3.1: 15 digits.
const maxInteger = 999_999_999_999_999

// fields writes the header fields of one limiter. It is immutable.
type fields struct {
	send   Headers
	item   string        // the policy name as an RFC 9651 String, quotes included
	policy string        // the whole RateLimit-Policy value; empty for a limit without a known shape
	quota  int64         // units; 0: take Decision.Limit
	window time.Duration // time in which quota units come back; 0: unknown
	rate   int64         // units that come back one by one every per (token bucket); 0: each one window later
	per    time.Duration
}

// newFields works out what does not change between responses. unit is empty or
// a quota unit without characters that need quoting; so is name.
func newFields(name string, limit ringfence.Limit, unit string, send Headers) fields {
	f := fields{send: send, item: `"` + name + `"`}
	switch l := limit.(type) {
	case ringfence.TokenBucket:
		f.bucket(l)
	case *ringfence.TokenBucket:
		f.bucket(*l)
	case ringfence.SlidingLog:
		f.quota, f.window = l.Limit, l.Window
	case *ringfence.SlidingLog:
		f.quota, f.window = l.Limit, l.Window
	default:
		return f // q is required, so a limit of unknown shape announces no policy
	}
	b := append([]byte(f.item), ";q="...)
	b = strconv.AppendInt(b, min(f.quota, maxInteger), 10)
	if unit != "" {
		b = append(b, `;qu="`...)
		b = append(b, unit...)
		b = append(b, '"')
	}
	b = append(b, ";w="...)
	b = strconv.AppendInt(b, seconds(f.window), 10)
	f.policy = string(b)
	return f
}

func (f *fields) bucket(l ringfence.TokenBucket) {
	f.quota, f.rate, f.per = l.Burst, l.Rate, l.Per
	f.window = scale(l.Per, l.Burst, l.Rate)
}

// write adds the fields of one decision to h.
func (f *fields) write(h http.Header, d ringfence.Decision) {
	remaining := min(d.Remaining, maxInteger)
	known := remaining >= 0
	if f.send&HeadersStandard != 0 {
		if f.policy != "" {
			h.Add("RateLimit-Policy", f.policy)
		}
		if known {
			b := make([]byte, 0, 112) // 66 for the item, 18 for r, 18 for t
			b = append(b, f.item...)
			b = append(b, ";r="...)
			b = strconv.AppendInt(b, remaining, 10)
			if t := f.effectiveWindow(d); t > 0 {
				b = append(b, ";t="...)
				b = strconv.AppendInt(b, t, 10)
			}
			h.Add("RateLimit", string(b))
		}
	}
	if f.send&HeadersLegacy != 0 {
		quota := f.quota
		if quota == 0 {
			quota = d.Limit
		}
		h.Set("X-RateLimit-Limit", strconv.FormatInt(quota, 10))
		// Reset and Remaining replace those of an outer middleware, which belong to
		// another limit, even when there is nothing to put in their place.
		h.Del("X-RateLimit-Remaining")
		h.Del("X-RateLimit-Reset")
		if known {
			h.Set("X-RateLimit-Remaining", strconv.FormatInt(d.Remaining, 10))
			if d.ResetAfter > 0 {
				h.Set("X-RateLimit-Reset", strconv.FormatInt(seconds(d.ResetAfter), 10))
			}
		}
	}
}

// effectiveWindow returns t of the RateLimit field in seconds; 0 when unknown.
// doc.go says why it is what it is.
func (f *fields) effectiveWindow(d ringfence.Decision) int64 {
	var t int64
	switch {
	case f.rate > 0:
		t = seconds(scale(f.per, min(max(d.Remaining, 1), f.quota), f.rate))
	case d.ResetAfter > 0:
		t = seconds(d.ResetAfter)
	case f.window > 0:
		t = seconds(f.window)
	}
	if !d.Allowed {
		retry := seconds(d.RetryAfter)
		if t == 0 || t > retry {
			t = retry
		}
	}
	return t
}

// seconds rounds up to whole seconds, at least 1: 1 ns is 1, 1.0000001 s is 2.
func seconds(d time.Duration) int64 {
	if d <= time.Second {
		return 1
	}
	s := int64(d / time.Second)
	if d%time.Second > 0 {
		s++
	}
	return s
}

// scale returns d x num / den rounded up, saturating; den is positive.
func scale(d time.Duration, num, den int64) time.Duration {
	const most = 1<<63 - 1
	if d <= 0 || num <= 0 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(d), uint64(num))
	if hi >= uint64(den) {
		return most
	}
	q, r := bits.Div64(hi, lo, uint64(den))
	if r > 0 && q < most {
		q++
	}
	return time.Duration(min(q, most))
}
