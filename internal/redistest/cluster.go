package redistest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// groupBound is the longest a cluster or a Sentinel set may take to become
// ready, and each wait on it whose context has no deadline.
const groupBound = 30 * time.Second

// ClusterOptions say how a Redis Cluster is started. The zero value is three
// masters without replicas.
type ClusterOptions struct {
	// Masters is the number of masters, 0 for 3. They share the slots evenly.
	Masters int

	// ReplicasPer is the number of replicas of each master. Without any, the
	// cluster is down as soon as one master is.
	ReplicasPer int

	// NodeTimeout is cluster-node-timeout, 0 for 2 s: how long a node must be
	// silent until the others act. A second or less makes a busy machine fail
	// over for no reason.
	NodeTimeout time.Duration

	// Args are extra lines of every node's redis.conf, as in [Options].
	Args []string

	// Clock loads the clock shim into every node, as in [Options].
	Clock bool

	// Netns gives the namespace of node i, masters first: for Masters 3 and
	// ReplicasPer 1 nodes 3 to 5 are the replicas of 0 to 2. nil leaves all
	// nodes on 127.0.0.1; otherwise each node needs one, the same or another.
	Netns func(i int) *Netns
}

func (o *ClusterOptions) complete() error {
	if o.Masters == 0 {
		o.Masters = 3
	}
	if o.NodeTimeout == 0 {
		o.NodeTimeout = 2 * time.Second
	}
	switch {
	case o.Masters < 1 || o.Masters > 100:
		return fmt.Errorf("redistest: a cluster of %d masters; ask for 1 to 100", o.Masters)
	case o.ReplicasPer < 0 || o.ReplicasPer > 5:
		return fmt.Errorf("redistest: %d replicas to a master; ask for 0 to 5", o.ReplicasPer)
	case o.NodeTimeout < 100*time.Millisecond:
		return fmt.Errorf("redistest: cluster-node-timeout %v is less than the 100 ms at which nodes look at each other; ask for 1 s or more", o.NodeTimeout)
	}
	return nil
}

// Cluster is a Redis Cluster of servers started here. Any fault can be done to
// its nodes, [Server.Restart] included: unlike a lone server's data, a node's
// identity and its slots are on disk and survive that. All methods may be called
// from any goroutine, but MoveSlot of one slot only from one at a time.
type Cluster struct {
	nodes []*Server
	ids   map[string]*Server // node id, as CLUSTER MYID gives it
	names map[*Server]string // the same, the other way round
}

// LaunchCluster starts a cluster and returns once every node says
// cluster_state:ok, all agree on who owns which slot, and the replicas are in
// sync; at the latest after 30 s. Redis itself takes 2 s of that: a master does
// not take writes sooner after its start.
func LaunchCluster(ctx context.Context, o ClusterOptions) (*Cluster, error) {
	return launchCluster(ctx, o, nil)
}

// StartCluster launches a cluster for one test, fails the test if that is not
// possible, and stops the cluster when the test ends.
func StartCluster(t TB, o ClusterOptions) *Cluster {
	t.Helper()
	c, err := launchCluster(context.Background(), o, t)
	if err != nil {
		t.Fatalf("%v", err)
		return nil
	}
	t.Cleanup(c.Stop)
	logReal(t, c.nodes...)
	return c
}

func launchCluster(ctx context.Context, o ClusterOptions, tb TB) (*Cluster, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, groupBound)
	defer cancel()

	options := make([]Options, o.Masters*(1+o.ReplicasPer))
	for i := range options {
		options[i] = Options{Clock: o.Clock, Args: append([]string{
			fmt.Sprintf("cluster-node-timeout %d", o.NodeTimeout.Milliseconds()),
			"cluster-allow-replica-migration no", // a master keeps the replicas it was given
			"repl-diskless-sync no",              // a third of a second until in sync, not one
		}, o.Args...)}
	}
	if err := place(options, o.Netns); err != nil {
		return nil, err
	}
	nodes, err := launchAll(ctx, options, clusterNode, tb)
	if err != nil {
		return nil, err
	}
	c := &Cluster{nodes: nodes, ids: map[string]*Server{}, names: map[*Server]string{}}
	if err = c.form(ctx, o); err == nil {
		err = c.WaitReady(ctx)
	}
	if err != nil {
		c.Stop()
		return nil, err
	}
	return c, nil
}

// launchAll starts servers side by side: all or none.
func launchAll(ctx context.Context, options []Options, k kind, tb TB) ([]*Server, error) {
	servers := make([]*Server, len(options))
	err := atOnce(len(options), func(i int) (err error) {
		servers[i], err = launch(ctx, options[i], k, tb)
		return err
	})
	if err != nil {
		stopAll(servers)
		return nil, err
	}
	return servers, nil
}

func stopAll(servers []*Server) {
	_ = atOnce(len(servers), func(i int) error {
		if servers[i] != nil {
			servers[i].Stop()
		}
		return nil
	})
}

