//go:build !linux

package redistest

import "syscall"

// childAttr: no parent-death signal here. Ctrl-C reaches the children through
// the terminal's process group; a SIGKILL of the parent leaves them behind.
func childAttr() *syscall.SysProcAttr { return nil }

func (p *process) awaitStopped() {}
