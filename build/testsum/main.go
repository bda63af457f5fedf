// Command testsum runs the tests of Go modules and says how many of each kind
// ran. A passing test stays silent; a failing one is printed in full.
//
//	testsum [flags] module-directory...
//
// Besides failing tests these are failures: a package that does not build or
// fails outside its tests, a skipped test that is not on the list of allowed
// skips, and (with -need-real) a run in which no test met a real redis-server.
// The last line is "N passed, N failed" and, if any, ", N skipped".
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

func main() {
	ok, err := run(os.Args[1:], os.Stdout)
	if err != nil {
		// On standard output, and in the form of the closing line: whoever
		// reads only that line must not take silence for success.
		fmt.Printf("testsum: %v\n\n0 passed, 1 failed\n", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) (ok bool, err error) {
	fs := flag.NewFlagSet("testsum", flag.ContinueOnError)
	flags := fs.String("flags", "-count=1", "flags for go test, separated by spaces")
	skips := fs.String("skips", "", "file that lists the allowed skips")
	needReal := fs.Bool("need-real", false, "fail if no test ran against a real redis-server")
	gates := fs.String("failed-gates", "", "names of gates that failed before the tests, separated by spaces")
	tailFile := fs.String("tail", "", "file to which the counts and the closing line are written too")
	if err := fs.Parse(args); err != nil {
		return false, err
	}

	s := newSummary(out)
	s.needReal = *needReal
	if *skips != "" {
		text, err := os.ReadFile(*skips)
		if err != nil {
			return false, err
		}
		if s.allowed, err = parseAllowed(string(text)); err != nil {
			return false, fmt.Errorf("%s: %w", *skips, err)
		}
	}
	var tail strings.Builder
	start := time.Now()
	for _, dir := range fs.Args() {
		if err := s.runModule(dir, strings.Fields(*flags)); err != nil {
			return false, err
		}
	}
	for _, g := range strings.Fields(*gates) {
		s.problem("gate %s", g)
	}
	s.elapsed = time.Since(start)
	ok = s.finish(&tail)
	if *tailFile != "" {
		if err := os.WriteFile(*tailFile, []byte(tail.String()), 0o644); err != nil {
			return false, err
		}
	}
	return ok, nil
}

// runModule runs the tests of the module in dir. A module without packages (one
// that only pins tools) has nothing to run.
func (s *summary) runModule(dir string, flags []string) error {
	list := exec.Command("go", "list", "./...")
	list.Dir = dir
	packages, err := list.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			s.printf("%s", exit.Stderr)
		}
		s.problem("module %s: go list: %v", dir, err)
		return nil
	}
	if len(packages) == 0 {
		s.printf("none  module %s  no packages\n", dir)
		return nil
	}

	failuresBefore := s.failures()
	cmd := exec.Command("go", append(append([]string{"test", "-json"}, flags...), "./...")...)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	if err := s.read(stdout); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil && s.failures() == failuresBefore {
		s.problem("module %s: go test: %v", dir, err)
	}
	return nil
}

// failures counts what is known to have failed so far.
func (s *summary) failures() int {
	n := len(s.problems)
	for _, t := range s.tests {
		if t.result == "fail" {
			n++
		}
	}
	return n
}
