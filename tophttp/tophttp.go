// Package tophttp shows an operator who calls a limiter most, and who is denied most: see
// ringfence.TopConfig. It needs the standard library and ringfence only.
package tophttp

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/ringfence/ringfence"
)

// New returns a handler that shows ring.Top as a page, or as JSON to whoever asks with
// format=json or an Accept of application/json. Nobody mounts it but you: it shows who
// your callers are, so put it where only operators come.
//
// redact, if not nil, is given the name of a limiter and a key, and what it returns is
// shown in place of the key (its first ringfence.MaxKeyBytes bytes). The key's name in
// Redis, a keyed hash, is shown all the same, so that an operator can look it up. redact
// must be safe for concurrent use.
//
// The query says what is shown: by (calls or denied; without it denied), limiter, shard
// (without them all) and n (1 to ringfence.MaxTop; without it 20). What cannot be shown is
// a 400 with the reason. A response is at most ringfence.MaxTop rows, below 1 MB.
func New(ring *ringfence.Ring, redact func(limiter, key string) string) http.Handler {
	return &handler{ring: ring, redact: redact}
}

type handler struct {
	ring   *ringfence.Ring
	redact func(limiter, key string) string
}

// view is a response. The field names are those of the JSON.
type view struct {
	By          string  `json:"by"`
	Limiter     string  `json:"limiter,omitempty"`
	Shard       string  `json:"shard,omitempty"`
	Total       int64   `json:"total"`
	SpanSeconds float64 `json:"span_seconds"`
	OneIn       int     `json:"one_in"`
	Keys        []row   `json:"keys"`

	Shards []string `json:"-"`
	N      string   `json:"-"` // as it was asked for, for the form to keep
	MaxN   int      `json:"-"`
}

type row struct {
	Limiter string `json:"limiter"`
	// Key is the key if it is printable, else as a Go string literal without its quotes.
	Key string `json:"key"`
	// KeyBase64 are the bytes of a key that is not printable; never of a redacted one.
	KeyBase64 string `json:"key_base64,omitempty"`
	Shard     string `json:"shard"`
	RedisKey  string `json:"redis_key"`
	AtLeast   int64  `json:"at_least"`
	AtMost    int64  `json:"at_most"`
}

// ServeHTTP implements http.Handler.
func (h *handler) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'")
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		header.Set("Allow", "GET, HEAD")
		http.Error(w, "only GET and HEAD", http.StatusMethodNotAllowed)
		return
	}
	query := req.URL.Query()
	v, err := h.view(query)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if query.Get("format") == "json" || strings.Contains(req.Header.Get("Accept"), "application/json") {
		header.Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v) // the client may have gone
		return
	}
	header.Set("Content-Type", "text/html; charset=utf-8")
	_ = page.Execute(w, v)
}

func (h *handler) view(query url.Values) (view, error) {
	v := view{By: "denied", MaxN: ringfence.MaxTop, Limiter: query.Get("limiter"), Shard: query.Get("shard"), Keys: []row{}}
	q := ringfence.TopQuery{By: ringfence.TopDenied, Limiter: v.Limiter, Shard: v.Shard}
	switch s := query.Get("by"); s {
	case "", "denied":
	case "calls":
		q.By, v.By = ringfence.TopCalls, s
	default:
		return v, fmt.Errorf("by = %.64q: must be calls or denied", s)
	}
	if s := query.Get("n"); s != "" {
		var err error
		if q.N, err = strconv.Atoi(s); err != nil || q.N < 1 {
			return v, fmt.Errorf("n = %.64q: must be 1 to %d", s, ringfence.MaxTop)
		}
		v.N = strconv.Itoa(q.N)
	}
	list, err := h.ring.Top(q)
	if err != nil {
		return v, err
	}
	for _, s := range h.ring.Stats() {
		v.Shards = append(v.Shards, s.ID)
	}
	v.Total, v.SpanSeconds, v.OneIn = list.Total, list.Span.Seconds(), list.OneIn
	for _, k := range list.Keys {
		v.Keys = append(v.Keys, h.row(k))
	}
	return v, nil
}

func (h *handler) row(k ringfence.TopKey) row {
	r := row{Limiter: k.Limiter, Shard: k.Shard, RedisKey: k.RedisKey, AtLeast: k.AtLeast, AtMost: k.AtMost}
	shown := k.Key
	if h.redact != nil {
		shown = h.redact(k.Limiter, k.Key)
		shown = shown[:min(len(shown), ringfence.MaxKeyBytes)]
	}
	r.Key = printable(shown)
	if h.redact == nil && r.Key != shown {
		r.KeyBase64 = base64.StdEncoding.EncodeToString([]byte(k.Key))
	}
	return r
}

// printable is s if a page can show it and tell it from others, else s with escapes as in
// Go: control characters, marks that turn the direction of writing, invalid UTF-8, and
// the backslash, so that no other key looks the same.
func printable(s string) string {
	plain := utf8.ValidString(s)
	for _, c := range s {
		plain = plain && unicode.IsPrint(c) && c != '\\'
	}
	if plain {
		return s
	}
	quoted := strconv.Quote(s)
	return strings.ReplaceAll(quoted[1:len(quoted)-1], `\"`, `"`)
}

// span is a time in seconds below two minutes, in minutes above.
func span(seconds float64) string {
	if d := time.Duration(seconds * float64(time.Second)); d < 2*time.Minute {
		return fmt.Sprintf("%.1f seconds", d.Seconds())
	}
	return fmt.Sprintf("%.1f minutes", seconds/60)
}

var page = template.Must(template.New("top").Funcs(template.FuncMap{
	"span": span,
}).Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>ringfence: top keys by {{.By}}</title>
<style>
body{font:15px/1.4 system-ui,sans-serif;margin:2em;max-width:75em}
table{border-collapse:collapse}th,td{text-align:left;padding:.25em .8em;border-bottom:1px solid #ccc;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}code{white-space:pre-wrap;word-break:break-all}
</style></head><body>
<h1>Top keys by {{.By}}</h1>
<form method="get">
<label>by <select name="by"><option{{if eq .By "denied"}} selected{{end}}>denied</option><option{{if eq .By "calls"}} selected{{end}}>calls</option></select></label>
<label>limiter <input name="limiter" value="{{.Limiter}}" placeholder="all"></label>
<label>shard <select name="shard"><option value="">all</option>{{range .Shards}}<option{{if eq . $.Shard}} selected{{end}}>{{.}}</option>{{end}}</select></label>
<label>keys <input name="n" type="number" min="1" max="{{.MaxN}}" value="{{.N}}" placeholder="20"></label>
<button>show</button>
</form>
<p>{{.Total}} {{if eq .By "denied"}}denied calls{{else}}calls{{end}} of this process in the last {{span .SpanSeconds}}{{if gt .OneIn 1}}, a part of them counted one in {{.OneIn}}{{end}}.</p>
<table><thead><tr><th>key</th><th>limiter</th><th>shard</th><th class="n">at least</th><th class="n">at most</th><th>name in Redis</th></tr></thead><tbody>
{{range .Keys}}<tr><td><code>{{.Key}}</code></td><td>{{.Limiter}}</td><td>{{.Shard}}</td><td class="n">{{.AtLeast}}</td><td class="n">{{.AtMost}}</td><td><code>{{.RedisKey}}</code></td></tr>
{{else}}<tr><td colspan="6">none</td></tr>
{{end}}</tbody></table>
</body></html>
`))
