package ringfence

import "slices"

// ShardStats is how one shard is doing.
type ShardStats struct {
	// ID is the shard's id.
	ID string
	// Share is the part of the keys that it owns, 0 to 1.
	Share float64
	// Up says whether its primary answered when last asked.
	Up bool
	// SplitBrain says that two of its servers say they are the primary, and that it is
	// undecidable which is.
	SplitBrain bool
	// ConfigMismatch says that another process uses another HashKey or ring on it.
	ConfigMismatch bool
	// Instances is the number by which shares of its keys are divided: Config.Instances,
	// or the processes counted when the shard was last asked.
	Instances int
	// Primary is the address of the server taken for the primary.
	Primary string
	// InFlight is the number of operations under way, Queued that of calls waiting.
	InFlight, Queued int
	// Policy is the failure policy set at run time, nil if none is.
	Policy *FailurePolicy
	// Breaker is its circuit breaker.
	Breaker BreakerStats
}

// Stats returns how every shard is doing, in the order of Config.Shards; every master of a
// Redis Cluster is a shard.
func (r *Ring) Stats() []ShardStats {
	shards := r.all()
	out := make([]ShardStats, len(shards))
	for i, s := range shards {
		out[i] = ShardStats{
			ID: s.id, Share: r.share(s), Instances: s.instances(), Primary: s.nodes[s.primary.Load()].addr(),
			InFlight: s.charges.inFlight(), Queued: int(s.charges.waiting.Load()), Breaker: s.breaker.stats(),
		}
		if p := s.policy.Load(); p != noPolicy {
			policy := FailurePolicy(p)
			out[i].Policy = &policy
		}
		s.mu.Lock()
		out[i].Up, out[i].SplitBrain, out[i].ConfigMismatch = s.up, s.splitView, s.mismatch
		s.mu.Unlock()
	}
	return out
}

// Locate returns the id of the shard that owns a key of this limiter, and the key's name
// in Redis. Names cannot be turned back into keys.
func (l *Limiter) Locate(key string) (shardID, redisKey string) {
	h := l.keys.hash(key)
	return l.ring.owner(h).id, string(l.ring.space.append(nil, h))
}

// ConfigureBreaker replaces the circuit breaker's configuration of a shard, at once. An
// open breaker stays open for what is left of its period.
func (r *Ring) ConfigureBreaker(shardID string, c BreakerConfig) error {
	c, err := c.withDefaults("BreakerConfig")
	if err != nil {
		return err
	}
	s, err := r.find(shardID)
	if err != nil {
		return err
	}
	s.breaker.configure(c)
	return nil
}

// ForceBreaker opens or closes the circuit breaker of a shard by hand until it is set
// back to BreakerAuto.
func (r *Ring) ForceBreaker(shardID string, m BreakerMode) error {
	if m < BreakerAuto || m > BreakerForcedClosed {
		return invalid("mode", int32(m), "must be BreakerAuto, BreakerForcedOpen or BreakerForcedClosed")
	}
	s, err := r.find(shardID)
	if err != nil {
		return err
	}
	s.breaker.force(m)
	s.ring.log.warn(s.id, "forced-"+m.String(), "circuit breaker set by hand", "shard", s.id, "mode", m.String())
	return nil
}

// SetPolicy sets the failure policy of all keys of a shard, whatever their limiter says.
func (r *Ring) SetPolicy(shardID string, p FailurePolicy) error {
	if err := p.validate("policy"); err != nil {
		return err
	}
	s, err := r.find(shardID)
	if err != nil {
		return err
	}
	s.policy.Store(int32(p))
	return nil
}

// ClearPolicy gives the failure policy of a shard back to the limiters.
func (r *Ring) ClearPolicy(shardID string) error {
	s, err := r.find(shardID)
	if err != nil {
		return err
	}
	s.policy.Store(noPolicy)
	return nil
}

func (r *Ring) find(shardID string) (*shard, error) {
	shards := r.all()
	ids := make([]string, 0, len(shards))
	for _, s := range shards {
		if s.id == shardID {
			return s, nil
		}
		ids = append(ids, s.id)
	}
	slices.Sort(ids)
	return nil, invalid("shardID", shardID, "must be one of %v", ids)
}
