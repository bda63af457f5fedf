package main

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/ringfence/ringfence"
)

// someUsers are n users who did the same.
func someUsers(n, quota, asked, admitted int) []userResult {
	var out []userResult
	for range n {
		out = append(out, userResult{name: "user-7", quota: quota, count: count{asked, admitted}})
	}
	return out
}

// asPlanned is what a good performance gives.
func asPlanned() result {
	return result{
		limit: 100, budget: time.Second, apps: 4, victim: "shard-2",
		toOpen: 41 * time.Millisecond, toClose: 600 * time.Millisecond,
		outage: answersOf(0, 0, 5, 0, 2),
		groups: []group{
			{phase: phaseHealthy, title: "healthy", shards: "all shards", exact: true, users: someUsers(12, 100, 300, 100), tally: answersOf(3600, 0, 0, 0, 1200)},
			{phase: phaseKilled, title: "shard-2 is killed", shards: "shard-1, shard-3", exact: true, users: someUsers(8, 100, 300, 100), tally: answersOf(2400, 0, 0, 0, 800)},
			{phase: phaseKilled, title: "shard-2 is killed", shards: "shard-2", users: someUsers(4, 100, 300, 140), tally: answersOf(160, 0, 1040, 0, 560)},
			{phase: phaseBack, title: "shard-2 comes back", shards: "shard-1, shard-3", exact: true, users: someUsers(8, 0, 150, 0), tally: answersOf(1200, 0, 0, 0, 0)},
			{phase: phaseBack, title: "shard-2 comes back", shards: "shard-2", users: someUsers(4, 0, 150, 100), tally: answersOf(400, 0, 200, 0, 400)},
			{phase: phaseAgain, title: "healthy again", shards: "all shards", exact: true, users: someUsers(12, 100, 300, 100), tally: answersOf(3600, 0, 0, 0, 1200)},
		},
	}
}

func TestTheVerdict(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(r *result)
		fails string // what the one failure says; empty: none
	}{
		{"all as planned", func(*result) {}, ""},
		{"one answer of a healthy phase was local", func(r *result) {
			r.groups[0].source[ringfence.SourcePrimary]--
			r.groups[0].source[ringfence.SourceLocal]++
		}, "phase 1, all shards: 1 answers did not come from a primary"},
		{"one answer of a healthy phase was the replica's", func(r *result) {
			r.groups[5].source[ringfence.SourcePrimary]--
			r.groups[5].source[ringfence.SourceReplica]++
		}, "phase 4, all shards: 1 answers did not come from a primary"},
		{"one answer of a living shard was the policy's", func(r *result) {
			r.groups[1].source[ringfence.SourcePrimary]--
			r.groups[1].source[ringfence.SourcePolicy]++
		}, "phase 2, shard-1, shard-3: 1 answers did not come from a primary"},
		{"one user too many was admitted", func(r *result) { r.groups[0].users[3].admitted++ },
			"phase 1, all shards: 1 users were not limited exactly; user-7 called 300 times, had 100 left and was admitted 101 times"},
		{"one too few", func(r *result) { r.groups[5].users[0].admitted-- },
			"phase 4, all shards: 1 users were not limited exactly"},
		{"one too many and one too few, so that the sum is right", func(r *result) {
			r.groups[0].users[0].admitted++
			r.groups[0].users[1].admitted--
		}, "phase 1, all shards: 2 users were not limited exactly"},
		{"a user of a living shard was admitted beyond the limit later", func(r *result) { r.groups[3].users[0].admitted = 1 },
			"phase 3, shard-1, shard-3: 1 users were not limited exactly"},
		{"a slow machine did not ask for the whole limit", func(r *result) {
			for i := range r.groups[0].users {
				r.groups[0].users[i].count = count{asked: 60, admitted: 60}
			}
		}, ""},
		{"a slow machine, and one call was denied", func(r *result) {
			r.groups[0].users[0].count = count{asked: 60, admitted: 59}
		}, "phase 1, all shards: 1 users were not limited exactly"},
		{"nobody called", func(r *result) { r.groups[0].users, r.groups[0].tally = nil, tally{} }, "phase 1, all shards: nobody called"},
		{"a phase is missing", func(r *result) { r.groups = r.groups[:5] }, "phase 4 was not played"},
		{"an error", func(r *result) {
			r.groups[2].errors++
			r.groups[2].took = append(r.groups[2].took, time.Millisecond)
		}, "callers saw 1 errors"},
		{"the loss was not noticed", func(r *result) { r.groups[2].tally = answersOf(1200, 0, 0, 0, 400) }, "nobody noticed the loss of shard-2"},
		{"the dead shard's users got three limits", func(r *result) { r.groups[2].users[1].admitted = 201 }, "more than twice the limit"},
		{"callers waited for the dead shard", func(r *result) { r.outage.took = []time.Duration{2*r.budget + 1} }, "callers had to wait"},
		{"the breakers did not open", func(r *result) { r.toOpen = -1 }, "breakers of shard-2 did not open"},
		{"the apps did not return", func(r *result) { r.toClose = -1 }, "not every app had returned"},
	} {
		r := asPlanned()
		c.spoil(&r)
		var failures []string
		for _, f := range r.verdict() {
			if f.failed() {
				failures = append(failures, f.text)
			}
		}
		switch {
		case c.fails == "" && len(failures) > 0:
			t.Errorf("%s: %q", c.name, failures)
		case c.fails == "":
		case len(failures) != 1 || !strings.Contains(failures[0], c.fails):
			t.Errorf("%s: failures %q, want one that says %q", c.name, failures, c.fails)
		}
		want := exitOK
		if c.fails != "" {
			want = exitFailed
		}
		if got := r.exitCode(); got != want {
			t.Errorf("%s: exit code %d, want %d", c.name, got, want)
		}
	}
}

func TestTheSummaryLooksAsItDid(t *testing.T) {
	replicated := asPlanned()
	replicated.replicated = true
	replicated.groups[2].tally = answersOf(160, 1040, 0, 0, 398)
	replicated.groups[2].users = append(someUsers(3, 100, 300, 100), someUsers(1, 100, 300, 98)...)
	failed := asPlanned()
	failed.groups[0].users[3].admitted++
	for name, r := range map[string]result{
		"summary.txt": asPlanned(), "summary_replica.txt": replicated, "summary_failed.txt": failed,
	} {
		lines := r.lines(palette{}, 16100*time.Millisecond)
		for _, l := range lines {
			if n := utf8.RuneCountInString(l); n > width {
				t.Errorf("%s: %d columns: %q", name, n, l)
			}
		}
		golden(t, name, strings.Join(lines, "\n")+"\n")
	}
}
