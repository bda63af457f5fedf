package ringfence

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence/internal/redistest"
)

// knocks counts the connections opened to each address.
type knocks struct {
	mu sync.Mutex
	at map[string]int
}

func (k *knocks) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	k.mu.Lock()
	if k.at == nil {
		k.at = map[string]int{}
	}
	k.at[addr]++
	k.mu.Unlock()
	var d net.Dialer
	return d.DialContext(ctx, network, addr)
}

func (k *knocks) count(addr string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.at[addr]
}

// A minute of calls with credentials that the servers do not take, on a clock that runs
// faster: policy answers, hardly a connection, and exact answers within 5 s of putting it
// right.
func TestAServerThatRefusesUsIsTriedAtMost25TimesAMinute(t *testing.T) {
	writer, _ := roles(t)
	rules := writer.rules(aclPassword)
	single := redistest.Start(t, redistest.Options{Args: []string{"repl-diskless-sync no"}})
	replica := redistest.Start(t, redistest.Options{ReplicaOf: single, Args: []string{"repl-diskless-sync no"}})
	set := redistest.StartSentinel(t, redistest.SentinelOptions{})
	cluster := redistest.StartCluster(t, redistest.ClusterOptions{})
	atCluster, atSet := cluster.Nodes(), []*redistest.Server{set.Master(t.Context())}
	pair := []*redistest.Server{single, replica}
	for _, c := range []struct {
		name    string
		url     string // %s: credentials
		servers []*redistest.Server
		before  string // of the user on the servers
		kind    string
	}{
		{"a wrong password", "redis://%s@" + single.Addr(), pair, rules + " resetpass >another", "auth"},
		{"a user who is off", "redis://%s@" + single.Addr(), pair, rules + " off", "auth"},
		{"a database that may not be selected", "redis://%s@" + single.Addr() + "/3", pair, rules, "noperm"},
		{"a Sentinel set", "redis+sentinel://%s@" + strings.TrimPrefix(set.URL(), "redis+sentinel://"), atSet, rules + " resetpass >another", "auth"},
		{"a Cluster", "redis+cluster://%s@" + strings.TrimPrefix(cluster.URL(), "redis+cluster://"), atCluster, rules + " resetpass >another", "auth"},
	} {
		t.Run(c.name, func(t *testing.T) {
			user := func(rules string) {
				for _, s := range c.servers {
					args := []any{"acl", "setuser", "knocker"}
					for word := range strings.FieldsSeq(rules) {
						args = append(args, word)
					}
					aclMust(t, s.Client().Do(t.Context(), args...).Err())
				}
			}
			user(c.before)
			var opened knocks
			var ahead atomic.Int64
			lines, registry := &sink{}, prometheus.NewRegistry()
			shard := ShardConfig{ID: "a", Primary: fmt.Sprintf(c.url, "knocker:"+aclPassword)}
			if len(c.servers) == 2 {
				shard.Replicas = []string{fmt.Sprintf("redis://%s@"+replica.Addr(), "knocker:"+aclPassword)}
			}
			redistest.NoLeaks(t)
			ring, err := Open(t.Context(), Config{
				Shards: []ShardConfig{shard}, HashKey: []byte("0123456789abcdef"), Logger: lines.logger(), Registerer: registry,
				Dialer: opened.dial, Policy: PolicyClosed, Budget: 5 * time.Second, OperationTimeout: 5 * time.Second,
				Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) },
			})
			aclMust(t, err)
			defer ring.Close()
			l, err := ring.Limiter("api", TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000})
			aclMust(t, err)
			const step, calls = 20 * time.Millisecond, 3000 // a minute
			began := ring.clock()
			for i := range calls {
				var callers sync.WaitGroup
				for k := range 4 {
					callers.Go(func() {
						d, err := l.Allow(context.Background(), fmt.Sprint(i%50+k))
						if err != nil || d.Allowed || d.Source != SourcePolicy {
							t.Errorf("call %d: %+v, %v", i, d, err)
						}
					})
				}
				callers.Wait()
				if ahead.Add(int64(step)); t.Failed() || ring.clock()-began >= int64(time.Minute) {
					break
				}
			}
			minute := time.Duration(ring.clock() - began)
			for _, s := range c.servers {
				n := opened.count(s.Addr())
				t.Logf("%d connections to %s in %s", n, s.Addr(), minute.Round(time.Second))
				if n > 25 || (n < 10 && s == c.servers[0]) {
					t.Errorf("%d connections in a minute to a server that refuses, want 10 to 25", n)
				}
			}
			for _, s := range ring.Stats() {
				if s.Breaker.State != BreakerClosed {
					t.Errorf("the breaker of %s is %s", s.ID, s.Breaker.State)
				}
			}
			if !strings.Contains(lines.String(), "Redis refuses") {
				t.Errorf("nobody is told:\n%s", lines)
			}
			some := fmt.Sprintf(`ratelimiter_redis_errors_total{error_type=%q,`, c.kind)
			counted := false
			for line := range strings.Lines(exposition(t, registry)) {
				counted = counted || (strings.HasPrefix(line, some) && !strings.HasSuffix(line, " 0\n"))
			}
			if !counted {
				t.Errorf("no error of type %s was counted", c.kind)
			}

			user(rules + " +select +cluster|slots +readonly +asking")
			mended := ring.clock()
			for {
				d, err := l.Allow(t.Context(), "k")
				aclMust(t, err)
				after := time.Duration(ring.clock() - mended)
				if d.Source == SourcePrimary {
					t.Logf("exact %s after it was put right", after)
					if after > 6*time.Second { // one for a busy machine
						t.Errorf("exact only %s after it was put right, want at most 5s", after)
					}
					break
				}
				if ahead.Add(int64(step)); after > time.Minute {
					t.Fatalf("not exact a minute later: %+v\n%s", d, lines)
				}
			}
		})
	}
}

