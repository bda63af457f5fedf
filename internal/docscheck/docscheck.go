// Package docscheck holds the gates that keep the documents true: links that
// lead somewhere, Go code that compiles, commands that exist, and a comment on
// everything that is exported.
//
// Every gate takes the root of a repository and returns what is wrong with it.
// An error means that the gate could not look; it never means "all is well".
package docscheck

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Problem is one thing that is wrong.
type Problem struct {
	File string // relative to the root, with slashes
	Line int    // from 1; 0 if it is about the whole file
	Text string // what is wrong
}

// String gives the problem in the form that editors can jump to.
func (p Problem) String() string {
	if p.Line == 0 {
		return fmt.Sprintf("%s: %s", p.File, p.Text)
	}
	return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Text)
}

// skippedDirs hold nothing that we have written, or test input that is meant
// to be wrong.
var skippedDirs = []string{".git", ".cache", "bin", "node_modules", "testdata"}

// files lists the files under root whose name the filter accepts.
func files(root string, want func(rel string) bool) ([]string, error) {
	var found []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if path != root && slices.Contains(skippedDirs, d.Name()) {
				return filepath.SkipDir
			}
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if rel = filepath.ToSlash(rel); d.Type().IsRegular() && want(rel) {
			found = append(found, rel)
		}
		return nil
	})
	return found, err
}

// document is a Markdown file, split into lines, with its code told apart.
type document struct {
	name   string
	prose  []string // the lines, with code blocks and code spans blanked
	code   []string // the lines of code blocks and the code spans, the rest blanked
	blocks []block
}

// block is a fenced code block.
type block struct {
	lang  string   // the first word after the fence
	line  int      // of the first line inside, from 1
	lines []string // without the fences
}

func isMarkdown(rel string) bool { return strings.HasSuffix(rel, ".md") }

// documents reads every Markdown file under root.
func documents(root string) ([]document, error) {
	names, err := files(root, isMarkdown)
	if err != nil {
		return nil, err
	}
	docs := make([]document, 0, len(names))
	for _, name := range names {
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return nil, err
		}
		docs = append(docs, parseDocument(name, string(text)))
	}
	return docs, nil
}

func parseDocument(name, text string) document {
	d := document{name: name}
	var open *block
	var fence string
	for i, line := range strings.Split(text, "\n") {
		trimmed := strings.TrimSpace(line)
		switch {
		case open == nil && (strings.HasPrefix(trimmed, "```") || strings.HasPrefix(trimmed, "~~~")):
			fence = trimmed[:len(trimmed)-len(strings.TrimLeft(trimmed, trimmed[:1]))]
			lang, _, _ := strings.Cut(strings.TrimSpace(trimmed[len(fence):]), " ")
			open = &block{lang: lang, line: i + 2}
			d.prose, d.code = append(d.prose, ""), append(d.code, "")
		case open != nil && strings.HasPrefix(trimmed, fence) && strings.Trim(trimmed, fence[:1]) == "":
			d.blocks = append(d.blocks, *open)
			open = nil
			d.prose, d.code = append(d.prose, ""), append(d.code, "")
		case open != nil:
			open.lines = append(open.lines, line)
			d.prose, d.code = append(d.prose, ""), append(d.code, line)
		default:
			prose, code := splitSpans(line)
			d.prose, d.code = append(d.prose, prose), append(d.code, code)
		}
	}
	if open != nil {
		d.blocks = append(d.blocks, *open)
	}
	return d
}

// splitSpans parts a line into what is outside of its code spans and what is
// inside; spans are kept apart by newlines.
func splitSpans(line string) (prose, code string) {
	var out, in strings.Builder
	for {
		i := strings.IndexByte(line, '`')
		if i < 0 {
			break
		}
		ticks := line[i : len(line)-len(strings.TrimLeft(line[i:], "`"))]
		rest := line[i+len(ticks):]
		end := strings.Index(rest, ticks)
		if end < 0 {
			break
		}
		out.WriteString(line[:i] + " ")
		in.WriteString(strings.TrimSpace(rest[:end]) + "\n")
		line = rest[end+len(ticks):]
	}
	out.WriteString(line)
	return out.String(), in.String()
}
