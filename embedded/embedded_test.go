package embedded_test

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/embedded"
)

func TestARevivedShardIsEmptyAtItsOldAddress(t *testing.T) {
	ctx := context.Background()
	shards, err := embedded.Start(2)
	if err != nil {
		t.Fatal(err)
	}
	defer shards.Close()
	addr, err := shards.Addr(1)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("embedded redis %s", addr)
	admitted := func() (n int) {
		t.Helper()
		ring, err := ringfence.Open(ctx, ringfence.Config{
			Shards: shards.Config()[1:], HashKey: make([]byte, 16), Strict: true, NearCacheKeys: -1,
			Budget: 5 * time.Second, OperationTimeout: 5 * time.Second,
		})
		if err != nil {
			t.Fatal(err)
		}
		defer ring.Close()
		limiter, err := ring.Limiter("l", ringfence.SlidingLog{Limit: 3, Window: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			d, err := limiter.Allow(ctx, "k")
			if err != nil || d.Source != ringfence.SourcePrimary {
				t.Fatalf("%+v, %v", d, err)
			}
			if d.Allowed {
				n++
			}
		}
		return n
	}
	if got := admitted(); got != 3 {
		t.Fatalf("%d admitted, want 3", got)
	}
	if err := shards.Kill(1); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
		t.Error("the dead shard takes connections")
	}
	if got, err := shards.Addr(1); got != addr || err != nil {
		t.Errorf("the dead shard's address is %q, %v; want %q", got, err, addr)
	}
	if got := shards.Config()[1].Primary; got != "redis://"+addr {
		t.Errorf("the dead shard's primary is %q", got)
	}
	if err := shards.Revive(1); err != nil {
		t.Fatal(err)
	}
	if got := admitted(); got != 3 {
		t.Errorf("%d admitted after the return, want 3: it is empty", got)
	}
}
