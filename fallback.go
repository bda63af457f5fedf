package ringfence

import (
	"context"
	"encoding/binary"
	"math"
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
	ask, cause := s.mayAsk(cause)
	if ask {
		if d, mode, ok := s.fromShare(ctx, l, h, cost, deadline, charge); ok {
			return s.fell(l, d, mode, cause, charge)
		}
	}
	d, mode := s.byPolicy(l, h, cost, charge)
	return s.fell(l, d, mode, cause, charge)
}

// mayAsk says whether the share and the replicas are to be asked, and the cause to show.
func (s *shard) mayAsk(cause Cause) (bool, Cause) {
	switch cause {
	case CauseCorrupt: // the primary is well; this key is not, on the replica either
		return false, cause
	case CauseBreaker: // that it is open is known, and when it closes is too
		return s.looks != nil, cause
	case causeRefused:
		s.degraded.Store(true)
		return false, CauseError
	default:
		s.degraded.Store(true)
		return s.looks != nil, cause
	}
}

// fell finishes what the ladder decided.
func (s *shard) fell(l *Limiter, d Decision, mode fallbackMode, cause Cause, charge bool) Decision {
	d.Shard, d.Cause = s.id, cause
	if !d.Allowed && d.RetryAfter == 0 {
		d.RetryAfter = s.breaker.retryIn() // nobody knows, or this process's share is none
	}
	if charge {
		s.metrics.fellBack(mode, cause)
		s.ring.log.warn(s.id, "fallback", "decisions are not exact: the primary did not make them",
			"shard", s.id, "limiter", l.name, "mode", fallbackModeNames[mode], "reason", cause.String())
	}
	return d
}

// fallBackMany is fallBack for the entries of an AllowMany that the primary did not
// answer. The replica of a shard is asked for all their keys at once.
func (l *Limiter) fallBackMany(ctx context.Context, reqs []Request, entries []manyEntry, out []Decision, deadline int64) {
	looks := make([]manyEntry, len(entries)) // the replica's side of the same entries
	asked := false
	for i := range entries {
		e := &entries[i]
		if e.cause == CauseNone {
			continue
		}
		var ask bool
		ask, e.shown = e.shard.mayAsk(e.cause)
		if !ask || !e.shard.replicas.closed.Load() || e.shard.shared(e.hash) {
			continue
		}
		looks[i] = manyEntry{hash: e.hash, shard: e.shard, req: l.ring.newRequest(opLook, l.rule, e.hash, reqs[i].Cost)}
		asked = true
	}
	if asked {
		sendChains(chain(looks, func(s *shard) *dispatcher { return s.looks }), looks, func(*shard) int64 { return deadline })
	}
	for i := range entries {
		e := &entries[i]
		if e.cause == CauseNone {
			continue
		}
		out[i] = l.fallBackOne(ctx, e, looks[i].req, reqs[i].Cost)
		e.shard.part(e.left, &out[i])
	}
}

// fallBackOne decides one entry, with the help of what a replica was asked, if it was.
func (l *Limiter) fallBackOne(ctx context.Context, e *manyEntry, look *request, cost int64) Decision {
	s := e.shard
	var said *state
	if look != nil {
		defer look.release()
		if _, err := s.looks.wait(ctx, look); err == nil && look.status == statusDecided {
			said = &look.state
		}
	}
	if s.looks != nil && e.cause != CauseCorrupt && e.cause != causeRefused {
		mode := modeShare
		if said != nil {
			mode = modeReplica
		}
		if d, ok := s.decideShare(l, e.hash, cost, true, said, s.epoch.Load()); ok {
			return s.fell(l, d, mode, e.shown, true)
		}
	}
	d, mode := s.byPolicy(l, e.hash, cost, true)
	return s.fell(l, d, mode, e.shown, true)
}

// shared says whether there is a share of the key already.
func (s *shard) shared(h keyHash) bool {
	epoch, ok := s.epoch.Load(), false
	s.ring.local.find(h, func(e *localEntry) { ok = e.seeded && e.epoch == epoch && !e.shared })
	return ok
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
	r := l.ring.newRequest(opLook, l.rule, h, cost)
	if err := s.looks.send(r, deadline); err != nil {
		r.release()
		r.release()
		return d, 0, false
	}
	defer r.release()
	if _, err := s.looks.wait(ctx, r); err != nil || r.status != statusDecided {
		return d, 0, false
	}
	d, ok = s.decideShare(l, h, cost, charge, &r.state, epoch)
	return d, modeReplica, ok
}

// anyEpoch is for a share that goes on although the primary has answered since.
const anyEpoch = math.MaxUint64

// decideShare decides out of the share if there is one of this epoch, or makes it from
// what a replica said.
func (s *shard) decideShare(l *Limiter, h keyHash, cost int64, charge bool, said *state, epoch uint64) (d Decision, ok bool) {
	now, lag := s.ring.clock(), time.Duration(0)
	if said != nil {
		lag = s.replicaLag()
	}
	owes := false
	s.ring.local.with(h, l.rule, l.keys.k0, now, func(e *localEntry) {
		// What was said of one of the keys that share an entry does not hold for the next.
		stale := !e.seeded || e.shared || (e.epoch != epoch && epoch != anyEpoch)
		if said == nil && stale {
			return
		}
		draw := s.ring.draw(h)
		if said != nil && stale {
			e.reseed(l.rule, now, s.instances(), draw, *said)
			e.epoch, e.asOf = epoch, now-int64(lag)
		}
		d, ok = s.take(l, e, now, cost, draw, charge), true
		d.Source, d.Age = SourceReplica, roundUp(now-e.asOf)
		if charge && d.Allowed {
			if owes = !e.shared; !owes { // whose it is cannot be told apart later
				s.metrics.settleLost(cost)
			}
		}
	})
	if owes {
		s.ledger.add(h, l)
		if s.ledger.count.Load() > int64(s.ring.config.MaxLocalKeys) {
			s.ledger.tidy(s.ring.local.has)
		}
	}
	return d, ok
}

// take turns an answer of the local count into a Decision.
func (s *shard) take(l *Limiter, e *localEntry, now, cost int64, draw uint64, charge bool) Decision {
	allowed, left, retry, reset := e.take(l.rule, now, cost, s.instances(), draw, charge)
	d := Decision{Allowed: allowed, Limit: l.rule.capacity, Remaining: left, ResetAfter: roundUp(reset)}
	if !allowed {
		d.RetryAfter = roundUp(retry)
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
		// An entry of its own: what a policy admits is not settled.
		s.ring.local.with(keyHash{h.hi, ^h.lo}, l.rule, l.keys.k0, now, func(e *localEntry) {
			d = s.take(l, e, now, cost, s.ring.draw(h), charge)
		})
		d.Source = SourceLocal
		return d, modeLocal
	case PolicyClosed:
		return Decision{
			Limit: l.rule.capacity, Remaining: Unknown, Source: SourcePolicy,
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
