package ringfence

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// A Redis Cluster stands where a shard does: the ring gives it its part of the keys, and
// the cluster's slots say which of its masters owns each. Every master is a shard of its
// own, with its breaker, its batches and its replicas. A shard is named after the cluster
// and numbered by first slot when it is first seen, and keeps its number when a replica
// takes over; slots that move take their keys along to another shard, which is the one
// case in which a key changes shards.
type redisClusterShards struct {
	name   string
	ring   *Ring
	member int                  // of the ring
	rw     *redis.ClusterClient // follows redirections to masters
	ro     *redis.ClusterClient // looks on replicas
	wires  func() *wirePool     // makes one for a master

	slots atomic.Pointer[[slotCount]uint16] // slot -> index in shards
	list  atomic.Pointer[[]*shard]

	refreshing atomic.Bool
	refreshed  atomic.Int64 // when last, on the ring's clock

	closed   sync.Once
	closeErr error // of closed

	mu      sync.Mutex        // guards the following
	servers []map[string]bool // shard -> ids of the servers seen in it
}

// refreshPause keeps a burst of errors from asking for the topology again and again.
const refreshPause = 200 * time.Millisecond

func newCluster(r *Ring, c ShardConfig, t *target, member int) (*redisClusterShards, error) {
	k := &redisClusterShards{name: c.ID, ring: r, member: member}
	o := clusterOptions(r.config, t, c.TLS)
	gate := newRefusals(r.config)
	k.wires = func() *wirePool {
		return &wirePool{
			network: "tcp", username: t.username, password: t.password, dial: wireDialer(r.config.Dialer, o.TLSConfig, r.config.OperationTimeout), gate: gate,
			all: map[*wire]struct{}{},
		}
	}
	look := *o
	o.Dialer = dialerOf(r.config.Dialer, o.TLSConfig, r.config.OperationTimeout, gate, false)
	k.rw = redis.NewClusterClient(o)
	look.ReadOnly = true
	look.Dialer = dialerOf(r.config.Dialer, o.TLSConfig, r.config.OperationTimeout, gate, true)
	k.ro = redis.NewClusterClient(&look)
	// Until the cluster has been asked, one shard owns everything.
	if err := k.add(); err != nil {
		return nil, errors.Join(err, k.close())
	}
	k.slots.Store(new([slotCount]uint16))
	return k, nil
}

