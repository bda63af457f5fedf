package histories

import (
	"bufio"
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// simLink is one connection to a simulated server. What happens to a request depends on
// the seed, the number of the connection and that of the request on it, and on nothing
// that a scheduler decides.
type simLink struct {
	server   *simServer
	number   uint64
	near     net.Conn // the client's end
	far      net.Conn // the other end of that
	back     net.Conn // to miniredis
	dead     atomic.Bool
	cutting  atomic.Bool // the next reply
	carriers sync.WaitGroup
}

func (l *simLink) close() {
	if l.dead.Swap(true) {
		return
	}
	l.far.Close()
	l.back.Close()
	l.server.mu.Lock()
	delete(l.server.links, l)
	l.server.mu.Unlock()
}

// carryRequests takes requests to the server, one after another. One that is on its way
// arrives even if the client has hung up.
func (l *simLink) carryRequests() {
	defer l.close()
	buf := make([]byte, 256<<10)
	for n := uint64(0); ; n++ {
		size, err := l.far.Read(buf)
		if err != nil {
			return
		}
		draw := stream(l.server.seed, 2, l.number, n)
		w := l.now()
		time.Sleep(draw.between(20*time.Microsecond, 400*time.Microsecond) + draw.between(0, w.slow))
		l.server.requests.pass()
		if w = l.now(); w.down || l.dead.Load() {
			return
		}
		fate := draw.part()
		if fate < w.lost {
			return
		}
		if w.says != "" {
			if _, err := l.far.Write([]byte(strings.Repeat(w.says+"\r\n", commands(buf[:size])))); err != nil {
				return
			}
			continue
		}
		cut := w.cut
		if w.returns > 0 && bytes.Contains(buf[:size], []byte("\r\n-")) { // a debit below zero
			cut = w.returns
		}
		l.cutting.Store(fate < w.lost+cut)
		if _, err := l.back.Write(buf[:size]); err != nil {
			return
		}
	}
}

// carryReplies takes replies back.
func (l *simLink) carryReplies() {
	defer l.close()
	buf := make([]byte, 256<<10)
	for n := uint64(0); ; n++ {
		size, err := l.back.Read(buf)
		if err != nil || l.cutting.Load() {
			return
		}
		draw := stream(l.server.seed, 3, l.number, n)
		time.Sleep(draw.between(20*time.Microsecond, 400*time.Microsecond) + draw.between(0, l.now().slow))
		l.server.replies.pass()
		if _, err := l.far.Write(buf[:size]); err != nil {
			return
		}
	}
}

func (l *simLink) now() weather { return l.server.now() }

// commands is how many commands a request holds.
func commands(request []byte) int {
	r, n := bufio.NewReader(bytes.NewReader(request)), 0
	for {
		head, err := r.ReadString('\n')
		if err != nil || head[0] != '*' {
			return max(n, 1)
		}
		n++
		parts, _ := strconv.Atoi(strings.TrimSpace(head[1:]))
		for range parts {
			size, _ := r.ReadString('\n')
			length, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(size, "$")))
			if err != nil {
				return n
			}
			_, _ = r.Discard(length + 2) // what is missing shows at the next head
		}
	}
}

// simConn is the client's end. go-redis asks the system whether an idle connection is
// still open; this is the system's answer.
type simConn struct {
	net.Conn
	link *simLink
}

func (c simConn) SyscallConn() (syscall.RawConn, error) { return simRaw{c.link}, nil }

type simRaw struct{ link *simLink }

func (r simRaw) Read(func(fd uintptr) bool) error {
	if r.link.dead.Load() {
		return io.EOF
	}
	return nil
}

func (r simRaw) Write(func(fd uintptr) bool) error { return nil }

func (r simRaw) Control(func(fd uintptr)) error { return nil }

// gate holds goroutines back while it is shut. The zero value is open.
type gate struct {
	mu     sync.Mutex
	opened chan struct{} // guarded by mu; nil while open
}

func (g *gate) set(shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if shut && g.opened == nil {
		g.opened = make(chan struct{})
	} else if !shut && g.opened != nil {
		close(g.opened)
		g.opened = nil
	}
}

func (g *gate) pass() {
	g.mu.Lock()
	opened := g.opened
	g.mu.Unlock()
	if opened != nil {
		<-opened
	}
}

// draws are the random numbers of one purpose.
type draws struct{ *rand.Rand }

// stream is the random numbers that a seed has for the purpose of this name.
func stream(seed uint64, name ...uint64) draws {
	return draws{rand.New(rand.NewPCG(seed, mix(name...)))}
}

// between is a duration from least to most.
func (d draws) between(least, most time.Duration) time.Duration {
	return least + time.Duration(d.Int64N(int64(max(0, most-least))+1))
}

// part is a number from 0 to 1.
func (d draws) part() float64 { return d.Float64() }

// mix makes one number of several (the finaliser of SplitMix64, Steele and others 2014).
func mix(numbers ...uint64) uint64 {
	h := uint64(0x9e3779b97f4a7c15)
	for _, n := range numbers {
		h ^= n + 0x9e3779b97f4a7c15
		h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
		h = (h ^ h>>27) * 0x94d049bb133111eb
		h ^= h >> 31
	}
	return h
}
