package ringfence

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// opKind is what an operation does.
type opKind uint8

const (
	opCharge opKind = iota
	opLook
	opReset
)

// request is one decision on its way to a shard. It belongs to two sides, the caller
// and the dispatcher, each of which may be done with it first; the last returns it to
// the pool.
type request struct {
	kind  opKind
	rule  *rule
	cost  int64
	count int64 // callers it stands for: 1, or 0 when it only tells a debit
	hash  keyHash
	name  []byte // the key in Redis

	// What the key owes its shard, told along the way; empty when nothing.
	debit string
	owed  owed
	from  *Limiter

	limit int   // index in the table of limits of the call it is part of
	due   int64 // when the caller will leave, ns of the dispatcher's clock

	// The reply, written before done.
	now     int64
	status  int
	granted int64
	state   state
	err     error
	failed  error // its own error in an operation that did not fail as a whole

	stage atomic.Uint32
	fate  atomic.Uint32 // see settle.go
	refs  atomic.Int32
	op    atomic.Pointer[operation]
	done  chan struct{} // holds one value once answered
	timer *time.Timer
	next  *request // the following one of the same AllowMany
}

// The stages of a request. Whoever moves it on by compare-and-swap owns the outcome.
const (
	stageQueued    uint32 = iota
	stageSent             // it is being written: it may run
	stageAnswered         // the reply is in it
	stageAbandoned        // the caller left
)

// MarshalBinary is how go-redis writes the key without a copy.
func (r *request) MarshalBinary() ([]byte, error) { return r.name, nil }

var requestPool = newRequestPool()

func newRequestPool() *sync.Pool {
	return &sync.Pool{New: func() any {
		t := time.NewTimer(time.Hour)
		t.Stop()
		return &request{done: make(chan struct{}, 1), timer: t}
	}}
}

func newRequest(kind opKind, rl *rule, h keyHash, space keySpace, cost int64) *request {
	r := requestPool.Get().(*request)
	r.kind, r.rule, r.hash, r.cost = kind, rl, h, cost
	r.name = space.append(r.name[:0], h)
	r.now, r.status, r.granted, r.state, r.err, r.failed, r.next = 0, 0, 0, state{}, nil, nil, nil
	r.count, r.debit, r.owed, r.from = 1, "", owed{}, nil
	r.fate.Store(fateOpen)
	r.op.Store(nil)
	r.stage.Store(stageQueued)
	r.refs.Store(2)
	return r
}

func (r *request) release() {
	if r.refs.Add(-1) > 0 {
		return
	}
	select {
	case <-r.done:
	default:
	}
	requestPool.Put(r)
}

// answer hands the request to the caller, if there is one. late is true when the caller
// has left although the request was sent.
func (r *request) answer(err error) (late bool) {
	r.err = err
	from := r.stage.Load()
	for !r.stage.CompareAndSwap(from, stageAnswered) {
		from = r.stage.Load()
	}
	if from == stageAbandoned {
		return true
	}
	r.done <- struct{}{}
	return false
}

// The ways a request fails without having been sent, or without a word from Redis.
var (
	errBudget    = errors.New("ringfence: the budget is spent")
	errOverdue   = errors.New("ringfence: an operation in flight is older than the budget")
	errQueueFull = errors.New("ringfence: the queue is full")
	errOpen      = errors.New("ringfence: the circuit breaker is open")
)

// operation is one script call in flight, reported to the breaker exactly once: when it
// ends, or before that when callers had to leave.
type operation struct {
	began  int64 // ns of the dispatcher's clock
	report func(err error)
	told   atomic.Bool
	missed atomic.Bool
}

func (o *operation) end(err error) {
	if o.told.CompareAndSwap(false, true) {
		o.report(err)
	}
}

