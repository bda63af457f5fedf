//go:build unix

package ringfence

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
)

// rawWire is a connection's own descriptor. To read from a connection the moment after a
// write is in vain, and a system call: this way the writing is done where the poller has
// begun to look out for the reply already, and reading begins when it has arrived. The poller
// tells of an end of the connection once: one that came just before that is found by whoever
// goes on with the operation when this turn's time is over.
type rawWire struct {
	conn syscall.RawConn
	step func(fd uintptr) bool // rawStep, made once

	// Of the exchange under way.
	scripts *wireScripts
	ended   bool
	err     error
	full    bool // the rest is to be written by the poller's leave
}

// newRaw is the connection's descriptor, nil if it has none that bytes can be put to directly.
func (w *wire) newRaw() *rawWire {
	switch c := w.conn.(type) {
	case *net.TCPConn, *net.UnixConn:
		conn, err := c.(syscall.Conn).SyscallConn()
		if err != nil {
			return nil // using the connection will say why
		}
		return &rawWire{conn: conn, step: w.rawStep}
	}
	return nil
}

// exchangeRaw is exchange, unless it says that it has not done it: what it has written is
// noted.
func (w *wire) exchangeRaw(s *wireScripts) (did, ended bool, err error) {
	r := w.raw
	r.scripts, r.ended, r.err, r.full = s, false, nil, false
	err = r.conn.Read(r.step)
	r.scripts = nil
	switch {
	case err != nil:
		return true, !errors.Is(err, os.ErrDeadlineExceeded), w.cutShort(err)
	case r.full:
		return false, false, nil
	}
	return true, r.ended, r.err
}

// rawStep goes on until it would have to wait. It is called again when something has arrived;
// true ends that.
func (w *wire) rawStep(fd uintptr) bool {
	r := w.raw
	fail := func(op string, err error) bool {
		r.ended, r.err = true, &net.OpError{Op: op, Net: w.pool.network, Err: os.NewSyscallError(op, err)}
		return true
	}
	if w.sent < len(w.out) {
		n, err := ignoringInterrupts(syscall.Write, fd, w.out[w.sent:])
		switch {
		case errors.Is(err, syscall.EAGAIN):
			r.full = true
			return true
		case err != nil:
			return fail("write", err)
		}
		w.sent += n
		r.full = w.sent < len(w.out)
		return r.full
	}
	for { // a part of a reply and the end of the connection may have been told of together
		n, err := ignoringInterrupts(syscall.Read, fd, w.room())
		switch {
		case errors.Is(err, syscall.EAGAIN):
			return false
		case err != nil:
			return fail("read", err)
		case n == 0:
			r.ended, r.err = true, w.cutShort(io.EOF)
			return true
		}
		if r.ended, r.err = w.arrived(r.scripts, n); r.ended {
			return true
		}
	}
}

func ignoringInterrupts(call func(fd int, b []byte) (int, error), fd uintptr, b []byte) (int, error) {
	for {
		if n, err := call(int(fd), b); !errors.Is(err, syscall.EINTR) {
			return max(n, 0), err
		}
	}
}
