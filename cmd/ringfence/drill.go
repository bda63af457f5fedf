package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

const drillUsage = `usage: ringfence drill [flags]

Rehearses an incident with real parts: three redis-servers, three app instances
under load, Prometheus with the rules of alerts/, Alertmanager and a pager. One
shard turns slow (1.4 s instead of 12 ms), the page fires, the mitigation is
applied through the run-time controls, the fault ends, recovery is verified and
the page resolves. It takes about a minute and a half, at most four, and exits
with 0 if all of it happened.

`

// The incident.
const (
	drillApps   = 3
	drillShards = 3
	slowShard   = 1 // index
	// healthyDelay is what the network adds to every reply, so that a healthy shard takes
	// the 12 ms of the incident that is rehearsed.
	healthyDelay = 12 * time.Millisecond
	// slowReply is how long the shard does nothing else, again and again.
	slowReply = 1400 * time.Millisecond
	// drillBudget is the longest a caller waits: long enough for a busy machine, too short
	// for the slow shard.
	drillBudget = 500 * time.Millisecond
	// drillBound is the longest a drill may take.
	drillBound = 4 * time.Minute
	// stepBound is the longest one step may take beyond the windows of the rules.
	stepBound = 30 * time.Second
)

// drillPlan is what tests change.
type drillPlan struct {
	scale int // the rules' windows are divided by it
	// mishap, if not nil, is called when a step begins; tests spoil the drill with it.
	mishap func(step string, d *drill)
}

var standardDrill = drillPlan{scale: 60}

// runDrill reads the flags and rehearses.
func runDrill(ctx context.Context, args []string, plan drillPlan, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("drill", flag.ContinueOnError)
	scale := flags.Int("scale", plan.scale, "how many times faster than life: the windows of the rules are divided by it, 20 to 120")
	noColor := flags.Bool("no-color", false, "use no colours (so does the environment variable NO_COLOR)")
	if code, done := parse(flags, drillUsage, args, stdout, stderr); done {
		return code
	}
	if *scale < 20 || *scale > 120 {
		fmt.Fprintf(stderr, "ringfence drill: --scale=%d: must be 20 to 120: slower takes longer than a drill may, faster leaves no samples in a window\n", *scale)
		return exitUsage
	}
	plan.scale = *scale
	d := &drill{
		drillPlan: plan, began: time.Now(), screen: &screen{w: stdout},
		palette: palette{on: isTerminal(stdout) && !*noColor && os.Getenv("NO_COLOR") == ""},
	}
	bounded, cancel := context.WithTimeout(ctx, drillBound)
	defer cancel()
	err := d.run(bounded)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "ringfence drill: interrupted; everything is stopped")
		return exitInterrupted
	case errors.Is(err, redistest.ErrNoRedis), errors.Is(err, errNoProgram):
		fmt.Fprintf(stderr, "ringfence drill: it needs redis-server 7.0 or later, Prometheus and Alertmanager:\n%v\n", err)
		return exitUsage
	case err != nil:
		fmt.Fprintln(stderr, "ringfence drill: FAILED:", err)
		return exitFailed
	}
	d.summary()
	return exitOK
}

// drill is one rehearsal. Its methods belong to one goroutine.
type drill struct {
	drillPlan
	began   time.Time
	screen  *screen
	palette palette

	servers []*redistest.Server
	proxies []*redistest.Proxy
	apps    []*app
	watch   *monitoring
	users   []user
	load    *drillLoad
	job     *slowJob
	probe   *redis.Client // of the slow shard, through its proxy
	at      struct{ fault, open, page, mitigated, healed, recovered, resolved time.Time }
	// denied and admitted are the calls for the slow shard without and with the mitigation.
	denied, admitted tally
	total            tally
}

// drillLoad is the callers of one step.
type drillLoad struct {
	board *board
	stop  context.CancelFunc
	ended chan struct{}
}

