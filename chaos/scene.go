package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// scene is what a fault is played on: servers, and how to break and mend them.
type scene struct {
	lone  *place // of the policies: a shard without a replica, or a whole set or cluster
	pair  *place // of the share: a shard with one
	hold  time.Duration
	cells []*cell

	inject func(ctx context.Context) error
	heal   func(ctx context.Context) error

	// down is told, in flapping, when the shard goes and comes.
	down func(bool)

	mu    sync.Mutex // guards stops
	stops []func()
}

// place is where the keys of some cells are.
type place struct {
	// faulty is how processes under test reach it, direct how one does that looks on.
	faulty, direct func() ringfence.ShardConfig
	dialed         string            // the address at which connections are counted; "": they are not
	fits           func(string) bool // whether a key lies where the fault is; nil: all do
	replicas       bool
	loses          loss
	sync           func(ctx context.Context) error // waits for the replicas
	// tookOver is how to reach the primary that has taken over, nil until one has; it is set
	// where servers mend the fault themselves. marked: only a mark on it shows that a process
	// has followed, because the old primary still answers.
	tookOver func(ctx context.Context) *ringfence.ShardConfig
	marked   bool
}

func (s *scene) later(stop func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stops = append(s.stops, stop)
}

// stop ends all servers, those started last first.
func (s *scene) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range slices.Backward(s.stops) {
		f()
	}
	s.stops = nil
}

func (s *scene) server(ctx context.Context, o redistest.Options) (*redistest.Server, error) {
	server, err := redistest.Launch(ctx, o)
	if err == nil {
		s.later(server.Stop)
	}
	return server, err
}

func (s *scene) proxy(to *redistest.Server) (*redistest.Proxy, error) {
	p, err := redistest.NewProxy(to.Addr())
	if err == nil {
		s.later(p.Close)
	}
	return p, err
}

// trio are the servers of a fault of single servers: a shard without a replica, and one with.
type trio struct{ lone, primary, replica *redistest.Server }

// servers starts them. in is for those that are to break.
func (s *scene) servers(ctx context.Context, in redistest.Options) (t trio, err error) {
	in.Args = append([]string{"repl-diskless-sync no"}, in.Args...)
	out := redistest.Options{Args: []string{"repl-diskless-sync no"}, Clock: in.Clock}
	if t.lone, err = s.server(ctx, in); err != nil {
		return t, err
	}
	if t.primary, err = s.server(ctx, in); err != nil {
		return t, err
	}
	out.ReplicaOf = t.primary
	if t.replica, err = s.server(ctx, out); err != nil {
		return t, err
	}
	s.lone, s.pair = placeOf(t.lone.Addr(), t.lone, nil), placeOf(t.primary.Addr(), t.primary, t.replica)
	return t, s.pair.sync(ctx)
}

// placeOf is a shard whose primary processes reach at an address.
func placeOf(addr string, primary, replica *redistest.Server) *place {
	shard := func(primary string) func() ringfence.ShardConfig {
		return func() ringfence.ShardConfig {
			c := ringfence.ShardConfig{ID: "a", Primary: primary}
			if replica != nil {
				c.Replicas = []string{replica.URL()}
			}
			return c
		}
	}
	p := &place{faulty: shard("redis://" + addr), direct: shard(primary.URL()), dialed: addr, replicas: replica != nil}
	p.sync = func(ctx context.Context) error {
		if replica == nil {
			return nil
		}
		return replica.WaitInSync(ctx)
	}
	return p
}

// both does the same to both primaries.
func (t trio) both(f func(*redistest.Server) error) error {
	return errors.Join(f(t.lone), f(t.primary))
}

// silently is both for what reports nothing.
func (t trio) silently(f func(*redistest.Server)) func(context.Context) error {
	return func(context.Context) error {
		f(t.lone)
		f(t.primary)
		return nil
	}
}
