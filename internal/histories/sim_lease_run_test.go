package histories

import (
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ringfence/ringfence"
)

// leaseRun is a simulation in which processes take leases. Its windows are seconds long, so
// that quota comes back, and it is judged by time instead of order.
type leaseRun struct {
	*simulation
	draw   draws
	shared []leaseLimit
	slots  []*leaseSlot
	places []int         // by the number of a process: the one it has, or had
	harsh  bool          // faults may make a shard forget, and its clock step
	window time.Duration // the longest that ends within a run
	life   time.Duration // the longest of a lease
}

// leaseLimit is a limit that all processes share, and what each may take of it ahead.
type leaseLimit struct {
	name   string
	limit  ringfence.Limit
	units  int64
	window time.Duration // of a bucket: until it has filled
	life   time.Duration // the longest of a lease
	leases []ringfence.Lease
	near   time.Duration
}

// leaseSlot is a place for a process. When that is closed the next one takes it.
type leaseSlot struct {
	mu      sync.Mutex // guards the following
	number  int
	process *simProcess // nil while there is none
}

func (s *leaseSlot) get() (p *simProcess, number int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.process, s.number
}

func (s *leaseSlot) set(p *simProcess, number int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.process, s.number = p, number
}

// leaseOutcome is what came of a run.
type leaseOutcome struct {
	outcome
	quotas   map[string]Quota
	calms    []Calm
	returned float64
}

// quotaErrs is what the judge of quota says.
func (o leaseOutcome) quotaErrs() []error {
	errs := []error{CheckQuota(o.events, o.quotas)}
	for _, c := range o.calms {
		errs = append(errs, CheckDenials(o.events, o.quotas, c))
	}
	return errs
}

// simulateLeases runs a seed in virtual time, as simulate does.
func simulateLeases(t *testing.T, seed uint64, bug plant) (o leaseOutcome) {
	t.Helper()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	runtime.GC() // see simulate
	runtime.GC()
	synctest.Test(t, func(t *testing.T) {
		s := newLeaseRun(seed, bug)
		if err := s.open(); err != nil {
			s.close()
			t.Fatal(err)
		}
		for i, p := range s.rings {
			s.slots = append(s.slots, &leaseSlot{process: p, number: i})
		}
		for range 1 + s.draw.IntN(2) {
			s.play(time.Duration((1+s.draw.part())*float64(s.window)), true)
			s.calm()
			s.rest()
			from := time.Since(s.recorder.start)
			s.play(time.Duration((0.5+s.draw.part())*float64(s.window)), false)
			s.rest()
			s.full()
			o.calms = append(o.calms, Calm{from, time.Since(s.recorder.start)})
		}
		s.drain()
		o.events = s.recorder.Events()
		o.quotas = s.quotas()
		s.count(o.events)
		o.returned = s.returned()
		s.close()
		o.broken = s.broken
	})
	return o
}

func newLeaseRun(seed uint64, bug plant) *leaseRun {
	s := &leaseRun{simulation: newSimulation(seed, bug), draw: stream(seed, 20)}
	s.keys = s.keys[:min(len(s.keys), 2)]
	s.costs = [2]int64{1, 1 + s.draw.Int64N(3)}
	s.lull = 3 * time.Second
	if s.draw.IntN(2) == 0 {
		// Replies to returns are lost even on a fine day. Few others, or so much would be
		// charged in vain that what is admitted twice did not show; and breakers stay closed.
		s.fair, s.failures = weather{returns: s.draw.part()}, 4
	}
	s.faults = 8 // those that lose nothing
	if s.harsh = s.draw.IntN(3) == 0; s.harsh {
		s.faults = 14
	}
	s.limits = s.limitsOf
	for i := range s.processes {
		s.places = append(s.places, i)
	}
	with := s.draw.IntN(s.processes) // takes leases in any case
	endless := s.draw.IntN(4)
	for i, name := range []string{"bucket", "log"} {
		l := leaseLimit{name: name, units: 20 + s.draw.Int64N(100)}
		l.window = s.draw.between(2*time.Second, 6*time.Second).Truncate(time.Duration(l.units) * time.Microsecond)
		if i == endless { // all the quota there will ever be: nothing makes up for a mistake
			l.window = year.Truncate(time.Duration(l.units) * time.Microsecond)
			l.units *= 2
		} else {
			s.window = max(s.window, l.window)
		}
		if name == "log" {
			l.limit = ringfence.SlidingLog{Limit: l.units, Window: l.window}
		} else {
			l.limit = ringfence.TokenBucket{Rate: l.units, Per: l.window, Burst: l.units}
		}
		if s.draw.IntN(2) == 0 {
			l.near = s.draw.between(0, time.Second)
		}
		longest := min(ringfence.MaxLease, (l.window / 10).Truncate(time.Microsecond))
		for p := range s.processes {
			lease := ringfence.Lease{Max: 2 + s.draw.Int64N(40)}
			if s.draw.IntN(2) == 0 {
				lease.TTL = s.draw.between(longest/8, longest).Truncate(time.Microsecond)
			}
			if s.draw.IntN(4) == 0 && p != with {
				lease = ringfence.Lease{}
			}
			l.leases = append(l.leases, lease)
			switch {
			case lease.Max == 0:
			case lease.TTL == 0:
				l.life = longest
			default:
				l.life = max(l.life, lease.TTL)
			}
		}
		s.life = max(s.life, l.life)
		s.shared = append(s.shared, l)
	}
	s.window = max(s.window, 3*time.Second)
	return s
}

// limitsOf are the limiters of a process. Who takes the place of one that was closed has what
// that had.
func (s *leaseRun) limitsOf(number int) []simLimit {
	var out []simLimit
	for _, l := range s.shared {
		options := []ringfence.LimiterOption{ringfence.WithNearCache(l.near)}
		if lease := l.leases[s.places[number]]; lease.Max > 0 {
			options = append(options, ringfence.WithLease(lease))
		}
		out = append(out, simLimit{l.name, l.limit, options})
	}
	return out
}

// quotas is what the judge has to know of the limits.
func (s *leaseRun) quotas() map[string]Quota {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]Quota{}
	for _, l := range s.shared {
		q := Quota{Limit: l.limit, Life: l.life}
		for number := range s.rings {
			most := min(l.leases[s.places[number]].Max, l.units/10)
			if most < 2 { // a lease of one unit is none
				most = 0
			}
			if q.Ahead = append(q.Ahead, most); number < s.processes {
				q.All += most
			}
		}
		out[l.name] = q
	}
	return out
}
