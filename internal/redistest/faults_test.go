package redistest

import (
	"errors"
	"net"
	"sync"
	"syscall"
	"testing"
)

func TestKilledServerRefusesAndComesBackEmptyOnItsPort(t *testing.T) {
	ctx := deadline(t)
	s := Start(t, Options{Args: []string{"maxmemory 9mb"}})
	must(t, s.Client().Set(ctx, "k", "v", 0).Err())
	addr := s.Addr()

	s.Kill()
	s.Kill() // nothing left to kill
	if s.Running() {
		t.Error("running after Kill")
	}
	if err := s.Client().Ping(ctx).Err(); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("killed server: %v, want connection refused", err)
	}

	must(t, s.Restart(ctx))
	if s.Addr() != addr {
		t.Errorf("came back at %s, was at %s", s.Addr(), addr)
	}
	size, err := s.Client().DBSize(ctx).Result()
	must(t, err)
	if size != 0 {
		t.Errorf("%d keys survived", size)
	}
	got, err := s.Client().ConfigGet(ctx, "maxmemory").Result()
	must(t, err)
	if got["maxmemory"] != "9437184" {
		t.Errorf("options lost: maxmemory %q", got["maxmemory"])
	}
}

func TestRestartOfARunningServerKillsItFirst(t *testing.T) {
	ctx := deadline(t)
	s := Start(t, Options{})
	must(t, s.Client().Set(ctx, "k", "v", 0).Err())
	s.Pause()
	must(t, s.Restart(ctx))
	size, err := s.Client().DBSize(ctx).Result()
	must(t, err)
	if size != 0 {
		t.Errorf("%d keys survived", size)
	}
}

func TestPortOfAKilledServerStaysReserved(t *testing.T) {
	ctx := deadline(t)
	s := Start(t, Options{})
	s.Kill()
	for range 200 {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		must(t, err)
		taken := l.Addr().String() == s.Addr()
		must(t, l.Close())
		if taken {
			t.Fatal("the port was given away")
		}
	}
	must(t, s.Restart(ctx))
}

func TestPausedServerAnswersOnlyAfterResume(t *testing.T) {
	s := Start(t, Options{})
	conn, err := net.Dial("tcp4", s.Addr())
	must(t, err)
	defer conn.Close()
	s.Pause()
	if !s.Running() {
		t.Error("a paused server is running")
	}
	sendAndGiveUp(t, conn, "INCR n")
	s.Resume()
	// What the client gave up on is executed all the same.
	eventually(t, "the late increment", func() bool { return counter(t, s) == 1 })
}

func TestStopAndKillEndAPausedServer(t *testing.T) {
	s := Start(t, Options{})
	s.Pause()
	s.Kill()
	must(t, s.Restart(deadline(t)))
	must(t, s.Client().Ping(deadline(t)).Err())
	s.Pause()
	s.Stop()
	if s.Running() {
		t.Error("running after Stop")
	}
}

func TestFaultsFromManyGoroutinesEndInAWorkingServer(t *testing.T) {
	ctx := deadline(t)
	s := Start(t, Options{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for range 3 {
				s.Kill()
				s.Pause()
				s.Running()
				s.Resume()
				if err := s.Restart(ctx); err != nil {
					t.Error(err)
				}
				_ = s.Client().Ping(ctx).Err() // may meet another goroutine's Kill
			}
		})
	}
	wg.Wait()
	must(t, s.Restart(ctx))
	must(t, s.Client().Ping(ctx).Err())
}
