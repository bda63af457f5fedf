package ringfence

import (
	"context"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/redis/go-redis/v9"
)

// sink keeps what is logged.
type sink struct {
	mu   sync.Mutex
	text strings.Builder
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *sink) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

func (s *sink) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(s, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// Printf makes it a logger of go-redis.
func (s *sink) Printf(_ context.Context, format string, v ...any) {
	_, _ = fmt.Fprintf(s, format+"\n", v...)
}

// driverLog is what go-redis says by itself, past Config.Logger. Set before anything
// runs, because go-redis reads its logger without a lock.
var driverLog = &sink{}

func init() { redis.SetLogger(driverLog) }

// exposition is what a scrape of the registry sees.
func exposition(t *testing.T, g prometheus.Gatherer) string {
	t.Helper()
	w := httptest.NewRecorder()
	promhttp.HandlerFor(g, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	return w.Body.String()
}

// withPassword is for the admin client of a server whose default user has one.
func withPassword(password string) func(*redis.Options) {
	return func(o *redis.Options) { o.Password = password }
}
