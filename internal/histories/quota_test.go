package histories

import (
	"testing"
	"time"

	"github.com/ringfence/ringfence"
)

// timed builds a history by hand whose entries have times, of two processes that may hold 2
// units each, for 100 ms.
type timed struct {
	k      Key
	events []Event
	place  int64
}

func (h *timed) at(ms int, e Event) *timed {
	if e.Kind < Wipe {
		e.Key = h.k
	} else {
		e.Shard = h.k.Shard
	}
	h.place += 2
	e.Call, e.Return, e.Began, e.Took = h.place, h.place+1, time.Duration(ms)*time.Millisecond, time.Millisecond
	h.events = append(h.events, e)
	return h
}

func (h *timed) charge(ms, process int, cost int64, allowed bool, source ringfence.Source, age int) *timed {
	return h.at(ms, Event{Kind: Charge, Process: process, Cost: cost, Decision: ringfence.Decision{
		Allowed: allowed, Limit: h.k.Limit, Source: source, Age: time.Duration(age) * time.Millisecond,
	}})
}

func (h *timed) ask(ms int, cost int64) *timed {
	return h.charge(ms, 0, cost, true, ringfence.SourcePrimary, 0)
}

func (h *timed) lease(ms int, cost int64) *timed {
	return h.charge(ms, 0, cost, true, ringfence.SourceLease, 50)
}

func (h *timed) denied(ms int) *timed {
	return h.charge(ms, 0, 1, false, ringfence.SourcePrimary, 0)
}

var timedQuotas = map[string]Quota{
	"log": {
		Limit: ringfence.SlidingLog{Limit: 10, Window: time.Second},
		Life:  100 * time.Millisecond, Ahead: []int64{2, 2}, All: 4,
	},
	"bucket": {
		Limit: ringfence.TokenBucket{Rate: 10, Per: time.Second, Burst: 10},
		Life:  100 * time.Millisecond, Ahead: []int64{2, 2}, All: 4,
	},
}

func newTimed(limiter string) *timed {
	return &timed{k: Key{Limiter: limiter, Name: "k", Shard: "a", Limit: 10}}
}

func TestQuotaIsJudgedByTheInstantsOfItsUse(t *testing.T) {
	const policy, lease = ringfence.SourcePolicy, ringfence.SourceLease
	log := func() *timed { return newTimed("log") }
	bucket := func() *timed { return newTimed("bucket") }
	step := func(by time.Duration) Event { return Event{Kind: Step, Forward: by} }
	for name, c := range map[string]struct {
		legal bool
		h     *timed
	}{
		"a window that is full":                  {true, log().ask(0, 8).lease(900, 2).ask(1100, 8)},
		"one unit too many":                      {false, log().ask(0, 8).lease(900, 3)},
		"one unit too many of two windows":       {false, log().ask(0, 3).ask(500, 5).lease(900, 2).ask(1100, 4)},
		"a window later":                         {true, log().ask(0, 10).ask(1001, 10)},
		"less than a window later":               {false, log().ask(0, 10).ask(997, 1)},
		"perhaps a window later":                 {true, log().ask(0, 10).ask(999, 10)},
		"what a policy admits is not judged":     {true, log().ask(0, 10).charge(5, 0, 4, true, policy, 0)},
		"what failed admits nothing":             {true, log().ask(0, 10).at(5, Event{Kind: Charge, Cost: 1, Err: ringfence.ErrClosed})},
		"a lease that is too old":                {false, log().ask(0, 1).charge(150, 0, 1, true, lease, 101)},
		"a lease that was too small":             {false, log().ask(0, 1).lease(50, 3)},
		"a lease that denies":                    {false, log().ask(0, 1).charge(50, 0, 1, false, lease, 50)},
		"after a wipe":                           {true, log().ask(0, 10).at(5, Event{Kind: Wipe}).ask(10, 10)},
		"more than twice, after a wipe":          {false, log().ask(0, 10).at(5, Event{Kind: Wipe}).ask(10, 10).lease(20, 1)},
		"after a promotion":                      {true, log().ask(0, 10).at(5, Event{Kind: Lag}).ask(10, 10)},
		"after a step forward":                   {true, log().ask(0, 10).at(5, step(time.Second)).ask(10, 10)},
		"after a step back":                      {false, log().ask(0, 10).at(5, step(-time.Second)).ask(10, 1)},
		"after a Reset":                          {true, log().ask(0, 10).at(5, Event{Kind: Reset}).ask(10, 10)},
		"what was held before a Reset":           {false, log().ask(0, 8).at(5, Event{Kind: Reset}).lease(10, 2)},
		"what another held before a Reset":       {true, log().ask(0, 8).at(5, Event{Kind: Reset, Process: 1}).lease(10, 2).ask(20, 10)},
		"what was taken after a Reset":           {true, log().ask(0, 8).at(5, Event{Kind: Reset}).lease(60, 2)},
		"a Reset that failed came later":         {true, log().at(0, Event{Kind: Reset, Err: ringfence.ErrUnavailable}).ask(500, 10).ask(600, 10)},
		"a Reset that failed, and quiet":         {false, log().at(0, Event{Kind: Reset, Err: ringfence.ErrUnavailable}).at(300, Event{Kind: Quiet}).ask(500, 10).ask(600, 10)},
		"a bucket fills while it is used":        {true, bucket().ask(0, 10).ask(1000, 10).ask(1300, 3)},
		"a bucket fills no faster":               {false, bucket().ask(0, 10).ask(1000, 10).ask(1300, 4)},
		"nothing was held in the beginning":      {false, bucket().ask(0, 10).lease(10, 1)},
		"what was held comes on top":             {true, bucket().ask(0, 1).ask(2000, 10).lease(2010, 2).charge(2010, 1, 2, true, lease, 50)},
		"more than was held":                     {false, bucket().ask(0, 1).ask(2000, 10).lease(2010, 2).charge(2010, 1, 2, true, lease, 50).lease(2020, 1)},
		"a bucket's burst again, after a wipe":   {true, bucket().ask(0, 10).at(5, Event{Kind: Wipe}).ask(10, 10)},
		"a bucket's burst thrice, after a wipe":  {false, bucket().ask(0, 10).at(5, Event{Kind: Wipe}).ask(10, 10).ask(20, 1)},
		"a wipe long before does not excuse any": {false, log().at(5, Event{Kind: Wipe}).ask(1000, 10).ask(1010, 1)},
	} {
		t.Run(name, func(t *testing.T) {
			if err := CheckQuota(c.h.events, timedQuotas); (err == nil) != c.legal {
				t.Errorf("legal %t, want %t: %v", err == nil, c.legal, err)
			}
		})
	}
}

