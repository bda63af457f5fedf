package redistest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"
)

// MasterName is the name under which the Sentinels watch their master.
const MasterName = "mymaster"

// SentinelOptions say how a primary, its replicas and their Sentinels are
// started.
type SentinelOptions struct {
	// Replicas is the number of replicas, 0 for 2.
	Replicas int

	// Sentinels is the number of Sentinels, 0 for 3. The quorum is a majority.
	Sentinels int

	// DownAfter is down-after-milliseconds, 0 for 3 s: how long the master must
	// be silent until a Sentinel takes it for down. 1 s is the period of
	// Sentinel's own pings: it then takes the fresh master for down too, and
	// fails over twice, which loses far more than once.
	DownAfter time.Duration

	// Args are extra lines of redis.conf of the data servers, as in [Options].
	Args []string

	// SentinelArgs are extra lines of sentinel.conf, for example
	// "sentinel failover-timeout mymaster 60000" (10 s if not given).
	SentinelArgs []string

	// Clock loads the clock shim into the data servers, as in [Options].
	Clock bool

	// Netns gives the namespace of process i: 0 is the first primary, then
	// come the replicas, then the Sentinels. nil leaves all on 127.0.0.1;
	// otherwise each needs one, the same or another.
	Netns func(i int) *Netns
}

func (o *SentinelOptions) complete() error {
	if o.Replicas == 0 {
		o.Replicas = 2
	}
	if o.Sentinels == 0 {
		o.Sentinels = 3
	}
	if o.DownAfter == 0 {
		o.DownAfter = 3 * time.Second
	}
	switch {
	case o.Replicas < 1 || o.Replicas > 5:
		return fmt.Errorf("redistest: %d replicas under Sentinel; ask for 1 to 5", o.Replicas)
	case o.Sentinels < 1 || o.Sentinels > 9:
		return fmt.Errorf("redistest: %d Sentinels; ask for 1 to 9", o.Sentinels)
	case o.DownAfter < 100*time.Millisecond:
		return fmt.Errorf("redistest: down-after %v is less than a Sentinel's own 100 ms tick; ask for 3 s or more", o.DownAfter)
	}
	return nil
}

// SentinelSet is a primary, its replicas and the Sentinels that watch them. Any
// fault can be done to its servers. Sentinel rewrites their configuration files:
// a promoted replica comes back from [Server.Restart] as a primary, and so does
// the former primary, until the Sentinels demote it some ten seconds later. All
// methods may be called from any goroutine.
type SentinelSet struct {
	servers, sentinels []*Server
}

// LaunchSentinel starts a set and returns once every Sentinel sees all others
// and all replicas, and the replicas are in sync; at the latest after 30 s. Most
// of it is waiting for the Sentinels, which greet each other every 2 s.
func LaunchSentinel(ctx context.Context, o SentinelOptions) (*SentinelSet, error) {
	return launchSentinel(ctx, o, nil)
}

// StartSentinel launches a set for one test, fails the test if that is not
// possible, and stops the set when the test ends.
func StartSentinel(t TB, o SentinelOptions) *SentinelSet {
	t.Helper()
	set, err := launchSentinel(context.Background(), o, t)
	if err != nil {
		t.Fatalf("%v", err)
		return nil
	}
	t.Cleanup(set.Stop)
	logReal(t, set.servers...)
	return set
}

