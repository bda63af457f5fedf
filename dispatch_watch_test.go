package ringfence

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// ask makes one call as a Limiter does.
func (b *dispatchBench) ask(ctx context.Context, cost int64, budget time.Duration) (unsent bool, err error) {
	r, now := b.request(opCharge, cost), b.clock()
	_, unsent, err = b.dispatcher.call(ctx, r, now, now+int64(budget))
	r.release()
	return unsent, err
}

// Who cancels is told at once while somebody else carries its request, among many callers within a glance, whether the request had been
// sent or not; and nobody looks any more when nobody waits.
func TestACallerWhoCancelsIsToldSoon(t *testing.T) {
	for _, crowd := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			b := newDispatchBench(t, dispatchConfig{inFlight: 1, maxBatch: 1, queue: 10})
			b.takes = 15 * time.Millisecond
			if crowd {
				b.company.Store(100 * companyUnit)
			}
			type end struct {
				unsent bool
				err    error
				took   time.Duration
			}
			ends := make(chan end, 2)
			for cost := range int64(2) { // the second one stays in the queue
				ctx, cancel := context.WithCancel(t.Context())
				time.AfterFunc(5*time.Millisecond, cancel)
				go func() {
					began := time.Now()
					unsent, err := b.ask(ctx, cost+1, 20*time.Millisecond)
					ends <- end{unsent, err, time.Since(began)}
				}()
				synctest.Wait()
			}
			late := time.Duration(0)
			if crowd {
				late = glance
			}
			for range 2 {
				e := <-ends
				if !errors.Is(e.err, context.Canceled) || e.took < 5*time.Millisecond || e.took > 5*time.Millisecond+late {
					t.Errorf("crowd %t, unsent %t: told %v after %s, want it after 5 ms and up to %s more", crowd, e.unsent, e.err, e.took, late)
				}
			}
			time.Sleep(time.Second)
			if next := b.alarm.next.Load(); next != never {
				t.Errorf("crowd %t: somebody is looked after at %d", crowd, next)
			}
			<-b.close()
		})
	}
}

// A budget that ends is no cancellation, and a deadline of the context is none either.
func TestAWatchedCallerWhoseTimeIsOverHasSpentItsBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newDispatchBench(t, dispatchConfig{inFlight: 1, maxBatch: 8, queue: 10})
		b.takes = 100 * time.Millisecond
		b.company.Store(100 * companyUnit)
		for _, c := range []struct{ deadline, first, last time.Duration }{
			{7 * time.Millisecond, 7 * time.Millisecond, 7*time.Millisecond + glance},
			{time.Hour, 10 * time.Millisecond, 10 * time.Millisecond},
		} {
			ctx, cancel := context.WithTimeout(t.Context(), c.deadline)
			began := time.Now()
			_, err := b.ask(ctx, 1, 10*time.Millisecond)
			if took := time.Since(began); !errors.Is(err, errBudget) || took < c.first || took > c.last {
				t.Errorf("a context of %s: %v after %s", c.deadline, err, took)
			}
			cancel()
		}
		<-b.close()
	})
}
