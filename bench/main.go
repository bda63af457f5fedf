package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"strconv"
	"strings"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := command(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// command is the program: args, the document if it is not written, progress.
func command(ctx context.Context, args []string, out, log io.Writer) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(log)
	var (
		dir       = flags.String("dir", "..", "root of the repository")
		short     = flags.Bool("short", false, "3 rounds of 300 ms instead of 5 of 1 s")
		report    = flags.Bool("report", false, "run nothing: write the document from the stored results")
		rounds    = flags.Int("rounds", 0, "rounds; 0: 5, or 3 if short")
		cellTime  = flags.Duration("cell", 0, "measured part of a closed-loop cell; 0: 1s, or 300ms if short")
		openTime  = flags.Duration("open", 0, "measured part of an open-loop cell; 0: 4s, or 1s if short")
		warmTime  = flags.Duration("warm", 200*time.Millisecond, "warm-up before each cell")
		repeats   = flags.Float64("repeats", 0.5, "cells run again because others disturbed them, at most this part of all")
		limit     = flags.Duration("limit", 35*time.Minute, "after this only what has no result yet is run, once")
		workloads = flags.String("workloads", "", "only these, with commas between them; then nothing is written but the document to standard output")
		systems   = flags.String("systems", "", "the same for systems")
		callers   = flags.String("callers", "", "the same for numbers of callers")
		profile   = flags.String("cpuprofile", "", "write a CPU profile of this process to the file, for go tool pprof")
	)
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if *report {
		return writeReport(*dir)
	}
	o := options{
		rounds: *rounds, repeats: *repeats, limit: *limit,
		closed:    timing{warm: *warmTime, measured: *cellTime},
		open:      timing{warm: *warmTime, measured: *openTime},
		workloads: list(*workloads), systems: list(*systems),
	}
	for _, n := range list(*callers) {
		v, err := strconv.Atoi(n)
		if err != nil {
			return fmt.Errorf("-callers: %w", err)
		}
		o.callers = append(o.callers, v)
	}
	if err := o.complete(*short); err != nil {
		return err
	}
	if *profile != "" {
		w, err := os.Create(*profile)
		if err != nil {
			return fmt.Errorf("-cpuprofile: %w", err)
		}
		defer func() { _ = w.Close() }()
		if err := pprof.StartCPUProfile(w); err != nil {
			return fmt.Errorf("-cpuprofile: %w", err)
		}
		defer pprof.StopCPUProfile()
	}
	began := time.Now()
	a := describe(ctx)
	a.Command = strings.Join(append([]string{"go run ."}, args...), " ")
	rows, problems, err := (&bench{options: o, log: log}).run(ctx)
	if err != nil {
		return err
	}
	a.timing(o, time.Since(began))
	a.Problems = problems
	if len(o.workloads)+len(o.systems)+len(o.callers) > 0 {
		document, _ := document(rows, a)
		_, err = io.WriteString(out, document)
		return err
	}
	if err := writeResults(*dir, rows, a); err != nil {
		return err
	}
	if err := writeReport(*dir); err != nil {
		return err
	}
	if len(problems) > 0 {
		return fmt.Errorf("%d cells could not be measured; the document says which", len(problems))
	}
	return nil
}

func list(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

// complete fills in what is unset and refuses what does not exist or has no bound.
func (o *options) complete(short bool) error {
	defaults := struct {
		rounds       int
		closed, open time.Duration
	}{5, time.Second, 4 * time.Second}
	if short {
		defaults.rounds, defaults.closed, defaults.open = 3, 300*time.Millisecond, time.Second
	}
	if o.rounds == 0 {
		o.rounds = defaults.rounds
	}
	if o.closed.measured == 0 {
		o.closed.measured = defaults.closed
	}
	if o.open.measured == 0 {
		o.open.measured = defaults.open
	}
	switch {
	case o.rounds < 1 || o.rounds > 100:
		return fmt.Errorf("-rounds %d: take 1 to 100", o.rounds)
	case o.closed.measured < 0 || o.closed.measured > 10*time.Second:
		return fmt.Errorf("-cell %s: take up to 10s", o.closed.measured)
	case o.open.measured < 0 || o.open.measured > time.Minute:
		return fmt.Errorf("-open %s: take up to 1m", o.open.measured)
	case o.closed.warm < 0 || o.closed.warm > 10*time.Second:
		return fmt.Errorf("-warm %s: take 0 to 10s", o.closed.warm)
	case o.repeats < 0 || o.repeats > 2:
		return fmt.Errorf("-repeats %g: take 0 to 2", o.repeats)
	}
	for _, name := range o.systems {
		if _, err := systemNamed(name); err != nil {
			return err
		}
	}
	for _, n := range o.callers {
		if n < 1 || n > 10_000 {
			return fmt.Errorf("-callers %d: take 1 to 10000", n)
		}
	}
	for _, id := range o.workloads {
		if _, err := workloadNamed(id); err != nil {
			return err
		}
	}
	return nil
}

// writeReport writes the document and its charts from the stored results.
func writeReport(dir string) error {
	rows, a, err := readResults(dir)
	if err != nil {
		return err
	}
	text, charts := document(rows, a)
	if err := os.WriteFile(filepath.Join(dir, "docs", "benchmarks.md"), []byte(text), 0o644); err != nil {
		return err
	}
	for name, svg := range charts {
		if err := os.WriteFile(filepath.Join(dir, "docs", name), []byte(svg), 0o644); err != nil {
			return err
		}
	}
	return nil
}
