package ringfence

import (
	"math"
	"sync"
	"sync/atomic"
)

const (
	leaseWays = 8
	// leaseKeys is the most keys with leases at a time, of all limiters together.
	leaseKeys = 1 << 18
)

// leaseTable holds a bounded number of keys. Reading takes no lock; a key that finds its
// set full of keys in use gets no leases.
type leaseTable struct {
	made sync.Once
	sets atomic.Pointer[[]leaseSet]
}

type leaseSet [leaseWays]atomic.Pointer[leaseKey]

// find is the key, nil if it is not there. The lower half of the hash is used: the upper
// half picks the shard.
func (t *leaseTable) find(h keyHash) *leaseKey {
	sets := t.sets.Load()
	if sets == nil {
		return nil
	}
	s := &(*sets)[h.lo&uint64(len(*sets)-1)]
	for i := range s {
		if k := s[i].Load(); k != nil && k.hash == h {
			return k
		}
	}
	return nil
}

// key is find, and puts the key there if there is room. It takes no memory until the first.
func (t *leaseTable) key(ls *leasing, h keyHash, now int64) *leaseKey {
	t.made.Do(func() {
		sets := make([]leaseSet, leaseKeys/leaseWays)
		t.sets.Store(&sets)
	})
	if k := t.find(h); k != nil {
		return k
	}
	sets := *t.sets.Load()
	s := &sets[h.lo&uint64(len(sets)-1)]
	for i := range s {
		old := s[i].Load()
		if old != nil && !old.idle(now) {
			continue
		}
		k := &leaseKey{of: ls, hash: h}
		k.room.Store(math.MaxInt64)
		k.reset.Store(math.MinInt64)
		if s[i].CompareAndSwap(old, k) {
			return t.find(h) // another may have put it into another way
		}
	}
	return nil
}

// drop gives up what is held of a key, and what is on its way.
func (t *leaseTable) drop(h keyHash, now int64) {
	if k := t.find(h); k != nil {
		k.drop(now)
	}
}

// outstanding is what is held now, in units of all keys of a limiter.
func (t *leaseTable) outstanding(now int64) map[*leasing]int64 {
	out := map[*leasing]int64{}
	sets := t.sets.Load()
	if sets == nil {
		return out
	}
	for i := range *sets {
		for j := range (*sets)[i] {
			if k := (*sets)[i][j].Load(); k != nil {
				out[k.of] += k.rest(now)
			}
		}
	}
	return out
}
