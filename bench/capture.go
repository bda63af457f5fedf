package main

import (
	"bytes"
	"context"
	"crypto/sha1" // Redis names scripts by their SHA-1.
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ringfence/ringfence"
)

// captured is one script call as ringfence sends it, for driving its script without it.
// It is not written down here but overheard: a ring is opened on connections that keep
// what is written to them. So it is what ringfence sends today, whatever that is.
type captured struct {
	text, sha string
	single    form // one key
	batch     form // batchKeys keys
}

const batchKeys = 64

// form is a call with places for the keys: EVALSHA sha n KEYS... tail...
type form struct {
	keys int
	tail []string
}

// What is known of the reply to buckets without fractions: all integers, now first, then for
// each entry how many it was granted, below 0 if it was not decided, and the state.
const (
	replyHead  = 1
	replyEntry = 2
)

// replyGrant reads how many of the callers of entry i of n were granted.
func replyGrant(reply []int64, n, i int) (int64, error) {
	if len(reply) != replyHead+n*replyEntry || reply[replyHead+i*replyEntry] < 0 {
		return 0, fmt.Errorf("entry %d of a reply of %d values was not decided; has the script's reply changed (capture.go)?", i, len(reply))
	}
	return reply[replyHead+i*replyEntry], nil
}

// recorder keeps what is written to the connections it dials.
type recorder struct {
	mu      sync.Mutex
	streams []*bytes.Buffer
}

type recordedConn struct {
	net.Conn
	recorder *recorder
	stream   *bytes.Buffer // guarded by recorder.mu
}

func (c *recordedConn) Write(p []byte) (int, error) {
	c.recorder.mu.Lock()
	c.stream.Write(p)
	c.recorder.mu.Unlock()
	return c.Conn.Write(p)
}

func (r *recorder) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	c := &recordedConn{Conn: conn, recorder: r, stream: &bytes.Buffer{}}
	r.mu.Lock()
	r.streams = append(r.streams, c.stream)
	r.mu.Unlock()
	return c, nil
}

// commands returns every command written so far.
func (r *recorder) commands() (all [][]string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.streams {
		commands, err := parseCommands(s.Bytes())
		if err != nil {
			return nil, err
		}
		all = append(all, commands...)
	}
	return all, nil
}

var errNotRESP = errors.New("what was written is not RESP")

// parseCommands reads a sequence of RESP arrays of bulk strings.
func parseCommands(b []byte) (commands [][]string, err error) {
	number := func(kind byte) (int, bool) {
		line, rest, ok := bytes.Cut(b, []byte("\r\n"))
		if !ok || len(line) < 2 || line[0] != kind {
			return 0, false
		}
		n, err := strconv.Atoi(string(line[1:]))
		b = rest
		return n, err == nil && n >= 0
	}
	for len(b) > 0 {
		n, ok := number('*')
		if !ok {
			return nil, errNotRESP
		}
		command := make([]string, 0, min(n, 1<<16))
		for range n {
			size, ok := number('$')
			if !ok || len(b) < size+2 {
				return nil, errNotRESP
			}
			command = append(command, string(b[:size]))
			b = b[size+2:]
		}
		commands = append(commands, command)
	}
	return commands, nil
}

// capture overhears a call with one key and one with batchKeys.
func capture(ctx context.Context, addr string, l limit) (*captured, error) {
	r := &recorder{}
	config := ringConfig(place{addrs: []string{addr}})
	config.Dialer = r.dial
	config.MaxBatch = batchKeys
	config.Budget = time.Second
	ring, err := ringfence.Open(ctx, config)
	if err != nil {
		return nil, err
	}
	defer func() { _ = ring.Close() }()
	limiter, err := ring.Limiter("capture", ringfence.TokenBucket{Rate: l.rate, Per: l.per, Burst: l.burst})
	if err != nil {
		return nil, err
	}
	if _, err := limiter.Allow(ctx, "one"); err != nil {
		return nil, err
	}
	// Usually the entries of one call leave together; try again if they did not.
	for range 50 {
		many := make([]ringfence.Request, batchKeys)
		for i := range many {
			many[i] = ringfence.Request{Key: fmt.Sprint("many:", i), Cost: 1}
		}
		if _, err := limiter.AllowMany(ctx, many); err != nil {
			return nil, err
		}
		commands, err := r.commands()
		if err != nil {
			return nil, err
		}
		if c := captureFrom(commands); c != nil {
			return c, nil
		}
	}
	return nil, fmt.Errorf("ringfence sent no script call of 1 and of %d keys to be overheard; has the way it sends changed (capture.go)?", batchKeys)
}

// captureFrom finds the two forms among commands; nil if not both are there.
func captureFrom(commands [][]string) *captured {
	texts := map[string]string{}
	for _, c := range commands {
		var text string
		switch {
		case len(c) >= 3 && strings.EqualFold(c[0], "EVAL"):
			text = c[1]
		case len(c) == 3 && strings.EqualFold(c[0], "SCRIPT") && strings.EqualFold(c[1], "LOAD"):
			text = c[2]
		default:
			continue
		}
		sum := sha1.Sum([]byte(text))
		texts[hex.EncodeToString(sum[:])] = text
	}
	out := &captured{}
	for _, c := range commands {
		if len(c) < 4 || !strings.EqualFold(c[0], "EVALSHA") || texts[c[1]] == "" {
			continue
		}
		n, err := strconv.Atoi(c[2])
		if err != nil || n < 1 || len(c) < 3+n {
			continue
		}
		f := form{keys: n, tail: c[3+n:]}
		switch n {
		case 1:
			out.single = f
		case batchKeys:
			out.batch = f
		default:
			continue
		}
		out.sha, out.text = c[1], texts[c[1]]
	}
	if out.single.keys == 0 || out.batch.keys == 0 {
		return nil
	}
	return out
}

// storedKey is a key of the same length as ringfence's own.
func storedKey(key string) string { return fmt.Sprintf("rf:1:{%-22s}", key) }
