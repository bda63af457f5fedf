package httplimit_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/httplimit"
)

func TestNewRefuses(t *testing.T) {
	ok := fake{}
	for _, c := range []struct {
		name string
		l    httplimit.Limiter
		key  httplimit.KeyFunc
		opts []httplimit.Option
		want string // part of the error
	}{
		{"no limiter", nil, user42, nil, "limiter is nil"},
		{"no key function", ok, nil, nil, "key function is nil"},
		{"a name in capitals", fake{name: "API"}, user42, nil, `"API"`},
		{"a name that would end the header field", fake{name: "a\";q=9\r\nX: y"}, user42, nil, "limiter name"},
		{"a name of 65 bytes", fake{name: strings.Repeat("a", 65)}, user42, nil, "limiter name"},
		{"an invalid limit", fake{limit: ringfence.TokenBucket{Rate: 0, Per: time.Second, Burst: 1}}, user42, nil, `limiter "api"`},
		{"a nil option", ok, user42, []httplimit.Option{nil}, "option 0 is nil"},
		{"a nil cost function", ok, user42, []httplimit.Option{httplimit.WithCost(nil)}, "WithCost"},
		{"a nil skipper", ok, user42, []httplimit.Option{httplimit.WithSkip(nil)}, "WithSkip"},
		{"a nil handler for the denied", ok, user42, []httplimit.Option{httplimit.WithOnDenied(nil)}, "WithOnDenied"},
		{"a nil handler for errors", ok, user42, []httplimit.Option{httplimit.WithOnError(nil)}, "WithOnError"},
		{"an unknown header family", ok, user42, []httplimit.Option{httplimit.WithHeaders(1 << 7)}, "WithHeaders(128)"},
		{"an empty quota unit", ok, user42, []httplimit.Option{httplimit.WithQuotaUnit("")}, "WithQuotaUnit"},
		{"a quota unit that needs quoting", ok, user42, []httplimit.Option{httplimit.WithQuotaUnit(`a"b`)}, "WithQuotaUnit"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mw, err := httplimit.New(c.l, c.key, c.opts...)
			if err == nil || mw != nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
	t.Run("a nil handler, with a panic", func(t *testing.T) {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		mustNew(t, ok, user42)(nil)
	})
	t.Run("an invalid limit so that errors.Is sees it", func(t *testing.T) {
		_, err := httplimit.New(fake{limit: ringfence.SlidingLog{}}, user42)
		if !errors.Is(err, ringfence.ErrInvalid) {
			t.Errorf("error %v, want ErrInvalid", err)
		}
	})
}

func TestKeyAndCostReachTheLimiter(t *testing.T) {
	type call struct {
		key  string
		cost int64
	}
	var got []call
	l := fake{allow: func(_ context.Context, key string, cost int64) (ringfence.Decision, error) {
		got = append(got, call{key, cost})
		return ringfence.Decision{Allowed: true}, nil
	}}
	byUser := func(r *http.Request) (string, error) { return "user:" + r.Header.Get("X-User"), nil }
	byLength := httplimit.WithCost(func(r *http.Request) int64 { return max(r.ContentLength, 1) })
	r := httptest.NewRequest("POST", "/", strings.NewReader("12345"))
	r.Header.Set("X-User", "7")
	mustNew(t, l, byUser)(teapot).ServeHTTP(httptest.NewRecorder(), r)
	mustNew(t, l, byUser, byLength)(teapot).ServeHTTP(httptest.NewRecorder(), r)
	if want := []call{{"user:7", 1}, {"user:7", 5}}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestSkippedRequestsAreNotChargedAndCarryNoFields(t *testing.T) {
	w := get(t, fake{}, user42, httplimit.WithSkip(func(r *http.Request) bool { return r.URL.Path == "/" }))
	if w.Code != http.StatusTeapot || len(w.Header()) != 0 {
		t.Errorf("status %d, fields %v, want 418 and none", w.Code, w.Header())
	}
}

func TestDeniedRequestsGetAProblemDocument(t *testing.T) {
	for _, c := range []struct {
		name   string
		source ringfence.Source
		kind   string
		title  string
	}{
		{"the primary denied: the quota is exceeded", ringfence.SourcePrimary, "quota-exceeded", "Quota Exceeded"},
		{"a share is used up: the quota is exceeded", ringfence.SourceReplica, "quota-exceeded", "Quota Exceeded"},
		{"the local limit is used up: the quota is exceeded", ringfence.SourceLocal, "quota-exceeded", "Quota Exceeded"},
		{"the closed policy denied: nobody knows", ringfence.SourcePolicy, "temporary-reduced-capacity", "Temporary Reduced Capacity"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := get(t, fake{name: "search.v2", allow: always(ringfence.Decision{Source: c.source, RetryAfter: time.Second})}, user42)
			var got map[string]any
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
				t.Fatal(err)
			}
			want := map[string]any{
				"type":              "https://iana.org/assignments/http-problem-types#" + c.kind,
				"title":             c.title,
				"status":            429.0,
				"violated-policies": []any{"search.v2"},
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("body %v, want %v", got, want)
			}
			if w.Code != 429 || w.Header().Get("Content-Type") != "application/problem+json" || w.Header().Get("Cache-Control") != "no-store" {
				t.Errorf("status %d, fields %v", w.Code, w.Header())
			}
		})
	}
}

func TestOnDeniedFindsTheFieldsSetAndDecidesTheRest(t *testing.T) {
	want := ringfence.Decision{Remaining: 3, RetryAfter: 90 * time.Second, Source: ringfence.SourcePolicy, Cause: ringfence.CauseBreaker, Shard: "b"}
	w := get(t, fake{allow: always(want)}, user42,
		httplimit.WithOnDenied(func(w http.ResponseWriter, _ *http.Request, d ringfence.Decision) {
			if d != want {
				t.Errorf("decision %+v, want %+v", d, want)
			}
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = io.WriteString(w, "come back in "+w.Header().Get("Retry-After")+" s")
		}))
	if w.Code != 503 || w.Body.String() != "come back in 90 s" || w.Header().Get("RateLimit") == "" {
		t.Errorf("status %d, body %q, fields %v", w.Code, w.Body, w.Header())
	}
}

func TestErrorsGetTheirStatusAndAreNotQuoted(t *testing.T) {
	secret := &ringfence.FieldError{Field: "key", Value: "s3cret", Fix: "shorter"}
	broken := func(err error) httplimit.KeyFunc {
		return func(*http.Request) (string, error) { return "ignored", err }
	}
	badIP := httplimit.ClientIP{IPv6Bits: 129}.Key
	noPeer := func(r *http.Request) (string, error) {
		r.RemoteAddr = "@"
		return httplimit.ClientIP{}.Key(r)
	}
	cost := func(n int64) httplimit.Option {
		return httplimit.WithCost(func(*http.Request) int64 { return n })
	}
	for _, c := range []struct {
		name   string
		allow  error // from AllowN; nil: must not be called
		key    httplimit.KeyFunc
		opts   []httplimit.Option
		status int
		is     error // what WithOnError's handler can test for
	}{
		{"the key function fails", nil, broken(io.ErrUnexpectedEOF), nil, 400, io.ErrUnexpectedEOF},
		{"the key is empty", nil, func(*http.Request) (string, error) { return "", nil }, nil, 400, httplimit.ErrNoKey},
		{"the key function's own deadline has passed", nil, broken(context.DeadlineExceeded), nil, 503, context.DeadlineExceeded},
		{"the peer has no address", nil, noPeer, nil, 500, httplimit.ErrNoAddr},
		{"the ClientIP is invalid", nil, badIP, nil, 500, nil},
		{"the cost is 0", nil, user42, []httplimit.Option{cost(0)}, 500, httplimit.ErrCost},
		{"the cost is negative", nil, user42, []httplimit.Option{cost(-5)}, 500, httplimit.ErrCost},
		{"the key is too long for the limiter", secret, user42, nil, 400, ringfence.ErrInvalid},
		{"the ring is closed", fmt.Errorf("allow: %w", ringfence.ErrClosed), user42, nil, 503, ringfence.ErrClosed},
		{"an error nobody expects", io.ErrClosedPipe, user42, nil, 500, io.ErrClosedPipe},
		{"canceled, but not by the request", context.Canceled, user42, nil, 500, context.Canceled},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := fake{}
			if c.allow != nil {
				l.allow = fails(c.allow)
			}
			w := get(t, l, c.key, c.opts...)
			var got map[string]any
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
				t.Fatal(err)
			}
			if want := map[string]any{"title": http.StatusText(c.status), "status": float64(c.status)}; w.Code != c.status || !reflect.DeepEqual(got, want) {
				t.Errorf("status %d, body %v, want %v", w.Code, got, want)
			}
			for _, name := range []string{"RateLimit", "RateLimit-Policy", "Retry-After"} {
				if w.Header().Get(name) != "" {
					t.Errorf("%s: %s, want none: nothing was decided", name, w.Header().Get(name))
				}
			}
			var seen error
			w = get(t, l, c.key, append(c.opts, httplimit.WithOnError(func(w http.ResponseWriter, _ *http.Request, err error) {
				seen = err
				w.WriteHeader(599)
			}))...)
			if w.Code != 599 || seen == nil || c.is != nil && !errors.Is(seen, c.is) {
				t.Errorf("WithOnError: status %d, error %v, want 599 and %v", w.Code, seen, c.is)
			}
			if got := httplimit.ErrorStatus(seen); got != c.status {
				t.Errorf("ErrorStatus %d, want %d", got, c.status)
			}
		})
	}
	if got := httplimit.ErrorStatus(nil); got != 200 {
		t.Errorf("ErrorStatus(nil) = %d", got)
	}
	keyErr := &httplimit.KeyError{Err: io.EOF}
	if keyErr.Error() != "httplimit: key: EOF" || !errors.Is(keyErr, io.EOF) {
		t.Error(keyErr)
	}
}

