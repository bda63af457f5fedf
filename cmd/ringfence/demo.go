package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

const demoUsage = `usage: ringfence demo [flags]

Four app instances share a ring of three shards and one limit. A shard is killed and
comes back while the callers go on. It takes about 17 seconds, needs no Redis, and ends
with a summary; the exit code is 0 if everything held.

`

const (
	appCount   = 4
	shardCount = 3
	victim     = 1 // the index of the shard that is killed
	// maxOpenPeriod makes breakers look for the shard at least once a second (default 5
	// s), so that nobody has to wait for its return.
	maxOpenPeriod = time.Second
)

// script is the numbers of the play.
type script struct {
	limit         int // of a user
	usersPerShard int // in a phase
	each          int // calls for every user in a phase, by all apps together
	rate          int // calls a second, of all apps together
	// most is the longest a phase may take; a slow machine makes fewer calls.
	most time.Duration
	// budget is the longest a caller waits. It is far above the default of 20 ms, because
	// the embedded shards are no Redis: they make a few thousand decisions a second, and
	// on a busy machine one of them may take a while.
	budget time.Duration
	// linger is how long the apps go on after all of them have found the shard again.
	linger time.Duration
	// mishap, if not nil, is called when a phase begins; tests spoil the play with it.
	mishap func(phase int, apps []*app)
}

// standardScript takes 3 x 4.5 s and the return of the shard, 26 s at the very most.
var standardScript = script{
	limit: 100, usersPerShard: 4, each: 300, rate: 800,
	most: 6500 * time.Millisecond, budget: time.Second, linger: time.Second,
}

// runDemo reads the flags and plays.
func runDemo(ctx context.Context, args []string, s script, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	servers := flags.Bool("redis", false, "start real redis-servers, each shard with a replica, instead of embedded shards")
	noColor := flags.Bool("no-color", false, "use no colours (so does the environment variable NO_COLOR)")
	if code, done := parse(flags, demoUsage, args, stdout, stderr); done {
		return code
	}
	live := isTerminal(stdout)
	d := &demo{
		script: s, began: time.Now(), real: *servers,
		screen:  &screen{w: stdout, live: live},
		palette: palette{on: live && !*noColor && os.Getenv("NO_COLOR") == ""},
	}
	err := d.run(ctx)
	d.screen.clear()
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "ringfence demo: interrupted; everything is stopped")
		return exitInterrupted
	case errors.Is(err, redistest.ErrNoRedis):
		fmt.Fprintf(stderr, "ringfence demo: --redis needs redis-server 7.0 or later, which was not found.\n"+
			"Install it (Debian: apt-get install redis-server; macOS: brew install redis) or\n"+
			"name the binary in %s. Without --redis nothing is needed.\n", redistest.BinaryEnv)
		return exitUsage
	case err != nil:
		fmt.Fprintln(stderr, "ringfence demo:", err)
		return exitFailed
	}
	d.screen.say(d.result.lines(d.palette, time.Since(d.began))...)
	return d.result.exitCode()
}

// demo is one performance. Its methods belong to one goroutine; the callers have theirs.
type demo struct {
	script
	began   time.Time
	real    bool
	screen  *screen
	palette palette
	events  events

	cluster  cluster
	apps     []*app
	dead     bool // the victim
	nextUser int
	admitted map[string]int // by user, in the phases before
	result   result
}

