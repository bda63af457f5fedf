package ringfence

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// wire is one connection to a server, with the one operation that is under way on it. An
// operation can be carried on by one goroutine after another, each for as long as it has
// time: what has been written and what has arrived stays here. It is one script call, or on
// a Redis Cluster one for each hash slot, written together; their replies come in order.
type wire struct {
	pool   *wirePool
	conn   net.Conn
	secure bool // TLS, which does not survive a write that stopped halfway
	raw    *rawWire
	used   time.Time
	moves  uint64 // of the pool, when the connection was made

	mu   sync.Mutex // guards turn and cut, and the deadline against interruption
	turn uint64     // counts those who carried an operation on
	cut  uint64     // the turn that was interrupted last, perhaps before it began

	kind   opKind
	reqs   []*request // by slot
	calls  []int      // where in reqs each call ends
	out    []byte
	sent   int
	in     []byte
	reply  replyReader
	limits []*rule
	order  []uint32 // scratch space for sorting
	given  bool     // the script went along as text

	// What the replies so far have come to.
	call     int        // whose reply is due
	first    int        // of reqs, in that call
	answered bool       // a call has run
	failed   error      // why one has not
	spoilt   bool       // the connection is of no more use
	unknown  []*request // of calls whose script the server does not have,
	ends     []int      // and where each of them ends
	strays   []*request // of calls that did not run here, for follow
}

// The parts of a node that an operation needs.
type wireScripts struct {
	scripts
	lookBySHA, lookByText string
	loaded                func() // told of each script the server had to be given

	// Of a master of a Redis Cluster, nil otherwise: follow does elsewhere what the server
	// sent away, and moved hears that a slot is another's. With them each slot has a call of
	// its own, and a request says itself whether it failed.
	follow func(ctx context.Context, reqs []*request) error
	moved  func()
}

const (
	keptBuffer = 64 << 10         // a buffer larger than this is not kept
	sureOf     = time.Millisecond // a connection that answered this recently is not checked

	// sparing is the least time in which a write over TLS is begun. One that runs out of
	// time ends the connection, even before a byte has left; and no server answers as fast.
	sparing = 100 * time.Microsecond
)

// longAgo is a deadline that makes whoever reads, or is about to, return at once.
var longAgo = time.Unix(1, 0)

// start writes the frames of an operation, without sending them.
func (w *wire) start(s *wireScripts, kind opKind, reqs []*request) {
	w.kind, w.given, w.answered, w.failed, w.spoilt = kind, false, false, nil, false
	w.unknown, w.ends, w.strays = w.unknown[:0], w.ends[:0], w.strays[:0]
	if s.follow == nil {
		w.reqs, w.calls = append(w.reqs[:0], reqs...), append(w.calls[:0], len(reqs))
	} else {
		w.sort(reqs)
	}
	w.frame(s)
}

// sort makes a call of the requests of each slot, in the order in which they came.
func (w *wire) sort(reqs []*request) {
	const index = 16 // bits; a batch has 256 entries at most
	w.order, w.reqs, w.calls = w.order[:0], w.reqs[:0], w.calls[:0]
	for i, r := range reqs {
		w.order = append(w.order, uint32(slotOf(tagOf(r.key())))<<index|uint32(i))
	}
	slices.Sort(w.order)
	for i, o := range w.order {
		w.reqs = append(w.reqs, reqs[o&(1<<index-1)])
		if i+1 == len(w.order) || w.order[i+1]>>index != o>>index {
			w.calls = append(w.calls, i+1)
		}
	}
}

// frame writes the calls.
func (w *wire) frame(s *wireScripts) {
	w.out = w.out[:0]
	first := 0
	for i, end := range w.calls {
		// The first one leaves the script with the server for the others.
		w.frameCall(s, w.reqs[first:end], w.given && i == 0)
		first = end
	}
	w.sent, w.in, w.call, w.first = 0, w.in[:0], 0, 0
	w.reply.reset()
	w.await()
}

// frameCall writes one call, byText with the script.
func (w *wire) frameCall(s *wireScripts, reqs []*request, byText bool) {
	command, text := "evalsha", s.charge.sha
	switch {
	case w.kind == opReset:
		w.out = appendUnlink(w.out, reqs)
		return
	case w.kind == opLook && byText:
		command, text = s.lookByText, s.look.text
	case w.kind == opLook:
		command, text = s.lookBySHA, s.look.sha
	case byText:
		command, text = "eval", s.charge.text
	}
	w.out, w.limits = appendScriptCall(w.out, command, text, w.kind == opCharge, reqs, w.limits[:0])
}

