package ringfence

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

var errDown = errors.New("down")

// breakerBench is a breaker with a shard that is up or down behind it. It writes down
// what happens: the transitions and the probes with their time. Use it in a synctest
// bubble, where time is virtual.
type breakerBench struct {
	*breaker
	began time.Time

	mu   sync.Mutex
	up   bool
	hold chan struct{} // a probe waits for it, unless nil
	lose int           // so many probes end without a result
	log  []string
}

func newBreakerBench(c BreakerConfig, draw uint64) *breakerBench {
	c, err := c.withDefaults("c")
	if err != nil {
		panic(err)
	}
	b := &breakerBench{began: time.Now()}
	b.breaker = newBreaker(c, time.Now, func() uint64 { return draw }, b.probe, func(from, to BreakerState) {
		b.note("%s to %s", from, to)
	})
	return b
}

func (b *breakerBench) note(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.log = append(b.log, fmt.Sprintf("%s: ", time.Since(b.began))+fmt.Sprintf(format, args...))
}

func (b *breakerBench) probe() {
	report, err := b.beginProbe()
	if err != nil {
		return
	}
	result := errProbeLost
	defer func() { report(result) }()
	b.mu.Lock()
	up, hold, lost := b.up, b.hold, b.lose > 0
	b.lose--
	b.mu.Unlock()
	if hold != nil {
		<-hold
	}
	switch {
	case lost:
		runtime.Goexit()
	case up:
		result = nil
	default:
		result = errDown
	}
}

// holdProbes makes probes that begin from now on wait until the channel is closed.
func (b *breakerBench) holdProbes() chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hold = make(chan struct{})
	return b.hold
}

func (b *breakerBench) set(up bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.up = up
}

// operation is one with this result; it says whether the breaker let it through.
func (b *breakerBench) operation(result error) bool {
	report, err := b.begin()
	if err != nil {
		return false
	}
	report(result)
	return true
}

func (b *breakerBench) fail(times int) {
	for range times {
		b.operation(errDown)
	}
}

func (b *breakerBench) transcript() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Join(b.log, "\n")
}

func wantTranscript(t *testing.T, b *breakerBench, want ...string) {
	t.Helper()
	if got := b.transcript(); got != strings.Join(want, "\n") {
		t.Errorf("got:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
	}
}

// highest makes every open period the longest that may be drawn.
const highest = ^uint64(0)

func TestAClosedBreakerOpensAfterFailuresInARowAndNotBefore(t *testing.T) {
	const ok, failed, excluded = '.', 'x', '-'
	tests := []struct {
		name     string
		failures int
		results  string
		want     BreakerState
		counted  uint32
	}{
		{"nothing happened", 3, "", BreakerClosed, 0},
		{"one fewer than the threshold", 3, "xx", BreakerClosed, 2},
		{"the threshold", 3, "xxx", BreakerOpen, 0},
		{"a success in between starts the count anew", 3, "xx.xx", BreakerClosed, 2},
		{"what does not count is no success", 3, "xx-x", BreakerOpen, 0},
		{"what does not count is no failure", 3, "xx---", BreakerClosed, 2},
		{"a threshold of one", 1, "x", BreakerOpen, 0},
		{"long success does not add up", 2, "................x", BreakerClosed, 1},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBreakerBench(BreakerConfig{Failures: c.failures}, highest)
				defer b.close()
				for _, r := range c.results {
					b.operation(map[rune]error{ok: nil, failed: errDown, excluded: errNotCounted}[r])
				}
				if s := b.stats(); s.State != c.want || s.ConsecutiveFailures != c.counted {
					t.Errorf("%s with %d failures, want %s with %d", s.State, s.ConsecutiveFailures, c.want, c.counted)
				}
				if s := b.stats(); s.Failures != uint64(strings.Count(c.results, "x")) {
					t.Errorf("%d failures since the start, want %d", s.Failures, strings.Count(c.results, "x"))
				}
			})
		})
	}
}

