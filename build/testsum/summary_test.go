package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// stream writes events the way go test does: one JSON object to a line.
func stream(lines ...string) string { return strings.Join(lines, "\n") + "\n" }

const (
	runA     = `{"Action":"run","Package":"p","Test":"TestA"}`
	realA    = `{"Action":"output","Package":"p","Test":"TestA","Output":"    x.go:1: real redis-server 127.0.0.1:1\n"}`
	passA    = `{"Action":"pass","Package":"p","Test":"TestA","Elapsed":0.5}`
	failA    = `{"Action":"fail","Package":"p","Test":"TestA","Elapsed":0.5}`
	skipA    = `{"Action":"skip","Package":"p","Test":"TestA"}`
	sayA     = `{"Action":"output","Package":"p","Test":"TestA","Output":"what A said\n"}`
	runB     = `{"Action":"run","Package":"p","Test":"TestB"}`
	embB     = `{"Action":"output","Package":"p","Test":"TestB","Output":"    x.go:1: embedded redis 127.0.0.1:2\n"}`
	passB    = `{"Action":"pass","Package":"p","Test":"TestB","Elapsed":0.1}`
	pkgPass  = `{"Action":"pass","Package":"p","Elapsed":1}`
	pkgFail  = `{"Action":"fail","Package":"p","Elapsed":1}`
	pkgSays  = `{"Action":"output","Package":"p","Output":"panic: outside\n"}`
	noTests  = `{"Action":"skip","Package":"p","Elapsed":0}`
	buildOut = `{"ImportPath":"p [p.test]","Action":"build-output","Output":"p.go:3: undefined: x\n"}`
	buildEnd = `{"ImportPath":"p [p.test]","Action":"build-fail"}`
	pkgBuild = `{"Action":"fail","Package":"p","Elapsed":0,"FailedBuild":"p [p.test]"}`
)

func TestClosingLine(t *testing.T) {
	for _, tc := range []struct {
		name     string
		events   string
		allowed  string
		needReal bool
		closing  string
		says     []string // must be in the output
		silent   []string // must not be
	}{
		{
			name:     "a passing test against a real server",
			events:   stream(runA, realA, sayA, passA, pkgPass),
			needReal: true,
			closing:  "1 passed, 0 failed",
			says:     []string{"real-server       1", "unit              0", "slowest", "0.50s  p TestA"},
			silent:   []string{"what A said"},
		},
		{
			name:     "no real server at all",
			events:   stream(runA, passA, runB, embB, passB, pkgPass),
			needReal: true,
			closing:  "2 passed, 1 failed",
			says:     []string{"no test ran against a real redis-server", "embedded          1", "unit              1"},
		},
		{
			name:    "a failing test is printed in full",
			events:  stream(runA, sayA, failA, runB, passB, pkgFail),
			closing: "1 passed, 1 failed",
			says:    []string{"what A said", "FAIL  p"},
		},
		{
			name:    "a package that does not build",
			events:  stream(buildOut, buildEnd, pkgBuild),
			closing: "0 passed, 1 failed",
			says:    []string{"undefined: x", "p: does not build"},
		},
		{
			name:    "a package that fails outside its tests",
			events:  stream(runA, passA, pkgSays, pkgFail),
			closing: "1 passed, 1 failed",
			says:    []string{"panic: outside", "failed outside its tests"},
		},
		{
			name:    "a test that never finished",
			events:  stream(runA, sayA, pkgFail),
			closing: "0 passed, 1 failed",
			says:    []string{"never finished", "what A said"},
		},
		{
			name:    "a package that never finished",
			events:  stream(runA),
			closing: "0 passed, 1 failed",
			says:    []string{"p TestA (its package never finished)"},
		},
		{
			name:    "a skip that nobody allowed",
			events:  stream(runA, sayA, skipA, pkgPass),
			closing: "0 passed, 1 failed",
			says:    []string{"p TestA (skipped, and not on the list", "what A said"},
		},
		{
			name:    "a skip that is allowed",
			events:  stream(runA, skipA, runB, passB, pkgPass),
			allowed: "# why not\np TestA needs a second disk",
			closing: "1 passed, 0 failed, 1 skipped",
			says:    []string{"p TestA (allowed: needs a second disk)"},
		},
		{
			name:     "a skipped test against a real server does not count as one",
			events:   stream(runA, realA, skipA, runB, passB, pkgPass),
			allowed:  "p TestA needs a second disk",
			needReal: true,
			closing:  "1 passed, 1 failed, 1 skipped",
			says:     []string{"no test ran against a real redis-server"},
		},
		{
			name:    "a package without tests is no skip",
			events:  stream(noTests),
			closing: "0 passed, 0 failed",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out, tail strings.Builder
			s := newSummary(&out)
			s.needReal = tc.needReal
			var err error
			if s.allowed, err = parseAllowed(tc.allowed); err != nil {
				t.Fatal(err)
			}
			if err := s.read(strings.NewReader(tc.events)); err != nil {
				t.Fatal(err)
			}
			ok := s.finish(&tail)
			if want := strings.Contains(tc.closing, " 0 failed"); ok != want {
				t.Errorf("finish() = %v, want %v", ok, want)
			}
			for _, text := range []string{out.String(), tail.String()} {
				lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
				if got := lines[len(lines)-1]; got != tc.closing {
					t.Errorf("the last line is %q, want %q", got, tc.closing)
				}
			}
			for _, want := range tc.says {
				if !strings.Contains(out.String(), want) {
					t.Errorf("%q is missing", want)
				}
			}
			for _, not := range tc.silent {
				if strings.Contains(out.String(), not) {
					t.Errorf("%q should not be there", not)
				}
			}
			if t.Failed() {
				t.Log(out.String())
			}
		})
	}
}

