package redistest

import (
	"os/exec"
	"testing"
	"time"
)

func TestAProgramEndsWhenItIsStopped(t *testing.T) {
	for name, script := range map[string]string{
		"that obeys":     "exec sleep 60",
		"that does not":  "trap '' INT; while :; do sleep 0.1; done",
		"that has ended": "exit 1",
	} {
		p, err := StartProgram(exec.Command("sh", "-c", script))
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		p.Stop()
		p.Stop()
		select {
		case <-p.Exited():
		default:
			t.Errorf("a program %s runs after Stop", name)
		}
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("a program %s was stopped after %s", name, took)
		}
	}
}

func TestAProgramThatCannotStartIsAnError(t *testing.T) {
	if _, err := StartProgram(nil); err == nil {
		t.Error("nil is no error")
	}
	if _, err := StartProgram(exec.Command("/nonexistent/program")); err == nil {
		t.Error("a missing program is no error")
	}
	cmd := exec.Command("sleep", "0")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if _, err := StartProgram(cmd); err == nil {
		t.Error("a program that has run is no error")
	}
}
