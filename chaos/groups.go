package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// The faults of Sentinel sets and clusters. The servers mend them themselves.

type sentinelFault int

const (
	sentinelKill sentinelFault = iota
	sentinelStop
	sentinelPartition
	sentinelPlanned
)

func startSentinel(what sentinelFault) func(ctx context.Context, s *scene) error {
	return func(ctx context.Context, s *scene) error {
		o := redistest.SentinelOptions{DownAfter: downAfter}
		var inner, outer *redistest.Netns
		if what == sentinelPartition {
			var err error
			if inner, err = redistest.LaunchNetns(); err != nil {
				return err
			}
			s.later(inner.Stop)
			if outer, err = redistest.LaunchNetns(); err != nil {
				return err
			}
			s.later(outer.Stop)
			o.Netns = func(i int) *redistest.Netns {
				if i == 0 {
					return inner // the master alone
				}
				return outer
			}
		}
		set, err := redistest.LaunchSentinel(ctx, o)
		if err != nil {
			return err
		}
		s.later(set.Stop)
		old := set.Master(ctx)
		if old == nil {
			return errors.New("the set has no master")
		}
		here := func() ringfence.ShardConfig { return ringfence.ShardConfig{ID: "s", Primary: set.URL()} }
		s.lone = &place{faulty: here, direct: here, replicas: true, sync: set.WaitReady, loses: losesLag}
		s.lone.marked = true
		s.lone.tookOver = func(ctx context.Context) *ringfence.ShardConfig {
			master := set.Master(ctx)
			if master == nil || master == old {
				return nil
			}
			return &ringfence.ShardConfig{ID: "s", Primary: master.URL()}
		}
		switch what {
		case sentinelKill:
			s.inject = func(context.Context) error { old.Kill(); return nil }
		case sentinelStop:
			s.inject = func(context.Context) error { old.Pause(); return nil }
			s.heal = func(context.Context) error { old.Resume(); return nil }
		case sentinelPartition:
			s.lone.loses = losesSince
			s.inject = func(context.Context) error { inner.Cut(outer, true); return nil }
			s.heal = func(context.Context) error { inner.Cut(outer, false); return nil }
		case sentinelPlanned:
			s.lone.loses = losesSince
			s.inject = set.Failover
		}
		return nil
	}
}

// launchCluster starts one with a replica for each master.
func (s *scene) launchCluster(ctx context.Context) (*redistest.Cluster, error) {
	c, err := redistest.LaunchCluster(ctx, redistest.ClusterOptions{ReplicasPer: 1, NodeTimeout: nodeTimeout})
	if err != nil {
		return nil, err
	}
	s.later(c.Stop)
	here := func() ringfence.ShardConfig { return ringfence.ShardConfig{ID: "c", Primary: c.URL()} }
	s.lone = &place{faulty: here, direct: here, replicas: true, sync: c.WaitReady}
	return c, nil
}

func slotOf(ctx context.Context, s *redistest.Server, name string) (int, error) {
	slot, err := s.Client().ClusterKeySlot(ctx, name).Result()
	return int(slot), err
}

func startClusterLost(ctx context.Context, s *scene) error {
	c, err := s.launchCluster(ctx)
	if err != nil {
		return err
	}
	victim, other := c.Masters()[0], c.Masters()[1]
	s.lone.loses = losesLag
	owned := map[int]bool{}
	ranges, err := other.Client().ClusterShards(ctx).Result()
	if err != nil {
		return err
	}
	for _, shard := range ranges {
		for _, node := range shard.Nodes {
			if fmt.Sprintf("%s:%d", node.IP, node.Port) != victim.Addr() {
				continue
			}
			for _, r := range shard.Slots {
				for slot := r.Start; slot <= r.End; slot++ {
					owned[int(slot)] = true
				}
			}
		}
	}
	s.lone.fits = func(name string) bool {
		slot, err := slotOf(ctx, other, name)
		return err == nil && owned[slot]
	}
	s.lone.tookOver = func(context.Context) *ringfence.ShardConfig {
		for slot := range owned {
			if now := c.MasterOf(slot); now == nil || now == victim {
				return nil
			}
			break
		}
		to := s.lone.direct()
		return &to
	}
	s.inject = func(context.Context) error { victim.Kill(); return nil }
	return nil
}

func startSlotMoved(ctx context.Context, s *scene) error {
	c, err := s.launchCluster(ctx)
	if err != nil {
		return err
	}
	s.inject = func(ctx context.Context) error {
		masters := c.Masters()
		for _, cell := range s.cells {
			_, name := cell.processes[0].limiter.Locate(cell.keys[0])
			slot, err := slotOf(ctx, masters[0], name)
			if err != nil {
				return err
			}
			home := c.MasterOf(slot)
			for _, to := range masters {
				if to == home {
					continue
				}
				if err := errors.Join(c.MoveSlot(ctx, slot, to), c.MoveSlot(ctx, slot, home)); err != nil {
					return err
				}
				break
			}
		}
		return nil
	}
	return nil
}
