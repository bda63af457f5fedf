package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// good are results that are within their bounds, for every cell of some faults.
func good(faults ...fault) []outcome {
	var out []outcome
	for _, f := range faults {
		for _, id := range f.cells() {
			out = append(out, outcome{result: result{Fault: id.fault, Policy: id.policy, Algorithm: id.algorithm, Admitted: 1, Bound: 2, OK: true}})
		}
	}
	return out
}

func TestTheMatrixHasEveryPolicyAndAlgorithmForEveryFault(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range matrix {
		if seen[f.name] || f.name == "" || f.does == "" || f.promise == "" || (f.start == nil) == (f.special == nil) {
			t.Errorf("fault %q is there twice, or not whole", f.name)
		}
		seen[f.name] = true
		for _, p := range []string{policyOpen, policyClosed, policyLocal} {
			for _, a := range []string{tokenBucket, slidingLog} {
				if !slices.Contains(f.cells(), cellID{f.name, p, a}) {
					t.Errorf("%s has no cell for %s and %s", f.name, p, a)
				}
			}
		}
	}
	for _, name := range []string{
		"none", "kill", "stop", "drop", "loss-50", "latency-under", "latency-over", "reply-cut", "pool", "oom",
		"misconf", "busy", "loading", "noreplicas", "script-flush", "flushall", "sentinel-kill", "sentinel-stop",
		"sentinel-partition", "sentinel-planned", "cluster-master-lost", "slot-moved", "clock+30s", "clock-30s",
		"clock+1h", "clock-1h", "flapping", "down-at-start", "three-of-eight",
	} {
		if !seen[name] {
			t.Errorf("no fault %s", name)
		}
	}
}

// runMatrix runs some faults without playing them: what play says is what they come to.
func runMatrix(t *testing.T, s *state, again bool, play func(f fault) []outcome, names ...string) (exit int, table string, played []string) {
	t.Helper()
	faults, err := choose(strings.Join(names, ","))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	m := matrixRun{faults: faults, state: s, again: again, log: io.Discard, saved: func() error { return nil }}
	m.play = func(_ context.Context, f fault) []outcome {
		played = append(played, f.name)
		return play(f)
	}
	exit = m.run(t.Context(), &out)
	return exit, out.String(), played
}

func TestACellThatBreaksItsBoundMakesTheCommandFail(t *testing.T) {
	exit, table, _ := runMatrix(t, &state{}, false, func(f fault) []outcome { return good(f) }, "kill", "stop")
	if exit != 0 || !strings.Contains(table, "16 cells, all within their bounds") {
		t.Errorf("all well: exit %d\n%s", exit, table)
	}
	exit, table, _ = runMatrix(t, &state{}, false, func(f fault) []outcome {
		out := good(f)
		if f.name == "stop" {
			complain(out[3:4], "%d admitted, want at most %d", 3, 2)
		}
		return out
	}, "kill", "stop")
	if exit != 1 || !strings.Contains(table, "BROKEN stop/closed/sliding_log: 3 admitted, want at most 2") || !strings.Contains(table, "1 of 16 cells") {
		t.Errorf("one broken: exit %d\n%s", exit, table)
	}
	exit, table, _ = runMatrix(t, &state{}, false, func(f fault) []outcome { return good(f)[1:] }, "kill")
	if exit != 1 || !strings.Contains(table, "kill/open/token_bucket (not run)") {
		t.Errorf("one missing: exit %d\n%s", exit, table)
	}
}

func TestAFaultThatCannotBePlayedIsListedAsFailedInAllItsCells(t *testing.T) {
	f := fault{name: "no privilege", start: func(context.Context, *scene) error { return fmt.Errorf("only root may") }}
	out := (&runner{short}).run(t.Context(), f)
	if len(out) != 8 {
		t.Fatalf("%d cells, want 8", len(out))
	}
	for _, o := range out {
		if o.OK || !strings.Contains(strings.Join(o.Problems, " "), "only root may") {
			t.Errorf("%+v", o)
		}
	}
}

func TestAFaultIsPlayedAgainOnlyIfItBrokeWhileTheMachineWasTooBusy(t *testing.T) {
	tests := []struct {
		name  string
		ok    bool
		late  time.Duration
		plays int
	}{
		{"all well, machine busy", true, time.Second, 1},
		{"broken, machine quiet", false, tooLate, 1},
		{"broken, machine busy", false, tooLate + 1, mostPlays},
	}
	for _, c := range tests {
		plays := 0
		f := fault{name: "any", special: func(context.Context, *runner, fault) []outcome {
			plays++
			return []outcome{{result: result{OK: c.ok}, late: c.late}}
		}}
		out := (&runner{short}).run(t.Context(), f)
		if plays != c.plays || out[0].OK != c.ok {
			t.Errorf("%s: %d plays, want %d; ok %t", c.name, plays, c.plays, out[0].OK)
		}
	}
}

func TestFinishedFaultsAreNotPlayedAgainUnlessAskedOrTheCodeHasChanged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "sub", "state.json")
	s, err := loadState(file, "v1")
	if err != nil {
		t.Fatal(err)
	}
	all := func(f fault) []outcome { return good(f) }
	if _, _, played := runMatrix(t, s, false, all, "kill"); !slices.Equal(played, []string{"kill"}) {
		t.Errorf("first: played %v", played)
	}
	if err := s.save(file); err != nil {
		t.Fatal(err)
	}
	if s, err = loadState(file, "v1"); err != nil {
		t.Fatal(err)
	}
	if exit, _, played := runMatrix(t, s, false, all, "kill", "stop"); exit != 0 || !slices.Equal(played, []string{"stop"}) {
		t.Errorf("the second goes on: exit %d, played %v", exit, played)
	}
	if _, _, played := runMatrix(t, s, true, all, "kill"); !slices.Equal(played, []string{"kill"}) {
		t.Errorf("asked for again: played %v", played)
	}
	if n := len(s.Cells); n != 16 {
		t.Errorf("%d cells kept, want 16", n)
	}
	if s, err = loadState(file, "v2"); err != nil || len(s.Cells) != 0 {
		t.Errorf("other code: %d cells, %v", len(s.Cells), err)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err = loadState(file, "v1"); err != nil || len(s.Cells) != 0 {
		t.Errorf("half a file: %d cells, %v", len(s.Cells), err)
	}
}

