package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of /proc/stat: USER_HZ is 100 on every Linux.
const tick = 10 * time.Millisecond

// machineCPU is the CPU time of the whole machine since it started: busy, and busy or
// idle. Where there is no /proc/stat both are 0, and no cell is taken for disturbed.
func machineCPU() (busy, total time.Duration, err error) {
	raw, err := os.ReadFile("/proc/stat")
	if os.IsNotExist(err) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	return parseStat(string(raw))
}

// parseStat reads the first line: user, nice, system, idle, iowait, irq, softirq, steal;
// the guests after them are in user already. Stolen time is busy: somebody had it.
func parseStat(text string) (busy, total time.Duration, err error) {
	line, _, _ := strings.Cut(text, "\n")
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[0] != "cpu" {
		return 0, 0, fmt.Errorf("the first line of /proc/stat is %q", line)
	}
	for i, f := range fields[1:9] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("the first line of /proc/stat is %q", line)
		}
		total += time.Duration(n) * tick
		if i != 3 && i != 4 {
			busy += time.Duration(n) * tick
		}
	}
	return busy, total, nil
}
