package ringfence

import (
	"context"
	"fmt"
	"time"
)

// MaxObservers is the most entries of Config.Observers.
const MaxObservers = 8

// Observer is told of every call of Allow, AllowN and AllowMany after it was decided or
// refused, but not of an AllowMany without requests, which decides nothing; once, in the caller's goroutine and before the call returns: what it takes is
// added to the call. It must be safe for concurrent use and must not wait. One that panics
// is logged and changes no decision. Package oteltrace has one for OpenTelemetry.
//
// It never learns the key.
type Observer interface {
	// Observe is given the context of the call, context.Background() if that was nil,
	// and what came of it.
	Observe(ctx context.Context, o Observation)
}

// Observation is one call as an Observer sees it.
type Observation struct {
	// Limiter is the name of the limiter.
	Limiter string
	// Entries is how many decisions the call asked for: 1, or the requests of an
	// AllowMany.
	Entries int
	// Cost is the units it asked for, all entries together; 0 when it was refused.
	Cost int64
	// Took is how long the caller waited.
	Took time.Duration
	// Err is the error the caller gets, nil when it was decided. It matches ErrInvalid,
	// ErrClosed, context.Canceled or context.DeadlineExceeded.
	Err error
	// Decision is the answer to an Allow or AllowN.
	Decision Decision
	// Many are the answers to an AllowMany, in the order of its requests; nil for other
	// calls. It is the caller's: read it during Observe only, and change nothing.
	Many []Decision
}

// decided counts the answer to an Allow or AllowN and tells the observers.
func (l *Limiter) decided(ctx context.Context, s *shard, key string, d *Decision, cost, start int64) {
	if l.metrics == nil && len(l.ring.config.Observers) == 0 {
		// Top keys need no second look at the clock, which would be most of what a call
		// answered here costs.
		l.top.decided(key, d.Allowed, start)
		return
	}
	now := l.ring.clock()
	took := time.Duration(now - start)
	l.count(s, key, d, cost, took, now)
	if len(l.ring.config.Observers) > 0 {
		l.ring.observe(ctx, Observation{Limiter: l.name, Entries: 1, Cost: cost, Took: took, Decision: *d})
	}
}

// decidedHere is decided for an answer that needed no round trip: a caller counts it at a
// place of his own, and the clock is not read again for each.
func (l *Limiter) decidedHere(ctx context.Context, s *shard, key string, d *Decision, cost, start int64, at uint) {
	l.metrics.decidedHere(s, d, cost, start, at)
	l.top.decided(key, d.Allowed, start)
	if len(l.ring.config.Observers) > 0 {
		l.ring.observe(ctx, Observation{Limiter: l.name, Entries: 1, Cost: cost, Took: time.Duration(l.ring.clock() - start), Decision: *d})
	}
}

// count counts one entry of a call that was answered at now.
func (l *Limiter) count(s *shard, key string, d *Decision, cost int64, took time.Duration, now int64) {
	l.metrics.decided(s, d, cost, took)
	l.top.decided(key, d.Allowed, now)
}

// decidedMany tells the observers of an AllowMany whose entries have been counted.
func (l *Limiter) decidedMany(ctx context.Context, reqs []Request, out []Decision, took time.Duration) {
	if len(l.ring.config.Observers) == 0 {
		return
	}
	o := Observation{Limiter: l.name, Entries: len(out), Took: took, Many: out}
	for i := range reqs {
		o.Cost += reqs[i].Cost
	}
	l.ring.observe(ctx, o)
}

// refused tells the observers of a call that gets an error.
func (l *Limiter) refused(ctx context.Context, err error, entries int, took time.Duration) {
	if len(l.ring.config.Observers) == 0 {
		return
	}
	if ctx == nil {
		ctx = context.Background()
	}
	l.ring.observe(ctx, Observation{Limiter: l.name, Entries: entries, Took: took, Err: err})
}

func (r *Ring) observe(ctx context.Context, o Observation) {
	for _, observer := range r.config.Observers {
		r.observeOne(ctx, observer, o)
	}
}

// observeOne keeps a panic of the observer from the call.
func (r *Ring) observeOne(ctx context.Context, observer Observer, o Observation) {
	defer func() {
		if p := recover(); p != nil {
			// Not its value: it may hold what the observer took from ctx.
			r.log.warn("", "observer", "an observer of Config.Observers panicked; the decision is not affected", "observer", fmt.Sprintf("%T", observer), "panic", fmt.Sprintf("%T", p))
		}
	}()
	observer.Observe(ctx, o)
}

func checkObservers(field string, all []Observer) error {
	if len(all) > MaxObservers {
		return invalid(field, len(all), "must be at most %d observers", MaxObservers)
	}
	for i, o := range all {
		if o == nil {
			return invalid(fmt.Sprintf("%s[%d]", field, i), verbatim("nil"), "must be an Observer; leave it out instead")
		}
	}
	return nil
}
