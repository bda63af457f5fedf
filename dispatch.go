package ringfence

import (
	"cmp"
	"context"
	"errors"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// dispatcher carries requests to one server: a bounded queue and a bounded number of
// operations in flight, each of as many requests as have gathered. A lone request leaves
// at once, carried by its own caller where the server's connections allow that; batches
// form by themselves while operations are under way. An operation has its own time-out and
// knows nothing of the callers, who wait for as long as their budget lasts and then go.
type dispatcher struct {
	queue   inbox
	waiting atomic.Int64 // requests in the queue, those of chains counted one by one
	most    int64        // of waiting
	alarm   *alarm       // when the next caller's time is over
	gate    callGate     // counts the slots in use, so that close can wait for them

	slots   []slot
	busy    atomic.Int64
	company atomic.Int64 // callers a batch has had lately, in companyUnit
	misses  atomic.Int64 // operations in a row that outlasted a budget
	usual   atomic.Int64 // ns that nearly all operations take

	taking sync.Mutex // held while a batch is taken from the queue; before slot.mu

	maxBatch  int
	maxWeight int64
	timeout   time.Duration
	budget    time.Duration // what callers usually wait
	clock     func() int64  // ns, monotonic

	// direct is the way to the server over connections that a caller may use itself, if
	// there is one.
	direct func() *direct
	// exec runs the requests, which are of one kind, and puts the replies into them.
	exec func(ctx context.Context, reqs []*request) error
	// begin asks for leave; report must be called once when it is given.
	begin func() (report func(err error), err error)
	// ended is told of each operation and of how many callers it carried.
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

// slot is the place of one operation in flight.
type slot struct {
	taken atomic.Bool
	began atomic.Int64 // of the operation, ns of clock; 0: none

	// For whoever has taken the slot.
	wire    *wire    // a connection it has already
	held    *request // the rest of a chain, to go next and by no other way
	forming grouper
	refused []*request // taken from the queue, but not to be sent: their callers have left
	// The same, of callers who have not been told yet.
	sentAway []*request

	mu    sync.Mutex // guards batch against those who tell callers that their time is over
	batch []*request // one for each entry
	calls int
}

type dispatchConfig struct {
	inFlight, maxBatch, queue int
	timeout, budget           time.Duration
	clock                     func() int64
}

func newDispatcher(c dispatchConfig) *dispatcher {
	d := &dispatcher{
		most:      int64(c.queue),
		gate:      callGate{idle: make(chan struct{})},
		slots:     make([]slot, c.inFlight),
		maxBatch:  c.maxBatch,
		maxWeight: heaviest,
		timeout:   c.timeout,
		budget:    c.budget,
		clock:     c.clock,
		direct:    func() *direct { return nil },
	}
	for i := range d.slots {
		d.slots[i].forming = newGrouper(c.maxBatch)
	}
	d.alarm = newAlarm(c.clock, d.expire)
	return d
}

// send queues a request, or a chain of them, without waiting. An error means that none
// was sent and that the caller owns them alone.
func (d *dispatcher) send(r *request, deadline int64) error {
	err := d.post(r, d.clock(), deadline)
	if err == nil {
		d.kick()
	}
	return err
}

// post is send for somebody who will lead, or kick. now is when the call began, or later.
func (d *dispatcher) post(r *request, now, deadline int64) error {
	if d.gate.closed() {
		return ErrClosed
	}
	if d.overdue(now, deadline) {
		return errOverdue
	}
	n := int64(0)
	for q := r; q != nil; q = q.next {
		q.due = deadline
		n++
	}
	if d.waiting.Add(n)-n >= d.most { // a chain may be longer than the queue
		d.waiting.Add(-n)
		return errQueueFull
	}
	watched := r.over != nil // what is queued is not this goroutine's alone
	d.queue.push(r)
	if watched {
		deadline = min(deadline, now+int64(glance))
	}
	d.alarm.by(deadline)
	return nil
}

// overdue says whether the oldest operation in flight has outlasted the budget: then
// whoever comes now would only wait in vain.
func (d *dispatcher) overdue(now, deadline int64) bool {
	for i := range d.slots {
		began := d.slots[i].began.Load()
		if began != 0 && now-began > deadline-now {
			return true
		}
	}
	return false
}

// companyUnit is one caller in company.
const companyUnit = 64

// crowded says whether there is company to be had.
func (d *dispatcher) crowded() bool { return d.company.Load() >= 2*companyUnit }

// inFlight is the number of operations under way.
func (d *dispatcher) inFlight() (n int) {
	for i := range d.slots {
		if d.slots[i].began.Load() != 0 {
			n++
		}
	}
	return n
}

// patience is how long requests wait at most for company while an operation is under way
// and a slot is free.
const patience = time.Millisecond

// worthwhile is as many requests as are worth an operation of their own while another is
// under way: more in one call save Redis little (docs/performance.md).
const worthwhile = 16

// heaviest is the most that Redis gets to do in one operation, in request.weight; a single
// request may be heavier by itself. So no script runs for longer than 5 ms, on a machine of
// the year 2020 that does nothing else (TestNoScriptRunsLongerThanItMay).
const heaviest = 1024

// acquire takes a free slot, or nil. Under load it waits for company: an operation beside
// others leaves when half as many requests are waiting as batches have had lately, and
// those that are under way, or the alarm, see to fewer.
func (d *dispatcher) acquire() *slot {
	busy := d.busy.Load()
	if int(busy) >= len(d.slots) {
		return nil
	}
	if busy > 0 && d.waiting.Load() < min(worthwhile, d.company.Load()/2/companyUnit) {
		d.alarm.by(d.clock() + int64(patience))
		return nil
	}
	return d.occupy()
}

// occupy is acquire for those who do not wait for company.
func (d *dispatcher) occupy() *slot {
	if !d.gate.enter() {
		return nil
	}
	for i := range d.slots {
		if s := &d.slots[i]; !s.taken.Load() && s.taken.CompareAndSwap(false, true) {
			d.busy.Add(1)
			return s
		}
	}
	d.gate.leave()
	return nil
}

func (d *dispatcher) free(s *slot) {
	if s.wire != nil {
		s.wire.pool.put(s.wire)
		s.wire = nil
	}
	s.taken.Store(false)
	d.busy.Add(-1)
	d.gate.leave()
}

// kick sees to it that somebody serves the queue.
func (d *dispatcher) kick() {
	if s := d.acquire(); s != nil {
		go d.serve(s)
	}
}

// call queues one request and waits for its answer, as wait does. A caller who finds a
// slot free carries the batch itself, its own request and whatever else is waiting: that
// saves a lone caller two changes of goroutine.
func (d *dispatcher) call(ctx context.Context, r *request, now, deadline int64) (queued, unsent bool, err error) {
	d.watch(ctx, r)
	if err := d.post(r, now, deadline); err != nil {
		return false, true, err
	}
	if s := d.acquire(); s != nil {
		d.lead(ctx, s, r)
	}
	unsent, err = d.wait(ctx, r)
	return true, unsent, err
}

// glance is how often the alarm looks at the contexts of many callers.
const glance = 2 * time.Millisecond

// watch makes the alarm look at the context of one of many callers: to wait for two channels
// costs a caller half as much again as to wait for one (docs/adr/0027). One of few waits for
// both, and is not kept waiting by a timer. It comes before the request is queued.
func (d *dispatcher) watch(ctx context.Context, r *request) {
	if d.crowded() {
		r.over = ctx.Done()
	}
}

// wait waits for the answer until the request's time is over or ctx ends, or, where that is
// watched, ended up to a glance ago. A request that is given up is dropped unsent if it had
// not left; unsent says so.
func (d *dispatcher) wait(ctx context.Context, r *request) (unsent bool, err error) {
	if over := ctx.Done(); over == nil || r.over != nil {
		<-r.done
	} else {
		select {
		case <-r.done:
		case <-over:
			if unsent, did := r.giveUp(); did {
				return unsent, d.left(ctx, r)
			}
			<-r.done // answered, or given up, this very moment
		}
	}
	switch r.stage.Load() {
	case stageDropped:
		if r.ended() && d.clock() < r.due {
			return true, d.left(ctx, r)
		}
		return true, errBudget
	case stageAbandoned:
		if r.ended() && d.clock() < r.due {
			return false, d.left(ctx, r)
		}
		d.missed(r)
		return false, errBudget
	}
	return false, r.err
}

// left is what a caller hears whose context ended before its request's time was over.
func (d *dispatcher) left(ctx context.Context, r *request) error {
	err := ctx.Err()
	if errors.Is(err, context.DeadlineExceeded) {
		// The deadline was set to end after this request's, but on a busy machine
		// both can be over: the ladder still answers.
		err = errBudget
		d.missed(r)
	}
	return err
}

// missed notes that the operation a request is part of outlasted a caller's budget. From
// the second such operation in a row each counts as a failure: a server that is always too
// slow is as good as down. An operation younger than two thirds of the budget is not to
// blame: its caller had waited in the queue, or was in a hurry, and a hurried caller must
// not open the breaker for everybody.
func (d *dispatcher) missed(r *request) {
	op := r.op.Load()
	if op == nil || d.clock()-op.began < int64(d.budget)*2/3 {
		return
	}
	if op.missed.CompareAndSwap(false, true) && d.misses.Add(1) >= 2 {
		op.end(errBudget)
	}
}

// expire gives up the requests whose time is over, and sets the alarm for the next.
func (d *dispatcher) expire(now int64) {
	next := int64(never)
	check := func(r *request) {
		if stage := r.stage.Load(); stage != stageQueued && stage != stageSent {
			return
		}
		if r.due > now && !r.ended() {
			if next = min(next, r.due); r.over != nil {
				next = min(next, now+int64(glance))
			}
		} else if _, did := r.giveUp(); did {
			r.done <- struct{}{}
		}
	}
	// The queue first: what leaves it meanwhile is found in its slot.
	d.taking.Lock()
	d.queue.turn()
	for r := d.queue.head; r != nil; r = r.link {
		for q := r; q != nil; q = q.next {
			check(q)
		}
	}
	for i := range d.slots {
		for q := d.slots[i].held; q != nil; q = q.next {
			check(q)
		}
	}
	d.taking.Unlock()
	for i := range d.slots {
		s := &d.slots[i]
		s.mu.Lock()
		for _, e := range s.batch {
			for r := e; r != nil; r = r.follow {
				check(r)
			}
		}
		s.mu.Unlock()
	}
	if next != never {
		d.alarm.by(next)
	}
	if d.waiting.Load() > 0 {
		// They may have been waiting for company.
		if s := d.occupy(); s != nil {
			go d.serve(s)
		}
	}
}

// gather fills the slot with a batch of what is waiting, and says whether own is in it.
// Nobody waits for company: only what is there already comes along.
func (d *dispatcher) gather(s *slot, own *request) (mine bool) {
	usual := d.usual.Load()
	soonest := int64(0) // the earliest due that can still be met
	if reach := usual + usual/8; usual > 0 && reach < int64(d.budget) {
		soonest = d.clock() + reach
	}
	d.taking.Lock()
	s.mu.Lock()
	s.batch = s.batch[:0]
	s.forming.reset()
	weight, taken, late := int64(0), int64(0), false
	for {
		r := s.held
		if r == nil {
			r = d.queue.peek()
		}
		if r == nil || !d.fits(s, r, weight) {
			break
		}
		if s.held == nil {
			d.queue.pop()
		}
		s.held, r.next = r.next, nil
		taken++
		switch {
		case r.stage.Load() != stageQueued || (r.due >= soonest && !r.stage.CompareAndSwap(stageQueued, stageSent)):
			s.refused = append(s.refused, r) // its caller has left
		case r.due < soonest:
			// Sent now it would be charged, and answered when its caller has left. Of more
			// callers than a shard can serve, those at the head of the queue are always about
			// to leave: serving them would be serving nobody.
			if _, did := r.giveUp(); did {
				s.sentAway = append(s.sentAway, r)
			} else {
				s.refused = append(s.refused, r)
			}
			late = true
		default:
			weight += r.weight(s.forming.joins(r))
			s.batch = s.forming.add(s.batch, r)
			mine = mine || r == own
		}
	}
	s.calls = s.forming.calls
	more := d.queue.head != nil
	s.mu.Unlock()
	d.taking.Unlock()
	d.waiting.Add(-taken)
	if late {
		// A wrong guess would never be found out if nothing were sent. Once a sweep, not
		// once a request: a long queue would unlearn it altogether.
		d.usual.CompareAndSwap(usual, usual-usual/64)
	}
	for i, r := range s.refused {
		d.settle(r, errBudget)
		r.release()
		s.refused[i] = nil
	}
	s.refused = s.refused[:0]
	for i, r := range s.sentAway {
		d.settle(r, errBudget) // first: its caller's next step depends on it
		r.done <- struct{}{}
		r.release()
		s.sentAway[i] = nil
	}
	s.sentAway = s.sentAway[:0]
	if s.calls > 0 {
		company := d.company.Load()
		d.company.Store(company + (int64(s.calls)*companyUnit-company)/8)
	}
	if more {
		d.kick()
	}
	return mine
}

// fits says whether the batch takes one more request.
func (d *dispatcher) fits(s *slot, r *request, weight int64) bool {
	if len(s.batch) == 0 {
		return true
	}
	joins := s.forming.joins(r)
	if r.kind != s.batch[0].kind || weight+r.weight(joins) > d.maxWeight || s.forming.calls >= maxCalls(d.maxBatch) {
		return false
	}
	return joins || len(s.batch) < d.maxBatch
}

// queued says whether a request is there for whoever takes a slot. Those that slots hold
// are not: they go with their slot, and waiting for them here would be going in circles.
func (d *dispatcher) queued() bool {
	if d.queue.top.Load() != nil {
		return true
	}
	d.taking.Lock()
	defer d.taking.Unlock()
	return d.queue.head != nil // the alarm has turned the queue
}

// serve carries one batch after another until nothing is waiting.
func (d *dispatcher) serve(s *slot) {
	for {
		if len(s.batch) > 0 {
			d.run(s)
		}
		if d.gate.closed() {
			d.free(s)
			return
		}
		if d.crowded() {
			// Those who were just answered are about to come back: they, and not time, are
			// waited for.
			runtime.Gosched()
		}
		d.gather(s, nil)
		if len(s.batch) > 0 || s.held != nil {
			continue
		}
		d.free(s)
		if !d.queued() {
			return
		}
		// Somebody came before the slot was free, and relies on it.
		if s = d.acquire(); s == nil {
			return
		}
	}
}

// lead carries one batch for the caller of own, for as long as that has time.
func (d *dispatcher) lead(ctx context.Context, s *slot, own *request) {
	to := d.direct()
	if to == nil {
		go d.serve(s)
		return
	}
	if s.wire = to.wires.ready(); s.wire == nil {
		go d.serve(s) // connecting takes longer than a caller has
		return
	}
	if d.crowded() {
		runtime.Gosched()
	}
	if !d.gather(s, own) {
		if len(s.batch) > 0 {
			go d.serve(s)
		} else {
			d.next(s)
		}
		return
	}
	op := d.open(s)
	if op == nil {
		d.next(s)
		return
	}
	w := s.wire
	d.start(to, s, op)
	ended, err := d.goOn(ctx, w, &to.say, min(own.due, op.began+int64(d.timeout)))
	w.over()
	if !ended || len(w.strays) > 0 {
		// The replies need a reader still, and the others' requests may have more time.
		go func() {
			d.finish(s, op, d.rest(to, s, op, ended, err))
			d.serve(s)
		}()
		return
	}
	d.hangUp(s)
	d.finish(s, op, err)
	d.next(s)
}

// goOn carries an operation on until the instant, or until ctx ends: of that it takes notice
// at once only from a glance on, because it costs more than anything else here but the system
// calls, and nearly no operation takes as long. From then on the end of the connection is heard
// of, too, if it came just before the call was written (see rawWire).
func (d *dispatcher) goOn(ctx context.Context, w *wire, s *wireScripts, limit int64) (ended bool, err error) {
	until := func(at int64) time.Time { return time.Now().Add(time.Duration(at - d.clock())) }
	// A write over TLS must not run out of time.
	if soon := d.clock() + int64(glance); soon < limit && !w.secure {
		if ended, err = w.goOn(s, until(soon)); ended || !errors.Is(err, os.ErrDeadlineExceeded) {
			return ended, err
		}
	}
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, w.interruptible())
		defer stop()
	}
	return w.goOn(s, until(limit))
}