// atOnce calls f(0) to f(n-1) side by side and joins the errors.
func atOnce(n int, f func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// form makes one cluster of single nodes.
func (c *Cluster) form(ctx context.Context, o ClusterOptions) error {
	ids := make([]string, len(c.nodes))
	err := atOnce(len(c.nodes), func(i int) (err error) {
		node := c.nodes[i]
		if ids[i], err = node.Client().Do(ctx, "CLUSTER", "MYID").Text(); err != nil {
			return fmt.Errorf("redistest: asking %s for its id: %w", node.Addr(), err)
		}
		// Different from the start, or the nodes would have to settle it.
		if err := node.cluster(ctx, "SET-CONFIG-EPOCH", i+1); err != nil {
			return err
		}
		if i >= o.Masters {
			return nil
		}
		first, last := i*Slots/o.Masters, (i+1)*Slots/o.Masters-1
		return node.cluster(ctx, "ADDSLOTSRANGE", first, last)
	})
	if err != nil {
		return err
	}
	for i, id := range ids {
		c.ids[id], c.names[c.nodes[i]] = c.nodes[i], id
	}

	// Each pair by itself: gossip would find the others too, but later.
	err = atOnce(len(c.nodes), func(i int) error {
		for _, other := range c.nodes[:i] {
			if err := c.nodes[i].cluster(ctx, "MEET", other.host(), other.port, other.bus.port); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return atOnce(len(c.nodes)-o.Masters, func(i int) error {
		master, replica := c.nodes[i%o.Masters], c.nodes[o.Masters+i]
		return c.replicate(ctx, replica, master)
	})
}

// replicate waits until the replica has met its master.
func (c *Cluster) replicate(ctx context.Context, replica, master *Server) error {
	if err := pollLast(ctx, func() error { return replica.cluster(ctx, "REPLICATE", c.names[master]) }); err != nil {
		return err
	}
	replica.setMaster(master)
	return nil
}

// cluster sends one CLUSTER command to the node.
func (s *Server) cluster(ctx context.Context, args ...any) error {
	words := make([]string, len(args))
	for i, arg := range args {
		words[i] = fmt.Sprint(arg)
	}
	all := []any{"CLUSTER"}
	for _, word := range words {
		all = append(all, word)
	}
	if err := s.Client().Do(ctx, all...).Err(); err != nil {
		return fmt.Errorf("redistest: CLUSTER %s on %s: %w", strings.Join(words, " "), s.Addr(), err)
	}
	return nil
}

// Nodes returns all servers, in the order of their start: masters first.
func (c *Cluster) Nodes() []*Server { return slices.Clone(c.nodes) }

// URL returns "redis+cluster://127.0.0.1:p1,127.0.0.1:p2,..." with every node.
func (c *Cluster) URL() string { return "redis+cluster://" + addresses(c.nodes) }

func addresses(servers []*Server) string {
	var all []string
	for _, s := range servers {
		all = append(all, s.Addr())
	}
	return strings.Join(all, ",")
}

// Stop ends all nodes for good. Calling it again does nothing.
func (c *Cluster) Stop() { stopAll(c.nodes) }

// WaitReady waits until the cluster is whole: every running node says
// cluster_state:ok and names the same owner for every slot, and every running
// replica is in sync with its master. Killed nodes do not count, if others have
// taken their slots. It waits 30 s if ctx has no deadline.
func (c *Cluster) WaitReady(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	if err := pollLast(ctx, func() error { return c.ready(ctx) }); err != nil {
		return fmt.Errorf("redistest: the cluster at %s is not ready: %w", addresses(c.nodes), err)
	}
	return c.waitReplicas(ctx)
}

// bounded gives a context a deadline if it has none.
func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, groupBound)
}

// pollLast polls until look finds nothing missing. If ctx ends first, the error
// holds what was missing last, and not that a look was cut short by that end.
func pollLast(ctx context.Context, look func() error) error {
	last := errors.New("not looked at yet")
	err := poll(ctx, func() (bool, error) {
		missing := look()
		if missing == nil || ctx.Err() == nil {
			last = missing
		}
		return missing == nil, nil
	})
	if err != nil {
		return fmt.Errorf("%w (last: %w)", err, last)
	}
	return nil
}

func (c *Cluster) ready(ctx context.Context) error {
	var running []*Server
	for _, node := range c.nodes {
		if node.Running() {
			running = append(running, node)
		}
	}
	views := make([]view, len(running))
	err := atOnce(len(running), func(i int) (err error) {
		info, err := running[i].Client().ClusterInfo(ctx).Result()
		if err != nil {
			return fmt.Errorf("asking %s for CLUSTER INFO: %w", running[i].Addr(), err)
		}
		if !strings.Contains(info, "cluster_state:ok") || !strings.Contains(info, fmt.Sprintf("cluster_slots_assigned:%d\r", Slots)) {
			return fmt.Errorf("%s does not say that all is well", running[i].Addr())
		}
		views[i], err = running[i].view(ctx)
		return err
	})
	if err != nil {
		return err
	}
	whole := c.merge(views)
	for i, v := range views {
		if len(v) != len(c.nodes) {
			return fmt.Errorf("%s knows %d nodes of %d", running[i].Addr(), len(v), len(c.nodes))
		}
		if c.merge([]view{v}).owner != whole.owner {
			return fmt.Errorf("%s names other owners of slots than the rest", running[i].Addr())
		}
		for id, master := range whole.masterOf {
			if seen := v[id]; seen.master != master {
				return fmt.Errorf("%s takes %s for a replica of %q, which itself says %q", running[i].Addr(), id, seen.master, master)
			}
		}
	}
	return nil
}

func (c *Cluster) waitReplicas(ctx context.Context) error {
	now := c.look(ctx)
	return atOnce(len(c.nodes), func(i int) error {
		node := c.nodes[i]
		master := c.ids[now.masterOf[c.names[node]]]
		node.setMaster(master)
		if master == nil || !node.Running() {
			return nil
		}
		return node.WaitInSync(ctx)
	})
}