// await says which reply is due.
func (w *wire) await() {
	if w.call == len(w.calls) {
		return
	}
	entries := w.calls[w.call] - w.first
	if w.kind == opReset {
		entries = -1
	}
	w.reply.next(entries, w.call == len(w.calls)-1)
}

// goOn carries the operation on until it has ended, or until the given instant: then ended
// is false, err says how the time ran out, and somebody may go on, or abandon it. What it
// ended with is an error if the connection broke or no call ran, of which the server sent
// none away (see strays).
func (w *wire) goOn(s *wireScripts, until time.Time) (ended bool, err error) {
	if w.secure && !until.IsZero() && time.Until(until) < sparing {
		return false, os.ErrDeadlineExceeded
	}
	w.mu.Lock()
	w.turn++
	err = w.conn.SetDeadline(until)
	if err == nil && w.cut == w.turn {
		err = w.conn.SetReadDeadline(longAgo)
	}
	w.mu.Unlock()
	if err != nil {
		return true, w.abandon(s, err)
	}
	for {
		ended, err := w.exchange(s)
		switch {
		case !ended:
			return false, err
		case err != nil:
			return true, w.abandon(s, err)
		case len(w.unknown) == 0:
			return true, w.settle()
		}
		// A server that does not have the script gets it along: NOSCRIPT is the one refusal
		// after which sending again is safe, because nothing ran.
		s.loaded()
		w.given = true
		w.reqs, w.unknown = w.unknown, w.reqs[:0]
		w.calls, w.ends = w.ends, w.calls[:0]
		w.frame(s)
	}
}

// abandon ends an operation that has not got all of its replies, and its connection. What
// was answered stays answered.
func (w *wire) abandon(s *wireScripts, err error) error {
	w.spoilt = true
	if w.failed != nil && classify(w.failed) == typeAuth {
		err = w.failed // who does not know us hangs up, and runs nothing
	}
	if s.follow != nil {
		for _, r := range w.reqs[w.first:] {
			r.failed = err
		}
		w.strays = append(w.strays, w.unknown...)
	}
	_ = w.settle()
	return err
}

// settle ends the operation and says what it came to.
func (w *wire) settle() error {
	clear(w.limits)
	clear(w.reqs)
	clear(w.unknown)
	w.reqs, w.unknown = w.reqs[:0], w.unknown[:0]
	if cap(w.out) > keptBuffer {
		w.out = nil
	}
	if cap(w.in) > keptBuffer {
		w.in = nil
	}
	if w.answered || len(w.strays) > 0 {
		return nil
	}
	return w.failed
}

// take puts the reply that is whole into its requests, and waits for the next. An error
// means that it is none of these scripts'.
func (w *wire) take(s *wireScripts) error {
	end := w.calls[w.call]
	reqs := w.reqs[w.first:end]
	err := w.reply.failed
	switch {
	case err == nil && w.kind == opReset:
		w.answered = true
	case err == nil:
		if err = decodeReply(w.reply.values, reqs); err != nil {
			return err
		}
		w.answered = true
	default:
		w.refused(s, reqs, err)
	}
	w.first = end
	w.call++
	w.await()
	return nil
}

// refused notes what the server said instead of a reply.
func (w *wire) refused(s *wireScripts, reqs []*request, err error) {
	t := classify(err)
	switch {
	case t == typeNoScript && !w.given && w.kind != opReset:
		w.unknown = append(w.unknown, reqs...)
		w.ends = append(w.ends, len(w.unknown))
		return
	case s.follow != nil && (t == typeMoved || t == typeNoScript):
		w.strays = append(w.strays, reqs...)
		if strings.HasPrefix(err.Error(), "MOVED ") {
			s.moved()
		}
		return
	case s.follow != nil:
		for _, r := range reqs {
			r.failed = err
		}
	}
	if w.failed == nil {
		w.failed = err
	}
	// Who is not, or no longer, the primary may be behind a name that means another now; and
	// who does not know us hangs up.
	w.spoilt = w.spoilt || t.moved || t == typeAuth
}