// run plays from beginning to end. The error is that it could not be played, or ctx's.
func (d *demo) run(ctx context.Context) (err error) {
	d.admitted = map[string]int{}
	d.result = result{limit: d.limit, budget: d.budget, apps: appCount, victim: shardID(victim), toOpen: -1, toClose: -1}
	d.screen.say(d.palette.bold("ringfence demo") + ": 4 app instances, a ring of 3 Redis shards, one shared limit")
	if err := d.start(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	d.introduce()

	users, err := d.pick()
	if err != nil {
		return err
	}
	d.chapter(phaseHealthy, fmt.Sprintf("All shards are up. %d users, %d on each shard. Each user calls %d times, at all apps in turn, and %d of the calls must be admitted.",
		len(users), d.usersPerShard, d.each, d.limit))
	b, err := d.play(ctx, phaseHealthy, users, d.each, nil)
	if err != nil {
		return err
	}
	d.conclude(phaseHealthy, b, users)

	if users, err = d.pick(); err != nil {
		return err
	}
	if err := d.outage(ctx, users); err != nil {
		return err
	}
	if err := d.comeback(ctx, users); err != nil {
		return err
	}

	if users, err = d.pick(); err != nil {
		return err
	}
	d.chapter(phaseAgain, fmt.Sprintf("All shards are up again. %d new users: the limit must be exact again, on %s too.", len(users), shardID(victim)))
	if b, err = d.play(ctx, phaseAgain, users, d.each, nil); err != nil {
		return err
	}
	d.conclude(phaseAgain, b, users)
	return nil
}

// outage kills the shard when its users have used up 40 % of their limit.
func (d *demo) outage(ctx context.Context, users []user) error {
	shard := shardID(victim)
	d.chapter(phaseKilled, fmt.Sprintf("%d new users. When they have used 40 %% of their limit, %s is killed. Nobody tells the apps.", len(users), shard))
	var killed time.Time
	before, latest := 0, time.Now().Add(d.most/3)
	b, err := d.play(ctx, phaseKilled, users, d.each, func(b *board) (bool, error) {
		if !d.dead {
			if b.asked() < d.limit*len(users)*2/5 && time.Now().Before(latest) {
				return false, nil
			}
			t := b.shardTally(shard)
			before = t.answers()
			killed, d.dead = time.Now(), true
			d.story(">>", d.palette.red(shard+" is killed")+d.how())
			return false, d.cluster.kill(victim)
		}
		if _, open := d.breakers(shard); open == appCount && d.result.toOpen < 0 {
			d.result.toOpen = time.Since(killed)
		}
		return false, nil
	})
	if err != nil {
		return err
	}
	t := b.shardTally(shard)
	d.result.outage = tally{took: t.took[before:]}
	d.conclude(phaseKilled, b, users)
	return nil
}

func (d *demo) how() string {
	if d.real {
		return " (SIGKILL); its replica lives, but is not promoted"
	}
	return "; it has no replica"
}

// comeback starts the shard again and goes on until all apps have found it.
func (d *demo) comeback(ctx context.Context, users []user) error {
	shard := shardID(victim)
	d.chapter(phaseBack, shard+" is started again, empty. The same users go on calling until every app has found it.")
	var back, found time.Time
	calls := int(d.most.Seconds() * float64(d.rate))
	b, err := d.play(ctx, phaseBack, users, calls/len(users), func(b *board) (bool, error) {
		if d.dead {
			if b.asked() < len(users) {
				return false, nil // see it dead once more
			}
			if err := d.cluster.revive(ctx, victim); err != nil {
				return true, err
			}
			back, d.dead = time.Now(), false
			b.forget(shard)
			d.story(">>", d.palette.green(shard+" is back"))
			return false, nil
		}
		if found.IsZero() {
			if _, open := d.breakers(shard); open == 0 {
				if d.result.toClose < 0 {
					d.result.toClose = time.Since(back)
				}
				if b.heardFrom(shard) == appCount {
					found = time.Now()
				}
			}
			return false, nil
		}
		return time.Since(found) >= d.linger, nil
	})
	if err != nil {
		return err
	}
	if found.IsZero() {
		d.result.toClose = -1
	}
	d.conclude(phaseBack, b, users)
	return nil
}

// start starts the shards and opens a ring for every app.
func (d *demo) start(ctx context.Context) error {
	var err error
	if d.real {
		d.screen.say(fmt.Sprintf("Starting %d redis-servers: %d primaries, each with a replica ...", 2*shardCount, shardCount))
		// A typed nil in an interface would not be nil.
		if c, e := startRedis(ctx, shardCount); e == nil {
			d.cluster = c
		} else {
			err = e
		}
	} else if c, e := startEmbedded(shardCount); e == nil {
		d.cluster = c
	} else {
		err = e
	}
	if err != nil {
		return err
	}
	d.result.replicated = d.cluster.replicated()
	for i := range appCount {
		name := fmt.Sprintf("app-%d", i+1)
		a, err := d.open(ctx, name)
		if err != nil {
			return errors.Join(err, d.stop())
		}
		d.apps = append(d.apps, a)
	}
	return nil
}

// open is what every app does.
func (d *demo) open(ctx context.Context, name string) (*app, error) {
	ring, err := ringfence.Open(ctx, ringfence.Config{
		NearCacheKeys:    -1, // denials that an app repeats by itself would hide which shard answers, and which is away
		Shards:           d.cluster.shards(),
		Instances:        appCount,
		InstanceID:       name,
		HashKey:          []byte("not secret: demo"), // the same users in every performance
		Policy:           ringfence.PolicyLocal,
		Budget:           d.budget,
		OperationTimeout: 2 * d.budget,
		Breaker:          ringfence.BreakerConfig{MaxOpenPeriod: maxOpenPeriod},
		Strict:           true, // a demo without shards proves nothing
		Logger:           slog.New(d.events.handler(name)),
	})
	if err != nil {
		return nil, err
	}
	// An hour, of which the demo sees seconds: no quota comes back, so that counting
	// proves the limit.
	limiter, err := ring.Limiter("calls", ringfence.SlidingLog{Limit: int64(d.limit), Window: time.Hour})
	if err != nil {
		return nil, errors.Join(err, ring.Close())
	}
	return &app{name: name, ring: ring, limiter: limiter}, nil
}

// stop closes the rings, then the shards.
func (d *demo) stop() error {
	errs := make([]error, len(d.apps))
	var wg sync.WaitGroup
	for i, a := range d.apps {
		wg.Go(func() { errs[i] = a.ring.Close() })
	}
	wg.Wait()
	d.apps = nil
	return errors.Join(append(errs, d.cluster.close())...)
}

func (d *demo) introduce() {
	var where []string
	for _, s := range d.cluster.shards() {
		where = append(where, s.ID+" at "+strings.TrimPrefix(s.Primary, "redis://"))
	}
	what := "The shards are embedded in this process, and speak Redis"
	if d.real {
		what = "The shards are real redis-servers, each with a replica"
	}
	d.screen.say("")
	d.screen.say(wrap("", fmt.Sprintf("Every user may make %d calls an hour, whichever app is asked. Each user belongs to one shard, which counts for all apps.", d.limit))...)
	d.screen.say(wrap("", fmt.Sprintf("%s: %s.", what, strings.Join(where, ", ")))...)
	d.screen.say(wrap("", fmt.Sprintf("A caller waits %s at most (20 ms unless configured; a demo must hold on a busy machine too).", short(d.budget)))...)
}

// pick finds users that nobody has asked for yet, as many on every shard, in turn.
func (d *demo) pick() ([]user, error) {
	byShard := map[string][]user{}
	missing := shardCount * d.usersPerShard
	const tries = 100_000
	for range tries {
		if missing == 0 {
			break
		}
		d.nextUser++
		u := user{name: fmt.Sprintf("user-%d", d.nextUser)}
		u.shard, _ = d.apps[0].limiter.Locate(u.name)
		if len(byShard[u.shard]) < d.usersPerShard {
			byShard[u.shard] = append(byShard[u.shard], u)
			missing--
		}
	}
	if missing > 0 {
		return nil, fmt.Errorf("%d names do not give every shard %d users", tries, d.usersPerShard)
	}
	var out []user
	for i := range d.usersPerShard {
		for s := range shardCount {
			out = append(out, byShard[shardID(s)][i])
		}
	}
	return out, nil
}

var titles = map[int]string{
	phaseHealthy: "healthy",
	phaseKilled:  shardID(victim) + " is killed",
	phaseBack:    shardID(victim) + " comes back",
	phaseAgain:   "healthy again",
}

// play runs one phase: the callers call, the table is drawn, and what the rings log is
// told. It ends when the calls are made, tick says it is enough, or the phase has taken
// the most it may.
func (d *demo) play(ctx context.Context, phase int, users []user, each int, tick func(*board) (enough bool, err error)) (*board, error) {
	if d.mishap != nil {
		d.mishap(phase, d.apps)
	}
	b := newBoard(len(d.apps))
	callCtx, stop := context.WithTimeout(ctx, d.most)
	defer stop()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		callers{apps: d.apps, users: users, each: each, rate: d.rate}.run(callCtx, b)
	}()
	total := each * len(users)
	if phase == phaseBack {
		total = 0
	}
	const look, draw, line = 10 * time.Millisecond, 100 * time.Millisecond, time.Second
	const settle = 250 * time.Millisecond // for the other apps to log the same
	began := time.Now()
	drawn, told := time.Time{}, began
	beat := time.NewTicker(look)
	defer beat.Stop()
	for running := true; running; {
		var err error
		select {
		case <-ended:
			running = false
		case <-beat.C:
			var enough bool
			if tick != nil && callCtx.Err() == nil {
				if enough, err = tick(b); enough || err != nil {
					stop()
				}
			}
		}
		if err != nil {
			<-ended
			return nil, err
		}
		now := time.Now()
		d.tell(now.Add(-settle))
		if d.screen.live {
			if now.Sub(drawn) >= draw || !running {
				drawn = now
				d.screen.draw(d.picture(phase, b, total).lines(d.palette))
			}
		} else if now.Sub(told) >= line && running && !d.events.waiting() {
			told = told.Add(line)
			d.screen.say(d.picture(phase, b, total).plainLine())
		}
	}
	d.tell(time.Now().Add(time.Hour)) // all
	return b, ctx.Err()
}

