package redistest

import (
	"bytes"
	"context"
	"net"
	"time"
)

// maxHeld is how many chunks of replies one connection may hold back. Beyond it
// the proxy stops reading, and the server feels back-pressure.
const maxHeld = 1024

// chunk is a piece of the reply stream and when it may go on.
type chunk struct {
	bytes []byte
	due   time.Time
}

// serve carries one connection until either side or the proxy closes it.
// Ending ctx closes both sockets, which unblocks every read.
func (p *Proxy) serve(client *net.TCPConn) {
	defer client.Close()
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()

	if !p.hole.pass(ctx) {
		return
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp4", p.target)
	if err != nil {
		return
	}
	server := conn.(*net.TCPConn)
	p.tasks.Go(func() {
		<-ctx.Done()
		_ = client.Close()
		_ = server.Close()
	})

	held := make(chan chunk, maxHeld)
	p.tasks.Go(func() { p.requests(ctx, cancel, client, server) })
	p.tasks.Go(func() { p.readReplies(ctx, cancel, server, held) })
	p.writeReplies(ctx, client, held)
}

// requests passes bytes to the server. When the client has closed, so that no
// more can come, the server still gets everything sent before and may answer.
func (p *Proxy) requests(ctx context.Context, cancel context.CancelFunc, client, server *net.TCPConn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := client.Read(buf)
		if !p.hole.pass(ctx) {
			return
		}
		if n > 0 {
			if _, werr := server.Write(buf[:n]); werr != nil {
				cancel()
				return
			}
		}
		if err != nil {
			_ = server.CloseWrite()
			return
		}
	}
}

// readReplies stamps each chunk with its due time, or cuts the connection.
func (p *Proxy) readReplies(ctx context.Context, cancel context.CancelFunc, server *net.TCPConn, held chan<- chunk) {
	defer close(held)
	buf := make([]byte, 32<<10)
	for {
		n, err := server.Read(buf)
		if n > 0 {
			if p.cut.Load() {
				p.cuts.Add(1)
				cancel()
				return
			}
			c := chunk{bytes: bytes.Clone(buf[:n]), due: time.Now().Add(time.Duration(p.delay.Load()))}
			select {
			case held <- c:
			case <-ctx.Done():
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// writeReplies passes each chunk on when it is due. It ends when the server has
// closed and everything it said has been delivered.
func (p *Proxy) writeReplies(ctx context.Context, client *net.TCPConn, held <-chan chunk) {
	for c := range held {
		if !sleepUntil(ctx, c.due) || !p.hole.pass(ctx) {
			return
		}
		if _, err := client.Write(c.bytes); err != nil {
			return
		}
	}
	p.hole.pass(ctx) // not even the server's close gets through a black hole
}

// sleepUntil returns false if ctx ended first.
func sleepUntil(ctx context.Context, t time.Time) bool {
	d := time.Until(t)
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
