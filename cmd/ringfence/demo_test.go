package main

import (
	"context"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// quickScript is the demo with 0.9 s a phase. With the race detector, beside other tests,
// an embedded shard can take a second for an answer.
var quickScript = script{
	limit: 40, usersPerShard: 2, each: 120, rate: 800,
	most: 8 * time.Second, budget: 5 * time.Second, linger: 200 * time.Millisecond,
}

// perform plays and returns what was written.
func perform(ctx context.Context, t *testing.T, s script, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	code = runDemo(ctx, args, s, &out, &errs)
	kind := "embedded redis "
	if len(args) > 0 && args[0] == "--redis" {
		kind = "real redis-server "
	}
	for _, addr := range regexp.MustCompile(`127\.0\.0\.1:\d+`).FindAllString(out.String(), -1) {
		t.Logf("%s%s", kind, addr)
	}
	t.Logf("exit code %d\n%s%s", code, out.String(), errs.String())
	return code, out.String(), errs.String()
}

func wantText(t *testing.T, text string, parts ...string) {
	t.Helper()
	flat := strings.Join(strings.Fields(text), " ")
	for _, part := range parts {
		if !strings.Contains(flat, part) {
			t.Errorf("the output does not say %q", part)
		}
	}
	for l := range strings.Lines(text) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(l, "\n")); n > width {
			t.Errorf("%d columns: %q", n, l)
		}
	}
	if strings.Contains(text, "\x1b") {
		t.Error("escape sequences, but this is no terminal")
	}
}

func TestTheDemoOnEmbeddedShardsHolds(t *testing.T) {
	code, out, errs := perform(t.Context(), t, quickScript)
	if code != exitOK || errs != "" {
		t.Errorf("exit code %d, stderr %q", code, errs)
	}
	wantText(t, out,
		"phase 1, all shards: exact.", "240 were admitted = 6 users x 40",
		"phase 2, shard-1, shard-3: exact.", "160 were admitted = 4 users x 40",
		"shard-2 is killed; it has no replica", "policy Local", "circuit breaker opened",
		"shard-2 came back empty",
		"phase 4, all shards: exact.", "240 were admitted = 6 users x 40",
		"no caller saw an error", "The demo held what it promises")
}

func TestTheDemoOnRealServersHolds(t *testing.T) {
	code, out, errs := perform(t.Context(), t, quickScript, "--redis")
	if code != exitOK || errs != "" {
		t.Errorf("exit code %d, stderr %q", code, errs)
	}
	wantText(t, out,
		"phase 1, all shards: exact.", "240 were admitted = 6 users x 40",
		"its replica knows what was used",
		"phase 4, all shards: exact.", "240 were admitted = 6 users x 40",
		"The demo held what it promises")
}

func TestTheDemoFailsWhenAHealthyPhaseWasNotAnsweredByPrimaries(t *testing.T) {
	s := quickScript
	s.mishap = func(phase int, apps []*app) {
		if phase == phaseAgain {
			if err := apps[0].ring.ForceBreaker("shard-1", ringfence.BreakerForcedOpen); err != nil {
				t.Error(err)
			}
		}
	}
	code, out, _ := perform(t.Context(), t, s)
	if code != exitFailed {
		t.Errorf("exit code %d, want %d", code, exitFailed)
	}
	wantText(t, out, "FAIL phase 4, all shards:", "did not come from a primary although the shards were up",
		"The demo did not hold what it promises")
}

func TestAnInterruptedDemoStopsEverything(t *testing.T) {
	for _, args := range [][]string{nil, {"--redis"}} {
		t.Setenv("TMPDIR", t.TempDir())
		before := leftovers(t)
		ctx, cancel := context.WithCancel(t.Context())
		s := quickScript
		s.mishap = func(phase int, _ []*app) {
			if phase == phaseKilled {
				cancel()
			}
		}
		code, out, errs := perform(ctx, t, s, args...)
		cancel()
		if code != exitInterrupted {
			t.Errorf("%q: exit code %d, want %d", args, code, exitInterrupted)
		}
		wantText(t, errs, "interrupted; everything is stopped")
		if strings.Contains(out, "Summary") {
			t.Errorf("%q: a summary of half a demo", args)
		}
		if after := leftovers(t); after > before {
			t.Errorf("%q: %d directories of servers are left, %d before", args, after, before)
		}
	}
}

// leftovers counts the directories of servers that were not stopped.
func leftovers(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir(os.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "ringfence-redis-") {
			n++
		}
	}
	return n
}

func TestWithoutRedisServerTheDemoSaysWhatToInstall(t *testing.T) {
	t.Setenv(redistest.BinaryEnv, "/nonexistent/redis-server")
	code, _, errs := perform(t.Context(), t, quickScript, "--redis")
	if code != exitUsage {
		t.Errorf("exit code %d, want %d", code, exitUsage)
	}
	wantText(t, errs, "apt-get install redis-server", redistest.BinaryEnv)
}
