// Package model is the referee of the Redis scripts: the same limits once more, slow,
// exact and as plain as the definition. A bucket holds its tokens as a rational number,
// a log is the list of its hits; nothing is scaled, packed or rounded on the way.
//
// It was written from what the limits mean and shares no code with the scripts or with
// the package above, so that a mistake would have to be made twice to go unseen.
//
// Time is the server's, in microseconds, and comes in as a parameter. A key does not
// know when it expires: Charge returns the time to live that it needs, and whoever plays
// the server gives it SpareMillis more when the Trace says Renewed, and calls Forget when
// that has passed.
package model

import (
	"math/big"
	"slices"
)

// Call is one entry of a script call.
type Call struct {
	Cost  int64 // units each caller asks for
	Count int64 // callers, first come first served
	// Debit is what was admitted elsewhere, taken without asking. For a bucket only
	// the units count.
	Debit []Debit
	// Back is what was taken ahead and is given back; a call has that or a Debit. For a
	// bucket only the units count.
	Back []Back
	// More is how many further calls of this cost are taken ahead, if all callers are
	// admitted: as many as need no more than an eighth of what is left then.
	More int64
	// Ahead is for how many us the units are taken ahead, if any are; a bucket takes no
	// notice.
	Ahead int64
}

// Debit is a number of units and how long ago they were admitted, in us.
type Debit struct{ Units, Age int64 }

// Back is a number of units and the instant for which they had been taken, by the key's
// own clock.
type Back struct{ Units, Score int64 }

// Answer is what the callers are told. All times are us.
type Answer struct {
	Granted    int64 // how many of the callers were admitted, or would be, and of More
	Remaining  int64 // whole units left
	RetryAfter int64 // until a call of this cost fits; 0 if all were admitted
	ResetAfter int64 // until nothing is used any more
	Score      int64 // log: for which instant units were taken ahead, if any were
}

// Trace says what an answer was about, for counting what a test has exercised.
type Trace struct {
	Refilled   bool // a bucket that was not full gained tokens
	StoodStill bool // the server's clock was behind and the key's clock waited for it
	Anchored   bool // it was too far behind, and the key's clock did not wait
	Converted  bool // a bucket was written under another limit
	Anew       bool // a log of which nothing counted any more was started anew
	Trimmed    bool // a log forgot some hits and kept others that no longer count
	// Renewed: the key got another time to live. It was made or mended, or the end of a
	// bucket's use passed into another minute. A log gets one, too, when it has less than
	// Charge returns.
	Renewed bool

	// How many hits of a log leave the window at this very instant, one us later,
	// and left it one us ago.
	Leaving, LastMicro, JustLeft int
}

// SpareMillis is what a key gets beyond the time to live it needs, so that it need not be
// given another before the minute of its end is over.
const SpareMillis = 60_000

// minute says in which minute an instant lies.
func minute(us int64) int64 { return us / (SpareMillis * 1000) }

// slackMillis is what the scripts add to the time a key is needed for.
const slackMillis = 5000

// millis is the time to live of a key that is needed for us more: never too short.
func millis(us int64) int64 { return us/1000 + 1 + slackMillis }

// BucketLimit is Rate tokens every Per us, at most Burst.
type BucketLimit struct{ Rate, Per, Burst int64 }

func rat(v int64) *big.Rat { return new(big.Rat).SetInt64(v) }

func floor(r *big.Rat) int64 {
	return new(big.Int).Div(r.Num(), r.Denom()).Int64() // Euclidean; denominators are positive
}

func ceil(r *big.Rat) int64 { return -floor(new(big.Rat).Neg(r)) }

// same says whether two limits are one: 1,000 every second is 1 every millisecond.
func (l BucketLimit) same(o BucketLimit) bool {
	return l.Burst == o.Burst && big.NewRat(l.Rate, l.Per).Cmp(big.NewRat(o.Rate, o.Per)) == 0
}

// gain is how many tokens come back in us.
func (l BucketLimit) gain(us int64) *big.Rat {
	return new(big.Rat).Mul(rat(us), big.NewRat(l.Rate, l.Per))
}

// time is how many us it takes until so many tokens have come back.
func (l BucketLimit) time(tokens *big.Rat) *big.Rat {
	return new(big.Rat).Mul(tokens, big.NewRat(l.Per, l.Rate))
}

