package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// state is what earlier runs of the same code came to, so that an interrupted run can go on.
type state struct {
	Version string    `json:"version"`
	Cells   []outcome `json:"cells"`
}

// load reads the state; that of other code, or none, is an empty one.
func loadState(file, version string) (*state, error) {
	fresh := &state{Version: version}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return fresh, nil
	}
	if err != nil {
		return nil, err
	}
	var s state
	if json.Unmarshal(text, &s) != nil || s.Version != version {
		return fresh, nil
	}
	return &s, nil
}

func (s *state) save(file string) error {
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(file, text)
}

// writeFile replaces a file as a whole: a run that is interrupted leaves the old one.
func writeFile(file string, text []byte) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	next := file + ".next"
	if err := os.WriteFile(next, text, 0o644); err != nil {
		return err
	}
	return os.Rename(next, file)
}

// has says whether all cells of a fault are there.
func (s *state) has(f fault) bool {
	for _, id := range f.cells() {
		if !s.hasCell(id) {
			return false
		}
	}
	return true
}

func (s *state) hasCell(id cellID) bool {
	for _, o := range s.Cells {
		if o.id() == id.String() {
			return true
		}
	}
	return false
}

// put replaces the cells of a fault.
func (s *state) put(f fault, cells []outcome) {
	s.forget(f)
	s.Cells = append(s.Cells, cells...)
}

func (s *state) forget(f fault) {
	var kept []outcome
	for _, o := range s.Cells {
		if o.Fault != f.name {
			kept = append(kept, o)
		}
	}
	s.Cells = kept
}

// of are the cells of these faults, in their order.
func (s *state) of(faults []fault) []outcome {
	var out []outcome
	for _, f := range faults {
		for _, o := range s.Cells {
			if o.Fault == f.name {
				out = append(out, o)
			}
		}
	}
	return out
}

// codeVersion is a digest of all that decides what a cell comes to: the Go and Lua files of
// the module that are not tests, and its dependencies.
func codeVersion(root string) (string, error) {
	sum := sha256.New()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if path != root && (strings.HasPrefix(name, ".") || name == "testdata") {
				return filepath.SkipDir
			}
			return nil
		}
		decides := strings.HasSuffix(name, ".go") && !strings.HasSuffix(name, "_test.go") ||
			strings.HasSuffix(name, ".lua") || strings.HasSuffix(name, ".c") || name == "go.mod"
		if !decides {
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, _ = io.WriteString(sum, path+"\x00") // a hash takes everything
		_, err = io.Copy(sum, f)
		return err
	})
	return hex.EncodeToString(sum.Sum(nil)), err
}
