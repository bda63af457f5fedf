package redistest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
)

// proxied returns a server and one connection to it through a proxy, already
// past its handshake.
func proxied(t *testing.T) (*Server, *Proxy, *redis.Conn) {
	t.Helper()
	s := Start(t, Options{})
	p := startProxy(t, s.Addr())
	return s, p, connect(t, p)
}

func startProxy(t *testing.T, target string) *Proxy {
	t.Helper()
	p, err := NewProxy(target)
	must(t, err)
	t.Cleanup(p.Close)
	return p
}

func connect(t *testing.T, p *Proxy) *redis.Conn {
	t.Helper()
	o := (&Server{}).clientOptions()
	o.Addr = p.Addr()
	client := redis.NewClient(o)
	conn := client.Conn()
	t.Cleanup(func() { _, _ = conn.Close(), client.Close() })
	must(t, conn.Ping(deadline(t)).Err())
	return conn
}

func counter(t *testing.T, s *Server) int {
	t.Helper()
	n, err := s.Client().Get(deadline(t), "n").Int()
	if errors.Is(err, redis.Nil) {
		return 0
	}
	must(t, err)
	return n
}

func TestProxyPassesEverythingOn(t *testing.T) {
	_, _, conn := proxied(t)
	big := string(make([]byte, 1<<20))
	must(t, conn.Set(deadline(t), "k", big, 0).Err())
	got, err := conn.Get(deadline(t), "k").Result()
	must(t, err)
	if got != big {
		t.Errorf("%d bytes came back of %d", len(got), len(big))
	}
}

func TestProxyDelaysEachReplyAndNotTheNextOnes(t *testing.T) {
	s := Start(t, Options{})
	p := startProxy(t, s.Addr())
	const delay = 200 * time.Millisecond
	p.SetDelay(delay)
	// Were the delays served one after another, the replies behind the first
	// would wait nearly twice as long, every time. A busy machine can look like
	// that, but not five times in a row.
	var median time.Duration
	for range 5 {
		waits := replyTimes(t, p)
		if waits[0] < delay {
			t.Fatalf("a reply came after %v, the delay is %v", waits[0], delay)
		}
		if median = waits[len(waits)/2]; median < delay*3/2 {
			p.SetDelay(-1) // no delay
			return
		}
	}
	t.Errorf("half of the replies took more than %v, the delay is %v", median, delay)
}

// replyTimes sends 50 commands a millisecond apart on one connection and
// returns how long each reply took, in ascending order.
func replyTimes(t *testing.T, p *Proxy) []time.Duration {
	t.Helper()
	conn, err := net.Dial("tcp4", p.Addr())
	must(t, err)
	defer conn.Close()
	var sent, got [50]time.Time
	go func() {
		for i := range sent {
			sent[i] = time.Now()
			_, _ = conn.Write([]byte("PING\r\n")) // a failure shows below
			time.Sleep(time.Millisecond)          // so that each reply is a chunk of its own
		}
	}()
	reply := make([]byte, len("+PONG\r\n"))
	must(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
	for i := range got {
		if _, err := io.ReadFull(conn, reply); err != nil {
			t.Fatal(err)
		}
		got[i] = time.Now()
	}
	waits := make([]time.Duration, 0, len(got))
	for i := range got {
		waits = append(waits, got[i].Sub(sent[i]))
	}
	slices.Sort(waits)
	return waits
}

func TestProxyCutsTheReplyAfterTheExecution(t *testing.T) {
	s, p, conn := proxied(t)
	p.CutReplies(true)
	err := conn.Incr(deadline(t), "n").Err()
	if err == nil {
		t.Fatal("the reply got through")
	}
	if got := counter(t, s); got != 1 {
		t.Errorf("executed %d times, want once", got)
	}
	if got := p.Cuts(); got != 1 {
		t.Errorf("%d cuts, want 1", got)
	}
	p.CutReplies(false)
	must(t, connect(t, p).Incr(deadline(t), "n").Err())
}

func TestProxyFindsTheDoubleChargeOfARetryingClient(t *testing.T) {
	s := Start(t, Options{})
	p := startProxy(t, s.Addr())
	client := redis.NewClient(&redis.Options{Addr: p.Addr(), MaxRetries: 20, PoolSize: 1})
	defer client.Close()
	must(t, client.Ping(deadline(t)).Err())
	p.CutReplies(true)
	// Heal after the first cut, so that a retry can succeed. Until then a retry
	// does not get past its handshake, so it cannot charge.
	go func() {
		for p.Cuts() == 0 {
			time.Sleep(100 * time.Microsecond)
		}
		p.CutReplies(false)
	}()
	must(t, client.Incr(deadline(t), "n").Err())
	if got := counter(t, s); got != 2 {
		t.Errorf("one call was executed %d times, want 2: once cut, once retried", got)
	}
}

func TestBlackholeHoldsEverythingBackUntilItHeals(t *testing.T) {
	s, p, conn := proxied(t)
	p.Blackhole(true)
	p.Blackhole(true)
	done := make(chan error, 1)
	go func() { done <- conn.Incr(deadline(t), "n").Err() }()
	late, err := net.Dial("tcp4", p.Addr()) // new connections are accepted too
	must(t, err)
	defer late.Close()
	_, err = late.Write([]byte("PING\r\n"))
	must(t, err)
	wantSilence(t, late)
	select {
	case err := <-done:
		t.Fatalf("answered from the black hole: %v", err)
	default:
	}
	if got := counter(t, s); got != 0 {
		t.Errorf("executed %d times in the black hole", got)
	}

	p.Blackhole(false)
	must(t, <-done)
	must(t, late.SetReadDeadline(time.Now().Add(10*time.Second)))
	if _, err := io.ReadFull(late, make([]byte, len("+PONG\r\n"))); err != nil {
		t.Error(err)
	}
}

func TestHealedBlackholeExecutesForAClientThatGaveUp(t *testing.T) {
	s := Start(t, Options{})
	p := startProxy(t, s.Addr())
	conn, err := net.Dial("tcp4", p.Addr())
	must(t, err)
	p.Blackhole(true)
	sendAndGiveUp(t, conn, "INCR n")
	p.Blackhole(false)
	eventually(t, "the phantom is executed", func() bool { return counter(t, s) == 1 })
}

func TestDeadTargetLooksLikeAnEndOfFile(t *testing.T) {
	s, p, conn := proxied(t)
	s.Kill()
	if err := conn.Ping(deadline(t)).Err(); err == nil {
		t.Error("a killed server answered")
	}
	fresh, err := net.Dial("tcp4", p.Addr())
	must(t, err)
	defer fresh.Close()
	must(t, fresh.SetReadDeadline(time.Now().Add(10*time.Second)))
	if _, err := fresh.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("read: %v, want the connection closed", err)
	}
	must(t, s.Restart(deadline(t)))
	must(t, connect(t, p).Ping(deadline(t)).Err())
}

