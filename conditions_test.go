package ringfence_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// Conditions in which a server answers and takes no charge. It is asked ever more rarely
// for as long as they last, although whoever only looks is answered in most of them; and
// used again soon after.
func TestAServerThatAnswersButTakesNoChargesIsAskedLittleAndUsedAgainSoon(t *testing.T) {
	config := func(s *redistest.Server, name, value string) func(*testing.T) {
		return func(t *testing.T) { must(t, s.Client().ConfigSet(t.Context(), name, value).Err()) }
	}
	for _, c := range []struct {
		kind  string
		looks bool // are answered
		// begin brings the condition about and says how to end it.
		begin func(t *testing.T, s *redistest.Server) (end func(*testing.T))
		args  []string
	}{
		{kind: "oom", looks: true, begin: func(t *testing.T, s *redistest.Server) func(*testing.T) {
			config(s, "maxmemory", "1")(t)
			return config(s, "maxmemory", "0")
		}},
		{kind: "noreplicas", looks: true, begin: func(t *testing.T, s *redistest.Server) func(*testing.T) {
			config(s, "min-replicas-to-write", "1")(t)
			return config(s, "min-replicas-to-write", "0")
		}},
		{kind: "readonly", looks: true, begin: func(t *testing.T, s *redistest.Server) func(*testing.T) {
			other := redistest.Start(t, redistest.Options{Args: []string{"repl-diskless-sync no"}})
			must(t, s.ReplicaOf(t.Context(), other))
			return func(t *testing.T) { must(t, s.Promote(t.Context())) }
		}},
		{kind: "misconf", looks: true, args: []string{"save 3600 1"}, begin: func(t *testing.T, s *redistest.Server) func(*testing.T) {
			dir, err := s.Client().ConfigGet(t.Context(), "dir").Result()
			must(t, err)
			// The dump's name is that of a directory, and cannot be written.
			must(t, os.MkdirAll(filepath.Join(dir["dir"], "dump.rdb", "in the way"), 0o700))
			must(t, s.Client().BgSave(t.Context()).Err())
			eventually(t, 10*time.Second, "saving has failed", func() bool {
				info, err := s.Client().Info(t.Context(), "persistence").Result()
				must(t, err)
				return strings.Contains(info, "rdb_last_bgsave_status:err")
			})
			return config(s, "stop-writes-on-bgsave-error", "no")
		}},
		{kind: "busy", begin: func(t *testing.T, s *redistest.Server) func(*testing.T) {
			config(s, "busy-reply-threshold", "1")(t)
			ended := make(chan error, 1)
			go func() { ended <- s.Client().Eval(t.Context(), "while true do end", nil).Err() }()
			return func(t *testing.T) {
				eventually(t, 10*time.Second, "the script is killed", func() bool {
					return s.Client().ScriptKill(t.Context()).Err() == nil
				})
				if err := <-ended; err == nil {
					t.Error("the endless script has ended well")
				}
			}
		}},
		{
			kind: "loading", args: []string{"enable-debug-command yes", "loading-process-events-interval-bytes 1024"},
			begin: func(t *testing.T, s *redistest.Server) func(*testing.T) {
				const keys, each = 500, 10 * time.Millisecond
				pipe := s.Client().Pipeline()
				for i := range keys {
					pipe.Set(t.Context(), fmt.Sprint("other ", i), strings.Repeat("x", 4096)+fmt.Sprint(i), 0)
				}
				_, err := pipe.Exec(t.Context())
				must(t, err)
				config(s, "rdbcompression", "no")(t)
				config(s, "key-load-delay", fmt.Sprint(each.Microseconds()))(t)
				ended := make(chan error, 1)
				go func() { ended <- s.Client().Do(t.Context(), "debug", "reload").Err() }()
				return func(t *testing.T) {
					if err := <-ended; err != nil { // the time-out of this client is shorter
						t.Logf("reload: %v", err)
					}
					eventually(t, 30*time.Second, "all is loaded", func() bool { return s.Client().DBSize(t.Context()).Err() == nil })
				}
			},
		},
	} {
		t.Run(c.kind, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t, redistest.Options{Args: c.args})
			registry := prometheus.NewRegistry()
			ring := open(t, ringfence.Config{
				Shards: []ringfence.ShardConfig{alone(server)}, Registerer: registry, Policy: ringfence.PolicyClosed, Budget: patient,
			})
			l := limiter(t, ring, ringfence.SlidingLog{Limit: 1_000_000, Window: time.Hour})
			told := newAnswers(t)
			eventually(t, 5*time.Second, "calls are charged", func() bool { return told.allow(l, "user").Source == ringfence.SourcePrimary })
			failed := func() (all, ofKind float64) {
				families, err := registry.Gather()
				must(t, err)
				for _, f := range families {
					for _, m := range f.GetMetric() {
						if f.GetName() != "ratelimiter_redis_errors_total" {
							continue
						}
						all += m.GetCounter().GetValue()
						for _, label := range m.GetLabel() {
							if label.GetValue() == c.kind {
								ofKind += m.GetCounter().GetValue()
							}
						}
					}
				}
				return all, ofKind
			}
			allBefore, _ := failed()
			end := c.begin(t, server)
			eventually(t, 10*time.Second, "it takes no more charges", func() bool { return told.allow(l, "user").Source != ringfence.SourcePrimary })
			told = newAnswers(t)
			start := time.Now()
			pace(2000, 2, 2*time.Millisecond, func(int) { // 4 s
				told.allow(l, "user")
				if d, err := l.Peek(t.Context(), "user"); err != nil || (d.Source == ringfence.SourcePrimary && !c.looks) {
					t.Errorf("Peek: %+v, %v", d, err)
				}
			})
			elapsed := time.Since(start)
			all, ofKind := failed()
			all -= allBefore
			// Three failures, four operations in flight at the time, and a probe after at least
			// 75, 150, 300, 600, 1200, 2400 and 3750 ms.
			allowed, at := 3.0+4, 0.0
			for period := 0.075; at < elapsed.Seconds()+0.2; period = min(2*period, 3.75) {
				allowed, at = allowed+1, at+period
			}
			t.Logf("%.0f calls failed in %s, %.0f of them with %s; %s", all, elapsed, ofKind, c.kind, told)
			if all > allowed || ofKind < 3 {
				t.Errorf("%.0f calls failed in %s, want at most %.0f; %.0f with %s, want at least 3", all, elapsed, allowed, ofKind, c.kind)
			}
			if n := told.count("denied", "policy"); n != 2000 {
				t.Errorf("the policy answered %d of 2000 calls: %s", n, told)
			}
			end(t)
			took := eventually(t, recovery(ringfence.BreakerConfig{}), "the primary decides again", func() bool {
				return told.allow(l, "user").Source == ringfence.SourcePrimary
			})
			t.Logf("exact again %s later", took)
		})
	}
}