// next hands the slot of a caller who is done on to those who are waiting.
func (d *dispatcher) next(s *slot) {
	if s.held != nil || d.waiting.Load() > 0 {
		go d.serve(s)
		return
	}
	d.free(s)
	if d.queued() {
		d.kick()
	}
}

// rest carries a started operation on to its end, or what it has ended with.
func (d *dispatcher) rest(to *direct, s *slot, op *operation, ended bool, err error) error {
	w := s.wire
	if !ended {
		if ended, err = d.goOn(context.Background(), w, &to.say, op.began+int64(d.timeout)); !ended {
			err = w.abandon(&to.say, cmp.Or(err, os.ErrDeadlineExceeded))
		}
	}
	if len(w.strays) == 0 {
		d.hangUp(s)
		return err
	}
	strays, answered := slices.Clone(w.strays), w.answered
	clear(w.strays)
	d.hangUp(s)
	d.answerBut(s, strays)
	s.began.Store(0) // nobody waits for this server any more
	ctx, cancel := context.WithDeadline(context.Background(), d.end(op))
	defer cancel()
	lost := to.say.follow(ctx, strays)
	if err == nil && !answered {
		err = lost
	}
	return err
}

// end is when the operation's time is over.
func (d *dispatcher) end(op *operation) time.Time {
	return time.Now().Add(time.Duration(op.began + int64(d.timeout) - d.clock()))
}