// untouched fails the test when anything is written.
type untouched struct {
	t *testing.T
	h http.Header
}

func (u untouched) Header() http.Header { return u.h }
func (u untouched) Write([]byte) (int, error) {
	u.t.Error("a body was written")
	return 0, nil
}
func (u untouched) WriteHeader(status int) { u.t.Errorf("status %d was written", status) }

func TestNothingIsWrittenToAClientThatIsGone(t *testing.T) {
	cause := errors.New("the load balancer hung up")
	for _, c := range []struct {
		name string
		key  httplimit.KeyFunc
		err  error
	}{
		{"while the limiter decided", user42, context.Canceled},
		{"while the limiter decided, wrapped", user42, fmt.Errorf("ringfence: %w", context.Canceled)},
		{"while the limiter decided, with the cause as the error", user42, cause},
		{"while the key was looked up", func(r *http.Request) (string, error) { return "", r.Context().Err() }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			cancel(cause)
			h := mustNew(t, fake{allow: fails(c.err)}, c.key,
				httplimit.WithOnError(func(_ http.ResponseWriter, _ *http.Request, err error) { t.Errorf("called with %v", err) }),
				httplimit.WithOnDenied(func(http.ResponseWriter, *http.Request, ringfence.Decision) { t.Error("denied") }),
			)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the next handler ran") }))
			w := untouched{t, http.Header{}}
			h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, "GET", "/", nil))
			if len(w.h) != 0 {
				t.Errorf("fields %v, want none", w.h)
			}
		})
	}
	t.Run("but a wrong call is still reported", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		w := httptest.NewRecorder()
		mustNew(t, fake{allow: fails(ringfence.ErrInvalid)}, user42)(teapot).
			ServeHTTP(w, httptest.NewRequestWithContext(ctx, "GET", "/", nil))
		if w.Code != 400 {
			t.Errorf("status %d, want 400", w.Code)
		}
	})
}