// run rehearses from beginning to end. The error is what did not happen.
func (d *drill) run(ctx context.Context) (err error) {
	d.screen.say(d.palette.bold("ringfence drill")+": one of 3 shards turns slow. Real redis-servers, Prometheus and",
		fmt.Sprintf("Alertmanager; the rules of alerts/, %d times faster than life.", d.scale), "")
	defer func() { err = errors.Join(err, d.stop()) }()
	if err := d.start(ctx); err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"calm", d.calm}, {"fault", d.fault}, {"page", d.page}, {"mitigate", d.mitigate}, {"recover", d.recover}, {"resolve", d.resolve},
	} {
		if d.mishap != nil {
			d.mishap(step.name, d)
		}
		if err := step.do(ctx); err != nil {
			return err
		}
	}
	return nil
}

// story tells what happens now.
func (d *drill) story(what, text string) { d.storyAt(time.Now(), what, text) }

// storyAt tells one event with the time since the beginning.
func (d *drill) storyAt(at time.Time, what, text string) {
	lines := wrap(fmt.Sprintf("%6.1fs  %-10s ", at.Sub(d.began).Seconds(), what), text)
	switch what {
	case "FAULT", "PAGE":
		lines[0] = strings.Replace(lines[0], what, d.palette.red(what), 1)
	case "resolved", "recovery":
		lines[0] = strings.Replace(lines[0], what, d.palette.green(what), 1)
	}
	d.screen.say(lines...)
}

// window is a window of the rules as it is now.
func (d *drill) window(w time.Duration) time.Duration { return w / time.Duration(d.scale) }

// await asks until it is so, or until most has passed. An error is asked again, too: on a
// busy machine one answer of Prometheus may come too late.
func (d *drill) await(ctx context.Context, what string, most time.Duration, so func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	for {
		d.tell()
		ok, err := so()
		if ok && err == nil {
			return nil
		}
		if !sleepUntil(ctx, time.Now().Add(50*time.Millisecond)) {
			return errors.Join(fmt.Errorf("%s: not within %s", what, short(most)), err)
		}
	}
}

// tell tells what the pager has received.
func (d *drill) tell() {
	if d.watch == nil {
		return
	}
	for _, p := range d.watch.pages.changed() {
		if p.resolved.IsZero() {
			d.storyAt(p.fired, "PAGE", p.name()+": "+p.annotations["summary"])
		} else {
			d.storyAt(p.resolved, "resolved", p.name())
		}
	}
}

func (d *drill) start(ctx context.Context) error {
	if _, err := findPrograms(); err != nil {
		return err
	}
	var gatherers []prometheus.Gatherer
	var shards []ringfence.ShardConfig
	for i := range drillShards {
		s, err := redistest.Launch(ctx, redistest.Options{Args: []string{"enable-debug-command local"}})
		if err != nil {
			return err
		}
		d.servers = append(d.servers, s)
		p, err := redistest.NewProxy(s.Addr())
		if err != nil {
			return err
		}
		p.SetDelay(healthyDelay)
		d.proxies = append(d.proxies, p)
		shards = append(shards, ringfence.ShardConfig{ID: shardID(i), Primary: "redis://" + p.Addr()})
	}
	for i := range drillApps {
		reg := prometheus.NewRegistry()
		a := &app{name: fmt.Sprintf("app-%d", i+1)}
		var err error
		a.ring, err = ringfence.Open(ctx, ringfence.Config{
			Shards: shards, Instances: drillApps, InstanceID: a.name, HashKey: []byte("not secret: demo"), Registerer: reg,
			// A healthy shard takes 12 ms here, and a busy machine some more: the
			// defaults of 20 ms and 5 ms would make the calm part an incident.
			Budget: drillBudget, OperationTimeout: 2 * drillBudget, LatencyObjective: 2 * drillBudget,
			Breaker: ringfence.BreakerConfig{Failures: 5, MaxOpenPeriod: maxOpenPeriod},
			Logger:  slog.New(slog.DiscardHandler), // the drill tells the story itself
		})
		if err != nil {
			return err
		}
		d.apps = append(d.apps, a)
		a.limiter, err = a.ring.Limiter("logins", ringfence.TokenBucket{Rate: 10_000, Per: time.Second, Burst: 10_000}, ringfence.WithPolicy(ringfence.PolicyClosed))
		if err != nil {
			return err
		}
		gatherers = append(gatherers, reg)
	}
	d.probe = redis.NewClient(&redis.Options{Addr: d.proxies[slowShard].Addr(), ReadTimeout: 10 * time.Second, MaxRetries: -1, PoolSize: 1})
	if _, err := d.ping(ctx); err != nil { // opens the connection
		return err
	}
	for i := range 60 {
		u := user{name: fmt.Sprintf("user-%d", i+1)}
		u.shard, _ = d.apps[0].limiter.Locate(u.name)
		d.users = append(d.users, u)
	}
	var err error
	if d.watch, err = startMonitoring(ctx, d.scale, gatherers); err != nil {
		return err
	}
	d.story("start", fmt.Sprintf("%s at %s; the network adds %s. %d app instances, limiter \"logins\", policy closed, no replicas.", shardID(slowShard), d.servers[slowShard].Addr(), healthyDelay, drillApps))
	d.story("", fmt.Sprintf("Prometheus %s, Alertmanager %s", d.watch.prometheus, d.watch.alertmanager))
	return nil
}