// A server started by the parent makes its subtests real-server tests; one
// started by a subtest makes the parent one, but not the subtest beside it.
func TestKindsFollowTheFamilyAndSpareTheSiblings(t *testing.T) {
	log := func(test, text string) string {
		return `{"Action":"output","Package":"p","Test":"` + test + `","Output":"` + text + `\n"}`
	}
	s := newSummary(io.Discard)
	if err := s.read(strings.NewReader(stream(
		log("TestUp", "real redis-server x"), log("TestUp/sub", "-"),
		log("TestDown", "-"), log("TestDown/real", "real redis-server x"), log("TestDown/emb", "embedded redis x"), log("TestDown/none", "-"),
		log("TestUpper", "-"),
	))); err != nil {
		t.Fatal(err)
	}
	got := s.kindsOf()
	for name, want := range map[string]kind{
		"TestUp":        realServer,
		"TestUp/sub":    realServer,
		"TestDown":      realServer,
		"TestDown/real": realServer,
		"TestDown/emb":  embedded,
		"TestDown/none": unit,
		"TestUpper":     unit, // not TestUp's child, though its name begins alike
	} {
		if k := got[testID{"p", name}]; k != want {
			t.Errorf("%s is %v, want %v", name, k, want)
		}
	}
}

func TestAllowedSkipsNeedAReason(t *testing.T) {
	if _, err := parseAllowed("p TestA"); err == nil {
		t.Error("an entry without a reason was accepted")
	}
}

// The events above are written by hand; this one asks the go command for them.
func TestRealModules(t *testing.T) {
	t.Setenv("GOWORK", "off")
	for _, tc := range []struct {
		name, file, closing string
		says                string
	}{
		{"passes", "func TestA(t *testing.T) { t.Log(\"real redis-server x\"); t.Run(\"sub\", func(*testing.T) {}) }", "2 passed, 0 failed", "real-server       2"},
		{"fails", "func TestA(t *testing.T) { t.Error(\"what A said\") }", "0 passed, 1 failed", "what A said"},
		{"skips", "func TestA(t *testing.T) { t.Skip(\"what A said\") }", "0 passed, 1 failed", "what A said"},
		{"does not build", "func TestA(t *testing.T) { undefined() }", "0 passed, 1 failed", "undefined: undefined"},
		{"does not vet", "func TestA(t *testing.T) { t.Errorf(\"%d\", \"x\") }", "0 passed, 1 failed", "wrong type"},
		{"does not parse", "func TestA(", "0 passed, 1 failed", ""},
		{"panics", "func TestA(t *testing.T) { panic(\"what A said\") }", "0 passed, 1 failed", "what A said"},
		{"exits", "func TestA(t *testing.T) { os.Exit(0) }", "0 passed, 1 failed", "unexpected call to os.Exit(0)"},
		{"dies in TestMain", "func TestA(t *testing.T) {}\nfunc TestMain(m *testing.M) { m.Run(); os.Exit(3) }", "1 passed, 1 failed", "outside its tests"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, "go.mod", "module example.com/m\n\ngo 1.26\n")
			write(t, dir, "m_test.go", "package m\n\nimport (\n\t\"os\"\n\t\"testing\"\n)\n\nvar _ = os.Exit\n\n"+tc.file+"\n")
			var out strings.Builder
			ok, err := run([]string{dir}, &out)
			if err != nil {
				t.Fatal(err)
			}
			if want := strings.Contains(tc.closing, " 0 failed"); ok != want {
				t.Errorf("run() = %v, want %v", ok, want)
			}
			if !strings.HasSuffix(out.String(), "\n"+tc.closing+"\n") || !strings.Contains(out.String(), tc.says) {
				t.Errorf("want %q and at the end %q, got:\n%s", tc.says, tc.closing, out.String())
			}
		})
	}
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