func TestAPassedDeadlineIsNeitherASuccessNorADenial(t *testing.T) {
	ctx, cancel := context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancel()
	w := httptest.NewRecorder()
	mustNew(t, fake{allow: func(ctx context.Context, _ string, _ int64) (ringfence.Decision, error) {
		return ringfence.Decision{}, ctx.Err()
	}}, user42)(teapot).ServeHTTP(w, httptest.NewRequestWithContext(ctx, "GET", "/", nil))
	if w.Code != 503 || w.Header().Get("Retry-After") != "" {
		t.Errorf("status %d, fields %v, want 503 without Retry-After", w.Code, w.Header())
	}
}

func TestTheNextHandlerGetsTheVeryResponseWriterAndRequest(t *testing.T) {
	w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
	ran := false
	mustNew(t, fake{allow: always(ringfence.Decision{Allowed: true})}, user42)(
		http.HandlerFunc(func(gotW http.ResponseWriter, gotR *http.Request) {
			ran = true
			if gotW != http.ResponseWriter(w) || gotR != r {
				t.Error("wrapped")
			}
		})).ServeHTTP(w, r)
	if !ran {
		t.Error("the next handler did not run")
	}
}

func TestResponseControllerWorksOnARealServer(t *testing.T) {
	mw := mustNew(t, fake{allow: always(ringfence.Decision{Allowed: true, Remaining: 199, ResetAfter: 10 * time.Millisecond})}, user42)
	srv := httptest.NewServer(mw(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		c := http.NewResponseController(w)
		if err := errors.Join(
			c.SetReadDeadline(time.Now().Add(time.Minute)),
			c.SetWriteDeadline(time.Now().Add(time.Minute)),
			c.EnableFullDuplex(),
			c.Flush(),
		); err != nil {
			t.Error(err)
		}
		conn, _, err := c.Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		conn.Close()
	})))
	defer srv.Close()
	resp, err := srv.Client().Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got := resp.Header.Get("RateLimit"); got != `"api";r=199;t=2` {
		t.Errorf("RateLimit: %s", got)
	}
}

