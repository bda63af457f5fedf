package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
)

var columns = []string{"fault", "policy", "algorithm", "admitted", "bound", "p50", "p99.9", "max", "back after", "calls", ""}

// row is a result as the table shows it.
func (r result) row() []string {
	ok := "ok"
	if !r.OK {
		ok = "BROKEN"
	}
	return []string{
		r.Fault, r.Policy, r.Algorithm, fmt.Sprint(r.Admitted), fmt.Sprint(r.Bound),
		micros(r.P50), micros(r.P999), micros(r.Max),
		(time.Duration(r.Recovery) * time.Millisecond).String(), fmt.Sprint(r.ShardCalls), ok,
	}
}

// micros shows a time to two or three figures.
func micros(us int64) string {
	switch {
	case us < 1000:
		return fmt.Sprintf("%d µs", us)
	case us < 10_000:
		return fmt.Sprintf("%.1f ms", float64(us)/1000)
	default:
		return fmt.Sprintf("%d ms", (us+500)/1000)
	}
}

// printTable prints the one table, and below it what was wrong.
func printTable(w io.Writer, cells []outcome) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, strings.Join(columns, "\t"))
	for _, o := range cells {
		fmt.Fprintln(t, strings.Join(o.row(), "\t"))
	}
	_ = t.Flush() // of what w is, its user hears
	for _, o := range cells {
		for _, p := range o.Problems {
			fmt.Fprintf(w, "\nBROKEN %s: %s", o.id(), p)
		}
	}
	for _, o := range cells {
		if o.Note != "" {
			fmt.Fprintf(w, "\n%s: %s", o.id(), o.Note)
		}
	}
	fmt.Fprintln(w)
}

// markdownTable is the table of docs/faults.md.
func markdownTable(all []result) string {
	var b strings.Builder
	line := func(cells []string) { fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | ")) }
	line(columns)
	b.WriteString("|" + strings.Repeat("---|", 3) + strings.Repeat("---:|", 7) + "---|\n")
	for _, r := range all {
		line(r.row())
	}
	return b.String()
}
