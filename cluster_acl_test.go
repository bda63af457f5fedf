package ringfence

import (
	"fmt"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence/internal/redistest"
)

// What a Cluster's nodes must permit besides what a primary must: asking for the slots,
// looking on replicas, and following a slot on the move.
var clusterSends = []string{"asking", "cluster|slots", "readonly"}

// clusterRole is the least that every node of a Cluster must permit: any may be a master.
func clusterRole(t *testing.T) aclRole {
	primary, reader := roles(t)
	return aclRole{"ringfence-cluster", "~rf:*", sortedSet(primary.commands, reader.commands, clusterSends)}
}

// aclCluster is a Cluster whose nodes all have that user.
type aclCluster struct {
	*redistest.Cluster
	role aclRole
}

func startACLCluster(t *testing.T) *aclCluster {
	t.Helper()
	c := &aclCluster{role: clusterRole(t)}
	c.Cluster = redistest.StartCluster(t, redistest.ClusterOptions{
		ReplicasPer: 1, NodeTimeout: time.Minute, Args: []string{"user " + c.role.user + " " + c.role.rules(aclPassword)},
	})
	return c
}

func (c *aclCluster) each(t *testing.T, args ...any) {
	t.Helper()
	for _, s := range c.Nodes() {
		aclMust(t, s.Client().Do(t.Context(), args...).Err())
	}
}

// denied is what the nodes have refused.
func (c *aclCluster) denied(t *testing.T) (commands []string) {
	t.Helper()
	for _, s := range c.Nodes() {
		entries, err := s.Client().ACLLog(t.Context(), 100).Result()
		aclMust(t, err)
		for _, e := range entries {
			// go-redis tries these and does without: they route by what a command writes, and
			// measure how near a node is.
			if e.Username == c.role.user && e.Object != "command" && e.Object != "ping" {
				commands = append(commands, e.Object)
			}
		}
	}
	return sortedSet(commands)
}

func (c *aclCluster) open(t *testing.T, lines *sink, registry *prometheus.Registry) *Ring {
	t.Helper()
	at := "redis+cluster://" + c.role.user + ":" + aclPassword + "@" + strings.TrimPrefix(c.URL(), "redis+cluster://")
	redistest.NoLeaks(t)
	ring, err := Open(t.Context(), Config{
		Shards: []ShardConfig{{ID: "c", Primary: at}}, HashKey: []byte("0123456789abcdef"),
		Logger: lines.logger(), Registerer: registry, Policy: PolicyClosed, Instances: 1,
		Budget: 10 * time.Second, OperationTimeout: 10 * time.Second,
	})
	aclMust(t, err)
	t.Cleanup(func() { ring.Close() })
	return ring
}

