package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

func main() {
	redis.SetLogger(silence{}) // it logs every failed dial, and failing is what this is about
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// silence is a logger for go-redis.
type silence struct{}

// Printf does nothing.
func (silence) Printf(context.Context, string, ...any) {}

// atMost bounds a whole run. What is finished by then is kept, and the next run goes on.
const atMost = time.Hour

func run(ctx context.Context, args []string, out, log io.Writer) int {
	fs := flag.NewFlagSet("chaos", flag.ContinueOnError)
	fs.SetOutput(log)
	which := fs.String("fault", "", "names of faults, separated by commas; empty: all")
	again := fs.Bool("again", false, "run cells again that are finished")
	results := fs.String("results", "chaos/results.json", "file for the results of a run of all faults")
	keep := fs.String("state", ".cache/chaos/state.json", "file for what is finished")
	document := fs.String("doc", "", "write the document from the results to this file, and run nothing")
	root := fs.String("root", ".", "directory of the module")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	fail := func(err error) int {
		fmt.Fprintln(log, "chaos:", err)
		return 2
	}
	if *document != "" {
		if err := writeDocument(ctx, *results, *document); err != nil {
			return fail(err)
		}
		return 0
	}
	faults, err := choose(*which)
	if err != nil {
		return fail(err)
	}
	version, err := codeVersion(*root)
	if err != nil {
		return fail(err)
	}
	s, err := loadState(*keep, version)
	if err != nil {
		return fail(err)
	}
	ctx, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	m := matrixRun{
		faults: faults, state: s, again: *again, log: log,
		play: func(ctx context.Context, f fault) []outcome { return (&runner{full}).run(ctx, f) },
		saved: func() error {
			if err := s.save(*keep); err != nil || len(faults) != len(matrix) {
				return err
			}
			return saveResults(*results, s.of(faults))
		},
	}
	return m.run(ctx, out)
}

func saveResults(file string, cells []outcome) error {
	all := make([]result, len(cells))
	for i, c := range cells {
		all[i] = c.result
	}
	text, err := formatResults(all)
	if err != nil {
		return err
	}
	return writeFile(file, text)
}

// choose takes faults by name; all for none.
func choose(names string) ([]fault, error) {
	if names == "" {
		return matrix, nil
	}
	var out []fault
	for name := range strings.SplitSeq(names, ",") {
		f, err := byName(strings.TrimSpace(name))
		if err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	return out, nil
}

// matrixRun is one run over some faults.
type matrixRun struct {
	faults []fault
	state  *state
	again  bool
	play   func(ctx context.Context, f fault) []outcome
	saved  func() error
	log    io.Writer
}

// run plays what is not finished, prints the table, and returns 0 if every cell of these
// faults is there and ok, else 1; 2 if it could not work.
func (m *matrixRun) run(ctx context.Context, out io.Writer) int {
	for i, f := range m.faults {
		if m.state.has(f) && !m.again {
			fmt.Fprintf(m.log, "%2d of %d  %-20s finished earlier\n", i+1, len(m.faults), f.name)
			continue
		}
		start := time.Now()
		cells := m.play(ctx, f)
		if ctx.Err() != nil {
			fmt.Fprintln(m.log, "chaos: interrupted; the next run goes on here:", f.name)
			break
		}
		m.state.put(f, cells)
		word := "ok"
		for _, c := range cells {
			if !c.OK {
				word = "BROKEN"
			}
		}
		fmt.Fprintf(m.log, "%2d of %d  %-20s %s, %s\n", i+1, len(m.faults), f.name, word, time.Since(start).Round(time.Second))
		if err := m.saved(); err != nil {
			fmt.Fprintln(m.log, "chaos:", err)
			return 2
		}
	}
	if err := m.saved(); err != nil { // also when nothing was played
		fmt.Fprintln(m.log, "chaos:", err)
		return 2
	}
	cells := m.state.of(m.faults)
	printTable(out, cells)
	all := make([]result, len(cells))
	for i, c := range cells {
		all[i] = c.result
	}
	var expected []cellID
	for _, f := range m.faults {
		expected = append(expected, f.cells()...)
	}
	if bad := broken(all, expected); len(bad) > 0 {
		fmt.Fprintf(out, "%d of %d cells broke a bound or were not run: %s\n", len(bad), len(expected), strings.Join(bad, ", "))
		return 1
	}
	fmt.Fprintf(out, "%d cells, all within their bounds\n", len(expected))
	return 0
}