func clusterOptions(c Config, t *target, conf *tls.Config) *redis.ClusterOptions {
	o := &redis.ClusterOptions{
		Addrs: t.addrs, Username: t.username, Password: t.password, TLSConfig: t.secured(conf),
		// Redirections are followed; what may have run is not sent again, because the
		// commands say NoRetry.
		MaxRedirects: 3, MinRetryBackoff: -1, MaxRetryBackoff: -1,
		DialerRetries: 1,
		DialTimeout:   c.OperationTimeout, ReadTimeout: c.OperationTimeout,
		WriteTimeout: c.OperationTimeout, PoolTimeout: c.OperationTimeout,
		ContextTimeoutEnabled: true, PoolSize: c.InFlight + 4, DisableIdentity: true,
		// go-redis would stay with a dead master for a minute.
		ClusterStateReloadInterval: time.Second,
		MaintNotificationsConfig:   &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
	return o
}

// add makes one more shard. Its nodes are both clients, which find the server by slot.
func (k *redisClusterShards) add() error {
	var list []*shard
	if p := k.list.Load(); p != nil {
		list = *p
	}
	index := len(list)
	s, err := newShardOf(k.ring, k.name+"-"+strconv.Itoa(index), k.member, func(s *shard) error {
		s.cluster = k
		conf := nodeConfig{loaded: s.metrics.scriptLoaded}
		master := &clusterNode{redisNode: newClientNode(k.rw, conf, false), of: k, shard: index, client: k.rw}
		master.direct = &direct{wires: k.wires(), say: wireScripts{
			scripts: master.scripts, loaded: master.loaded, lookBySHA: "evalsha_ro", lookByText: "eval_ro",
			follow: master.follow, moved: k.refreshSoon,
		}}
		s.nodes = []node{
			master,
			&clusterNode{redisNode: newClientNode(k.ro, conf, false), of: k, shard: index, client: k.ro, replica: true},
		}
		return nil
	})
	if err != nil {
		return err
	}
	list = append(slices.Clone(list), s)
	k.list.Store(&list)
	k.servers = append(k.servers, map[string]bool{})
	return nil
}

// owner is the shard that owns the slot of a key.
func (k *redisClusterShards) owner(h keyHash) *shard {
	var raw [16]byte
	var tag [keyHashChars]byte
	binary.BigEndian.PutUint64(raw[:8], h.hi)
	binary.BigEndian.PutUint64(raw[8:], h.lo)
	base64.RawURLEncoding.Encode(tag[:], raw[:])
	return (*k.list.Load())[k.slots.Load()[slotOf(tag[:])]]
}

// refresh asks the cluster who owns which slots.
func (k *redisClusterShards) refresh(ctx context.Context) error {
	k.refreshed.Store(k.ring.clock())
	// The clients must know before they are used: who asks just after a replica has taken over
	// would be sent to the old master still, and a probe would have failed for an open period
	// more. ReloadState asks in the background; ForEachMaster does at once.
	var clients sync.WaitGroup
	for _, c := range []*redis.ClusterClient{k.rw, k.ro} {
		// If it fails the client goes on with what it knows, and asks in the background.
		clients.Go(func() { _ = c.ForEachMaster(ctx, func(context.Context, *redis.Client) error { return nil }) })
	}
	ranges, err := k.rw.ClusterSlots(ctx).Result() //nolint:staticcheck // it names the master first; CLUSTER SHARDS leaves finding it to us
	clients.Wait()
	if err != nil {
		return fmt.Errorf("CLUSTER SLOTS: %w", err)
	}
	if err := k.adopt(ranges); err != nil {
		return err
	}
	return k.locate(ctx, ranges)
}

// locate finds out from go-redis, which knows what the addresses that servers give of
// themselves mean here, where each master of these ranges is.
func (k *redisClusterShards) locate(ctx context.Context, ranges []redis.ClusterSlot) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	list := *k.list.Load()
	located := make([]bool, len(list))
	for _, r := range ranges {
		if r.Start < 0 || r.Start >= slotCount {
			continue
		}
		i := k.slots.Load()[r.Start]
		if located[i] {
			continue
		}
		located[i] = true
		one, err := k.rw.MasterForKey(ctx, slotKey(r.Start))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		n := list[i].nodes[0].(*clusterNode)
		n.wires.move(one.Options().Addr)
		n.located.Store(true)
	}
	return errors.Join(errs...)
}

// adopt puts a topology into effect.
func (k *redisClusterShards) adopt(ranges []redis.ClusterSlot) error {
	slices.SortFunc(ranges, func(a, b redis.ClusterSlot) int { return a.Start - b.Start })
	k.mu.Lock()
	defer k.mu.Unlock()
	table := *k.slots.Load()
	for _, r := range ranges {
		if len(r.Nodes) == 0 || r.Start < 0 || r.End >= slotCount || r.Start > r.End {
			continue
		}
		i, err := k.shardOf(r.Nodes)
		if err != nil {
			return err
		}
		for slot := r.Start; slot <= r.End; slot++ {
			table[slot] = uint16(i)
		}
	}
	k.slots.Store(&table)
	return nil
}

