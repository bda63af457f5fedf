package redistest

import (
	"errors"
	"syscall"
	"testing"
)

func TestNobodyElseCanReserveThePortOfAKilledServer(t *testing.T) {
	s := Start(t, Options{})
	s.Kill()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	must(t, err)
	defer func() { _ = syscall.Close(fd) }()
	// As connect and bind to "any port" do: without SO_REUSEADDR.
	err = syscall.Bind(fd, &syscall.SockaddrInet4{Port: s.port, Addr: [4]byte{127, 0, 0, 1}})
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("bind: %v, want address in use", err)
	}
}
