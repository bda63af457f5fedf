package ringfence

import (
	"errors"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
)

// BreakerState is the state of a shard's circuit breaker. Its numbers are the values of
// the gauge ratelimiter_circuit_state.
type BreakerState int32

// The states of a circuit breaker.
const (
	// BreakerClosed: operations go to the shard.
	BreakerClosed BreakerState = 0
	// BreakerOpen: none do; callers take the ladder at once.
	BreakerOpen BreakerState = 1
	// BreakerHalfOpen: a probe is under way; callers still take the ladder.
	BreakerHalfOpen BreakerState = 2
)

// String returns "closed", "open" or "half_open".
func (s BreakerState) String() string {
	return nameOf([]string{"closed", "open", "half_open"}, int(s))
}

// BreakerMode says who decides over a circuit breaker.
type BreakerMode int32

// The modes of a circuit breaker.
const (
	// BreakerAuto: failures open it and probes close it. The zero value.
	BreakerAuto BreakerMode = iota
	// BreakerForcedOpen: it stays open; the shard gets no operation and no probe.
	BreakerForcedOpen
	// BreakerForcedClosed: it stays closed whatever fails.
	BreakerForcedClosed
)

// String returns "auto", "forced_open" or "forced_closed".
func (m BreakerMode) String() string {
	return nameOf([]string{"auto", "forced_open", "forced_closed"}, int(m))
}

// BreakerConfig adjusts the circuit breaker of a shard. The zero value of every field
// takes its default.
type BreakerConfig struct {
	// Failures is how many failures in a row open the breaker: 1 to 1,000, default
	// 3.
	Failures int
	// OpenPeriod is how long it stays open the first time, before a probe: 1 ms to 1
	// h, default 100 ms. Every probe that fails doubles it, up to MaxOpenPeriod; the
	// period in force is drawn between three quarters and the whole of that, so that
	// the processes of a service do not probe together.
	OpenPeriod time.Duration
	// MaxOpenPeriod is the longest open period: OpenPeriod to 1 h, default 5 s (or
	// OpenPeriod if that is longer).
	MaxOpenPeriod time.Duration
}

func (c BreakerConfig) withDefaults(field string) (BreakerConfig, error) {
	if c.Failures == 0 {
		c.Failures = 3
	}
	if c.OpenPeriod == 0 {
		c.OpenPeriod = 100 * time.Millisecond
	}
	if c.MaxOpenPeriod == 0 {
		c.MaxOpenPeriod = max(5*time.Second, c.OpenPeriod)
	}
	switch {
	case c.Failures < 1 || c.Failures > 1000:
		return c, invalid(field+".Failures", c.Failures, "must be 1 to 1000, or 0 for the default of 3")
	case c.OpenPeriod < time.Millisecond || c.OpenPeriod > time.Hour:
		return c, invalid(field+".OpenPeriod", c.OpenPeriod, "must be 1ms to 1h, or 0 for the default of 100ms")
	case c.MaxOpenPeriod < c.OpenPeriod || c.MaxOpenPeriod > time.Hour:
		return c, invalid(field+".MaxOpenPeriod", c.MaxOpenPeriod, "must be OpenPeriod (%s) to 1h, or 0 for the default of 5s", c.OpenPeriod)
	}
	return c, nil
}

// BreakerStats is what a circuit breaker has seen.
type BreakerStats struct {
	// State is the state now.
	State BreakerState
	// Mode says whether it is forced.
	Mode BreakerMode
	// Config is the configuration in force, defaults filled in.
	Config BreakerConfig
	// ConsecutiveFailures is the number of failures since the last success, while
	// closed.
	ConsecutiveFailures uint32
	// Failures is the number of failed operations and probes since the start.
	Failures uint64
	// Opened is how often it went from closed to open since the start.
	Opened uint64
	// LastFailure is when the last operation or probe failed, by this process's
	// clock; the zero time if none has.
	LastFailure time.Time
	// LastError is the text of that failure; it names no key.
	LastError string
	// RetryIn is how long until the next probe while open; 0 otherwise.
	RetryIn time.Duration
}

