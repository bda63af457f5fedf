package httplimit_test

import (
	"math"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/httplimit"
)

const (
	us  = time.Microsecond
	ms  = time.Millisecond
	sec = time.Second
	day = 24 * time.Hour
)

// otherLimit is a limit this package has never heard of.
type otherLimit struct{ ringfence.Limit }

func (otherLimit) Validate() error { return nil }

func TestHeaderFields(t *testing.T) {
	bucket := ringfence.TokenBucket{Rate: 10, Per: sec, Burst: 20}
	daily := ringfence.TokenBucket{Rate: 10_000, Per: day, Burst: 10_000}
	log := ringfence.SlidingLog{Limit: 100, Window: time.Minute}
	for _, c := range []struct {
		name   string
		limit  ringfence.Limit
		d      ringfence.Decision
		policy string // RateLimit-Policy
		rate   string // RateLimit
		retry  string // Retry-After
		legacy string // X-RateLimit-Limit, -Remaining, -Reset
	}{
		{
			"the worked number of Decision: 1.5 of 20 left", bucket,
			ringfence.Decision{Allowed: true, Limit: 20, Remaining: 1, ResetAfter: 1850 * ms, Source: ringfence.SourcePrimary},
			`"api";q=20;w=2`, `"api";r=1;t=1`, "", "20 1 2",
		},
		{
			"the worked number of Decision: a call of 2 denied with 0.5 left", bucket,
			ringfence.Decision{Limit: 20, Remaining: 0, RetryAfter: 150 * ms, ResetAfter: 1950 * ms, Source: ringfence.SourcePrimary},
			`"api";q=20;w=2`, `"api";r=0;t=1`, "1", "20 0 2",
		},
		{
			"a first call leaves all but one, which take the window to come back", bucket,
			ringfence.Decision{Allowed: true, Limit: 20, Remaining: 19, ResetAfter: 100 * ms},
			`"api";q=20;w=2`, `"api";r=19;t=2`, "", "20 19 1",
		},
		{
			"a day's bucket hardly used promises its own rate, not all of it in 9 seconds", daily,
			ringfence.Decision{Allowed: true, Limit: 10_000, Remaining: 9_999, ResetAfter: 8640 * ms},
			`"api";q=10000;w=86400`, `"api";r=9999;t=86392`, "", "10000 9999 9",
		},
		{
			"a day's bucket used up asks for one token's wait, not for a day's", daily,
			ringfence.Decision{Allowed: true, Limit: 10_000, Remaining: 0, ResetAfter: day},
			`"api";q=10000;w=86400`, `"api";r=0;t=9`, "", "10000 0 86400",
		},
		{
			"half of a day's bucket lasts half a day", daily,
			ringfence.Decision{Allowed: true, Limit: 10_000, Remaining: 5_000, ResetAfter: day / 2},
			`"api";q=10000;w=86400`, `"api";r=5000;t=43200`, "", "10000 5000 43200",
		},
		{
			"a denied dear call keeps t within Retry-After", daily,
			ringfence.Decision{Limit: 10_000, Remaining: 99, RetryAfter: 8640 * ms, ResetAfter: 85_544 * sec},
			`"api";q=10000;w=86400`, `"api";r=99;t=9`, "9", "10000 99 85544",
		},
		{
			"a window below a second is a second", ringfence.TokenBucket{Rate: 1000, Per: sec, Burst: 10},
			ringfence.Decision{Allowed: true, Limit: 10, Remaining: 9, ResetAfter: ms},
			`"api";q=10;w=1`, `"api";r=9;t=1`, "", "10 9 1",
		},
		{
			"a window that is not whole seconds is rounded up", ringfence.TokenBucket{Rate: 3, Per: sec, Burst: 10},
			ringfence.Decision{Allowed: true, Limit: 10, Remaining: 6, ResetAfter: 1333_334 * us},
			`"api";q=10;w=4`, `"api";r=6;t=2`, "", "10 6 2",
		},
		{
			"a window of whole seconds is not rounded up", ringfence.TokenBucket{Rate: 7, Per: 7 * sec, Burst: 7},
			ringfence.Decision{Allowed: true, Limit: 7, Remaining: 3, ResetAfter: 4 * sec},
			`"api";q=7;w=7`, `"api";r=3;t=3`, "", "7 3 4",
		},
		{
			"a sliding log frees its last unit one window after the call", log,
			ringfence.Decision{Allowed: true, Limit: 100, Remaining: 42, ResetAfter: time.Minute},
			`"api";q=100;w=60`, `"api";r=42;t=60`, "", "100 42 60",
		},
		{
			"a sliding log that denies keeps t within Retry-After", log,
			ringfence.Decision{Limit: 100, Remaining: 0, RetryAfter: 12*sec + us, ResetAfter: 59 * sec},
			`"api";q=100;w=60`, `"api";r=0;t=13`, "13", "100 0 59",
		},
		{
			"a sliding log with an unknown reset falls back on its window", log,
			ringfence.Decision{Allowed: true, Limit: 100, Remaining: 3, Source: ringfence.SourceReplica},
			`"api";q=100;w=60`, `"api";r=3;t=60`, "", "100 3 -",
		},
		{
			"a pointer to a limit is the limit", &log,
			ringfence.Decision{Allowed: true, Limit: 100, Remaining: 99, ResetAfter: time.Minute},
			`"api";q=100;w=60`, `"api";r=99;t=60`, "", "100 99 60",
		},
		{
			"a pointer to a bucket is the bucket", &bucket,
			ringfence.Decision{Allowed: true, Limit: 20, Remaining: 10, ResetAfter: sec},
			`"api";q=20;w=2`, `"api";r=10;t=1`, "", "20 10 1",
		},
		{
			"a limit of another kind announces no policy, as q is not known", otherLimit{},
			ringfence.Decision{Allowed: true, Limit: 5, Remaining: 4, ResetAfter: 1500 * ms},
			"", `"api";r=4;t=2`, "", "5 4 2",
		},
		{
			"a limit of another kind without a reset sends no t", otherLimit{},
			ringfence.Decision{Allowed: true, Limit: 5, Remaining: 4},
			"", `"api";r=4`, "", "5 4 -",
		},
		{
			"a limit of another kind that denies sends t from Retry-After", otherLimit{},
			ringfence.Decision{Limit: 5, Remaining: 0, RetryAfter: 3 * sec},
			"", `"api";r=0;t=3`, "3", "5 0 -",
		},
		{
			"integers stop at the fifteen digits a structured field holds", otherLimit{},
			ringfence.Decision{Allowed: true, Limit: math.MaxInt64, Remaining: math.MaxInt64 - 1, ResetAfter: us},
			"", `"api";r=999999999999999;t=1`, "", "9223372036854775807 9223372036854775806 1",
		},
		{
			"more left than the bucket holds takes no longer than its window", bucket,
			ringfence.Decision{Allowed: true, Limit: 20, Remaining: 500, ResetAfter: 0},
			`"api";q=20;w=2`, `"api";r=500;t=2`, "", "20 500 -",
		},
		// The ladder.
		{
			"a replica's share shows what this process may still admit", bucket,
			ringfence.Decision{Allowed: true, Limit: 20, Remaining: 4, Source: ringfence.SourceReplica, Cause: ringfence.CauseBreaker},
			`"api";q=20;w=2`, `"api";r=4;t=1`, "", "20 4 -",
		},
		{
			"the local policy shows what this process may still admit", bucket,
			ringfence.Decision{Limit: 20, Remaining: 0, RetryAfter: 2400 * ms, ResetAfter: 9 * sec, Source: ringfence.SourceLocal, Cause: ringfence.CauseBudget},
			`"api";q=20;w=2`, `"api";r=0;t=1`, "3", "20 0 9",
		},
		{
			"the open policy knows nothing, and only the policy is sent", bucket,
			ringfence.Decision{Allowed: true, Limit: 20, Remaining: ringfence.Unknown, Source: ringfence.SourcePolicy, Cause: ringfence.CauseBreaker},
			`"api";q=20;w=2`, "", "", "20 - -",
		},
		{
			"the closed policy knows nothing but when to come back", bucket,
			ringfence.Decision{Limit: 20, Remaining: ringfence.Unknown, RetryAfter: 400 * ms, Source: ringfence.SourcePolicy, Cause: ringfence.CauseError},
			`"api";q=20;w=2`, "", "1", "20 - -",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := fake{limit: c.limit, allow: always(c.d)}
			w := get(t, l, user42, httplimit.WithHeaders(httplimit.HeadersStandard|httplimit.HeadersLegacy))
			want := http.StatusTooManyRequests
			if c.d.Allowed {
				want = http.StatusTeapot
			}
			if w.Code != want {
				t.Errorf("status %d, want %d", w.Code, want)
			}
			h := w.Header()
			or := func(name string) string {
				if v := h.Get(name); v != "" {
					return v
				}
				return "-"
			}
			for name, v := range map[string]string{"RateLimit-Policy": c.policy, "RateLimit": c.rate, "Retry-After": c.retry} {
				if got := h.Get(name); got != v {
					t.Errorf("%s: %s, want %s", name, got, v)
				}
				if got := h.Get(name); got != "" && name != "Retry-After" {
					if _, err := parseList(got); err != nil {
						t.Errorf("%s: %s: %v", name, got, err)
					}
				}
			}
			legacy := strings.Join([]string{or("X-RateLimit-Limit"), or("X-RateLimit-Remaining"), or("X-RateLimit-Reset")}, " ")
			if legacy != c.legacy {
				t.Errorf("X-RateLimit-Limit, -Remaining, -Reset: %s, want %s", legacy, c.legacy)
			}
		})
	}
}

