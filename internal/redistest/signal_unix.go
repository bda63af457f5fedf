//go:build unix

package redistest

import (
	"os"
	"syscall"
)

const canSignal = true

var (
	stopSignal     os.Signal = syscall.SIGSTOP
	continueSignal os.Signal = syscall.SIGCONT
)
