package ringfence

import (
	"testing"
	"testing/synctest"
)

// Who frees a slot looks once more for requests that came meanwhile and rely on it: also for
// those that the alarm has turned around, but not for those that a slot holds, for which it
// would look for ever.
func TestWhoFreesASlotSeesWhatIsQueuedAndOnlyThat(t *testing.T) {
	d := newDispatcher(dispatchConfig{inFlight: 2, maxBatch: 4, queue: 4, clock: func() int64 { return 0 }})
	d.waiting.Add(1)
	d.slots[0].held = freshRequest().begin(opCharge, nil, keyHash{}, keySpace{}, 1)
	if d.queued() {
		t.Error("what a slot holds counts as queued")
	}
	d.queue.push(freshRequest().begin(opCharge, nil, keyHash{}, keySpace{}, 1))
	if !d.queued() {
		t.Error("a request is not seen")
	}
	d.queue.turn()
	if !d.queued() {
		t.Error("a request is not seen once the queue has been turned")
	}
}

// A ring in a testing/synctest bubble leaves no channel of the bubble to rings outside: using
// one there ends the program.
func TestRequestsOfABubbleStayInIt(t *testing.T) {
	synctest.Test(t, func(*testing.T) {
		inside := &Ring{requests: newRequestPool()}
		for range 64 {
			q := inside.newRequest(opCharge, nil, keyHash{}, 1)
			q.release()
			q.release()
		}
	})
	outside := &Ring{requests: newRequestPool()}
	for range 64 {
		q := outside.newRequest(opCharge, nil, keyHash{}, 1)
		q.done <- struct{}{}
		<-q.done
		q.release()
		q.release()
	}
}
