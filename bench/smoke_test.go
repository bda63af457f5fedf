package main

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

const (
	smokeCallers   = 8
	smokeDecisions = 200 // at least, under each workload
)

// TestEverySystemGrantsWhatItsLimitSays runs the harness for an instant: every system under
// every workload, on real servers. Nothing here says how fast anybody is. That a cell has
// enough decisions may take several tries on a busy machine.
func TestEverySystemGrantsWhatItsLimitSays(t *testing.T) {
	redistest.NoLeaks(t)
	b := &bench{log: io.Discard, options: options{
		closed: timing{warm: 10 * time.Millisecond, measured: 40 * time.Millisecond},
		open:   timing{warm: 10 * time.Millisecond, measured: 40 * time.Millisecond},
	}}
	t.Cleanup(b.stop)
	seen := map[string]bool{}
	for _, w := range workloads {
		if err := b.start(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		at := place{cluster: w.cluster}
		for _, s := range b.servers {
			t.Logf("real redis-server %s", s.Addr())
			at.addrs = append(at.addrs, s.Addr())
		}
		if !w.cluster {
			script, err := capture(t.Context(), at.addrs[0], w.limit)
			if err != nil {
				t.Fatal(err)
			}
			at.script = script
		}
		c := b.calls(w)
		for _, s := range w.of() {
			seen[s.name] = true
			t.Run(w.id+"/"+s.name, func(t *testing.T) { smoke(t, b, w, c, at, s) })
		}
	}
	for _, s := range systems {
		if !seen[s.name] && (s.name != leased || len(leaseOptions()) > 0) {
			t.Errorf("%s runs under no workload", s.name)
		}
	}
}

func smoke(t *testing.T, b *bench, w workload, c *calls, at place, s system) {
	var decided int64
	for try := 0; decided < smokeDecisions; try++ {
		if try == 100 {
			t.Fatalf("%d decisions after %d cells", decided, try)
		}
		one, err := b.cell(t.Context(), w, c, at, s, smokeCallers)
		if err != nil {
			t.Fatal(err)
		}
		// throttled gives up on a key that others change all the time.
		if one.failed > 0 && s.name != "throttled" {
			t.Errorf("%d errors, the last one: %v", one.failed, one.lastErr)
		}
		switch {
		case w.allowed && one.granted != one.expected:
			t.Errorf("granted %d of %d", one.granted, one.expected)
		case s.shape == bucket && one.granted > one.expected:
			t.Errorf("granted %d, more than the %d that the limit admits", one.granted, one.expected)
		}
		decided += one.calls - one.away - one.failed
	}
}

// TestACellThatGrantsWronglyIsNoticed: a limiter that allows everything.
func TestACellThatGrantsWronglyIsNoticed(t *testing.T) {
	redistest.NoLeaks(t)
	b := &bench{log: io.Discard, options: options{closed: timing{measured: 20 * time.Millisecond}}}
	t.Cleanup(b.stop)
	w, err := workloadNamed("denied")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.start(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	t.Logf("real redis-server %s", b.servers[0].Addr())
	noop, err := systemNamed("noop")
	if err != nil {
		t.Fatal(err)
	}
	one, err := b.cell(t.Context(), w, b.calls(w), place{addrs: []string{b.servers[0].Addr()}}, noop, 1)
	if err != nil {
		t.Fatal(err)
	}
	if one.right || !strings.Contains(one.remarks(), "WRONG") {
		t.Errorf("granted %d of %d and nobody objects", one.granted, one.expected)
	}
}

// TestARunHasARowForEachCell runs a part of everything as the command does.
func TestARunHasARowForEachCell(t *testing.T) {
	redistest.NoLeaks(t)
	var out, log strings.Builder
	args := strings.Fields("-rounds 1 -warm 10ms -cell 20ms -repeats 1 -workloads distinct,limit -systems ringfence,raw-pipelined -callers 1,512")
	if err := command(t.Context(), args, &out, &log); err != nil {
		t.Fatal(err)
	}
	t.Log(log.String())
	for _, want := range []string{"\n1 caller:\n", "\n512 callers:\n", "\n| raw-pipelined | ", "ringfence at 512 callers makes "} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the document lacks %q", want)
		}
	}
	if strings.Contains(out.String(), "\n64 callers:") || strings.Contains(out.String(), "\n| throttled | 1") {
		t.Error("more was run than was asked for")
	}
}

func TestARunEndsWhenItIsCanceled(t *testing.T) {
	redistest.NoLeaks(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := command(ctx, []string{"-workloads", "hot"}, io.Discard, io.Discard); err == nil {
		t.Error("a canceled run ends without an error")
	}
}
