package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// fault is one row of the matrix, for all policies and algorithms.
type fault struct {
	name string
	does string // what happens, for the document
	// promise says what bounds the admissions, in the document's words.
	promise string

	kind  kind
	start func(ctx context.Context, s *scene) error // starts the servers, says how to break them

	away     bool          // the primary may not answer
	patient  bool          // callers wait for seconds, because nothing is away
	exact    bool          // every answer is the primary's, and the limit is admitted to the unit
	goodput  int           // percent of the calls that the primary must answer
	calls    callsKind     // what may be sent to the shard meanwhile
	already  bool          // operations fail before that, one now and then
	outages  int           // 0: one
	untold   bool          // see situation
	shut     bool          // the breaker must not open
	atOpen   bool          // it is there before the processes are
	comeback time.Duration // how long the servers take to mend it themselves
	selfHeal bool          // recovery counts from the beginning
	since    time.Duration // see losesSince
	hold     time.Duration // instead of the plan's
	rate     int           // instead of the plan's
	step     time.Duration // of the clock
	special  func(ctx context.Context, r *runner, f fault) []outcome
}

type kind int

const (
	lonePair kind = iota // single servers: one alone, one with a replica
	group                // a Sentinel set or a cluster
	eight                // a ring of eight
)

const (
	downAfter   = 3 * time.Second // Sentinel's down-after-milliseconds
	nodeTimeout = 2 * time.Second // of the cluster
)

const (
	toTheLimit = "keys x limit"
	orSome     = orPolicy + ", and once more half of what was left at the beginning, since the primary answers one process while the other is on its share"
	orPolicy   = toTheLimit + "; open: + calls offered meanwhile; local: + keys x limit; share: + 1 a key, for rounding"
)