// On a Cluster whoever picks the slot picks the server, and a script whose keys are in two
// slots is an error that would take the failure policy.
func TestHostileIDsOnAClusterSpreadLikeAllOthersAsTheUserWithTheLeastPermissions(t *testing.T) {
	c := startACLCluster(t)
	lines, registry := &sink{}, prometheus.NewRegistry()
	ring := c.open(t, lines, registry)
	t.Logf("ACL SETUSER %s %s", c.role.user, c.role.rules("PASSWORD"))
	ids := hostileIDs()
	for name, limit := range map[string]Limit{
		"api": TokenBucket{Rate: 1, Per: 24 * time.Hour, Burst: 1}, "ap": SlidingLog{Limit: 1, Window: 24 * time.Hour},
	} {
		l, err := ring.Limiter(name, limit)
		aclMust(t, err)
		for _, id := range ids {
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
		for _, id := range ids {
			aclMust(t, l.Reset(t.Context(), id))
		}
	}
	l, err := ring.Limiter("hot", TokenBucket{Rate: 1, Per: 24 * time.Hour, Burst: 1})
	aclMust(t, err)
	const hot = 1000
	many, slots := make([]Request, hot), map[int]bool{}
	for i := range many {
		many[i] = Request{Key: fmt.Sprintf("{hot}%d", i), Cost: 1}
		_, name := l.Locate(many[i].Key)
		slots[slotOf(tagOf([]byte(name)))] = true
	}
	decisions, err := l.AllowMany(t.Context(), many)
	aclMust(t, err)
	for i, d := range decisions {
		if !d.Allowed || d.Source != SourcePrimary {
			t.Fatalf("%s: %+v", many[i].Key, d)
		}
	}
	if len(slots) < 950 { // the birthday problem costs about 30 of 1000
		t.Errorf("%d ids with one tag lie in %d slots", hot, len(slots))
	}
	total := 0
	for _, s := range c.Masters() {
		names, err := s.Client().Keys(t.Context(), "*").Result()
		aclMust(t, err)
		n := 0
		for _, name := range names {
			if !storedName.MatchString(name) {
				t.Errorf("a key has the name %q", name)
			}
			if !strings.HasSuffix(name, "{fingerprint}") && !strings.HasSuffix(name, "{instances}") {
				n++
			}
		}
		mean, deviation := hot/3.0, math.Sqrt(hot*2/9.0)
		if off := math.Abs(float64(n)-mean) / deviation; off > 5 {
			t.Errorf("%s has %d of %d keys, %.0f standard deviations from its part", s.Addr(), n, hot, off)
		}
		total += n
	}
	if total != hot {
		t.Errorf("%d keys for %d ids", total, hot)
	}

	if strings.Contains(lines.String(), "level=WARN") {
		t.Errorf("warnings:\n%s", lines)
	}
	// Out of the replicas' answers too.
	aclMust(t, c.WaitReady(t.Context()))
	for _, s := range ring.Stats() {
		aclMust(t, ring.ForceBreaker(s.ID, BreakerForcedOpen))
	}
	for _, q := range many[:100] {
		if d, err := l.Allow(t.Context(), q.Key); err != nil || d.Source != SourceReplica || d.Allowed {
			t.Errorf("%s of the replica: %+v, %v", q.Key, d, err)
		}
	}
	if denied := c.denied(t); len(denied) > 0 {
		t.Errorf("the nodes refused %q", denied)
	}
	for _, said := range []string{lines.String(), driverLog.String(), exposition(t, registry), fmt.Sprintf("%+v %#v", ring, ring.Stats())} {
		for line := range strings.Lines(said) {
			if strings.Contains(line, marker) || strings.Contains(line, aclPassword) || strings.Contains(line, "{hot}") {
				t.Errorf("an id or a secret shows in %q", line)
			}
		}
	}
}

func TestEveryPermissionThatAClusterNeedsBesidesIsNeeded(t *testing.T) {
	c := startACLCluster(t)
	limit := TokenBucket{Rate: 1, Per: time.Hour, Burst: 5}
	for _, without := range append([]string{""}, clusterSends...) {
		t.Run("without "+without, func(t *testing.T) {
			for _, s := range c.Masters() {
				aclMust(t, s.Client().FlushAll(t.Context()).Err())
			}
			c.each(t, "acl", "log", "reset")
			if without != "" {
				c.each(t, "acl", "setuser", c.role.user, "-"+without)
				c.each(t, "client", "kill", "user", c.role.user)
				defer c.each(t, "acl", "setuser", c.role.user, "+"+without)
			}
			aclMust(t, c.WaitReady(t.Context()))
			ring := c.open(t, &sink{}, prometheus.NewRegistry())
			l, err := ring.Limiter("api", limit)
			aclMust(t, err)
			want := func(what, key string, source Source, breaks string) {
				t.Helper()
				d, err := l.Allow(t.Context(), key)
				aclMust(t, err)
				if exact := d.Source == source; exact == (without == breaks) {
					t.Errorf("%s: %+v", what, d)
				}
			}
			if want("a call", "k", SourcePrimary, "cluster|slots"); without == "cluster|slots" {
				return
			}
			// A slot on the move: what is not there yet is at the other node.
			_, name := l.Locate("moving")
			slot := slotOf(tagOf([]byte(name)))
			from := c.MasterOf(slot)
			to := c.Masters()[0]
			if to == from {
				to = c.Masters()[1]
			}
			id := func(s *redistest.Server) string {
				id, err := s.Client().Do(t.Context(), "cluster", "myid").Text()
				aclMust(t, err)
				return id
			}
			aclMust(t, to.Client().Do(t.Context(), "cluster", "setslot", slot, "importing", id(from)).Err())
			aclMust(t, from.Client().Do(t.Context(), "cluster", "setslot", slot, "migrating", id(to)).Err())
			want("a slot on the move", "moving", SourcePrimary, "asking")
			aclMust(t, to.Client().Do(t.Context(), "cluster", "setslot", slot, "stable").Err())
			aclMust(t, from.Client().Do(t.Context(), "cluster", "setslot", slot, "stable").Err())

			for _, s := range ring.Stats() {
				aclMust(t, ring.ForceBreaker(s.ID, BreakerForcedOpen))
			}
			want("a replica", "k", SourceReplica, "readonly")
		})
	}
}

func TestDocumentListsThePermissionsOfACluster(t *testing.T) {
	raw, err := os.ReadFile("docs/security.md")
	aclMust(t, err)
	r := clusterRole(t)
	if line := "\nACL SETUSER " + r.user + " " + r.rules("PASSWORD") + "\n"; !strings.Contains(string(raw), line) {
		t.Errorf("docs/security.md lacks this line:\n%s", line)
	}
}
