//go:build unix

package ringfence

import (
	"crypto/tls"
	"net"
	"syscall"
)

// alive says whether a connection that was idle is fit for use: a server that has been
// restarted has closed it, and an operation sent there would be of unknown fate. Where the
// connection cannot be looked at it is taken to be.
func alive(conn net.Conn) bool {
	_, secure := conn.(*tls.Conn)
	switch peek(conn) {
	case peekData:
		return secure // TLS may have a word of its own, Redis has none
	case peekBroken:
		return false
	default:
		return true
	}
}

// readable says whether reading would not wait, as far as that can be told.
func readable(conn net.Conn) bool { return peek(conn) != peekNothing }

// What there is to read.
type peeked int

const (
	peekUnknown peeked = iota
	peekNothing
	peekData
	peekBroken // or closed by the server
)

// peek looks at what there is to read, without reading it.
func peek(conn net.Conn) (is peeked) {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return peekUnknown
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return peekBroken
	}
	// Control and not Read, which would mind the deadline of the last operation.
	err = raw.Control(func(fd uintptr) {
		var b [1]byte
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		switch {
		case err == syscall.EAGAIN || err == syscall.EWOULDBLOCK || err == syscall.EINTR:
			is = peekNothing
		case err != nil || n == 0:
			is = peekBroken
		default:
			is = peekData
		}
	})
	if err != nil {
		return peekBroken
	}
	return is
}
