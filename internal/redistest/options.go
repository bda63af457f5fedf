package redistest

import (
	"fmt"
	"strings"

	"github.com/redis/go-redis/v9"
)

// Options say how a server is started. The zero value is a lone primary on a
// free port with the real clock.
type Options struct {
	// Args are extra lines of redis.conf, each "key value", for example
	// "maxmemory 1mb". They come last and so override the defaults.
	//
	// For TLS set Port to p and add "port 0", "tls-port p" and the
	// certificates; for credentials add "requirepass" or "user" lines. Both
	// need a Configure that tells the admin client.
	Args []string

	// ReplicaOf is the server to replicate from, nil for a primary. Launch
	// does not wait for the first synchronisation: see [Server.WaitInSync].
	ReplicaOf *Server

	// Clock loads the clock shim, without which [Server.Step], [Server.Freeze]
	// and the other clock methods return [ErrNoClock]. It needs 64-bit Linux
	// and a C compiler.
	Clock bool

	// Netns puts the server into a network namespace, where packets can be
	// lost; nil leaves it on 127.0.0.1.
	Netns *Netns

	// Port is the TCP port; 0 picks a free one.
	Port int

	// Configure, if not nil, changes the options of [Server.Client], for
	// example to add credentials or a TLS configuration.
	Configure func(*redis.Options)
}

func (o Options) validate() error {
	if o.Port < 0 || o.Port > 65535 {
		return fmt.Errorf("redistest: port %d is outside 0..65535; use 0 for a free port", o.Port)
	}
	for _, line := range o.Args {
		if strings.ContainsAny(line, "\r\n") {
			return fmt.Errorf("redistest: configuration line %q contains a line break; give one line per entry of Args", line)
		}
	}
	if o.ReplicaOf != nil {
		return o.Netns.reaches(o.ReplicaOf)
	}
	return nil
}

// config renders redis.conf. The redis-server of the caller's machine never
// sees any other configuration file.
func (s *Server) config() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }

	line("bind %s", s.host())
	line("port %d", s.port)
	line("dir %q", s.dir)
	line("unixsocket %q", s.socketPath()) // see probe.go for why
	line("daemonize no")
	if s.opts.Netns != nil {
		line("protected-mode no") // it would refuse clients that do not come from loopback
	}
	if s.kind == sentinelServer {
		return s.withArgs(&b)
	}
	line(`save ""`)
	line("appendonly no")

	// Redis waits 5 s for more replicas before a diskless transfer, and pings
	// replicas every 10 s. A test has no other replica to wait for.
	line("repl-diskless-sync yes")
	line("repl-diskless-sync-delay 0")
	line("repl-ping-replica-period 1")

	if s.opts.Clock {
		// jemalloc's background thread sleeps until a wall-clock instant that
		// it computes from the shimmed clock: it would spin or oversleep.
		line("jemalloc-bg-thread no")
	}
	if m := s.opts.ReplicaOf; m != nil {
		line("replicaof %s %d", m.host(), m.port)
	}
	if s.kind == clusterNode {
		line("cluster-enabled yes")
		line("cluster-config-file nodes.conf")
		line("cluster-port %d", s.bus.port)
	}
	return s.withArgs(&b)
}

func (s *Server) withArgs(b *strings.Builder) string {
	for _, arg := range s.opts.Args {
		fmt.Fprintln(b, arg)
	}
	return b.String()
}
