package ringfence

import (
	"log/slog"
	"sync"
	"time"
)

// logEvery is how often one kind of line about one shard may appear.
const logEvery = 10 * time.Second

// events writes log lines, at most one per kind and shard every logEvery: when a shard
// is on fire the log must not be too.
type events struct {
	log *slog.Logger
	now func() time.Time

	mu   sync.Mutex
	last map[[2]string]*eventCount // by shard and kind, both from closed sets
}

type eventCount struct {
	at         time.Time
	suppressed int
}

func newEvents(log *slog.Logger, now func() time.Time) *events {
	if log == nil {
		log = slog.Default()
	}
	return &events{log: log, now: now, last: map[[2]string]*eventCount{}}
}

// due says whether a line may be written and how many were not since the last.
func (e *events) due(shard, kind string) (bool, int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.now()
	c := e.last[[2]string{shard, kind}]
	if c == nil {
		e.last[[2]string{shard, kind}] = &eventCount{at: now}
		return true, 0
	}
	if now.Sub(c.at) < logEvery {
		c.suppressed++
		return false, 0
	}
	n := c.suppressed
	c.at, c.suppressed = now, 0
	return true, n
}

func (e *events) warn(shard, kind, msg string, args ...any) {
	if ok, n := e.due(shard, kind); ok {
		e.log.Warn("ringfence: "+msg, withSuppressed(args, n)...)
	}
}

func (e *events) info(shard, kind, msg string, args ...any) {
	if ok, n := e.due(shard, kind); ok {
		e.log.Info("ringfence: "+msg, withSuppressed(args, n)...)
	}
}

func withSuppressed(args []any, n int) []any {
	if n > 0 {
		args = append(args, "suppressed", n)
	}
	return args
}
