package histories

import (
	"context"
	"testing"

	"github.com/ringfence/ringfence"
)

// told builds a history by hand, on one key with a limit of 5.
type told struct {
	place  int64
	events []Event
}

var handKey = Key{Limiter: "l", Name: "k", Shard: "a", Limit: 5}

func (h *told) next() int64 { h.place++; return h.place }

// then adds an event that begins and ends before the next one begins.
func (h *told) then(e Event) *told {
	e.Key, e.Call = handKey, h.next()
	if e.Kind >= Wipe {
		e.Key = Key{}
	}
	e.Return = h.next()
	h.events = append(h.events, e)
	return h
}

func (h *told) charge(cost int64, allowed bool, left int64) *told {
	return h.then(Event{Kind: Charge, Cost: cost, Decision: ringfence.Decision{
		Allowed: allowed, Limit: 5, Remaining: left, Source: ringfence.SourcePrimary,
	}})
}

func (h *told) look(left int64) *told {
	return h.then(Event{Kind: Look, Cost: 1, Decision: ringfence.Decision{
		Allowed: left >= 1, Limit: 5, Remaining: left, Source: ringfence.SourcePrimary,
	}})
}

func (h *told) other(cost int64, source ringfence.Source, cause ringfence.Cause) *told {
	return h.then(Event{Kind: Charge, Cost: cost, Decision: ringfence.Decision{
		Allowed: true, Limit: 5, Remaining: ringfence.Unknown, Source: source, Cause: cause,
	}})
}

func (h *told) canceled(cost int64) *told {
	return h.then(Event{Kind: Charge, Cost: cost, Err: context.Canceled})
}

func (h *told) reset(err error) *told { return h.then(Event{Kind: Reset, Cost: 1, Err: err}) }

func (h *told) fault(k Kind, shard string) *told { return h.then(Event{Kind: k, Shard: shard}) }

