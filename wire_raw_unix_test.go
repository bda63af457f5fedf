//go:build unix

package ringfence

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// rawPair is a wire over TCP, whose socket keeps little, and the server's end of it.
func rawPair(t *testing.T) (*wire, net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	aclMust(t, err)
	defer ln.Close()
	conn, err := net.Dial("tcp", ln.Addr().String())
	aclMust(t, err)
	server, err := ln.Accept()
	aclMust(t, err)
	t.Cleanup(func() { _ = conn.Close(); _ = server.Close() })
	aclMust(t, conn.(*net.TCPConn).SetWriteBuffer(4<<10))
	w := &wire{pool: &wirePool{network: "tcp"}, conn: conn}
	if w.raw = w.newRaw(); w.raw == nil {
		t.Fatal("a TCP connection has no descriptor")
	}
	return w, server
}

// say makes bytes the operation under way, to be answered with a number.
func (w *wire) say(bytes []byte) {
	w.kind, w.reqs, w.calls, w.answered = opReset, []*request{{}}, []int{1}, false
	w.out = append(w.out[:0], bytes...)
	w.sent, w.in, w.call, w.first = 0, w.in[:0], 0, 0
	w.reply.reset()
	w.await()
}

// An operation that the socket does not take at once is written as there is room.
func TestAnOperationLargerThanTheSocketIsWrittenWhole(t *testing.T) {
	w, server := rawPair(t)
	const size = 8 << 20
	w.say(make([]byte, size))
	got := make(chan error, 1)
	go func() {
		_, err := io.CopyN(io.Discard, server, size)
		if err == nil {
			_, err = io.WriteString(server, ":1\r\n")
		}
		got <- err
	}()
	ended, err := w.goOn(&wireScripts{}, time.Now().Add(20*time.Second))
	aclMust(t, <-got)
	if !ended || err != nil || !w.answered {
		t.Errorf("ended %t, %v, answered %t", ended, err, w.answered)
	}
}

// Whatever an operation's time ran out in, the next who goes on with it goes on from there:
// while it is written, before the reply, and within it.
func TestAnOperationGoesOnFromWhereItsTimeRanOut(t *testing.T) {
	w, server := rawPair(t)
	const size = 8 << 20
	w.say(make([]byte, size))
	out := func(what string) {
		t.Helper()
		ended, err := w.goOn(&wireScripts{}, time.Now().Add(20*time.Millisecond))
		if ended || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%s: ended %t, %v", what, ended, err)
		}
	}
	out("nobody reads")
	if w.sent == 0 || w.sent == size {
		t.Fatalf("%d bytes of %d are written", w.sent, size)
	}
	got := make(chan error, 1)
	go func() { _, err := io.CopyN(io.Discard, server, size); got <- err }()
	for end := time.Now().Add(20 * time.Second); w.sent < size && time.Now().Before(end); {
		out("it is read, but not answered")
	}
	aclMust(t, <-got)
	for _, piece := range []string{":", "1", "\r"} {
		_, err := io.WriteString(server, piece)
		aclMust(t, err)
		out("a part of the reply")
	}
	_, err := io.WriteString(server, "\n")
	aclMust(t, err)
	ended, err := w.goOn(&wireScripts{}, time.Now().Add(20*time.Second))
	if !ended || err != nil || !w.answered {
		t.Errorf("ended %t, %v, answered %t", ended, err, w.answered)
	}
}

// The connection's end is what it was: io.EOF before a reply, io.ErrUnexpectedEOF within one,
// a reset, or net.ErrClosed.
func TestTheEndOfAConnectionIsToldAsWhatItIs(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(w *wire, server net.Conn) error
		want error
		as   *errorType
	}{
		{"before", func(_ *wire, s net.Conn) error { return s.Close() }, io.EOF, typeEOF},
		{"within", func(_ *wire, s net.Conn) error {
			_, err := io.WriteString(s, ":1")
			return errors.Join(err, s.Close())
		}, io.ErrUnexpectedEOF, typeEOF},
		{"closed here", func(w *wire, _ net.Conn) error { return w.conn.Close() }, net.ErrClosed, nil},
	} {
		w, server := rawPair(t)
		w.say([]byte("x"))
		heard := make(chan error, 1)
		go func() {
			_, err := server.Read(make([]byte, 1))
			heard <- errors.Join(err, c.end(w, server))
		}()
		ended, err := w.goOn(&wireScripts{}, time.Now().Add(20*time.Second))
		aclMust(t, <-heard)
		if !ended || !errors.Is(err, c.want) {
			t.Errorf("%s: ended %t, %v, want %v", c.name, ended, err, c.want)
		}
		if c.as != nil && classify(err) != c.as {
			t.Errorf("%s: %v counts as %+v", c.name, err, classify(err))
		}
	}
}

// The poller does not tell of an end of the connection that it has told of before, such as one
// that comes while a call is on its way to be written. It is heard of a glance later all the same.
func TestAnEndThatCameBeforeTheCallIsHeardOf(t *testing.T) {
	start := time.Now()
	for _, cancelable := range []bool{false, true} {
		w, server := rawPair(t)
		ctx, cancel := context.Background(), context.CancelFunc(func() {})
		if cancelable {
			ctx, cancel = context.WithCancel(ctx)
		}
		w.say([]byte("x"))
		aclMust(t, server.(*net.TCPConn).CloseWrite())
		time.Sleep(20 * time.Millisecond) // the poller tells of it; if it has not yet, this is the usual case
		d := &dispatcher{clock: func() int64 { return int64(time.Since(start)) }}
		began := time.Now()
		ended, err := d.goOn(ctx, w, &wireScripts{}, d.clock()+int64(20*time.Second))
		if took := time.Since(began); !ended || classify(err) != typeEOF || took > 5*time.Second {
			t.Errorf("cancelable %t: ended %t after %s: %v", cancelable, ended, took, err)
		}
		cancel()
	}
}

// A lone caller whose operation takes longer than a glance gets its answer, and one who cancels
// is told soon whenever that is.
func TestALoneCallerWaitsLongerThanAGlance(t *testing.T) {
	r, l, s, _ := leanRing(t, nil)
	for _, c := range []struct{ pause, cancel time.Duration }{
		{5 * glance, 0}, {glance / 2, 0}, {time.Hour, glance / 2}, {time.Hour, 5 * glance}, {time.Hour, 0},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		// So that the caller carries its operation itself.
		waitFor(t, "the operation before to be over", func() bool { return r.members[0].shard.charges.busy.Load() == 0 })
		s.Pause()
		ended := make(chan error, 1)
		go func() {
			d, err := l.Allow(ctx, "k")
			if err == nil && d.Source != SourcePrimary {
				t.Errorf("%+v", d)
			}
			ended <- err
		}()
		if c.pause < time.Hour {
			time.Sleep(c.pause)
			s.Resume()
			if err := <-ended; err != nil {
				t.Errorf("%v", err)
			}
		} else {
			time.Sleep(c.cancel)
			cancel()
			began := time.Now()
			if err, took := <-ended, time.Since(began); !errors.Is(err, context.Canceled) || took > time.Second/2 {
				t.Errorf("canceled after %s: told %s later: %v", c.cancel, took, err)
			}
			s.Resume()
		}
		cancel()
	}
}
