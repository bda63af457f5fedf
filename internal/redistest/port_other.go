//go:build !linux

package redistest

import (
	"fmt"
	"net"
)

// reservation only remembers the port: elsewhere two sockets cannot share one,
// so it is free for a moment before each start, and Launch tries again.
type reservation struct{ port int }

func reservePort(port int) (*reservation, error) {
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return nil, fmt.Errorf("redistest: looking for a free port on 127.0.0.1: %w", err)
	}
	defer l.Close()
	return &reservation{port: l.Addr().(*net.TCPAddr).Port}, nil
}

func (r *reservation) release() {}
