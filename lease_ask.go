package ringfence

import "time"

// begin makes a request for a call ask for a lease too, unless somebody does already. What
// is held and was too little for the call goes back on the way: the primary is to decide
// by all there is.
func (ls *leasing) begin(r *request, now int64) {
	if ls == nil || ls.bound == 0 || r.debit != "" {
		return
	}
	k := ls.of.ring.leases.key(ls, r.hash, now)
	if k == nil {
		return
	}
	chunk, ok := k.claim(r.cost, now)
	if !ok {
		return
	}
	r.heir = k
	ls.giveBack(r, k, now)
	if chunk > 1 && chunk >= r.cost {
		ls.want(r, chunk/r.cost, now)
	}
}

// want makes a request ask for so many calls of its cost, for a lease.
func (ls *leasing) want(r *request, calls, now int64) {
	r.rule, r.wants, r.asked, r.from = ls.rule, calls, now, ls.of
}

// giveBack closes what is held of a key and puts it onto a request. The key is claimed.
func (ls *leasing) giveBack(r *request, k *leaseKey, now int64) {
	for i := range k.grants {
		if g := k.grants[i].Load(); g != nil && now < g.until {
			n := g.close()
			k.given -= n
			k.grants[i].CompareAndSwap(g, nil)
			ls.back(r, g, n)
		}
	}
}

// back puts units of a lease onto a request that takes them back.
func (ls *leasing) back(r *request, g *grant, units int64) {
	if units > 0 {
		r.back += units
		r.from = ls.of
		r.debit = ls.rule.takeBack(r.debit, r.back, units, g.score)
	}
}

// inherit gives the key that was claimed for a request what came of it: as soon as the answer
// is there, whether or not its caller is still waiting; without an answer when nobody needs
// the request any more.
func (r *request) inherit() {
	if k := r.heir; k != nil {
		r.heir = nil
		k.of.arrived(k, r)
	}
}

// arrived ends what claim began: it keeps what a request was granted beyond what its own
// call needed.
func (ls *leasing) arrived(k *leaseKey, r *request) {
	defer k.asked()
	units := r.extra * r.cost
	if units < 1 { // denied, failed or never sent
		return
	}
	now, rl := ls.of.ring.clock(), ls.of.rule
	left := rl.remaining(r.whole)
	k.room.Store(left)
	until := r.asked + ls.life - ls.life/1000 // two clocks differ in rate, see near.go
	g := &grant{
		key: k, units: units, asked: r.asked, until: until, score: r.whole.b,
		remaining: left, reset: time.Duration(rl.resetAfter(r.whole)) * time.Microsecond,
	}
	// A key of which little is left was new here: what is too much goes back at once.
	g.units = min(units, max(1, (left+units)/leaseOfRemaining))
	g.low = g.units / 4
	g.left.Store(g.units)
	if now >= until || !k.add(g) { // after a Reset nothing is returned, either
		g.close()
		return
	}
	if !ls.watch(g, now) {
		g.close()
	}
	ls.giveUp(g, units-g.units, now)
}

// prefetch asks for the next lease of a key while there is something left of this one, so
// that nobody waits for it.
func (ls *leasing) prefetch(s *shard, k *leaseKey, now int64) {
	if !s.takesReturns() || s.owing() {
		return
	}
	chunk, ok := k.claim(0, now)
	if !ok {
		return
	}
	if chunk -= k.given; chunk < 2 { // given is what is held now
		k.asked()
		return
	}
	r := ls.newRequest(k)
	ls.want(r, chunk, now)
	ls.send(s, r, now)
}

// newRequest is a request that nobody waits for: a key's, which is claimed, or nil.
func (ls *leasing) newRequest(k *leaseKey) *request {
	r := ls.of.ring.newRequest(opCharge, ls.rule, k.hash, 1)
	r.count, r.heir = 0, k
	return r
}

// send sends such a request.
func (ls *leasing) send(s *shard, r *request, now int64) {
	err := s.charges.send(r, now+int64(ls.of.budget))
	if err != nil {
		s.charges.settle(r, err)
		r.release()
	}
	r.release()
}