func TestClosedProxyLeavesNoGoroutine(t *testing.T) {
	s := Start(t, Options{})
	before := goleak.IgnoreCurrent()
	for _, state := range []string{"idle", "black hole", "delay", "paused server"} {
		p, err := NewProxy(s.Addr())
		must(t, err)
		var conns []net.Conn
		for range 5 {
			conn, err := net.Dial("tcp4", p.Addr())
			must(t, err)
			conns = append(conns, conn)
			_, err = conn.Write([]byte("PING\r\n"))
			must(t, err)
		}
		switch state {
		case "black hole":
			p.Blackhole(true)
		case "delay":
			p.SetDelay(time.Hour)
		case "paused server":
			s.Pause()
		}
		for _, conn := range conns {
			_, err := conn.Write([]byte("PING\r\n"))
			must(t, err)
		}
		p.Close()
		p.Close()
		goleak.VerifyNone(t, before)
		s.Resume()
		for _, conn := range conns {
			_ = conn.Close()
		}
		if _, err := net.Dial("tcp4", p.Addr()); err == nil {
			t.Errorf("%s: a closed proxy accepts", state)
		}
	}
}

func TestProxySettingsMayChangeUnderTraffic(t *testing.T) {
	s := Start(t, Options{})
	p := startProxy(t, s.Addr())
	client := redis.NewClient(&redis.Options{
		Addr: p.Addr(), MaxRetries: -1, DialerRetries: 1, PoolSize: 1 << 12,
		ReadTimeout: 50 * time.Millisecond, DialTimeout: 50 * time.Millisecond,
	})
	defer client.Close()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = client.Set(context.Background(), fmt.Sprint(i), "v", 0).Err()
				}
			}
		})
	}
	for i := range 60 {
		p.Blackhole(i%3 == 0)
		p.CutReplies(i%5 == 0)
		p.SetDelay(time.Duration(i%4) * time.Millisecond)
		time.Sleep(time.Millisecond)
	}
	close(stop)
	wg.Wait()
	p.Blackhole(false)
	p.CutReplies(false)
	must(t, connect(t, p).Ping(deadline(t)).Err())
}

func TestProxyTargetMustBeAnAddress(t *testing.T) {
	_, err := NewProxy("redis://127.0.0.1")
	wantError(t, err, "no host:port")
}

// sendAndGiveUp sends a command, gets no answer and hangs up. It uses a bare
// socket: a client library with a short deadline may, on a busy machine, give up
// before it has sent anything.
func sendAndGiveUp(t *testing.T, conn net.Conn, command string) {
	t.Helper()
	_, err := conn.Write([]byte(command + "\r\n"))
	must(t, err)
	wantSilence(t, conn)
	must(t, conn.Close())
}

func wantSilence(t *testing.T, conn net.Conn) {
	t.Helper()
	must(t, conn.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
	if n, err := conn.Read(make([]byte, 1)); n != 0 || !isTimeout(err) {
		t.Errorf("read %d bytes, %v; want a time-out", n, err)
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}
