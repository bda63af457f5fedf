package docscheck

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path"
	"path/filepath"
	"strings"
)

// Undocumented finds exported identifiers without a comment: functions, types,
// their methods, the fields of structs and the methods of interfaces, constants
// and variables, in every package that others can import. A comment on a group
// of constants or variables serves the whole group; a comment behind a field,
// a constant or a variable serves as well as one above it. Every package,
// internal ones and commands too, needs a comment of its own.
func Undocumented(root string) ([]Problem, error) {
	names, err := files(root, func(rel string) bool {
		return strings.HasSuffix(rel, ".go") && !strings.HasSuffix(rel, "_test.go")
	})
	if err != nil {
		return nil, err
	}
	var bad []Problem
	packageDoc := map[string]bool{} // by directory
	first := map[string]string{}
	var dirs []string
	for _, name := range names {
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, filepath.Join(root, name), nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		dir := path.Dir(name)
		if first[dir] == "" {
			first[dir] = name
			dirs = append(dirs, dir)
		}
		packageDoc[dir] = packageDoc[dir] || f.Doc.Text() != ""
		if ast.IsGenerated(f) || f.Name.Name == "main" || strings.Contains("/"+name, "/internal/") {
			continue
		}
		w := exportedWalk{report: func(n ast.Node, what string) {
			bad = append(bad, Problem{name, fset.Position(n.Pos()).Line, what + " is exported and has no comment"})
		}}
		for _, decl := range f.Decls {
			w.decl(decl)
		}
	}
	for _, dir := range dirs {
		if !packageDoc[dir] {
			bad = append(bad, Problem{first[dir], 1, "the package has no comment"})
		}
	}
	return bad, nil
}

type exportedWalk struct {
	report func(n ast.Node, what string)
}

func (w exportedWalk) decl(decl ast.Decl) {
	switch d := decl.(type) {
	case *ast.FuncDecl:
		if !d.Name.IsExported() || d.Doc.Text() != "" {
			return
		}
		if d.Recv == nil {
			w.report(d, "func "+d.Name.Name)
		} else if of := receiver(d.Recv.List[0].Type); ast.IsExported(of) {
			w.report(d, fmt.Sprintf("method %s.%s", of, d.Name.Name))
		}
	case *ast.GenDecl:
		for _, spec := range d.Specs {
			switch s := spec.(type) {
			case *ast.TypeSpec:
				w.typeSpec(s, d.Doc.Text() != "" && !d.Lparen.IsValid())
			case *ast.ValueSpec:
				if d.Doc.Text() != "" || s.Doc.Text() != "" || s.Comment.Text() != "" {
					continue
				}
				for _, name := range s.Names {
					if name.IsExported() {
						w.report(name, d.Tok.String()+" "+name.Name)
					}
				}
			}
		}
	}
}

func (w exportedWalk) typeSpec(s *ast.TypeSpec, documented bool) {
	if !s.Name.IsExported() {
		return
	}
	if !documented && s.Doc.Text() == "" && s.Comment.Text() == "" {
		w.report(s, "type "+s.Name.Name)
	}
	w.fields(s.Name.Name, s.Type)
}

// fields looks at what a type expression holds by name, nested structs too.
func (w exportedWalk) fields(of string, expr ast.Expr) {
	var list []*ast.Field
	what := "field"
	switch t := expr.(type) {
	case *ast.StructType:
		list = t.Fields.List
	case *ast.InterfaceType:
		list, what = t.Methods.List, "method"
	default:
		return
	}
	for _, f := range list {
		for _, name := range f.Names {
			if !name.IsExported() {
				continue
			}
			if f.Doc.Text() == "" && f.Comment.Text() == "" {
				w.report(name, fmt.Sprintf("%s %s.%s", what, of, name.Name))
			}
			w.fields(of+"."+name.Name, f.Type)
		}
	}
}

// receiver is the name of the type that a method belongs to.
func receiver(expr ast.Expr) string {
	switch t := expr.(type) {
	case *ast.StarExpr:
		return receiver(t.X)
	case *ast.IndexExpr:
		return receiver(t.X)
	case *ast.IndexListExpr:
		return receiver(t.X)
	case *ast.Ident:
		return t.Name
	}
	return ""
}