// openPeriod is the back-off: base doubled for every opening in a row after the first,
// at most the longest, times three quarters to one: with the defaults a dead shard gets
// at most 25 calls in its first minute, whatever is drawn. It is pure; draw is any 64
// random bits.
func openPeriod(c BreakerConfig, streak int, draw uint64) time.Duration {
	period := c.MaxOpenPeriod
	if shift := streak - 1; shift < 40 && c.OpenPeriod <= period>>shift {
		period = c.OpenPeriod << shift
	}
	least := period - period/4
	jitter, _ := bits.Mul64(draw, uint64(period-least)+1)
	return least + time.Duration(jitter)
}

// breaker is the circuit breaker of one shard: the counting, the states and the
// generations that make late results harmless are gobreaker's; added are an open period
// that grows, jitter, forcing, and reconfiguration while running. It never lets a
// caller through in order to find out: when the open period ends it calls probe.
type breaker struct {
	now   func() time.Time
	draw  func() uint64
	probe func()                      // runs in its own goroutine when the open period ends
	moved func(from, to BreakerState) // told what callers meet; called without the lock

	// closed is true while operations may go: all that callers look at.
	closed atomic.Bool

	mu sync.Mutex // guards all below; taken before gobreaker's own
	cb *gobreaker.TwoStepCircuitBreaker[struct{}]
	// waiting are transitions not yet told to moved: gobreaker reports them while it
	// holds its lock.
	waiting   []BreakerState
	changes   int // of the state or the configuration, so far
	state     BreakerState
	told      BreakerState // what moved was last told: the state that callers meet
	mode      BreakerMode
	config    BreakerConfig
	streak    int // openings in a row without a closing
	openUntil time.Time
	timer     *time.Timer
	shut      bool
	failures  uint64
	opened    uint64
	lastAt    time.Time
	lastErr   error
}

func newBreaker(c BreakerConfig, now func() time.Time, draw func() uint64, probe func(), moved func(from, to BreakerState)) *breaker {
	b := &breaker{now: now, draw: draw, probe: probe, moved: moved, config: c}
	b.closed.Store(true)
	b.renew()
	return b
}

// renew puts a fresh gobreaker in place. Requires b.mu, or that nobody else knows b.
func (b *breaker) renew() {
	threshold := uint32(b.config.Failures)
	var cb *gobreaker.TwoStepCircuitBreaker[struct{}]
	cb = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		MaxRequests: 1,
		// The open period is ours: by the time we ask, gobreaker's has passed.
		Timeout:      time.Nanosecond,
		ReadyToTrip:  func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= threshold },
		IsSuccessful: func(err error) bool { return err == nil },
		IsExcluded:   func(err error) bool { return errors.Is(err, errNotCounted) },
		OnStateChange: func(_ string, _, to gobreaker.State) {
			if b.cb == cb {
				b.waiting = append(b.waiting, stateOf(to))
			}
		},
	})
	b.cb = cb
}

var errNotCounted = errors.New("ringfence: neither success nor failure")

func stateOf(s gobreaker.State) BreakerState {
	switch s {
	case gobreaker.StateOpen:
		return BreakerOpen
	case gobreaker.StateHalfOpen:
		return BreakerHalfOpen
	default:
		return BreakerClosed
	}
}

// begin asks for leave to send an operation. The report given must be called once.
func (b *breaker) begin() (func(err error), error) {
	if !b.closed.Load() {
		return nil, errOpen
	}
	b.mu.Lock()
	defer b.unlock()
	if b.shown() != BreakerClosed {
		return nil, errOpen
	}
	if b.mode == BreakerForcedClosed {
		return func(err error) {
			b.mu.Lock()
			defer b.unlock()
			b.note(err)
		}, nil
	}
	return b.allow(true)
}

// allow wraps gobreaker's, for an operation or a probe. Requires b.mu.
func (b *breaker) allow(operation bool) (func(err error), error) {
	done, err := b.cb.Allow()
	if err != nil {
		return nil, errOpen
	}
	began := b.changes + len(b.waiting)
	return func(err error) {
		b.mu.Lock()
		defer b.unlock()
		b.note(err)
		if b.changes != began {
			// Of an earlier state. gobreaker would not count it, but any word to an open
			// one whose time-out is over makes it half-open, and here that would be with
			// no probe to close it again.
			return
		}
		done(err)
		if operation && err == nil && b.state == BreakerClosed {
			b.streak = 0
		}
	}, nil
}

func (b *breaker) note(err error) {
	if err != nil && !errors.Is(err, errNotCounted) {
		b.failures++
		b.lastAt, b.lastErr = b.now(), err
	}
}

