package docscheck

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// root is the root of the repository.
const root = "../.."

// TestRepository holds the gates against the repository itself.
func TestRepository(t *testing.T) {
	for _, gate := range []struct {
		name  string
		check func(string) ([]Problem, error)
	}{
		{"relative links lead somewhere", Links},
		{"make targets exist", MakeTargets},
		{"no forbidden words", ForbiddenWords},
		{"Go code in documents compiles", GoCode},
		{"what is exported is documented", Undocumented},
	} {
		t.Run(gate.name, func(t *testing.T) {
			problems, err := gate.check(root)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range problems {
				t.Error(p)
			}
		})
	}
}

// tree writes files into a directory that ends with the test.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// expect compares what a gate says about a tree: each wanted string must be
// part of exactly one problem, and no other problem may be there.
func expect(t *testing.T, check func(string) ([]Problem, error), dir string, want ...string) {
	t.Helper()
	problems, err := check(dir)
	if err != nil {
		t.Fatal(err)
	}
	left := map[string]bool{}
	for _, p := range problems {
		left[p.String()] = true
	}
	for _, w := range want {
		found := false
		for p := range left {
			if strings.Contains(p, w) {
				delete(left, p)
				found = true
				break
			}
		}
		if !found {
			t.Errorf("the gate did not see: %s", w)
		}
	}
	for p := range left {
		t.Errorf("the gate objects to: %s", p)
	}
}

func TestLinksFail(t *testing.T) {
	expect(t, Links, tree(t, map[string]string{
		"README.md": `# Top
[file](docs/a.md) [heading](docs/a.md#two-words) [own](#top) [web](https://example.com/x) ![picture](p.png)
[gone](docs/gone.md) [no heading](docs/a.md#three) [own, gone](#bottom) <a href="gone.html">x</a>
[out](../elsewhere.md) [rooted](/docs/a.md) [defined] ` + "`[code](not-a-link)`" + `

[defined]: docs/defined.md "with a title"

` + "```text\n[code](not-a-link)\n```\n",
		"docs/a.md": "# Two `words`!\n## Again\n## Again\n[up](../README.md) [second](#again-1) [third](#again-2)\n[dir](../docs/)\n",
		"p.png":     "",
	}),
		"README.md:3: link to docs/gone.md: no such file",
		"README.md:3: link to docs/a.md#three: no such heading",
		"README.md:3: link to #bottom: no such heading",
		"README.md:3: link to gone.html: no such file",
		"README.md:4: link to ../elsewhere.md: leads out of the repository",
		"README.md:6: link to docs/defined.md: no such file",
		"docs/a.md:4: link to #again-2: no such heading",
	)
}

func TestMakeTargetsFail(t *testing.T) {
	expect(t, MakeTargets, tree(t, map[string]string{
		"Makefile": "X := 1\ntest: ## t\n\tgo test\nfuzz-all: test\n",
		"a.md": "Run `make test` or `make nothing`; they make sense together.\n" +
			"```sh\n$ make fuzz-all COUNT=3\nmake gone # why\nCI=true make gone2\nmake -C other thing\n```\n",
	}),
		"a.md:1: make nothing:",
		"a.md:4: make gone:",
		"a.md:5: make gone2:",
	)
}

func TestMakeTargetsNeedAMakefile(t *testing.T) {
	if _, err := MakeTargets(t.TempDir()); err == nil {
		t.Error("no Makefile, and the gate is content")
	}
}

func TestForbiddenWordsAreFound(t *testing.T) {
	// A word is put on the list as digest("word"), in lower case.
	secret := strings.Join([]string{"chat", "bot"}, "")
	if !forbiddenWords[digest(secret)] {
		t.Fatalf("%s is not on the list", digest(secret))
	}
	home, host := "/ho"+"me/me", "proxy.golang."+"org"
	expect(t, ForbiddenWords, tree(t, map[string]string{
		"a.md":    "A " + secret + " at " + home + "/x took it from https://" + host + "/y\nServe https://example.com/home/page from /etc/x.\n",
		"b.go":    "// " + strings.ToUpper(secret) + " wrote " + home + "/x\npackage b // and " + secret + "ter\n",
		"go.sum":  secret,
		"c.bin":   "\x00" + secret,
		"d.md":    strings.Join([]string{"A", "I"}, "") + " ai\n",
		"Make.sh": "cd /wo" + "rk/main\ncd /home/x\n",
	}),
		"a.md:1: forbidden word: "+secret,
		"a.md:1: path of somebody's machine: "+home,
		"a.md:1: host of a package registry: "+host,
		"b.go:1: forbidden word:",
		"d.md:1: forbidden word:",
		"Make.sh:1: path of somebody's machine:",
	)
}