// hangUp gives the connection back.
func (d *dispatcher) hangUp(s *slot) {
	s.wire.pool.put(s.wire)
	s.wire = nil
}

// open begins an operation; if the breaker does not let it, it is over already.
func (d *dispatcher) open(s *slot) *operation {
	report, err := d.begin()
	if err != nil {
		d.answer(s, err)
		return nil
	}
	op := &operation{kind: s.batch[0].kind, began: d.clock(), report: report}
	for _, e := range s.batch {
		for r := e; r != nil; r = r.follow {
			r.op.Store(op)
		}
	}
	s.began.Store(max(op.began, 1))
	return op
}

// run carries the batch of the slot from beginning to end.
func (d *dispatcher) run(s *slot) {
	op := d.open(s)
	if op == nil {
		return
	}
	to := d.direct()
	if to == nil {
		ctx, cancel := context.WithTimeout(context.Background(), d.timeout)
		err := d.exec(ctx, s.batch)
		cancel()
		d.finish(s, op, err)
		return
	}
	if s.wire != nil && !to.wires.owns(s.wire) { // the primary has changed
		d.hangUp(s)
	}
	if s.wire == nil {
		s.wire = to.wires.ready()
	}
	if s.wire == nil {
		if err := d.connect(to, s); err != nil {
			d.finish(s, op, err)
			return
		}
		if len(s.batch) == 0 {
			op.kind = opLook // connecting proves no more than a look does
			d.finish(s, op, nil)
			return
		}
	}
	d.start(to, s, op)
	d.finish(s, op, d.rest(to, s, op, false, nil))
}