func TestRetryAfterIsRoundedUpToWholeSeconds(t *testing.T) {
	for _, c := range []struct {
		in   time.Duration
		want string
	}{
		{-sec, "1"}, // never sent by the library, and still no nonsense
		{0, "1"},
		{1, "1"},
		{999_999_999, "1"},
		{sec, "1"},
		{sec + 1, "2"},
		{sec + 100, "2"}, // 1.0000001 s
		{2 * sec, "2"},
		{59*sec + 999*ms, "60"},
		{366 * day, "31622400"},
		{math.MaxInt64, "9223372037"},
	} {
		w := get(t, fake{allow: always(ringfence.Decision{RetryAfter: c.in})}, user42)
		if got := w.Header().Get("Retry-After"); got != c.want {
			t.Errorf("RetryAfter %d ns: %s, want %s", c.in, got, c.want)
		}
	}
}

func TestHeaderFamiliesAreSentAsChosen(t *testing.T) {
	l := fake{allow: always(ringfence.Decision{Remaining: 0, RetryAfter: sec, ResetAfter: sec})}
	standard := []string{"RateLimit", "RateLimit-Policy"}
	legacy := []string{"X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"}
	for _, c := range []struct {
		name    string
		opts    []httplimit.Option
		with    []string
		without []string
	}{
		{"by default the standard ones alone", nil, standard, legacy},
		{"both", []httplimit.Option{httplimit.WithHeaders(httplimit.HeadersStandard | httplimit.HeadersLegacy)}, append(legacy, standard...), nil},
		{"the legacy ones alone", []httplimit.Option{httplimit.WithHeaders(httplimit.HeadersLegacy)}, legacy, standard},
		{"none", []httplimit.Option{httplimit.WithHeaders(httplimit.HeadersNone)}, nil, append(legacy, standard...)},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := get(t, l, user42, c.opts...).Header()
			for _, name := range append(c.with, "Retry-After") {
				if len(h.Values(name)) != 1 {
					t.Errorf("%s: %q, want one line", name, h.Values(name))
				}
			}
			for _, name := range c.without {
				if h.Values(name) != nil {
					t.Errorf("%s: %q, want none", name, h.Values(name))
				}
			}
		})
	}
}

