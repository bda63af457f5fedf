package ringfence

import (
	"fmt"
	"math/bits"
	"strconv"
	"time"
)

// algorithm is the number by which the scripts know an algorithm.
type algorithm uint8

const (
	algoTokenBucket algorithm = 1
	algoSlidingLog  algorithm = 2
)

// algorithmNames go into the hash of a key, so that a limiter whose algorithm changes
// starts fresh instead of finding a value of another type.
var algorithmNames = map[algorithm]string{
	algoTokenBucket: "token_bucket",
	algoSlidingLog:  "sliding_log",
}

// rule is a validated limit in the numbers the scripts work with. All times are us.
type rule struct {
	algo     algorithm
	capacity int64 // most units a key can have left
	maxCost  int64 // highest cost of one call
	window   int64 // log: the window; bucket: the time to fill, rounded up

	// Token bucket: n tokens every p us in lowest terms; p = pq*n + pr; the whole
	// bucket is worth bq us and br n-ths of one.
	n, p, pq, pr, bq, br int64

	args  [limitArgs]any // what the script gets
	words string         // the same as it is sent
	brief string         // the first of a bucket without fractions in the short form, else empty
}

const micro = int64(time.Microsecond)

// maxFill is MaxWindow in us.
const maxFill = int64(MaxWindow / time.Microsecond)

func (b TokenBucket) compile() (*rule, error) {
	const field = "TokenBucket."
	if b.Rate < 1 {
		return nil, invalid(field+"Rate", b.Rate, "must be at least 1 (units every Per)")
	}
	if b.Per < time.Microsecond || b.Per > MaxWindow || b.Per%time.Microsecond != 0 {
		return nil, invalid(field+"Per", b.Per, "must be whole microseconds, from 1µs to %s", MaxWindow)
	}
	if b.Burst < 1 {
		return nil, invalid(field+"Burst", b.Burst, "must be at least 1 (the highest cost of one call)")
	}
	per := int64(b.Per) / micro
	g := gcd(b.Rate, per)
	n, p := b.Rate/g, per/g
	// The scripts multiply costs up to Burst by numbers below n (token_bucket.lua), and
	// an empty bucket may take MaxWindow to fill: Burst * p <= MaxWindow * n.
	exact := maxExact/n - 1
	if exact < 1 {
		return nil, invalid(field+"Rate", b.Rate,
			"with Per = %s it is %d every %dµs in lowest terms, too fine for exact arithmetic whatever the Burst; take a rounder Rate",
			b.Per, n, p)
	}
	fills := int64(maxInt64)
	if hi, lo := bits.Mul64(uint64(maxFill), uint64(n)); hi < uint64(p) {
		if q, _ := bits.Div64(hi, lo, uint64(p)); q < maxInt64 {
			fills = int64(q)
		}
	}
	if most := min(exact, fills); b.Burst > most {
		reason := fmt.Sprintf("an empty bucket would take over %s to fill", MaxWindow)
		if exact < fills {
			reason = fmt.Sprintf("the arithmetic would not be exact, for that is %d every %dµs in lowest terms", n, p)
		}
		return nil, invalid(field+"Burst", b.Burst,
			"must be at most %d with Rate = %d and Per = %s (above that %s); take a smaller Burst or another Rate",
			most, b.Rate, b.Per, reason)
	}
	hi, lo := bits.Mul64(uint64(b.Burst), uint64(p))
	bq, br := bits.Div64(hi, lo, uint64(n))
	r := &rule{
		algo: algoTokenBucket, capacity: b.Burst, maxCost: b.Burst,
		n: n, p: p, pq: p / n, pr: p % n, bq: int64(bq), br: int64(br),
	}
	r.window = r.bq
	if r.br > 0 {
		r.window++
	}
	unit := strconv.FormatInt(n, 10) + ":" + strconv.FormatInt(p, 10) + ":" + strconv.FormatInt(b.Burst, 10)
	r.setArgs(r.n, r.pq, r.pr, r.bq, r.br, b.Burst)
	r.args[limitArgs-1] = unit
	r.seal()
	return r, nil
}

