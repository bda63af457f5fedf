package redistest

import (
	"context"
	"fmt"
	"os"
)

// Kill ends the process with SIGKILL and waits until it is gone: connections
// are reset, new ones refused, the data is lost. A killed server can be
// restarted.
func (s *Server) Kill() {
	s.life.Lock()
	defer s.life.Unlock()
	if p := s.process(); p != nil {
		p.kill()
	}
}

// Pause stops the process with SIGSTOP: connections stay open, the kernel still
// accepts new ones, nothing is answered. On Linux it returns once the kernel
// has stopped the process, so no later command is answered before Resume.
func (s *Server) Pause() {
	s.life.Lock()
	defer s.life.Unlock()
	if p := s.process(); p != nil && p.alive() {
		p.signal(stopSignal)
		p.awaitStopped()
	}
}

// Resume lets a paused server run on. What clients sent meanwhile is executed,
// even if they have given up.
func (s *Server) Resume() {
	if p := s.process(); p != nil {
		p.signal(continueSignal)
	}
}

// Restart starts the server again on its port with the options of its start,
// killing it first if it runs. Its data is empty, the script cache too. It
// comes back in the role that Options gave it, as a real server does whose
// configuration file was not rewritten: a promoted replica is a replica again.
// The clock keeps the setting it had.
func (s *Server) Restart(ctx context.Context) error {
	s.life.Lock()
	defer s.life.Unlock()
	if s.isStopped() {
		return fmt.Errorf("redistest: cannot restart redis-server at %s: it was stopped for good; use Kill for a crash that ends", s.Addr())
	}
	if p := s.process(); p != nil {
		p.kill()
	}
	return s.boot(ctx)
}

// Stop ends the server for good, paused or not, and removes what it left. Only
// the process that we started is ended. Calling it again does nothing.
func (s *Server) Stop() {
	s.life.Lock()
	defer s.life.Unlock()

	s.mu.Lock()
	again := s.stopped
	s.stopped = true
	p, client := s.proc, s.client
	s.mu.Unlock()
	if again {
		return
	}
	if client != nil {
		_ = client.Close()
	}
	if p != nil {
		if !p.alive() && !p.killed.Load() && s.logf != nil {
			s.logf("redistest: redis-server at %s ended by itself; its log:\n%s", s.Addr(), s.logFrom(0))
		}
		p.kill()
	}
	if s.reservation != nil {
		s.reservation.release()
	}
	if s.bus != nil {
		s.bus.release()
	}
	if s.clock != nil {
		s.clock.close()
	}
	if s.dir != "" {
		_ = os.RemoveAll(s.dir)
	}
}