// play lets the callers call on a new board.
func (d *drill) play() *board {
	d.endLoad()
	ctx, stop := context.WithCancel(context.Background())
	l := &drillLoad{board: newBoard(len(d.apps)), stop: stop, ended: make(chan struct{})}
	d.load = l
	const rate = 120 // a second, of all apps
	go func() {
		defer close(l.ended)
		callers{apps: d.apps, users: d.users, each: rate * int(drillBound/time.Second) / len(d.users), rate: rate}.run(ctx, l.board)
	}()
	return l.board
}

// endLoad waits for the calls under way, which the budget bounds.
func (d *drill) endLoad() {
	if d.load == nil {
		return
	}
	d.load.stop()
	<-d.load.ended
	_, all := d.load.board.appTallies()
	d.total.merge(all)
	d.load = nil
}

// ping is how long the slow shard takes for the simplest question, seen by a client.
func (d *drill) ping(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	err := d.probe.Ping(ctx).Err()
	return time.Since(began), err
}

// closedEverywhere is how many shards have a closed breaker in every app.
func (d *drill) closedEverywhere() int {
	n := 0
	for i := range drillShards {
		open := slices.ContainsFunc(d.apps, func(a *app) bool { return a.ring.Stats()[i].Breaker.State != ringfence.BreakerClosed })
		if !open {
			n++
		}
	}
	return n
}

func (d *drill) calm(ctx context.Context) error {
	b := d.play()
	since := time.Now()
	quiet := d.window(shortWindow) * 3 / 2
	err := d.await(ctx, "calm: no page, and every rule evaluated", d.window(40*time.Minute)+2*stepBound, func() (bool, error) {
		sees, err := d.watch.sees(ctx)
		if err != nil {
			return false, err
		}
		n, err := d.watch.active(ctx)
		if !sees || n > 0 || d.closedEverywhere() < drillShards {
			since = time.Now()
		}
		return time.Since(since) >= quiet, err
	})
	if err != nil {
		return err
	}
	took, err := d.ping(ctx)
	if err != nil {
		return err
	}
	t := b.shardTally(shardID(slowShard))
	d.story("calm", fmt.Sprintf("no alert for %s. %s answers PING in %s; %d decisions for its keys: %s", short(quiet), shardID(slowShard), short(took), t.answers(), sources(t)))
	return nil
}

