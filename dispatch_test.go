package ringfence

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// dispatchBench is a dispatcher before a shard that takes a stated time, in a synctest
// bubble, where time is virtual and everything below is exact.
type dispatchBench struct {
	*dispatcher
	began time.Time
	rule  *rule

	mu    sync.Mutex
	takes time.Duration
	fails error
	log   []string // operations, as "kind costs"
	told  []error  // the breaker
	lost  []string
}

func newDispatchBench(t *testing.T, c dispatchConfig) *dispatchBench {
	t.Helper()
	if c.timeout == 0 {
		c.timeout = 250 * time.Millisecond
	}
	if c.budget == 0 {
		c.budget = 20 * time.Millisecond
	}
	b := &dispatchBench{began: time.Now(), rule: compiled(t, TokenBucket{Rate: 1, Per: time.Second, Burst: 1000})}
	c.clock = func() int64 { return int64(time.Since(b.began)) + 1 }
	b.dispatcher = newDispatcher(c)
	b.exec = func(ctx context.Context, reqs []*request) error {
		b.mu.Lock()
		var costs []string
		for _, r := range reqs {
			costs = append(costs, fmt.Sprint(r.cost))
			r.granted = 1
		}
		b.log = append(b.log, []string{"charge ", "look ", "reset "}[reqs[0].kind]+strings.Join(costs, " "))
		takes, fails := b.takes, b.fails
		b.mu.Unlock()
		select {
		case <-time.After(takes):
			return fails
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	b.begin = func() (func(error), error) {
		return func(err error) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.told = append(b.told, err)
		}, nil
	}
	b.ended = func(opKind, int, time.Duration, error) {}
	b.verdict = func(_ opKind, err error) error { return err }
	b.dispatcher.lost = func(r *request, err error, late bool) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.lost = append(b.lost, fmt.Sprintf("cost %d late %t: %v", r.cost, late, err))
	}
	return b
}

func (b *dispatchBench) request(kind opKind, cost int64) *request {
	return freshRequest().begin(kind, b.rule, keyHash{uint64(cost), 0}, newKeySpace("rf"), cost)
}

// call makes one call with a budget; it returns what the caller hears.
func (b *dispatchBench) call(ctx context.Context, cost int64, budget time.Duration) (unsent bool, err error) {
	r := b.request(opCharge, cost)
	deadline := b.clock() + int64(budget)
	if err := b.send(r, deadline); err != nil {
		r.release()
		r.release()
		return true, err
	}
	defer r.release()
	return b.wait(ctx, r)
}

func (b *dispatchBench) set(takes time.Duration, fails error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.takes, b.fails = takes, fails
}

func (b *dispatchBench) operations() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Join(b.log, ", ")
}

func (b *dispatchBench) wantOperations(t *testing.T, want string) {
	t.Helper()
	if got := b.operations(); got != want {
		t.Errorf("operations: %s\nwant: %s", got, want)
	}
}

func (b *dispatchBench) breakerHeard() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return fmt.Sprint(b.told)
}

// inBubble runs a test in a bubble and closes the dispatcher at its end.
func inBubble(t *testing.T, c dispatchConfig, f func(t *testing.T, b *dispatchBench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := newDispatchBench(t, c)
		f(t, b)
		<-b.close()
	})
}

var oneAtATime = dispatchConfig{inFlight: 1, maxBatch: 4, queue: 8}

func TestALoneCallLeavesAtOnceAndIsAnsweredWhenTheShardAnswers(t *testing.T) {
	inBubble(t, oneAtATime, func(t *testing.T, b *dispatchBench) {
		b.set(3*time.Millisecond, nil)
		start := time.Now()
		if _, err := b.call(t.Context(), 1, 20*time.Millisecond); err != nil || time.Since(start) != 3*time.Millisecond {
			t.Errorf("%v after %s", err, time.Since(start))
		}
		b.wantOperations(t, "charge 1")
	})
}

