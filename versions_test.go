package ringfence

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// INFO differs between servers. Asking the binary itself also proves that the server
// under test is the one that was asked for.
func TestVersionRoleAndHistoryAreReadFromTheServerAtHand(t *testing.T) {
	binary := os.Getenv(redistest.BinaryEnv)
	if binary == "" {
		binary = "redis-server"
	}
	out, err := exec.Command(binary, "--version").Output()
	aclMust(t, err)
	is := regexp.MustCompile(`^(Redis|Valkey) server v=(\S+)`).FindSubmatch(out)
	if is == nil {
		t.Fatalf("it says %q", out)
	}
	primary := redistest.Start(t, redistest.Options{Args: []string{"repl-diskless-sync no", "maxmemory 100mb", "maxmemory-policy allkeys-lru"}})
	replica := redistest.Start(t, redistest.Options{ReplicaOf: primary, Args: []string{"repl-diskless-sync no"}})
	aclMust(t, replica.WaitInSync(t.Context()))
	t.Logf("real redis-server at %s: %s", primary.Addr(), strings.TrimSpace(string(out)))
	ask := func(s *redistest.Server) nodeInfo {
		t.Helper()
		n, err := newRedisNode(s.URL(), nodeConfig{timeout: 10 * time.Second, poolSize: 2}, false)
		aclMust(t, err)
		defer n.close()
		i, err := n.info(t.Context())
		aclMust(t, err)
		return i
	}
	p, r := ask(primary), ask(replica)
	for _, i := range []nodeInfo{p, r} {
		if i.version != string(is[2]) || i.valkey != (string(is[1]) == "Valkey") || i.tooOld() {
			t.Errorf("%+v; the binary says %s", i, out)
		}
	}
	if !p.primary || p.replID == "" || p.evictionRule != "allkeys-lru" || !p.memoryIsBound {
		t.Errorf("primary: %+v", p)
	}
	if r.primary || !r.linkUp || r.replID != p.replID || r.evictionRule != "noeviction" || r.memoryIsBound {
		t.Errorf("replica: %+v", r)
	}
	aclMust(t, replica.Promote(t.Context()))
	if r = ask(replica); !r.primary || r.replID2 != p.replID || r.replID == p.replID {
		t.Errorf("promoted: %+v; the primary was %+v", r, p)
	}
	if chosen, split := choosePrimary(0, []view{{nodeInfo: p}, {nodeInfo: r}}); chosen != 1 || split {
		t.Errorf("chosen %d, split %t; want the promoted one", chosen, split)
	}
}
