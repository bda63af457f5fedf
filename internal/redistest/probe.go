package redistest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

// pollEvery is how often a state is looked at while waiting for it.
const pollEvery = 5 * time.Millisecond

// awaitReady polls until the server answers PING with anything but LOADING.
// NOAUTH, NOPERM and MASTERDOWN are answers: such a server is up.
//
// It asks over a Unix socket in the server's own directory, which Redis opens
// after the TCP port. So an answer proves that it is our server, and not one
// that took the port before us, and it needs neither TLS nor credentials.
func (s *Server) awaitReady(ctx context.Context, p *process) error {
	last := errors.New("no answer yet")
	err := poll(ctx, func() (bool, error) {
		if !p.alive() {
			return false, errors.New("it ended while starting")
		}
		var reply string
		if reply, last = ping(ctx, s.socketPath()); last != nil {
			return false, nil
		}
		if strings.HasPrefix(reply, "-LOADING") {
			last = errors.New(reply)
			return false, nil
		}
		return true, nil
	})
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("it does not answer: %w (last: %w)", err, last)
	}
	return err
}

// ping sends one inline PING and returns the reply line.
func ping(ctx context.Context, socket string) (string, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return "", err
	}
	if _, err := conn.Write([]byte("PING\r\n")); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(line), err
}

// poll calls ready at once and then every pollEvery until it returns true or an
// error, or ctx ends.
func poll(ctx context.Context, ready func() (bool, error)) error {
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		if ok, err := ready(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}
