package ringfence

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestTheTimeUntilADeadlineIsTheSameWithAndWithoutAMonotonicClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &Ring{began: time.Now(), steady: true}
		time.Sleep(time.Minute)
		for _, left := range []time.Duration{-time.Second, 0, 1, 20 * time.Millisecond, time.Hour} {
			at := time.Now().Add(left)
			if got := r.until(at, r.clock()); got != left {
				t.Errorf("%s, want %s", got, left)
			}
			if got := r.until(at.Round(0), r.clock()); got != left {
				t.Errorf("%s by the time of day, want %s", got, left)
			}
		}
		// A clock of the user's says nothing of a deadline.
		r.steady = false
		if got := r.until(time.Now().Add(time.Second), 0); got != time.Second {
			t.Errorf("%s, want 1s", got)
		}
	}) // An instant with a monotonic reading needs no look at the clock: the caller's counts.
	at := time.Now()
	r := &Ring{began: at.Add(-time.Minute), steady: true}
	if got := r.until(at, int64(time.Minute)-5); got != 5 {
		t.Errorf("%s, want 5ns", got)
	}
}
