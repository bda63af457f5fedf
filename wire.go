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
	"time"
)

// wire is one connection to a server, with the one operation that is under way on it. An
// operation can be carried on by one goroutine after another, each for as long as it has
// time: what has been written and what has arrived stays here.
type wire struct {
	pool   *wirePool
	conn   net.Conn
	secure bool // TLS, which does not survive a write that stopped halfway
	used   time.Time

	mu   sync.Mutex // guards turn and cut, and the deadline against interruption
	turn uint64     // counts those who carried an operation on
	cut  uint64     // the turn that was interrupted last, perhaps before it began

	kind   opKind
	reqs   []*request
	out    []byte
	sent   int
	in     []byte
	reply  replyReader
	limits []*rule
	given  bool // the script went along as text
}

// The parts of a node that an operation needs.
type wireScripts struct {
	scripts
	lookBySHA, lookByText string
	loaded                func() // told of each script the server had to be given
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

// start writes the frame of an operation, without sending it.
func (w *wire) start(s *wireScripts, kind opKind, reqs []*request) {
	w.kind, w.reqs, w.given = kind, reqs, false
	w.frame(s)
}

func (w *wire) frame(s *wireScripts) {
	command, text := "evalsha", s.charge.sha
	want := replyHead + replyEntries*len(w.reqs)
	switch {
	case w.kind == opReset:
		w.out, want = appendUnlink(w.out[:0], w.reqs), -1
	case w.kind == opLook && w.given:
		command, text = s.lookByText, s.look.text
	case w.kind == opLook:
		command, text = s.lookBySHA, s.look.sha
	case w.given:
		command, text = "eval", s.charge.text
	}
	if w.kind != opReset {
		w.out, w.limits = appendScriptCall(w.out[:0], command, text, w.reqs, w.limits[:0])
	}
	w.sent, w.in = 0, w.in[:0]
	w.reply.reset(want)
}

// goOn carries the operation on until it has ended, or until the given instant: then ended
// is false, err says how the time ran out, and somebody may go on. An error of an operation
// that has ended and is not the server's own word has broken the connection.
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
		return true, err
	}
	for {
		if ended, err := w.exchange(); !ended || err != nil {
			return ended, err
		}
		err := w.reply.failed
		if err == nil || w.given || w.kind == opReset || classify(err) != typeNoScript {
			return true, w.settle(err)
		}
		// A server that does not have the script gets it along: NOSCRIPT is the one refusal
		// after which sending again is safe, because nothing ran.
		s.loaded()
		w.given = true
		w.frame(s)
	}
}

// settle puts the reply into the requests.
func (w *wire) settle(err error) error {
	clear(w.limits)
	if err == nil && w.kind != opReset {
		err = decodeReply(w.reply.values, w.reqs)
	}
	w.reqs = nil
	if cap(w.out) > keptBuffer {
		w.out = nil
	}
	if cap(w.in) > keptBuffer {
		w.in = nil
	}
	return err
}

// exchange writes what is not written and reads what has not arrived. Where it ends the
// reply is whole, or the connection is broken.
func (w *wire) exchange() (ended bool, err error) {
	for w.sent < len(w.out) {
		n, err := w.conn.Write(w.out[w.sent:])
		w.sent += n
		if err != nil {
			return w.secure || !errors.Is(err, os.ErrDeadlineExceeded), err
		}
	}
	most := w.reply.most()
	for {
		if len(w.in) == cap(w.in) {
			w.in = slices.Grow(w.in, min(4<<10, most+1))
		}
		n, err := w.conn.Read(w.in[len(w.in):cap(w.in)])
		w.in = w.in[:len(w.in)+n]
		if n > 0 {
			whole, bad := w.reply.read(w.in)
			switch {
			case bad != nil:
				return true, bad
			case whole:
				return true, nil
			case len(w.in) > most:
				return true, fmt.Errorf("%w: over %d bytes", errProtocol, most)
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) && len(w.in) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return !errors.Is(err, os.ErrDeadlineExceeded), err
		}
	}
}

// interruptible returns a function that makes the next turn of goOn end at once, or as soon
// as it has written if it has not begun yet. It does nothing to later ones.
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

// broken says whether an operation's error leaves the connection in an unknown state.
func broken(err error) bool {
	var said serverError
	if err == nil {
		return false
	}
	// Who is not, or no longer, the primary may be behind a name that means another now; and
	// who does not know us hangs up.
	return !errors.As(err, &said) || classify(err).moved || classify(err) == typeAuth
}

// wirePool are the connections to one server: as many as there are operations under way
// at once, each with one operation at a time, so that a broken one fails no other's.
type wirePool struct {
	network, address string
	username         string
	password         string
	db               int
	dial             dialer
	gate             *refusals // shared with the other servers of the shard

	mu     sync.Mutex // guards the following
	idle   []*wire    // the last used last
	all    map[*wire]struct{}
	closed bool
}

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

// put takes a connection back, err being what its operation ended with.
func (p *wirePool) put(w *wire, err error) {
	if broken(err) {
		p.drop(w)
		return
	}
	w.used = time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.idle = append(p.idle, w)
	}
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
	if err := p.gate.leave(p.address); err != nil {
		return nil, err
	}
	conn, err := p.dial(ctx, p.network, p.address)
	if err != nil {
		return nil, notConnected(err)
	}
	_, secure := conn.(*tls.Conn)
	w := &wire{pool: p, conn: conn, secure: secure}
	if !p.add(w) {
		return nil, errors.Join(net.ErrClosed, conn.Close())
	}
	if err := p.greet(ctx, w); err != nil {
		p.drop(w)
		if said := serverError(""); errors.As(err, &said) && refusalIn([]byte("-"+said)) != "" {
			p.gate.refused(p.address, string(said))
		}
		return nil, notConnected(err)
	}
	p.gate.accepted(p.address)
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
