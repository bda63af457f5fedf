package redistest

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Proxy is the network between a client and a server: a TCP proxy on 127.0.0.1
// that delays, cuts or swallows on demand. Its settings hold for open
// connections as well as new ones, from the next chunk of bytes on. All methods
// may be called from any goroutine.
//
// One thing it cannot imitate: a dead target. The proxy accepts first, so the
// client sees EOF where it would have been refused.
type Proxy struct {
	target   string
	listener net.Listener

	delay atomic.Int64 // nanoseconds
	cut   atomic.Bool
	cuts  atomic.Int64
	hole  gate

	ctx   context.Context // ends with Close
	stop  context.CancelFunc
	tasks sync.WaitGroup
}

// NewProxy starts a proxy to target, a host:port such as [Server.Addr]. The
// target need not be up.
func NewProxy(target string) (*Proxy, error) {
	if _, err := net.ResolveTCPAddr("tcp4", target); err != nil {
		return nil, fmt.Errorf("redistest: proxy target %q is no host:port: %w", target, err)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("redistest: opening the proxy's port: %w", err)
	}
	p := &Proxy{target: target, listener: l}
	p.ctx, p.stop = context.WithCancel(context.Background())
	p.tasks.Go(p.accept)
	return p, nil
}

// Addr returns the address that clients connect to, "127.0.0.1:port".
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// SetDelay makes every reply arrive d later. Replies travel side by side: a
// delay adds to the latency, it does not limit how many replies pass a second.
func (p *Proxy) SetDelay(d time.Duration) { p.delay.Store(int64(max(d, 0))) }

// CutReplies lets requests through while on, and closes the connection when the
// reply comes back instead of passing it on: the server has executed what the
// client sees fail. It cuts handshakes too, so let the client connect first.
func (p *Proxy) CutReplies(on bool) { p.cut.Store(on) }

// Cuts returns how many connections CutReplies has closed.
func (p *Proxy) Cuts() int { return int(p.cuts.Load()) }

// Blackhole accepts connections and bytes while on but passes nothing on, in
// either direction; when off, it delivers what was held back, as a network
// does that has healed: a request is then executed even if its client has given
// up.
func (p *Proxy) Blackhole(on bool) { p.hole.set(on) }

// Close closes all connections and returns when no goroutine is left. Calling
// it again does nothing.
func (p *Proxy) Close() {
	p.stop()
	_ = p.listener.Close()
	p.tasks.Wait()
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		p.tasks.Go(func() { p.serve(client.(*net.TCPConn)) })
	}
}

// gate holds goroutines back while it is shut. The zero value is open.
type gate struct {
	mu     sync.Mutex
	opened chan struct{} // guarded by mu; nil while open, closed on opening
}

func (g *gate) set(shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case shut && g.opened == nil:
		g.opened = make(chan struct{})
	case !shut && g.opened != nil:
		close(g.opened)
		g.opened = nil
	}
}

// pass waits until the gate is open; false means that ctx ended first.
func (g *gate) pass(ctx context.Context) bool {
	for {
		g.mu.Lock()
		opened := g.opened
		g.mu.Unlock()
		if opened == nil {
			return ctx.Err() == nil
		}
		select {
		case <-opened:
		case <-ctx.Done():
			return false
		}
	}
}
