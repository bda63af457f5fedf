package redistest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// clusterClient is a client as a program would have it.
func clusterClient(t *testing.T, c *Cluster) *redis.ClusterClient {
	t.Helper()
	addrs := strings.Split(strings.TrimPrefix(c.URL(), "redis+cluster://"), ",")
	if len(addrs) != len(c.Nodes()) {
		t.Errorf("URL %s names %d nodes of %d", c.URL(), len(addrs), len(c.Nodes()))
	}
	client := redis.NewClusterClient(&redis.ClusterOptions{
		Addrs:                    addrs,
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	})
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func TestClusterIsUpWithEverySlotOwnedAndEveryReplicaInSync(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	start := time.Now()
	c := StartCluster(t, ClusterOptions{ReplicasPer: 1})
	t.Logf("3 masters and 3 replicas were up after %v", time.Since(start))

	masters := c.Masters()
	if !slices.Equal(masters, c.Nodes()[:3]) {
		t.Fatalf("%d masters, want the first three nodes", len(masters))
	}
	for i, master := range masters {
		if got := c.ReplicasOf(master); !slices.Equal(got, c.Nodes()[3+i:4+i]) {
			t.Errorf("master %d has %d replicas, want node %d", i, len(got), 3+i)
		}
		if c.ReplicaOf(master) != c.Nodes()[3+i] {
			t.Errorf("master %d has another first replica", i)
		}
	}
	for slot, want := range map[int]int{0: 0, 5460: 0, 5461: 1, 10921: 1, 10922: 2, 16383: 2} {
		if c.MasterOf(slot) != masters[want] {
			t.Errorf("slot %d is not master %d's", slot, want)
		}
	}
	for _, slot := range []int{-1, Slots} {
		if c.MasterOf(slot) != nil {
			t.Errorf("slot %d has a master", slot)
		}
	}

	client := clusterClient(t, c)
	for i := range 100 {
		must(t, client.Set(ctx, fmt.Sprint("k", i), i, 0).Err())
	}
	must(t, c.WaitReady(ctx)) // in sync: what was written is on the replicas
	total := map[bool]int64{}
	for i, node := range c.Nodes() {
		n, err := node.Client().DBSize(ctx).Result()
		must(t, err)
		total[i < 3] += n
	}
	if want := map[bool]int64{true: 100, false: 100}; !maps.Equal(total, want) {
		t.Errorf("keys on masters and replicas %v, want %v", total, want)
	}
}

func TestReplicaTakesOverFromAKilledMasterWhichComesBackAsItsReplica(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	c := StartCluster(t, ClusterOptions{ReplicasPer: 1, NodeTimeout: time.Second, Clock: true})
	old := c.MasterOf(0)
	replica := c.ReplicaOf(old)
	must(t, old.Client().Set(ctx, "{06S}k", 1, 0).Err())
	must(t, replica.WaitInSync(ctx))

	start := time.Now()
	old.Kill()
	if got := c.MasterOf(0); got != old && got != replica {
		t.Error("the slot of a killed master belongs to a stranger")
	}
	eventually(t, "the replica takes over", func() bool { return c.MasterOf(0) == replica })
	t.Logf("the replica owned the slots after %v", time.Since(start))
	must(t, c.WaitReady(ctx)) // without the killed node
	if got := c.Masters(); slices.Contains(got, old) || len(got) != 3 {
		t.Errorf("%d masters, the killed one among them: %v", len(got), slices.Contains(got, old))
	}
	n, err := replica.Client().Get(ctx, "{06S}k").Int()
	must(t, err)
	if n != 1 {
		t.Errorf("the key is %d", n)
	}

	must(t, old.Restart(ctx))
	eventually(t, "the old master is a replica", func() bool { return slices.Contains(c.ReplicasOf(replica), old) })
	must(t, c.WaitReady(ctx))
	must(t, old.WaitInSync(ctx))
	must(t, old.Step(-time.Hour))
	wantMoved(t, old, -time.Hour)
}

func TestSlotMovesUnderLoadWithoutAnErrorOrALostIncrement(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	c := StartCluster(t, ClusterOptions{NodeTimeout: 5 * time.Second})
	client := clusterClient(t, c)
	key := func(i int) string { return fmt.Sprintf("{tag}%d", i) }
	slot64, err := c.Nodes()[0].Client().ClusterKeySlot(ctx, key(0)).Result()
	must(t, err)
	slot := int(slot64)
	for i := range 500 { // some for many steps, most of them not written to again
		must(t, client.Set(ctx, key(i), 0, 0).Err())
	}

	load, stop := context.WithCancel(ctx)
	defer stop()
	var acked atomic.Int64
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for i := w; load.Err() == nil; i = (i + 4) % 600 { // new keys, too
				if err := client.Incr(ctx, key(i)).Err(); err != nil {
					t.Errorf("increment: %v", err)
					return
				}
				acked.Add(1)
			}
		})
	}
	from := c.MasterOf(slot)
	for _, to := range slices.Concat(c.Nodes(), []*Server{from, from}) {
		before := acked.Load()
		must(t, c.MoveSlot(ctx, slot, to))
		if c.MasterOf(slot) != to {
			t.Errorf("the slot is not at %s", to.Addr())
		}
		eventually(t, "increments go on", func() bool { return acked.Load() > before })
	}
	stop()
	writers.Wait()

	var total int64
	for i := range 600 {
		n, err := client.Get(ctx, key(i)).Int64()
		if err != nil && err != redis.Nil { //nolint:errorlint // go-redis returns it bare
			t.Fatal(err)
		}
		total += n
	}
	if total != acked.Load() {
		t.Errorf("%d increments are there, %d were acknowledged", total, acked.Load())
	}
	t.Logf("%d increments", total)
	left, err := c.Nodes()[(slices.Index(c.Nodes(), from)+1)%3].Client().ClusterCountKeysInSlot(ctx, slot).Result()
	must(t, err)
	if left != 0 {
		t.Errorf("%d keys were left behind", left)
	}
	must(t, c.WaitReady(ctx))
}

