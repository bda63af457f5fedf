package docscheck

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/scanner"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// predeclared is what a block may use without saying where it comes from.
const predeclared = "ctx context.Context, w http.ResponseWriter, r *http.Request, mux *http.ServeMux, handler http.Handler"

// wellKnown maps the names of packages that a block may use without importing
// them. The packages of the repository are added to it.
var wellKnown = map[string]string{
	"context": "context", "errors": "errors", "fmt": "fmt", "hex": "encoding/hex", "http": "net/http", "io": "io",
	"log": "log", "math": "math", "net": "net", "os": "os", "slog": "log/slog",
	"strconv": "strconv", "strings": "strings", "sync": "sync", "testing": "testing", "time": "time",
	"prometheus": "github.com/prometheus/client_golang/prometheus",
	"promhttp":   "github.com/prometheus/client_golang/prometheus/promhttp",
	"otel":       "go.opentelemetry.io/otel",
	"redis":      "github.com/redis/go-redis/v9",
}

// GoCode checks that the blocks marked go in the documents compile against the
// repository as it is. Decision records are left out: they may show what was
// rejected.
//
// A block with a package clause is a file of its own. One that holds
// declarations is added to its document's file. Any other is a list of
// statements: it sees what the blocks above it in the document declared, and
// may leave variables unused and return whatever it likes.
func GoCode(root string) ([]Problem, error) {
	docs, err := documents(root)
	if err != nil {
		return nil, err
	}
	var bad []Problem
	var sources []source
	for _, d := range docs {
		if strings.HasPrefix(d.name, "docs/adr/") {
			continue
		}
		found, problems := d.sources()
		sources, bad = append(sources, found...), append(bad, problems...)
	}
	if len(sources) == 0 {
		return bad, nil
	}
	imp, err := newImports(root)
	if err != nil {
		return nil, err
	}
	for _, s := range sources {
		problems, err := imp.check(s)
		if err != nil {
			return nil, err
		}
		bad = append(bad, problems...)
	}
	return bad, nil
}

// source is one Go file put together from blocks; //line comments in it lead
// back to the document.
type source struct {
	doc  string
	text string
}

var importBlock = regexp.MustCompile(`(?s)\A\s*import\s+(?:\([^)]*\)|(?:\w+ +)?"[^"]*")[ \t]*\n?`)

func (d document) sources() (found []source, bad []Problem) {
	imports, declarations, statements, depth := "", "", "", 0
	for _, b := range d.blocks {
		if b.lang != "go" {
			continue
		}
		text := strings.Join(b.lines, "\n") + "\n"
		from := fmt.Sprintf("//line %s:%d\n", d.name, b.line)
		if hasPackageClause(text) {
			found = append(found, source{d.name, from + text})
			continue
		}
		for {
			m := importBlock.FindString(text)
			if m == "" {
				break
			}
			imports += from + m + "\n"
			text = text[len(m):]
			from = fmt.Sprintf("//line %s:%d\n", d.name, b.line+strings.Count(strings.Join(b.lines, "\n")+"\n", "\n")-strings.Count(text, "\n"))
		}
		if parses("package p\n" + text) {
			declarations += from + text + "\n"
			continue
		}
		if err := parseError("package p\nfunc _() {\n" + from + text + "\n}\n"); err != nil {
			bad = append(bad, Problem{d.name, err.Pos.Line, "Go code: " + err.Msg})
			continue
		}
		// Each block opens a scope inside the one before: it sees what that
		// declared, and may declare it anew.
		statements += "{\n" + from + text + "\n"
		depth++
	}
	if declarations != "" || statements != "" {
		found = append(found, source{d.name, "package p\n" + imports + declarations +
			"func _(" + predeclared + ") {\n" + statements + strings.Repeat("}\n", depth) + "}\n"})
	}
	return found, bad
}

func hasPackageClause(text string) bool {
	_, err := parser.ParseFile(token.NewFileSet(), "", text, parser.PackageClauseOnly)
	return err == nil
}

func parses(text string) bool { return parseError(text) == nil }

func parseError(text string) *scanner.Error {
	_, err := parser.ParseFile(token.NewFileSet(), "", text, parser.SkipObjectResolution)
	if list := (scanner.ErrorList)(nil); errors.As(err, &list) && len(list) > 0 {
		return list[0]
	}
	return nil
}

