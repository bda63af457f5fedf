package main

import (
	"context"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringfence/ringfence"
)

// app is one instance of the application: what would be a process of its own.
type app struct {
	name    string
	ring    *ringfence.Ring
	limiter *ringfence.Limiter
}

// user is one key of the limit.
type user struct {
	name  string
	shard string // who owns it
}

// callers ask for users in turn, from all apps at once.
type callers struct {
	apps  []*app
	users []user
	// each is how often every user is asked for, by all apps together.
	each int
	// rate is the calls a second of all apps together. Who falls behind catches up, but
	// never has more than the workers' calls under way: a slow machine makes the phase
	// longer, not the queue.
	rate int
}

// workers is how many goroutines call for one app. Two keep up with the rate at 10 ms a
// call; more would only make a queue on a slow machine.
const workers = 2

// run returns when all calls are made, or ctx ends: calls under way get their answer.
func (c callers) run(ctx context.Context, b *board) {
	perApp := int64(c.each * len(c.users) / len(c.apps))
	every := time.Duration(len(c.apps)) * time.Second / time.Duration(c.rate)
	start := time.Now()
	var wg sync.WaitGroup
	for i, a := range c.apps {
		var next atomic.Int64
		for range workers {
			wg.Go(func() {
				for {
					n := next.Add(1) - 1
					if n >= perApp || !sleepUntil(ctx, start.Add(time.Duration(n)*every)) {
						return
					}
					// All apps ask for the same user at the same time: that is the test.
					u := c.users[int(n)%len(c.users)]
					began := time.Now()
					// Not ctx: a call that was canceled would be neither allowed nor denied.
					d, err := a.limiter.Allow(context.Background(), u.name)
					b.add(i, u, d, err, time.Since(began))
				}
			})
		}
	}
	wg.Wait()
}

// sleepUntil says whether the instant came before ctx ended.
func sleepUntil(ctx context.Context, at time.Time) bool {
	left := time.Until(at)
	if left <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(left)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// tally counts answers.
type tally struct {
	source          [ringfence.SourceCache + 1]int
	allowed, denied int
	errors          int
	took            []time.Duration // in the order of the answers
}

func (t *tally) add(d ringfence.Decision, err error, took time.Duration) {
	t.took = append(t.took, took)
	switch {
	case err != nil:
		t.errors++
		return
	case d.Allowed:
		t.allowed++
	default:
		t.denied++
	}
	t.source[d.Source]++
}

func (t *tally) merge(o tally) {
	for i := range t.source {
		t.source[i] += o.source[i]
	}
	t.allowed += o.allowed
	t.denied += o.denied
	t.errors += o.errors
	t.took = append(t.took, o.took...)
}

// answers is how many there were, errors among them.
func (t *tally) answers() int { return len(t.took) }

func (t *tally) copy() tally {
	c := *t
	c.took = slices.Clone(t.took)
	return c
}

// percentile is the time within which this part, 0 to 1, of the answers came; 0 when
// there are none.
func (t *tally) percentile(part float64) time.Duration {
	if len(t.took) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(t.took))
	return sorted[min(len(sorted)-1, int(part*float64(len(sorted))))]
}

// count is what happened to one user.
type count struct {
	asked, admitted int
}

// board is what is known of one phase while it runs. All methods may be called from many
// goroutines.
type board struct {
	mu     sync.Mutex // guards the following
	apps   []tally
	shards map[string]*tally
	users  map[string]count
	// primaries are the apps that a shard's primary answered, since the last forget.
	primaries map[string]map[int]bool
}

func newBoard(apps int) *board {
	return &board{
		apps: make([]tally, apps), shards: map[string]*tally{}, users: map[string]count{},
		primaries: map[string]map[int]bool{},
	}
}

func (b *board) add(app int, u user, d ringfence.Decision, err error, took time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.apps[app].add(d, err, took)
	if b.shards[u.shard] == nil {
		b.shards[u.shard] = &tally{}
		b.primaries[u.shard] = map[int]bool{}
	}
	b.shards[u.shard].add(d, err, took)
	if d.Source == ringfence.SourcePrimary {
		b.primaries[u.shard][app] = true
	}
	c := b.users[u.name]
	c.asked++
	if d.Allowed {
		c.admitted++
	}
	b.users[u.name] = c
}

// appTallies returns a copy for every app, and their sum.
func (b *board) appTallies() (each []tally, all tally) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.apps {
		each = append(each, b.apps[i].copy())
		all.merge(b.apps[i])
	}
	return each, all
}

// shardTally returns a copy.
func (b *board) shardTally(id string) tally {
	b.mu.Lock()
	defer b.mu.Unlock()
	if t := b.shards[id]; t != nil {
		return t.copy()
	}
	return tally{}
}

func (b *board) userCounts() map[string]count {
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.users)
}

// asked is how many answers there are.
func (b *board) asked() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for i := range b.apps {
		n += b.apps[i].answers()
	}
	return n
}

// forget makes heardFrom begin anew.
func (b *board) forget(shard string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.primaries[shard] = map[int]bool{}
}

// heardFrom is how many apps the shard's primary has answered since forget.
func (b *board) heardFrom(shard string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.primaries[shard])
}