// start puts the batch onto the connection of the slot.
func (d *dispatcher) start(to *direct, s *slot, op *operation) {
	op.apart = to.say.follow != nil
	s.wire.start(&to.say, op.kind, s.batch)
}

// connect makes a connection for the slot. Those whose callers have left meanwhile are
// dropped: nothing has been sent.
func (d *dispatcher) connect(to *direct, s *slot) error {
	ctx, cancel := context.WithTimeout(context.Background(), d.timeout)
	defer cancel()
	var err error
	if s.wire, err = to.wires.connect(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	entries := append([]*request(nil), s.batch...)
	s.batch = s.batch[:0]
	s.forming.reset()
	for _, e := range entries {
		e.count = min(e.count, 1)
		for r := e; r != nil; {
			next := r.follow
			r.group = group{}
			if r.stage.Load() == stageAbandoned {
				s.refused = append(s.refused, r)
			} else {
				s.batch = s.forming.add(s.batch, r)
			}
			r = next
		}
	}
	s.calls = s.forming.calls
	s.mu.Unlock()
	for i, r := range s.refused {
		d.settle(r, errBudget)
		d.lost(r, errBudget, true)
		r.release()
		s.refused[i] = nil
	}
	s.refused = s.refused[:0]
	return nil
}

// finish ends an operation.
func (d *dispatcher) finish(s *slot, op *operation, err error) {
	took := time.Duration(d.clock() - op.began)
	s.began.Store(0)
	if len(s.batch) > 0 {
		d.ended(s.batch[0].kind, s.calls, took, err)
	}
	if !op.missed.Load() {
		d.misses.Store(0)
	}
	if err == nil {
		d.learn(int64(took))
	}
	op.end(d.verdict(op.kind, err))
	if op.apart {
		err = nil
	}
	d.answer(s, err)
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

// answer hands every request of the batch to its caller.
func (d *dispatcher) answer(s *slot, err error) {
	s.mu.Lock()
	batch := s.batch
	s.batch = s.batch[:0] // the elements are ours still
	s.mu.Unlock()
	d.hand(batch, err)
}

// answerBut answers those whose requests are over, and leaves the others in the batch.
func (d *dispatcher) answerBut(s *slot, others []*request) {
	left := make(map[*request]bool, len(others))
	for _, e := range others {
		left[e] = true
	}
	var over []*request
	s.mu.Lock()
	for _, e := range s.batch {
		if !left[e] {
			over = append(over, e)
		}
	}
	s.batch = append(s.batch[:0], others...)
	s.mu.Unlock()
	d.hand(over, nil)
}

// hand hands requests to their callers, with their own errors where they have one.
func (d *dispatcher) hand(batch []*request, err error) {
	for i, e := range batch {
		own := err
		if e.failed != nil {
			own = e.failed // of a call to a Cluster, each slot has an error of its own
		}
		d.settle(e, own)
		spread(e)
		if e.leaser != nil && own == nil {
			// Before anybody else hears: who is denied for what was taken ahead is admitted
			// out of it.
			e.leaser.inherit()
		}
		for r := e; r != nil; {
			next := r.follow
			if late := r.answer(own); late || own != nil {
				d.lost(r, own, late)
			}
			r.release()
			r = next
		}
		batch[i] = nil
	}
}

// close ends the operations; the channel it returns tells when they have ended and what was
// left in the queue has been answered.
func (d *dispatcher) close() <-chan struct{} {
	d.gate.close()
	ended := make(chan struct{})
	go func() {
		<-d.gate.idle
		// Before the queue is emptied: who comes after that sets the alarm anew, and is sent
		// away by it.
		d.alarm.stop()
		d.drain()
		close(ended)
	}()
	return ended
}

func (d *dispatcher) drain() {
	d.taking.Lock()
	var left []*request
	for r := d.queue.peek(); r != nil; r = d.queue.peek() {
		d.queue.pop()
		left = append(left, r)
	}
	for i := range d.slots {
		if held := d.slots[i].held; held != nil {
			d.slots[i].held = nil
			left = append(left, held)
		}
	}
	d.taking.Unlock()
	for _, r := range left {
		for r != nil {
			next := r.next
			d.waiting.Add(-1)
			d.settle(r, ErrClosed)
			if r.stage.CompareAndSwap(stageQueued, stageSent) {
				r.answer(ErrClosed)
			}
			r.release()
			r = next
		}
	}
}
