package observability_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// api are the exported names of the library: functions, types, values, methods, fields.
func api(t testing.TB) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	packages, err := parser.ParseDir(token.NewFileSet(), "..", nil, 0) //nolint:staticcheck // one directory, no build tags to mind
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range packages {
		if name != "ringfence" {
			continue
		}
		ast.Inspect(p, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				names[n.Name.Name] = true
				return false
			case *ast.TypeSpec:
				names[n.Name.Name] = true
			case *ast.ValueSpec:
				for _, id := range n.Names {
					names[id.Name] = true
				}
			case *ast.Field:
				for _, id := range n.Names {
					names[id.Name] = true
				}
			}
			return true
		})
	}
	return names
}

var (
	inCode       = regexp.MustCompile("`([^`\n]+)`")
	exportedName = regexp.MustCompile(`\b[A-Z][a-z]+(?:[A-Z][a-z]+)*\b`)
	redisWords   = regexp.MustCompile("redis-cli [^`]*")
)

// What the playbook tells people to call must be there. A block of Go in it is compiled by
// the gate for documents.
func TestWhatThePlaybookTellsToCallExists(t *testing.T) {
	text := readFile(t, alerts+"/playbook.md")
	names := api(t)
	seen := 0
	for _, m := range inCode.FindAllStringSubmatch(text, -1) {
		code := m[1]
		if strings.Contains(code, `="`) || strings.HasPrefix(code, "redis-cli") {
			continue
		}
		for _, name := range exportedName.FindAllString(code, -1) {
			seen++
			if !names[name] && !strings.HasPrefix(name, "Ringfence") {
				t.Errorf("`%s`: the library has no %s", code, name)
			}
		}
	}
	if seen < 40 {
		t.Errorf("only %d names were found in the playbook", seen)
	}
	// redis-cli is part of what the tests need: ask it about the commands.
	known := []string{"role", "info"}
	for _, m := range redisWords.FindAllString(text, -1) {
		words := strings.Fields(strings.TrimPrefix(m, "redis-cli -u URL "))
		if len(words) == 0 || !slices.Contains(known, words[0]) {
			t.Errorf("%q is not one of the commands that were tried: %v", m, known)
		}
	}
	if _, err := exec.LookPath("redis-cli"); err != nil {
		t.Error(err)
	}
}