// exchange writes what is not written and reads what has not arrived. Where it ends all
// replies have been read, or the connection is broken.
func (w *wire) exchange(s *wireScripts) (ended bool, err error) {
	if w.raw != nil {
		if did, ended, err := w.exchangeRaw(s); did {
			return ended, err
		}
	}
	for w.sent < len(w.out) {
		n, err := w.conn.Write(w.out[w.sent:])
		w.sent += n
		if err != nil {
			return w.secure || !errors.Is(err, os.ErrDeadlineExceeded), err
		}
	}
	for {
		n, err := w.conn.Read(w.room())
		if ended, bad := w.arrived(s, n); ended {
			return true, bad
		}
		if err != nil {
			return !errors.Is(err, os.ErrDeadlineExceeded), w.cutShort(err)
		}
	}
}

// room is where the next bytes go.
func (w *wire) room() []byte {
	if len(w.in) == cap(w.in) {
		w.in = slices.Grow(w.in, min(4<<10, w.reply.most()+1))
	}
	return w.in[len(w.in):cap(w.in)]
}

// arrived takes what n more bytes complete. It says whether that is all, or what is wrong
// with it.
func (w *wire) arrived(s *wireScripts, n int) (ended bool, err error) {
	w.in = w.in[:len(w.in)+n]
	for n > 0 {
		whole, bad := w.reply.read(w.in)
		if bad == nil && whole {
			bad = w.take(s)
		}
		if bad != nil {
			return true, bad
		}
		if !whole {
			break
		}
		if w.call == len(w.calls) {
			return true, nil
		}
	}
	if n > 0 && len(w.in)-w.reply.from > w.reply.most() {
		return true, fmt.Errorf("%w: over %d bytes", errProtocol, w.reply.most())
	}
	return false, nil
}

// cutShort tells an end within a reply from one before it.
func (w *wire) cutShort(err error) error {
	if errors.Is(err, io.EOF) && len(w.in) > w.reply.from {
		return io.ErrUnexpectedEOF
	}
	return err
}

// interruptible returns a function that makes the next turn of goOn end at once; if it has not
// begun yet, perhaps as soon as it has written. It does nothing to later ones.
func (w *wire) interruptible() func() {
	w.mu.Lock()
	turn := w.turn + 1
	w.mu.Unlock()
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.turn > turn {
			return
		}
		w.cut = turn
		if w.turn == turn {
			// If it fails the connection is broken, which reading finds out.
			_ = w.conn.SetReadDeadline(longAgo)
		}
	}
}

// over ends the turn, so that no interruption reaches the next operation.
func (w *wire) over() {
	w.mu.Lock()
	w.turn++
	w.mu.Unlock()
}

// wirePool are the connections to one server: as many as there are operations under way
// at once, each with one operation at a time, so that a broken one fails no other's.
type wirePool struct {
	network  string
	username string
	password string
	db       int
	dial     dialer
	gate     *refusals // shared with the other servers of the shard

	moves atomic.Uint64 // how often the address has changed

	mu      sync.Mutex // guards the following
	address string     // empty: not known yet
	idle    []*wire    // the last used last
	all     map[*wire]struct{}
	closed  bool
}

// move says where the server is from now on. Connections to where it was are closed when
// they are not in use any more.
func (p *wirePool) move(address string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.address == address {
		return
	}
	p.address = address
	p.moves.Add(1)
	for _, w := range p.idle {
		delete(p.all, w)
		_ = w.conn.Close()
	}
	p.idle = nil
}

// owns says whether a connection is one of the pool's and leads to where the server is.
func (p *wirePool) owns(w *wire) bool { return w.pool == p && w.moves == p.moves.Load() }

// ready is a connection that can be used now, or nil.
func (p *wirePool) ready() *wire {
	for {
		p.mu.Lock()
		n := len(p.idle)
		if n == 0 {
			p.mu.Unlock()
			return nil
		}
		w := p.idle[n-1]
		p.idle = p.idle[:n-1]
		p.mu.Unlock()
		if time.Since(w.used) < sureOf || alive(w.conn) {
			return w
		}
		p.drop(w)
	}
}

// put takes a connection back.
func (p *wirePool) put(w *wire) {
	if w.spoilt || !p.keep(w) {
		p.drop(w)
	}
}

