package ringfence

import (
	"reflect"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/ringfence/ringfence/internal/redistest"
)

// tableLeases are leases of a limiter that asks nobody.
func tableLeases() *leasing { return &leasing{life: int64(MaxLease), bound: 1000} }

// neighbors are keys that may be in the same places, at the end of the table and the beginning.
// Two each have the same lower half.
func neighbors(n int) (h []keyHash) {
	for i := range n {
		h = append(h, keyHash{uint64(100 + i), uint64(i/2+1)*leasePlaces - leaseTries/2})
	}
	return h
}

// idle is when a key that was claimed at an instant can be forgotten.
func idle(since int64) int64 { return since + int64(MaxLease) + 1 }

// A call out of a lease looks at one cache line, and the garbage collector at none of them.
func TestALeaseIsInOneCacheLine(t *testing.T) {
	if n := unsafe.Sizeof(leasePlace{}); n != 64 {
		t.Errorf("a place takes %d bytes, want 64", n)
	}
	var table leaseTable
	table.key(tableLeases(), keyHash{1, 1}, 0)
	if at := uintptr(unsafe.Pointer(&table.all.Load().places[0])); at%64 != 0 {
		t.Errorf("the first place is at %#x", at)
	}
	var pointers func(reflect.Type) bool
	pointers = func(of reflect.Type) bool {
		switch of.Kind() {
		case reflect.Struct:
			for i := range of.NumField() {
				if pointers(of.Field(i).Type) {
					return true
				}
			}
			return false
		case reflect.Array:
			return of.Len() > 0 && pointers(of.Elem())
		default:
			return of.Kind() < reflect.Bool || of.Kind() > reflect.Complex128
		}
	}
	if pointers(reflect.TypeFor[leasePlace]()) {
		t.Error("there are pointers in a place")
	}
	if n := unsafe.Sizeof(leaseKey{}); n > 96 {
		t.Errorf("a key takes %d bytes, WithLease says 96", n)
	}
	if n := unsafe.Sizeof(grant{}); n > 64 {
		t.Errorf("a second place takes %d bytes, WithLease says 64", n)
	}
}

// A key is found wherever it may be, and none that is not there.
func TestKeysThatMayBeInTheSamePlacesAreAllFound(t *testing.T) {
	var table leaseTable
	ls := tableLeases()
	h := neighbors(leaseTries + 1)
	if table.find(h[0]) != nil {
		t.Error("a table that does not exist has a key")
	}
	keys := map[keyHash]*leaseKey{}
	for i, is := range h[:leaseTries] {
		keys[is] = table.key(ls, is, 0)
		keys[is].here.begin(terms{units: int64(10 + i), asked: 1, remaining: int64(20 + i)})
		for j, other := range h {
			if k := table.find(other); k != keys[other] || (k != nil) != (j <= i) {
				t.Errorf("with %d keys, key %d is %p", i+1, j, k)
			}
		}
	}
	for i, is := range h[:leaseTries] {
		if keys[is] != table.key(ls, is, 0) || keys[is].hash != is {
			t.Errorf("key %d is there twice", i)
		}
		g, w, told, rest := table.take(ls, is, 1, 2)
		if g != keys[is].here || w.left() != int64(9+i) || rest != w.left() || told.remaining != int64(20+i) {
			t.Errorf("out of the lease of key %d: %d left, %+v", i, w.left(), told)
		}
	}
	// Those that differ in either half of the hash are others.
	for _, other := range []keyHash{{h[0].hi, h[2].lo}, {h[2].hi, h[0].lo}, {h[0].hi, h[0].lo + 1<<40}} {
		if g, _, _, _ := table.take(ls, other, 1, 2); g != nil || table.find(other) != nil {
			t.Errorf("%v is found", other)
		}
	}
	var all int64
	for i := range leaseTries {
		all += int64(9 + i)
	}
	if out := table.outstanding(2); len(out) != 1 || out[ls] != all {
		t.Errorf("%v units are outstanding, want %d", out, all)
	}
}

