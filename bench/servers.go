package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence/internal/redistest"
)

// start starts the servers that w needs and sets b.servers; ones that run already are
// kept. No persistence (redistest's default), one I/O thread.
func (b *bench) start(ctx context.Context, w workload) error {
	args := []string{"io-threads 1"}
	if w.cluster {
		if b.cluster == nil {
			c, err := redistest.LaunchCluster(ctx, redistest.ClusterOptions{Masters: 3, Args: args})
			if err != nil {
				return err
			}
			b.cluster = c
		}
		b.servers = b.cluster.Nodes()
		return nil
	}
	for len(b.lone) < w.servers() {
		s, err := redistest.Launch(ctx, redistest.Options{Args: args})
		if err != nil {
			return err
		}
		b.lone = append(b.lone, s)
	}
	b.servers = b.lone[:w.servers()]
	return nil
}

// stop ends the servers that start started, and no others.
func (b *bench) stop() {
	for _, s := range b.lone {
		s.Stop()
	}
	if b.cluster != nil {
		b.cluster.Stop()
	}
}

// flush empties the servers at once, scripts excepted.
func (b *bench) flush(ctx context.Context) error {
	for _, s := range b.servers {
		if err := s.Client().FlushAll(ctx).Err(); err != nil {
			return fmt.Errorf("emptying %s: %w", s.Addr(), err)
		}
	}
	return nil
}

// serverTime is the clock of the first server.
func (b *bench) serverTime(ctx context.Context) (time.Time, error) {
	return b.servers[0].Client().Time(ctx).Result()
}

// usage reads everything that is metered.
func (b *bench) usage(ctx context.Context) (u usage, err error) {
	u.at = time.Now()
	if u.client, err = processCPU(); err != nil {
		return u, err
	}
	if u.machine, u.total, err = machineCPU(); err != nil {
		return u, err
	}
	u.allocs, u.bytes = heap()
	for _, s := range b.servers {
		spent, err := serverCPU(ctx, s.Client())
		if err != nil {
			return u, err
		}
		u.server += spent
	}
	return u, nil
}

// serverCPU is the CPU time that a server has used so far.
func serverCPU(ctx context.Context, c *redis.Client) (time.Duration, error) {
	info, err := c.Info(ctx, "cpu").Result()
	if err != nil {
		return 0, err
	}
	return parseServerCPU(info)
}

func parseServerCPU(info string) (sum time.Duration, err error) {
	found := 0
	for line := range strings.Lines(info) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if name != "used_cpu_sys" && name != "used_cpu_user" {
			continue
		}
		seconds, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, fmt.Errorf("INFO cpu says %s", strings.TrimSpace(line))
		}
		sum += time.Duration(seconds * float64(time.Second))
		found++
	}
	if found != 2 {
		return 0, fmt.Errorf("INFO cpu names %d of used_cpu_sys and used_cpu_user", found)
	}
	return sum, nil
}
