package ringfence

import (
	"context"
	_ "embed"
	"fmt"
	"math/bits"
	"strconv"
	"time"
)

// This file finds out how many processes share the ring, by which shares are divided:
// Config.Instances, or as many as send heartbeats. Every process sends one to every shard
// with its check-up, whether or not it counts itself, and is told how many there are.

//go:embed scripts/instances.lua
var instancesLua string

const (
	// goneAfter is how long a process is counted without a heartbeat: four check-ups.
	// Rather too long: a process that is not counted has its share admitted by others.
	goneAfter = 4 * checkupEvery
	// beatsKept is how long the heartbeats stay when nobody sends any more: a replica
	// tells them to a process that starts while the primary is away.
	beatsKept = time.Hour
)

// beat sends a heartbeat to the server and returns how many processes there are.
func (n *redisNode) beat(ctx context.Context, name, member string) (int64, error) {
	count, err := n.client.Eval(ctx, n.scripts.beat.text, []string{name}, member,
		strconv.FormatInt(goneAfter.Microseconds(), 10), strconv.FormatInt(beatsKept.Milliseconds(), 10)).Int64()
	return count, n.account(err)
}

// beats is how many processes there were when the server, a replica, last heard of them.
func (n *redisNode) beats(ctx context.Context, name string) (int64, error) {
	return n.client.ZCard(ctx, name).Result()
}

// instances is by how much shares of the shard's keys are divided.
func (s *shard) instances() int {
	if n := s.ring.config.Instances; n > 0 {
		return n
	}
	return int(max(1, s.counted.Load()))
}

// beat tells the shard that this process is there. A failure is logged: shares go on with
// the last count.
func (s *shard) beat(ctx context.Context, n node) {
	count, err := n.beat(ctx, s.ring.space.instances(), s.ring.member())
	if err != nil {
		s.ring.log.warn(s.id, "heartbeat", "cannot count the processes that share the ring", "shard", s.id, "error", err.Error())
		return
	}
	s.heard.Store(count)
	if set := int64(s.ring.config.Instances); set > 0 && count > set {
		s.ring.log.warn(s.id, "instances", "more processes share the ring than Config.Instances says, so that they may admit too much while a shard is away",
			"shard", s.id, "instances", set, "counted", count)
	}
}

// member is what this process is called among its like. InstanceID itself may be known to
// whoever names processes, and is nobody else's business.
func (r *Ring) member() string {
	h := r.instance.hash("member")
	return fmt.Sprintf("%016x%016x", h.hi, h.lo)
}

// count puts into effect what the shards said in one round of check-ups: the same
// processes beat on all of them, so the highest count is right and a lower one is of a
// shard that not all reach. A shard that is away keeps what it had, so that the parts go
// on adding up to one; one that has never answered follows the others upwards.
func (r *Ring) count(shards []*shard, reached func(i int) bool) {
	now := int64(0)
	for i, s := range shards {
		if reached(i) {
			now = max(now, s.heard.Load())
		}
	}
	// One round is not believed: after a server's clock stepped forward all others seem
	// to be gone until their next heartbeat.
	highest := max(now, r.lastCount.Swap(now))
	for i, s := range shards {
		switch {
		case highest == 0:
		case reached(i) && s.heard.Load() > 0:
			s.counted.Store(highest)
			s.known.Store(true)
		case !s.known.Load() && highest > s.counted.Load():
			s.counted.Store(highest)
		}
	}
}

// countOnReplica is for a process that starts while the primary is away.
func (s *shard) countOnReplica(ctx context.Context, views []view) {
	for i, n := range s.nodes {
		if i == int(s.primary.Load()) || views[i].err != nil {
			continue
		}
		if count, err := n.beats(ctx, s.ring.space.instances()); err == nil && count > 0 {
			s.counted.Store(count + 1) // and this one
			return
		}
	}
}

// rescale turns ns that units are worth to one of from instances into those of one of to.
func rescale(ns int64, from, to int) int64 {
	if from == to || from < 1 || ns <= 0 {
		return ns
	}
	hi, lo := bits.Mul64(uint64(ns), uint64(to))
	if hi >= uint64(from) {
		return maxNs
	}
	q, rem := bits.Div64(hi, lo, uint64(from))
	if rem > 0 {
		q++
	}
	return int64(min(q, maxNs))
}