func TestWhatAServerSaysOfUsIsTakenForARefusalOrNot(t *testing.T) {
	for said, want := range map[string]string{
		"-NOAUTH HELLO must be called\r\n":                                                                "NOAUTH HELLO must be called",
		"-WRONGPASS invalid username-password pair or user is disabled.\r\n":                              "WRONGPASS invalid username-password pair or user is disabled.",
		"-ERR DB index is out of range\r\n":                                                               "ERR DB index is out of range",
		"-NOPERM User x has no permissions to run the 'select' command\r\n":                               "NOPERM User x has no permissions to run the 'select' command",
		"+OK\r\n-NOPERM this user has no permissions to run the 'readonly' command or its subcommand\r\n": "NOPERM this user has no permissions to run the 'readonly' command or its subcommand",
		"-NOPERM this user has no permissions to run the 'evalsha' command\r\n":                           "",
		"-NOPERM this user has no permissions to access one of the keys used as arguments\r\n":            "",
		"-LOADING Redis is loading the dataset in memory\r\n":                                             "",
		"-NOSCRIPT No matching script\r\n":                                                                "",
		"+OK\r\n":                                                                                         "",
		"$9\r\n-NOAUTHx\r\n":                                                                              "",
		"":                                                                                                "",
	} {
		if got := refusalIn([]byte(said)); got != want {
			t.Errorf("%q: %q, want %q", said, got, want)
		}
	}
}

func TestRefusalsAreForgottenOnceTheServerLetsUsIn(t *testing.T) {
	now := time.Unix(0, 0)
	g := newRefusals(Config{Now: func() time.Time { return now }, Rand: func() uint64 { return highest }})
	held := func(addr string, want bool) {
		t.Helper()
		if err := g.leave(addr); (err != nil) != want {
			t.Errorf("at %s: %s may not be dialed: %v, want %t", now.Sub(time.Unix(0, 0)), addr, err, want)
		} else if err != nil && classify(err) != typeAuth {
			t.Errorf("%v is not what the server said", err)
		}
	}
	held("a", false)
	g.refused("a", "WRONGPASS no")
	held("a", true)
	held("b", false)
	now = now.Add(100 * time.Millisecond)
	held("a", false) // one try
	held("a", true)
	g.refused("a", "WRONGPASS still no")
	now = now.Add(199 * time.Millisecond)
	held("a", true)
	now = now.Add(time.Millisecond)
	held("a", false)
	g.refused("b", "NOAUTH no")
	g.accepted("a")
	held("a", false)
	held("b", true)
	g.accepted("b")
	held("b", false)
	if len(g.by) > 0 || g.any.Load() {
		t.Errorf("remembered: %v", g.by)
	}
}