func TestBatchesFormOnlyWhileOperationsAreUnderWay(t *testing.T) {
	inBubble(t, oneAtATime, func(t *testing.T, b *dispatchBench) {
		b.set(3*time.Millisecond, nil)
		var callers sync.WaitGroup
		for i := range int64(7) {
			callers.Go(func() {
				if _, err := b.call(t.Context(), i+1, 20*time.Millisecond); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait() // in this order
		}
		callers.Wait()
		b.wantOperations(t, "charge 1, charge 2 3 4 5, charge 6 7")
	})
}

func TestOnlyRequestsOfOneKindShareAnOperation(t *testing.T) {
	inBubble(t, oneAtATime, func(t *testing.T, b *dispatchBench) {
		b.set(time.Millisecond, nil)
		deadline := b.clock() + int64(time.Second)
		var reqs []*request
		for i, kind := range []opKind{opCharge, opCharge, opLook, opLook, opCharge, opReset} {
			r := b.request(kind, int64(i))
			reqs = append(reqs, r)
			if err := b.send(r, deadline); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		for _, r := range reqs {
			if _, err := b.wait(t.Context(), r); err != nil {
				t.Error(err)
			}
			r.release()
		}
		b.wantOperations(t, "charge 0, charge 1, look 2 3, charge 4, reset 5")
	})
}

func TestHeavyRequestsDoNotShareAnOperation(t *testing.T) {
	c := oneAtATime
	inBubble(t, c, func(t *testing.T, b *dispatchBench) {
		b.set(time.Millisecond, nil)
		b.rule = compiled(t, SlidingLog{Limit: 1000, Window: time.Hour}) // a unit is half a bucket's work
		b.maxWeight = 512
		var callers sync.WaitGroup
		for _, cost := range []int64{1, 300, 200, 5, 1000, 2} {
			callers.Go(func() {
				if _, err := b.call(t.Context(), cost, time.Second); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		callers.Wait()
		b.wantOperations(t, "charge 1, charge 300 200 5, charge 1000, charge 2")
	})
}

func TestAChainIsCarriedInOrderByOneOperationAfterAnother(t *testing.T) {
	c := oneAtATime
	c.inFlight = 3
	inBubble(t, c, func(t *testing.T, b *dispatchBench) {
		b.set(time.Millisecond, nil)
		deadline := b.clock() + int64(20*time.Millisecond)
		var reqs []*request
		for i := range int64(10) {
			reqs = append(reqs, b.request(opCharge, i))
			if i > 0 {
				reqs[i-1].next = reqs[i]
			}
		}
		if err := b.send(reqs[0], deadline); err != nil {
			t.Fatal(err)
		}
		for _, r := range reqs {
			if _, err := b.wait(t.Context(), r); err != nil {
				t.Error(err)
			}
			r.release()
		}
		b.wantOperations(t, "charge 0 1 2 3, charge 4 5 6 7, charge 8 9")
	})
}

func TestACallerWhoLeavesBeforeItsRequestIsSentIsDroppedUnsent(t *testing.T) {
	inBubble(t, oneAtATime, func(t *testing.T, b *dispatchBench) {
		b.set(30*time.Millisecond, nil)
		var callers sync.WaitGroup
		callers.Go(func() { _, _ = b.call(t.Context(), 1, time.Second) })
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		callers.Go(func() {
			if unsent, err := b.call(ctx, 2, 500*time.Millisecond); !unsent || !errors.Is(err, context.Canceled) {
				t.Errorf("canceled: unsent %t, %v", unsent, err)
			}
		})
		callers.Go(func() {
			if unsent, err := b.call(t.Context(), 3, 15*time.Millisecond); !unsent || !errors.Is(err, errBudget) {
				t.Errorf("out of budget: unsent %t, %v", unsent, err)
			}
		})
		synctest.Wait()
		cancel()
		callers.Wait()
		time.Sleep(time.Second)
		b.wantOperations(t, "charge 1")
		b.mu.Lock()
		defer b.mu.Unlock()
		if len(b.lost) != 0 {
			t.Errorf("lost: %v", b.lost)
		}
	})
}

func TestWhatBecameOfARequestWhoseCallerLeftAfterItWasSentIsTold(t *testing.T) {
	tests := []struct {
		name  string
		takes time.Duration
		fails error
		want  string
	}{
		{"the reply came late", 30 * time.Millisecond, nil, "[cost 7 late true: <nil>]"},
		{"the operation failed late", 30 * time.Millisecond, errDown, "[cost 7 late true: down]"},
		{"the operation timed out", time.Second, nil, "[cost 7 late true: context deadline exceeded]"},
		{"it failed while the caller waited", time.Millisecond, errDown, "[cost 7 late false: down]"},
		{"it was answered in time", time.Millisecond, nil, "[]"},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, oneAtATime, func(t *testing.T, b *dispatchBench) {
				b.set(c.takes, c.fails)
				_, _ = b.call(t.Context(), 7, 20*time.Millisecond)
				time.Sleep(time.Second)
				b.mu.Lock()
				defer b.mu.Unlock()
				if got := fmt.Sprint(b.lost); got != c.want {
					t.Errorf("told %s, want %s", got, c.want)
				}
			})
		})
	}
}

func TestOnceAnOperationIsOlderThanTheBudgetNewCallersDoNotWait(t *testing.T) {
	c := oneAtATime
	c.inFlight = 4
	inBubble(t, c, func(t *testing.T, b *dispatchBench) {
		b.set(time.Second, nil)
		_, err := b.call(t.Context(), 1, 20*time.Millisecond)
		if !errors.Is(err, errBudget) {
			t.Errorf("the first: %v", err)
		}
		time.Sleep(time.Millisecond)
		start := time.Now()
		if unsent, err := b.call(t.Context(), 2, 20*time.Millisecond); !unsent || !errors.Is(err, errOverdue) || time.Since(start) != 0 {
			t.Errorf("the second: unsent %t, %v after %s", unsent, err, time.Since(start))
		}
		// Who can wait longer than that may try.
		if _, err := b.call(t.Context(), 3, 100*time.Millisecond); !errors.Is(err, errBudget) {
			t.Errorf("a patient one: %v", err)
		}
		time.Sleep(300 * time.Millisecond) // the operations have timed out
		b.set(time.Millisecond, nil)
		if _, err := b.call(t.Context(), 4, 20*time.Millisecond); err != nil {
			t.Errorf("after the time-out: %v", err)
		}
	})
}

func TestAFullQueueTurnsCallersAwayAtOnce(t *testing.T) {
	inBubble(t, oneAtATime, func(t *testing.T, b *dispatchBench) {
		b.set(15*time.Millisecond, nil)
		var callers sync.WaitGroup
		for range 1 + 8 {
			callers.Go(func() { _, _ = b.call(t.Context(), 1, 20*time.Millisecond) })
			synctest.Wait()
		}
		start := time.Now()
		if _, err := b.call(t.Context(), 2, 20*time.Millisecond); !errors.Is(err, errQueueFull) || time.Since(start) != 0 {
			t.Errorf("%v after %s", err, time.Since(start))
		}
		callers.Wait()
	})
}

func TestTheSecondMissedBudgetInARowCountsAsAFailure(t *testing.T) {
	const slow, quick = 30 * time.Millisecond, time.Millisecond
	tests := []struct {
		name  string
		takes []time.Duration
		want  string
	}{
		{"one slow operation is none", []time.Duration{quick, slow, quick}, "[<nil> <nil> <nil>]"},
		{"two in a row are", []time.Duration{slow, slow, slow}, "[<nil> " + errBudget.Error() + " " + errBudget.Error() + "]"},
		{"not in a row", []time.Duration{slow, quick, slow, quick}, "[<nil> <nil> <nil> <nil>]"},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, oneAtATime, func(t *testing.T, b *dispatchBench) {
				for _, takes := range c.takes {
					b.set(takes, nil)
					_, _ = b.call(t.Context(), 1, 20*time.Millisecond)
					time.Sleep(100 * time.Millisecond)
				}
				if got := b.breakerHeard(); got != c.want {
					t.Errorf("the breaker heard %s, want %s", got, c.want)
				}
			})
		})
	}
	t.Run("hurried callers do not count", func(t *testing.T) {
		inBubble(t, oneAtATime, func(t *testing.T, b *dispatchBench) {
			b.set(10*time.Millisecond, nil)
			for range 5 {
				if _, err := b.call(t.Context(), 1, 2*time.Millisecond); !errors.Is(err, errBudget) {
					t.Error(err)
				}
				time.Sleep(20 * time.Millisecond)
			}
			// The first is sent; after that it is known that 2 ms are not enough.
			if got := b.breakerHeard(); got != "[<nil>]" {
				t.Errorf("the breaker heard %s", got)
			}
		})
	})
}

