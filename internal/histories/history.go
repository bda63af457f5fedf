package histories

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/ringfence/ringfence"
)

// Kind is what an entry of a history says.
type Kind uint8

// The kinds of entries.
const (
	// Charge is one entry of Allow, AllowN or AllowMany.
	Charge Kind = iota
	// Look is a Peek.
	Look
	// Reset is a Reset.
	Reset
	// Wipe is a shard that lost everything.
	Wipe
	// Lag is a shard that lost something, or nothing: a replica took its place.
	Lag
	// Quiet is an instant at which nothing was on its way to any shard.
	Quiet
	// Step is a step of a shard's clock, which only CheckQuota knows.
	Step
)

// String returns the kind's name in a printed history.
func (k Kind) String() string {
	return []string{"charge", "look", "reset", "wipe", "lag", "quiet", "step"}[k]
}

// Key is a counter: one key of one limiter.
type Key struct {
	// Limiter and Name are as given to the ring.
	Limiter, Name string
	// Shard is the id of the shard that owns it.
	Shard string
	// Limit is how many units it has.
	Limit int64
}

// Event is one entry of a history. Of faults only Kind, Call, Return and Shard count.
type Event struct {
	Kind Kind
	Key  Key
	// Shard is the one that a fault concerns.
	Shard string
	// Process is the ring that was called, Client the caller, counted across all rings.
	Process, Client int
	// Call and Return are places in the one order of all invocations and returns. They
	// do not come from a clock, so that no two are the same, even in virtual time.
	Call, Return int64
	// Began and Took are for those who read the history.
	Began, Took time.Duration
	// Cost is how many units were asked for.
	Cost int64
	// Forward is how far a clock was stepped, negative for back.
	Forward time.Duration
	// Decision and Err are what the caller got.
	Decision ringfence.Decision
	Err      error
}

// String is one line of a printed history, without its place in the order.
func (e Event) String() string {
	head := fmt.Sprintf("%12v +%-11v client %-2d %-6s", e.Began, e.Took, e.Client, e.Kind)
	switch {
	case e.Kind == Step:
		return fmt.Sprintf("%s of shard %s's clock by %v", head, e.Shard, e.Forward)
	case e.Kind >= Wipe:
		return head + " of shard " + e.Shard
	case e.Err != nil:
		return fmt.Sprintf("%s %d of %s/%s: %v", head, e.Cost, e.Key.Limiter, e.Key.Name, e.Err)
	case e.Kind == Reset:
		return fmt.Sprintf("%s %s/%s: done", head, e.Key.Limiter, e.Key.Name)
	}
	d := e.Decision
	return fmt.Sprintf("%s %d of %s/%s: allowed %t, left %d of %d, by %s %s",
		head, e.Cost, e.Key.Limiter, e.Key.Name, d.Allowed, d.Remaining, d.Limit, d.Source, d.Cause)
}

// Recorder writes a history down. The zero value is not ready; see NewRecorder. All methods
// may be called from many goroutines.
type Recorder struct {
	start time.Time

	mu     sync.Mutex // guards the following
	place  int64
	events []Event
}

// NewRecorder begins a history now.
func NewRecorder() *Recorder { return &Recorder{start: time.Now()} }

// begin is the invocation of a call.
func (r *Recorder) begin() (place int64, at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.place++
	return r.place, time.Now()
}

// end is its return: it fills in the times of the entries and keeps them.
func (r *Recorder) end(call int64, began time.Time, events ...Event) (took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.place++
	took = time.Since(began)
	for _, e := range events {
		e.Call, e.Return, e.Began, e.Took = call, r.place, began.Sub(r.start), took
		r.events = append(r.events, e)
	}
	return took
}

// Wiped calls f, which makes a shard lose everything.
func (r *Recorder) Wiped(shard string, f func()) { r.fault(Wipe, shard, f) }

// Lagged calls f, which puts a replica into the place of a shard's primary. It may lack any
// of the primary's charges.
func (r *Recorder) Lagged(shard string, f func()) { r.fault(Lag, shard, f) }

// Stepped calls f, which puts a shard's clock forward by so much, or back if that is negative.
func (r *Recorder) Stepped(shard string, by time.Duration, f func()) {
	call, began := r.begin()
	f()
	r.end(call, began, Event{Kind: Step, Shard: shard, Forward: by, Client: -1})
}

// Quiet notes that nothing is on its way to any shard now: whoever was not charged by now
// will not be. It is wrong to say so while calls are under way.
func (r *Recorder) Quiet() { r.fault(Quiet, "", func() {}) }

func (r *Recorder) fault(k Kind, shard string, f func()) {
	call, began := r.begin()
	f()
	r.end(call, began, Event{Kind: k, Shard: shard, Client: -1})
}

// Events is a copy of the history so far, in the order of the returns.
func (r *Recorder) Events() []Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events)
}
