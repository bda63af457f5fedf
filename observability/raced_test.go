package observability_test

import (
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// withoutRaceDetector has a test that does nothing but evaluate rules run without the
// race detector, which makes it ten times slower and finds little. All such tests share
// one run: the first to come waits for it.
func withoutRaceDetector(t *testing.T) {
	t.Helper()
	out, err := evaluating()
	if !strings.Contains(out, "--- PASS: "+t.Name()+" ") {
		t.Fatalf("%v\n%s", err, out)
	}
}

var evaluating = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "test", "-count=1", "-v", "-timeout=9m", "-run=^("+
		"TestASmallMistakeInTheRulesIsCaught|"+
		"TestEachAlertFiresWhenItShouldAndOnlyThen|"+
		"TestPagesAndTicketsComeInTheSameMinutesAsThoseOfSloth)$", ".").CombinedOutput()
	return string(out), err
})
