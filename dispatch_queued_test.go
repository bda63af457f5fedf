package ringfence

import "testing"

// Who frees a slot looks once more for requests that came meanwhile and rely on it: also for
// those that the alarm has turned around, but not for those that a slot holds, for which it
// would look for ever.
func TestWhoFreesASlotSeesWhatIsQueuedAndOnlyThat(t *testing.T) {
	d := newDispatcher(dispatchConfig{inFlight: 2, maxBatch: 4, queue: 4, clock: func() int64 { return 0 }})
	d.waiting.Add(1)
	d.slots[0].held = newRequest(opCharge, nil, keyHash{}, keySpace{}, 1)
	if d.queued() {
		t.Error("what a slot holds counts as queued")
	}
	d.queue.push(newRequest(opCharge, nil, keyHash{}, keySpace{}, 1))
	if !d.queued() {
		t.Error("a request is not seen")
	}
	d.queue.turn()
	if !d.queued() {
		t.Error("a request is not seen once the queue has been turned")
	}
}
