package main

import (
	"fmt"
	"time"
)

// This file holds the promises, as formulas. It is pure; docs/faults.md says the same in
// words.

// The policies of the matrix. The first three are failure policies; "share" is a shard with
// a replica, behind which the policy is closed.
const (
	policyOpen   = "open"
	policyClosed = "closed"
	policyLocal  = "local"
	policyShare  = "share"
)

// loss is what a fault makes the servers forget.
type loss int

const (
	// losesNothing: the server that answers afterwards knows of every charge.
	losesNothing loss = iota
	// losesAll: a server without a replica came back empty.
	losesAll
	// losesLag: a replica was promoted that had not heard of the last moment.
	losesLag
	// losesSince: until the Sentinels had told everyone, charges went to a primary that had
	// been replaced.
	losesSince
)

// replicationLag is the longest that a replica on this machine may lag behind.
const replicationLag = 100 * time.Millisecond

// situation is what bounds the admissions of a cell.
type situation struct {
	keys, limit, processes int

	policy   string
	replicas bool // the processes may ask a replica
	away     bool // the primary did not answer, or may not have, for some of the calls

	before int // units charged before the load under which the fault began
	begun  int // calls of that load which had begun when the servers forgot
	during int // calls offered from then until the load ended
	rate   int // calls a second meanwhile
	loses  loss
	since  time.Duration // losesSince: how long

	// untold: processes went on calling while others had not told the shard yet what they
	// had admitted out of their shares.
	untold bool
	// outages is how often shares were dealt out.
	outages int
	// debits are units that processes told the shard without knowing whether it heard, and
	// counted as lost.
	debits int
	// lag is how far a replica may be behind.
	lag time.Duration
	// strays are calls after the fault that the machine was too busy to answer in time, and
	// the policy answered instead.
	strays int
}

// mostAdmitted is the most that may be admitted in all.
func mostAdmitted(s situation) int {
	limit := s.keys * s.limit
	most := limit + mostLost(s) + s.debits
	if s.away && s.replicas {
		// What is left is dealt out in whole units, rounded up or down by a draw in each
		// process.
		most += s.keys * (s.processes - 1) * max(1, s.outages)
		if s.untold {
			most += (limit - s.before) * (s.processes - 1) / s.processes
		}
	}
	switch {
	case s.policy == policyOpen && s.away:
		most += s.during + s.strays
	case s.policy == policyLocal && s.away:
		most += limit // limit / processes in each, from fresh counts
	case s.policy == policyOpen:
		most += s.strays
	case s.policy == policyLocal:
		most += min(s.strays, limit)
	}
	return most
}

// mostLost is the most units that a fault may make the servers forget. They can be admitted
// once more.
func mostLost(s situation) int {
	limit := s.keys * s.limit
	switch s.loses {
	case losesAll:
		return min(limit, s.before+s.begun)
	case losesLag:
		return min(limit, ceil(s.rate, s.lag))
	case losesSince:
		// Not more than was left when the two went different ways: once at the old primary,
		// and once more out of shares of what a replica that hears nothing says is left.
		lost := min(limit-s.before, ceil(s.rate, s.since))
		if s.replicas {
			lost *= 2
		}
		return lost
	default:
		return 0
	}
}

func ceil(rate int, d time.Duration) int {
	return int((time.Duration(rate)*d + time.Second - 1) / time.Second)
}

// The breaker's defaults, which the processes run with.
const (
	breakerFailures = 3
	openPeriod      = 100 * time.Millisecond
	maxOpenPeriod   = 5 * time.Second
	inFlight        = 4
	maxBatch        = 64
)

// mostProbes is the most probes that fit into an outage: every open period is at least three
// quarters of its length.
func mostProbes(outage time.Duration) int {
	n := 0
	for at, period := time.Duration(0), openPeriod; ; period = min(2*period, maxOpenPeriod) {
		at += period * 3 / 4
		if at > outage {
			return n
		}
		n++
	}
}

// longestOpen is the longest open period that a breaker can be in at the end of an outage.
func longestOpen(outage time.Duration) time.Duration {
	period := openPeriod
	for range mostProbes(outage) {
		period = min(2*period, maxOpenPeriod)
	}
	return period
}

// callsKind says what a process may send to a shard in an outage.
type callsKind int

const (
	callsFree callsKind = iota // the shard is there
	callsDead                  // it answers nothing, probes included
	callsSick                  // it answers probes and refuses charges
)

