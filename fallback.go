package ringfence

import (
	"context"
	"encoding/binary"
	"time"

	"github.com/dchest/siphash"
)

// fallBack is the ladder below the primary, for one entry of a call: the share of what a
// replica said was left, then the failure policy. It always answers, and does not wait
// beyond the deadline.
//
// A key's owner never changes here. Asking the neighbour instead, as a consistent-hash
// cache would, starts every limit anew when a shard goes and again when it returns.
func (s *shard) fallBack(ctx context.Context, l *Limiter, h keyHash, cost, deadline int64, cause Cause, charge bool) Decision {
	var d Decision
	mode, ok, ask := fallbackMode(0), false, s.looks != nil
	switch cause {
	case CauseCorrupt: // the primary is well; this key is not, on the replica either
		ask = false
	case causeRefused:
		ask, cause = false, CauseError
		fallthrough
	default:
		s.degraded.Store(true)
	}
	if ask {
		d, mode, ok = s.fromShare(ctx, l, h, cost, deadline, charge)
	}
	if !ok {
		d, mode = s.byPolicy(l, h, cost, charge)
	}
	d.Shard, d.Cause = s.id, cause
	if charge {
		s.metrics.fellBack(mode, cause)
		s.ring.log.warn(s.id, "fallback", "decisions are not exact: the primary is not answering",
			"shard", s.id, "limiter", l.name, "mode", fallbackModeNames[mode], "reason", cause.String())
	}
	return d
}

// fromShare decides out of this process's share of the key, asking a replica what is
// left if it has not been asked since the primary last answered. Looking alone would
// admit without bound, since a replica learns nothing of what we admit.
func (s *shard) fromShare(ctx context.Context, l *Limiter, h keyHash, cost, deadline int64, charge bool) (d Decision, mode fallbackMode, ok bool) {
	epoch := s.epoch.Load()
	if d, ok = s.decideShare(l, h, cost, charge, nil, epoch); ok {
		return d, modeShare, true
	}
	if !s.replicas.closed.Load() || s.ring.clock() >= deadline {
		return d, 0, false
	}
	r := newRequest(opLook, l.rule, h, s.ring.space, cost)
	if err := s.looks.send(r, deadline); err != nil {
		r.release()
		r.release()
		return d, 0, false
	}
	defer r.release()
	if _, err := s.looks.wait(ctx, r, deadline); err != nil || r.status != statusDecided {
		return d, 0, false
	}
	d, ok = s.decideShare(l, h, cost, charge, &r.state, epoch)
	return d, modeReplica, ok
}

// decideShare decides out of the share if there is one of this epoch, or makes it from
// what a replica said.
func (s *shard) decideShare(l *Limiter, h keyHash, cost int64, charge bool, said *state, epoch uint64) (d Decision, ok bool) {
	now := s.ring.clock()
	s.ring.local.with(h, l.rule, l.keys.k0, now, func(e *localEntry) {
		// What was said of one of the keys that share an entry does not hold for the next.
		stale := !e.seeded || e.epoch != epoch || e.shared
		if said == nil && stale {
			return
		}
		draw := s.ring.draw(h)
		if said != nil && stale {
			e.reseed(l.rule, now, s.ring.config.Instances, draw, *said)
			e.epoch = epoch
		}
		d, ok = s.take(l, e, now, cost, draw, charge), true
		d.Source = SourceReplica
	})
	return d, ok
}

// take turns an answer of the local count into a Decision.
func (s *shard) take(l *Limiter, e *localEntry, now, cost int64, draw uint64, charge bool) Decision {
	allowed, left, retry, reset := e.take(l.rule, now, cost, s.ring.config.Instances, draw, charge)
	d := Decision{Allowed: allowed, Limit: l.rule.capacity, Remaining: left, ResetAfter: roundUp(reset)}
	if !allowed {
		d.RetryAfter = roundUp(retry)
		if retry <= 0 { // more than this process's share can ever hold
			d.RetryAfter = s.breaker.retryIn()
		}
	}
	return d
}

// byPolicy answers when nobody knows what is left.
func (s *shard) byPolicy(l *Limiter, h keyHash, cost int64, charge bool) (Decision, fallbackMode) {
	policy := l.policy
	if p := s.policy.Load(); p != noPolicy {
		policy = FailurePolicy(p)
	}
	switch policy {
	case PolicyLocal:
		var d Decision
		now := s.ring.clock()
		s.ring.local.with(h, l.rule, l.keys.k0, now, func(e *localEntry) {
			d = s.take(l, e, now, cost, s.ring.draw(h), charge)
		})
		d.Source = SourceLocal
		return d, modeLocal
	case PolicyClosed:
		return Decision{
			Limit: l.rule.capacity, Remaining: Unknown, Source: SourcePolicy,
			RetryAfter: s.breaker.retryIn(),
		}, modeClosed
	default:
		return Decision{Allowed: true, Limit: l.rule.capacity, Remaining: Unknown, Source: SourcePolicy}, modeOpen
	}
}

// draw is this process's part of chance for a key: the same every time, different for
// every process.
func (r *Ring) draw(h keyHash) uint64 {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:8], h.hi)
	binary.LittleEndian.PutUint64(b[8:], h.lo)
	return siphash.Hash(r.instance.k0, r.instance.k1, b[:])
}

func roundUp(ns int64) time.Duration {
	return time.Duration((max(0, ns) + 999) / 1000 * 1000)
}
