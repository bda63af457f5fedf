package ringfence

import (
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence/internal/redistest"
)

// Once the cluster has been asked for its slots, both clients send to who owns them now: a
// probe that comes just after a takeover finds the new master, and not the old one once more.
func TestWhoAsksForTheSlotsSendsToTheirOwnersAtOnce(t *testing.T) {
	c := redistest.StartCluster(t, redistest.ClusterOptions{})
	redistest.NoLeaks(t)
	r, err := Open(t.Context(), Config{
		Shards: []ShardConfig{{ID: "c", Primary: c.URL()}}, HashKey: []byte("0123456789abcdef"), Logger: (&sink{}).logger(),
		Budget: 5 * time.Second, OperationTimeout: 5 * time.Second, Strict: true,
	})
	aclMust(t, err)
	defer r.Close()
	k := r.members[0].cluster
	// Always to the same master: its word is the newest then, however slowly the others talk.
	to, moves := c.Masters()[0], 0
	for slot := 0; moves < 8; slot++ {
		if c.MasterOf(slot) == to {
			slot += slotCount / 8
			continue
		}
		moves++
		aclMust(t, k.refresh(t.Context())) // so that nobody asks in the background meanwhile
		aclMust(t, c.MoveSlot(t.Context(), slot, to))
		aclMust(t, k.refresh(t.Context()))
		for name, client := range map[string]*redis.ClusterClient{"the one that writes": k.rw, "the one that looks": k.ro} {
			one, err := client.MasterForKey(t.Context(), slotKey(slot))
			aclMust(t, err)
			if got := one.Options().Addr; got != to.Addr() {
				t.Errorf("slot %d: %s sends to %s, want the new owner %s", slot, name, got, to.Addr())
			}
		}
	}
}
