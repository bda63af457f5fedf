package main

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/ringfence/ringfence"
)

// answersOf makes a tally: the answers of each source, and how many were allowed. The
// n-th answer took n/10 ms.
func answersOf(primary, replica, local, policy, allowed int) tally {
	t := tally{allowed: allowed, denied: primary + replica + local + policy - allowed}
	t.source[ringfence.SourcePrimary] = primary
	t.source[ringfence.SourceReplica] = replica
	t.source[ringfence.SourceLocal] = local
	t.source[ringfence.SourcePolicy] = policy
	for i := range t.allowed + t.denied {
		t.took = append(t.took, time.Duration(i+1)*100*time.Microsecond)
	}
	return t
}

func outageFrame() frame {
	f := frame{
		title: "phase 2 of 4: shard-2 is killed", elapsed: 7300 * time.Millisecond, done: 0.52,
		shards: []shardRow{
			{id: "shard-1", tally: answersOf(1128, 0, 0, 0, 400), closed: 4},
			{id: "shard-2", dead: true, tally: answersOf(160, 0, 967, 0, 560), open: 4},
			{id: "shard-3", tally: answersOf(1124, 0, 0, 0, 400), closed: 1, open: 3},
		},
		legend: []string{"what the columns mean"},
	}
	for i := range 4 {
		t := answersOf(603, 0, 242, 0, 340)
		f.apps = append(f.apps, appRow{fmt.Sprintf("app-%d", i+1), t})
		f.all.merge(t)
	}
	return f
}

func TestTheTableLooksAsItDid(t *testing.T) {
	first := frame{title: "phase 1 of 4: healthy", apps: []appRow{{name: "app-1"}}, shards: []shardRow{{id: "shard-1", closed: 4}}}
	unknown := frame{title: "phase 3 of 4: shard-2 comes back", done: -1}
	for name, text := range map[string][]string{
		"table_outage.txt":        outageFrame().lines(palette{}),
		"table_outage_colour.txt": outageFrame().lines(palette{on: true}),
		"table_first.txt":         first.lines(palette{}),
		"table_no_end.txt":        unknown.lines(palette{}),
		"line_outage.txt":         {outageFrame().plainLine()},
		"line_first.txt":          {first.plainLine()},
	} {
		golden(t, name, strings.Join(text, "\n")+"\n")
	}
}

func TestTheTableFitsATerminalOf80By24(t *testing.T) {
	f := outageFrame()
	big := answersOf(99999, 9999, 9999, 9999, 99999)
	for i := range f.apps {
		f.apps[i].tally = big
	}
	for i := range f.shards {
		f.shards[i].tally = big
	}
	lines := f.lines(palette{})
	if len(lines) > 20 {
		t.Errorf("%d lines", len(lines))
	}
	for _, l := range lines {
		if n := utf8.RuneCountInString(l); n > width {
			t.Errorf("%d columns: %q", n, l)
		}
	}
}

func TestColourChangesNoCharacter(t *testing.T) {
	plain, colour := outageFrame().lines(palette{}), outageFrame().lines(palette{on: true})
	if strings.Contains(strings.Join(plain, ""), "\x1b") {
		t.Error("escape sequences without colour")
	}
	for i := range plain {
		if got := newTerminal().feed(colour[i]).line(0); got != strings.TrimRight(plain[i], " ") {
			t.Errorf("line %d is %q, with colour %q", i, plain[i], got)
		}
	}
}

func TestDurationsAreShort(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0:                       "1 µs",
		4321 * time.Nanosecond:  "4 µs",
		94 * time.Microsecond:   "94 µs",
		95 * time.Microsecond:   "0.1 ms",
		9949 * time.Microsecond: "9.9 ms",
		9951 * time.Microsecond: "10 ms",
		999 * time.Millisecond:  "999 ms",
		1540 * time.Millisecond: "1.5 s",
	} {
		if got := short(d); got != want {
			t.Errorf("%d ns is %q, want %q", d, got, want)
		}
	}
}

func TestTheTableIsDrawnInPlaceUnderTheStory(t *testing.T) {
	term := newTerminal()
	s := &screen{w: term, live: true}
	s.say("one")
	s.draw([]string{"a1", "b1", "c1"})
	s.say("two", "three")
	s.draw([]string{"a2", "b2"})
	term.want(t, "one", "two", "three", "a2", "b2")
	if !term.hidden {
		t.Error("the cursor is in the table")
	}
	s.clear()
	s.say("four")
	term.want(t, "one", "two", "three", "four")
	if term.hidden || term.cut {
		t.Error("the terminal was not given back as it was")
	}
}

func TestWithoutATerminalOnlyTheStoryIsWritten(t *testing.T) {
	var b strings.Builder
	s := &screen{w: &b}
	s.say("one")
	s.draw([]string{"a1"})
	s.clear()
	s.say("two")
	if got := b.String(); got != "one\ntwo\n" {
		t.Errorf("%q", got)
	}
	if isTerminal(&b) {
		t.Error("a strings.Builder is no terminal")
	}
}

// terminal understands what screen writes, and nothing else.
type terminal struct {
	rows        [][]rune
	row, col    int
	hidden, cut bool
}

func newTerminal() *terminal { return &terminal{rows: [][]rune{nil}} }

func (t *terminal) Write(p []byte) (int, error) {
	t.feed(string(p))
	return len(p), nil
}

func (t *terminal) feed(s string) *terminal {
	for s != "" {
		if rest, ok := strings.CutPrefix(s, "\x1b["); ok {
			end := strings.IndexFunc(rest, func(r rune) bool { return r >= '@' && r != '[' })
			t.control(rest[:end], rest[end])
			s = rest[end+1:]
			continue
		}
		r, n := utf8.DecodeRuneInString(s)
		s = s[n:]
		switch r {
		case '\n':
			t.row, t.col = t.row+1, 0
			if t.row == len(t.rows) {
				t.rows = append(t.rows, nil)
			}
		case '\r':
			t.col = 0
		default:
			t.rows[t.row] = append(t.rows[t.row][:t.col], r)
			t.col++
		}
	}
	return t
}

func (t *terminal) control(arg string, letter byte) {
	switch string(letter) + arg {
	case "l?25":
		t.hidden = true
	case "h?25":
		t.hidden = false
	case "l?7":
		t.cut = true
	case "h?7":
		t.cut = false
	case "J":
		t.rows = t.rows[:t.row+1]
		t.rows[t.row] = t.rows[t.row][:t.col]
	default:
		if n, err := strconv.Atoi(arg); err == nil && letter == 'A' {
			t.row -= n
		} else if letter != 'm' {
			panic("unknown sequence " + arg + string(letter))
		}
	}
}

func (t *terminal) line(i int) string { return strings.TrimRight(string(t.rows[i]), " ") }

func (t *terminal) want(tb testing.TB, lines ...string) {
	tb.Helper()
	var got []string
	for i := range t.row {
		got = append(got, t.line(i))
	}
	if strings.Join(got, "\n") != strings.Join(lines, "\n") {
		tb.Errorf("the terminal shows %q, want %q", got, lines)
	}
}
