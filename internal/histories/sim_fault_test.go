package histories

import "time"

// step steps a server's clock, by up to two windows.
func (s *simulation) step(shard string, server *simServer, draw draws) {
	by := draw.between(0, 10*time.Second)
	if draw.IntN(2) == 0 {
		by = -by
	}
	s.recorder.Stepped(shard, by, func() {
		server.mu.Lock()
		defer server.mu.Unlock()
		server.ahead += by
	})
}

// failOver kills a primary and promotes its replica, if it has one. The old primary is to
// come back as a replica of that.
func (s *simulation) failOver(id string, server *simServer, draw draws, wait func()) {
	shard := s.shards[id[0]-'a']
	shard.mu.Lock()
	here := shard.replica != nil && shard.primary == server
	shard.mu.Unlock()
	if !here {
		return
	}
	s.recorder.Lagged(id, func() {
		server.kill()
		time.Sleep(draw.between(10*time.Millisecond, time.Second))
		shard.mu.Lock()
		defer shard.mu.Unlock()
		shard.primary, shard.replica = shard.replica, shard.primary
		next := shard.primary
		server.mu.Lock()
		old := server.replID
		server.master, server.replID, server.replID2 = false, old+"'", ""
		server.mu.Unlock()
		next.mu.Lock()
		next.master, next.replID, next.replID2 = true, old+"'", old
		next.mu.Unlock()
	})
	wait()
}