// fill is how many whole us an empty bucket takes to fill.
func (l BucketLimit) fill() int64 { return floor(l.time(rat(l.Burst))) }

// round is what a bucket of this limit makes of tokens left by another: no more than it
// holds, in whole steps of those in which it fills. With Rate/Per in lowest terms, tokens
// come in Per-ths.
func (l BucketLimit) round(tokens *big.Rat) *big.Rat {
	steps := big.NewRat(l.Per, l.Rate).Num()
	down := new(big.Int).Mul(tokens.Num(), steps)
	down.Div(down, tokens.Denom())
	rounded := new(big.Rat).SetFrac(down, steps)
	if full := rat(l.Burst); rounded.Cmp(full) > 0 {
		return full
	}
	return rounded
}

// Bucket is one key of a token bucket. The zero value is a fresh one: full.
type Bucket struct {
	limit  BucketLimit // under which it was last written
	tokens *big.Rat    // as of last; nil: fresh
	last   int64       // the instant, by the server's clock, of which tokens speaks
}

// Forget makes the key fresh, as its expiry does.
func (b *Bucket) Forget() { *b = Bucket{} }

// Exists says whether the key has been written and not forgotten.
func (b *Bucket) Exists() bool { return b.tokens != nil }

// view is the bucket as of now under this limit: its tokens, and the instant at which
// its clock stands.
func (b *Bucket) view(l BucketLimit, now int64) (tokens *big.Rat, clock int64, tr Trace) {
	if b.tokens == nil {
		return rat(l.Burst), now, tr
	}
	tokens, clock = b.tokens, b.last
	switch {
	case now >= b.last:
		full := rat(b.limit.Burst)
		tr.Refilled = now > b.last && tokens.Cmp(full) < 0
		tokens = new(big.Rat).Add(tokens, b.limit.gain(now-b.last))
		if tokens.Cmp(full) > 0 {
			tokens = full
		}
		clock = now
	case b.last-now <= b.limit.fill():
		tr.StoodStill = true
	default:
		tr.Anchored = true
		clock = now
	}
	if !l.same(b.limit) {
		tr.Converted = true
		tokens = l.round(tokens)
	}
	return tokens, clock, tr
}

// full is the instant, by the bucket's own clock, by which it is full but for less than 1 us.
func (b *Bucket) full() int64 {
	if b.tokens == nil {
		return 0
	}
	return b.last + floor(b.limit.time(new(big.Rat).Sub(rat(b.limit.Burst), b.tokens)))
}

// take grants the callers one by one, and after them what is taken ahead.
func take(tokens *big.Rat, c Call) (granted int64, left *big.Rat) {
	cost := rat(c.Cost)
	for granted < c.Count && tokens.Cmp(cost) >= 0 {
		tokens = new(big.Rat).Sub(tokens, cost)
		granted++
	}
	if granted == c.Count {
		more := c.ahead(floor(tokens))
		tokens = new(big.Rat).Sub(tokens, rat(more*c.Cost))
		granted += more
	}
	return granted, tokens
}

// ahead is how many further calls are taken ahead with so many units left.
func (c Call) ahead(left int64) (calls int64) {
	for calls < c.More && (calls+1)*c.Cost*8 <= left {
		calls++
	}
	return calls
}

// Charge decides a call and takes what it was granted. ttl is the time to live the key
// needs, in milliseconds, or 0 when nothing is written.
func (b *Bucket) Charge(l BucketLimit, now int64, c Call) (a Answer, ttl int64, tr Trace) {
	tokens, clock, tr := b.view(l, now)
	write := tr.Anchored || tr.Converted
	for _, d := range c.Debit {
		tokens = new(big.Rat).Sub(tokens, rat(d.Units))
		if tokens.Sign() < 0 {
			tokens = rat(0)
		}
		write = true
	}
	tr.Renewed = write || b.tokens == nil
	for _, d := range c.Back { // brings the end of its use forward only
		if tokens = new(big.Rat).Add(tokens, rat(d.Units)); tokens.Cmp(rat(l.Burst)) > 0 {
			tokens = rat(l.Burst)
		}
		write = true
	}
	granted, tokens := take(tokens, c)
	if granted > 0 || write {
		before := b.full()
		b.limit, b.tokens, b.last = l, tokens, clock
		tr.Renewed = tr.Renewed || minute(b.full()) > minute(before)
		// Needed until it is full by its own clock: then it is as good as fresh.
		ttl = millis(floor(l.time(new(big.Rat).Sub(rat(l.Burst), tokens))) + clock - now)
	}
	a = answer(l, tokens, clock-now, c.Cost)
	a.Granted = granted
	if granted >= c.Count {
		a.RetryAfter = 0
	}
	return a, ttl, tr
}