func TestImpossibleMovesAndClustersAreRefused(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	c := StartCluster(t, ClusterOptions{Masters: 1, ReplicasPer: 1})
	master, replica := c.Nodes()[0], c.Nodes()[1]
	wantError(t, c.MoveSlot(ctx, -1, master), "slots are 0 to 16383")
	wantError(t, c.MoveSlot(ctx, 1, replica), "is a replica", replica.Addr())
	wantError(t, c.MoveSlot(ctx, 1, Start(t, Options{})), "no node of this cluster")
	must(t, c.MoveSlot(ctx, 1, master)) // it is there already
	if c.ReplicaOf(replica) != nil {
		t.Error("a replica has a replica")
	}
	replica.Kill()
	if c.ReplicaOf(master) != nil {
		t.Error("a killed replica counts as running")
	}
	master.Pause()
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	err := c.WaitReady(short)
	if !isExpired(err) {
		t.Errorf("error %v, want a deadline", err)
	}
	wantError(t, err, "is not ready", master.Addr())

	_, err = LaunchCluster(ctx, ClusterOptions{Masters: -1})
	wantError(t, err, "ask for 1 to 100")
	_, err = LaunchCluster(ctx, ClusterOptions{ReplicasPer: 9})
	wantError(t, err, "ask for 0 to 5")
	_, err = LaunchCluster(ctx, ClusterOptions{NodeTimeout: time.Millisecond})
	wantError(t, err, "ask for 1 s or more")
	_, err = LaunchCluster(ctx, ClusterOptions{Args: []string{"no-such-directive 1"}})
	wantError(t, err, "no-such-directive")
}

func TestViewOfANodeIsReadWithSlotsOnTheMove(t *testing.T) {
	v := parseView("aa 127.0.0.1:7001@17001,host myself,master - 0 1 4 connected 0-5 9 [93->-bb]\n" +
		"bb 127.0.0.1:7002@17002 slave,fail aa 0 1 4 disconnected\n" +
		"cc :0@0 master,handshake - 0 0 0 disconnected\n\n")
	a, b := v["aa"], v["bb"]
	if len(v) != 2 || !a.self || a.master != "" || a.epoch != 4 || !slices.Equal(a.slots, [][2]int{{0, 5}, {9, 9}}) {
		t.Errorf("%+v", v)
	}
	if b.self || b.master != "aa" || len(b.slots) != 0 {
		t.Errorf("%+v", b)
	}
}

// A master that comes back after a failover claims its old slots until it hears
// of the new epoch; a node that cannot be asked is described by the others.
func TestOwnerOfASlotIsTheClaimWithTheHighestEpoch(t *testing.T) {
	c := &Cluster{}
	stale := view{"aa": {self: true, epoch: 1, slots: [][2]int{{0, 9}}}, "bb": {master: "aa", epoch: 1}}
	fresh := view{"bb": {self: true, epoch: 7, slots: [][2]int{{0, 9}}}, "aa": {epoch: 1}}
	for _, views := range [][]view{{stale, fresh}, {fresh, stale}} {
		l := c.merge(views)
		if l.owner[0] != "bb" || l.owner[9] != "bb" || l.owner[10] != "" || l.masterOf["bb"] != "" {
			t.Errorf("owner %q, master of bb %q", l.owner[0], l.masterOf["bb"])
		}
	}
}