func TestAnExpiredContextIsASpentBudgetAndACanceledOneIsTheCallers(t *testing.T) {
	inBubble(t, oneAtATime, func(t *testing.T, b *dispatchBench) {
		b.set(50*time.Millisecond, nil)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		defer cancel()
		if _, err := b.call(ctx, 1, 20*time.Millisecond); !errors.Is(err, errBudget) {
			t.Errorf("expired: %v", err)
		}
		time.Sleep(time.Second)
		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(5*time.Millisecond, cancel)
		if _, err := b.call(ctx, 1, 20*time.Millisecond); !errors.Is(err, context.Canceled) {
			t.Errorf("canceled: %v", err)
		}
	})
}

// Of more callers than the shard can serve, those who could not be answered in time any
// more are turned away instead of charged for nothing.
func TestWhoCannotBeAnsweredInTimeIsNotSent(t *testing.T) {
	inBubble(t, dispatchConfig{inFlight: 1, maxBatch: 1, queue: 100}, func(t *testing.T, b *dispatchBench) {
		b.set(5*time.Millisecond, nil)
		answered, late := 0, 0
		var mu sync.Mutex
		var callers sync.WaitGroup
		stop := time.Now().Add(10 * time.Second)
		for range 10 { // each would need 50 ms, and has 20
			callers.Go(func() {
				for time.Now().Before(stop) {
					unsent, err := b.call(t.Context(), 1, 20*time.Millisecond)
					mu.Lock()
					switch {
					case err == nil:
						answered++
					case !unsent:
						late++
					}
					mu.Unlock()
					if err != nil {
						time.Sleep(time.Millisecond)
					}
				}
			})
		}
		callers.Wait()
		sent := strings.Count(b.operations(), "charge")
		t.Logf("of %d sent %d were answered in time", sent, answered)
		if answered < 1900 { // of 2000 that fit into 10 s
			t.Errorf("%d answered of 2000 the shard had time for", answered)
		}
		if sent-answered > sent/20 {
			t.Errorf("%d of %d were charged for nothing", sent-answered, sent)
		}
	})
}

