// Package embedded runs shards inside the process, for demonstrations and fast tests
// without a Redis server. The servers are miniredis: they run the same scripts, in Go.
//
// They are not Redis. They have no replicas, no persistence and no eviction, format
// numbers differently inside scripts, and make a few thousand decisions a second. What
// ringfence promises is tested on real servers; these are for looking at it.
package embedded

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/alicebob/miniredis/v2"

	"github.com/ringfence/ringfence"
)

// Shards are embedded shards on loopback ports of their own. All methods may be called
// from many goroutines.
type Shards struct {
	mu      sync.Mutex // guards the following
	servers []*miniredis.Miniredis
	addrs   []string // miniredis forgets its own when it is closed
	running []bool
}

// Start starts n shards, 1 to 64, with the ids "embedded-0", "embedded-1" and so on. Close
// ends them.
func Start(n int) (*Shards, error) {
	if n < 1 || n > 64 {
		return nil, fmt.Errorf("embedded: n = %d: must be 1 to 64 shards", n)
	}
	s := &Shards{}
	for range n {
		m := miniredis.NewMiniRedis()
		m.ClockTTL(true)
		if err := m.StartAddr("127.0.0.1:0"); err != nil {
			return nil, errors.Join(fmt.Errorf("embedded: cannot listen on loopback: %w", err), s.Close())
		}
		s.servers = append(s.servers, m)
		s.addrs = append(s.addrs, m.Addr())
		s.running = append(s.running, true)
	}
	return s, nil
}

// Config returns what ringfence.Config.Shards needs.
func (s *Shards) Config() []ringfence.ShardConfig {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]ringfence.ShardConfig, len(s.servers))
	for i := range s.servers {
		out[i] = ringfence.ShardConfig{
			ID:           fmt.Sprintf("embedded-%d", i),
			Primary:      "redis://" + s.addrs[i],
			PlainScripts: true,
		}
	}
	return out
}

// Len returns the number of shards.
func (s *Shards) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.servers)
}

// Kill ends shard i as a crash would: connections break, and its data is gone.
func (s *Shards) Kill(i int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(i); err != nil {
		return err
	}
	if s.running[i] {
		s.servers[i].Close()
		s.running[i] = false
	}
	return nil
}

// Revive starts shard i again, empty, on the port it had.
func (s *Shards) Revive(i int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(i); err != nil {
		return err
	}
	if s.running[i] {
		return nil
	}
	m := miniredis.NewMiniRedis()
	m.ClockTTL(true)
	addr := s.addrs[i]
	if err := m.StartAddr(addr); err != nil {
		return fmt.Errorf("embedded: cannot listen on %s again: %w", addr, err)
	}
	s.servers[i], s.running[i] = m, true
	return nil
}

// SetTime stops the clock of shard i at this instant; the zero time lets it run again.
func (s *Shards) SetTime(i int, at time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(i); err != nil {
		return err
	}
	s.servers[i].SetTime(at)
	return nil
}

// Addr returns the address of shard i, also while it is dead.
func (s *Shards) Addr(i int) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(i); err != nil {
		return "", err
	}
	return s.addrs[i], nil
}

// check refuses an index that is none. Requires s.mu.
func (s *Shards) check(i int) error {
	if i < 0 || i >= len(s.servers) {
		return fmt.Errorf("embedded: shard %d: must be 0 to %d", i, len(s.servers)-1)
	}
	return nil
}

// Close ends all shards. Calling it again does nothing.
func (s *Shards) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, m := range s.servers {
		if s.running[i] {
			m.Close()
			s.running[i] = false
		}
	}
	return nil
}