func launchSentinel(ctx context.Context, o SentinelOptions, tb TB) (_ *SentinelSet, err error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, groupBound)
	defer cancel()
	set := &SentinelSet{}
	defer func() {
		if err != nil {
			set.Stop()
		}
	}()

	options := make([]Options, 1+o.Replicas+o.Sentinels)
	if err := place(options, o.Netns); err != nil {
		return nil, err
	}
	servers, sentinels := options[:1+o.Replicas], options[1+o.Replicas:]

	// The Sentinels ask a primary for its replicas when they first meet it, and
	// then every 10 s: so they come last, when the replicas are in sync.
	for i := range servers {
		servers[i].Clock = o.Clock
		servers[i].Args = append([]string{"repl-diskless-sync no"}, o.Args...)
	}
	if set.servers, err = launchAll(ctx, servers[:1], dataServer, tb); err != nil {
		return nil, err
	}
	primary := set.servers[0]
	for i := range servers[1:] {
		servers[1+i].ReplicaOf = primary
	}
	replicas, err := launchAll(ctx, servers[1:], dataServer, tb)
	if err != nil {
		return nil, err
	}
	set.servers = append(set.servers, replicas...)
	if err := set.waitReplicas(ctx, primary); err != nil {
		return nil, err
	}
	for i := range sentinels {
		sentinels[i].Args = append([]string{
			fmt.Sprintf("sentinel monitor %s %s %d %d", MasterName, primary.host(), primary.port, o.Sentinels/2+1),
			fmt.Sprintf("sentinel down-after-milliseconds %s %d", MasterName, o.DownAfter.Milliseconds()),
			fmt.Sprintf("sentinel failover-timeout %s 10000", MasterName),
		}, o.SentinelArgs...)
	}
	if set.sentinels, err = launchAll(ctx, sentinels, sentinelServer, tb); err != nil {
		return nil, err
	}
	if err := set.WaitReady(ctx); err != nil {
		return nil, err
	}
	return set, nil
}

// Servers returns the data servers: the first primary, then its replicas.
func (set *SentinelSet) Servers() []*Server { return slices.Clone(set.servers) }

// Sentinels returns the Sentinels. All faults of a server can be done to them.
func (set *SentinelSet) Sentinels() []*Server { return slices.Clone(set.sentinels) }

// URL returns "redis+sentinel://127.0.0.1:p1,127.0.0.1:p2,.../mymaster" with
// every Sentinel.
func (set *SentinelSet) URL() string {
	return "redis+sentinel://" + addresses(set.sentinels) + "/" + MasterName
}

// Stop ends all servers and Sentinels for good. Calling it again does nothing.
func (set *SentinelSet) Stop() {
	stopAll(set.sentinels) // first, so that they see nobody die
	stopAll(set.servers)
}

// Master returns the server that a majority of all Sentinels names as the
// master, nil if there is no such majority. It may be dead: they take their time
// to notice.
func (set *SentinelSet) Master(ctx context.Context) *Server {
	ctx, cancel := context.WithTimeout(ctx, askBound)
	defer cancel()
	votes := map[*Server]int{}
	for _, named := range set.named(ctx) {
		if votes[named]++; named != nil && votes[named] > len(set.sentinels)/2 {
			return named
		}
	}
	return nil
}

// named returns whom each Sentinel names, nil for one that does not answer.
func (set *SentinelSet) named(ctx context.Context) []*Server {
	masters := make([]*Server, len(set.sentinels))
	_ = atOnce(len(masters), func(i int) error {
		if !set.sentinels[i].Running() {
			return nil
		}
		at, err := set.sentinels[i].Client().Do(ctx, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MasterName).StringSlice()
		if err == nil && len(at) == 2 {
			masters[i] = set.at(net.JoinHostPort(at[0], at[1]))
		}
		return err
	})
	return masters
}

func (set *SentinelSet) at(addr string) *Server {
	for _, s := range set.servers {
		if s.Addr() == addr {
			return s
		}
	}
	return nil
}

// Failover makes a Sentinel replace the master although it is well (SENTINEL
// FAILOVER), and returns once every running Sentinel names the same other server
// and that one says it is the master. It waits 30 s if ctx has no deadline.
//
// The former master is not told: it goes on taking writes, all of which are lost
// when the Sentinels demote it, some ten seconds later. WaitReady waits for that.
func (set *SentinelSet) Failover(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	old := set.Master(ctx)
	if old == nil {
		return errors.New("redistest: cannot fail over: there is no majority of Sentinels that name a master; see WaitReady")
	}
	i := slices.IndexFunc(set.sentinels, (*Server).Running)
	if err := set.sentinels[i].Client().Do(ctx, "SENTINEL", "FAILOVER", MasterName).Err(); err != nil {
		return fmt.Errorf("redistest: failing over from %s: %w", old.Addr(), err)
	}
	if err := pollLast(ctx, func() error { return set.agreed(ctx, old) }); err != nil {
		return fmt.Errorf("redistest: failing over from %s: %w", old.Addr(), err)
	}
	return nil
}

