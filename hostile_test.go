package ringfence

import (
	"bufio"
	"errors"
	"fmt"
	"math"
	"net"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence/internal/redistest"
)

// marker is in every hostile id that has room for it, and must be nowhere else.
const marker = "zyxw9marker"

// hostileIDs are ids that a caller may pass on from whoever wants to do harm.
func hostileIDs() []string {
	ids := []string{
		"}", "}x", "}{", "{", "{}", "{{", "*", "?", "[a-z]", ":", "rf:1:{", "rf:*", "\x00", " ", "\r\n", "\n", "%s", "%!d(", "\"", "'", "\\", "$(id)", "`",
		strings.Repeat("\x00", MaxKeyBytes), strings.Repeat("\x00", MaxKeyBytes-1), strings.Repeat("}", MaxKeyBytes), strings.Repeat("\xff", MaxKeyBytes),
		"\xff\xfe", "\xc3\x28", "\xed\xa0\x80", // not UTF-8
		"fingerprint", "fingerprint}", "{fingerprint}",
		// Alike to the eye, to a case-blind or to a normalising comparison.
		"user1", "User1", "USER1", "user1 ", " user1", "user1\x00", "user1\n", "user01", "user1.0", "us\u0435r1", "use\u0301r1", "us\u00e9r1", "user1\u200b", "\ufeffuser1",
		"-1", "1", "+1", "01", "1e0", "1.0", "true", "null", "nil", "0",
	}
	for _, c := range []string{"}%s", "%s}", "}{%s", "{%s}", "*%s*", "\r\n%s\r\n", "\r\n$5\r\nFLUSHALL %s\r\n", "%s\x00", "\x00%s", "%s\xff", "%s\"} 1", "a=\"%s\"", "<%s>", "\x1b[31m%s", "';%s--", "%s\u202e"} {
		ids = append(ids, fmt.Sprintf(c, marker))
	}
	return append(ids, marker+strings.Repeat("x", MaxKeyBytes-len(marker)))
}

// monitor collects what a server is sent, until the returned function is called.
func monitor(t *testing.T, s *redistest.Server) (stop func() []string) {
	t.Helper()
	conn, err := net.Dial("tcp4", s.Addr())
	aclMust(t, err)
	t.Cleanup(func() { conn.Close() })
	_, err = conn.Write([]byte("MONITOR\r\n"))
	aclMust(t, err)
	in := bufio.NewReader(conn)
	ok, err := in.ReadString('\n')
	if err != nil || ok != "+OK\r\n" {
		t.Fatalf("MONITOR: %q, %v", ok, err)
	}
	const last = "the-last-line"
	var lines []string
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			line, err := in.ReadString('\n')
			if err != nil || strings.Contains(line, last) {
				return
			}
			lines = append(lines, line)
		}
	})
	return func() []string {
		// MONITOR shows commands in order, so this one comes after all others.
		aclMust(t, s.Client().Echo(t.Context(), last).Err())
		reading.Wait()
		return lines
	}
}

// threeShards opens a ring of three real servers.
func threeShards(t *testing.T, lines *sink, registry *prometheus.Registry, hashKey []byte) (*Ring, []*redistest.Server) {
	t.Helper()
	c := Config{
		HashKey: hashKey, Logger: lines.logger(), Registerer: registry,
		Budget: 10 * time.Second, OperationTimeout: 10 * time.Second, Policy: PolicyClosed, Strict: true,
	}
	var servers []*redistest.Server
	for i := range 3 {
		s := redistest.Start(t, redistest.Options{})
		servers = append(servers, s)
		c.Shards = append(c.Shards, ShardConfig{ID: fmt.Sprintf("s%d", i), Primary: s.URL()})
	}
	redistest.NoLeaks(t)
	ring, err := Open(t.Context(), c)
	aclMust(t, err)
	t.Cleanup(func() { ring.Close() })
	return ring, servers
}

var storedName = regexp.MustCompile(`^rf:1:\{([A-Za-z0-9_-]{22}|fingerprint|instances)\}$`)