// shardOf finds the shard that a master has been in, with whatever role, or makes one.
// Requires k.mu.
func (k *redisClusterShards) shardOf(nodes []redis.ClusterNode) (int, error) {
	index := -1
	for i, seen := range k.servers {
		if seen[serverID(nodes[0])] || len(seen) == 0 {
			index = i
			break
		}
	}
	if index < 0 {
		if len(k.servers) >= MaxShards {
			return 0, fmt.Errorf("cluster %s has more than %d masters", k.name, MaxShards)
		}
		if err := k.add(); err != nil {
			return 0, err
		}
		index = len(k.servers) - 1
		k.ring.log.info(k.name, "master", "a master of the cluster has become a shard", "shard", k.name+"-"+strconv.Itoa(index))
	}
	for _, n := range nodes {
		k.servers[index][serverID(n)] = true
	}
	return index, nil
}

func serverID(n redis.ClusterNode) string {
	if n.ID != "" {
		return n.ID
	}
	return n.Addr
}

// refreshSoon asks in the background, at most every refreshPause.
func (k *redisClusterShards) refreshSoon() {
	if k.ring.clock()-k.refreshed.Load() < int64(refreshPause) || !k.refreshing.CompareAndSwap(false, true) {
		return
	}
	if !k.ring.enter() {
		k.refreshing.Store(false)
		return
	}
	go func() {
		defer k.ring.leave()
		defer k.refreshing.Store(false)
		k.refreshIn(k.ring.ctx, 2*k.ring.config.OperationTimeout)
	}()
}

// refreshIn is refresh with a time of its own; failures are logged.
func (k *redisClusterShards) refreshIn(ctx context.Context, most time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	if err := k.refresh(ctx); err != nil {
		k.ring.log.warn(k.name, "topology", "cannot ask the cluster for its slots", "cluster", k.name, "error", err.Error())
	}
}

// active are the shards that own slots; a master that has lost all of its own is no shard
// any more. As long as none is known to own any, the first stands for the cluster.
func (k *redisClusterShards) active() []*shard {
	list, owns := *k.list.Load(), map[uint16]bool{}
	for _, i := range k.slots.Load() {
		owns[i] = true
	}
	var out []*shard
	for i, s := range list {
		if owns[uint16(i)] {
			out = append(out, s)
		}
	}
	return out
}

// share is the part of the cluster's slots that a shard owns.
func (k *redisClusterShards) share(s *shard) float64 {
	list, n := *k.list.Load(), 0
	for _, i := range k.slots.Load() {
		if list[i] == s {
			n++
		}
	}
	return float64(n) / slotCount
}

// close closes both clients, once.
func (k *redisClusterShards) close() error {
	k.closed.Do(func() { k.closeErr = errors.Join(k.rw.Close(), k.ro.Close()) })
	return k.closeErr
}

// clusterNode is what a shard of a cluster has for a server: the master of its slots, or
// one of the replicas, whichever they are by now.
type clusterNode struct {
	*redisNode
	*direct // of the master
	of      *redisClusterShards
	shard   int
	client  *redis.ClusterClient
	replica bool
	located atomic.Bool
}

func (n *clusterNode) straight() *direct {
	if !n.located.Load() {
		return nil
	}
	return n.direct
}

// follow does what the master sent away, wherever it is to be done by now.
func (n *clusterNode) follow(ctx context.Context, reqs []*request) error {
	if ctx.Err() != nil {
		for _, r := range reqs {
			r.failed = errRedirected
		}
		return errRedirected
	}
	return perform(ctx, n, reqs)
}

// slot is any one of the shard's slots, or -1.
func (n *clusterNode) slot() int {
	for slot, i := range n.of.slots.Load() {
		if int(i) == n.shard {
			return slot
		}
	}
	return -1
}

// server is the client of the one server, as of the topology go-redis knows.
func (n *clusterNode) server(ctx context.Context) (*redis.Client, error) {
	slot := n.slot()
	if slot < 0 {
		return nil, errNoSlots
	}
	return n.client.MasterForKey(ctx, slotKey(slot))
}

var errNoSlots = errors.New("ringfence: the master has no slots any more")

