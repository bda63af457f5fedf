package main

import (
	"context"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9/logging"
	"go.uber.org/goleak"
)

var writeGolden = flag.Bool("write-golden", false, "rewrite the files in testdata")

// TestMain fails the run when a goroutine outlives the demo. go-redis dials a dead server
// once a second in the background, for up to a second more.
func TestMain(m *testing.M) {
	logging.Disable()
	goleak.VerifyTestMain(m,
		goleak.IgnoreTopFunction("github.com/redis/go-redis/v9/internal/pool.(*ConnPool).tryDial"))
}

// golden compares with a file of testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *writeGolden {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (-write-golden rewrites it). Got:\n%s\nwant:\n%s", name, got, want)
	}
}

func TestEveryCommandAnswersWithItsExitCode(t *testing.T) {
	for _, c := range []struct {
		args           string
		code           int
		stdout, stderr string // what they contain; empty: nothing at all
	}{
		{"", exitUsage, "", "usage: ringfence <command>"},
		{"help", exitOK, "usage: ringfence <command>", ""},
		{"--help", exitOK, "usage: ringfence <command>", ""},
		{"version", exitOK, "ringfence ", ""},
		{"dmeo", exitUsage, "", `there is no command "dmeo"`},
		{"demo -h", exitOK, "real redis-servers", ""},
		{"demo --colour", exitUsage, "", "flag provided but not defined: -colour"},
		{"demo now", exitUsage, "", `unexpected argument "now"`},
	} {
		var stdout, stderr strings.Builder
		code := run(context.Background(), strings.Fields(c.args), &stdout, &stderr)
		if code != c.code {
			t.Errorf("ringfence %s: exit code %d, want %d", c.args, code, c.code)
		}
		for _, out := range []struct{ name, got, want string }{
			{"stdout", stdout.String(), c.stdout}, {"stderr", stderr.String(), c.stderr},
		} {
			if !strings.Contains(out.got, out.want) || out.want == "" && out.got != "" {
				t.Errorf("ringfence %s: %s is %q, want %q", c.args, out.name, out.got, out.want)
			}
		}
	}
}
