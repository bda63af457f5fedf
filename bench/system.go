package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// answer is what came of one call.
type answer uint8

const (
	denied answer = iota
	allowed
	// elsewhere: not the limit decided but a fallback of the client. Such answers are
	// counted apart: they are neither decisions nor grants.
	elsewhere
)

// place is where the servers are.
type place struct {
	addrs   []string // lone servers; nodes if cluster
	cluster bool
	script  *captured // what ringfence sends
}

// instance is one system, opened for one cell.
type instance struct {
	allow func(ctx context.Context, key string) (answer, error) // safe for concurrent use
	close func()
}

// system is one limiter under measurement.
type system struct {
	name   string // as in results.json
	about  string
	module string // whose version matters; "" for our own
	shape  shape
	rival  bool
	open   func(ctx context.Context, at place, l limit) (*instance, error)
}

// Names that the report treats in a way of their own.
const (
	own      = "ringfence"
	leased   = "ringfence-lease"
	raw      = "raw-pipelined"
	baseline = "redis_rate"
)

// systems are all there are, in the order in which they are shown.
var systems = []system{
	{name: own, about: "exact token bucket, the settings of a Config that names only its shards",
		open: openRingfence},
	{name: leased, about: "the same with leases: quota taken ahead in chunks and served in the process",
		open: openLeased},
	{name: baseline, about: "GCRA, one EVALSHA a call", module: "github.com/go-redis/redis_rate/v10", rival: true,
		open: openRedisRate},
	{name: "redis_rate-autopipe", about: "the same on `AutoPipeline()` of go-redis", module: "github.com/go-redis/redis_rate/v10", rival: true,
		open: openRedisRateAutoPipe},
	{name: "ulule", about: "fixed window, one EVALSHA a call", module: "github.com/ulule/limiter/v3", shape: window, rival: true,
		open: openUlule},
	{name: "throttled", about: "GCRA, reads and then compares and swaps, gives up after 10 tries", module: "github.com/throttled/throttled/v2", rival: true,
		open: openThrottled},
	{name: "rueidis-script", about: "ringfence's own script, one call of it a decision, through rueidis, which pipelines by itself", module: "github.com/redis/rueidis", rival: true,
		open: openRueidis},
	{name: "plain-evalsha", about: "the token bucket of tutorials on a HASH, one EVALSHA a call through go-redis", module: "github.com/redis/go-redis/v9", rival: true,
		open: openPlain},
	{name: raw, about: "ringfence's own script, 64 keys a call, straight onto sockets: the physical limit, no limiter",
		open: nil}, // has a loop of its own, raw.go
	{name: "noop", about: "answers at once without a server: what the measurement itself costs",
		open: openNoop},
}

// rivals are the names of the rivals.
var rivals = func() (names []string) {
	for _, s := range systems {
		if s.rival {
			names = append(names, s.name)
		}
	}
	return names
}()

// leftOut are systems that belong here and cannot be had: the module registry refuses
// them, or a module that they need.
var leftOut = []string{
	"github.com/redis/rueidis/rueidislimiter",
	"github.com/sethvargo/go-redisstore",
	"github.com/mennanov/limiters",
}

func systemNamed(name string) (system, error) {
	i := slices.IndexFunc(systems, func(s system) bool { return s.name == name })
	if i < 0 {
		var names []string
		for _, s := range systems {
			names = append(names, s.name)
		}
		return system{}, fmt.Errorf("no system %q; there are %s", name, strings.Join(names, ", "))
	}
	return systems[i], nil
}

// of returns the systems that run under w: those it names, or ringfence and the rivals;
// under "hot" the leases too.
func (w workload) of() (out []system) {
	names := w.systems
	if names == nil {
		names = append([]string{own}, rivals...)
		if w.id == "hot" {
			names = slices.Insert(names, 1, leased)
		}
	}
	for _, s := range systems {
		if slices.Contains(names, s.name) && (s.name != leased || len(leaseOptions()) > 0) {
			out = append(out, s)
		}
	}
	return out
}

func openNoop(context.Context, place, limit) (*instance, error) {
	return &instance{
		allow: func(context.Context, string) (answer, error) { return allowed, nil },
		close: func() {},
	}, nil
}
