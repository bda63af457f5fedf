package redistest

import (
	"errors"
	"os"
	"os/exec"
	"time"
)

// Program is another program beside the servers, such as a Prometheus. It dies with the
// process that started it, as servers do, and a Ctrl-C at the terminal does not reach it
// (both on Linux). All methods may be called from any goroutine.
type Program struct{ p *process }

// StartProgram starts cmd, which must not have been started. Stop ends it.
func StartProgram(cmd *exec.Cmd) (*Program, error) {
	if cmd == nil || cmd.Process != nil {
		return nil, errors.New("redistest: cmd is nil or runs already; give StartProgram a new exec.Cmd")
	}
	p, err := startProcess(cmd, &forkThread)
	if err != nil {
		return nil, err
	}
	return &Program{p}, nil
}

// Exited is closed when the program has ended.
func (p *Program) Exited() <-chan struct{} { return p.p.exited }

// Stop asks the program to end, makes it end after 3 s, and returns when it is gone.
// Calling it again does nothing.
func (p *Program) Stop() {
	p.p.killed.Store(true)
	p.p.signal(os.Interrupt)
	select {
	case <-p.p.exited:
	case <-time.After(3 * time.Second):
		p.p.kill()
	}
}
