package httplimit_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/httplimit"
)

// fake is a Limiter that answers as told. Zero fields: the name "api", 100 a
// second with a burst of 200.
type fake struct {
	name  string
	limit ringfence.Limit
	allow func(ctx context.Context, key string, cost int64) (ringfence.Decision, error)
}

func (f fake) Name() string {
	if f.name == "" {
		return "api"
	}
	return f.name
}

func (f fake) Limit() ringfence.Limit {
	if f.limit == nil {
		return ringfence.TokenBucket{Rate: 100, Per: time.Second, Burst: 200}
	}
	return f.limit
}

func (f fake) AllowN(ctx context.Context, key string, cost int64) (ringfence.Decision, error) {
	if f.allow == nil {
		return ringfence.Decision{}, fmt.Errorf("unexpected call: key %q, cost %d", key, cost)
	}
	return f.allow(ctx, key, cost)
}

// always answers every call with d.
func always(d ringfence.Decision) func(context.Context, string, int64) (ringfence.Decision, error) {
	return func(context.Context, string, int64) (ringfence.Decision, error) { return d, nil }
}

// fails answers every call with err.
func fails(err error) func(context.Context, string, int64) (ringfence.Decision, error) {
	return func(context.Context, string, int64) (ringfence.Decision, error) {
		return ringfence.Decision{}, err
	}
}

func user42(*http.Request) (string, error) { return "user:42", nil }

func mustNew(t testing.TB, l httplimit.Limiter, key httplimit.KeyFunc, opts ...httplimit.Option) func(http.Handler) http.Handler {
	t.Helper()
	mw, err := httplimit.New(l, key, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return mw
}

var teapot = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })

// get sends one request through the middleware to a handler that answers 418.
func get(t testing.TB, l httplimit.Limiter, key httplimit.KeyFunc, opts ...httplimit.Option) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	mustNew(t, l, key, opts...)(teapot).ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	return w
}

// item is one member of a List of Strings with parameters.
type item struct {
	name   string
	params map[string]any // int64 or string
}

// parseList parses what this package may write of RFC 9651: a List (4.2.1) of
// Strings (4.2.5) whose parameters (4.2.3.2) are Integers (4.2.4) or Strings. It
// is stricter than the RFC: no optional white space, no repeated parameter.
func parseList(s string) (list []item, err error) {
	quoted := func() (string, error) {
		if !strings.HasPrefix(s, `"`) {
			return "", fmt.Errorf("no opening quote at %q", s)
		}
		end := strings.IndexByte(s[1:], '"')
		if end < 0 {
			return "", fmt.Errorf("no closing quote at %q", s)
		}
		v := s[1 : 1+end]
		for _, c := range []byte(v) {
			if c < 0x20 || c > 0x7e || c == '\\' {
				return "", fmt.Errorf("byte %#x in a String", c)
			}
		}
		s = s[end+2:]
		return v, nil
	}
	span := func(ok func(c byte) bool) string {
		i := 0
		for i < len(s) && ok(s[i]) {
			i++
		}
		v := s[:i]
		s = s[i:]
		return v
	}
	for {
		it := item{params: map[string]any{}}
		if it.name, err = quoted(); err != nil {
			return nil, err
		}
		for strings.HasPrefix(s, ";") {
			s = s[1:]
			key := span(func(c byte) bool { return 'a' <= c && c <= 'z' })
			if _, repeated := it.params[key]; key == "" || repeated || !strings.HasPrefix(s, "=") {
				return nil, fmt.Errorf("parameter %q before %q", key, s)
			}
			s = s[1:]
			if strings.HasPrefix(s, `"`) {
				v, err := quoted()
				if err != nil {
					return nil, err
				}
				it.params[key] = v
				continue
			}
			digits := span(func(c byte) bool { return '0' <= c && c <= '9' })
			if len(digits) < 1 || len(digits) > 15 {
				return nil, fmt.Errorf("Integer of %d digits", len(digits))
			}
			var n int64
			for _, c := range []byte(digits) {
				n = n*10 + int64(c-'0')
			}
			it.params[key] = n
		}
		list = append(list, it)
		if s == "" {
			return list, nil
		}
		if !strings.HasPrefix(s, ",") {
			return nil, fmt.Errorf("want a comma at %q", s)
		}
		s = s[1:]
	}
}