// dispatcher carries requests to one server: a bounded queue and a bounded number of
// operations in flight, each of as many requests as have gathered. A lone request leaves
// at once; batches form by themselves while the operations in flight are under way. An
// operation has its own time-out and knows nothing of the callers, who wait for as long
// as their budget lasts and then go.
type dispatcher struct {
	queue   chan *request
	waiting atomic.Int64 // requests in the queue, those of chains counted one by one
	stop    chan struct{}
	stopped sync.WaitGroup
	start   sync.Once

	inFlight []atomic.Int64 // when each worker's operation began, ns of clock; 0: none
	misses   atomic.Int64   // operations in a row that outlasted a budget
	usual    atomic.Int64   // ns that nearly all operations take

	maxBatch  int
	maxWeight int64
	timeout   time.Duration
	budget    time.Duration // what callers usually wait
	clock     func() int64  // ns, monotonic

	// exec runs the requests, which are of one kind, and puts the replies into them.
	exec func(ctx context.Context, reqs []*request) error
	// begin asks for leave; report must be called once when it is given.
	begin func() (report func(err error), err error)
	// ended is told of each operation.
	ended func(kind opKind, reqs int, took time.Duration, err error)
	// lost is told of each request that was sent and whose caller did not get to know
	// what became of it: late, because the caller had left when the reply came, or
	// because the operation failed.
	lost func(r *request, err error, late bool)
	// told hears of each request with a debit, what became of it.
	told func(r *request, err error)
	// verdict turns the end of an operation into what the breaker is told.
	verdict func(kind opKind, err error) error
}

type dispatchConfig struct {
	inFlight, maxBatch, queue int
	timeout, budget           time.Duration
	clock                     func() int64
}

func newDispatcher(c dispatchConfig) *dispatcher {
	return &dispatcher{
		queue:     make(chan *request, c.queue),
		stop:      make(chan struct{}),
		inFlight:  make([]atomic.Int64, c.inFlight),
		maxBatch:  c.maxBatch,
		maxWeight: int64(c.maxBatch) * 64,
		timeout:   c.timeout,
		budget:    c.budget,
		clock:     c.clock,
	}
}

// begun starts the workers when the first request comes.
func (d *dispatcher) begun() {
	d.start.Do(func() {
		select {
		case <-d.stop:
			return
		default:
		}
		for i := range d.inFlight {
			d.stopped.Add(1)
			go d.work(&d.inFlight[i])
		}
	})
}

// send queues a request, or a chain of them, without waiting. An error means that none
// was sent and that the caller owns them alone.
func (d *dispatcher) send(r *request, deadline int64) error {
	if d.overdue(deadline) {
		return errOverdue
	}
	n := int64(0)
	for q := r; q != nil; q = q.next {
		q.due = deadline
		n++
	}
	d.begun()
	if d.waiting.Add(n)-n >= int64(cap(d.queue)) { // a chain may be longer than the queue
		d.waiting.Add(-n)
		return errQueueFull
	}
	select {
	case d.queue <- r:
		return nil
	default:
		d.waiting.Add(-n)
		return errQueueFull
	}
}

// overdue says whether the oldest operation in flight has outlasted the budget: then
// whoever comes now would only wait in vain.
func (d *dispatcher) overdue(deadline int64) bool {
	now := int64(0)
	for i := range d.inFlight {
		began := d.inFlight[i].Load()
		if began == 0 {
			continue
		}
		if now == 0 {
			now = d.clock()
		}
		if now-began > deadline-now {
			return true
		}
	}
	return false
}

// wait waits for the answer until the deadline or until ctx ends. A request that is
// given up is dropped unsent if it had not left; unsent says so.
func (d *dispatcher) wait(ctx context.Context, r *request, deadline int64) (unsent bool, err error) {
	select {
	case <-r.done:
		return false, r.err
	default:
	}
	r.timer.Reset(time.Duration(deadline - d.clock()))
	select {
	case <-r.done:
		r.timer.Stop()
		return false, r.err
	case <-r.timer.C:
		err = errBudget
	case <-ctx.Done():
		r.timer.Stop()
		err = ctx.Err()
		if errors.Is(err, context.DeadlineExceeded) {
			// The deadline was set to end before this one, but on a busy machine both
			// can be over: the ladder still answers.
			err = errBudget
		}
	}
	switch {
	case r.stage.CompareAndSwap(stageQueued, stageAbandoned):
		return true, err
	case r.stage.CompareAndSwap(stageSent, stageAbandoned):
		if op := r.op.Load(); op != nil && errors.Is(err, errBudget) {
			d.miss(op)
		}
		return false, err
	default: // answered this very moment
		<-r.done
		return false, r.err
	}
}

// miss notes that an operation outlasted a caller's budget. From the second such
// operation in a row each counts as a failure: a server that is always too slow is as
// good as down. An operation younger than two thirds of the budget is not to blame: its
// caller had waited in the queue, or was in a hurry, and a hurried caller must not open
// the breaker for everybody.
func (d *dispatcher) miss(op *operation) {
	if d.clock()-op.began < int64(d.budget)*2/3 {
		return
	}
	if op.missed.CompareAndSwap(false, true) && d.misses.Add(1) >= 2 {
		op.end(errBudget)
	}
}