// matrix are all faults, in the order of the table.
var matrix = []fault{
	{name: "none", does: "Nothing: the reference.", promise: "exactly " + toTheLimit, patient: true, exact: true, start: startNone},
	{name: "kill", does: "SIGKILL. The shard without a replica is restarted empty after 3 s; the replica of the other is promoted then.",
		promise: orPolicy + "; without a replica + what was charged before, which nobody has any more; share: + calls in 100 ms, which the replica may not have heard of",
		away:    true, calls: callsDead, start: startKill},
	{name: "stop", does: "SIGSTOP for 3 s: connections stay open, nothing is answered.", promise: orPolicy, away: true, calls: callsDead, start: startStop},
	{name: "drop", does: "Every packet is lost for 3 s, in a network namespace.", promise: orPolicy, away: true, calls: callsDead, start: startDrop(100)},
	{name: "loss-50", does: "Half of the packets are lost for 3 s.", promise: orSome, away: true, untold: true, start: startDrop(50)},
	{name: "latency-under", does: "Replies take 10 ms longer, less than the budget.", promise: orPolicy, away: true, goodput: 90, start: startLatency(10 * time.Millisecond)},
	{name: "latency-over", does: "Replies take 150 ms longer, three times the budget.", promise: orSome, away: true, untold: true, calls: callsSick, start: startLatency(150 * time.Millisecond)},
	{name: "reply-cut", does: "The server executes, and the connection is cut before the reply arrives: for some milliseconds now and then, and after half of the 3 s for every reply.", promise: orPolicy, away: true, calls: callsDead, already: true, start: startReplyCut},
	{name: "pool", does: "The only connection of the client that was given to ringfence is held by others for 3 s.", promise: orPolicy, away: true, shut: true, start: startPool},
	{name: "oom", does: "maxmemory is exceeded under noeviction: writes are refused, reads are not.", promise: orPolicy, away: true, calls: callsSick, start: startConfig("maxmemory", "1", "0")},
	{name: "misconf", does: "A background save has failed: writes are refused, reads are not.", promise: orPolicy, away: true, calls: callsSick, start: startMisconf},
	{name: "busy", does: "A script runs for 3 s; after 100 ms Redis says BUSY.", promise: orPolicy, away: true, calls: callsDead, start: startBusy},
	{name: "loading", does: "The server loads its data for 3 s.", promise: orPolicy, away: true, calls: callsDead, start: startLoading},
	{name: "noreplicas", does: "min-replicas-to-write is not met: writes are refused, reads are not.", promise: orPolicy, away: true, calls: callsSick, start: startConfig("min-replicas-to-write", "3", "0")},
	{name: "script-flush", does: "SCRIPT FLUSH ten times under load.", promise: "exactly " + toTheLimit, patient: true, exact: true, start: startFlush("SCRIPT", "FLUSH", 10)},
	{name: "flushall", does: "FLUSHALL under load.", promise: toTheLimit + " + what was charged before", patient: true, start: startFlush("FLUSHALL", "SYNC", 1)},
	{name: "sentinel-kill", kind: group, does: "A Sentinel set's master is killed.", promise: orPolicy + "; + calls in 100 ms, which the replica may not have heard of",
		away: true, calls: callsDead, selfHeal: true, comeback: downAfter + 2100*time.Millisecond, start: startSentinel(sentinelKill)},
	{name: "sentinel-stop", kind: group, does: "A Sentinel set's master gets SIGSTOP, and SIGCONT when another has taken over.", promise: orPolicy + "; + calls in 100 ms",
		away: true, calls: callsDead, selfHeal: true, comeback: downAfter + 2100*time.Millisecond, start: startSentinel(sentinelStop)},
	{name: "sentinel-partition", kind: group, does: "The master is cut off from its replicas and Sentinels, while processes reach all of them.",
		promise: orPolicy + "; + twice what was left at the beginning: both masters may admit it, and shares of what a replica that hears nothing says",
		hold:    6 * time.Second, away: true, selfHeal: true, since: downAfter + 2*time.Second, comeback: downAfter + 2100*time.Millisecond, start: startSentinel(sentinelPartition)},
	{name: "sentinel-planned", kind: group, does: "SENTINEL FAILOVER; the old master takes writes until it is told.",
		promise: orPolicy + "; + calls in 2 s and at most what was left at the beginning, twice: by the old master, and by shares of what a replica that hears nothing of it says",
		hold:    6 * time.Second, away: true, selfHeal: true, since: 2 * time.Second, comeback: 2100 * time.Millisecond, start: startSentinel(sentinelPlanned)},
	{name: "cluster-master-lost", kind: group, does: "The master of a Redis Cluster that owns the keys is killed.", promise: orPolicy + "; + calls in 100 ms",
		away: true, calls: callsDead, selfHeal: true, comeback: nodeTimeout + 5500*time.Millisecond, start: startClusterLost},
	{name: "slot-moved", kind: group, does: "The slots of a key of every cell move to another master and back, under load.", promise: "exactly " + toTheLimit, patient: true, exact: true, start: startSlotMoved},
	{name: "clock+30s", does: "The primary's clock steps 30 s forward; window 4 s.", promise: clockPromise, step: 30 * time.Second, special: runClock},
	{name: "clock-30s", does: "The primary's clock steps 30 s back; window 4 s.", promise: clockPromise, step: -30 * time.Second, special: runClock},
	{name: "clock+1h", does: "The primary's clock steps an hour forward; window 4 s.", promise: clockPromise, step: time.Hour, special: runClock},
	{name: "clock-1h", does: "The primary's clock steps an hour back; window 4 s.", promise: clockPromise, step: -time.Hour, special: runClock},
	{name: "flapping", does: "SIGSTOP and SIGCONT ten times, a second each.",
		promise: toTheLimit + "; open: + calls offered meanwhile; local: + keys x limit; share: + 1 a key and outage, and once more half of what was left at the beginning, by processes that return before the other has told",
		away:    true, calls: callsDead, outages: 10, untold: true, hold: 20 * time.Second, rate: 100, start: startFlapping},
	{name: "down-at-start", does: "Everything, replicas too, is down when the processes start, and for 3 s more.", promise: orPolicy, away: true, calls: callsDead, atOpen: true, start: startDown},
	{name: "three-of-eight", kind: eight, does: "1,000,000 calls a minute on a ring of eight shards, of which one is killed, one stopped and one killed, one after another; all are mended later.",
		promise: toTheLimit + ", and for keys of the three + keys x limit, since what they held is lost; open: + calls for such keys; local: + keys x limit again for such keys", special: runEight},
}

func byName(name string) (fault, error) {
	names := make([]string, len(matrix))
	for i, f := range matrix {
		if f.name == name {
			return f, nil
		}
		names[i] = f.name
	}
	return fault{}, fmt.Errorf("no fault %q; there are: %s", name, strings.Join(names, " "))
}

func startNone(ctx context.Context, s *scene) error {
	_, err := s.servers(ctx, redistest.Options{})
	return err
}

func startKill(ctx context.Context, s *scene) error {
	t, err := s.servers(ctx, redistest.Options{})
	if err != nil {
		return err
	}
	s.lone.loses, s.pair.loses = losesAll, losesLag
	s.inject = t.silently((*redistest.Server).Kill)
	s.heal = func(ctx context.Context) error {
		return errors.Join(t.lone.Restart(ctx), t.replica.Promote(ctx))
	}
	return nil
}

func startStop(ctx context.Context, s *scene) error {
	t, err := s.servers(ctx, redistest.Options{})
	if err != nil {
		return err
	}
	s.inject, s.heal = t.silently((*redistest.Server).Pause), t.silently((*redistest.Server).Resume)
	return nil
}