func TestAnOpenBreakerLetsNothingThroughAndProbesByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreakerBench(BreakerConfig{}, highest)
		defer b.close()
		b.fail(3)
		if b.operation(nil) || b.closed.Load() {
			t.Error("an operation went through")
		}
		s := b.stats()
		if s.State != BreakerOpen || s.RetryIn != 100*time.Millisecond || s.LastError != "down" || !s.LastFailure.Equal(time.Now()) || s.Opened != 1 {
			t.Errorf("%+v", s)
		}
		time.Sleep(time.Second) // probes at 100, 300 and 700 ms fail
		b.set(true)
		time.Sleep(time.Second) // the one at 1500 ms does not
		if !b.operation(nil) {
			t.Error("no operation goes through a closed breaker")
		}
		wantTranscript(t, b,
			"0s: closed to open",
			"100ms: open to half_open", "100ms: half_open to open",
			"300ms: open to half_open", "300ms: half_open to open",
			"700ms: open to half_open", "700ms: half_open to open",
			"1.5s: open to half_open", "1.5s: half_open to closed")
	})
}

func TestAHalfOpenBreakerLetsOneProbeThroughAndNoOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreakerBench(BreakerConfig{}, highest)
		defer b.close()
		hold := b.holdProbes()
		b.fail(3)
		time.Sleep(time.Minute) // the probe is still under way
		if s := b.stats(); s.State != BreakerHalfOpen || s.RetryIn != 0 {
			t.Errorf("%+v", s)
		}
		if b.operation(nil) {
			t.Error("an operation went through")
		}
		if _, err := b.beginProbe(); err == nil {
			t.Error("a second probe began")
		}
		b.set(true)
		close(hold)
		synctest.Wait()
		if s := b.stats(); s.State != BreakerOpen {
			t.Errorf("the probe that began while the shard was down ended with %s", s.State)
		}
		time.Sleep(time.Second)
		if s := b.stats(); s.State != BreakerClosed {
			t.Errorf("%s, want closed after the next probe", s.State)
		}
	})
}

// A report that never came would leave the breaker half-open for ever. So probes report
// in a deferred call, with a failure unless they came to another end.
func TestAProbeThatIsLostCountsAsFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreakerBench(BreakerConfig{}, highest)
		defer b.close()
		b.mu.Lock()
		b.lose = 2
		b.mu.Unlock()
		b.set(true)
		b.fail(3)
		time.Sleep(time.Second)
		if s := b.stats(); s.State != BreakerClosed || s.LastError != errProbeLost.Error() {
			t.Errorf("%+v", s)
		}
		wantTranscript(t, b,
			"0s: closed to open",
			"100ms: open to half_open", "100ms: half_open to open",
			"300ms: open to half_open", "300ms: half_open to open",
			"700ms: open to half_open", "700ms: half_open to closed")
	})
}

// Operations in flight when the breaker opens end later, in any of its later states. None
// may change anything: gobreaker would go half-open at any word, with no probe to end it.
func TestResultsOfAnEarlierGenerationAreHarmless(t *testing.T) {
	for _, result := range []error{nil, errDown, errNotCounted} {
		t.Run(fmt.Sprint(result), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBreakerBench(BreakerConfig{}, highest)
				defer b.close()
				var late []func(error)
				for range 5 {
					report, err := b.begin()
					if err != nil {
						t.Fatal(err)
					}
					late = append(late, report)
				}
				b.fail(3)
				time.Sleep(time.Millisecond)
				late[0](result)
				if s := b.stats(); s.State != BreakerOpen || s.RetryIn != 99*time.Millisecond {
					t.Errorf("while open: %s, retry in %s", s.State, s.RetryIn)
				}
				hold := b.holdProbes()
				time.Sleep(100 * time.Millisecond)
				late[1](result)
				if s := b.stats(); s.State != BreakerHalfOpen {
					t.Errorf("while half-open: %s", s.State)
				}
				close(hold)
				b.set(true)
				time.Sleep(time.Second)
				for _, report := range late[2:] {
					report(result)
				}
				if s := b.stats(); s.State != BreakerClosed || s.ConsecutiveFailures != 0 {
					t.Errorf("while closed again: %s with %d failures", s.State, s.ConsecutiveFailures)
				}
			})
		})
	}
}

