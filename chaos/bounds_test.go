package main

import (
	"strings"
	"testing"
	"time"
)

func TestMostAdmitted(t *testing.T) {
	base := situation{keys: 8, limit: 100, processes: 2, before: 320, begun: 30, during: 930, rate: 300, outages: 1, lag: 100 * time.Millisecond}
	tests := []struct {
		name   string
		change func(s *situation)
		want   int
	}{
		{"nothing away", func(s *situation) { s.policy = policyOpen }, 800},
		{"nothing away, a machine too busy for five calls", func(s *situation) { s.policy, s.strays = policyOpen, 5 }, 805},
		{"closed", func(s *situation) { s.policy, s.away = policyClosed, true }, 800},
		{"closed, all lost", func(s *situation) { s.policy, s.away, s.loses = policyClosed, true, losesAll }, 1150},
		{"closed, more lost than there can be", func(s *situation) { s.policy, s.away, s.loses, s.begun = policyClosed, true, losesAll, 900 }, 1600},
		{"open", func(s *situation) { s.policy, s.away = policyOpen, true }, 1730},
		{"local", func(s *situation) { s.policy, s.away = policyLocal, true }, 1600},
		{"share", func(s *situation) { s.policy, s.away, s.replicas = policyShare, true, true }, 808},
		{"share, a replica promoted", func(s *situation) { s.policy, s.away, s.replicas, s.loses = policyShare, true, true, losesLag }, 838},
		{"share, ten outages, some told late", func(s *situation) {
			s.policy, s.away, s.replicas, s.outages, s.untold = policyShare, true, true, 10, true
		}, 800 + 80 + 240},
		{"share, five units of debits lost", func(s *situation) { s.policy, s.away, s.replicas, s.debits = policyShare, true, true, 5 }, 813},
		{"closed, on a set with replicas", func(s *situation) { s.policy, s.away, s.replicas = policyClosed, true, true }, 808},
		{"two masters for two seconds, no replicas", func(s *situation) { s.policy, s.away, s.loses, s.since = policyClosed, true, losesSince, time.Second }, 1100},
		{"two masters, more calls than were left", func(s *situation) { s.policy, s.away, s.loses, s.since = policyClosed, true, losesSince, 2*time.Second }, 1280},
		{"two masters and shares", func(s *situation) {
			s.policy, s.away, s.replicas, s.loses, s.since = policyClosed, true, true, losesSince, 2*time.Second
		}, 1768},
	}
	for _, c := range tests {
		s := base
		c.change(&s)
		if got := mostAdmitted(s); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

func TestMostCallsOfADeadShardAreFew(t *testing.T) {
	// Open periods are at least 75, 150, 300, 600, 1200, 2400 and then 3750 ms.
	tests := []struct {
		outage time.Duration
		probes int
		open   time.Duration
	}{
		{0, 0, 100 * time.Millisecond},
		{74 * time.Millisecond, 0, 100 * time.Millisecond},
		{75 * time.Millisecond, 1, 200 * time.Millisecond},
		{3 * time.Second, 5, 3200 * time.Millisecond},
		{time.Minute, 20, 5 * time.Second},
	}
	for _, c := range tests {
		if got := mostProbes(c.outage); got != c.probes {
			t.Errorf("%s: %d probes, want %d", c.outage, got, c.probes)
		}
		if got := longestOpen(c.outage); got != c.open {
			t.Errorf("%s: open for %s, want %s", c.outage, got, c.open)
		}
	}
	// At most 25 a minute, besides those that were in flight when it died.
	if got := mostCalls(callsDead, time.Minute) - inFlight; got > 25 {
		t.Errorf("%d calls a minute, want at most 25", got)
	}
	if got, want := mostCalls(callsSick, 3*time.Second), 9*6; got != want {
		t.Errorf("%d calls to a shard that refuses charges, want %d", got, want)
	}
}

func TestSlackNeverHidesACallerThatWaitsForTheOperation(t *testing.T) {
	for late, want := range map[time.Duration]time.Duration{
		0: 10 * time.Millisecond, 20 * time.Millisecond: 70 * time.Millisecond, time.Hour: 190 * time.Millisecond,
	} {
		if got := slack(late, false); got != want {
			t.Errorf("timers %s late: %s, want %s", late, got, want)
		}
		if got := slack(late, true); got != 10*time.Millisecond+3*late {
			t.Errorf("timers of a busy machine %s late: %s", late, got)
		}
		if budget+slack(late, false) >= operationTimeout {
			t.Errorf("timers %s late: a caller that waits %s would pass", late, operationTimeout)
		}
	}
}

func TestMostRecovery(t *testing.T) {
	for outage, want := range map[time.Duration]time.Duration{
		0:               1450 * time.Millisecond,
		3 * time.Second: 4550 * time.Millisecond,
		time.Minute:     6350 * time.Millisecond,
	} {
		if got := mostRecovery(0, outage); got != want {
			t.Errorf("%s: %s, want %s", outage, got, want)
		}
	}
	if got, want := mostRecovery(2*time.Second, 3*time.Second), 2*time.Second+5*time.Second+1350*time.Millisecond; got != want {
		t.Errorf("with the servers' own time: %s, want %s", got, want)
	}
}

func TestConservationFindsLostAndPhantomCharges(t *testing.T) {
	base := conservation{charged: 100, acked: 90, settled: 5, unsure: 5, processes: 2, outages: 1, outage: 3 * time.Second, calls: callsDead}
	many := func(charged int, change func(c *conservation)) func(c *conservation) {
		return func(c *conservation) {
			c.charged, c.unsure = charged, 1000
			change(c)
		}
	}
	tests := []struct {
		name   string
		change func(c *conservation)
		want   string
	}{
		{"adds up", func(*conservation) {}, ""},
		{"an acknowledged charge is lost", func(c *conservation) { c.charged = 89 }, "90 charges were acknowledged and the shard holds 89"},
		{"a call was charged twice", func(c *conservation) { c.charged = 101 }, "6 charges that nobody was told of, want at most 5"},
		{"a debit got lost on the way back", func(c *conservation) { c.charged, c.debits = 101, 1 }, ""},
		// 2 processes, 6 operations of 12 calls.
		{"as many phantoms as a dead shard can have", many(95+144, func(*conservation) {}), ""},
		{"one more", many(95+145, func(*conservation) {}), "145 charges that nobody was told of, want at most 144"},
		{"one more, of a call that was not answered in time later", many(95+145, func(c *conservation) { c.strays = 1 }), ""},
		{"ten outages", many(95+1441, func(c *conservation) { c.outages, c.unsure = 10, 2000 }), "1441 charges that nobody was told of, want at most 1440"},
		{"a shard that answers probes", many(95+1009, func(c *conservation) { c.calls, c.unsure = callsSick, 2000 }), "1009 charges that nobody was told of, want at most 1008"},
		{"a shard that is there now and then", many(95+1001, func(c *conservation) { c.calls = callsFree }), "1001 charges that nobody was told of, want at most 1000"},
	}
	for _, c := range tests {
		v := base
		c.change(&v)
		err := v.check()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}
