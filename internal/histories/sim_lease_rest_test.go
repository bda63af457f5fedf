package histories

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// holds looks whether a process holds more than it may, of all keys.
func (s *leaseRun) holds(p *simProcess, number int) {
	held := s.gathered(p, "ratelimiter_lease_outstanding")
	for name, q := range s.quotas() {
		if most := q.Ahead[number] * int64(len(s.keys)); held[name] > float64(most) {
			s.breaks(fmt.Errorf("process %d: %.0f units of %d keys are held of %s, and %d may be", number, held[name], len(s.keys), name, most))
		}
	}
}

// returned is how many units went back, by the metrics of those that are open still.
func (s *leaseRun) returned() (units float64) {
	for _, p := range s.rings {
		for _, v := range s.gathered(p, "ratelimiter_lease_returned_total") {
			units += v
		}
	}
	return units
}

// gathered is what a process says of one metric, by limit.
func (s *leaseRun) gathered(p *simProcess, metric string) map[string]float64 {
	families, err := p.metrics.Gather()
	if err != nil {
		s.breaks(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		if f.GetName() != metric {
			continue
		}
		for _, m := range f.GetMetric() {
			out[m.GetLabel()[0].GetValue()] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return out
}

// drain takes what is left of a limit that does not come back within the run, so that one
// unit too many shows.
func (s *leaseRun) drain() {
	for place, slot := range s.slots {
		p, number := slot.get()
		c := &Caller{Recorder: s.recorder, Process: number, Client: 100 + place, Budget: s.budget, Broken: s.breaks}
		for i, l := range s.shared {
			if l.window <= s.window {
				continue
			}
			for _, k := range s.keys {
				for n := int64(0); n < 2*l.units && c.AllowN(context.Background(), p.limiters[i], k, 1).Allowed; n++ {
				}
			}
		}
	}
}

// rest lets all quota come back: no call is made until the last window has ended. A clock
// that was stepped back may have stood still for a window first.
func (s *leaseRun) rest() {
	length := s.window + s.life + time.Millisecond
	if s.harsh {
		length += s.window
	}
	time.Sleep(length)
}

// full looks whether all quota of a key can be had, once nobody has called for a while: by
// the clients of one process, which may hold some of it.
func (s *leaseRun) full() {
	place := s.draw.IntN(len(s.slots))
	p, number := s.slots[place].get()
	key := s.keys[s.draw.IntN(len(s.keys))]
	clients := 1 + s.draw.IntN(6)
	for i, l := range s.shared {
		if l.window > s.window {
			continue
		}
		var got atomic.Int64
		var all sync.WaitGroup
		for j := range clients {
			c := &Caller{Recorder: s.recorder, Process: number, Client: 100 + j, Budget: s.budget, Broken: s.breaks}
			draw := stream(s.seed, 23, s.round, uint64(i), uint64(j))
			all.Go(func() {
				time.Sleep(draw.between(0, time.Millisecond))
				for c.AllowN(context.Background(), p.limiters[i], key, 1).Allowed && got.Add(1) < 2*l.units {
					time.Sleep(draw.between(0, time.Millisecond))
				}
			})
		}
		all.Wait()
		if got.Load() < l.units {
			s.breaks(fmt.Errorf("process %d: %d clients can have only %d of %d units of %s/%s, %v after the last call",
				number, clients, got.Load(), l.units, l.name, key, s.window+s.life))
		}
	}
}
