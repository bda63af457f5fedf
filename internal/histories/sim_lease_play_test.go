package histories

import (
	"context"
	"sync"
	"time"

	"github.com/ringfence/ringfence"
)

// play lets clients call for a while, in bad weather or in good. Now and then a process is
// closed and another takes its place.
func (s *leaseRun) play(length time.Duration, storm bool) {
	s.round++
	end := time.Now().Add(length)
	var all sync.WaitGroup
	clients := make([]int, len(s.slots))
	sum := 0
	for i := range clients {
		clients[i] = 1 + s.draw.IntN(2)
		sum += clients[i]
	}
	// What the clients ask for in all is about what there is, by turns more and less.
	per := 0.0 // units a second of one key
	for _, l := range s.shared {
		per += float64(l.units) / min(l.window, 12*time.Second).Seconds()
	}
	cost := float64(s.costs[0]+s.costs[1]) / 2
	gap := time.Duration(float64(sum) * cost / per / (0.6 + 1.2*s.draw.part()) * float64(time.Second))
	client := 0
	for i, slot := range s.slots {
		for range clients[i] {
			c := &Caller{Recorder: s.recorder, Client: client, Budget: s.budget, Broken: s.breaks}
			draw := stream(s.seed, 21, s.round, uint64(client))
			all.Go(func() { s.call(c, slot, draw, gap, end, storm) })
			client++
		}
		if s.draw.IntN(3) == 0 {
			draw := stream(s.seed, 22, s.round, uint64(i))
			all.Go(func() {
				time.Sleep(draw.between(0, length))
				s.replace(slot, draw)
			})
		}
	}
	if storm {
		s.storms(&all, end)
	}
	all.Wait()
}

// replace closes a process while its clients call, and opens another.
func (s *leaseRun) replace(slot *leaseSlot, draw draws) {
	p, number := slot.get()
	slot.set(nil, 0)
	time.Sleep(draw.between(0, time.Millisecond)) // what has been asked is under way
	s.closeProcess(number, p)
	time.Sleep(draw.between(0, s.window/4))
	s.mu.Lock()
	next := len(s.rings)
	s.rings = append(s.rings, nil)
	s.places = append(s.places, s.places[number])
	s.mu.Unlock()
	opened, err := s.openProcess(next, draw)
	if err != nil {
		panic(err) // the same as in the beginning, and a shard that is away is no error
	}
	s.mu.Lock()
	s.rings[next] = opened
	s.mu.Unlock()
	slot.set(opened, next)
}

// call is one client.
func (s *leaseRun) call(c *Caller, slot *leaseSlot, draw draws, gap time.Duration, end time.Time, storm bool) {
	turn, busy := time.Now(), false
	for time.Now().Before(end) {
		if !time.Now().Before(turn) {
			busy = !busy
			turn = time.Now().Add(draw.between(s.window/16, s.window/4))
		}
		// Four times as fast as on average, and four sevenths.
		pause := draw.between(0, gap*7/2)
		if busy {
			pause = draw.between(0, gap/2)
		}
		time.Sleep(pause)
		p, number := slot.get()
		if p == nil {
			time.Sleep(draw.between(0, 50*time.Millisecond))
			continue
		}
		c.Process = number
		s.callOnce(c, p, draw, storm)
		if draw.IntN(300) == 0 {
			s.holds(p, number)
		}
	}
}

// callOnce is what a client does; he is patient in good weather.
func (s *leaseRun) callOnce(c *Caller, p *simProcess, draw draws, storm bool) {
	ctx := context.Background()
	if storm && draw.IntN(20) == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, draw.between(time.Millisecond, 2*s.budget))
		defer cancel()
	}
	l := p.limiters[draw.IntN(2)]
	key := func() string { return s.keys[min(draw.IntN(3), 1)%len(s.keys)] } // one twice as often
	switch n := draw.IntN(50); {
	case n == 0 && storm && s.harsh:
		c.Reset(ctx, l, key())
	case n < 2:
		c.Peek(ctx, l, key())
	case n < 5:
		reqs := make([]ringfence.Request, 1+draw.IntN(5))
		for i := range reqs {
			reqs[i] = ringfence.Request{Key: key(), Cost: s.costs[draw.IntN(2)]}
		}
		c.AllowMany(ctx, l, reqs)
	default:
		c.AllowN(ctx, l, key(), s.costs[draw.IntN(2)])
	}
}