func TestOpenPeriodsDoubleUpToTheLongestAndAreDrawnFromTheirLastQuarter(t *testing.T) {
	c := BreakerConfig{OpenPeriod: 100 * time.Millisecond, MaxOpenPeriod: 5 * time.Second}
	tests := []struct {
		streak        int
		least, middle time.Duration
		most          time.Duration
	}{
		{1, 75 * time.Millisecond, 87500 * time.Microsecond, 100 * time.Millisecond},
		{2, 150 * time.Millisecond, 175 * time.Millisecond, 200 * time.Millisecond},
		{6, 2400 * time.Millisecond, 2800 * time.Millisecond, 3200 * time.Millisecond},
		{7, 3750 * time.Millisecond, 4375 * time.Millisecond, 5 * time.Second},
		{40, 3750 * time.Millisecond, 4375 * time.Millisecond, 5 * time.Second},
		{1 << 40, 3750 * time.Millisecond, 4375 * time.Millisecond, 5 * time.Second},
	}
	for _, row := range tests {
		for draw, want := range map[uint64]time.Duration{0: row.least, 1 << 63: row.middle, highest: row.most} {
			if got := openPeriod(c, row.streak, draw); got != want {
				t.Errorf("opening %d in a row, draw %x: %s, want %s", row.streak, draw, got, want)
			}
		}
	}
	for streak := 1; streak < 100; streak++ { // no shift may overflow
		long := BreakerConfig{OpenPeriod: time.Hour, MaxOpenPeriod: time.Hour}
		if got := openPeriod(long, streak, 0); got != 45*time.Minute {
			t.Errorf("an hour, opening %d in a row: %s", streak, got)
		}
	}
}

func TestADeadShardGetsAtMost25CallsAMinuteWithDefaults(t *testing.T) {
	for name, draw := range map[string]uint64{"shortest periods": 0, "longest periods": highest} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBreakerBench(BreakerConfig{}, draw)
				defer b.close()
				calls := 0
				for range 60_000 { // a caller every millisecond
					if b.operation(errDown) {
						calls++
					}
					time.Sleep(time.Millisecond)
				}
				calls += strings.Count(b.transcript(), "open to half_open")
				t.Logf("%d calls", calls)
				if calls > 25 {
					t.Errorf("%d calls in a minute", calls)
				}
			})
		})
	}
}

// A server that answers probes and takes no writes must not be tried every 100 ms.
func TestTheBackOffGrowsUntilAnOperationSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreakerBench(BreakerConfig{MaxOpenPeriod: 800 * time.Millisecond}, highest)
		defer b.close()
		b.set(true)
		var periods []time.Duration
		for range 5 {
			b.fail(3)
			periods = append(periods, b.stats().RetryIn)
			time.Sleep(time.Second)
		}
		b.operation(nil)
		b.fail(3)
		periods = append(periods, b.stats().RetryIn)
		if got, want := fmt.Sprint(periods), "[100ms 200ms 400ms 800ms 800ms 100ms]"; got != want {
			t.Errorf("open periods %s, want %s", got, want)
		}
	})
}

func TestAForcedBreakerStaysAsForcedAndGoesBackToWhatFailuresLedTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreakerBench(BreakerConfig{}, highest)
		defer b.close()
		b.force(BreakerForcedOpen)
		b.set(true)
		time.Sleep(time.Minute)
		if s := b.stats(); s.State != BreakerOpen || s.Mode != BreakerForcedOpen || s.RetryIn != 0 || b.operation(nil) {
			t.Errorf("forced open: %+v", s)
		}
		b.force(BreakerAuto)
		if s := b.stats(); s.State != BreakerClosed || !b.operation(nil) {
			t.Errorf("auto again: %+v", s)
		}

		b.force(BreakerForcedClosed)
		b.set(false)
		b.fail(10)
		if s := b.stats(); s.State != BreakerClosed || s.Failures != 10 || !b.operation(nil) {
			t.Errorf("forced closed: %+v", s)
		}
		b.force(BreakerAuto)
		if s := b.stats(); s.State != BreakerClosed {
			t.Errorf("auto again: %+v, want closed: what failed while forced does not count", s)
		}

		b.fail(3)
		b.force(BreakerForcedClosed)
		if !b.operation(errDown) {
			t.Error("forced closed while open: nothing goes through")
		}
		b.force(BreakerAuto)
		if s := b.stats(); s.State != BreakerOpen {
			t.Errorf("auto again: %s, want open", s.State)
		}
		b.force(BreakerForcedOpen)
		time.Sleep(time.Minute)
		probes := strings.Count(b.transcript(), "half_open to")
		time.Sleep(time.Minute)
		if n := strings.Count(b.transcript(), "half_open to"); n != probes {
			t.Errorf("%d probes while forced open", n-probes)
		}
		b.set(true)
		b.force(BreakerAuto)
		time.Sleep(10 * time.Millisecond)
		if s := b.stats(); s.State != BreakerClosed {
			t.Errorf("auto again with the shard up: %s, want closed by a probe at once", s.State)
		}
	})
}