func (l SlidingLog) compile() (*rule, error) {
	const field = "SlidingLog."
	if l.Limit < 1 || l.Limit > MaxLogLimit {
		return nil, invalid(field+"Limit", l.Limit, "must be 1 to %d; for more take a TokenBucket", MaxLogLimit)
	}
	if l.Window < MinWindow || l.Window > MaxWindow || l.Window%time.Microsecond != 0 {
		return nil, invalid(field+"Window", l.Window, "must be whole microseconds, from %s to %s", MinWindow, MaxWindow)
	}
	r := &rule{
		algo: algoSlidingLog, capacity: l.Limit, maxCost: min(l.Limit, MaxLogCost),
		window: int64(l.Window) / micro,
	}
	r.setArgs(l.Limit, r.window)
	r.seal()
	return r, nil
}

// ahead is the rule as a lease's charge says it: a log's scores what it adds life us ahead.
func (r *rule) ahead(life int64) *rule {
	if r.algo != algoSlidingLog {
		return r
	}
	a := *r
	a.setArgs(r.capacity, r.window, life)
	a.seal()
	return &a
}

// takeBack adds units to the debit that takes back what was taken ahead: all of them
// together a bucket's, each lease's with its score a log's.
func (r *rule) takeBack(debit string, all, units, score int64) string {
	if r.algo != algoSlidingLog {
		return "-" + strconv.FormatInt(all, 10)
	}
	if debit == "" {
		debit = "-"
	} else {
		debit += ","
	}
	return debit + strconv.FormatInt(units, 10) + "@" + strconv.FormatInt(score, 10)
}

// seal makes the words of the arguments.
func (r *rule) seal() {
	var b []byte
	for _, a := range r.args {
		b = appendBulk(b, a.(string))
	}
	r.words = string(b)
	if r.algo == algoTokenBucket && r.n == 1 {
		b = b[:0]
		for _, i := range []int{7, 4} { // unit, bq
			b = appendBulk(b, r.args[i].(string))
		}
		r.brief = string(b)
	}
}

func (r *rule) setArgs(numbers ...int64) {
	r.args[0] = strconv.Itoa(int(r.algo))
	for i := 1; i < limitArgs; i++ {
		r.args[i] = "0"
		if i <= len(numbers) {
			r.args[i] = strconv.FormatInt(numbers[i-1], 10)
		}
	}
}

// state is what the scripts say of a key after a call: the a, b, c of one reply entry,
// described in scripts/token_bucket.lua and scripts/sliding_log.lua.
type state struct{ a, b, c int64 }

// plausible says whether a script can have said so: the arithmetic below is for such
// states only.
func (r *rule) plausible(s state) bool {
	if min(s.a, s.b, s.c) < 0 || max(s.a, s.b, s.c) >= maxExact {
		return false
	}
	return r.algo == algoSlidingLog || (s.b < r.n && (s.a < r.bq || (s.a == r.bq && s.b <= r.br)))
}

// remaining returns the whole units left.
func (r *rule) remaining(s state) int64 {
	if r.algo == algoSlidingLog {
		return max(0, r.capacity-s.a)
	}
	// (bq - d) * n + (br - r) n-ths of a us are there; a token is p of them.
	whole, part := r.bq-s.a, r.br-s.b
	if part < 0 {
		whole, part = whole-1, part+r.n
	}
	if whole < 0 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(whole), uint64(r.n))
	lo, carry := bits.Add64(lo, uint64(part), 0)
	q, _ := bits.Div64(hi+carry, lo, uint64(r.p))
	return int64(q)
}

// retryAfter returns the us until a call of this cost fits, 0 if it does now.
func (r *rule) retryAfter(s state, cost int64) int64 {
	if r.algo == algoSlidingLog {
		return s.b
	}
	part := s.b + cost*r.pr
	whole := s.a + cost*r.pq + part/r.n
	part %= r.n
	wait := whole - r.bq
	if part > r.br {
		wait++
	}
	if wait <= 0 {
		return 0
	}
	return wait + s.c
}

// resetAfter returns the us until nothing is used any more.
func (r *rule) resetAfter(s state) int64 {
	if r.algo == algoSlidingLog {
		return s.c
	}
	wait := s.a
	if s.b > 0 {
		wait++
	}
	if wait == 0 {
		return 0
	}
	return wait + s.c
}

// decide fills in what a Decision says of the limit.
func (r *rule) decide(s state, allowed bool, cost int64) Decision {
	d := Decision{
		Allowed:    allowed,
		Limit:      r.capacity,
		Remaining:  r.remaining(s),
		ResetAfter: time.Duration(r.resetAfter(s)) * time.Microsecond,
	}
	if !allowed {
		d.RetryAfter = time.Duration(r.retryAfter(s, cost)) * time.Microsecond
	}
	return d
}

func gcd(a, b int64) int64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}