// picture is the table now.
func (d *demo) picture(phase int, b *board, total int) frame {
	f := frame{
		title:   fmt.Sprintf("phase %d of 4: %s", phase, titles[phase]),
		elapsed: time.Since(d.began), done: -1,
		legend: []string{
			"primary: the shard itself, exact.   local: the app alone, with a quarter of the",
			"limit.   replica: a quarter of what a replica says is left.   policy: nobody.",
		},
	}
	each, all := b.appTallies()
	f.all = all
	if total > 0 {
		f.done = float64(all.answers()) / float64(total)
	}
	for i, a := range d.apps {
		f.apps = append(f.apps, appRow{a.name, each[i]})
	}
	for i := range shardCount {
		s := shardRow{id: shardID(i), dead: d.dead && i == victim, tally: b.shardTally(shardID(i))}
		s.closed, s.open = d.breakers(s.id)
		f.shards = append(f.shards, s)
	}
	return f
}

// breakers counts the apps' circuit breakers of a shard; half-open counts as open: no
// caller gets through.
func (d *demo) breakers(shard string) (closed, open int) {
	for _, a := range d.apps {
		for _, s := range a.ring.Stats() {
			switch {
			case s.ID != shard:
			case s.Breaker.State == ringfence.BreakerClosed:
				closed++
			default:
				open++
			}
		}
	}
	return closed, open
}

