//go:build !linux

package redistest

import (
	"fmt"
	"net"
	"net/netip"
)

// reservation only remembers the port: elsewhere two sockets cannot share one,
// so it is free for a moment before each start, and Launch tries again.
type reservation struct{ port int }

func reservePort(host netip.Addr, port int) (*reservation, error) {
	l, err := net.Listen("tcp4", netip.AddrPortFrom(host, uint16(port)).String())
	if err != nil {
		return nil, fmt.Errorf("redistest: looking for a free port on %s: %w", host, err)
	}
	defer l.Close()
	return &reservation{port: l.Addr().(*net.TCPAddr).Port}, nil
}

func (r *reservation) release() {}
