package ringfence

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// grouped are the entries of a batch, as key:cost x count, + where a debit is told.
func grouped(batch []*request) string {
	var out []string
	for _, e := range batch {
		n := 0
		for r := e; r != nil; r = r.follow {
			n++
		}
		s := fmt.Sprintf("%d:%dx%d", e.hash.hi, e.cost, e.count)
		if e.debit != "" {
			s += "+"
		}
		if int64(n) != max(1, e.count) && e.kind == opCharge {
			s += fmt.Sprintf("(%d calls)", n)
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

func TestCallsOfOneCostInARowAreOneEntryAndNoOrderIsChanged(t *testing.T) {
	rl := compiled(t, TokenBucket{Rate: 1, Per: time.Second, Burst: 10})
	for _, c := range []struct {
		kind        opKind
		calls, want string // key:cost, + with a debit, 0 telling only
	}{
		{opCharge, "1:1 2:1 1:1 1:1 2:1", "1:1x3 2:1x2"},
		{opCharge, "1:1 1:5 1:1 1:1 1:5", "1:1x1 1:5x1 1:1x2 1:5x1"},
		{opCharge, "1:1 1:1+ 1:1 1:1+", "1:1x1 1:1x2+ 1:1x1+"},
		{opCharge, "1:1+0 1:1 1:1", "1:1x0+ 1:1x2"},
		{opCharge, "1:1 1:1+0 1:1", "1:1x1 1:1x0+ 1:1x1"},
		{opLook, "1:1 1:1 1:2 1:1", "1:1x1 1:2x1 1:1x1"},
	} {
		g := newGrouper(4)
		for range 3 { // a grouper is used again and again
			g.reset()
			var batch []*request
			for call := range strings.FieldsSeq(c.calls) {
				r := freshRequest().begin(c.kind, rl, keyHash{uint64(call[0] - '0'), 3}, newKeySpace("rf"), int64(call[2]-'0'))
				if strings.Contains(call, "+") {
					r.debit = "1"
				}
				if strings.HasSuffix(call, "+0") {
					r.count = 0
				}
				batch = g.add(batch, r)
			}
			if got := grouped(batch); got != c.want {
				t.Errorf("%s: %s, want %s", c.calls, got, c.want)
			}
		}
	}
}

func TestAStateIsTakenBackExactly(t *testing.T) {
	for _, l := range []TokenBucket{
		{Rate: 1, Per: time.Second, Burst: 10},
		{Rate: 7, Per: time.Microsecond, Burst: 100},
		{Rate: 3, Per: 10 * time.Microsecond, Burst: 1000},
		{Rate: 999_983, Per: time.Hour, Burst: 1_000_000},
	} {
		rl := compiled(t, l)
		// The script's own steps, from full to empty.
		states := []state{{c: 5}}
		for range rl.capacity {
			s := states[len(states)-1]
			s.b += rl.pr
			s.a += rl.pq + s.b/rl.n
			s.b %= rl.n
			states = append(states, s)
		}
		for range 1000 {
			last := rand.IntN(len(states))
			back := rand.IntN(last + 1)
			if got := rl.before(states[last], int64(back)); got != states[last-back] {
				t.Fatalf("%s: %d before %v is %v, want %v", l, back, states[last], got, states[last-back])
			}
		}
	}
}

// The same calls, one entry each or as few entries as they make, are told the same in
// every field. The servers' clocks are set, so nothing else can differ.
func TestCallsAreToldTheSameWithAndWithoutCoalescing(t *testing.T) {
	var rings [3]*Ring
	var servers [3]*redistest.Server
	for i, batch := range []int{1, 4, 64} {
		servers[i] = redistest.Start(t, redistest.Options{Clock: true})
		ring, err := Open(t.Context(), Config{
			Shards:  []ShardConfig{{ID: "a", Primary: servers[i].URL()}},
			HashKey: []byte("0123456789abcdef"), InFlight: 1, MaxBatch: batch,
			Budget: 10 * time.Second, OperationTimeout: 10 * time.Second,
			NearCacheKeys: -1, // what it answers depends on when
		})
		aclMust(t, err)
		defer ring.Close()
		rings[i] = ring
	}
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	limits := []Limit{
		TokenBucket{Rate: 7, Per: time.Millisecond, Burst: 30},
		TokenBucket{Rate: 1, Per: time.Second, Burst: 12},
		SlidingLog{Limit: 25, Window: 3 * time.Second},
	}
	now := time.Now().UnixMicro()
	joined := 0
	for round := range 150 {
		now += rng.Int64N(500_000)
		for _, s := range servers {
			aclMust(t, s.SetMicros(now))
		}
		which := rng.IntN(len(limits))
		reqs := make([]Request, 1+rng.IntN(40))
		cost := int64(1)
		for i := range reqs {
			if rng.IntN(4) == 0 {
				cost = 1 + rng.Int64N(4)
			}
			reqs[i] = Request{Key: fmt.Sprint(rng.IntN(3)), Cost: cost}
			if i > 0 && reqs[i] == reqs[i-1] {
				joined++
			}
		}
		var told [3]string
		for i, r := range rings {
			l, err := r.Limiter(fmt.Sprintf("l%d", which), limits[which])
			aclMust(t, err)
			ds, err := l.AllowMany(t.Context(), reqs)
			aclMust(t, err)
			told[i] = fmt.Sprintf("%+v", ds)
		}
		if told[0] != told[1] || told[0] != told[2] {
			t.Fatalf("seed %d, round %d, %s: %v are told\n%s\nand in batches of 4\n%s\nof 64\n%s", seed, round, limits[which], reqs, told[0], told[1], told[2])
		}
	}
	if joined < 500 {
		t.Errorf("only %d of the calls could join another", joined)
	}
}
