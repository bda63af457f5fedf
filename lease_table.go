package ringfence

import (
	"math"
	"sync"
	"sync/atomic"
)

const (
	leaseWays = 5
	leaseSets = 1 << 16
)

// leaseTable holds the keys that may have leases, of all limiters of a ring together: at most
// leaseSets x leaseWays, 327,680. Reading takes no lock; a key that finds its
// set full of keys in use gets no leases.
type leaseTable struct {
	sets atomic.Pointer[[leaseSets]leaseSet]
	mu   sync.Mutex // held while a key is put in; a leaf
}

// leaseSet holds the keys that fall into it, in no order, and a part of the hash of each, so
// that no other key is looked at in vain. It is as long as a cache line of most processors.
type leaseSet struct {
	tags [leaseWays]atomic.Uint32
	keys [leaseWays]atomic.Pointer[leaseKey]
}

// set is where a key belongs, and its tag there. The lower half of its hash is used: the
// upper half picks the shard.
func (t *leaseTable) set(h keyHash) (s *leaseSet, tag uint32) {
	sets := t.sets.Load()
	if sets == nil {
		return nil, 0
	}
	return &sets[h.lo%leaseSets], uint32(h.lo >> 32)
}

// find is the key, nil if it is not there.
func (t *leaseTable) find(h keyHash) *leaseKey {
	s, tag := t.set(h)
	if s == nil {
		return nil
	}
	return s.find(h, tag)
}

func (s *leaseSet) find(h keyHash, tag uint32) *leaseKey {
	for i := range s.tags {
		if s.tags[i].Load() != tag {
			continue
		}
		if k := s.keys[i].Load(); k != nil && k.hash == h {
			return k
		}
	}
	return nil
}

// key is find, and puts the key there if there is room. It takes no memory until the first.
func (t *leaseTable) key(ls *leasing, h keyHash, now int64) *leaseKey {
	if k := t.find(h); k != nil {
		return k
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sets.Load() == nil {
		t.sets.Store(new([leaseSets]leaseSet))
	}
	s, tag := t.set(h)
	if k := s.find(h, tag); k != nil {
		return k
	}
	for i := range s.keys {
		if old := s.keys[i].Load(); old != nil && !old.retire(now) {
			continue
		}
		k := &leaseKey{of: ls, hash: h}
		k.room.Store(math.MaxInt32)
		k.reset.Store(math.MinInt64)
		k.since.Store(now)
		s.tags[i].Store(tag)
		s.keys[i].Store(k)
		return k
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
	for i := range sets {
		for j := range sets[i].keys {
			if k := sets[i].keys[j].Load(); k != nil {
				out[k.of] += k.rest(now)
			}
		}
	}
	return out
}