func startDrop(percent float64) func(ctx context.Context, s *scene) error {
	return func(ctx context.Context, s *scene) error {
		n, err := redistest.LaunchNetns()
		if err != nil {
			return err
		}
		s.later(n.Stop)
		if _, err := s.servers(ctx, redistest.Options{Netns: n}); err != nil {
			return err
		}
		s.inject = func(context.Context) error { n.Loss(percent); return nil }
		s.heal = func(context.Context) error { n.Loss(0); return nil }
		return nil
	}
}

// proxies puts one before each primary.
func (s *scene) proxies(ctx context.Context) (a, b *redistest.Proxy, err error) {
	t, err := s.servers(ctx, redistest.Options{})
	if err != nil {
		return nil, nil, err
	}
	if a, err = s.proxy(t.lone); err != nil {
		return nil, nil, err
	}
	if b, err = s.proxy(t.primary); err != nil {
		return nil, nil, err
	}
	s.lone, s.pair = placeOf(a.Addr(), t.lone, nil), placeOf(b.Addr(), t.primary, t.replica)
	return a, b, nil
}

func startLatency(d time.Duration) func(ctx context.Context, s *scene) error {
	return func(ctx context.Context, s *scene) error {
		a, b, err := s.proxies(ctx)
		s.inject = func(context.Context) error { a.SetDelay(d); b.SetDelay(d); return nil }
		s.heal = func(context.Context) error { a.SetDelay(0); b.SetDelay(0); return nil }
		return err
	}
}

func startReplyCut(ctx context.Context, s *scene) error {
	a, b, err := s.proxies(ctx)
	s.inject = func(ctx context.Context) error {
		// At first one reply at a time: whoever sent it again would find a server that
		// answers, and be charged twice.
		for end := time.Now().Add(s.hold / 2); time.Now().Before(end); {
			for _, p := range []*redistest.Proxy{a, b} {
				before := p.Cuts()
				p.CutReplies(true)
				poll(ctx, func() bool { return p.Cuts() > before || time.Now().After(end) })
				p.CutReplies(false)
			}
			sleepUntil(ctx, time.Now().Add(50*time.Millisecond))
		}
		a.CutReplies(true)
		b.CutReplies(true)
		return nil
	}
	s.heal = func(context.Context) error {
		a.CutReplies(false)
		b.CutReplies(false)
		if a.Cuts() == 0 || b.Cuts() == 0 {
			return errors.New("no reply was cut")
		}
		return nil
	}
	return err
}

// startPool gives every process a client with one connection, which others then hold.
func startPool(ctx context.Context, s *scene) error {
	t, err := s.servers(ctx, redistest.Options{})
	if err != nil {
		return err
	}
	var clients []*redis.Client
	given := func(to *place, primary *redistest.Server) {
		url, plain := primary.Addr(), to.faulty
		to.dialed = ""
		to.faulty = func() ringfence.ShardConfig {
			client := redis.NewClient(&redis.Options{
				Addr: url, PoolSize: 1, PoolTimeout: 20 * time.Millisecond, MaxRetries: -1,
				DialTimeout: operationTimeout, ReadTimeout: operationTimeout, WriteTimeout: operationTimeout,
			})
			clients = append(clients, client)
			s.later(func() { _ = client.Close() })
			c := plain()
			c.Primary, c.Client = "", client
			return c
		}
	}
	given(s.lone, t.lone)
	given(s.pair, t.primary)
	var held sync.WaitGroup
	s.inject = func(ctx context.Context) error {
		errs := make([]error, len(clients))
		var holding sync.WaitGroup
		for i, client := range clients {
			conn := client.Conn()
			holding.Go(func() {
				// Busy itself, the process may have to try for the connection more than once.
				if !poll(ctx, func() bool { errs[i] = conn.Ping(ctx).Err(); return !errors.Is(errs[i], redis.ErrPoolTimeout) }) {
					return
				}
				held.Go(func() {
					defer conn.Close()
					_ = conn.BLPop(ctx, s.hold.Round(time.Second), "nothing").Err() // it ends by its time-out
				})
			})
		}
		holding.Wait()
		return errors.Join(errs...)
	}
	s.heal = func(context.Context) error { held.Wait(); return nil }
	return nil
}

// startConfig is a fault that a setting brings about.
func startConfig(name, bad, good string) func(ctx context.Context, s *scene) error {
	return func(ctx context.Context, s *scene) error {
		t, err := s.servers(ctx, redistest.Options{})
		set := func(value string) func(ctx context.Context) error {
			return func(ctx context.Context) error {
				return t.both(func(s *redistest.Server) error { return s.Client().ConfigSet(ctx, name, value).Err() })
			}
		}
		s.inject, s.heal = set(bad), set(good)
		return err
	}
}