// chapter begins a phase in the story.
func (d *demo) chapter(phase int, text string) {
	d.screen.say("", d.palette.bold(fmt.Sprintf("Phase %d of 4: %s", phase, titles[phase])))
	d.screen.say(wrap("", text)...)
}

// story tells one thing, with its time.
func (d *demo) story(mark, text string) {
	d.screen.say(wrap(fmt.Sprintf("%6.1f s  %s ", time.Since(d.began).Seconds(), mark), text)...)
}

// tell tells what the rings logged before this instant.
func (d *demo) tell(before time.Time) {
	for _, e := range d.events.settled(before) {
		who := strings.Join(e.apps, ", ")
		if len(e.apps) == len(d.apps) {
			who = "all apps"
		}
		at := e.first.Sub(d.began).Seconds()
		d.screen.say(wrap(fmt.Sprintf("%6.1f s  log, %s: ", at, who), e.text)...)
	}
}

// conclude turns the board of a phase into groups of the result, and tells the count.
func (d *demo) conclude(phase int, b *board, users []user) {
	counts := b.userCounts()
	split := phase == phaseKilled || phase == phaseBack
	var exact, dead group
	var names []string
	for i := range shardCount {
		id := shardID(i)
		if split && i == victim {
			dead = group{phase: phase, title: titles[phase], shards: id, tally: b.shardTally(id)}
			continue
		}
		names = append(names, id)
		exact.merge(b.shardTally(id))
	}
	exact.phase, exact.title, exact.exact = phase, titles[phase], true
	exact.shards = "all shards"
	if split {
		exact.shards = strings.Join(names, ", ")
	}
	for _, u := range users {
		r := userResult{name: u.name, quota: max(0, d.limit-d.admitted[u.name]), count: counts[u.name]}
		d.admitted[u.name] += r.admitted
		if split && u.shard == shardID(victim) {
			dead.users = append(dead.users, r)
		} else {
			exact.users = append(exact.users, r)
		}
	}
	for _, g := range []group{exact, dead} {
		if len(g.users) == 0 {
			continue
		}
		d.result.groups = append(d.result.groups, g)
		verdict := "exact"
		if g.off() != 0 || !g.exact {
			verdict = signed(g.off()) + " off"
		}
		d.story("=", fmt.Sprintf("%s: %d calls, quota %d, admitted %d (%s); answered by %s",
			g.shards, g.asked(), g.quota(), g.admitted(), verdict, sources(g.tally)))
	}
}
