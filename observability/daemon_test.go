package observability_test

import (
	"bufio"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
)

// startDaemon starts a program that listens on a port of its own choice, ends it with the
// test, and returns its URL. listens finds the address in the program's log.
func startDaemon(t testing.TB, listens *regexp.Regexp, program string, args ...string) string {
	t.Helper()
	// The shell ends the program when its standard input does, which happens at the latest
	// when this process is gone, however that comes about.
	cmd := exec.Command("sh", append([]string{"-c", `"$@" & p=$!; read -r _; kill "$p"; wait "$p"`, "sh", program}, args...)...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	address, done := make(chan string, 1), make(chan string, 1)
	go func() {
		var log strings.Builder
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			log.WriteString(lines.Text() + "\n")
			if m := listens.FindStringSubmatch(lines.Text()); m != nil {
				select {
				case address <- m[1]:
				default: // it is known already
				}
			}
		}
		done <- log.String()
	}()
	t.Cleanup(func() {
		_ = stdin.Close()
		<-done
		_ = cmd.Wait() // it was killed, which is what was wanted
	})
	select {
	case a := <-address:
		return "http://" + a
	case log := <-done:
		done <- log
		t.Fatalf("%s ended:\n%s", program, log)
	case <-time.After(time.Minute):
		t.Fatalf("%s does not listen after a minute", program)
	}
	return ""
}