func TestFieldsAreStructuredFieldsWhateverTheName(t *testing.T) {
	for _, name := range []string{"a", "0", "search.v2_beta-1", strings.Repeat("z", 64), "-", "..."} {
		l := fake{name: name, allow: always(ringfence.Decision{Allowed: true, Remaining: 7, ResetAfter: sec})}
		h := get(t, l, user42, httplimit.WithQuotaUnit("content-bytes")).Header()
		for field, want := range map[string]item{
			"RateLimit-Policy": {name, map[string]any{"q": int64(200), "qu": "content-bytes", "w": int64(2)}},
			"RateLimit":        {name, map[string]any{"r": int64(7), "t": int64(1)}},
		} {
			got, err := parseList(h.Get(field))
			if err != nil || !reflect.DeepEqual(got, []item{want}) {
				t.Errorf("%s: %s: %v, %v, want %v", field, h.Get(field), got, err, want)
			}
		}
	}
}

func TestTheStrictParserRefusesWhatItShould(t *testing.T) {
	for _, s := range []string{
		``, `api`, `"api`, `"a\pi"`, "\"a\npi\"", `"api";`, `"api";q`, `"api";q=`, `"api";q=-1`, `"api";q=1.5`,
		`"api";q=1;q=2`, `"api";Q=1`, `"api"; q=1`, `"api";q=1000000000000000`, `"api";q=1,`, `"api";q=1 `,
		`"api";pk=:cHsdsRa894==:`,
	} {
		if got, err := parseList(s); err == nil {
			t.Errorf("%q was parsed: %v", s, got)
		}
	}
	if got, err := parseList(`"a";q=1,"b";r=2;qu="x"`); err != nil || len(got) != 2 {
		t.Errorf("two items: %v, %v", got, err)
	}
}

