package tophttp_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/embedded"
	"github.com/ringfence/ringfence/tophttp"
)

// hostile are keys that a page must survive.
var hostile = []string{
	`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `</code></td><h1>owned`, "{{.}}", "&amp;", `a\x00b`,
	"\x00\xff\xfe", "\xc3\x28", "line\nbreak", "\u202egnirts", strings.Repeat("\x00", ringfence.MaxKeyBytes), strings.Repeat("<", ringfence.MaxKeyBytes),
}

func open(t *testing.T, keys ...string) *ringfence.Ring {
	t.Helper()
	shards, err := embedded.Start(2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = shards.Close() })
	for i := range 2 {
		addr, err := shards.Addr(i)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("embedded redis %s", addr)
	}
	r, err := ringfence.Open(t.Context(), ringfence.Config{
		Shards: shards.Config(), Top: ringfence.TopConfig{Keys: 512}, Logger: slog.New(slog.DiscardHandler),
		Budget: 5 * time.Second, OperationTimeout: 5 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	l, err := r.Limiter("api", ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 1})
	if err != nil {
		t.Fatal(err)
	}
	for i, k := range keys {
		for range i + 2 { // all but one of them denied
			if _, err := l.Allow(context.Background(), k); err != nil {
				t.Fatal(err)
			}
		}
	}
	return r
}

func get(h http.Handler, target string, header ...string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(http.MethodGet, target, nil)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req)
	return w
}

type answer struct {
	By    string
	Total int64
	OneIn int     `json:"one_in"`
	Span  float64 `json:"span_seconds"`
	Keys  []struct {
		Limiter, Key, Shard string
		KeyBase64           string `json:"key_base64"`
		RedisKey            string `json:"redis_key"`
		AtLeast             int64  `json:"at_least"`
		AtMost              int64  `json:"at_most"`
	}
}

func asked(t *testing.T, h http.Handler, query string) answer {
	t.Helper()
	r := get(h, "/top?"+query, "Accept", "application/json")
	if r.Code != http.StatusOK || r.Header().Get("Content-Type") != "application/json" {
		t.Fatalf("%s: %d, %s", query, r.Code, r.Header().Get("Content-Type"))
	}
	var a answer
	if err := json.Unmarshal(r.Body.Bytes(), &a); err != nil {
		t.Fatal(err)
	}
	return a
}

func TestJSONTellsEveryHostileKeyApart(t *testing.T) {
	h := tophttp.New(open(t, hostile...), nil)
	a := asked(t, h, "n=100")
	if a.By != "denied" || a.OneIn != 1 || a.Span <= 0 || len(a.Keys) != len(hostile) {
		t.Fatalf("%+v", a)
	}
	seen := map[string]bool{}
	for i, k := range a.Keys {
		want := hostile[len(hostile)-1-i]
		got := k.Key
		if k.KeyBase64 != "" {
			raw, err := base64.StdEncoding.DecodeString(k.KeyBase64)
			if err != nil {
				t.Error(err)
			}
			got = string(raw)
		}
		if got != want || k.AtLeast != int64(len(hostile)-i) || k.AtMost != k.AtLeast || k.Limiter != "api" || k.Shard == "" || k.RedisKey == "" {
			t.Errorf("entry %d: %+v, want %q with %d", i, k, want, len(hostile)-i)
		}
		if seen[k.Key] {
			t.Errorf("%q is shown twice", k.Key)
		}
		seen[k.Key] = true
	}
	if calls := asked(t, h, "by=calls&n=1"); len(calls.Keys) != 1 || calls.Keys[0].AtLeast != int64(len(hostile)+1) {
		t.Errorf("%+v", calls)
	}
}

func TestThePageEscapesHostileKeys(t *testing.T) {
	h := tophttp.New(open(t, hostile...), nil)
	r := get(h, "/top?n=100")
	page := r.Body.String()
	if !strings.HasPrefix(r.Header().Get("Content-Type"), "text/html") || !utf8.ValidString(page) {
		t.Errorf("%s, valid UTF-8: %t", r.Header().Get("Content-Type"), utf8.ValidString(page))
	}
	for _, bad := range []string{"<script", "<img", "<h1>owned", "\x00", "\u202e"} {
		if strings.Contains(page, bad) {
			t.Errorf("the page contains %q", bad)
		}
	}
	for _, want := range []string{"&lt;script&gt;alert(1)", "{{.}}", `\x00\xff\xfe`, "line\\nbreak", "&amp;amp;"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not show %q", want)
		}
	}
	for name, want := range map[string]string{"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"} {
		if got := r.Header().Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if csp := r.Header().Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") {
		t.Errorf("Content-Security-Policy: %q", csp)
	}
}

func TestRedactedKeysAreNowhere(t *testing.T) {
	ring := open(t, append(hostile, "secret-42")...)
	h := tophttp.New(ring, func(limiter, key string) string {
		return limiter + ":" + strings.Repeat("*", 2*ringfence.MaxKeyBytes) + "\xff" + key
	})
	page := get(h, "/top?n=100").Body.String()
	raw := get(h, "/top?n=100&format=json").Body.String()
	for _, text := range []string{page, raw} {
		if strings.Contains(text, "secret-42") || strings.Contains(text, "alert") || strings.Contains(text, "key_base64") {
			t.Error("a key is shown although redact does not show it")
		}
		if !strings.Contains(text, "api:***") || strings.Contains(text, strings.Repeat("*", ringfence.MaxKeyBytes+1)) {
			t.Error("what redact returns is not shown, or not cut")
		}
	}
}

func TestAResponseIsBounded(t *testing.T) {
	keys := make([]string, 2*ringfence.MaxTop)
	for i := range keys { // every byte is shown as six
		keys[i] = strings.Repeat("\u202e", 166) + string(rune('a'+i%26)) + string(rune('a'+i/26))
	}
	h := tophttp.New(open(t, keys[:ringfence.MaxTop+5]...), nil)
	for _, format := range []string{"json", ""} {
		if n := len(get(h, "/top?n=100&format="+format).Body.String()); n > 1<<20 {
			t.Errorf("format %q: %d bytes", format, n)
		}
	}
	if a := asked(t, h, ""); len(a.Keys) != 20 {
		t.Errorf("%d keys without n", len(a.Keys))
	}
}

func TestWhatCannotBeShownIsRefused(t *testing.T) {
	h := tophttp.New(open(t), nil)
	for _, query := range []string{"by=cost", "n=0", "n=101", "n=-1", "n=x", "shard=nowhere", "limiter=nobody", "limiter=" + url.QueryEscape("<script>")} {
		r := get(h, "/top?"+query)
		if text := r.Body.String(); r.Code != http.StatusBadRequest || !strings.HasPrefix(r.Header().Get("Content-Type"), "text/plain") || text == "" {
			t.Errorf("%s: %d, %q", query, r.Code, text)
		}
	}
	req := httptest.NewRequest(http.MethodPost, "/top", nil)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req)
	if w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != "GET, HEAD" {
		t.Errorf("POST: %d, Allow %q", w.Code, w.Header().Get("Allow"))
	}
	if page := get(h, "/top").Body.String(); !strings.Contains(page, "none") {
		t.Error("an empty list does not say so")
	}
}

func TestTheFormKeepsWhatWasAskedFor(t *testing.T) {
	h := tophttp.New(open(t, hostile...), nil)
	page := get(h, "/top?by=calls&limiter=api&n=7").Body.String()
	for _, want := range []string{`name="n" type="number" min="1" max="100" value="7"`, `<option selected>calls`, `name="limiter" value="api"`} {
		if !strings.Contains(page, want) {
			t.Errorf("the page has no %s", want)
		}
	}
	if page := get(h, "/top").Body.String(); !strings.Contains(page, `value="" placeholder="20"`) {
		t.Error("without n the form does not say that 20 are shown")
	}
	// A first look is not "0.0 minutes".
	if page := get(h, "/top").Body.String(); !strings.Contains(page, "seconds") || strings.Contains(page, "minutes") {
		t.Error("the span of a ring just opened is not in seconds")
	}
}
