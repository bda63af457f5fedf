package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"
	"time"
)

// The lines by which a test says which kind of server answered it. They are
// logged by the helpers that start the servers, so no test has to remember to.
const (
	realMarker     = "real redis-server "
	embeddedMarker = "embedded redis "
)

// slowestShown is the number of slow tests the summary lists.
const slowestShown = 10

// event is one line of `go test -json` (see `go doc test2json`).
type event struct {
	Action      string
	Package     string
	Test        string
	Output      string
	Elapsed     float64
	ImportPath  string
	FailedBuild string
}

// kind says what a test ran against.
type kind int

const (
	unit kind = iota
	embedded
	realServer
	kinds
)

func (k kind) String() string {
	return [...]string{"unit", "embedded", "real-server"}[k]
}

type testID struct{ pkg, name string }

func (id testID) String() string { return id.pkg + " " + id.name }

// parent is the test that started this subtest, and whether there is one.
func (id testID) parent() (testID, bool) {
	i := strings.LastIndexByte(id.name, '/')
	if i < 0 {
		return testID{}, false
	}
	return testID{id.pkg, id.name[:i]}, true
}

type testState struct {
	result  string // pass, fail, skip; empty while it runs
	output  []string
	logged  kind // what its own output says
	elapsed time.Duration
}

type packageState struct {
	result  string
	output  []string // output that belongs to no test
	elapsed time.Duration
	order   []testID
}

// summary collects the events of any number of `go test -json` runs.
type summary struct {
	out      io.Writer
	allowed  map[testID]string // skips that are allowed, with the reason
	needReal bool              // no real-server test at all is a failure

	tests    map[testID]*testState
	packages map[string]*packageState
	builds   map[string][]string // compiler output by import path
	problems []string            // failures that are no test's
	elapsed  time.Duration
}

func newSummary(out io.Writer) *summary {
	return &summary{
		out:      out,
		allowed:  map[testID]string{},
		tests:    map[testID]*testState{},
		packages: map[string]*packageState{},
		builds:   map[string][]string{},
	}
}