func TestHostileIDsNeitherCollideNorFailNorShowUpAnywhere(t *testing.T) {
	lines, registry := &sink{}, prometheus.NewRegistry()
	ring, servers := threeShards(t, lines, registry, []byte("0123456789abcdef"))
	var stops []func() []string
	for _, s := range servers {
		stops = append(stops, monitor(t, s))
	}
	ids := hostileIDs()
	seen := map[string]bool{}
	for _, id := range ids {
		if seen[id] {
			t.Fatalf("%q is there twice", id)
		}
		seen[id] = true
	}
	// Names and algorithms that run together with the id if they are merely joined.
	limits := map[string]Limit{
		"api": TokenBucket{Rate: 1, Per: 24 * time.Hour, Burst: 1}, "a": TokenBucket{Rate: 1, Per: 24 * time.Hour, Burst: 1},
		"ap": SlidingLog{Limit: 1, Window: 24 * time.Hour}, "api.": SlidingLog{Limit: 1, Window: 24 * time.Hour},
	}
	asked := 0
	for name, limit := range limits {
		l, err := ring.Limiter(name, limit)
		aclMust(t, err)
		for _, id := range append(ids, "pi1", "i1", ".1") {
			asked++
			d, err := l.Allow(t.Context(), id)
			if err != nil || d.Source != SourcePrimary || !d.Allowed {
				t.Errorf("%s, %q: %+v, %v; want it admitted: nobody has used it", name, id, d, err)
			}
			if d, err = l.Peek(t.Context(), id); err != nil || d.Source != SourcePrimary || d.Allowed {
				t.Errorf("%s, %q: Peek %+v, %v; want it used up", name, id, d, err)
			}
		}
		many := make([]Request, len(ids))
		for i, id := range ids {
			many[i] = Request{Key: id, Cost: 1}
		}
		decisions, err := l.AllowMany(t.Context(), many)
		aclMust(t, err)
		for i, d := range decisions {
			if d.Source != SourcePrimary || d.Allowed {
				t.Errorf("%s, %q among many: %+v; want it denied", name, ids[i], d)
			}
		}
	}
	keys := 0
	for _, s := range servers {
		names, err := s.Client().Keys(t.Context(), "*").Result()
		aclMust(t, err)
		for _, name := range names {
			if !storedName.MatchString(name) {
				t.Errorf("a key has the name %q", name)
			}
			if !strings.HasSuffix(name, "{fingerprint}") && !strings.HasSuffix(name, "{instances}") {
				keys++
			}
		}
	}
	if keys != asked {
		t.Errorf("%d keys for %d quotas", keys, asked)
	}
	l, err := ring.Limiter("api", limits["api"])
	aclMust(t, err)
	for _, id := range ids {
		aclMust(t, l.Reset(t.Context(), id))
	}
	// Misuse with an id: the error must not carry it into somebody's log.
	var said strings.Builder
	for _, id := range []string{marker + strings.Repeat("x", MaxKeyBytes), marker} {
		_, err := l.AllowN(t.Context(), id, 2)
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("error %v, want ErrInvalid", err)
		}
		fmt.Fprintln(&said, err)
	}
	if _, err := l.Allow(t.Context(), ""); !errors.Is(err, ErrInvalid) {
		t.Errorf("the empty id: error %v, want ErrInvalid", err)
	}
	// The ladder logs and measures in its own ways.
	for _, s := range ring.Stats() {
		aclMust(t, ring.ForceBreaker(s.ID, BreakerForcedOpen))
	}
	for _, id := range ids {
		if d, err := l.Allow(t.Context(), id); err != nil || d.Source != SourcePolicy {
			t.Errorf("%q: %+v, %v", id, d, err)
		}
		if err := l.Reset(t.Context(), id); err != nil {
			fmt.Fprintln(&said, err)
		}
	}
	monitored := 0
	for _, stop := range stops {
		for _, line := range stop() {
			monitored++
			said.WriteString(line)
		}
	}
	if monitored < asked {
		t.Errorf("MONITOR showed %d lines for %d calls", monitored, asked)
	}
	said.WriteString(lines.String())
	said.WriteString(driverLog.String())
	said.WriteString(exposition(t, registry))
	for line := range strings.Lines(said.String()) {
		if strings.Contains(line, marker) || strings.Contains(line, "\\x00\\x00") || strings.Contains(line, "user1") {
			t.Errorf("an id shows in %q", line)
		}
	}
}

// An id of the form {tag}rest would, stored as it is, put all of them into one slot, and
// a plain consistent hash over tags all on one shard.
func TestIDsWithATagInCommonSpreadLikeAllOthers(t *testing.T) {
	for name, key := range map[string][]byte{"a secret HashKey": []byte("0123456789abcdef"), "no HashKey": nil} {
		t.Run(name, func(t *testing.T) {
			ring, servers := threeShards(t, &sink{}, prometheus.NewRegistry(), key)
			l, err := ring.Limiter("api", TokenBucket{Rate: 1, Per: 24 * time.Hour, Burst: 1})
			aclMust(t, err)
			const ids = 10_000
			for first := 0; first < ids; first += MaxMany {
				many := make([]Request, MaxMany)
				for i := range many {
					many[i] = Request{Key: fmt.Sprintf("{hot}%d", first+i), Cost: 1}
				}
				decisions, err := l.AllowMany(t.Context(), many)
				aclMust(t, err)
				for i, d := range decisions {
					if !d.Allowed || d.Source != SourcePrimary {
						t.Fatalf("%s: %+v", many[i].Key, d)
					}
				}
			}
			// Asked for its slots only.
			cluster := redistest.Start(t, redistest.Options{Args: []string{"cluster-enabled yes"}})
			total, slots := 0, map[int64]bool{}
			for i, s := range servers {
				names, err := s.Client().Keys(t.Context(), "rf:1:{??????????????????????}").Result()
				aclMust(t, err)
				total += len(names)
				share := ring.Stats()[i].Share
				mean, deviation := ids*share, math.Sqrt(ids*share*(1-share))
				if off := math.Abs(float64(len(names)) - mean); off > 5*deviation {
					t.Errorf("shard %d has %d of %d keys, %.0f standard deviations from its part", i, len(names), ids, off/deviation)
				}
				t.Logf("shard %d: %d keys, expected %.0f", i, len(names), mean)
				for _, n := range names[:min(100, len(names))] {
					slot, err := cluster.Client().ClusterKeySlot(t.Context(), n).Result()
					aclMust(t, err)
					slots[slot] = true
				}
			}
			if total != ids {
				t.Errorf("%d keys for %d ids", total, ids)
			}
			if len(slots) < 280 { // of 16,384; the birthday problem costs about 3 of 300
				t.Errorf("300 keys lie in %d slots of a Redis Cluster", len(slots))
			}
		})
	}
}