func TestCheckerTellsLegalHistoriesFromIllegalOnes(t *testing.T) {
	const policy, replica, local = ringfence.SourcePolicy, ringfence.SourceReplica, ringfence.SourceLocal
	const late, open, failed = ringfence.CauseBudget, ringfence.CauseBreaker, ringfence.CauseError
	h := func() *told { return &told{} }
	for name, c := range map[string]struct {
		legal bool
		h     *told
	}{
		"charges add up":              {true, h().charge(2, true, 3).charge(3, true, 0).charge(1, false, 0)},
		"a charge twice":              {false, h().charge(2, true, 3).charge(1, true, 0)},
		"a charge lost":               {false, h().charge(2, true, 3).charge(1, true, 4)},
		"more than the limit":         {false, h().charge(4, true, 1).charge(2, true, 0)},
		"a denial that was not due":   {false, h().charge(4, true, 1).charge(1, false, 1)},
		"a denial takes nothing":      {true, h().charge(4, true, 1).charge(2, false, 1).charge(1, true, 0)},
		"a denial that took":          {false, h().charge(3, true, 2).charge(3, false, 2).charge(1, true, 0)},
		"a look takes nothing":        {true, h().look(5).charge(1, true, 4).look(4)},
		"a look that took":            {false, h().look(5).look(4)},
		"left beyond the limit":       {false, h().look(6)},
		"a late charge came":          {true, h().other(2, policy, late).charge(1, true, 2)},
		"a late charge never came":    {true, h().other(2, policy, late).charge(1, true, 4)},
		"a late charge came later":    {true, h().other(2, policy, late).look(5).look(3)},
		"a late charge came twice":    {false, h().other(2, policy, late).look(3).look(1)},
		"a late charge came in parts": {false, h().other(2, policy, late).look(4)},
		"a late charge went again":    {false, h().other(2, policy, late).look(3).look(5)},
		"a late charge came early":    {false, h().look(3).other(2, policy, late)},
		"a late charge did not fit":   {true, h().other(3, policy, late).charge(4, true, 1).charge(1, true, 0)},
		"two late charges, one came":  {true, h().other(2, local, failed).other(3, policy, late).look(2).look(0)},
		"two late ones, wrong sum":    {false, h().other(2, local, failed).other(3, policy, late).look(1)},
		"nothing sent, yet charged":   {false, h().other(2, policy, open).look(3)},
		"a share is told":             {true, h().other(2, replica, open).look(3)},
		"a share is told in parts":    {true, h().other(2, replica, open).look(4).look(3)},
		"a share is told twice":       {false, h().other(2, replica, open).look(3).look(2)},
		"a share is told beyond":      {true, h().charge(4, true, 1).other(2, replica, open).look(0).charge(1, false, 0)},
		"a local part is told":        {false, h().other(2, local, open).look(3)},
		"a share, charged and told":   {true, h().other(2, replica, late).look(3).look(1)},
		"a canceled call came":        {true, h().canceled(3).look(2)},
		"a canceled call came twice":  {false, h().canceled(2).look(3).look(1)},
		"a reset":                     {true, h().charge(3, true, 2).reset(nil).charge(1, true, 4)},
		"a reset that did nothing":    {false, h().charge(3, true, 2).reset(nil).charge(1, true, 1)},
		"a failed reset came":         {true, h().charge(3, true, 2).reset(ringfence.ErrUnavailable).look(2).look(5)},
		"a failed reset never came":   {true, h().charge(3, true, 2).reset(ringfence.ErrUnavailable).look(2)},
		"a failed reset came twice":   {false, h().charge(3, true, 2).reset(ringfence.ErrUnavailable).look(5).charge(1, true, 4).look(5)},
		"a late charge after a reset": {true, h().other(2, policy, late).reset(nil).look(3)},
		"a wipe":                      {true, h().charge(3, true, 2).fault(Wipe, "a").look(5)},
		"a wipe of another shard":     {false, h().charge(3, true, 2).fault(Wipe, "b").look(5)},
		"a wipe that did not wipe":    {false, h().charge(3, true, 2).fault(Wipe, "a").look(2)},
		"a lag lost something":        {true, h().charge(3, true, 2).fault(Lag, "a").look(4)},
		"a lag lost nothing":          {true, h().charge(3, true, 2).fault(Lag, "a").look(2)},
		"a lag charged something":     {false, h().charge(3, true, 2).fault(Lag, "a").look(1)},
		"a lag after a late charge":   {true, h().other(3, policy, late).fault(Lag, "a").look(4)},
		"quiet":                       {true, h().other(2, policy, late).fault(Quiet, "").look(3)},
		"quiet, nothing came":         {true, h().other(2, policy, late).fault(Quiet, "").look(5)},
		"a late charge after quiet":   {false, h().other(2, policy, late).fault(Quiet, "").look(5).look(3)},
		"a share is told after quiet": {true, h().other(2, replica, open).fault(Quiet, "").look(3)},
	} {
		t.Run(name, func(t *testing.T) {
			if err := Check(c.h.events); (err == nil) != c.legal {
				t.Errorf("legal %t, want %t: %v", err == nil, c.legal, err)
			}
		})
	}
}

func TestCheckerTakesConcurrentCallsInAnyOrder(t *testing.T) {
	at := func(call, back, cost, left int64) Event {
		return Event{Kind: Charge, Key: handKey, Call: call, Return: back, Cost: cost, Decision: ringfence.Decision{
			Allowed: true, Limit: 5, Remaining: left, Source: ringfence.SourcePrimary,
		}}
	}
	if err := Check([]Event{at(1, 4, 1, 2), at(2, 3, 2, 3)}); err != nil {
		t.Error(err)
	}
	if Check([]Event{at(1, 2, 1, 2), at(3, 4, 2, 3)}) == nil {
		t.Error("the second call was seen by the first, which had returned before it began")
	}
}