// Look says what Charge would grant, and how the bucket is without it.
func (b *Bucket) Look(l BucketLimit, now int64, c Call) (Answer, Trace) {
	c.More = 0
	tokens, clock, tr := b.view(l, now)
	a := answer(l, tokens, clock-now, c.Cost)
	a.Granted, _ = take(tokens, c)
	return a, tr
}

// answer is what follows from so many tokens when the key's clock stands still for gap.
func answer(l BucketLimit, tokens *big.Rat, gap, cost int64) Answer {
	wait := func(target int64) int64 {
		missing := new(big.Rat).Sub(rat(target), tokens)
		if missing.Sign() <= 0 {
			return 0
		}
		return gap + ceil(l.time(missing))
	}
	return Answer{Remaining: floor(tokens), RetryAfter: wait(cost), ResetAfter: wait(l.Burst)}
}

// Instants are the instants of the server's clock at which, or next to which, something
// about the key changes.
func (b *Bucket) Instants(l BucketLimit, now, cost int64) []int64 {
	if b.tokens == nil {
		return nil
	}
	a, _ := b.Look(l, now, Call{Cost: cost, Count: 1})
	return []int64{
		now + a.RetryAfter, // the call fits
		now + a.ResetAfter, // full
		b.last,             // its clock moves again
		b.last - b.limit.fill(),
	}
}

// LogLimit is at most Limit units in any window of Window us.
type LogLimit struct{ Limit, Window int64 }

// Log is one key of a sliding log. The zero value is a fresh one: empty.
type Log struct {
	hits   []int64 // the instants of its units by the key's own clock, rising
	offset int64   // by which that clock is ahead of the server's
	lead   int64   // by which the latest hit was ahead of that clock when it was last at work on it
}

// Forget makes the key fresh, as its expiry does.
func (g *Log) Forget() { *g = Log{} }

// Exists says whether the key has been written and not forgotten.
func (g *Log) Exists() bool { return len(g.hits) > 0 }

// Stored is how many hits are kept, whether they count or not.
func (g *Log) Stored() int { return len(g.hits) }

// view is the log as of now: the instant on the key's clock, for how long that stands
// still, the offset, and how many of the hits no longer count.
func (g *Log) view(l LogLimit, now int64) (clock, gap, offset int64, gone int, tr Trace) {
	clock, offset = now+g.offset, g.offset
	if len(g.hits) == 0 {
		return clock, 0, offset, 0, tr
	}
	newest := g.hits[len(g.hits)-1] - g.lead // the clock was there, and never goes back
	if behind := newest - clock; behind > l.Window {
		tr.Anchored = true
		clock, offset = newest, offset+behind
	} else if behind > 0 {
		tr.StoodStill = true
		clock, gap = newest, behind
	}
	for _, hit := range g.hits {
		left := hit + l.Window - clock // us for which it still counts
		if left > 1 {
			break // and so do the following
		}
		if left <= 0 {
			gone++
		}
		switch left {
		case 0:
			tr.Leaving++
		case 1:
			tr.LastMicro++
		case -1:
			tr.JustLeft++
		}
	}
	return clock, gap, offset, gone, tr
}

// fit is how many of the callers fit beside the used units.
func (l LogLimit) fit(used int64, c Call) (granted int64) {
	for granted < c.Count && used+(granted+1)*c.Cost <= l.Limit {
		granted++
	}
	return granted
}

// answer is what follows from these hits, all of which count.
func (l LogLimit) answer(hits []int64, clock, gap, cost int64) Answer {
	used := int64(len(hits))
	a := Answer{Remaining: max(0, l.Limit-used)}
	// So many of the oldest have to leave before the call fits.
	if leave := used + cost - l.Limit; leave > 0 && leave <= used {
		a.RetryAfter = hits[leave-1] + l.Window - clock + gap
	}
	if used > 0 {
		a.ResetAfter = hits[used-1] + l.Window - clock + gap
	}
	return a
}

