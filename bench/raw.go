package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"
)

// The raw driver: ringfence's script as fast as sockets take it. rawConns connections,
// each with rawDepth calls of batchKeys keys under way, so rawConns * rawDepth * batchKeys
// = 512 decisions at a time.
const (
	rawConns = 4
	rawDepth = 2
)

// rawLoop drives the script. Every entry of a call has the latency of its call. It has no
// callers, so the attempts are given by connection, and the keys of all of them follow one
// another in the sequence.
func (b *bench) rawLoop(ctx context.Context, at place, c *calls, t timing) (*sums, error) {
	if err := b.servers[0].Client().ScriptLoad(ctx, at.script.text).Err(); err != nil {
		return nil, err
	}
	names := make([][]byte, c.keys)
	for i := range names {
		name := c.name(uint32(i))
		names[i] = appendBulk(nil, storedKey(name))
	}
	f := at.script.batch
	head := appendBulk(fmt.Appendf(nil, "*%d\r\n", 3+f.keys+len(f.tail)), "EVALSHA")
	head = appendBulk(appendBulk(head, at.script.sha), strconv.Itoa(f.keys))
	var tail []byte
	for _, arg := range f.tail {
		tail = appendBulk(tail, arg)
	}
	conns := make([]net.Conn, rawConns)
	for i := range conns {
		conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "tcp", at.addrs[0])
		if err != nil {
			return nil, err
		}
		defer func() { _ = conn.Close() }()
		if err := conn.SetDeadline(time.Now().Add(t.warm + t.measured + patience/2)); err != nil {
			return nil, err
		}
		conns[i] = conn
	}
	all := make([]caller, rawConns)
	errs := make([]error, rawConns)
	var wg sync.WaitGroup
	began := time.Now()
	body := func() {
		for n := range all {
			wg.Go(func() {
				d := rawDriver{conn: conns[n], replies: bufio.NewReaderSize(conns[n], 1<<16), head: head, tail: tail,
					names: names, calls: c, at: c.start(n, rawConns), began: began, t: t, me: &all[n]}
				errs[n] = d.run()
			})
		}
		wg.Wait()
	}
	before, after, err := b.watch(ctx, t, began, body)
	if err != nil {
		return nil, err
	}
	for _, err := range errs {
		if err != nil {
			return nil, fmt.Errorf("%s: %w", raw, err)
		}
	}
	s := addUp(all)
	s.before, s.after = before, after
	return s, nil
}

// rawDriver drives one connection.
type rawDriver struct {
	conn       net.Conn
	replies    *bufio.Reader
	head, tail []byte
	names      [][]byte
	calls      *calls
	at         int
	began      time.Time
	t          timing
	me         *caller

	out   []byte
	reply []int64
}

func (d *rawDriver) run() error {
	var sent [rawDepth]time.Duration
	for i := range sent {
		sent[i] = time.Since(d.began)
		if err := d.send(); err != nil {
			return err
		}
	}
	for i := 0; ; i = (i + 1) % rawDepth {
		if sent[i] < 0 {
			return nil
		}
		if err := d.receive(sent[i]); err != nil {
			return err
		}
		sent[i] = -1
		if now := time.Since(d.began); now < d.t.warm+d.t.measured {
			sent[i] = now
			if err := d.send(); err != nil {
				return err
			}
		}
	}
}

func (d *rawDriver) send() error {
	d.out = append(d.out[:0], d.head...)
	for range batchKeys {
		d.out = append(d.out, d.names[d.calls.sequence[d.at&(sequenceLen-1)]]...)
		d.at++
	}
	d.out = append(d.out, d.tail...)
	_, err := d.conn.Write(d.out)
	return err
}

func (d *rawDriver) receive(sent time.Duration) (err error) {
	if d.reply, err = readIntegers(d.replies, d.reply[:0]); err != nil {
		return err
	}
	end := time.Since(d.began)
	for i := range batchKeys {
		granted, err := replyGrant(d.reply, batchKeys, i)
		if err != nil {
			return err
		}
		d.me.note(d.t, end, end, end-sent, answerOf(granted == 1), nil)
	}
	return nil
}

func appendBulk(b []byte, s string) []byte {
	b = fmt.Appendf(b, "$%d\r\n", len(s))
	return append(append(b, s...), "\r\n"...)
}

// readIntegers reads a RESP array of integers.
func readIntegers(r *bufio.Reader, out []int64) ([]int64, error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return nil, err
	}
	n, ok := respNumber(line, '*')
	if !ok {
		return nil, fmt.Errorf("the server answers %q, not an array", bytes.TrimSpace(line))
	}
	for range n {
		line, err := r.ReadSlice('\n')
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, err
		}
		v, ok := respNumber(line, ':')
		if !ok {
			return nil, fmt.Errorf("the server answers %q, not an integer", bytes.TrimSpace(line))
		}
		out = append(out, v)
	}
	return out, nil
}

// respNumber reads "<kind><digits>\r\n" without allocating.
func respNumber(line []byte, kind byte) (v int64, ok bool) {
	if len(line) < 4 || len(line) > 21 || line[0] != kind {
		return 0, false
	}
	for _, c := range line[1 : len(line)-2] {
		if c < '0' || c > '9' {
			return 0, false
		}
		v = v*10 + int64(c-'0')
	}
	return v, true
}