func TestABreakerCanBeConfiguredInEveryState(t *testing.T) {
	next := BreakerConfig{Failures: 5, OpenPeriod: 50 * time.Millisecond, MaxOpenPeriod: time.Second}
	t.Run("closed: counts begin anew", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBreakerBench(BreakerConfig{}, highest)
			defer b.close()
			b.fail(2)
			late, err := b.begin()
			if err != nil {
				t.Fatal(err)
			}
			b.configure(next)
			late(errDown)
			b.fail(4)
			if s := b.stats(); s.State != BreakerClosed || s.ConsecutiveFailures != 4 || s.Config != next {
				t.Errorf("%+v", s)
			}
			b.fail(1)
			if s := b.stats(); s.State != BreakerOpen || s.RetryIn != 50*time.Millisecond {
				t.Errorf("%+v", s)
			}
		})
	})
	t.Run("open: for what is left of the period, at most the longest new one", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBreakerBench(BreakerConfig{OpenPeriod: 10 * time.Second, MaxOpenPeriod: 10 * time.Second}, highest)
			defer b.close()
			b.fail(3)
			b.configure(next)
			if s := b.stats(); s.State != BreakerOpen || s.RetryIn != time.Second {
				t.Errorf("%+v", s)
			}
			b.set(true)
			time.Sleep(1100 * time.Millisecond)
			if s := b.stats(); s.State != BreakerClosed || s.Opened != 1 {
				t.Errorf("%+v", s)
			}
		})
	})
	t.Run("half-open: the probe under way does not count, another does", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBreakerBench(BreakerConfig{}, highest)
			defer b.close()
			hold := b.holdProbes()
			b.fail(3)
			time.Sleep(150 * time.Millisecond)
			b.mu.Lock()
			b.hold, b.up = nil, true
			b.mu.Unlock()
			b.configure(next)
			time.Sleep(100 * time.Millisecond)
			close(hold) // and now the old one ends, with a failure
			synctest.Wait()
			if s := b.stats(); s.State != BreakerClosed || s.ConsecutiveFailures != 0 {
				t.Errorf("%+v", s)
			}
		})
	})
}

func TestAClosedDownBreakerProbesNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreakerBench(BreakerConfig{}, highest)
		b.fail(3)
		b.close()
		b.force(BreakerForcedClosed)
		b.force(BreakerAuto)
		time.Sleep(time.Hour)
		wantTranscript(t, b, "0s: closed to open", "0s: open to closed", "0s: closed to open")
	})
}

func TestManyGoroutinesLeaveTheBreakerInAStateItCanLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreakerBench(BreakerConfig{Failures: 2, OpenPeriod: time.Millisecond, MaxOpenPeriod: 4 * time.Millisecond}, 1<<63)
		defer b.close()
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				for j := range 300 {
					report, err := b.begin()
					time.Sleep(time.Duration(i*j%7) * 100 * time.Microsecond)
					if err == nil {
						report([]error{nil, errDown, errDown, errNotCounted}[(i+j)%4])
					}
					switch {
					case i == 0 && j%50 == 0:
						b.force(BreakerMode(j / 50 % 3))
					case i == 1 && j%60 == 0:
						b.configure(b.stats().Config)
					case i == 2:
						b.set(j%3 == 0)
					}
				}
			})
		}
		wg.Wait()
		b.force(BreakerAuto)
		b.set(true)
		time.Sleep(time.Second)
		if s := b.stats(); s.State != BreakerClosed || !b.operation(nil) {
			t.Errorf("%+v", s)
		}
	})
}
