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
		ls.want(r, k, chunk/r.cost, now)
	}
}

// beginMany is begin for the entry i of an AllowMany. If another of the call has asked for the
// key already, it asks for no lease: the later ones are to find what the earlier ones leave.
func (ls *leasing) beginMany(entries []manyEntry, i int, now int64) {
	if ls == nil || ls.bound == 0 {
		return
	}
	r := entries[i].req
	if ls.begin(r, now); r.heir != nil {
		r.heir.call.Store(&entries[0])
		return
	}
	k := ls.of.ring.leases.find(r.hash)
	if k == nil || k.call.Load() != &entries[0] {
		return
	}
	for _, e := range entries[:i] {
		if q := e.req; q != nil && q.heir == k {
			q.rule, q.wants = ls.of.rule, 0
			k.way.And(^toHere)
		}
	}
	k.call.Store(nil) // further ones have nothing to take away
}

// want makes a request ask for so many calls of its cost, for a lease; of a log for no more
// than a call may add, with the call's own.
func (ls *leasing) want(r *request, k *leaseKey, calls, now int64) {
	if ls.rule.algo == algoSlidingLog {
		calls = min(calls, MaxLogCost/r.cost-r.count)
	}
	if calls > 0 {
		r.rule, r.wants, r.asked, r.from = ls.rule, calls, now, ls.of
		k.way.Or(toHere)
	}
}

// giveBack closes what is held of a key and puts it onto a request. The key is claimed.
func (ls *leasing) giveBack(r *request, k *leaseKey, now int64) {
	if k.rest(now) == 0 { // only who has claimed the key makes it more
		return
	}
	k.way.Or(toThere) // first: at no time are units neither held nor on their way
	if ls.takeOut(r, k, now); r.back == 0 {
		k.way.And(^toThere)
	}
	k.given -= int16(r.back)
}

// takeOut is giveBack without a claim.
func (ls *leasing) takeOut(r *request, k *leaseKey, now int64) {
	for g := range k.places {
		if w, score, ok := g.lend(k.hash, ls, now); ok {
			ls.back(r, lent{key: k, grant: g, word: w}, score)
		}
	}
}

// back puts units of a lease onto a request that takes them back.
func (ls *leasing) back(r *request, b lent, score int64) {
	i := 0
	if r.back > 0 {
		i = 1
	}
	r.lent[i] = b
	units := b.units()
	r.back += units
	r.from = ls.of
	r.debit = ls.rule.takeBack(r.debit, r.back, units, score)
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
	k.noteRoom(left)
	t := terms{
		units: units, asked: r.asked, remaining: left,
		reset: int64(time.Duration(rl.resetAfter(r.whole)) * time.Microsecond), score: r.whole.b,
	}
	if now < ls.end(t.asked) {
		k.add(t, now)
	}
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
	if chunk -= int64(k.given); chunk < 2 { // given is what is held now
		k.asked()
		return
	}
	r := ls.newRequest(k)
	ls.want(r, k, chunk, now)
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
