package ringfence

import (
	"cmp"
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
	direct
}

// direct is how operations get to a server over connections of its own.
type direct struct {
	wires *wirePool
	say   wireScripts
}

// directNode is a node that has them, or may have.
type directNode interface {
	// straight is nil as long as nobody knows where the server is.
	straight() *direct
}

func (d *direct) straight() *direct { return d }

func newLeanNode(url string, c nodeConfig, plain bool) (*leanNode, error) {
	n, err := newRedisNode(url, c, plain)
	if err != nil {
		return nil, err
	}
	o := n.client.(*redis.Client).Options()
	say := wireScripts{scripts: n.scripts, loaded: n.loaded, lookBySHA: "evalsha_ro", lookByText: "eval_ro"}
	if plain { // the embedded server takes TIME for a write
		say.lookBySHA, say.lookByText = "evalsha", "eval"
	}
	return &leanNode{redisNode: n, direct: direct{say: say, wires: &wirePool{
		network: o.Network, address: o.Addr, username: o.Username, password: o.Password, db: o.DB,
		dial: wireDialer(c.dialer, tlsFor(o), c.timeout), gate: c.gate, all: map[*wire]struct{}{},
	}}}, nil
}

// wireDialer is the user's dialer, or the system's, with TLS where that is wanted.
func wireDialer(users dialer, conf *tls.Config, timeout time.Duration) dialer {
	if users == nil {
		users = (&net.Dialer{Timeout: timeout}).DialContext
	}
	return withTLS(users, conf)
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
	if !ended {
		err = w.abandon(&n.say, cmp.Or(err, os.ErrDeadlineExceeded))
	}
	n.wires.put(w)
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
	n.wires.count(&stats)
	return &stats
}

func (n *leanNode) close() error {
	n.wires.close()
	return n.redisNode.close()
}
