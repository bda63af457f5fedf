package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"

	"github.com/ringfence/ringfence"
)

// benchHashKey keeps the warning about a published constant away; it is no secret.
var benchHashKey = []byte("ringfence/bench.")

func ringConfig(at place) ringfence.Config {
	c := ringfence.Config{HashKey: benchHashKey, Logger: slog.New(slog.DiscardHandler)}
	if at.cluster {
		c.Shards = []ringfence.ShardConfig{{ID: "c", Primary: "redis+cluster://" + strings.Join(at.addrs, ",")}}
		return c
	}
	for i, addr := range at.addrs {
		c.Shards = append(c.Shards, ringfence.ShardConfig{ID: fmt.Sprintf("s%d", i), Primary: "redis://" + addr})
	}
	return c
}

func openRingfence(ctx context.Context, at place, l limit) (*instance, error) {
	return openRing(ctx, at, l)
}

func openLeased(ctx context.Context, at place, l limit) (*instance, error) {
	return openRing(ctx, at, l, leaseOptions()...)
}

func openRing(ctx context.Context, at place, l limit, options ...ringfence.LimiterOption) (*instance, error) {
	ring, err := ringfence.Open(ctx, ringConfig(at))
	if err != nil {
		return nil, err
	}
	limiter, err := ring.Limiter("bench", ringfence.TokenBucket{Rate: l.rate, Per: l.per, Burst: l.burst}, options...)
	if err != nil {
		_ = ring.Close()
		return nil, err
	}
	return &instance{
		allow: func(ctx context.Context, key string) (answer, error) {
			d, err := limiter.Allow(ctx, key)
			switch {
			case err != nil:
				return denied, err
			case d.Cause != ringfence.CauseNone:
				return elsewhere, nil
			case d.Allowed:
				return allowed, nil
			}
			return denied, nil
		},
		close: func() { _ = ring.Close() },
	}, nil
}
