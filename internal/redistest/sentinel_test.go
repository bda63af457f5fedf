package redistest

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestSentinelsAreReadyAndFailOverAsPlanned(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	start := time.Now()
	set := StartSentinel(t, SentinelOptions{})
	t.Logf("1 primary, 2 replicas and 3 Sentinels were ready after %v", time.Since(start))

	if len(set.Servers()) != 3 || len(set.Sentinels()) != 3 {
		t.Fatalf("%d servers and %d Sentinels", len(set.Servers()), len(set.Sentinels()))
	}
	url := set.URL()
	for _, s := range set.Sentinels() {
		if !strings.Contains(url, s.Addr()) {
			t.Errorf("URL %s lacks %s", url, s.Addr())
		}
	}
	if !strings.HasPrefix(url, "redis+sentinel://127.0.0.1:") || !strings.HasSuffix(url, "/mymaster") {
		t.Errorf("URL %s", url)
	}
	old := set.Master(ctx)
	if old != set.Servers()[0] {
		t.Fatal("the first server is not the master")
	}
	must(t, old.Client().Set(ctx, "k", "v", 0).Err())

	start = time.Now()
	must(t, set.Failover(ctx))
	t.Logf("all named the new master after %v", time.Since(start))
	fresh := set.Master(ctx)
	if fresh == nil || fresh == old {
		t.Fatal("no new master")
	}
	for i, named := range set.named(ctx) {
		if named != fresh {
			t.Errorf("Sentinel %d does not name the new master", i)
		}
	}
	got, err := fresh.Client().Get(ctx, "k").Result()
	must(t, err)
	if got != "v" {
		t.Errorf("the key is %q", got)
	}
	must(t, fresh.Client().Set(ctx, "k", "w", 0).Err())

	i := slices.IndexFunc(set.Servers()[1:], func(s *Server) bool { return s != fresh })
	other := set.Servers()[1+i]
	other.setMaster(fresh)
	must(t, other.WaitInSync(ctx))

	start = time.Now()
	must(t, set.WaitReady(ctx)) // the old one follows too
	t.Logf("the set was whole again after %v", time.Since(start))
	got, err = old.Client().Get(ctx, "k").Result()
	must(t, err)
	if got != "w" {
		t.Errorf("the former master has %q", got)
	}
}

func TestSentinelsReplaceAKilledMaster(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	set := StartSentinel(t, SentinelOptions{Replicas: 1, Clock: true})
	old := set.Master(ctx)
	replica := set.Servers()[1]
	start := time.Now()
	old.Kill()
	if set.Master(ctx) != old {
		t.Error("another master at once")
	}
	eventually(t, "the replica is promoted", func() bool { return set.Master(ctx) == replica })
	t.Logf("a majority named the replica after %v", time.Since(start))
	eventually(t, "the replica takes writes", func() bool { return replica.Client().Set(ctx, "k", "v", 0).Err() == nil })

	must(t, replica.Step(time.Hour))
	wantMoved(t, replica, time.Hour)

	for _, s := range set.Sentinels()[:2] {
		s.Kill()
	}
	if set.Master(ctx) != nil {
		t.Error("one Sentinel of three is a majority")
	}
	wantError(t, set.Failover(ctx), "no majority")
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	err := set.WaitReady(short)
	if !isExpired(err) {
		t.Errorf("error %v, want a deadline", err)
	}
	wantError(t, err, "are not ready", "asking sentinel")
	for _, s := range set.Sentinels()[:2] { // they remember what they knew
		must(t, s.Restart(ctx))
	}
	eventually(t, "the majority is back", func() bool { return set.Master(ctx) == replica })
}

func TestImpossibleSentinelSetsAreRefused(t *testing.T) {
	ctx := deadline(t)
	for _, o := range []SentinelOptions{{Replicas: -1}, {Replicas: 9}, {Sentinels: 99}, {DownAfter: time.Millisecond}} {
		_, err := LaunchSentinel(ctx, o)
		wantError(t, err, "ask for")
	}
	_, err := LaunchSentinel(ctx, SentinelOptions{SentinelArgs: []string{"sentinel no-such-directive"}})
	wantError(t, err, "no-such-directive")
}
