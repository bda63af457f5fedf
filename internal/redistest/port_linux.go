package redistest

import (
	"fmt"
	"net/netip"
	"os"
	"syscall"
)

// reservation keeps a port ours from before the first start until Stop, also
// while the server is killed. It is a socket bound with SO_REUSEADDR that never
// listens: Linux then lets redis-server bind and listen beside it, gives the
// port to nobody who asks for any free one, and never uses it as the source of
// an outgoing connection. (Without that, a client that keeps dialing a killed
// server can connect to itself.) Connections are refused while only the
// reservation is there.
type reservation struct {
	port int
	fd   int
}

// reservePort takes a port of host, 0 for any that is free, in the network
// namespace of the calling thread.
func reservePort(host netip.Addr, port int) (*reservation, error) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("redistest: reserving a port: %w", os.NewSyscallError("socket", err))
	}
	fail := func(call string, err error) (*reservation, error) {
		_ = syscall.Close(fd)
		return nil, fmt.Errorf("redistest: reserving port %d on %s: %w", port, host, os.NewSyscallError(call, err))
	}
	if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1); err != nil {
		return fail("setsockopt", err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Port: port, Addr: host.As4()}); err != nil {
		return fail("bind", err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		return fail("getsockname", err)
	}
	return &reservation{port: name.(*syscall.SockaddrInet4).Port, fd: fd}, nil
}

func (r *reservation) release() { _ = syscall.Close(r.fd) }