// Charge decides a call and takes what it was granted. ttl is the time to live the key
// needs, in milliseconds, or 0 when nothing is written.
func (g *Log) Charge(l LogLimit, now int64, c Call) (a Answer, ttl int64, tr Trace) {
	clock, gap, offset, gone, tr := g.view(l, now)
	write := tr.Anchored
	g.offset = offset
	for _, d := range c.Debit {
		if d.Age < l.Window {
			g.insert(clock-d.Age, d.Units)
			g.lead = g.ahead(clock)
			write = true
		}
	}
	for _, b := range c.Back {
		for i := len(g.hits) - 1; i >= 0 && b.Units > 0; i-- {
			if at := g.hits[i]; at <= b.Score && at > clock {
				latest := i == len(g.hits)-1
				g.hits = slices.Delete(g.hits, i, i+1)
				if latest {
					g.lead = g.ahead(clock)
				}
				b.Units--
			}
		}
	}
	if len(g.hits) == 0 {
		g.Forget()
	}
	used := int64(len(g.hits) - gone)
	granted, more := l.fit(used, c), int64(0)
	if granted == c.Count {
		more = c.ahead(max(0, l.Limit-used-granted*c.Cost))
		granted += more
	}
	tr.Renewed = write || len(g.hits) == 0
	if granted > 0 {
		write = true
		units := granted * c.Cost
		if used == 0 {
			tr.Anew, tr.Renewed = gone > 0, true
			g.Forget()
			clock, gap, gone = now, 0, 0
		}
		// How much a call forgets of what no longer counts; seen only under a limit
		// with a longer window.
		forget := min(gone, int(max(256, 2*units)))
		g.hits, gone = g.hits[forget:], gone-forget
		tr.Trimmed = gone > 0
		at := clock
		if more > 0 {
			at += max(c.Ahead, g.ahead(clock))
			a.Score = at
		}
		g.insert(at, units)
		g.lead = g.ahead(clock)
	}
	if write && len(g.hits) > 0 {
		ttl = millis(l.Window + gap + g.ahead(clock)) // needed until the latest hit has left
	}
	score := a.Score
	a = l.answer(g.hits[gone:], clock, gap, c.Cost)
	a.Granted, a.Score = granted, score
	if granted >= c.Count {
		a.RetryAfter = 0
	}
	return a, ttl, tr
}

// ahead is for how long the latest hit lies ahead.
func (g *Log) ahead(clock int64) int64 {
	if len(g.hits) == 0 {
		return 0
	}
	return max(0, g.hits[len(g.hits)-1]-clock)
}

// insert adds units hits at an instant of the key's clock.
func (g *Log) insert(at, units int64) {
	i := len(g.hits)
	for i > 0 && g.hits[i-1] > at {
		i--
	}
	g.hits = slices.Insert(g.hits, i, slices.Repeat([]int64{at}, int(units))...)
}

// Look says what Charge would grant, and how the log is without it.
func (g *Log) Look(l LogLimit, now int64, c Call) (Answer, Trace) {
	clock, gap, _, gone, tr := g.view(l, now)
	hits := g.hits[gone:]
	a := l.answer(hits, clock, gap, c.Cost)
	a.Granted = l.fit(int64(len(hits)), c)
	return a, tr
}

// Instants are the instants of the server's clock at which, or next to which, something
// about the key changes.
func (g *Log) Instants(l LogLimit, now, cost int64) []int64 {
	if len(g.hits) == 0 {
		return nil
	}
	clock, gap, offset, gone, _ := g.view(l, now)
	server := now + gap - clock // what to add to an instant of the key's clock
	hits, newest := g.hits[gone:], g.hits[len(g.hits)-1]
	at := []int64{
		newest - g.lead - offset,            // its clock moves again
		newest - g.lead - offset - l.Window, // its clock no longer waits
		newest + l.Window + server,          // empty
	}
	if len(hits) > 0 {
		at = append(at,
			hits[0]+l.Window+server,
			hits[len(hits)/2]+l.Window+server,
			now+l.answer(hits, clock, gap, cost).RetryAfter)
	}
	return at
}