const goMod = "module example.com/lib\n\ngo 1.26\n"

const lib = `// Package lib is a library.
package lib

// Open opens.
func Open(name string) (int, error) { return len(name), nil }
`

func TestGoCodeCompiles(t *testing.T) {
	t.Setenv("GOWORK", "off")
	expect(t, GoCode, tree(t, map[string]string{
		"go.mod": goMod, "lib.go": lib,
		"README.md": "```go\nn, err := lib.Open(\"x\")\nif err != nil {\n\treturn err\n}\n```\n" +
			"Later blocks see earlier variables, and may declare them anew:\n" +
			"```go\nfmt.Println(n, time.Second, ctx.Err())\nn, err := lib.Open(\"y\")\n```\n" +
			"```go\nimport \"strings\"\n\nfunc up(s string) string { return strings.ToUpper(s) }\n```\n" +
			"```go\nlog.Print(up(\"x\"))\n```\n" +
			"```go\npackage main\n\nimport \"example.com/lib\"\n\nfunc main() { lib.Open(\"x\") }\n```\n" +
			"```text\nnot Go\n```\n",
		"docs/adr/1.md": "```go\nlib.Rejected()\n```\n",
	}))
}

func TestGoCodeFails(t *testing.T) {
	t.Setenv("GOWORK", "off")
	expect(t, GoCode, tree(t, map[string]string{
		"go.mod": goMod, "lib.go": lib,
		"README.md": "one\n```go\nlib.Close()\n```\n" +
			"```go\nx := lib.Open(\"x\")\n```\n" +
			"```go\nif {\n```\n" +
			"```go\npackage main\n\nimport \"example.com/gone\"\n\nfunc main() { gone.Do() }\n```\n",
		"docs/b.md": "```go\nimport (\n\t\"strings\"\n)\n\nstrings.Nothing()\nother.Thing()\n```\n",
	}),
		"README.md:3: Go code: undefined: lib.Close",
		"README.md:6: Go code: assignment mismatch",
		"README.md:9: Go code:",
		"README.md:14: Go code: could not import example.com/gone",
		"docs/b.md:6: Go code: undefined: strings.Nothing",
		"docs/b.md:7: Go code: undefined: other",
	)
}

func TestUndocumentedFails(t *testing.T) {
	expect(t, Undocumented, tree(t, map[string]string{
		"a.go": `// Package a has a comment.
package a

func Bare() {}

// Told is.
func Told() {}

func (T) Method() {}

func (*G[K]) Generic() {}

func (private) Exported() {}

type T struct {
	Field  int
	Behind int // told
	// Above is told.
	Above, Too int
	private int
	Inner struct{ Deep int } // told
}

// G is told.
type G[K any] struct{}

type private struct{ Field int }

// I is told.
type I interface {
	Do()
	I2
}

type I2 interface{} // told

// A group that is told.
const (
	A = 1
	B = 2
)

const (
	C = 1
	D = 2 // told
)

//go:embed x
var V string
`,
		"a_test.go":         "package a\n\nfunc InTest() {}\n",
		"gen.go":            "// Code generated by x. DO NOT EDIT.\n\npackage a\n\nfunc Gen() {}\n",
		"internal/b/b.go":   "package b\n\nfunc Inside() {}\n",
		"cmd/c/main.go":     "// Command c does.\npackage main\n\nfunc Exported() {}\n",
		"testdata/d/bad.go": "package d\n\nfunc Bad() {}\n",
	}),
		"a.go:4: func Bare ",
		"a.go:9: method T.Method ",
		"a.go:11: method G.Generic ",
		"a.go:15: type T ",
		"a.go:16: field T.Field ",
		"a.go:21: field T.Inner.Deep ",
		"a.go:31: method I.Do ",
		"a.go:44: const C ",
		"a.go:49: var V ",
		"internal/b/b.go:1: the package has no comment",
	)
}
