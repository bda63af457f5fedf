package ringfence

import (
	"testing"
	"unsafe"
)

// A line is fetched, no more: nothing is changed, and an address where nothing is does no harm.
func TestPrefetchChangesNothing(t *testing.T) {
	places := make([]leasePlace, 2)
	places[1].lo.Store(7)
	prefetch(unsafe.Pointer(&places[1]))
	prefetch(nil)
	if places[0].lo.Load() != 0 || places[1].lo.Load() != 7 {
		t.Errorf("the places hold %d and %d now, want 0 and 7", places[0].lo.Load(), places[1].lo.Load())
	}
}