// Three times more than a shard can serve, for a while: it serves what it can, because whom
// it cannot serve in time is turned away, however many those are at once.
func TestAShardThatIsOfferedFarTooMuchServesWhatItCan(t *testing.T) {
	const budget, lasts, perSecond = 20 * time.Millisecond, time.Second, 40_000
	inBubble(t, dispatchConfig{inFlight: 2, maxBatch: 64, queue: 4096}, func(t *testing.T, b *dispatchBench) {
		b.set(10*time.Millisecond, nil) // 2 x 64 in 10 ms: 12,800 a second
		var answered atomic.Int64
		var callers sync.WaitGroup
		for range int(lasts / time.Millisecond) {
			for range perSecond / 1000 {
				callers.Go(func() {
					if _, err := b.call(t.Context(), 1, budget); err == nil {
						answered.Add(1)
					}
				})
			}
			time.Sleep(time.Millisecond)
		}
		callers.Wait()
		late := int64(strings.Count(b.operations(), " 1")) - answered.Load()
		t.Logf("of %d offered %d were answered in time, %d charged too late", perSecond, answered.Load(), late)
		if answered.Load() < 9_000 {
			t.Errorf("%d answered, want at least 9000 of the 12800 that the shard can serve", answered.Load())
		}
		if late > answered.Load()/10 {
			t.Errorf("%d charged for callers who had left, of %d answered", late, answered.Load())
		}
	})
}

func TestAShardThatBecameQuickAgainIsFoundOut(t *testing.T) {
	inBubble(t, dispatchConfig{inFlight: 1, maxBatch: 1, queue: 100}, func(t *testing.T, b *dispatchBench) {
		b.set(19*time.Millisecond, nil)
		for range 20 { // nearly the whole budget is now what an operation usually takes
			_, _ = b.call(t.Context(), 1, 20*time.Millisecond)
		}
		b.set(time.Millisecond, nil)
		answered := 0
		for range 200 { // each a little late, as under load
			if _, err := b.call(t.Context(), 1, 10*time.Millisecond); err == nil {
				answered++
			}
		}
		if answered < 100 {
			t.Errorf("%d of 200 answered by a shard that takes 1 ms", answered)
		}
	})
}