// fault keeps the one thread of the shard's server busy until recover.
func (d *drill) fault(ctx context.Context) error {
	b := d.play()
	d.at.fault = time.Now()
	d.story("FAULT", fmt.Sprintf("on %s somebody runs commands of %s, one after the other (DEBUG SLEEP): nothing else is served meanwhile. Nobody tells the apps.", shardID(slowShard), slowReply))
	d.busy(true)
	err := d.await(ctx, "circuit breakers open in every app", stepBound, func() (bool, error) {
		for _, a := range d.apps {
			if a.ring.Stats()[slowShard].Breaker.State == ringfence.BreakerClosed {
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil {
		return err
	}
	d.at.open = time.Now()
	d.story("breakers", fmt.Sprintf("open in all %d apps, %s after the fault: %s", drillApps, short(d.at.open.Sub(d.at.fault)), d.apps[0].ring.Stats()[slowShard].Breaker.LastError))
	var slowest time.Duration
	err = d.await(ctx, "a PING of more than a second", stepBound, func() (bool, error) {
		took, err := d.ping(ctx) // it comes in the middle of a command
		slowest = max(slowest, took)
		return slowest > time.Second, err
	})
	if err != nil {
		return err
	}
	t := b.shardTally(shardID(slowShard))
	d.story("", fmt.Sprintf("%s answers PING in %s", shardID(slowShard), short(slowest)))
	d.story("impact", fmt.Sprintf("callers wait no longer, but policy closed denies them: %d of %d denied", t.denied, t.answers()))
	return nil
}

// page waits for the page of the SLO redis_availability.
func (d *drill) page(ctx context.Context) error {
	most := d.window(20*time.Minute) + stepBound
	return d.await(ctx, "a page for the SLO redis_availability", most, func() (bool, error) {
		for _, p := range d.watch.pages.all() {
			if p.labels["slo_name"] == "redis_availability" && p.fired.After(d.at.fault) {
				d.at.page = p.fired
				return true, nil
			}
		}
		return false, nil
	})
}

// mitigate does what the playbook says: stop asking the shard, let its callers through.
func (d *drill) mitigate(ctx context.Context) error {
	d.story("triage", "which shard, and what happens to its callers (Ring.Stats, the dashboards' rows by shard):")
	for _, s := range d.apps[0].ring.Stats() {
		t := d.load.board.shardTally(s.ID)
		d.story("", fmt.Sprintf("%s  breaker %-9s since the fault %d allowed, %d denied", s.ID, s.Breaker.State, t.allowed, t.denied))
	}
	id := shardID(slowShard)
	d.denied = d.load.board.shardTally(id)
	if d.denied.denied == 0 {
		return errors.New("mitigate: nobody was denied, so there is nothing to mitigate")
	}
	for _, a := range d.apps {
		if err := errors.Join(a.ring.ForceBreaker(id, ringfence.BreakerForcedOpen), a.ring.SetPolicy(id, ringfence.PolicyOpen)); err != nil {
			return err
		}
	}
	d.endLoad() // calls under way were asked before the mitigation
	d.at.mitigated = time.Now()
	d.story("mitigation", fmt.Sprintf("in every app: ForceBreaker(%q, BreakerForcedOpen), SetPolicy(%q, PolicyOpen)", id, id))
	b := d.play()
	const enough = 60
	err := d.await(ctx, "calls for the slow shard after the mitigation", stepBound, func() (bool, error) {
		t := b.shardTally(id)
		return t.answers() >= enough, nil
	})
	if err != nil {
		return err
	}
	d.admitted = b.shardTally(id)
	if t := d.admitted; t.denied > 0 || t.errors > 0 || t.source[ringfence.SourcePolicy] != t.answers() {
		return fmt.Errorf("mitigate: of %d calls %d were denied and %d had errors; answered by %s", t.answers(), t.denied, t.errors, sources(t))
	}
	d.story("", fmt.Sprintf("the next %d calls for its keys: all admitted, by the policy, and none reached the shard", d.admitted.answers()))
	return nil
}

// recover ends the fault and gives the shard back.
func (d *drill) recover(ctx context.Context) error {
	id := shardID(slowShard)
	d.busy(false)
	took, err := d.ping(ctx)
	if err != nil {
		return err
	}
	if took >= slowReply {
		return fmt.Errorf("recover: %s still takes %s", id, short(took))
	}
	d.at.healed = time.Now()
	d.story("fault over", fmt.Sprintf("the commands are stopped; PING takes %s", short(took)))
	b := d.play()
	for _, a := range d.apps {
		if err := errors.Join(a.ring.ForceBreaker(id, ringfence.BreakerAuto), a.ring.ClearPolicy(id)); err != nil {
			return err
		}
	}
	d.story("", fmt.Sprintf("in every app: ForceBreaker(%q, BreakerAuto), ClearPolicy(%q)", id, id))
	err = d.await(ctx, "the primary answers every app for keys of "+id, stepBound, func() (bool, error) {
		return b.heardFrom(id) == drillApps, nil
	})
	if err != nil {
		return err
	}
	d.at.recovered = time.Now()
	d.story("recovery", fmt.Sprintf("the primary of %s has answered all %d apps, %s after the fault ended", id, drillApps, short(d.at.recovered.Sub(d.at.healed))))
	return nil
}

// resolve waits until every page is resolved and none is about to fire.
func (d *drill) resolve(ctx context.Context) error {
	b := d.play()
	most := d.window(2*time.Hour) + stepBound
	err := d.await(ctx, "every page resolved", most, func() (bool, error) {
		n, err := d.watch.active(ctx)
		if err != nil || n > 0 {
			return false, err
		}
		for _, p := range d.watch.pages.all() {
			if p.resolved.IsZero() {
				return false, nil
			}
			if p.resolved.After(d.at.resolved) {
				d.at.resolved = p.resolved
			}
		}
		return true, nil
	})
	if err != nil {
		return err
	}
	t := b.shardTally(shardID(slowShard))
	d.story("calm", fmt.Sprintf("no page is left. %d decisions for keys of %s meanwhile: %s", t.answers(), shardID(slowShard), sources(t)))
	d.endLoad()
	if d.total.errors > 0 {
		return fmt.Errorf("callers: %d of %d got an error", d.total.errors, d.total.answers())
	}
	return nil
}

func (d *drill) summary() {
	after := func(t time.Time) string { return fmt.Sprintf("%6.1f s", t.Sub(d.at.fault).Seconds()) }
	// A busy machine may have paged somebody before.
	pages := slices.DeleteFunc(d.watch.pages.all(), func(p page) bool { return p.fired.Before(d.at.fault) })
	d.screen.say("", d.palette.bold("Summary")+", seconds after the fault",
		"  breakers open   "+after(d.at.open),
		"  page received   "+after(d.at.page)+fmt.Sprintf("   the first for redis_availability, of %d", len(pages)),
		"  mitigated       "+after(d.at.mitigated)+fmt.Sprintf("   denied before: %d of %d, after: %d of %d", d.denied.denied, d.denied.answers(), d.admitted.denied, d.admitted.answers()),
		"  fault over      "+after(d.at.healed),
		"  recovered       "+after(d.at.recovered)+"   the primary answers every app",
		"  pages resolved  "+after(d.at.resolved),
		fmt.Sprintf("  callers         %d decisions, %d errors, p99 %s (budget %s)", d.total.answers(), d.total.errors, short(d.total.percentile(0.99)), short(drillBudget)),
		fmt.Sprintf("The drill held. It took %s.", short(time.Since(d.began))))
}

// stop ends everything, in the order in which nobody misses anybody.
func (d *drill) stop() error {
	d.endLoad()
	d.busy(false)
	var errs []error
	for _, a := range d.apps {
		errs = append(errs, a.ring.Close())
	}
	if d.watch != nil {
		d.watch.close()
	}
	if d.probe != nil {
		_ = d.probe.Close()
	}
	for _, p := range d.proxies {
		p.Close()
	}
	for _, s := range d.servers {
		s.Stop()
	}
	return errors.Join(errs...)
}

// slowJob is what somebody runs on the shard: commands that take slowReply each.
type slowJob struct {
	client *redis.Client
	stop   context.CancelFunc
	ended  chan struct{}
}

// busy starts or ends the job; the command under way is waited for.
func (d *drill) busy(on bool) {
	switch {
	case on && d.job == nil:
		ctx, stop := context.WithCancel(context.Background())
		s := d.servers[slowShard]
		j := &slowJob{
			client: redis.NewClient(&redis.Options{Addr: s.Addr(), ReadTimeout: 10 * time.Second, MaxRetries: -1, PoolSize: 1}),
			stop:   stop, ended: make(chan struct{}),
		}
		d.job = j
		go func() {
			defer close(j.ended)
			for ctx.Err() == nil {
				if j.client.Do(context.Background(), "DEBUG", "SLEEP", slowReply.Seconds()).Err() != nil {
					return // await sees that nothing is slow
				}
			}
		}()
	case !on && d.job != nil:
		d.job.stop()
		<-d.job.ended
		_ = d.job.client.Close()
		d.job = nil
	}
}