func TestAHeadRequestIsDeniedWithoutABody(t *testing.T) {
	srv := httptest.NewServer(mustNew(t, fake{allow: always(ringfence.Decision{RetryAfter: time.Second})}, user42)(teapot))
	defer srv.Close()
	resp, err := srv.Client().Head(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || len(body) != 0 || resp.StatusCode != 429 || resp.Header.Get("Retry-After") != "1" {
		t.Errorf("status %d, body %q, error %v, fields %v", resp.StatusCode, body, err, resp.Header)
	}
}

func TestManyGoroutinesShareOneMiddleware(t *testing.T) {
	const goroutines, each, limit = 32, 50, 1000
	var charged, allowed, denied atomic.Int64
	l := fake{limit: ringfence.SlidingLog{Limit: limit, Window: time.Minute},
		allow: func(context.Context, string, int64) (ringfence.Decision, error) {
			n := charged.Add(1)
			return ringfence.Decision{Allowed: n <= limit, Limit: limit, Remaining: max(limit-n, 0),
				RetryAfter: time.Minute, ResetAfter: time.Minute, Source: ringfence.SourcePrimary}, nil
		}}
	ip, err := httplimit.TrustedProxies("192.0.2.0/24", "2001:db8::/32")
	if err != nil {
		t.Fatal(err)
	}
	h := mustNew(t, l, ip.Key, httplimit.WithHeaders(httplimit.HeadersStandard|httplimit.HeadersLegacy))(teapot)
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			for range each {
				w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
				r.Header.Set("X-Forwarded-For", "198.51.100."+strconv.Itoa(g))
				h.ServeHTTP(w, r)
				if list, err := parseList(w.Header().Get("RateLimit")); err != nil || len(list) != 1 {
					t.Errorf("RateLimit: %q: %v", w.Header().Get("RateLimit"), err)
				}
				switch w.Code {
				case http.StatusTeapot:
					allowed.Add(1)
				case http.StatusTooManyRequests:
					denied.Add(1)
				default:
					t.Errorf("status %d", w.Code)
				}
			}
		})
	}
	wg.Wait()
	if a, d := allowed.Load(), denied.Load(); a != limit || d != goroutines*each-limit {
		t.Errorf("%d allowed, %d denied, want %d and %d", a, d, limit, goroutines*each-limit)
	}
}

func BenchmarkAllowed(b *testing.B) {
	h := mustNew(b, fake{allow: always(ringfence.Decision{Allowed: true, Limit: 200, Remaining: 199, ResetAfter: 10 * time.Millisecond})}, user42)(
		http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	r := httptest.NewRequest("GET", "/", nil)
	w := httptest.NewRecorder()
	b.ReportAllocs()
	for b.Loop() {
		clear(w.Header())
		h.ServeHTTP(w, r)
	}
}
