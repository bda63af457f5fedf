package ringfence

// Coalescing: the calls of one batch that ask for the same cost of one key are one entry
// of the script, which admits as many of them as fit, first come, first served. All that
// a script call decides it decides as of one instant, so this is what one call after
// another would have come to; what each of them would have been told follows from what
// the entry is told (see rule.before).
//
// Calls of different costs are entries of their own, in the order in which the calls came:
// an entry is closed for good by the next one of its key.

// group are the requests that an entry stands for, the first being the entry itself.
type group struct {
	follow *request // the next one
	tail   *request // in the first: the last one
	leaser *request // in the first: the one of them that wants more, for a lease
}

// more is how many calls an entry asks for beyond those it stands for, for a lease.
func (r *request) more() int64 {
	if r.leaser == nil {
		return 0
	}
	return r.leaser.wants
}

// grouper forms the entries of one batch.
type grouper struct {
	table []groupSlot // by hash, open addressing
	stamp uint32      // of this batch: what has another is empty
	calls int
}

type groupSlot struct {
	stamp uint32
	last  *request // the newest entry of its key
}

// maxCalls is how many calls a batch of n entries carries at most: of one entry, just one,
// so that nothing is coalesced where nothing is to be batched.
func maxCalls(n int) int {
	if n == 1 {
		return 1
	}
	return 16 * n
}

func newGrouper(entries int) grouper {
	size := 16
	for size < 2*entries {
		size *= 2
	}
	return grouper{table: make([]groupSlot, size)}
}

func (g *grouper) reset() {
	g.calls = 0
	if g.stamp++; g.stamp == 0 {
		clear(g.table)
		g.stamp = 1
	}
}

// find is the place of a key.
func (g *grouper) find(h keyHash) *groupSlot {
	mask := uint64(len(g.table) - 1)
	for i := h.lo & mask; ; i = (i + 1) & mask {
		s := &g.table[i]
		if s.stamp != g.stamp || s.last.hash == h {
			return s
		}
	}
}

// joins says whether a request can be part of the newest entry of its key.
func (g *grouper) joins(r *request) bool {
	s := g.find(r.hash)
	if s.stamp != g.stamp {
		return false
	}
	e := s.last
	// What tells a debit tells it before its own call, so it begins an entry; and what only
	// tells a debit admits nobody.
	return e.rule == r.rule && e.cost == r.cost && e.count > 0 && r.count == 1 && r.debit == "" &&
		(e.leaser == nil || r.wants == 0)
}

// add puts a request into the batch, and returns the batch.
func (g *grouper) add(batch []*request, r *request) []*request {
	g.calls++
	s := g.find(r.hash)
	if s.stamp == g.stamp && g.joins(r) {
		e := s.last
		if r.kind == opCharge {
			e.count++
		}
		e.tail.follow = r
		e.tail = r
		if r.wants > 0 {
			e.leaser = r
		}
		return batch
	}
	s.stamp, s.last = g.stamp, r
	r.group = group{tail: r}
	if r.wants > 0 {
		r.leaser = r
	}
	return append(batch, r)
}

// spread gives every request of an entry its own part of the reply.
func spread(e *request) {
	granted, count, s := e.granted, e.count, e.state
	e.count = min(count, 1)
	leaser := e.leaser
	if leaser != nil {
		leaser.whole = s
	} else if e.follow == nil {
		return
	}
	now, status := e.now, e.status
	for i, r := int64(0), e; r != nil; i, r = i+1, r.follow {
		r.now, r.status, r.failed = now, status, e.failed
		switch {
		case e.kind == opLook || status != statusDecided:
			r.granted, r.state = granted, s
		case i < granted:
			r.granted, r.state = 1, r.rule.before(s, (granted-1-i)*r.cost)
		default:
			r.granted, r.state = 0, s
		}
	}
	if leaser != nil && status == statusDecided {
		leaser.extra = max(0, granted-count)
	}
}

// before is the state as it was when the last units units had not been taken yet.
func (r *rule) before(s state, units int64) state {
	if r.algo == algoSlidingLog {
		return state{a: s.a - units, c: s.c}
	}
	// units * pr is below 2^53, see token_bucket.lua.
	part := units * r.pr
	s.a -= units*r.pq + part/r.n
	if s.b -= part % r.n; s.b < 0 {
		s.a, s.b = s.a-1, s.b+r.n
	}
	return s
}
