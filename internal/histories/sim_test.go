package histories

import (
	"os"
	"strconv"
	"testing"
	"time"
)

func TestX(t *testing.T) {
	n, _ := strconv.Atoi(os.Getenv("N"))
	from, _ := strconv.Atoi(os.Getenv("FROM"))
	same := 0
	for i := from; i < from+max(n, 1); i++ {
		at := time.Now()
		o := simulate(t, uint64(i), nothing)
		run := time.Since(at)
		at = time.Now()
		err := o.err()
		t.Logf("seed %d: %d events, run %v, check %v", i, len(o.events), run, time.Since(at))
		if err != nil {
			t.Errorf("%v", err)
		}
		if os.Getenv("TWICE") != "" {
			if simulate(t, uint64(i), nothing).trace() == o.trace() {
				same++
			}
		}
	}
	t.Logf("same %d", same)
}
