package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

// events collects what the rings log, so that it does not end up in the middle of the
// table. What several apps say of one shard becomes one line.
type events struct {
	mu      sync.Mutex // guards the following
	pending []event    // not shown yet
}

type event struct {
	first time.Time
	apps  []string
	text  string
}

// maxPending bounds what is kept; the rings log little (one line a kind and shard in 10
// s), so it is never reached.
const maxPending = 100

// add notes what an app says.
func (e *events) add(at time.Time, app, text string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.pending {
		if p := &e.pending[i]; p.text == text {
			if !slices.Contains(p.apps, app) {
				p.apps = append(p.apps, app)
			}
			return
		}
	}
	if len(e.pending) < maxPending {
		e.pending = append(e.pending, event{first: at, apps: []string{app}, text: text})
	}
}

// settled takes out the events that are older than this: by then all apps have said it.
func (e *events) settled(before time.Time) []event {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out, rest []event
	for _, p := range e.pending {
		if p.first.Before(before) {
			slices.Sort(p.apps)
			out = append(out, p)
		} else {
			rest = append(rest, p)
		}
	}
	e.pending = rest
	return out
}

// waiting says whether there are any that are not settled.
func (e *events) waiting() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.pending) > 0
}

// handler returns the slog.Handler of one app.
func (e *events) handler(app string) slog.Handler { return &handler{events: e, app: app} }

type handler struct {
	events *events
	app    string
	attrs  []slog.Attr
}

// Enabled implements slog.Handler.
func (h *handler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

// Handle implements slog.Handler.
func (h *handler) Handle(_ context.Context, r slog.Record) error {
	shard, mode, reason := "", "", ""
	look := func(a slog.Attr) bool {
		switch a.Key {
		case "shard":
			shard = a.Value.String() + ": "
		case "mode":
			mode = a.Value.String()
		case "reason", "error":
			reason = a.Value.String()
		}
		return true
	}
	for _, a := range h.attrs {
		look(a)
	}
	r.Attrs(look)
	text := shard + strings.TrimPrefix(r.Message, "ringfence: ")
	switch {
	case mode != "":
		text += fmt.Sprintf(" (%s)", mode) // the reason differs from app to app
	case reason != "":
		text += fmt.Sprintf(" (%s)", reason)
	}
	h.events.add(r.Time, h.app, text)
	return nil
}

// WithAttrs implements slog.Handler.
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.attrs = append(slices.Clone(h.attrs), attrs...)
	return &c
}

// WithGroup implements slog.Handler; ringfence uses no groups.
func (h *handler) WithGroup(string) slog.Handler { return h }