func startMisconf(ctx context.Context, s *scene) error {
	t, err := s.servers(ctx, redistest.Options{Args: []string{"enable-protected-configs yes", "save 3600 1000000"}})
	s.inject = func(ctx context.Context) error {
		return t.both(func(server *redistest.Server) error {
			dir, err := os.MkdirTemp("", "ringfence-chaos-")
			if err != nil {
				return err
			}
			c := server.Client()
			// A directory that is gone cannot be saved to.
			if err := errors.Join(c.ConfigSet(ctx, "dir", dir).Err(), os.Remove(dir), c.BgSave(ctx).Err()); err != nil {
				return err
			}
			if !poll(ctx, func() bool {
				info, err := c.Info(ctx, "persistence").Result()
				return err == nil && strings.Contains(info, "rdb_last_bgsave_status:err")
			}) {
				return errors.New("the background save does not fail")
			}
			return nil
		})
	}
	s.heal = func(ctx context.Context) error {
		return t.both(func(server *redistest.Server) error {
			return server.Client().ConfigSet(ctx, "stop-writes-on-bgsave-error", "no").Err()
		})
	}
	return err
}

// occupy runs a command on both primaries that keeps them until heal's has been sent.
func (s *scene) occupy(t trio, command, end []any) {
	var busy sync.WaitGroup
	s.inject = func(context.Context) error {
		return t.both(func(server *redistest.Server) error {
			client := redis.NewClient(&redis.Options{Addr: server.Addr(), MaxRetries: -1, ReadTimeout: time.Minute})
			busy.Go(func() {
				defer client.Close()
				_ = client.Do(context.Background(), command...).Err() // that it was killed
			})
			return nil
		})
	}
	s.heal = func(ctx context.Context) error {
		var err error
		if end != nil {
			err = t.both(func(server *redistest.Server) error { return server.Client().Do(ctx, end...).Err() })
		}
		busy.Wait()
		return err
	}
}

func startBusy(ctx context.Context, s *scene) error {
	t, err := s.servers(ctx, redistest.Options{Args: []string{"busy-reply-threshold 100"}})
	s.occupy(t, []any{"EVAL", "while true do end", 0}, []any{"SCRIPT", "KILL"})
	return err
}

func startLoading(ctx context.Context, s *scene) error {
	t, err := s.servers(ctx, redistest.Options{Args: []string{"enable-debug-command yes", "loading-process-events-interval-bytes 1024"}})
	if err != nil {
		return err
	}
	// Loading takes a millisecond for every key.
	err = t.both(func(server *redistest.Server) error {
		c := server.Client()
		return errors.Join(c.Do(ctx, "DEBUG", "POPULATE", s.hold.Milliseconds(), "filler", 10).Err(), c.ConfigSet(ctx, "key-load-delay", "1000").Err())
	})
	s.occupy(t, []any{"DEBUG", "RELOAD"}, nil)
	return err
}

// startFlush does it several times while the load is on.
func startFlush(command, arg string, times int) func(ctx context.Context, s *scene) error {
	return func(ctx context.Context, s *scene) error {
		t, err := s.servers(ctx, redistest.Options{})
		if command == "FLUSHALL" {
			s.lone.loses, s.pair.loses = losesAll, losesAll
		}
		s.inject = func(ctx context.Context) error {
			for i := range times {
				if i > 0 {
					sleepUntil(ctx, time.Now().Add(s.hold/time.Duration(2*times)))
				}
				if err := t.both(func(server *redistest.Server) error { return server.Client().Do(ctx, command, arg).Err() }); err != nil {
					return err
				}
			}
			return nil
		}
		return err
	}
}

func startFlapping(ctx context.Context, s *scene) error {
	t, err := s.servers(ctx, redistest.Options{})
	pause, resume := t.silently((*redistest.Server).Pause), t.silently((*redistest.Server).Resume)
	s.inject = func(ctx context.Context) error {
		for range 10 {
			_ = pause(ctx)
			s.down(true)
			sleepUntil(ctx, time.Now().Add(s.hold/20))
			s.down(false)
			_ = resume(ctx)
			sleepUntil(ctx, time.Now().Add(s.hold/20))
		}
		return nil
	}
	return err
}

func startDown(ctx context.Context, s *scene) error {
	t, err := s.servers(ctx, redistest.Options{})
	if err != nil {
		return err
	}
	s.inject = func(context.Context) error { t.lone.Kill(); t.primary.Kill(); t.replica.Kill(); return nil }
	s.heal = func(ctx context.Context) error {
		return errors.Join(t.lone.Restart(ctx), t.primary.Restart(ctx), t.replica.Restart(ctx))
	}
	return nil
}
