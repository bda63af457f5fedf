package redistest

import (
	"bytes"
	"runtime"
	"sync/atomic"
	"time"
)

// watching counts the tests that are between NoLeaks and their end.
var watching atomic.Int64

// leakWait is how long goroutines may take to end after Close.
const leakWait = 5 * time.Second

// NoLeaks fails the test if a goroutine of ringfence, or of the clients it uses, is left
// when the test has ended and closed what was opened after this call. Of tests that run
// side by side the last one looks, for all of them. go-redis dials a dead server once a
// second in the background, for up to a second more: that is not ringfence's.
func NoLeaks(t TB) {
	t.Helper()
	watching.Add(1)
	t.Cleanup(func() {
		if watching.Add(-1) > 0 {
			return
		}
		left := leftovers()
		for end := time.Now().Add(leakWait); len(left) > 0 && watching.Load() == 0 && time.Now().Before(end); left = leftovers() {
			time.Sleep(5 * time.Millisecond) // until they have ended, within the bound
		}
		if len(left) > 0 && watching.Load() == 0 {
			t.Fatalf("%d goroutines are left %s after Close, the first:\n%s", len(left), leakWait, left[0])
		}
	})
}

// leftovers are the stacks of the goroutines that ringfence or go-redis run.
func leftovers() (left [][]byte) {
	all := make([]byte, 1<<20)
	for {
		n := runtime.Stack(all, true)
		if n < len(all) {
			all = all[:n]
			break
		}
		all = make([]byte, 2*len(all))
	}
	for _, stack := range bytes.Split(all, []byte("\n\n")) {
		ours := bytes.Contains(stack, []byte("github.com/ringfence/ringfence.")) || bytes.Contains(stack, []byte("github.com/redis/go-redis/"))
		tests := bytes.Contains(stack, []byte("testing.tRunner(")) || bytes.Contains(stack, []byte("testing.(*M).Run("))
		if ours && !tests && !bytes.Contains(stack, []byte("pool.(*ConnPool).tryDial")) {
			left = append(left, stack)
		}
	}
	return left
}