// slotKeys are keys by slot, found when first needed.
var slotKeys = sync.OnceValue(func() (keys [slotCount]string) {
	for i, left := 0, slotCount; left > 0; i++ {
		k := strconv.Itoa(i)
		if s := slotOf([]byte(k)); keys[s] == "" {
			keys[s] = k
			left--
		}
	}
	return keys
})

func slotKey(slot int) string { return slotKeys()[slot] }

// run sends one script call per slot, all of them at once. Each is redirected by itself
// when its slot moves.
func (n *clusterNode) run(ctx context.Context, call, callText string, s script, reqs []*request) error {
	groups := map[int][]*request{}
	for _, r := range reqs {
		slot := slotOf(tagOf(r.key()))
		groups[slot] = append(groups[slot], r)
	}
	cmds, of := make([]redis.Cmder, 0, len(groups)), make([][]*request, 0, len(groups))
	for _, g := range groups {
		cmds, of = append(cmds, n.command(ctx, call, s.sha, g)), append(of, g)
	}
	n.send(ctx, cmds)
	for pause := time.Millisecond; ; pause *= 2 {
		// While a slot moves, its masters may disagree about whose it is and send a call from
		// one to the other. It has not run, and they agree after a while.
		var again []redis.Cmder
		for i := range cmds {
			err := cmds[i].Err()
			if err == nil || !(redis.HasErrorPrefix(err, "MOVED") || redis.HasErrorPrefix(err, "ASK") || redis.HasErrorPrefix(err, "TRYAGAIN")) {
				continue
			}
			cmds[i] = n.command(ctx, call, s.sha, of[i])
			again = append(again, cmds[i])
		}
		if len(again) == 0 || !sleep(ctx, pause) {
			for _, c := range again {
				c.SetErr(errRedirected)
			}
			break
		}
		n.send(ctx, again)
	}
	var errs []error
	for i := range cmds {
		err := cmds[i].Err()
		if err != nil && redis.HasErrorPrefix(err, "NOSCRIPT") {
			n.loaded()
			cmds[i] = n.command(ctx, callText, s.text, of[i])
			n.send(ctx, cmds[i:i+1])
			err = cmds[i].Err()
		}
		if err == nil {
			err = decodeReply(cmds[i].(once).Val(), of[i])
		}
		if err != nil {
			for _, r := range of[i] {
				r.failed = err
			}
			errs = append(errs, err)
		}
	}
	if len(errs) == len(cmds) {
		return errs[0]
	}
	return nil
}

// errRedirected is how a call ends that masters have sent to one another for as long as it
// had time. It did not run.
var errRedirected = errors.New("ringfence: the masters of the cluster do not agree about whose the slot is")

// sleep says whether ctx lasted for so long.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (n *clusterNode) command(ctx context.Context, call, script string, reqs []*request) once {
	args, _ := appendArgs([]any{call, script}, false, reqs, nil)
	for i := range reqs { // go-redis routes by text
		args[3+i] = string(reqs[i].key())
	}
	return once{redis.NewIntSliceCmd(ctx, args...)}
}

// send reports errors in the commands.
func (n *clusterNode) send(ctx context.Context, cmds []redis.Cmder) {
	if len(cmds) == 1 {
		_ = n.client.Process(ctx, cmds[0])
		return
	}
	pipe := n.client.Pipeline()
	for _, c := range cmds {
		_ = pipe.Process(ctx, c)
	}
	_, _ = pipe.Exec(ctx)
}

func (n *clusterNode) charge(ctx context.Context, reqs []*request) error {
	if len(reqs) > 0 {
		return n.run(ctx, "evalsha", "eval", n.scripts.charge, reqs)
	}
	slot := n.slot()
	if slot < 0 {
		return errNoSlots
	}
	// A cluster that is down refuses keys only, so the probe has one of a slot of the
	// shard, asks for nothing and leaves nothing there.
	r := n.of.ring.newRequest(opCharge, probeRule(), keyHash{}, 1)
	defer func() { r.release(); r.release() }()
	r.name, r.count = n.of.ring.space.tagged(r.name[:0], slotKey(slot)), 0
	return n.run(ctx, "evalsha", "eval", n.scripts.charge, []*request{r})
}

