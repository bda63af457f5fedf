package histories

import (
	"bufio"
	"context"
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/alicebob/miniredis/v2/server"
)

// simServer is a server in virtual time: miniredis behind a network of our own. miniredis
// knows neither roles nor the "#!lua" line; an answer in between gives it both, so that a
// ring speaks to it as to Redis.
type simServer struct {
	addr string
	m    *miniredis.Miniredis
	seed uint64

	mu       sync.Mutex // guards the following
	master   bool
	replID   string
	replID2  string
	scripts  map[string]string // by digest, without the first line
	links    map[*simLink]struct{}
	dialed   uint64
	weather  weather
	requests gate
	replies  gate
	plant    plant
	writes   uint64
	ahead    time.Duration // by which its clock is
}

// weather is what a server and its network are doing now. The zero value is a fine day.
type weather struct {
	down     bool          // the process is gone
	refusing bool          // no new connections
	slow     time.Duration // at most added to each way
	lost     float64       // part of requests after which the connection is cut, unexecuted
	cut      float64       // part of requests that are executed, and the connection cut
	returns  float64       // the same of requests that return what was taken ahead
	says     string        // what it answers to everything
}

// plant is a bug put in on purpose.
type plant uint8

const (
	nothing plant = iota
	twice         // now and then a charge is executed twice
	forget        // now and then what a key had used is forgotten after a charge
	flush         // once, all keys are forgotten
)

func newSimServer(addr string, seed uint64, master bool) *simServer {
	s := &simServer{
		addr: addr, m: miniredis.NewMiniRedis(), seed: seed, master: master,
		scripts: map[string]string{}, links: map[*simLink]struct{}{},
	}
	s.m.ClockTTL(true)
	return s
}

// start makes a server answer as Redis would.
func (s *simServer) start() error {
	c, err := s.m.Dial() // starts it
	if err != nil {
		return err
	}
	s.m.Server().SetPreHook(s.between)
	return c.Close()
}

// between answers what miniredis does not know, and hands on the rest.
func (s *simServer) between(c *server.Peer, cmd string, args ...string) bool {
	switch cmd {
	case "TIME":
		s.mu.Lock()
		us := time.Now().Add(s.ahead).UnixMicro()
		s.mu.Unlock()
		c.WriteLen(2)
		c.WriteBulk(strconv.FormatInt(us/1e6, 10))
		c.WriteBulk(strconv.FormatInt(us%1e6, 10))
	case "INFO":
		c.WriteBulk(s.info())
	case "SCRIPT":
		if len(args) != 2 || !strings.EqualFold(args[0], "load") {
			return false
		}
		c.WriteBulk(s.keep(args[1]))
	case "EVALSHA", "EVALSHA_RO":
		s.mu.Lock()
		text, ok := s.scripts[args[0]]
		s.mu.Unlock()
		if !ok {
			c.WriteError("NOSCRIPT No matching script. Please use EVAL.")
			return true
		}
		s.run(c, text, args[1:], cmd == "EVALSHA")
	case "EVAL", "EVAL_RO":
		if !strings.HasPrefix(args[0], "#!lua") {
			return false // from run
		}
		s.mu.Lock()
		text := s.scripts[s.keepLocked(args[0])]
		s.mu.Unlock()
		s.run(c, text, args[1:], cmd == "EVAL")
	default:
		return false
	}
	return true
}

func (s *simServer) keep(text string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keepLocked(text)
}

func (s *simServer) keepLocked(text string) string {
	sum := sha1.Sum([]byte(text))
	digest := hex.EncodeToString(sum[:])
	_, s.scripts[digest], _ = strings.Cut(text, "\n")
	return digest
}

func (s *simServer) run(c *server.Peer, text string, args []string, writes bool) {
	s.mu.Lock()
	master, bug := s.master, nothing
	if writes && master {
		s.writes++
		if s.plant == flush && s.writes == 20 || s.plant != flush && mix(s.seed, 9, s.writes)%8 == 0 {
			bug = s.plant
		}
	}
	s.mu.Unlock()
	if writes && !master {
		c.WriteError("READONLY You can't write against a read only replica.")
		return
	}
	do := func(c *server.Peer) { s.m.Server().Dispatch(c, append([]string{"EVAL", text}, args...)) }
	do(c)
	switch bug {
	case twice:
		do(server.NewPeer(bufio.NewWriter(io.Discard)))
	case forget:
		s.m.Del(args[1])
	case flush:
		s.m.FlushAll()
	}
}

func (s *simServer) info() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	text := "redis_version:7.0.15\r\nmaxmemory:0\r\nmaxmemory_policy:noeviction\r\n"
	if s.master {
		return text + fmt.Sprintf("role:master\r\nmaster_replid:%s\r\nmaster_replid2:%s\r\n", s.replID, s.replID2)
	}
	return text + fmt.Sprintf("role:slave\r\nmaster_replid:%s\r\nmaster_link_status:up\r\nmaster_last_io_seconds_ago:0\r\n", s.replID)
}

func (s *simServer) now() weather {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.weather
}

// set changes the weather.
func (s *simServer) set(w weather) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.weather = w
}

// kill ends the process: its connections break, and it knows no script any more.
func (s *simServer) kill() {
	s.mu.Lock()
	s.weather = weather{down: true}
	s.scripts = map[string]string{}
	var links []*simLink
	for l := range s.links {
		links = append(links, l)
	}
	s.mu.Unlock()
	for _, l := range links {
		l.close()
	}
}

// dial opens a connection.
func (s *simServer) dial(ctx context.Context) (net.Conn, error) {
	s.mu.Lock()
	s.dialed++
	n, w := s.dialed, s.weather
	s.mu.Unlock()
	draw := stream(s.seed, 1, n)
	select {
	case <-time.After(draw.between(30*time.Microsecond, 200*time.Microsecond)):
	case <-ctx.Done():
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: ctx.Err()}
	}
	if w.down || w.refusing {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	back, err := s.m.Dial()
	if err != nil {
		return nil, err
	}
	near, far := net.Pipe()
	l := &simLink{server: s, number: n, near: near, far: far, back: back}
	s.mu.Lock()
	s.links[l] = struct{}{}
	s.mu.Unlock()
	l.carriers.Go(l.carryRequests)
	l.carriers.Go(l.carryReplies)
	return simConn{near, l}, nil
}

// close ends the server and what is left of its connections.
func (s *simServer) close() {
	s.kill()
	s.requests.set(false)
	s.replies.set(false)
	s.m.Close()
}
