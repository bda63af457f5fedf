package ringfence

import (
	"bytes"
	"errors"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// wireBench is a wire whose other end answers one operation, a reset of one key, when it is
// told to. It is made in a synctest bubble.
type wireBench struct {
	*wire
	say    wireScripts
	got    chan []byte   // what arrived first
	answer chan struct{} // closed to have it answered
}

func newWireBench(t *testing.T) *wireBench {
	t.Helper()
	near, far := net.Pipe()
	b := &wireBench{wire: &wire{conn: near}, got: make(chan []byte, 1), answer: make(chan struct{})}
	go func() {
		defer far.Close()
		in := make([]byte, 1<<10)
		n, err := far.Read(in)
		if err != nil {
			return
		}
		b.got <- in[:n]
		<-b.answer
		_, _ = far.Write([]byte(":1\r\n"))
	}()
	t.Cleanup(func() { _ = near.Close() })
	b.start(&b.say, opReset, []*request{freshRequest().begin(opReset, compiled(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 1}), keyHash{1, 2}, newKeySpace("rf"), 1)})
	return b
}

// ends carries the operation on to its answer.
func (b *wireBench) ends(t *testing.T) {
	t.Helper()
	close(b.answer)
	if ended, err := b.goOn(&b.say, time.Now().Add(time.Minute)); !ended || err != nil {
		t.Errorf("the next turn: ended %t, %v", ended, err)
	}
}

// Whoever is canceled between promising to carry an operation and beginning to must not wait
// for its reply.
func TestAnInterruptionEndsItsTurnWheneverItComes(t *testing.T) {
	for _, c := range []struct {
		name   string
		before bool
	}{{"before the turn", true}, {"in the turn", false}} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newWireBench(t)
				start, took := time.Now(), time.Duration(0)
				interrupt := b.interruptible()
				if c.before {
					interrupt()
				} else {
					took = 3 * time.Second
					time.AfterFunc(took, interrupt)
				}
				ended, err := b.goOn(&b.say, start.Add(time.Minute))
				if ended || !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != took {
					t.Errorf("ended %t, %v, after %s; want to leave after %s", ended, err, time.Since(start), took)
				}
				b.over()
				synctest.Wait()
				if len(b.got) != 1 {
					t.Error("the frame was not sent: a write that stops halfway would cost a TLS connection")
				}
				interrupt() // too late, and no business of the next turn
				b.ends(t)
			})
		})
	}
}

// deafConn counts what is written to it.
type deafConn struct {
	net.Conn
	writes int
}

func (c *deafConn) Write(b []byte) (int, error) {
	c.writes++
	return c.Conn.Write(b)
}

// A write over TLS that runs out of time ends the connection, even if nothing was sent. So
// none is begun for a caller whose time is over, and whoever carries the operation on has
// the connection still.
func TestASpentDeadlineDoesNotCostATLSConnection(t *testing.T) {
	for _, left := range []time.Duration{-time.Second, 0, sparing - 1} {
		synctest.Test(t, func(t *testing.T) {
			b := newWireBench(t)
			conn := &deafConn{Conn: b.conn}
			b.conn, b.secure = conn, true
			ended, err := b.goOn(&b.say, time.Now().Add(left))
			if ended || !errors.Is(err, os.ErrDeadlineExceeded) || conn.writes != 0 {
				t.Errorf("with %s left: ended %t, %v, %d writes", left, ended, err, conn.writes)
			}
			frame := bytes.Clone(b.out)
			b.ends(t)
			if got := <-b.got; !bytes.Equal(got, frame) || conn.writes != 1 {
				t.Errorf("with %s left: %d writes, %q arrived, want %q", left, conn.writes, got, frame)
			}
		})
	}
}
