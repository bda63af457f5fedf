//go:build unix && !aix

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
	secure := false
	if t, ok := conn.(*tls.Conn); ok {
		conn, secure = t.NetConn(), true
	}
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	fit := false
	// Control and not Read, which would mind the deadline of the last operation.
	err = raw.Control(func(fd uintptr) {
		var b [1]byte
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		switch {
		case err == syscall.EAGAIN || err == syscall.EWOULDBLOCK || err == syscall.EINTR:
			fit = true
		case err != nil || n == 0: // broken, or closed by the server
		default:
			fit = secure // TLS may have a word of its own, Redis has none
		}
	})
	return err == nil && fit
}
