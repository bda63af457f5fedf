package redistest

import (
	"context"
	"fmt"
	"testing"
	"time"
)

func TestReplicaInSyncHoldsEverythingWhenThePrimaryDies(t *testing.T) {
	ctx := deadline(t)
	primary := Start(t, Options{})
	pipe := primary.Client().Pipeline()
	for i := range 500 {
		pipe.Set(ctx, fmt.Sprint("before", i), i, 0)
	}
	_, err := pipe.Exec(ctx)
	must(t, err)

	replica := Start(t, Options{ReplicaOf: primary})
	// Right after the transfer the primary does not stream yet: these would be
	// lost if "link up" were taken for "in sync".
	for i := range 500 {
		must(t, primary.Client().Set(ctx, fmt.Sprint("after", i), i, 0).Err())
	}
	must(t, replica.WaitInSync(ctx))
	primary.Kill()
	must(t, replica.Promote(ctx))

	size, err := replica.Client().DBSize(ctx).Result()
	must(t, err)
	if size != 1000 {
		t.Errorf("the promoted replica has %d keys, want 1000", size)
	}
	must(t, replica.Client().Set(ctx, "writable", 1, 0).Err())
	wantError(t, replica.WaitInSync(ctx), "is no replica")
}

func TestReplicaInSyncGetsTheNextWriteAtOnce(t *testing.T) {
	ctx := deadline(t)
	primary := Start(t, Options{})
	replica := Start(t, Options{ReplicaOf: primary})
	must(t, replica.WaitInSync(ctx))
	conn := primary.Client().Conn()
	defer conn.Close()
	must(t, conn.Set(ctx, "k", "v", 0).Err())
	// WAIT counts the replicas that hold this connection's last write. Half a
	// second is less than the replica's own report interval.
	n, err := conn.Wait(ctx, 1, 500*time.Millisecond).Result()
	must(t, err)
	if n != 1 {
		t.Error("the write did not reach a replica in sync")
	}
}

func TestWaitInSyncWritesNoKeys(t *testing.T) {
	ctx := deadline(t)
	primary := Start(t, Options{})
	replica := Start(t, Options{})
	must(t, replica.ReplicaOf(ctx, primary)) // at run time this time
	must(t, replica.WaitInSync(ctx))
	for _, s := range []*Server{primary, replica} {
		size, err := s.Client().DBSize(ctx).Result()
		must(t, err)
		if size != 0 {
			t.Errorf("%d keys on %s", size, s.Addr())
		}
	}
	wantError(t, replica.Client().Set(ctx, "k", "v", 0).Err(), "READONLY")
}

func TestWaitInSyncSaysWhatIsMissing(t *testing.T) {
	primary := Start(t, Options{})
	replica := Start(t, Options{ReplicaOf: primary})
	must(t, replica.WaitInSync(deadline(t)))
	primary.Kill()
	short, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	err := replica.WaitInSync(short)
	if !isExpired(err) {
		t.Errorf("error %v, want a deadline", err)
	}
	wantError(t, err, "not in sync with "+primary.Addr(), "last:")
}

func TestReplicaFollowsAnEmptyPrimaryThatCameBack(t *testing.T) {
	ctx := deadline(t)
	primary := Start(t, Options{})
	must(t, primary.Client().Set(ctx, "k", "v", 0).Err())
	replica := Start(t, Options{ReplicaOf: primary})
	must(t, replica.WaitInSync(ctx))
	must(t, primary.Restart(ctx))
	must(t, replica.WaitInSync(ctx))
	size, err := replica.Client().DBSize(ctx).Result()
	must(t, err)
	if size != 0 {
		t.Errorf("the replica kept %d keys of the former life", size)
	}
}

func TestPromotedReplicaIsAReplicaAgainAfterRestart(t *testing.T) {
	ctx := deadline(t)
	primary := Start(t, Options{})
	replica := Start(t, Options{ReplicaOf: primary})
	must(t, replica.Promote(ctx))
	must(t, replica.Restart(ctx))
	must(t, replica.WaitInSync(ctx))
}

func TestReplicaComesInSyncOnFrozenClocks(t *testing.T) {
	ctx := deadline(t)
	at := time.Date(2030, 1, 2, 3, 4, 5, 6000, time.UTC)
	primary := Start(t, Options{Clock: true})
	must(t, primary.Freeze(at))
	replica := Start(t, Options{Clock: true, ReplicaOf: primary})
	must(t, replica.Freeze(at.Add(time.Hour)))
	must(t, replica.WaitInSync(ctx))
}