func TestCloseEndsTheOperationsAndAnswersTheQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newDispatchBench(t, oneAtATime)
		b.set(30*time.Millisecond, nil)
		errs := make(chan error, 10)
		for range 5 {
			go func() {
				_, err := b.call(t.Context(), 1, time.Second)
				errs <- err
			}()
			synctest.Wait()
		}
		start := time.Now()
		ended := b.close()
		<-ended
		var served, closed int
		for range 5 {
			switch err := <-errs; {
			case err == nil:
				served++
			case errors.Is(err, ErrClosed):
				closed++
			default:
				t.Error(err)
			}
		}
		// The one in flight is served; whether the queued are taken up once more is open.
		if served < 1 || served+closed != 5 || time.Since(start) > 60*time.Millisecond {
			t.Errorf("%d served, %d closed after %s", served, closed, time.Since(start))
		}
	})
}

func TestADispatcherThatWasNeverUsedClosesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newDispatchBench(t, oneAtATime)
		<-b.close()
	})
}

// Requests go back to their pool only when both sides are done, whoever is last: with the
// race detector this finds a request used again too early.
func TestManyCallersWithAllKindsOfEndsGetTheirOwnAnswers(t *testing.T) {
	inBubble(t, dispatchConfig{inFlight: 3, maxBatch: 5, queue: 20}, func(t *testing.T, b *dispatchBench) {
		exec := b.exec
		b.exec = func(ctx context.Context, reqs []*request) error {
			for _, r := range reqs {
				r.state = state{a: r.cost}
			}
			return exec(ctx, reqs)
		}
		var callers sync.WaitGroup
		for c := range 20 {
			callers.Go(func() {
				for i := range 100 {
					if c == 0 {
						b.set(time.Duration(i%30)*time.Millisecond, []error{nil, nil, errDown}[i%3])
					}
					ctx, cancel := context.WithCancel(t.Context())
					if i%7 == 0 {
						time.AfterFunc(time.Duration(i%20)*time.Millisecond, cancel)
					}
					r := b.request(opCharge, int64(c*1000+i))
					deadline := b.clock() + int64(20*time.Millisecond)
					if err := b.send(r, deadline); err != nil {
						r.release()
						r.release()
					} else {
						if _, err := b.wait(ctx, r); err == nil && r.state.a != int64(c*1000+i) {
							t.Errorf("caller %d call %d got the answer to %d", c, i, r.state.a)
						}
						r.release()
					}
					cancel()
					time.Sleep(time.Millisecond)
				}
			})
		}
		callers.Wait()
	})
}

// Closing leaves no timer behind, though callers had more time than they needed.
func TestCloseStopsTheAlarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newDispatchBench(t, oneAtATime)
		if _, err := b.call(t.Context(), 1, time.Minute); err != nil {
			t.Error(err)
		}
		<-b.close()
		if b.alarm.timer.Stop() {
			t.Error("the alarm was set still")
		}
	})
}

// A call that comes when the queue has been emptied for good is sent away when its time is
// over: nobody else would do it.
func TestWhoComesAfterTheLastIsSentAwayByTheAlarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newDispatchBench(t, oneAtATime)
		if _, err := b.call(t.Context(), 1, time.Minute); err != nil {
			t.Error(err)
		}
		<-b.close()
		r := b.request(opCharge, 2)
		r.due = b.clock() + int64(20*time.Millisecond)
		b.waiting.Add(1)
		b.queue.push(r) // as post does, which saw the gate open a moment ago
		b.alarm.by(r.due)
		start := time.Now()
		if unsent, err := b.wait(context.Background(), r); !unsent || !errors.Is(err, errBudget) || time.Since(start) != 20*time.Millisecond {
			t.Errorf("unsent %t, %v after %s", unsent, err, time.Since(start))
		}
	})
}

// What a request in the queue was to tell the shard is heard of at Close, by whoever keeps
// account of it, whether its caller is there still or not.
func TestCloseTellsWhatBecameOfTheDebitsInTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newDispatchBench(t, oneAtATime)
		var told []string
		b.dispatcher.told = func(r *request, err error) {
			told = append(told, fmt.Sprintf("%s: %v, not sent %t", r.debit, err, notSent(err)))
		}
		b.gate.close() // nobody serves the queue any more
		for _, debit := range []string{"3", "", "4"} {
			r := b.request(opCharge, 1)
			r.debit = debit
			if debit == "4" {
				r.giveUp()
			}
			b.waiting.Add(1)
			b.queue.push(r)
		}
		<-b.close()
		want := fmt.Sprintf("[3: %v, not sent true 4: %v, not sent true]", ErrClosed, ErrClosed)
		if got := fmt.Sprint(told); got != want {
			t.Errorf("told %s, want %s", got, want)
		}
	})
}
