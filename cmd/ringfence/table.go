package main

import (
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/ringfence/ringfence"
)

// width is the most columns that anything here takes.
const width = 79

// palette colours text, or does not.
type palette struct {
	on bool
}

func (p palette) paint(code, s string) string {
	if !p.on || strings.TrimSpace(s) == "" {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (p palette) bold(s string) string   { return p.paint("1", s) }
func (p palette) faint(s string) string  { return p.paint("2", s) }
func (p palette) red(s string) string    { return p.paint("31", s) }
func (p palette) green(s string) string  { return p.paint("32", s) }
func (p palette) yellow(s string) string { return p.paint("33", s) }

// frame is one picture of the live table.
type frame struct {
	title   string
	elapsed time.Duration // since the demo began
	done    float64       // part of the phase, 0 to 1; below 0: nobody knows
	apps    []appRow
	all     tally
	shards  []shardRow
	legend  []string
}

type appRow struct {
	name string
	tally
}

type shardRow struct {
	id   string
	dead bool
	tally
	closed, open int // circuit breakers, one an app
}

// lines draws the frame, each line at most width columns.
func (f frame) lines(p palette) []string {
	out := []string{f.head(p), ""}
	out = append(out,
		p.faint(fmt.Sprintf("%-15s%s", "", "answered by")),
		p.faint(columns("this phase", "primary", "replica", "local", "policy", "allowed", "denied")+
			fmt.Sprintf("%8s%8s", "p50", "p99")))
	for _, a := range f.apps {
		out = append(out, counts(p, a.name, a.tally)+times(a.tally))
	}
	out = append(out, p.bold(fmt.Sprintf("%-15s", "all apps"))+numbers(p, f.all)+times(f.all), "")
	for _, s := range f.shards {
		name := fmt.Sprintf("%-15s", s.id+" up")
		if s.dead {
			name = p.red(fmt.Sprintf("%-15s", s.id+" KILLED"))
		}
		out = append(out, name+numbers(p, s.tally)+"  "+breakers(p, s.closed, s.open))
	}
	out = append(out, "")
	for _, l := range f.legend {
		out = append(out, p.faint(l))
	}
	return out
}

func (f frame) head(p palette) string {
	bar := ""
	if f.done >= 0 {
		const cells = 20
		full := min(cells, int(f.done*cells))
		bar = "[" + strings.Repeat("#", full) + strings.Repeat(".", cells-full) + "]"
	}
	right := fmt.Sprintf("%s %6.1f s", bar, f.elapsed.Seconds())
	return p.bold(fmt.Sprintf("%-*s", width-len(right), f.title)) + right
}

func columns(name, primary, replica, local, policy, allowed, denied string) string {
	return fmt.Sprintf("%-15s%8s%8s%7s%7s%9s%8s", name, primary, replica, local, policy, allowed, denied)
}

func counts(p palette, name string, t tally) string {
	return fmt.Sprintf("%-15s", name) + numbers(p, t)
}

// numbers are the six columns of counts; answers that are not exact stand out.
func numbers(p palette, t tally) string {
	odd := func(w int, s ringfence.Source) string {
		text := fmt.Sprintf("%*d", w, t.source[s])
		if t.source[s] > 0 {
			return p.yellow(text)
		}
		return text
	}
	return fmt.Sprintf("%8d", t.source[ringfence.SourcePrimary]) +
		odd(8, ringfence.SourceReplica) + odd(7, ringfence.SourceLocal) + odd(7, ringfence.SourcePolicy) +
		fmt.Sprintf("%9d%8d", t.allowed, t.denied)
}

func times(t tally) string {
	if t.answers() == 0 {
		return fmt.Sprintf("%8s%8s", "-", "-")
	}
	return fmt.Sprintf("%8s%8s", short(t.percentile(0.5)), short(t.percentile(0.99)))
}

// breakers says how many of the apps' circuit breakers are in which state.
func breakers(p palette, closed, open int) string {
	switch {
	case open == 0:
		return p.green(fmt.Sprintf("%d closed", closed))
	case closed == 0:
		return p.red(fmt.Sprintf("%d open", open))
	default:
		return p.yellow(fmt.Sprintf("%d open %d closed", open, closed))
	}
}

// plainLine is the frame in one line, for output that is not a terminal.
func (f frame) plainLine() string {
	open := 0
	for _, s := range f.shards {
		open += s.open
	}
	circuit := "breakers closed"
	if open > 0 {
		circuit = fmt.Sprintf("%d breakers open", open)
	}
	return fmt.Sprintf("%6.1f s  %s; %d allowed; p99 %s; %s",
		f.elapsed.Seconds(), sources(f.all), f.all.allowed, short(f.all.percentile(0.99)), circuit)
}

// sources names who answered and how often, as in "160 primary, 40 local".
func sources(t tally) string {
	var parts []string
	for s := ringfence.SourcePrimary; s <= ringfence.SourcePolicy; s++ {
		if t.source[s] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", t.source[s], s))
		}
	}
	if t.errors > 0 {
		parts = append(parts, fmt.Sprintf("%d errors", t.errors))
	}
	if len(parts) == 0 {
		return "no answer yet"
	}
	return strings.Join(parts, ", ")
}

// short prints a duration in at most 7 columns.
func short(d time.Duration) string {
	switch ms := float64(d) / float64(time.Millisecond); {
	case ms < 0.095:
		return fmt.Sprintf("%d µs", max(1, d.Microseconds()))
	case ms < 9.95:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 999.5:
		return fmt.Sprintf("%.0f ms", ms)
	default:
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
}

// wrap breaks text into lines of at most width columns: the first begins with first, the
// others with as many blanks.
func wrap(first, text string) []string {
	var out []string
	line, empty := first, true
	for word := range strings.FieldsSeq(text) {
		if !empty && utf8.RuneCountInString(line+" "+word) > width {
			out = append(out, line)
			line, empty = strings.Repeat(" ", len(first)), true
		}
		if !empty {
			line += " "
		}
		line, empty = line+word, false
	}
	return append(out, line)
}