// probeRule is any limit: nothing is asked of it.
var probeRule = sync.OnceValue(func() *rule {
	r, err := TokenBucket{Rate: 1, Per: time.Second, Burst: 1}.compile()
	if err != nil {
		panic(err)
	}
	return r
})

func (n *clusterNode) look(ctx context.Context, reqs []*request) error {
	if len(reqs) > 0 {
		return n.run(ctx, "evalsha_ro", "eval_ro", n.scripts.look, reqs)
	}
	one, err := n.server(ctx)
	if err != nil {
		return err
	}
	probe := &redisNode{client: one, scripts: n.scripts, loaded: n.loaded}
	return probe.look(ctx, nil)
}

// reset deletes each key by a command of its own, all of them at once: pipelined to each
// server, and to the servers side by side. One that fails fails alone. It is a pipeline for
// each server because go-redis, when it finds no connection to one of them in time, says so
// of every command in the pipeline, of those that were executed too.
func (n *clusterNode) reset(ctx context.Context, reqs []*request) error {
	cmds := make([]redis.Cmder, len(reqs))
	to := map[*redis.Client][]redis.Cmder{}
	for i, r := range reqs {
		cmds[i] = onceUnlink{redis.NewIntCmd(ctx, "unlink", string(r.key()))}
		one, err := n.client.MasterForKey(ctx, string(r.key()))
		if err != nil {
			cmds[i].SetErr(err)
			continue
		}
		to[one] = append(to[one], cmds[i])
	}
	var servers sync.WaitGroup
	for _, c := range to {
		servers.Go(func() { n.send(ctx, c) })
	}
	servers.Wait()
	failed := 0
	for i, r := range reqs {
		if r.failed = cmds[i].Err(); r.failed != nil {
			failed++
		}
	}
	if failed > 0 && failed == len(reqs) {
		return reqs[0].failed
	}
	return nil
}

func (n *clusterNode) info(ctx context.Context) (nodeInfo, error) {
	if n.replica {
		return n.replicaInfo(ctx)
	}
	one, err := n.server(ctx)
	if err != nil {
		return nodeInfo{}, err
	}
	text, err := one.Info(ctx, "server", "replication", "memory").Result()
	if err != nil {
		return nodeInfo{}, err
	}
	return parseInfo(text), nil
}

// replicaInfo says how far a replica is behind. Whether it is one the slots say, and not
// the servers.
func (n *clusterNode) replicaInfo(ctx context.Context) (nodeInfo, error) {
	slot := n.slot()
	if slot < 0 {
		return nodeInfo{}, errNoSlots
	}
	one, err := n.client.SlaveForKey(ctx, slotKey(slot))
	if err != nil {
		return nodeInfo{}, err
	}
	text, err := one.Info(ctx, "replication").Result()
	if err != nil {
		return nodeInfo{}, err
	}
	return nodeInfo{lag: parseInfo(text).lag}, nil
}

func (n *clusterNode) now(ctx context.Context) (time.Time, error) {
	one, err := n.server(ctx)
	if err != nil {
		return time.Time{}, err
	}
	return one.Time(ctx).Result()
}

func (n *clusterNode) load(ctx context.Context) error {
	one, err := n.server(ctx)
	if err != nil {
		return err
	}
	return (&redisNode{client: one, scripts: n.scripts, loaded: n.loaded}).load(ctx)
}

func (n *clusterNode) addr() string { return "cluster " + n.of.name }

func (n *clusterNode) pool() *redis.PoolStats {
	stats := *n.redisNode.pool()
	if n.direct != nil {
		n.wires.count(&stats)
	}
	return &stats
}

// close closes the clients that all shards of the cluster share.
func (n *clusterNode) close() error {
	if n.direct != nil {
		n.wires.close()
	}
	return n.of.close()
}
