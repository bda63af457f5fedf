package main

import (
	"fmt"
	"io"
	"os"
	"strings"
)

// screen writes the story, line by line, and under it, on a terminal, the live table,
// which it draws anew in place. One goroutine uses it.
type screen struct {
	w     io.Writer
	live  bool     // w is a terminal
	frame []string // what stands under the story now
}

const (
	hideCursor = "\x1b[?25l"
	showCursor = "\x1b[?25h"
	// Without wrapping a narrow terminal cuts the table instead of scattering it.
	noWrap  = "\x1b[?7l"
	yesWrap = "\x1b[?7h"
	// upLines moves to the line this many above, clearDown clears from there.
	upLines   = "\x1b[%dA"
	clearDown = "\x1b[J"
)

// isTerminal says whether w is a terminal that can redraw.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// say adds lines to the story.
func (s *screen) say(lines ...string) {
	s.put(lines, s.frame)
}

// draw replaces the table; without a terminal it does nothing.
func (s *screen) draw(frame []string) {
	if s.live {
		s.put(nil, frame)
	}
}

// clear takes the table away and gives the terminal back as it was.
func (s *screen) clear() {
	s.draw(nil)
}

// put writes everything in one piece, so that nothing flickers.
func (s *screen) put(story, frame []string) {
	var b strings.Builder
	if len(s.frame) > 0 {
		fmt.Fprintf(&b, "\r"+upLines+clearDown, len(s.frame))
	}
	for _, l := range story {
		b.WriteString(l + "\n")
	}
	if len(frame) > 0 {
		b.WriteString(hideCursor + noWrap)
		for _, l := range frame {
			b.WriteString(l + "\n")
		}
	}
	if len(s.frame) > 0 || len(frame) > 0 {
		b.WriteString(yesWrap)
	}
	if len(s.frame) > 0 && len(frame) == 0 {
		b.WriteString(showCursor)
	}
	s.frame = frame
	// A terminal that is gone is no reason to stop: the exit code still counts.
	_, _ = io.WriteString(s.w, b.String())
}
