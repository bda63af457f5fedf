//go:build !unix

package main

import (
	"errors"
	"time"
)

func processCPU() (time.Duration, error) {
	return 0, errors.New("bench: the CPU time of a process is read with getrusage, which only Unix has")
}
