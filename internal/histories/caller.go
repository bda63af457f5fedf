package histories

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence"
)

// Caller is one client of one ring, who writes down what he asks and what he is told. A
// caller does one thing at a time.
type Caller struct {
	// Recorder takes the history.
	Recorder *Recorder
	// Process is the number of the ring, Client that of the caller.
	Process, Client int
	// Budget is how long a call may take at the most, and Slack what a busy machine may
	// add to it; in virtual time 0.
	Budget, Slack time.Duration
	// Broken hears of a call that broke a promise: it took longer than its budget, or got
	// an error that it had not asked for.
	Broken func(error)
}

// AllowN asks for cost units of a key.
func (c *Caller) AllowN(ctx context.Context, l *ringfence.Limiter, key string, cost int64) ringfence.Decision {
	call, began := c.Recorder.begin()
	d, err := l.AllowN(ctx, key, cost)
	took := c.Recorder.end(call, began, c.event(Charge, l, key, cost, d, err))
	c.judge(ctx, "AllowN", took, err)
	return d
}

// AllowMany asks for several keys at once.
func (c *Caller) AllowMany(ctx context.Context, l *ringfence.Limiter, reqs []ringfence.Request) {
	call, began := c.Recorder.begin()
	out, err := l.AllowMany(ctx, reqs)
	events := make([]Event, len(reqs))
	for i, r := range reqs {
		var d ringfence.Decision
		if err == nil {
			d = out[i]
		}
		events[i] = c.event(Charge, l, r.Key, r.Cost, d, err)
	}
	c.judge(ctx, "AllowMany", c.Recorder.end(call, began, events...), err)
}

// Peek looks at a key.
func (c *Caller) Peek(ctx context.Context, l *ringfence.Limiter, key string) ringfence.Decision {
	call, began := c.Recorder.begin()
	d, err := l.Peek(ctx, key)
	took := c.Recorder.end(call, began, c.event(Look, l, key, 1, d, err))
	c.judge(ctx, "Peek", took, err)
	return d
}

// Reset forgets what a key has used.
func (c *Caller) Reset(ctx context.Context, l *ringfence.Limiter, key string) {
	call, began := c.Recorder.begin()
	err := l.Reset(ctx, key)
	took := c.Recorder.end(call, began, c.event(Reset, l, key, 1, ringfence.Decision{}, err))
	if errors.Is(err, ringfence.ErrUnavailable) {
		err = nil // that it could not be done is what it is to say
	}
	c.judge(ctx, "Reset", took, err)
}

func (c *Caller) event(k Kind, l *ringfence.Limiter, key string, cost int64, d ringfence.Decision, err error) Event {
	shard, _ := l.Locate(key)
	of := Key{Limiter: l.Name(), Name: key, Shard: shard}
	switch limit := l.Limit().(type) {
	case ringfence.TokenBucket:
		of.Limit = limit.Burst
	case ringfence.SlidingLog:
		of.Limit = limit.Limit
	}
	return Event{Kind: k, Key: of, Process: c.Process, Client: c.Client, Cost: cost, Decision: d, Err: err}
}

// judge looks for what must not happen to any call.
func (c *Caller) judge(ctx context.Context, what string, took time.Duration, err error) {
	if most := c.Budget + c.Slack; took > most {
		c.Broken(fmt.Errorf("client %d: %s took %v, more than %v", c.Client, what, took, most))
	}
	if at, ok := ctx.Deadline(); ok && time.Until(at) < -c.Slack {
		c.Broken(fmt.Errorf("client %d: %s ended %v after its deadline", c.Client, what, -time.Until(at)))
	}
	if err != nil && (!errors.Is(err, context.Canceled) || !errors.Is(ctx.Err(), context.Canceled)) {
		c.Broken(fmt.Errorf("client %d: %s: %w", c.Client, what, err))
	}
}

// counted is how often a ring should have counted each answer, by the labels limit,
// outcome and source of its metric of decisions.
func counted(events []Event, process int) map[[3]string]int {
	out := map[[3]string]int{}
	for _, e := range events {
		if e.Kind != Charge || e.Process != process {
			continue
		}
		outcome, source := "denied", e.Decision.Source.String()
		switch {
		case errors.Is(e.Err, context.Canceled), errors.Is(e.Err, context.DeadlineExceeded):
			outcome = "canceled"
		case e.Err != nil:
			outcome = "error"
		case e.Decision.Allowed:
			outcome = "allowed"
		}
		out[[3]string{e.Key.Limiter, outcome, source}]++
	}
	return out
}

// decisions is what a ring has counted, by the labels limit, outcome and source.
func decisions(from prometheus.Gatherer) (map[[3]string]int, error) {
	families, err := from.Gather()
	if err != nil {
		return nil, err
	}
	out := map[[3]string]int{}
	for _, f := range families {
		if f.GetName() != "ratelimiter_decisions_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			out[[3]string{labels["limit"], labels["outcome"], labels["source"]}] += int(m.GetCounter().GetValue())
		}
	}
	return out, nil
}
