package redistest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// buildClocks compiles testdata/clocks.c, a stranger to the shim.
func buildClocks(t *testing.T) string {
	t.Helper()
	cc, err := findCompiler()
	must(t, err)
	program := filepath.Join(t.TempDir(), "clocks")
	if out, err := exec.Command(cc, "-O2", "-pthread", "-o", program, "testdata/clocks.c").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

func testClock(t *testing.T) *clock {
	t.Helper()
	c, err := newClock(deadline(t), t.TempDir())
	must(t, err)
	t.Cleanup(c.close)
	return c
}

func (c *clock) set(v setting) error {
	return c.change(func(setting) (setting, error) { return v, nil })
}

func monotonicMicros(t *testing.T) int64 {
	t.Helper()
	var ts unix.Timespec
	must(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts))
	return ts.Nano() / 1000
}

func TestShimMovesEveryWallClockAndNoOther(t *testing.T) {
	program, c := buildClocks(t), testClock(t)
	const at = 2_000_000_000_123_456
	must(t, c.set(setting{frozen: true, micros: at}))
	cmd := exec.Command(program)
	cmd.Env = c.environ()
	low := monotonicMicros(t)
	out, err := cmd.Output()
	high := monotonicMicros(t)
	must(t, err)
	var got [5]int64
	if _, err := fmt.Sscan(string(out), &got[0], &got[1], &got[2], &got[3], &got[4]); err != nil {
		t.Fatal(err)
	}
	if want := [4]int64{at, at, at, at / 1_000_000 * 1_000_000}; [4]int64(got[:4]) != want {
		t.Errorf("wall clocks %v, want %v", got[:4], want)
	}
	if got[4] < low || got[4] > high {
		t.Errorf("monotonic clock %d, want %d to %d", got[4], low, high)
	}
	if !c.attached() {
		t.Error("the shim did not report")
	}
}

// Were mode and value read apart, a thread would now and then see a frozen
// instant taken for an offset: the year 2090, or 1970.
func TestThreadsNeverSeeHalfASetting(t *testing.T) {
	program, c := buildClocks(t), testClock(t)
	const frozenAt = 1_900_000_000
	real := time.Now().Unix()
	must(t, c.set(setting{}))
	cmd := exec.Command(program, "200000", fmt.Sprint(frozenAt), fmt.Sprint(real))
	cmd.Env = c.environ()
	var out bytes.Buffer
	cmd.Stdout = &out
	must(t, cmd.Start())
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for flip := true; ; flip = !flip {
		select {
		case err := <-done:
			must(t, err)
			if got := out.String(); got != "0\n" {
				t.Errorf("%q readings were of no setting that ever was", got)
			}
			return
		default:
			v := setting{}
			if flip {
				v = setting{frozen: true, micros: frozenAt * 1_000_000}
			}
			must(t, c.set(v))
		}
	}
}

func TestShimCompilesWithoutAWarning(t *testing.T) {
	cc, err := findCompiler()
	must(t, err)
	out, err := exec.Command(cc, "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", os.DevNull, "shim/clockshim.c").CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
