package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// limit is a limit in the words that every system here can say: rate units every per, at
// most burst at once. The fixed windows admit burst every per.
type limit struct {
	rate, burst int64
	per         time.Duration
}

// workload is who calls and under which limit.
type workload struct {
	id, about string
	limit     limit
	keys      int     // different keys
	skew      float64 // exponent of the Zipf distribution; 0: uniform
	allowed   bool    // nobody may be denied
	open      bool    // calls arrive by the clock, not when the last one returns
	callers   []int
	systems   []string // in the order in which they are shown; nil: all of one server
	shards    int      // servers that share the keys; 0: one
	cluster   bool     // a Redis Cluster instead
}

const (
	manyKeys = 100_000
	// openRate is S1.12's million a minute.
	openRate = 16_700
	// openCallers is how many calls of the open loop can be under way at once, and of how
	// many Poisson processes its arrivals are made.
	openCallers = 1024
)

var (
	aThousandAMinute = limit{rate: 1000, per: time.Minute, burst: 1000}
	aMillionASecond  = limit{rate: 1_000_000, per: time.Second, burst: 1_000_000_000}
	tenASecond       = limit{rate: 10, per: time.Second, burst: 10}
	aHundredASecond  = limit{rate: 100, per: time.Second, burst: 100}
)

var closedCallers = []int{1, 64, 512}

// workloads are all there are, in the order in which they run and are shown.
var workloads = []workload{
	{id: "distinct", about: "100,000 keys, each as likely as the other, 1,000 a minute: everybody is allowed",
		limit: aThousandAMinute, keys: manyKeys, allowed: true, callers: closedCallers},
	{id: "hot", about: "one key, a million a second and a burst of a thousand millions: everybody is allowed",
		limit: aMillionASecond, keys: 1, allowed: true, callers: closedCallers},
	{id: "denied", about: "one key, 10 a second: nearly everybody is denied",
		limit: tenASecond, keys: 1, callers: closedCallers},
	{id: "zipf", about: "100,000 keys by Zipf's law with exponent 1.1, 100 a second each: about half are denied, and the more the faster a system answers",
		limit: aHundredASecond, keys: manyKeys, skew: 1.1, callers: closedCallers},
	{id: "lease", about: "as `distinct`, ringfence with leases of at most 64 units",
		limit: aThousandAMinute, keys: manyKeys, allowed: true, callers: closedCallers,
		systems: append([]string{leased}, rivals...)},
	{id: "open", about: "as `distinct`, but calls arrive at random instants (Poisson), 16,700 a second on average, whether or not earlier ones have been answered; latency counts from the intended arrival",
		limit: aThousandAMinute, keys: manyKeys, allowed: true, open: true, callers: []int{openCallers},
		systems: append([]string{"noop", own}, rivals...)},
	{id: "limit", about: "as `distinct`: ringfence's own script, 64 keys a call, from 4 raw connections with two calls under way on each",
		limit: aThousandAMinute, keys: manyKeys, allowed: true, callers: []int{512},
		systems: []string{own, raw}},
	shardsWorkload(1), shardsWorkload(2), shardsWorkload(4), shardsWorkload(8),
	{id: "cluster", about: "as `distinct`, on a Redis Cluster of three masters",
		limit: aThousandAMinute, keys: manyKeys, allowed: true, callers: []int{64, 512}, cluster: true,
		systems: []string{own, "redis_rate", "redis_rate-autopipe", "plain-evalsha"}},
}

func shardsWorkload(n int) workload {
	return workload{
		id: fmt.Sprintf("shards-%d", n), about: fmt.Sprintf("as `distinct`, on a ring of %d", n),
		limit: aThousandAMinute, keys: manyKeys, allowed: true, callers: []int{64, 512},
		systems: []string{own}, shards: n,
	}
}

// servers is how many lone servers the workload needs.
func (w workload) servers() int {
	if w.cluster {
		return 0
	}
	return max(1, w.shards)
}

// calls are the keys of a workload and the order in which they are called: every caller
// begins at another place of one long sequence, so that afterwards it is known how often
// each key was called without anybody counting meanwhile.
type calls struct {
	keys     int
	names    string // one behind the other, so that looking one up hardly disturbs a cache
	sequence []uint32
}

const (
	sequenceLen = 1 << 20
	nameLen     = len("user:00000")
)

func newCalls(w workload) *calls {
	var names strings.Builder
	for i := range w.keys {
		fmt.Fprintf(&names, "user:%05d", i)
	}
	c := &calls{keys: w.keys, names: names.String(), sequence: make([]uint32, sequenceLen)}
	if w.keys == 1 {
		return c
	}
	random := rand.New(rand.NewPCG(1, 2)) // the same calls in every run
	next := func() uint32 { return random.Uint32N(uint32(w.keys)) }
	if w.skew > 0 {
		zipf := rand.NewZipf(random, w.skew, 1, uint64(w.keys-1))
		next = func() uint32 { return uint32(zipf.Uint64()) }
	}
	for i := range c.sequence {
		c.sequence[i] = next()
	}
	return c
}

// start is where a caller begins.
func (c *calls) start(caller, callers int) int { return caller * (sequenceLen / callers) }

func (c *calls) at(i int) string { return c.name(c.sequence[i&(sequenceLen-1)]) }

func (c *calls) name(key uint32) string { return c.names[int(key)*nameLen:][:nameLen] }

// counts is how often each key was called when caller i made attempts[i] calls.
func (c *calls) counts(attempts []int64) []int64 {
	out := make([]int64, c.keys)
	if c.keys == 1 {
		for _, n := range attempts {
			out[0] += n
		}
		return out
	}
	// Differences first: ends[i] callers stop before place i.
	visits := make([]int64, sequenceLen+1)
	var laps int64
	for caller, n := range attempts {
		laps += n / sequenceLen
		from := c.start(caller, len(attempts))
		rest := int(n % sequenceLen)
		visits[from]++
		if from+rest <= sequenceLen {
			visits[from+rest]--
		} else {
			visits[sequenceLen]--
			visits[0]++
			visits[from+rest-sequenceLen]--
		}
	}
	now := laps
	for i, key := range c.sequence {
		now += visits[i]
		out[key] += now
	}
	return out
}

func workloadNamed(id string) (workload, error) {
	var ids []string
	for _, w := range workloads {
		if w.id == id {
			return w, nil
		}
		ids = append(ids, w.id)
	}
	return workload{}, fmt.Errorf("no workload %q; there are %s", id, strings.Join(ids, ", "))
}