func TestAnInterruptedFaultIsNotKept(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := &state{}
	m := matrixRun{faults: matrix[:2], state: s, log: io.Discard, saved: func() error { return nil }}
	m.play = func(_ context.Context, f fault) []outcome {
		if f.name == matrix[1].name {
			cancel()
		}
		return good(f)
	}
	var out bytes.Buffer
	if exit := m.run(ctx, &out); exit != 1 || len(s.Cells) != 8 || !strings.Contains(out.String(), "(not run)") {
		t.Errorf("exit %d, %d cells kept\n%s", exit, len(s.Cells), out.String())
	}
}

func TestCodeVersionChangesWithCodeAndNotWithTests(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		v, err := codeVersion(dir)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	first := write("a.go", "package a")
	if v := write("a_test.go", "package a"); v != first {
		t.Error("a test changes it")
	}
	if v := write("a.md", "text"); v != first {
		t.Error("a document changes it")
	}
	if v := write("a.lua", "return 1"); v == first {
		t.Error("a script does not change it")
	}
	if v := write("a.go", "package b"); v == first {
		t.Error("code does not change it")
	}
}

func TestResultsHaveEveryFieldAndNoOther(t *testing.T) {
	r := result{Fault: "kill", Policy: "open", Algorithm: tokenBucket, Admitted: 1, Bound: 2, P50: 3, P999: 4, Max: 5, Recovery: 6, ShardCalls: 7, OK: true}
	other := r
	other.OK, other.Policy = false, "closed"
	text, err := formatResults([]result{r, other})
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseResults(text)
	if err != nil || !slices.Equal(got, []result{r, other}) {
		t.Errorf("%v, %v from\n%s", got, err, text)
	}
	var raw []map[string]any
	if err := json.Unmarshal(text, &raw); err != nil {
		t.Fatal(err)
	}
	for _, f := range fields {
		cell := map[string]any{}
		for k, v := range raw[0] {
			if k != f {
				cell[k] = v
			}
		}
		if len(cell) != len(fields)-1 {
			t.Fatalf("%q is not written", f)
		}
		short, _ := json.Marshal([]any{cell})
		if _, err := parseResults(short); err == nil || !strings.Contains(err.Error(), f) {
			t.Errorf("without %q: %v", f, err)
		}
	}
	for name, text := range map[string]string{
		"twice":      strings.Replace(string(text), "closed", "open", 1),
		"unknown":    strings.Replace(string(text), `"fault"`, `"more":1,"fault"`, 1),
		"not a list": "{}",
	} {
		if _, err := parseResults([]byte(text)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestTheRecordIsWholeAndTheDocumentIsMadeOfIt(t *testing.T) {
	all, err := readResults("results.json")
	if err != nil {
		t.Fatal(err)
	}
	var expected []cellID
	for _, f := range matrix {
		expected = append(expected, f.cells()...)
	}
	if bad := broken(all, expected); len(bad) > 0 || len(all) != len(expected) {
		t.Errorf("%d cells of %d; broken or missing: %v", len(all), len(expected), bad)
	}
	text, err := os.ReadFile("../docs/faults.md")
	if err != nil {
		t.Fatal(err)
	}
	// All but the machine must be what the program would write.
	for part := range strings.SplitSeq(document(all, "MACHINE"), "MACHINE") {
		if !strings.Contains(string(text), part) {
			t.Error(`docs/faults.md is not made of results.json; run: go run ./chaos -doc docs/faults.md`)
		}
	}
}

func TestFaultsAreChosenByName(t *testing.T) {
	if all, err := choose(""); err != nil || len(all) != len(matrix) {
		t.Errorf("none named: %d, %v", len(all), err)
	}
	if some, err := choose("kill, stop"); err != nil || len(some) != 2 || some[1].name != "stop" {
		t.Errorf("%v, %v", some, err)
	}
	if _, err := choose("nosuch"); err == nil || !strings.Contains(err.Error(), "there are: none kill") {
		t.Errorf("unknown: %v", err)
	}
	if exit := run(t.Context(), []string{"-fault", "nosuch"}, io.Discard, io.Discard); exit != 2 {
		t.Errorf("unknown: exit %d", exit)
	}
}

func TestQuantilesAndTimes(t *testing.T) {
	var took []time.Duration
	for i := range 1000 {
		took = append(took, time.Duration(i))
	}
	for p, want := range map[float64]time.Duration{0: 0, 0.5: 500, 0.999: 999, 1: 999} {
		if got := quantile(took, p); got != want {
			t.Errorf("quantile %v: %d, want %d", p, got, want)
		}
	}
	if got := quantile(nil, 0.5); got != 0 {
		t.Errorf("of nothing: %d", got)
	}
	for us, want := range map[int64]string{0: "0 µs", 999: "999 µs", 1000: "1.0 ms", 51_499: "51 ms"} {
		if got := micros(us); got != want {
			t.Errorf("%d: %s, want %s", us, got, want)
		}
	}
}
