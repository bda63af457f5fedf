package histories

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence/internal/redistest"
)

// during runs while callers call: it waits until so many more calls have been made.
func (r *realRun) during(calls int64) {
	r.t.Helper()
	all := int64(realProcesses * realCallers * realCalls)
	for until := min(r.calls.Load()+calls, all); r.calls.Load() < until; {
		time.Sleep(time.Millisecond)
	}
}

func TestRealHistoriesAreLinearizable(t *testing.T) {
	durable := redistest.Options{Args: []string{"appendonly yes", "appendfsync always"}}
	for name, c := range map[string]struct {
		setup  realSetup
		proxy  bool
		happen func(r *realRun, p *redistest.Proxy)
	}{
		"no fault": {happen: func(*realRun, *redistest.Proxy) {}},
		"killed, back with its data": {setup: realSetup{options: durable}, happen: func(r *realRun, _ *redistest.Proxy) {
			r.servers[0].Kill()
			r.during(500)
			must(r.t, r.servers[0].Restart(r.t.Context()))
		}},
		"killed, back empty": {happen: func(r *realRun, _ *redistest.Proxy) {
			r.recorder.Wiped("a", func() {
				r.servers[0].Kill()
				r.during(500)
				must(r.t, r.servers[0].Restart(r.t.Context()))
			})
		}},
		"stopped and continued": {happen: func(r *realRun, _ *redistest.Proxy) {
			r.servers[0].Pause()
			r.during(500)
			r.servers[0].Resume()
		}},
		"replies cut after execution": {proxy: true, happen: func(r *realRun, p *redistest.Proxy) {
			p.CutReplies(true)
			r.during(500)
			p.CutReplies(false)
			if p.Cuts() == 0 {
				r.t.Error("no reply was cut")
			}
		}},
		"replies cut, clients that repeat": {proxy: true, setup: realSetup{retrying: true}, happen: func(r *realRun, p *redistest.Proxy) {
			for range 10 {
				p.CutReplies(true)
				r.during(10)
				p.CutReplies(false)
				r.during(40)
			}
		}},
		"a black hole": {proxy: true, happen: func(r *realRun, p *redistest.Proxy) {
			p.Blackhole(true)
			r.during(500)
			p.Blackhole(false)
		}},
		"scripts flushed": {happen: func(r *realRun, _ *redistest.Proxy) {
			for range 20 {
				must(r.t, r.servers[0].Client().ScriptFlush(r.t.Context()).Err())
				r.during(20)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			var proxy *redistest.Proxy
			if c.proxy {
				c.setup.primary = redistest.Start(t, c.setup.options)
				var err error
				if proxy, err = redistest.NewProxy(c.setup.primary.Addr()); err != nil {
					t.Fatal(err)
				}
				defer proxy.Close()
				c.setup.proxy = proxy
			}
			r := startReal(t, c.setup)
			r.play(func() { c.happen(r, proxy) })
			r.recovered()
			if err := r.finish(); err != nil {
				t.Error(err)
			}
			r.report()
		})
	}
}

// What a failover loses is part of the history: the charges that had not reached the
// replica. Nothing else may be missing afterwards, and nothing may be charged twice.
func TestRealHistoryOfAFailoverLosesOnlyWhatTheReplicaHadNot(t *testing.T) {
	primary := redistest.Start(t, redistest.Options{Args: []string{"repl-diskless-sync no"}})
	replica := redistest.Start(t, redistest.Options{ReplicaOf: primary})
	must(t, replica.WaitInSync(t.Context()))
	r := startReal(t, realSetup{primary: primary, replica: replica})
	r.play(func() {
		r.recorder.Lagged("a", func() {
			primary.Kill()
			r.during(500)
			must(t, replica.Promote(t.Context()))
		})
	})
	r.recovered()
	if err := r.finish(replica, r.servers[1]); err != nil {
		t.Error(err)
	}
	r.report()
}

func TestPlantedBugsAreCaughtOnRealServers(t *testing.T) {
	for name, plantOne := range map[string]func() (realSetup, func(r *realRun)){
		"double charge": func() (realSetup, func(*realRun)) {
			return realSetup{hook: &saboteur{do: func(ctx context.Context, next redis.ProcessHook, cmd redis.Cmder) error {
				return next(ctx, cmd)
			}}}, func(*realRun) {}
		},
		"lost charge": func() (realSetup, func(*realRun)) {
			s := &saboteur{}
			s.do = func(ctx context.Context, next redis.ProcessHook, cmd redis.Cmder) error {
				return next(ctx, redis.NewIntCmd(ctx, "unlink", cmd.Args()[3]))
			}
			return realSetup{hook: s}, func(*realRun) {}
		},
		"FLUSHALL": func() (realSetup, func(*realRun)) {
			return realSetup{}, func(r *realRun) { must(r.t, r.servers[0].Client().FlushAll(r.t.Context()).Err()) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			setup, happen := plantOne()
			r := startReal(t, setup)
			r.play(func() { happen(r) })
			r.recovered()
			err := r.finish()
			if err == nil || !strings.Contains(err.Error(), "is not linearizable") {
				t.Fatalf("the checker did not notice: %v", err)
			}
			t.Logf("caught: %.400s", err)
		})
	}
}

// saboteur is a client's hook that now and then does something more after a charge.
type saboteur struct {
	do     func(ctx context.Context, next redis.ProcessHook, cmd redis.Cmder) error
	charge atomic.Int64
}

func (*saboteur) DialHook(next redis.DialHook) redis.DialHook { return next }

func (s *saboteur) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if err != nil || cmd.Name() != "evalsha" || s.charge.Add(1)%50 != 0 {
			return err
		}
		return s.do(ctx, next, cmd)
	}
}

func (*saboteur) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// report logs what the history holds.
func (r *realRun) report() {
	by := map[string]int{}
	for _, e := range r.recorder.Events() {
		by[sourceOf(e)]++
	}
	r.t.Logf("%d entries: %v", len(r.recorder.Events()), by)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// differ compares what a ring counted with what it should have.
func differ(got, want map[[3]string]int) error {
	for labels, n := range want {
		if got[labels] != n {
			return fmt.Errorf("%d decisions %v are counted, want %d", got[labels], labels, n)
		}
	}
	for labels, n := range got {
		if n > 0 && want[labels] == 0 {
			return fmt.Errorf("%d decisions %v are counted, want none", n, labels)
		}
	}
	return nil
}
