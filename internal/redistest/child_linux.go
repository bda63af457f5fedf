package redistest

import (
	"context"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// childAttr makes a child die with this process however that ends (panic, test
// time-out, SIGKILL), and keeps a Ctrl-C at the terminal from reaching it, so
// that a program can still ask its servers while it shuts down.
func childAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
}

// awaitStopped waits until the kernel has stopped the process: SIGSTOP is
// delivered a moment after kill returns, and Redis could still answer in it.
func (p *process) awaitStopped() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = poll(ctx, func() (bool, error) {
		return !p.alive() || processState(p.cmd.Process.Pid) == 'T', nil
	})
}

// processState returns the state letter of /proc/<pid>/stat, 0 when there is
// none. The letter follows the command name, which may itself contain ')'.
func processState(pid int) byte {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0
	}
	i := strings.LastIndexByte(string(stat), ')')
	if i < 0 || i+2 >= len(stat) {
		return 0
	}
	return stat[i+2]
}