// unlock puts the transitions that gobreaker went through into effect, then tells of
// them with the lock released.
func (b *breaker) unlock() {
	for _, to := range b.waiting {
		b.changes++
		if to == BreakerOpen && b.state == BreakerClosed {
			b.opened++
		}
		b.state = to
		switch to {
		case BreakerOpen:
			b.streak++
			b.schedule(openPeriod(b.config, b.streak, b.draw()))
		case BreakerClosed:
			// The back-off goes on growing until an operation succeeds: a server that
			// answers probes but takes no writes would else be tried every 100 ms.
			b.openUntil = time.Time{}
		}
	}
	b.waiting = b.waiting[:0]
	from, to := b.told, b.shown()
	b.told = to
	b.closed.Store(to == BreakerClosed)
	b.mu.Unlock()
	if from != to {
		b.moved(from, to)
	}
}

// schedule sets the probe. Requires b.mu.
func (b *breaker) schedule(in time.Duration) {
	b.openUntil = b.now().Add(in)
	if b.timer != nil {
		b.timer.Stop()
	}
	if !b.shut {
		b.timer = time.AfterFunc(in, b.probe)
	}
}

// beginProbe asks for leave to probe: given once the open period is over, to one probe
// at a time. The report must be called, with the probe's result; a probe that is lost
// would otherwise wedge the breaker, so callers defer it.
func (b *breaker) beginProbe() (func(err error), error) {
	b.mu.Lock()
	defer b.unlock()
	if b.shut || b.mode == BreakerForcedOpen || b.state != BreakerOpen {
		return nil, errOpen
	}
	if left := b.openUntil.Sub(b.now()); left > 0 {
		b.schedule(left) // the timer and the clock disagree
		return nil, errOpen
	}
	report, err := b.allow(false)
	if err != nil {
		b.schedule(time.Millisecond)
	}
	return report, err
}

// force sets who decides. Going back to auto keeps the state the failures led to.
func (b *breaker) force(m BreakerMode) {
	b.mu.Lock()
	defer b.unlock()
	b.mode = m
	if m != BreakerForcedOpen && b.state == BreakerOpen {
		b.schedule(time.Millisecond)
	}
}

// configure replaces the configuration. An open breaker stays open for what is left of
// its period, or the longest new one if that is shorter; counts begin anew.
func (b *breaker) configure(c BreakerConfig) {
	b.mu.Lock()
	defer b.unlock()
	b.config = c
	was := b.state
	b.renew()
	b.changes++
	if was == BreakerClosed {
		return
	}
	// A fresh gobreaker is closed: lead it to where this one was.
	for range c.Failures {
		done, err := b.cb.Allow()
		if err != nil {
			break
		}
		done(errOpen)
	}
	b.waiting = b.waiting[:0]
	b.state = BreakerOpen
	b.schedule(min(max(time.Millisecond, b.openUntil.Sub(b.now())), c.MaxOpenPeriod))
}

// stats is a snapshot.
func (b *breaker) stats() BreakerStats {
	b.mu.Lock()
	defer b.unlock()
	s := BreakerStats{
		State: b.shown(), Mode: b.mode, Config: b.config,
		Failures: b.failures, Opened: b.opened, LastFailure: b.lastAt,
	}
	if b.state == BreakerClosed {
		s.ConsecutiveFailures = b.cb.Counts().ConsecutiveFailures
	}
	if b.lastErr != nil {
		s.LastError = b.lastErr.Error()
	}
	if s.State == BreakerOpen && b.mode == BreakerAuto {
		s.RetryIn = max(0, b.openUntil.Sub(b.now()))
	}
	return s
}

// shown is the state that callers meet. Requires b.mu.
func (b *breaker) shown() BreakerState {
	switch b.mode {
	case BreakerForcedOpen:
		return BreakerOpen
	case BreakerForcedClosed:
		return BreakerClosed
	default:
		return b.state
	}
}

// retryIn is how long until the shard may be back; at least 100 ms, so that callers who
// were denied unseen do not return at once.
func (b *breaker) retryIn() time.Duration {
	b.mu.Lock()
	defer b.unlock()
	return max(100*time.Millisecond, b.openUntil.Sub(b.now()))
}

// close stops the probes.
func (b *breaker) close() {
	b.mu.Lock()
	defer b.unlock()
	b.shut = true
	if b.timer != nil {
		b.timer.Stop()
	}
}
