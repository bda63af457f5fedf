package httplimit_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/httplimit"
)

// twice stands in for a *ringfence.Limiter, which needs Redis: two calls, no
// more.
type twice struct{ used int64 }

func (*twice) Name() string           { return "api" }
func (*twice) Limit() ringfence.Limit { return ringfence.SlidingLog{Limit: 2, Window: time.Minute} }

func (l *twice) AllowN(_ context.Context, _ string, cost int64) (ringfence.Decision, error) {
	if l.used+cost > 2 {
		return ringfence.Decision{Limit: 2, Remaining: 2 - l.used, RetryAfter: 41*time.Second + 1, ResetAfter: 50 * time.Second}, nil
	}
	l.used += cost
	return ringfence.Decision{Allowed: true, Limit: 2, Remaining: 2 - l.used, ResetAfter: time.Minute}, nil
}

var limiter httplimit.Limiter = &twice{} // ring.Limiter("api", ringfence.SlidingLog{Limit: 2, Window: time.Minute})

func Example() {
	ip, err := httplimit.TrustedProxies("10.0.0.0/8", "fd00::/8")
	if err != nil {
		log.Fatal(err)
	}
	limit, err := httplimit.New(limiter, ip.Key)
	if err != nil {
		log.Fatal(err)
	}
	handler := limit(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "hello")
	}))

	for range 3 {
		r := httptest.NewRequest("GET", "/", nil)
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		fmt.Println(w.Code)
		for _, name := range []string{"RateLimit-Policy", "RateLimit", "Retry-After"} {
			if v := w.Header().Get(name); v != "" {
				fmt.Printf("  %s: %s\n", name, v)
			}
		}
	}
	// Output:
	// 200
	//   RateLimit-Policy: "api";q=2;w=60
	//   RateLimit: "api";r=1;t=60
	// 200
	//   RateLimit-Policy: "api";q=2;w=60
	//   RateLimit: "api";r=0;t=60
	// 429
	//   RateLimit-Policy: "api";q=2;w=60
	//   RateLimit: "api";r=0;t=42
	//   Retry-After: 42
}

func ExampleTrustedProxies() {
	ip, err := httplimit.TrustedProxies("10.0.0.0/8", "fd00::/8")
	if err != nil {
		log.Fatal(err)
	}
	r := httptest.NewRequest("GET", "/", nil)

	r.RemoteAddr = "10.0.0.1:4711" // our load balancer
	r.Header.Set("X-Forwarded-For", "1.1.1.1, 203.0.113.7")
	fmt.Println(ip.Key(r)) // 1.1.1.1 is what the client claimed

	r.Header.Set("X-Forwarded-For", "2001:db8:1:2:3:4:5:6")
	fmt.Println(ip.Key(r))

	r.RemoteAddr = "198.51.100.9:4711" // not ours
	fmt.Println(ip.Key(r))

	r.RemoteAddr = "@" // a unix socket
	fmt.Println(ip.Key(r))
	// Output:
	// 203.0.113.7 <nil>
	// 2001:db8:1:2::/64 <nil>
	// 198.51.100.9 <nil>
	//  httplimit: RemoteAddr holds no IP address
}

// A key of one's own, health checks exempt, and bodies charged by the kilobyte.
func ExampleNew() {
	byUser := func(r *http.Request) (string, error) {
		user, _, ok := r.BasicAuth() // checked by an outer middleware
		if !ok {
			return "", errors.New("no user")
		}
		return "user:" + user, nil
	}
	limit, err := httplimit.New(&twice{}, byUser,
		httplimit.WithSkip(func(r *http.Request) bool { return r.URL.Path == "/healthz" }),
		httplimit.WithCost(func(r *http.Request) int64 { return 1 + max(r.ContentLength, 0)/1024 }),
		httplimit.WithHeaders(httplimit.HeadersStandard|httplimit.HeadersLegacy),
	)
	if err != nil {
		log.Fatal(err)
	}
	handler := limit(http.NotFoundHandler())

	for _, path := range []string{"/healthz", "/api"} {
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		fmt.Println(path, w.Code, w.Body)
	}
	// Output:
	// /healthz 404 404 page not found
	//
	// /api 400 {"title":"Bad Request","status":400}
}

// A plain text answer, and a log line that says when Redis was to blame.
func ExampleWithOnDenied() {
	limit, err := httplimit.New(limiter, httplimit.ClientIP{}.Key,
		httplimit.WithOnDenied(func(w http.ResponseWriter, _ *http.Request, d ringfence.Decision) {
			if d.Source == ringfence.SourcePolicy {
				log.Printf("denied by policy: shard %s: %s", d.Shard, d.Cause)
			}
			http.Error(w, "slow down", http.StatusTooManyRequests)
		}),
		httplimit.WithOnError(func(w http.ResponseWriter, _ *http.Request, err error) {
			log.Print(err)
			w.WriteHeader(httplimit.ErrorStatus(err))
		}),
	)
	if err != nil {
		log.Fatal(err)
	}
	_ = http.Server{Handler: limit(http.NotFoundHandler())}
}