// read takes one run's events until the stream ends. Lines that are not events
// are passed through: they are what the go command itself had to say.
func (s *summary) read(r io.Reader) error {
	br := bufio.NewReader(r)
	for {
		line, err := br.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if line[0] != '{' || json.Unmarshal(line, &e) != nil {
				_, _ = s.out.Write(line)
			} else {
				s.add(e)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// problem records a failure that belongs to no test.
func (s *summary) problem(format string, args ...any) {
	s.problems = append(s.problems, fmt.Sprintf(format, args...))
}

func (s *summary) add(e event) {
	switch {
	case e.Action == "build-output":
		s.builds[e.ImportPath] = append(s.builds[e.ImportPath], e.Output)
	case e.Package == "":
		// build-fail: the package that needed the build fails too and says so.
	case e.Test == "":
		s.addPackage(e)
	default:
		s.addTest(e)
	}
}

func (s *summary) pkg(name string) *packageState {
	p := s.packages[name]
	if p == nil {
		p = &packageState{}
		s.packages[name] = p
	}
	return p
}

func (s *summary) addTest(e event) {
	id := testID{e.Package, e.Test}
	t := s.tests[id]
	if t == nil {
		t = &testState{}
		s.tests[id] = t
		p := s.pkg(e.Package)
		p.order = append(p.order, id)
	}
	switch e.Action {
	case "output":
		t.output = append(t.output, e.Output)
		switch {
		case strings.Contains(e.Output, realMarker):
			t.logged = realServer
		case strings.Contains(e.Output, embeddedMarker):
			t.logged = max(t.logged, embedded)
		}
	case "pass", "fail", "skip":
		t.result = e.Action
		t.elapsed = time.Duration(e.Elapsed * float64(time.Second))
	}
}

func (s *summary) addPackage(e event) {
	p := s.pkg(e.Package)
	switch e.Action {
	case "output":
		p.output = append(p.output, e.Output)
	case "pass", "skip":
		p.result = e.Action
		s.endPackage(e, p)
	case "fail":
		p.result = e.Action
		s.endPackage(e, p)
	}
}

// endPackage reports a package as soon as it is done, so that a run which is
// cut short has shown what it knew.
func (s *summary) endPackage(e event, p *packageState) {
	p.elapsed = time.Duration(e.Elapsed * float64(time.Second))
	failed := 0
	for _, id := range p.order {
		t := s.tests[id]
		if t.result == "" { // the process ended under it
			t.result = "fail"
			t.output = append(t.output, "    (the test never finished)\n")
		}
		if t.result == "fail" {
			failed++
		}
	}
	switch {
	case e.FailedBuild != "":
		s.problem("%s: does not build", e.Package)
		s.printf("FAIL  %s  does not build\n", e.Package)
		s.print(s.builds[e.FailedBuild])
		return
	case p.result == "fail" && failed == 0:
		s.problem("%s: the package failed outside its tests", e.Package)
		s.printf("FAIL  %s  failed outside its tests\n", e.Package)
		s.print(p.output)
		return
	case failed > 0:
		s.printf("FAIL  %s  %.1fs, %d of %d tests failed\n", e.Package, p.elapsed.Seconds(), failed, len(p.order))
		for _, id := range p.order {
			if t := s.tests[id]; t.result == "fail" {
				s.printf("----  %s\n", id.name)
				s.print(t.output)
			}
		}
		s.print(p.output)
	case len(p.order) == 0:
		s.printf("none  %s  no tests\n", e.Package)
	default:
		s.printf("ok    %s  %.1fs, %d tests\n", e.Package, p.elapsed.Seconds(), len(p.order))
	}
	if p.result == "pass" && failed > 0 {
		s.problem("%s: passed although tests in it did not finish", e.Package)
	}
}

// kindsOf says for every test what it ran against: real if the test, one that
// contains it or one that it contains logged a real server; then embedded
// alike. Siblings do not colour each other.
func (s *summary) kindsOf() map[testID]kind {
	up := map[testID]kind{} // the most that the test or any test in it logged
	for id, t := range s.tests {
		for at, ok := id, true; ok; at, ok = at.parent() {
			up[at] = max(up[at], t.logged)
		}
	}
	all := make(map[testID]kind, len(s.tests))
	for id := range s.tests {
		k := up[id]
		for at, ok := id.parent(); ok; at, ok = at.parent() {
			if t := s.tests[at]; t != nil {
				k = max(k, t.logged)
			}
		}
		all[id] = k
	}
	return all
}

// finish prints the summary to out and, from the counts on, to tail too. It
// reports whether everything passed; the closing line says the same: the
// number failed is zero exactly if finish returns true.
func (s *summary) finish(tail io.Writer) bool {
	var passed, failed, skipped int
	var failures, skips []string
	var ran [kinds]int
	var examples, fuzzed int

	ids := make([]testID, 0, len(s.tests))
	for id := range s.tests {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b testID) int { return strings.Compare(a.String(), b.String()) })

	kindOf := s.kindsOf()
	for _, id := range ids {
		t := s.tests[id]
		if t.result == "skip" {
			if reason, ok := s.allowed[id]; ok {
				skipped++
				skips = append(skips, fmt.Sprintf("%s (allowed: %s)", id, reason))
			} else {
				failed++
				failures = append(failures, fmt.Sprintf("%s (skipped, and not on the list of allowed skips)", id))
				s.printf("----  %s (skipped)\n", id)
				s.print(t.output)
			}
			continue
		}
		ran[kindOf[id]]++
		switch {
		case strings.HasPrefix(id.name, "Example"):
			examples++
		case strings.HasPrefix(id.name, "Fuzz"):
			fuzzed++
		}
		if t.result == "pass" {
			passed++
			continue
		}
		failed++
		if s.pkg(id.pkg).result == "" {
			failures = append(failures, id.String()+" (its package never finished)")
		} else {
			failures = append(failures, id.String())
		}
	}
	if s.needReal && ran[realServer] == 0 {
		s.problem("no test ran against a real redis-server")
	}
	failed += len(s.problems)
	failures = append(failures, s.problems...)

	s.slowest(ids)
	both := io.MultiWriter(s.out, tail)
	list := func(title string, lines []string) {
		if len(lines) == 0 {
			return
		}
		_, _ = fmt.Fprintf(both, "\n%s:\n", title)
		for _, l := range lines {
			_, _ = fmt.Fprintf(both, "  %s\n", l)
		}
	}
	list("skipped", skips)
	list("failed", failures)
	_, _ = fmt.Fprintf(both, "\ntests run (subtests counted), in %.0fs:\n", s.elapsed.Seconds())
	_, _ = fmt.Fprintf(both, "  unit         %6d  (of these %d examples, %d fuzz targets and seeds)\n", ran[unit], examples, fuzzed)
	_, _ = fmt.Fprintf(both, "  embedded     %6d\n", ran[embedded])
	_, _ = fmt.Fprintf(both, "  real-server  %6d\n", ran[realServer])
	closing := fmt.Sprintf("%d passed, %d failed", passed, failed)
	if skipped > 0 {
		closing += fmt.Sprintf(", %d skipped", skipped)
	}
	_, _ = fmt.Fprintf(both, "\n%s\n", closing)
	return failed == 0
}

func (s *summary) slowest(ids []testID) {
	var top []testID
	for _, id := range ids {
		if _, sub := id.parent(); !sub && s.tests[id].elapsed > 0 {
			top = append(top, id)
		}
	}
	sort.SliceStable(top, func(i, j int) bool { return s.tests[top[i]].elapsed > s.tests[top[j]].elapsed })
	if len(top) == 0 {
		return
	}
	s.printf("\nslowest tests:\n")
	for _, id := range top[:min(len(top), slowestShown)] {
		s.printf("  %7.2fs  %s\n", s.tests[id].elapsed.Seconds(), id)
	}
}

func (s *summary) printf(format string, args ...any) { _, _ = fmt.Fprintf(s.out, format, args...) }

func (s *summary) print(lines []string) {
	for _, l := range lines {
		_, _ = io.WriteString(s.out, l)
	}
	if n := len(lines); n > 0 && !strings.HasSuffix(lines[n-1], "\n") {
		_, _ = io.WriteString(s.out, "\n")
	}
}

// parseAllowed reads a list of skips that are no failure: the package's import
// path, the test, and the reason, one to a line; # starts a comment.
func parseAllowed(text string) (map[testID]string, error) {
	allowed := map[testID]string{}
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		f := strings.Fields(line)
		if len(f) < 3 {
			return nil, fmt.Errorf("line %d: want a package, a test and a reason, got %q", n+1, line)
		}
		allowed[testID{f[0], f[1]}] = strings.Join(f[2:], " ")
	}
	return allowed, nil
}