func (p *wirePool) keep(w *wire) bool {
	w.used = time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || w.moves != p.moves.Load() {
		return false
	}
	p.idle = append(p.idle, w)
	return true
}

func (p *wirePool) drop(w *wire) {
	p.mu.Lock()
	delete(p.all, w)
	p.mu.Unlock()
	// It is broken or of no more use; how it takes that matters to nobody.
	_ = w.conn.Close()
}

// counts are the connections, and how many of them are idle.
func (p *wirePool) counts() (all, idle int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.all), len(p.idle)
}

// count adds them to a pool's.
func (p *wirePool) count(s *redis.PoolStats) {
	all, idle := p.counts()
	s.TotalConns += uint32(all)
	s.IdleConns += uint32(idle)
}

// close closes the connections, which ends the operations on them.
func (p *wirePool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for w := range p.all {
		_ = w.conn.Close()
	}
	clear(p.all)
	p.idle = nil
}

// connect makes a connection, or says why there is none: nothing of an operation has been
// sent then.
func (p *wirePool) connect(ctx context.Context) (*wire, error) {
	p.mu.Lock()
	address, moves := p.address, p.moves.Load()
	p.mu.Unlock()
	if err := p.gate.leave(address); err != nil {
		return nil, err
	}
	conn, err := p.dial(ctx, p.network, address)
	if err != nil {
		return nil, notConnected(err)
	}
	_, secure := conn.(*tls.Conn)
	w := &wire{pool: p, conn: conn, secure: secure, moves: moves}
	w.raw = w.newRaw()
	if !p.add(w) {
		return nil, errors.Join(net.ErrClosed, conn.Close())
	}
	if err := p.greet(ctx, w); err != nil {
		p.drop(w)
		if said := serverError(""); errors.As(err, &said) && refusalIn([]byte("-"+said)) != "" {
			p.gate.refused(address, string(said))
		}
		return nil, notConnected(err)
	}
	p.gate.accepted(address)
	return w, nil
}

func (p *wirePool) add(w *wire) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.all[w] = struct{}{}
	return true
}

// notConnected marks an error as one before anything was sent, unless the server said what
// it is.
func notConnected(err error) error {
	var said serverError
	var op *net.OpError
	if errors.As(err, &said) || (errors.As(err, &op) && op.Op == "dial") {
		return err
	}
	return &net.OpError{Op: "dial", Net: "tcp", Err: err}
}

// greet says who we are and picks the database. HELLO is allowed to everybody and tells
// a user without a password from one who needs one; what does not know it gets AUTH.
func (p *wirePool) greet(ctx context.Context, w *wire) error {
	if until, ok := ctx.Deadline(); ok {
		if err := w.conn.SetDeadline(until); err != nil {
			return err
		}
	}
	user := p.username
	if user == "" {
		user = "default"
	}
	hello := []string{"hello", "2"}
	if p.password != "" {
		hello = append(hello, "auth", user, p.password)
	}
	err := w.tell(hello...)
	var said serverError
	if errors.As(err, &said) && unknownCommand(said) {
		err = nil
		if p.password != "" {
			auth := []string{"auth", p.username, p.password}
			if p.username == "" {
				auth = []string{"auth", p.password}
			}
			err = w.tell(auth...)
		}
	}
	if err == nil && p.db != 0 {
		err = w.tell("select", fmt.Sprint(p.db))
	}
	return err
}

func unknownCommand(e serverError) bool {
	return strings.HasPrefix(string(e), "ERR unknown command")
}

// tell sends one command and waits until it has been answered, with whatever.
func (w *wire) tell(words ...string) error {
	out := appendCount(nil, len(words))
	for _, word := range words {
		out = appendBulk(out, word)
	}
	if _, err := w.conn.Write(out); err != nil {
		return err
	}
	in := make([]byte, 0, 1<<10)
	for {
		in = slices.Grow(in, 512)
		n, err := w.conn.Read(in[len(in):cap(in)])
		in = in[:len(in)+n]
		next, failed, bad := skipReply(in, 0, 4)
		switch {
		case bad != nil:
			return bad
		case next == len(in):
			return failed
		case next >= 0, len(in) > maxGreeting:
			return fmt.Errorf("%w: more than the reply to %s", errProtocol, words[0])
		case err != nil:
			return err
		}
	}
}