// A key that finds only keys in use has no lease, until one of them has been idle for longer
// than a lease lives.
func TestAFullNeighborhoodHasNoPlaceForAnotherKey(t *testing.T) {
	var table leaseTable
	ls := tableLeases()
	h := neighbors(leaseTries + 2)
	late, later := h[leaseTries], h[leaseTries+1]
	keys := make([]*leaseKey, leaseTries)
	for i := range keys {
		keys[i] = table.key(ls, h[i], 0)
	}
	now := idle(0) - 1
	if table.key(ls, late, now) != nil {
		t.Fatal("a key that may be in use was forgotten")
	}
	now++
	for i, k := range keys { // each for another reason
		switch i % 4 {
		case 0:
			k.way.Store(asking)
		case 1:
			k.since.Store(now)
		case 2:
			k.here.begin(terms{units: 1, asked: now - 1})
		case 3:
			k.here.begin(terms{units: 1, asked: now - 1})
			k.place(now).begin(terms{units: 1, asked: now - 1})
			k.here.close(k.here.bare())
		}
	}
	if k := table.key(ls, late, now); k != nil {
		t.Fatal("a key in use was forgotten")
	}
	keys[5].since.Store(0)
	k := table.key(ls, late, now)
	if k == nil || k.here != keys[5].here || table.find(h[5]) != nil || table.find(late) != k {
		t.Fatalf("the place of an idle key is not used: %+v", k)
	}
	if _, ok := keys[5].claim(1, now); ok {
		t.Error("a key that nobody finds asks for a lease")
	}
	if table.key(ls, later, now) != nil {
		t.Error("there is room for two in the place of one")
	}
	for i := range keys {
		if is := table.find(h[i]); i != 5 && is != keys[i] {
			t.Errorf("key %d is lost", i)
		}
	}
}