// mostCalls is the most operations and probes that one process may send in an outage: the
// failures that open the breaker, one more because the first operation that outlasts the
// budget is forgiven, what was in flight besides, and the probes. A shard that answers probes
// gets as much again after each.
func mostCalls(k callsKind, outage time.Duration) int {
	switch k {
	case callsDead:
		return breakerFailures + 1 + inFlight + mostProbes(outage)
	case callsSick:
		return (breakerFailures + 1 + inFlight + 1) * (mostProbes(outage) + 1)
	default:
		return int(^uint(0) >> 1)
	}
}

// mostCarried is how many calls one operation carries at most. Each of its entries stands for
// up to 16 calls of one key, and of each caller there is one call at a time.
const mostCarried = min(16*maxBatch, workers)

// mostInVain is how many charging operations one process may send in an outage that are
// executed, perhaps, and of which their callers do not hear; bounded is false if that depends
// on the callers alone. Of a dead shard: all failures but the one that opens the breaker, and
// what is in flight at that moment, the one that opens it included. A shard that answers
// probes gets as much again after each, and one operation more, which ends well, though too
// late, and so counts neither as a failure nor as in time.
func mostInVain(k callsKind, outage time.Duration) (n int, bounded bool) {
	switch k {
	case callsDead:
		return breakerFailures - 1 + inFlight, true
	case callsSick:
		return (breakerFailures + inFlight) * (mostProbes(outage) + 1), true
	default:
		return 0, false
	}
}

// afterTakeover is how long it may take from the moment that a server has taken over, some
// time after the fault, until the primary decides: an open period that had just begun, a
// probe that had just been sent in vain, and a second for connections. On a machine that is
// known to be busy one probe after that may time out as well, at the very moment when all
// processes come back; then it is what is promised whatever happens, twice the longest open
// period.
func afterTakeover(at time.Duration, busy bool) time.Duration {
	most := longestOpen(at) + operationTimeout + 1100*time.Millisecond
	if busy {
		most = max(most, 2*maxOpenPeriod)
	}
	return most
}

// mostRecovery is how long it may take until the primary decides again: the servers' own
// part, and then the processes'.
func mostRecovery(comeback, outage time.Duration) time.Duration {
	return comeback + afterTakeover(outage+comeback, false)
}

// The times of the processes under test.
const (
	budget           = 50 * time.Millisecond
	operationTimeout = 250 * time.Millisecond
	patience         = 5 * time.Second
)

// slack is what scheduling may add to a budget: three times how late this machine was with
// its own timers meanwhile, since a call is two goroutines and a timer, and 10 ms. Never so
// much that a caller who waits for the operation instead of its budget would pass, unless
// the machine is known to be busy with other things.
func slack(late time.Duration, busy bool) time.Duration {
	most := 10*time.Millisecond + 3*late
	if busy {
		return most
	}
	return min(most, operationTimeout-budget-10*time.Millisecond)
}

// tooLate is how late a machine's own timers may be until the times of a cell say nothing
// about the library: slack ends there. A fault that broke a bound meanwhile is played again,
// at most mostPlays times in all; what comes of the last is what counts.
const (
	tooLate   = 60 * time.Millisecond
	mostPlays = 4
)

// conservation compares what a shard was charged with what callers were told.
type conservation struct {
	charged int // units the shard holds in the end
	acked   int // units that callers were told the primary admitted
	settled int // units told afterwards, out of shares
	unsure  int // calls that were answered otherwise after the request may have left
	debits  int // units told to the shard of which nobody knows whether it heard
	strays  int // calls that were answered otherwise when the shard was back

	processes int
	outages   int
	outage    time.Duration // the length of each
	calls     callsKind
}

// most is the most charges that nobody was told of: one for each call that was given up, and
// as many as the operations carry that are sent in vain.
func (c conservation) most() int {
	most := c.unsure
	if n, bounded := mostInVain(c.calls, c.outage); bounded {
		most = min(most, c.processes*max(1, c.outages)*n*mostCarried+c.strays)
	}
	return most + c.debits
}

// check names what does not add up: charges that got lost, and phantom charges.
func (c conservation) check() error {
	if c.charged < c.acked {
		return fmt.Errorf("%d charges were acknowledged and the shard holds %d", c.acked, c.charged)
	}
	if phantoms := c.charged - c.acked - c.settled; phantoms > c.most() {
		return fmt.Errorf("%d charges that nobody was told of, want at most %d", phantoms, c.most())
	}
	return nil
}
