package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/embedded"
	"github.com/ringfence/ringfence/internal/redistest"
)

// cluster is the shards of the demo, which it can kill and bring back.
type cluster interface {
	// shards is what ringfence.Config.Shards needs.
	shards() []ringfence.ShardConfig
	// kill ends the primary of shard i as a crash would.
	kill(i int) error
	// revive starts it again, empty, at the address it had.
	revive(ctx context.Context, i int) error
	// replicated says whether every shard has a replica.
	replicated() bool
	close() error
}

func shardID(i int) string { return fmt.Sprintf("shard-%d", i+1) }

// embeddedCluster runs in this process.
type embeddedCluster struct {
	servers *embedded.Shards
}

func startEmbedded(n int) (*embeddedCluster, error) {
	servers, err := embedded.Start(n)
	if err != nil {
		return nil, err
	}
	return &embeddedCluster{servers}, nil
}

func (c *embeddedCluster) shards() []ringfence.ShardConfig {
	out := c.servers.Config()
	for i := range out {
		out[i].ID = shardID(i)
	}
	return out
}

func (c *embeddedCluster) kill(i int) error                      { return c.servers.Kill(i) }
func (c *embeddedCluster) revive(_ context.Context, i int) error { return c.servers.Revive(i) }
func (c *embeddedCluster) replicated() bool                      { return false }
func (c *embeddedCluster) close() error                          { return c.servers.Close() }

// redisCluster is real redis-servers, a primary and a replica a shard. They end with this
// process, however that ends.
type redisCluster struct {
	primaries, replicas []*redistest.Server
}

// startRedis returns once every replica holds what its primary does.
func startRedis(ctx context.Context, n int) (*redisCluster, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c := &redisCluster{primaries: make([]*redistest.Server, n), replicas: make([]*redistest.Server, n)}
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = c.launch(ctx, i) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		for _, one := range errs {
			if errors.Is(one, redistest.ErrNoRedis) {
				err = one // once is enough
			}
		}
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

func (c *redisCluster) launch(ctx context.Context, i int) error {
	var err error
	// A transfer by way of a file lets the replica follow at once, not after a second.
	options := redistest.Options{Args: []string{"repl-diskless-sync no"}}
	if c.primaries[i], err = redistest.Launch(ctx, options); err != nil {
		return err
	}
	if c.replicas[i], err = redistest.Launch(ctx, redistest.Options{ReplicaOf: c.primaries[i]}); err != nil {
		return err
	}
	return c.replicas[i].WaitInSync(ctx)
}

func (c *redisCluster) shards() []ringfence.ShardConfig {
	out := make([]ringfence.ShardConfig, len(c.primaries))
	for i := range out {
		out[i] = ringfence.ShardConfig{
			ID: shardID(i), Primary: c.primaries[i].URL(), Replicas: []string{c.replicas[i].URL()},
		}
	}
	return out
}

func (c *redisCluster) kill(i int) error {
	c.primaries[i].Kill()
	return nil
}

func (c *redisCluster) revive(ctx context.Context, i int) error {
	return c.primaries[i].Restart(ctx)
}

func (c *redisCluster) replicated() bool { return true }

func (c *redisCluster) close() error {
	for _, servers := range [][]*redistest.Server{c.replicas, c.primaries} {
		for _, s := range servers {
			if s != nil {
				s.Stop()
			}
		}
	}
	return nil
}
