package ringfence

import (
	"errors"
	"sync"
	"sync/atomic"
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
	count int64 // callers it stands for: 1, or 0 when it only tells a debit; see group
	hash  keyHash
	space keySpace
	name  []byte // the key in Redis, empty until somebody asks for it: see key

	// What the key owes its shard, told along the way; empty when nothing.
	debit string
	owed  owed
	from  *Limiter

	// What it takes ahead, see lease.go.
	wants int64     // further calls of the same cost, to be kept
	back  int64     // units of leases that the debit takes back
	lent  [2]lent   // which leases they are of
	asked int64     // when the lease began
	heir  *leaseKey // claimed for it, and told in the end; see inherit

	limit int   // index in the table of limits of the call it is part of
	due   int64 // when the caller will leave, ns of the dispatcher's clock
	// over is of the caller's context, where the alarm looks whether that has ended: see wait.
	over <-chan struct{}

	// The reply, written before done.
	now     int64
	status  int
	granted int64
	state   state
	extra   int64 // of wants, how many were granted
	whole   state // after all of the entry it was part of, where it asked for a lease
	err     error
	failed  error // its own error in an operation that did not fail as a whole

	stage atomic.Uint32
	fate  atomic.Uint32 // see settle.go
	holds bool          // its key in the ledger; guarded by ledger.mu
	refs  atomic.Int32
	op    atomic.Pointer[operation]
	done  chan struct{} // holds one value once answered, or given up
	next  *request      // the following one of the same AllowMany
	link  *request      // the following one in the queue
	home  *sync.Pool    // where it goes in the end
	group               // of an entry, in the first of its requests
}

// The stages of a request. Whoever moves it on by compare-and-swap owns the outcome.
const (
	stageQueued    uint32 = iota
	stageSent             // it is being written: it may run
	stageAnswered         // the reply is in it
	stageDropped          // the caller left before it was sent
	stageAbandoned        // the caller left after it was sent
)

// key is the key in Redis. It is written when it is first needed: of calls that are one entry,
// only the first needs it.
func (r *request) key() []byte {
	if len(r.name) == 0 {
		r.name = r.space.append(r.name, r.hash)
	}
	return r.name
}

// MarshalBinary is how go-redis writes the key without a copy.
func (r *request) MarshalBinary() ([]byte, error) { return r.key(), nil }

// newRequestPool makes the pool of one ring. It is not one for all rings: the channels of
// requests belong to the testing/synctest bubble they were made in.
func newRequestPool() *sync.Pool { return &sync.Pool{New: func() any { return freshRequest() }} }

func freshRequest() *request { return &request{done: make(chan struct{}, 1)} }

// newRequest is a request out of the ring's pool, held by two.
func (r *Ring) newRequest(kind opKind, rl *rule, h keyHash, cost int64) *request {
	q := r.requests.Get().(*request)
	q.home = r.requests
	return q.begin(kind, rl, h, r.space, cost)
}

// begin makes a request ready for use.
func (r *request) begin(kind opKind, rl *rule, h keyHash, space keySpace, cost int64) *request {
	r.kind, r.rule, r.hash, r.cost = kind, rl, h, cost
	r.space, r.name = space, r.name[:0]
	r.now, r.status, r.granted, r.state, r.err, r.failed = 0, 0, 0, state{}, nil, nil
	r.count, r.debit, r.owed, r.from = 1, "", owed{}, nil
	r.wants, r.back, r.lent, r.asked, r.heir, r.extra, r.whole = 0, 0, [2]lent{}, 0, nil, 0, state{}
	r.next, r.link, r.group = nil, nil, group{}
	r.fate.Store(fateOpen)
	r.holds = false
	r.op.Store(nil)
	r.stage.Store(stageQueued)
	r.refs.Store(2)
	return r
}

func (r *request) release() {
	if r.refs.Add(-1) > 0 {
		return
	}
	r.inherit()
	r.over = nil
	select {
	case <-r.done:
	default:
	}
	if r.home != nil {
		r.home.Put(r)
	}
}

// answer hands the request to the caller, if there is one. late is true when the caller
// has left although the request was sent.
func (r *request) answer(err error) (late bool) {
	if r.gone() {
		return true
	}
	r.err = err
	if !r.stage.CompareAndSwap(stageSent, stageAnswered) {
		return true
	}
	r.done <- struct{}{}
	return false
}

// gone says whether the caller left after the request was sent.
func (r *request) gone() bool { return r.stage.Load() == stageAbandoned }

// ended says whether the caller's context, if it is watched, has ended.
func (r *request) ended() bool {
	select {
	case <-r.over:
		return true
	default:
		return false
	}
}

// giveUp takes the request back for a caller whose time is over. It says whether it was
// the one who did; then unsent says whether it had not been sent.
func (r *request) giveUp() (unsent, did bool) {
	if r.stage.CompareAndSwap(stageQueued, stageDropped) {
		return true, true
	}
	return false, r.stage.CompareAndSwap(stageSent, stageAbandoned)
}

// weight is roughly how long Redis takes for it, in units that a sliding log adds; a token
// bucket takes as long as two of those. joins: as part of an entry that is there already.
func (r *request) weight(joins bool) int64 {
	w := int64(2)
	if joins {
		w = 0
	}
	if r.rule != nil && r.rule.algo == algoSlidingLog {
		w += r.cost*(1+r.wants) + r.owed.units + r.back
	}
	return w
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
	kind   opKind
	began  int64 // ns of the dispatcher's clock
	apart  bool  // each request says itself whether it failed
	report func(err error)
	told   atomic.Bool
	missed atomic.Bool
}

func (o *operation) end(err error) {
	if o.told.CompareAndSwap(false, true) {
		o.report(err)
	}
}