// Who has found a key before its place became another's takes, returns and drops nothing of
// that; nor does that take what was left there, even by an instant at which it had not ended.
func TestAPlaceThatHasBecomeAnothersIsClosedToItsFormerKey(t *testing.T) {
	_, l := patientRing(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	h := neighbors(leaseTries)
	for name, other := range map[string]keyHash{
		"another key": {999, h[0].lo + 999*leasePlaces}, "the same lower half": {999, h[0].lo}, "the same upper half": {h[0].hi, h[0].lo + 999*leasePlaces},
	} {
		t.Run(name, func(t *testing.T) { handOver(t, l, h, other) })
	}
}

// handOver gives the place of the first of some keys, in a full neighborhood, to another.
func handOver(t *testing.T, l *Limiter, h []keyHash, other keyHash) {
	var table leaseTable
	ls := l.lease
	for i, is := range h {
		if k := table.key(ls, is, 0); i > 0 {
			k.way.Store(asking)
		}
	}
	old := table.find(h[0])
	w := old.here.begin(terms{units: 5, asked: 1})
	word, _, ok := old.here.lend(h[0], ls, 2)
	if !ok || !old.here.open(word) {
		t.Fatal("nothing can be lent")
	}
	now := idle(0)
	k := table.key(ls, other, now)
	if k == nil || k.here != old.here {
		t.Fatal("the place is not the other's")
	}
	// What was left: with a clock that was read before the key was forgotten.
	if g, _, _, _ := table.take(ls, other, 1, 2); g != nil || k.rest(2) != 0 || k.due(2, 2) {
		t.Error("what the former key left is used")
	}
	if old.here.goAhead(w) || old.here.open(word) {
		t.Error("a lease goes on in the place of another key")
	}
	old.here.close(w)
	is := k.here.begin(terms{units: 7, asked: now, remaining: 9, score: 3})
	if g, _, _, _ := old.take(ls, 1, now); g != nil || old.rest(now) != 0 || old.due(now, now) {
		t.Error("the former key uses a lease of the other")
	}
	if g, _, _, _ := table.take(ls, old.hash, 1, now); g != nil {
		t.Error("the former key is found")
	}
	r := l.ring.newRequest(opCharge, l.rule, old.hash, 1)
	if ls.takeOut(r, old, now); r.back != 0 {
		t.Errorf("the former key returns %d units", r.back)
	}
	r.release()
	r.release()
	old.drop(now + 1)
	if unused, _ := old.here.settle(old.hash, ls, now); unused != 0 {
		t.Errorf("%d units of the other are settled", unused)
	}
	if k.here.load(other) != is || k.rest(now) != 7 {
		t.Errorf("%d units are left to the other, word %x, want %x", k.rest(now), k.here.load(other), is)
	}
}

// A second lease is seen in the line of the first, for as long as there may be something of
// it, so that nobody else has to look for it.
func TestASecondLeaseIsSeenInTheLineOfTheFirst(t *testing.T) {
	var table leaseTable
	_, l := patientRing(t, TokenBucket{Rate: 1, Per: time.Hour, Burst: 1000}, Lease{Max: 50})
	ls, h, now := l.lease, keyHash{1, 2}, l.ring.clock()
	k := table.key(ls, h, now)
	if _, ok := k.claim(1, now); !ok {
		t.Fatal("somebody else asks")
	}
	second := func() bool { return k.here.bare()&grantSecond != 0 }
	take := func(want *grant, left int64) {
		t.Helper()
		g, w, _, rest := table.take(ls, h, 1, now+1)
		if g != want || g != nil && (w.left() < 0 || rest != left) {
			t.Fatalf("taken of %p, want %p; %d left, want %d", g, want, rest, left)
		}
	}
	if k.add(terms{units: 2, asked: now - 2}, now); second() {
		t.Error("one lease is two")
	}
	at, _ := table.all.Load().look(h)
	table.all.Load().keys[at].Store(nil)
	take(k.here, 1) // without looking at the key
	table.all.Load().keys[at].Store(k)
	if k.add(terms{units: 3, asked: now - 1}, now); !second() {
		t.Error("a second lease is not seen")
	}
	spare := k.spare.Load()
	take(k.here, 3)
	take(spare, 2)
	// The next one is in the first place, and the second still has something.
	if k.add(terms{units: 4, asked: now}, now); !second() {
		t.Error("a second lease is not seen behind one that came later")
	}
	take(spare, 5)
	take(spare, 4)
	for left := range int64(4) {
		take(k.here, 3-left)
	}
	take(nil, 0)
	if k.add(terms{units: 1, asked: now}, now); second() {
		t.Error("a lease that is used up is looked for")
	}
	word, _, ok := k.here.lend(h, ls, now)
	if k.here.mark(); !ok || !k.here.open(word) {
		t.Error("what was not returned is lost where a second lease came meanwhile")
	}
	take(k.here, 0)
	k.asked()
}

// One place goes from key to key while calls take of both, some by a clock that was read long
// ago. Everybody takes of the leases of its own key, and no unit is given out twice.
func TestAPlaceGoesFromKeyToKeyWhileCallsTake(t *testing.T) {
	const leases, units = 20_000, 7
	var table leaseTable
	ls := tableLeases()
	h := neighbors(leaseTries + 1)
	for i, is := range h[:leaseTries] { // one place is left to two keys
		if k := table.key(ls, is, 0); i > 0 {
			k.way.Store(asking)
		}
	}
	two := [2]keyHash{h[0], h[leaseTries]}
	taken := make([]atomic.Int64, leases+1)
	var ended atomic.Bool
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			of := i % 2
			for cost := int64(1); !ended.Load(); cost = cost%3 + 1 {
				g, w, told, _ := table.take(ls, two[of], cost, 0)
				if g == nil {
					runtime.Gosched() // or the one who begins leases waits for a time slice
					continue
				}
				// What a lease was told says whose it is, and which.
				if told.asked%2 != int64(of) || told.remaining != 2*told.asked || told.reset != 3*told.asked || w.left() > units-cost {
					t.Errorf("key %d is told of the lease asked for at %d, with %d remaining, %d to go and %d left", of, told.asked, told.remaining, told.reset, w.left())
					return
				}
				taken[told.asked].Add(cost)
			}
		})
	}
	returned := make([]int64, leases+1)
	for n := int64(1); n <= leases && !t.Failed(); n++ {
		k := table.key(ls, two[n%2], n*idle(0))
		if k == nil {
			t.Fatalf("lease %d has no place", n)
		}
		k.here.begin(terms{units: units, asked: n, remaining: 2 * n, reset: 3 * n, score: 4 * n})
		if n%2 == 0 || n%3 == 0 {
			runtime.Gosched()
		}
		if returned[n] = -1; n%4 < 2 {
			continue // it ends
		}
		lent, score, ok := k.here.lend(k.hash, ls, 0)
		if returned[n] = 0; ok {
			if returned[n] = lent.left(); score != 4*n {
				t.Errorf("lease %d is returned with score %d", n, score)
			}
		}
	}
	ended.Store(true)
	wg.Wait()
	var all, back int64
	for n := range taken {
		is := taken[n].Load()
		if n > 0 && (is > units || returned[n] >= 0 && is+returned[n] != units) {
			t.Errorf("lease %d: of %d units %d were taken and %d returned", n, units, is, returned[n])
		}
		all += is
		back += max(0, returned[n])
	}
	if all < units || back < units {
		t.Errorf("%d were taken and %d returned: that shows little", all, back)
	}
}

// The table takes milliseconds to make where memory is used again: that is done before the first
// call, and not at all where nothing can be taken ahead.
func TestTheTableOfLeasesIsThereBeforeTheFirstCall(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	bucket := TokenBucket{Rate: 1000, Per: time.Minute, Burst: 1000}
	if r, _ := leaseRing(t, s.URL(), bucket, Lease{Max: 1}); r.leases.all.Load() != nil {
		t.Error("there is a table for leases of one unit, which save nothing")
	}
	r, _ := leaseRing(t, s.URL(), bucket, Lease{Max: 64})
	p := r.leases.all.Load()
	if p == nil {
		t.Fatal("there is no table for leases yet")
	}
	_, err := r.Limiter("another", bucket, WithLease(Lease{Max: 64}))
	aclMust(t, err)
	if r.leases.all.Load() != p {
		t.Error("another limiter has made another table")
	}
}
