package redistest

import (
	"context"
	_ "embed" // for the shim's source
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

// ErrNoCompiler says that the clock shim cannot be built.
var ErrNoCompiler = errors.New("redistest: no C compiler for the clock shim; install gcc and libc6-dev (Debian: apt-get install gcc libc6-dev)")

// The source lies in a directory of its own because the go command refuses C
// files in a package that does not use cgo.
//
//go:embed shim/clockshim.c
var shimSource []byte

// shimLibrary compiles the shim, once per process, and keeps the library in
// memory: each server writes it into its own directory, so that nothing is left
// behind when the last server stops.
var shimLibrary = sync.OnceValues(compileShim)

func compileShim() ([]byte, error) {
	cc, err := findCompiler()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "ringfence-shim-")
	if err != nil {
		return nil, fmt.Errorf("redistest: making a directory for the clock shim: %w", err)
	}
	defer os.RemoveAll(dir)
	source, library := filepath.Join(dir, "clockshim.c"), filepath.Join(dir, "clockshim.so")
	if err := os.WriteFile(source, shimSource, 0o600); err != nil {
		return nil, fmt.Errorf("redistest: writing the clock shim: %w", err)
	}
	// Not the caller's context: the result, good or bad, is kept for everyone.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, cc, "-shared", "-fPIC", "-O2", "-o", library, source).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("redistest: compiling the clock shim with %s: %w\n%s", cc, err, out)
	}
	return os.ReadFile(library)
}

func findCompiler() (string, error) {
	for _, name := range []string{"cc", "gcc", "clang"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", ErrNoCompiler
}
