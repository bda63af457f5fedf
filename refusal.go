package ringfence

import (
	"bytes"
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// refusals keeps a process from knocking again and again at a server that does not let it
// in: with a wrong password, or without the permission to select its database, every
// operation would dial anew. The breaker is not for that, since waiting changes nothing
// and the server is well; so connections are tried with a back-off like the breaker's, and
// in between operations get the server's last word at once. With the default back-off that
// is at most 25 connections a minute to one address, of which up to Config.InFlight come
// before the first refusal is known; what is put right is found out within 5 s.
type refusals struct {
	now  func() time.Time
	draw func() uint64

	any atomic.Bool // whether there is one: all that a good connection looks at

	mu sync.Mutex          // guards by
	by map[string]*lockout // by address, and for those who say READONLY with that after it
}

// readonly marks what is refused only to connections that say READONLY.
const readonly = " readonly"

// lockout is how things stand with one address.
type lockout struct {
	word  serverError
	until time.Time
	tries int
}

func newRefusals(c Config) *refusals {
	return &refusals{now: c.Now, draw: c.Rand, by: map[string]*lockout{}}
}

// leave says whether an address may be dialed now: nil, or the word of its last refusal.
func (g *refusals) leave(addr string) error {
	if g == nil || !g.any.Load() {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.by[addr]
	if r == nil {
		return nil
	}
	now := g.now()
	if now.Before(r.until) {
		return r.word
	}
	r.wait(now, g.draw())
	return nil
}

// wait sets when the next try is. The back-off is that of a breaker by default.
func (r *lockout) wait(now time.Time, draw uint64) {
	r.tries++
	r.until = now.Add(openPeriod(BreakerConfig{OpenPeriod: 100 * time.Millisecond, MaxOpenPeriod: 5 * time.Second}, r.tries, draw))
}

// refused notes that an address does not let us in.
func (g *refusals) refused(addr, word string) {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.by[addr]
	if r == nil {
		r = &lockout{}
		r.wait(g.now(), g.draw())
		g.by[addr] = r
		g.any.Store(true)
	}
	r.word = serverError(word)
}

// accepted notes that it does.
func (g *refusals) accepted(addr string) {
	if g == nil || !g.any.Load() {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.by, addr)
	g.any.Store(len(g.by) > 0)
}

// through is the dialer, kept from servers that refuse us. A server says so while the
// connection is made ready, which go-redis does, so the connections listen to the first
// replies.
func (g *refusals) through(dial dialer, reader bool) dialer {
	if g == nil {
		return dial
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		for _, at := range placesOf(addr, reader) {
			if err := g.leave(at); err != nil {
				return nil, err
			}
		}
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		heard := &hearing{Conn: conn, gate: g, addr: addr, reader: reader}
		if raw, ok := conn.(syscall.Conn); ok {
			return rawHearing{heard, raw}, nil
		}
		return heard, nil
	}
}

// placesOf are the names under which a connection may be refused.
func placesOf(addr string, reader bool) []string {
	if reader {
		return []string{addr + readonly, addr}
	}
	return []string{addr}
}

// hearing is a connection that listens to what the server says.
type hearing struct {
	net.Conn
	gate   *refusals
	addr   string
	reader bool // says READONLY
	reads  int  // one reader at a time
	cast   bool // the server has refused this connection
}

// rawHearing is one that go-redis can ask whether it is still alive.
type rawHearing struct {
	*hearing
	syscall.Conn
}

// readyAfter is how many replies making a connection ready takes at most: to HELLO, to
// AUTH, and to what selects the database and says READONLY.
const readyAfter = 3

// Read reads, and notes what it means for the next connections.
func (c *hearing) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n == 0 || (c.reads >= readyAfter && !c.gate.any.Load()) {
		return n, err
	}
	c.reads++
	switch said := p[:n]; {
	case c.reads <= readyAfter && refusalIn(said) != "":
		c.cast = true
		at, word := c.addr, refusalIn(said)
		if strings.Contains(word, "'readonly'") {
			at += readonly
		}
		c.gate.refused(at, word)
	case c.reads > 1 && !c.cast && said[0] != '-':
		// The first reply, to HELLO, says nothing of what follows.
		for _, at := range placesOf(c.addr, c.reader) {
			c.gate.accepted(at)
		}
	}
	return n, err
}

// Write writes. A server that does not take our certificate says so and hangs up; if it
// is quick, the first write fails before anybody has read why.
func (c *hearing) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err == nil || c.reads > 0 || isTimeout(err) {
		return n, err
	}
	c.reads++
	var op *net.OpError
	if late := c.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); late != nil {
		return n, err
	}
	if _, why := c.Conn.Read(make([]byte, 1)); errors.As(why, &op) && op.Op == "remote error" {
		return n, why
	}
	return n, err
}

// refusalIn is the one of these replies that makes a connection useless because of who we
// are; empty if there is none.
func refusalIn(said []byte) string {
	for line := range bytes.SplitSeq(said, []byte("\r\n")) {
		word, failed := bytes.CutPrefix(line, []byte("-"))
		if !failed {
			continue
		}
		for _, prefix := range []string{"NOAUTH ", "WRONGPASS ", "ERR DB index is out of range"} {
			if bytes.HasPrefix(word, []byte(prefix)) {
				return string(word)
			}
		}
		// What an operation is not permitted leaves the connection as good as it was.
		for _, command := range []string{"'select'", "'readonly'", "'auth'", "'hello'"} {
			if bytes.HasPrefix(word, []byte("NOPERM ")) && bytes.Contains(word, []byte(command)) {
				return string(word)
			}
		}
	}
	return ""
}
