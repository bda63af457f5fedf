package redistest

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// kind is what a process is for.
type kind int

const (
	dataServer kind = iota
	clusterNode
	sentinelServer
)

// Server is one redis-server process, or the place of one that was killed. All
// methods may be called from any goroutine.
//
// Kill, Pause, Resume and Stop report nothing: each either reaches the state
// it promises or that state holds already (a killed server cannot be paused,
// but it answers nothing either).
type Server struct {
	opts        Options
	binary      string
	dir         string
	port        int
	reservation *reservation
	bus         *reservation // the cluster bus; nil outside a cluster
	kind        kind
	clock       *clock // nil without Options.Clock

	// fatalf fails the test of a server made by Start; nil under Launch.
	fatalf func(format string, args ...any)
	logf   func(format string, args ...any)

	// life is held while the process is being started or ended, so that
	// Restart and Stop never overlap. Lock order: life, then mu.
	life sync.Mutex

	mu      sync.Mutex
	proc    *process      // guarded by mu
	master  *Server       // guarded by mu; nil for a primary
	client  *redis.Client // guarded by mu; nil until first asked for
	stopped bool          // guarded by mu
}

// Addr returns "127.0.0.1:port", in a namespace the server's address there. It
// stays the same over Kill and Restart.
func (s *Server) Addr() string { return net.JoinHostPort(s.host().String(), strconv.Itoa(s.port)) }

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// host is the only address the server listens on.
func (s *Server) host() netip.Addr {
	if s.opts.Netns != nil {
		return s.opts.Netns.server
	}
	return loopback
}

// spawner is what forks the process: a thread inside the server's namespace.
func (s *Server) spawner() spawner {
	if s.opts.Netns != nil {
		return s.opts.Netns.spawner()
	}
	return &forkThread
}

// reserve reserves a port where the server will listen.
func (s *Server) reserve(port int) (r *reservation, err error) {
	if s.opts.Netns == nil {
		return reservePort(s.host(), port)
	}
	err = s.opts.Netns.inside(func() (err error) {
		r, err = reservePort(s.host(), port)
		return err
	})
	return r, err
}

// URL returns "redis://" and the address.
func (s *Server) URL() string { return "redis://" + s.Addr() }

// Running reports whether the process exists. A paused server is running.
func (s *Server) Running() bool {
	p := s.process()
	return p != nil && p.alive()
}

// Client returns the server's admin client: one per server, made on first use,
// closed by Stop. It never retries, so that a test sees each error once, and it
// survives Kill and Restart. It is for arranging and inspecting, not the client
// under test.
func (s *Server) Client() *redis.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.client == nil {
		s.client = redis.NewClient(s.clientOptions())
		if s.stopped {
			_ = s.client.Close() // every call then says "redis: client is closed"
		}
	}
	return s.client
}

func (s *Server) clientOptions() *redis.Options {
	o := &redis.Options{
		Addr:                  s.Addr(),
		MaxRetries:            -1,
		DialerRetries:         1,
		DialTimeout:           2 * time.Second,
		ReadTimeout:           5 * time.Second,
		WriteTimeout:          5 * time.Second,
		ContextTimeoutEnabled: true,
		DisableIdentity:       true,
		// The server is no managed service that announces maintenance.
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
		// After PoolSize failed dials go-redis starts a goroutine that probes
		// for a second even after Close: a leak to every test that asks a dead
		// server. Connections are made on demand, so a large pool costs nothing.
		PoolSize: 1 << 12,
	}
	if s.opts.Configure != nil {
		s.opts.Configure(o)
	}
	return o
}

// process returns the current process, nil before the first start.
func (s *Server) process() *process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.proc
}

func (s *Server) isStopped() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopped
}

func (s *Server) socketPath() string { return filepath.Join(s.dir, "redis.sock") }
func (s *Server) configPath() string { return filepath.Join(s.dir, "redis.conf") }
func (s *Server) logPath() string    { return filepath.Join(s.dir, "redis.log") }

// logFrom returns the server's log after the first skip bytes, at most the last
// 2,000 bytes of it.
func (s *Server) logFrom(skip int64) string {
	raw, err := os.ReadFile(s.logPath())
	if err != nil {
		return "(no log: " + err.Error() + ")"
	}
	raw = raw[min(int(skip), len(raw)):]
	return string(raw[max(0, len(raw)-2000):])
}
