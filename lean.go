package ringfence

import (
	"context"
	"crypto/tls"
	"net"
	"os"
	"time"

	"github.com/redis/go-redis/v9"
)

// leanNode is a server given by URL. Operations go over connections of its own, without
// go-redis, which allocates and locks on the way to the socket (docs/performance.md);
// everything that happens once in a while goes through go-redis.
type leanNode struct {
	*redisNode
	wires *wirePool
	say   wireScripts
}

func newLeanNode(url string, c nodeConfig, plain bool) (*leanNode, error) {
	n, err := newRedisNode(url, c, plain)
	if err != nil {
		return nil, err
	}
	o := n.client.(*redis.Client).Options()
	dial := c.dialer
	if dial == nil {
		dial = (&net.Dialer{Timeout: c.timeout}).DialContext
	}
	say := wireScripts{scripts: n.scripts, loaded: n.loaded, lookBySHA: "evalsha_ro", lookByText: "eval_ro"}
	if plain { // the embedded server takes TIME for a write
		say.lookBySHA, say.lookByText = "evalsha", "eval"
	}
	return &leanNode{redisNode: n, say: say, wires: &wirePool{
		network: o.Network, address: o.Addr, username: o.Username, password: o.Password, db: o.DB,
		dial: withTLS(dial, tlsFor(o)), gate: c.gate, all: map[*wire]struct{}{},
	}}, nil
}

func tlsFor(o *redis.Options) *tls.Config { return o.TLSConfig }

// run is one operation from beginning to end.
func (n *leanNode) run(ctx context.Context, kind opKind, reqs []*request) (err error) {
	w := n.wires.ready()
	if w == nil {
		if w, err = n.wires.connect(ctx); err != nil {
			return err
		}
	}
	until, ok := ctx.Deadline()
	if !ok {
		until = time.Time{}
	}
	stop := context.AfterFunc(ctx, w.interruptible())
	w.start(&n.say, kind, reqs)
	ended, err := w.goOn(&n.say, until)
	stop()
	w.over()
	if !ended && err == nil {
		err = os.ErrDeadlineExceeded
	}
	n.wires.put(w, err)
	return err
}

func (n *leanNode) charge(ctx context.Context, reqs []*request) error {
	return n.run(ctx, opCharge, reqs)
}

func (n *leanNode) look(ctx context.Context, reqs []*request) error {
	return n.run(ctx, opLook, reqs)
}

func (n *leanNode) reset(ctx context.Context, reqs []*request) error {
	return n.run(ctx, opReset, reqs)
}

func (n *leanNode) pool() *redis.PoolStats {
	stats := *n.redisNode.pool()
	all, idle := n.wires.counts()
	stats.TotalConns += uint32(all)
	stats.IdleConns += uint32(idle)
	return &stats
}

func (n *leanNode) close() error {
	n.wires.close()
	return n.redisNode.close()
}