// work is one operation at a time, over and over.
func (d *dispatcher) work(began *atomic.Int64) {
	defer d.stopped.Done()
	batch := make([]*request, 0, d.maxBatch)
	var held *request // taken from the queue, but of another kind or too heavy
	for {
		head := held
		held = nil
		if head == nil {
			select {
			case head = <-d.queue:
			case <-d.stop:
				return
			}
		}
		batch = batch[:0]
		weight := int64(0)
		kind := head.kind
		usual := d.usual.Load()
		soonest := int64(0) // the earliest due that can still be met
		if reach := usual + usual/8; usual > 0 && reach < int64(d.budget) {
			soonest = d.clock() + reach
		}
		doubted := false
		for r := head; r != nil; {
			// Nobody waits for company: only what is there already comes along.
			if r.kind != kind || len(batch) == d.maxBatch || (len(batch) > 0 && weight+r.weight() > d.maxWeight) {
				held = r
				break
			}
			next := r.next
			r.next = nil
			weight += r.weight()
			d.waiting.Add(-1)
			switch {
			case !r.stage.CompareAndSwap(stageQueued, stageSent):
				d.settle(r, errBudget)
				r.release()
			case r.due < soonest:
				// Sent now it would be charged, and answered when its caller has left. Of
				// more callers than a shard can serve, those at the head of the queue are
				// always about to leave: serving them would be serving nobody.
				d.settle(r, errBudget)
				r.answer(errBudget)
				r.release()
				doubted = true
			default:
				batch = append(batch, r)
			}
			if r = next; r != nil {
				continue
			}
			select {
			case r = <-d.queue:
			default:
			}
		}
		if doubted {
			// A wrong guess would never be found out if nothing were sent. Once a sweep, not
			// once a request: a long queue would unlearn it altogether.
			d.usual.CompareAndSwap(usual, usual-usual/64)
		}
		if len(batch) > 0 {
			d.run(kind, batch, began)
		}
	}
}

// weight is roughly how long Redis takes for it, in token buckets.
func (r *request) weight() int64 {
	if r.rule != nil && r.rule.algo == algoSlidingLog {
		return 1 + r.cost/2
	}
	return 1
}

func (d *dispatcher) run(kind opKind, batch []*request, began *atomic.Int64) {
	report, err := d.begin()
	if err != nil {
		d.finish(batch, err)
		return
	}
	start := d.clock()
	op := &operation{began: start, report: report}
	for _, r := range batch {
		r.op.Store(op)
	}
	began.Store(max(start, 1))
	ctx, cancel := context.WithTimeout(context.Background(), d.timeout)
	err = d.exec(ctx, batch)
	cancel()
	took := time.Duration(d.clock() - start)
	began.Store(0)
	d.ended(kind, len(batch), took, err)
	if !op.missed.Load() {
		d.misses.Store(0)
	}
	if err == nil {
		d.learn(int64(took))
	}
	op.end(d.verdict(kind, err))
	d.finish(batch, err)
}

// learn keeps what nearly all operations take: up with those that take longer by half the
// way, down slowly.
func (d *dispatcher) learn(took int64) {
	usual := d.usual.Load()
	if more := took - usual; more > 0 {
		usual += more / 2
	} else {
		usual += more / 16
	}
	d.usual.Store(max(usual, 0))
}

// settle passes on what became of a debit. An error here means that it was not taken, or
// that nobody knows, as classify says.
func (d *dispatcher) settle(r *request, err error) {
	if r.debit != "" {
		d.told(r, err)
	}
}

func (d *dispatcher) finish(batch []*request, err error) {
	for i, r := range batch {
		own := err
		if own == nil {
			own = r.failed
		}
		d.settle(r, own)
		if late := r.answer(own); late || own != nil {
			d.lost(r, own, late)
		}
		r.release()
		batch[i] = nil
	}
}

// close ends the workers once their operations have ended, which the channel it returns
// tells, and answers what is left in the queue.
func (d *dispatcher) close() <-chan struct{} {
	close(d.stop)
	d.start.Do(func() {})
	ended := make(chan struct{})
	go func() {
		d.stopped.Wait()
		d.drain()
		close(ended)
	}()
	return ended
}

func (d *dispatcher) drain() {
	for {
		select {
		case r := <-d.queue:
			for r != nil {
				next := r.next
				d.waiting.Add(-1)
				if r.stage.CompareAndSwap(stageQueued, stageSent) {
					r.answer(ErrClosed)
				}
				r.release()
				r = next
			}
		default:
			return
		}
	}
}