// agreed looks whether all running Sentinels name one server other than old.
func (set *SentinelSet) agreed(ctx context.Context, old *Server) error {
	fresh := set.Master(ctx)
	if fresh == nil || fresh == old {
		return errors.New("no majority names another master")
	}
	for i, named := range set.named(ctx) {
		if set.sentinels[i].Running() && named != fresh {
			return fmt.Errorf("sentinel %s does not name %s", set.sentinels[i].Addr(), fresh.Addr())
		}
	}
	info, err := fresh.replicationInfo(ctx)
	if err == nil && info["role"] != "master" {
		err = fmt.Errorf("%s has role %q", fresh.Addr(), info["role"])
	}
	return err
}

// WaitReady waits until the set is whole: every Sentinel sees the same master,
// all other Sentinels and all replicas, none of them down, no failover under
// way; and the replicas are in sync. All processes must be running for that. It
// waits 30 s if ctx has no deadline. After a failover it takes some ten seconds.
func (set *SentinelSet) WaitReady(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	err := pollLast(ctx, func() error {
		return atOnce(len(set.sentinels), func(i int) error { return set.sees(ctx, set.sentinels[i]) })
	})
	if err != nil {
		return fmt.Errorf("redistest: the Sentinels at %s are not ready: %w", addresses(set.sentinels), err)
	}
	master := set.Master(ctx)
	if master == nil {
		return fmt.Errorf("redistest: the Sentinels at %s name different masters", addresses(set.sentinels))
	}
	return set.waitReplicas(ctx, master)
}

// sees looks whether one Sentinel sees everybody. The error says whom it does
// not.
func (set *SentinelSet) sees(ctx context.Context, sentinel *Server) error {
	master := redis.NewMapStringStringCmd(ctx, "SENTINEL", "MASTER", MasterName)
	if err := sentinel.Client().Process(ctx, master); err != nil {
		return fmt.Errorf("asking sentinel %s: %w", sentinel.Addr(), err)
	}
	if flags := master.Val()["flags"]; flags != "master" {
		return fmt.Errorf("sentinel %s sees a master that is %q", sentinel.Addr(), flags)
	}
	for _, others := range []struct {
		what, flags string
		count       int
	}{
		{"REPLICAS", "slave", len(set.servers) - 1},
		{"SENTINELS", "sentinel", len(set.sentinels) - 1},
	} {
		list := redis.NewMapStringStringSliceCmd(ctx, "SENTINEL", others.what, MasterName)
		if err := sentinel.Client().Process(ctx, list); err != nil {
			return fmt.Errorf("asking sentinel %s: %w", sentinel.Addr(), err)
		}
		if got := len(list.Val()); got != others.count {
			return fmt.Errorf("sentinel %s sees %d %s of %d", sentinel.Addr(), got, others.what, others.count)
		}
		for _, other := range list.Val() {
			if flags := other["flags"]; flags != others.flags {
				return fmt.Errorf("sentinel %s sees %s as %q", sentinel.Addr(), other["name"], flags)
			}
		}
	}
	return nil
}

// waitReplicas waits until all running servers but the master are in sync.
func (set *SentinelSet) waitReplicas(ctx context.Context, master *Server) error {
	return atOnce(len(set.servers), func(i int) error {
		s := set.servers[i]
		if s == master {
			s.setMaster(nil)
			return nil
		}
		s.setMaster(master)
		if !s.Running() {
			return nil
		}
		return s.WaitInSync(ctx)
	})
}
