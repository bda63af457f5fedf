package ringfence

import (
	"math"
	"sync"
	"sync/atomic"
	"unsafe"
)

const (
	leasePlaces = 1 << 18
	leaseTries  = 8 // a key is in one of so many places
)

// leaseTable holds the keys that may have leases, of all limiters of a ring together: at most
// leasePlaces. Reading takes no lock; a key that finds only keys in use where it may be gets
// no leases. No place is ever empty again once a key has been there, so whoever looks for one
// can stop at an empty place.
type leaseTable struct {
	all atomic.Pointer[leasePages]
	mu  sync.Mutex // held while a key is put in; a leaf
}

// leasePages are the places with what calls need, and the keys with the rest, in the same
// order. The former are many, so there are no pointers in them for the garbage collector to
// follow.
type leasePages struct {
	places []leasePlace
	keys   []atomic.Pointer[leaseKey]
}

// leasePlace is as long as a cache line of most processors: all that a call out of a lease
// waits for, if there is no second one.
type leasePlace struct {
	grant
	_ [8]byte
}

// hugePage is how long one is on most processors.
const hugePage = 2 << 20

// newLeasePages makes a table. Calls look at it all over, and of its 4,096 usual pages a
// processor remembers about half and has to look the others up: so it is to be in huge ones.
// Those are taken now, for each has to be cleared, which no call should wait for; where there
// are none this takes one in 512 of the usual ones.
func newLeasePages() *leasePages {
	p := &leasePages{make([]leasePlace, leasePlaces), make([]atomic.Pointer[leaseKey], leasePlaces)}
	const size = unsafe.Sizeof(leasePlace{})
	inHugePages(unsafe.Slice((*byte)(unsafe.Pointer(&p.places[0])), leasePlaces*size))
	for i := 0; i < leasePlaces; i += int(hugePage / size) {
		p.places[i].lo.Store(0)
	}
	p.places[leasePlaces-1].lo.Store(0)
	return p
}

// at is the i-th place where a key may be. The lower half of its hash is used: the upper half
// picks the shard.
func (p *leasePages) at(h keyHash, i uint64) uint64 { return (h.lo + i) % leasePlaces }

// look is where a key is, in no place of a table that has none. A place is empty where the
// lower half of the hash is 0: that a key has such a hash can be left out of account.
func (p *leasePages) look(h keyHash) (at uint64, ok bool) {
	if p == nil {
		return 0, false
	}
	for i := range uint64(leaseTries) {
		at = p.at(h, i)
		g := &p.places[at]
		switch lo := g.lo.Load(); {
		case lo == h.lo && g.hi.Load() == h.hi:
			return at, true
		case lo == 0:
			return 0, false
		}
	}
	return 0, false
}

// find is the key, nil if it is not there.
func (p *leasePages) find(h keyHash) *leaseKey {
	if at, ok := p.look(h); ok {
		return p.key(at, h)
	}
	return nil
}

// key is the key at a place, unless that is another's by now.
func (p *leasePages) key(at uint64, h keyHash) *leaseKey {
	if k := p.keys[at].Load(); k != nil && k.hash == h {
		return k
	}
	return nil
}

// fetch has the processor fetch a key's place, for a call that is going to look there.
func (t *leaseTable) fetch(h keyHash) {
	if p := t.all.Load(); p != nil {
		prefetch(unsafe.Pointer(&p.places[p.at(h, 0)]))
	}
}

// find is the key, nil if it is not there.
func (t *leaseTable) find(h keyHash) *leaseKey { return t.all.Load().find(h) }

// take takes cost units out of a lease of the key, see leaseKey.take. Of the key it looks at
// its place alone, if there is no second lease.
func (t *leaseTable) take(ls *leasing, h keyHash, cost, now int64) (g *grant, w grantWord, told terms, rest int64) {
	p := t.all.Load()
	at, ok := p.look(h)
	if !ok {
		return nil, 0, terms{}, 0
	}
	g = &p.places[at].grant
	if g.load(h)&grantSecond != 0 {
		if k := p.key(at, h); k != nil {
			return k.take(ls, cost, now)
		}
	}
	if w, told, ok = g.take(h, ls, cost, now); !ok {
		return nil, 0, terms{}, 0
	}
	return g, w, told, w.left()
}

// prepare makes the table. That takes several milliseconds where the memory was used before and
// has to be cleared, for which no call should wait.
func (t *leaseTable) prepare() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pages()
}

// pages are those of the table, which is made if there is none. t.mu is held.
func (t *leaseTable) pages() *leasePages {
	p := t.all.Load()
	if p == nil {
		p = newLeasePages()
		t.all.Store(p)
	}
	return p
}

// key is find, and puts the key there if there is room.
func (t *leaseTable) key(ls *leasing, h keyHash, now int64) *leaseKey {
	if k := t.find(h); k != nil {
		return k
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.pages()
	if k := p.find(h); k != nil {
		return k
	}
	for i := range uint64(leaseTries) {
		at := p.at(h, i)
		if old := p.keys[at].Load(); old != nil && !old.retire(now) {
			continue
		}
		g := &p.places[at].grant
		k := &leaseKey{of: ls, hash: h, here: g}
		k.room.Store(math.MaxInt32)
		k.reset.Store(math.MinInt64)
		k.since.Store(now)
		p.keys[at].Store(k)
		g.belong(h)
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
	p := t.all.Load()
	if p == nil {
		return out
	}
	for i := range p.keys {
		if k := p.keys[i].Load(); k != nil {
			out[k.of] += k.rest(now)
		}
	}
	return out
}
