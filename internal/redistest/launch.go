package redistest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"
)

// ErrNoRedis says that there is no redis-server to start.
var ErrNoRedis = errors.New("redistest: redis-server not found; install Redis 7.0 or later (Debian: apt-get install redis-server) or point " + BinaryEnv + " at the binary")

// BinaryEnv names the environment variable that holds the path of another
// redis-server (or valkey-server) than the first in PATH.
const BinaryEnv = "RINGFENCE_REDIS_SERVER"

// startBound is the longest a server may take until it answers.
const startBound = 10 * time.Second

// errPortTaken: another program listens on the port we chose.
var errPortTaken = errors.New("the port is taken")

var started atomic.Int64

// Count returns how many servers this process has started with success. A
// suite checks it to prove that it used real servers. Restarts do not count.
func Count() int { return int(started.Load()) }

// Launch starts redis-server and returns once it answers, at the latest after
// 10 s. ctx bounds the start only: the server runs until Stop, or until this
// process ends.
//
// The error is [ErrNoRedis] when the binary is absent, and otherwise ends with
// the server's own log.
func Launch(ctx context.Context, o Options) (*Server, error) {
	return launch(ctx, o, dataServer, nil)
}

func launch(ctx context.Context, o Options, k kind, tb TB) (*Server, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if !canSignal {
		return nil, errors.New("redistest: servers can be paused and killed on Unix only; run this on Linux or macOS")
	}
	binary, err := findBinary()
	if err != nil {
		return nil, err
	}
	const attempts = 5
	for try := 1; ; try++ {
		s, err := launchOnce(ctx, o, k, binary, tb)
		if err == nil {
			started.Add(1)
			return s, nil
		}
		if !errors.Is(err, errPortTaken) || o.Port != 0 || try == attempts {
			return nil, err
		}
	}
}

func findBinary() (string, error) {
	name := os.Getenv(BinaryEnv)
	if name == "" {
		name = "redis-server"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%w (%w)", ErrNoRedis, err)
	}
	// The server starts in a directory of its own.
	return filepath.Abs(path)
}

func launchOnce(ctx context.Context, o Options, k kind, binary string, tb TB) (_ *Server, err error) {
	s := &Server{opts: o, kind: k, binary: binary, port: o.Port}
	if tb != nil {
		s.fatalf, s.logf = tb.Fatalf, tb.Logf
	}
	defer func() {
		if err != nil {
			s.Stop()
		}
	}()
	if s.dir, err = os.MkdirTemp("", "ringfence-redis-"); err != nil {
		return nil, fmt.Errorf("redistest: making the server's directory: %w", err)
	}
	if s.reservation, err = s.reserve(o.Port); err != nil {
		return nil, err
	}
	s.port = s.reservation.port
	if k == clusterNode {
		// Redis would take the port 10,000 above the server's, which somebody
		// else may have, or which is above 65535.
		if s.bus, err = s.reserve(0); err != nil {
			return nil, err
		}
	}
	if o.Clock {
		if s.clock, err = newClock(ctx, s.dir); err != nil {
			return nil, err
		}
	}
	if err = os.WriteFile(s.configPath(), []byte(s.config()), 0o600); err != nil {
		return nil, fmt.Errorf("redistest: writing the server's configuration: %w", err)
	}
	if err = s.boot(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// boot starts the process and waits until it answers. The caller holds life, or
// is the only one who knows the server.
func (s *Server) boot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startBound)
	defer cancel()

	log, err := os.OpenFile(s.logPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("redistest: opening the log of redis-server at %s: %w", s.Addr(), err)
	}
	defer log.Close() // the child has its own descriptor
	logStart, err := log.Seek(0, 2)
	if err != nil {
		return fmt.Errorf("redistest: opening the log of redis-server at %s: %w", s.Addr(), err)
	}

	cmd := exec.Command(s.binary, s.configPath())
	if s.kind == sentinelServer {
		cmd.Args = append(cmd.Args, "--sentinel")
	}
	cmd.Dir = s.dir
	cmd.Stdout, cmd.Stderr = log, log
	if s.clock != nil {
		cmd.Env = s.clock.environ()
	}
	p, err := startProcess(cmd, s.spawner())
	if err != nil {
		return fmt.Errorf("redistest: starting %s: %w", s.binary, err)
	}
	s.mu.Lock()
	s.proc, s.master = p, s.opts.ReplicaOf
	s.mu.Unlock()

	if err := s.awaitReady(ctx, p); err != nil {
		p.kill()
		log := s.logFrom(logStart)
		if strings.Contains(log, "Address already in use") {
			err = errPortTaken
		}
		return fmt.Errorf("redistest: redis-server at %s: %w; its log:\n%s", s.Addr(), err, log)
	}
	if s.clock != nil && !s.clock.attached() {
		p.kill()
		return fmt.Errorf("redistest: redis-server at %s runs without the clock shim: the loader refused it; is %s statically linked or set-user-id, or does %s contain a space or colon?", s.Addr(), s.binary, s.dir)
	}
	return nil
}
