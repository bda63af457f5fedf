package redistest

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"

	"github.com/redis/go-redis/v9"
)

func TestStartedServerAnswersAndKeepsNothingOnDisk(t *testing.T) {
	ctx := deadline(t)
	s := Start(t, Options{})
	if !s.Running() {
		t.Error("not running")
	}
	if want := "redis://" + s.Addr(); s.URL() != want {
		t.Errorf("URL %q, want %q", s.URL(), want)
	}
	for name, want := range map[string]string{
		"save": "", "appendonly": "no", "repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1",
	} {
		got, err := s.Client().ConfigGet(ctx, name).Result()
		must(t, err)
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
}

func TestArgsOverrideTheDefaults(t *testing.T) {
	s := Start(t, Options{Args: []string{"maxmemory 7mb", "repl-ping-replica-period 3"}})
	got, err := s.Client().ConfigGet(deadline(t), "*m*").Result()
	must(t, err)
	if got["maxmemory"] != "7340032" {
		t.Errorf("maxmemory %q", got["maxmemory"])
	}
	period, err := s.Client().ConfigGet(deadline(t), "repl-ping-replica-period").Result()
	must(t, err)
	if period["repl-ping-replica-period"] != "3" {
		t.Errorf("period %q", period)
	}
}

func TestServerWithPasswordIsReadyAndConfigureReachesIt(t *testing.T) {
	s := Start(t, Options{
		Args:      []string{"requirepass hush"},
		Configure: func(o *redis.Options) { o.Password = "hush" },
	})
	must(t, s.Client().Ping(deadline(t)).Err())
	bare := redis.NewClient(&redis.Options{Addr: s.Addr(), MaxRetries: -1})
	defer bare.Close()
	wantError(t, bare.Ping(deadline(t)).Err(), "NOAUTH")
}

func TestMissingBinaryIsAFailureThatNamesWhatToInstall(t *testing.T) {
	t.Setenv(BinaryEnv, "/nonexistent/redis-server")
	_, err := Launch(deadline(t), Options{})
	if !errors.Is(err, ErrNoRedis) {
		t.Fatalf("error %v, want ErrNoRedis", err)
	}
	wantError(t, err, "install Redis 7.0", BinaryEnv, "/nonexistent/redis-server")

	tb := &fakeTB{}
	if s := Start(tb, Options{}); s != nil {
		t.Error("a server without a binary")
	}
	if len(tb.failures) != 1 {
		t.Errorf("failures %q, want one", tb.failures)
	}
}

func TestBadConfigurationIsReportedWithTheServersLog(t *testing.T) {
	before := Count()
	_, err := Launch(deadline(t), Options{Args: []string{"no-such-directive 1"}})
	wantError(t, err, "ended while starting", "no-such-directive")
	if Count() != before {
		t.Error("a server that never answered was counted")
	}
	_, err = Launch(deadline(t), Options{Args: []string{"save \"\"\nport 1"}})
	wantError(t, err, "line break")
	_, err = Launch(deadline(t), Options{Port: -1})
	wantError(t, err, "0..65535")
}

func TestFixedPortThatIsTakenIsAnError(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	_, err = Launch(deadline(t), Options{Port: l.Addr().(*net.TCPAddr).Port})
	wantError(t, err, "address already in use")
}

func TestCanceledContextEndsTheStart(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := Launch(ctx, Options{})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v, want context.Canceled", err)
	}
}

func TestCountRisesByOnePerServerAndNotByRestart(t *testing.T) {
	before := Count()
	s := Start(t, Options{})
	Start(t, Options{})
	must(t, s.Restart(deadline(t)))
	if got := Count() - before; got != 2 {
		t.Errorf("counted %d, want 2", got)
	}
}

func TestManyServersStartAtOnceOnDifferentPorts(t *testing.T) {
	var wg sync.WaitGroup
	servers := make([]*Server, 6)
	for i := range servers {
		wg.Go(func() {
			s, err := Launch(deadline(t), Options{})
			if err != nil {
				t.Error(err)
				return
			}
			servers[i] = s
		})
	}
	wg.Wait()
	ports := map[string]bool{}
	for _, s := range servers {
		if s != nil {
			ports[s.Addr()] = true
			s.Stop()
		}
	}
	if len(ports) != len(servers) {
		t.Errorf("%d different ports for %d servers", len(ports), len(servers))
	}
}

// A child's parent-death signal fires when the forking thread ends; a goroutine
// that ends while locked takes its thread with it.
func TestServerOutlivesTheThreadThatAskedForIt(t *testing.T) {
	var s *Server
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread dies with the goroutine
		s, err = Launch(deadline(t), Options{})
	}()
	<-done
	must(t, err)
	defer s.Stop()
	for range 20 {
		must(t, s.Client().Ping(deadline(t)).Err())
		runtime.Gosched()
	}
	if !s.Running() {
		t.Error("died with the thread")
	}
}

func TestStopRemovesEverythingAndMayBeRepeated(t *testing.T) {
	s, err := Launch(deadline(t), Options{})
	must(t, err)
	must(t, s.Client().Ping(deadline(t)).Err())
	s.Stop()
	s.Stop()
	if s.Running() {
		t.Error("still running")
	}
	if _, err := os.Stat(s.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory left: %v", err)
	}
	if err := s.Client().Ping(deadline(t)).Err(); !errors.Is(err, redis.ErrClosed) {
		t.Errorf("client of a stopped server says %v, want redis.ErrClosed", err)
	}
	wantError(t, s.Restart(deadline(t)), "stopped for good")
	s.Kill()
	s.Pause()
	s.Resume()
}

func TestServerThatEndsByItselfIsLogged(t *testing.T) {
	tb := &fakeTB{}
	s := Start(tb, Options{})
	_ = s.Client().Shutdown(deadline(t)).Err() // the connection breaks; that is the answer
	eventually(t, "the server shuts down", func() bool { return !s.Running() })
	tb.finish()
	if len(tb.logs) != 2 { // the first says that it started
		t.Errorf("logs %q, want two", tb.logs)
	}
}