// imports finds packages by asking the go command for compiled ones.
type imports struct {
	root   string
	byName map[string]string // package name to import path
	export map[string]string // import path to file with export data
}

func newImports(root string) (*imports, error) {
	imp := &imports{root: root, byName: map[string]string{}, export: map[string]string{}}
	for name, path := range wellKnown {
		imp.byName[name] = path
	}
	mods, err := files(root, func(rel string) bool { return filepath.Base(rel) == "go.mod" })
	if err != nil {
		return nil, err
	}
	for _, mod := range mods {
		packages, err := imp.list(filepath.Join(root, filepath.Dir(mod)), "-e", "./...")
		if err != nil {
			return nil, err
		}
		for _, p := range packages {
			if p.Name != "main" && !strings.Contains("/"+p.ImportPath+"/", "/internal/") {
				imp.byName[p.Name] = p.ImportPath
			}
		}
	}
	return imp, nil
}

type listed struct{ Name, ImportPath, Export string }

func (imp *imports) list(dir string, args ...string) ([]listed, error) {
	cmd := exec.Command("go", append([]string{"list", "-json=Name,ImportPath,Export"}, args...)...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	// Documents may use packages of every module: the workspace knows them all.
	// A module by itself may be one that the workspace leaves out.
	work, err := filepath.Abs(filepath.Join(imp.root, "go.work"))
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(work); err != nil || dir != imp.root {
		work = "off"
	}
	cmd.Env = append(cmd.Environ(), "GOWORK="+work)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w\n%s", err, stderr.Bytes())
	}
	var all []listed
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); err == io.EOF {
			return all, nil
		} else if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
}

// check type-checks one source.
func (imp *imports) check(s source) ([]Problem, error) {
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, "", imp.withImports(s.text), parser.SkipObjectResolution)
	var bad []Problem
	report := func(pos token.Position, msg string) {
		name := pos.Filename
		if name == "" {
			name = s.doc
		}
		bad = append(bad, Problem{name, pos.Line, "Go code: " + msg})
	}
	if list := (scanner.ErrorList)(nil); errors.As(err, &list) {
		for _, e := range list {
			report(e.Pos, e.Msg)
		}
		return bad, nil
	}
	var missing []string
	for _, spec := range f.Imports {
		if path, err := strconv.Unquote(spec.Path.Value); err == nil && imp.export[path] == "" && path != "unsafe" {
			missing = append(missing, path)
		}
	}
	if len(missing) > 0 {
		packages, err := imp.list(imp.root, append([]string{"-e", "-export", "-deps"}, missing...)...)
		if err != nil {
			return nil, err
		}
		for _, p := range packages {
			imp.export[p.ImportPath] = p.Export
		}
	}
	conf := types.Config{
		Importer: importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) {
			if imp.export[path] == "" {
				return nil, fmt.Errorf("no package %s", path)
			}
			return os.Open(imp.export[path])
		}),
		Error: func(err error) {
			var e types.Error
			// Soft: unused variables and imports. An example ends where it
			// has made its point.
			if !errors.As(err, &e) || e.Soft || strings.HasPrefix(e.Msg, "too many return values") {
				return
			}
			report(fset.Position(e.Pos), e.Msg)
		},
	}
	_, _ = conf.Check("p", fset, []*ast.File{f}, nil)
	return bad, nil
}

// withImports adds the imports that a source uses and does not have.
func (imp *imports) withImports(text string) string {
	f, err := parser.ParseFile(token.NewFileSet(), "", text, 0)
	if err != nil || f.Name.Name != "p" {
		return text // whole files say themselves what they import
	}
	have := map[string]bool{}
	for _, spec := range f.Imports {
		path, _ := strconv.Unquote(spec.Path.Value)
		if spec.Name != nil {
			have[spec.Name.Name] = true
		}
		for name, known := range imp.byName {
			if known == path {
				have[name] = true
			}
		}
	}
	var add []string
	for _, id := range f.Unresolved {
		if path := imp.byName[id.Name]; path != "" && !have[id.Name] {
			have[id.Name] = true
			add = append(add, fmt.Sprintf("import %s %q;", id.Name, path))
		}
	}
	sort.Strings(add)
	return strings.Replace(text, "package p\n", "package p;"+strings.Join(slices.Compact(add), "")+"\n", 1)
}