func TestDenialsAreJudgedByWhatIsCertainlyLeft(t *testing.T) {
	log := func() *timed { return newTimed("log") }
	bucket := func() *timed { return newTimed("bucket") }
	late := ringfence.Decision{Source: ringfence.SourcePolicy, Cause: ringfence.CauseBudget}
	open := ringfence.Decision{Source: ringfence.SourcePolicy, Cause: ringfence.CauseBreaker}
	for name, c := range map[string]struct {
		legal bool
		h     *timed
	}{
		"all is used":                         {true, log().ask(0, 10).denied(5)},
		"the other process may hold the rest": {true, log().ask(0, 8).denied(5)},
		"it cannot hold as much":              {false, log().ask(0, 7).denied(5)},
		"a lease's life early":                {true, log().ask(0, 10).denied(1100)},
		"more than that early":                {false, log().ask(0, 10).denied(1102)},
		"what may have been charged":          {true, log().ask(0, 7).at(1, Event{Kind: Charge, Cost: 1, Decision: late}).denied(5)},
		"what was not sent":                   {false, log().ask(0, 7).at(1, Event{Kind: Charge, Cost: 1, Decision: open}).denied(5)},
		"a denial uses nothing":               {false, log().ask(0, 7).charge(1, 1, 4, false, ringfence.SourcePrimary, 0).denied(5)},
		"out of a lease":                      {true, log().ask(0, 6).lease(3, 2).denied(5)},
		"before the calm":                     {true, log().denied(-5)},
		"a bucket that is empty":              {true, bucket().ask(0, 8).denied(5)},
		"a bucket that has filled":            {true, bucket().ask(0, 10).denied(299)},
		"a bucket that had filled before":     {false, bucket().ask(0, 10).denied(303)},
		"a bucket is never more than full":    {true, bucket().ask(3000, 8).denied(3001)},
	} {
		t.Run(name, func(t *testing.T) {
			err := CheckDenials(c.h.events, timedQuotas, Calm{From: 0, To: 4 * time.Second})
			if (err == nil) != c.legal {
				t.Errorf("legal %t, want %t: %v", err == nil, c.legal, err)
			}
		})
	}
}
