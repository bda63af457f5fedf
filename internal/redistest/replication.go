package redistest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// ReplicaOf makes the server a replica of master. It returns when the server
// has accepted the order, not when it holds the data: see WaitInSync.
func (s *Server) ReplicaOf(ctx context.Context, master *Server) error {
	if err := s.opts.Netns.reaches(master); err != nil {
		return err
	}
	if err := s.Client().Do(ctx, "REPLICAOF", master.host().String(), master.port).Err(); err != nil {
		return fmt.Errorf("redistest: making %s a replica of %s: %w", s.Addr(), master.Addr(), err)
	}
	s.setMaster(master)
	return nil
}

// Promote makes a replica a primary (REPLICAOF NO ONE). It touches nobody else:
// the former primary, if it runs, goes on as one.
func (s *Server) Promote(ctx context.Context) error {
	if err := s.Client().Do(ctx, "REPLICAOF", "NO", "ONE").Err(); err != nil {
		return fmt.Errorf("redistest: promoting %s: %w", s.Addr(), err)
	}
	s.setMaster(nil)
	return nil
}

func (s *Server) setMaster(m *Server) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.master = m
}

// WaitInSync waits until the replica holds everything its primary had when
// WaitInSync was called, and the primary streams to it: every later write will
// reach it too. It waits 10 s if ctx has no deadline. It writes no keys.
//
// "Link up" would not be enough. After a diskless transfer the replica says
// "up" and the primary says "online", yet the primary sends nothing until the
// replica's first REPLCONF ACK, up to a second later: a primary killed in
// between loses everything written after the transfer. Only an acknowledged
// offset above zero proves the stream. So a first synchronisation takes up to a
// second; "repl-diskless-sync no" in the primary's Args brings that to a third.
func (s *Server) WaitInSync(ctx context.Context) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
	}
	s.mu.Lock()
	master := s.master
	s.mu.Unlock()
	if master == nil {
		return fmt.Errorf("redistest: %s is no replica, so it cannot come in sync; set Options.ReplicaOf or call ReplicaOf", s.Addr())
	}

	var target int64 // the offset to reach; fixed once, or a busy primary would run away
	last := errors.New("not looked at yet")
	err := poll(ctx, func() (bool, error) {
		var done bool
		done, last = s.inSync(ctx, master, &target)
		return done, nil
	})
	if err != nil {
		return fmt.Errorf("redistest: %s is not in sync with %s: %w (last: %w)", s.Addr(), master.Addr(), err, last)
	}
	return nil
}

// inSync looks once. The error says what is missing.
func (s *Server) inSync(ctx context.Context, master *Server, target *int64) (bool, error) {
	m, err := master.replicationInfo(ctx)
	if err != nil {
		return false, err
	}
	r, err := s.replicationInfo(ctx)
	if err != nil {
		return false, err
	}
	switch {
	case r["role"] != "slave":
		return false, fmt.Errorf("replica has role %q", r["role"])
	case r["master_port"] != strconv.Itoa(master.port):
		return false, fmt.Errorf("replica follows port %s", r["master_port"])
	case r["master_link_status"] != "up":
		return false, fmt.Errorf("replica's link is %q", r["master_link_status"])
	case r["master_replid"] != m["master_replid"]:
		return false, errors.New("replica follows another history of the primary")
	}
	acked, online := ackedOffset(m, s.port)
	if !online {
		return false, errors.New("primary does not list the replica as online")
	}
	if *target == 0 {
		*target = number(m["master_repl_offset"])
	}
	applied := number(r["slave_repl_offset"])
	if *target > 0 && acked >= *target && applied >= *target {
		return true, nil
	}
	master.askForAcks(ctx)
	return false, fmt.Errorf("primary at offset %d when asked, replica applied %d and acknowledged %d", *target, applied, acked)
}

// askForAcks makes the primary ask its replicas for their offset, which they
// otherwise report once a second. WAIT asks only if it has to block, hence more
// replicas than there are. Its time-out runs on the server's wall clock, so on
// a frozen one it would never return: there we wait the second.
func (s *Server) askForAcks(ctx context.Context) {
	if s.clock != nil && s.clock.frozen() {
		return
	}
	_ = s.Client().Do(ctx, "WAIT", 1000, 1).Err() // best effort: the next look tells
}

func (s *Server) replicationInfo(ctx context.Context) (map[string]string, error) {
	raw, err := s.Client().Info(ctx, "replication").Result()
	if err != nil {
		return nil, fmt.Errorf("asking %s for INFO replication: %w", s.Addr(), err)
	}
	info := make(map[string]string)
	for line := range strings.Lines(raw) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			info[name] = value
		}
	}
	return info, nil
}

// ackedOffset finds the replica on the given port in the primary's INFO, for
// example "slave0:ip=127.0.0.1,port=7001,state=online,offset=42,lag=0".
func ackedOffset(info map[string]string, port int) (offset int64, online bool) {
	for name, value := range info {
		if !strings.HasPrefix(name, "slave") || !strings.Contains(value, fmt.Sprintf(",port=%d,state=online,", port)) {
			continue
		}
		_, rest, _ := strings.Cut(value, "offset=")
		digits, _, _ := strings.Cut(rest, ",")
		return number(digits), true
	}
	return 0, false
}

// number reads a decimal of INFO; anything else is 0, which never counts as
// caught up.
func number(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0
	}
	return n
}
