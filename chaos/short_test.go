package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// The short form of the matrix: faults of every kind, for all policies and algorithms. What
// it leaves out, and everything at full length, is make chaos.
func TestShortFormOfTheMatrix(t *testing.T) {
	redis.SetLogger(silence{})
	for _, name := range []string{"none", "kill", "stop", "reply-cut", "oom", "flushall", "clock+1h", "cluster-master-lost"} {
		t.Run(name, func(t *testing.T) {
			f, err := byName(name)
			if err != nil {
				t.Fatal(err)
			}
			servers := redistest.Count()
			out := (&runner{short}).run(t.Context(), f)
			t.Logf("real redis-server (%d of them)", redistest.Count()-servers)
			if got, want := len(out), len(f.cells()); got != want {
				t.Errorf("%d cells, want %d", got, want)
			}
			for _, o := range out {
				t.Log(strings.Join(o.row(), "  "))
				for _, p := range o.Problems {
					t.Errorf("%s: %s", o.id(), p)
				}
			}
		})
	}
}

// limitOfMore is one unit more than the matrix reckons with.
func limitOfMore(algorithm string) ringfence.Limit {
	if algorithm == slidingLog {
		return ringfence.SlidingLog{Limit: perKey + 1, Window: time.Hour}
	}
	return ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: perKey + 1}
}

// A limit that is larger than the bounds were computed for must be found out, by what was
// admitted; that shows that a cell can fail.
func TestACellThatAdmitsTooMuchIsFound(t *testing.T) {
	f, err := byName("none")
	if err != nil {
		t.Fatal(err)
	}
	s := &scene{hold: short.hold, down: func(bool) {}}
	defer s.stop()
	if err := f.start(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	t.Logf("real redis-server (%d started so far)", redistest.Count())
	s.seat(f)
	for _, c := range s.cells {
		c.limit = limitOfMore(c.algorithm)
	}
	p := &performance{fault: f, scene: s, plan: short}
	if err := p.perform(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, o := range p.judge() {
		if o.OK || o.Admitted <= o.Bound || !slices.ContainsFunc(o.Problems, func(p string) bool { return strings.Contains(p, "want exactly 100") }) {
			t.Errorf("%s passed: %+v", o.id(), o)
		}
	}
}