func TestTwoMiddlewaresShowBothLimitsAndTheInnerLegacyFields(t *testing.T) {
	byAddr := mustNew(t, fake{name: "addr", limit: ringfence.SlidingLog{Limit: 50, Window: 10 * sec},
		allow: always(ringfence.Decision{Allowed: true, Limit: 50, Remaining: 49, ResetAfter: 10 * sec})},
		user42, httplimit.WithHeaders(httplimit.HeadersStandard|httplimit.HeadersLegacy))
	for _, c := range []struct {
		name      string
		remaining int64
		rate      string
		legacy    string
	}{
		{"both known", 8, `"addr";r=49;t=10,"user";r=8;t=8`, "8"},
		{"the inner one unknown", ringfence.Unknown, `"addr";r=49;t=10`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			byUser := mustNew(t, fake{name: "user", limit: ringfence.TokenBucket{Rate: 1, Per: sec, Burst: 9},
				allow: always(ringfence.Decision{Allowed: true, Limit: 9, Remaining: c.remaining, ResetAfter: sec})},
				user42, httplimit.WithHeaders(httplimit.HeadersStandard|httplimit.HeadersLegacy))
			w := httptest.NewRecorder()
			byAddr(byUser(teapot)).ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
			for name, want := range map[string]string{
				"RateLimit-Policy":      `"addr";q=50;w=10,"user";q=9;w=9`,
				"RateLimit":             c.rate,
				"X-RateLimit-Limit":     "9",
				"X-RateLimit-Remaining": c.legacy,
			} {
				// RFC 9110, 5.3: lines of a list field are joined by commas.
				got := strings.Join(w.Header().Values(name), ",")
				if got != want {
					t.Errorf("%s: %s, want %s", name, got, want)
				}
			}
		})
	}
}

// What r and t together promise must not pass the limit's own rate by more than
// the rounding to whole units and seconds, and spending r and then waiting t must
// find r units again.
func TestRemainingOverWindowNeverPassesTheRate(t *testing.T) {
	for _, l := range []ringfence.TokenBucket{
		{Rate: 1, Per: sec, Burst: 1}, {Rate: 10, Per: sec, Burst: 20}, {Rate: 10_000, Per: day, Burst: 10_000},
		{Rate: 7, Per: 13 * ms, Burst: 1_000}, {Rate: 3, Per: time.Hour, Burst: 5}, {Rate: 1, Per: 365 * day, Burst: 1},
	} {
		for _, r := range []int64{1, 2, 3, l.Burst / 3, l.Burst / 2, l.Burst - 1, l.Burst} {
			if r < 1 || r > l.Burst {
				continue
			}
			w := get(t, fake{limit: l, allow: always(ringfence.Decision{Allowed: true, Remaining: r, ResetAfter: us})}, user42)
			list, err := parseList(w.Header().Get("RateLimit"))
			if err != nil {
				t.Fatal(err)
			}
			wait := list[0].params["t"].(int64)
			back := float64(l.Rate) * float64(wait) * float64(sec) / float64(l.Per)
			if back < float64(r)*(1-1e-12) {
				t.Errorf("%v: r=%d;t=%d, but only %g come back in that time", l, r, wait, back)
			}
			if wait > 1 && float64(l.Rate)*float64(wait-1)*float64(sec)/float64(l.Per) >= float64(r) {
				t.Errorf("%v: r=%d;t=%d, but a second less would do", l, r, wait)
			}
		}
	}
}
