package ringfence

import (
	"context"
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence/internal/model"
)

// The differential tests run the scripts against the referee of internal/model: the same
// calls, at the instant that the server's reply names, must get the same answer in every
// field. The server's clock stands where the test puts it, so that it can be put on the
// very microsecond at which an answer changes, and on both sides of it.
//
// They are 100,000 operations in make test and 1,000,000 in make soak:
// RINGFENCE_DIFFERENTIAL_OPS sets the number of operations on real Redis (an operation is
// one entry of a call), RINGFENCE_DIFFERENTIAL_SEED repeats a run.
const (
	differentialOpsEnv  = "RINGFENCE_DIFFERENTIAL_OPS"
	differentialSeedEnv = "RINGFENCE_DIFFERENTIAL_SEED"
	differentialOps     = 100_000
	// After so many operations everything is new: keys, limits, the clock.
	differentialSession = 2_000
	// How often what the server holds is compared, too.
	differentialSettle = 250
)

const (
	usSecond = int64(1_000_000)
	usDay    = 24 * 3600 * usSecond
)

// diffLimit is a limit as the scripts and as the referee get it.
type diffLimit struct {
	limit  Limit
	rule   *rule
	bucket model.BucketLimit
	log    model.LogLimit
}

func newDiffLimit(l Limit) (diffLimit, error) {
	d := diffLimit{limit: l}
	var err error
	d.rule, err = l.compile()
	switch l := l.(type) {
	case TokenBucket:
		d.bucket = model.BucketLimit{Rate: l.Rate, Per: l.Per.Microseconds(), Burst: l.Burst}
	case SlidingLog:
		d.log = model.LogLimit{Limit: l.Limit, Window: l.Window.Microseconds()}
	}
	return d, err
}

// diffKey is one key: its limits (more than one if the limit changes under it), and the
// referee's idea of it.
type diffKey struct {
	name   string
	limits []diffLimit
	isLog  bool
	bucket model.Bucket
	log    model.Log

	expires  bool
	deadline int64 // on the clock of diffServer.wall

	taken []model.Back // ahead, and perhaps still to be given back

	past [20]diffEvent // the last of them, a ring
	ops  int
}

// diffCall is one entry of a call.
type diffCall struct {
	key         *diffKey
	limit       *diffLimit
	cost, count int64
	debit       []model.Debit
	back        []model.Back
	more, ahead int64
}

// diffEvent is one entry of a call that was made.
type diffEvent struct {
	diffCall
	look      bool
	now       int64
	want, got model.Answer
}

func (e diffEvent) String() string {
	what := "charge"
	if e.look {
		what = "look"
	}
	s := fmt.Sprintf("%d %-6s %s cost %d", e.now, what, e.limit.limit, e.cost)
	if e.count != 1 {
		s += fmt.Sprintf(" count %d", e.count)
	}
	if e.debit != nil {
		s += fmt.Sprintf(" debit (units, age) %v", e.debit)
	}
	if e.back != nil {
		s += fmt.Sprintf(" back (units, score) %v", e.back)
	}
	if e.more != 0 {
		s += fmt.Sprintf(" and %d more, %d ahead", e.more, e.ahead)
	}
	s += fmt.Sprintf(" -> %+v", e.want)
	if e.got != e.want {
		s += fmt.Sprintf(", but got %+v", e.got)
	}
	return s
}

func (k *diffKey) exists() bool {
	if k.isLog {
		return k.log.Exists()
	}
	return k.bucket.Exists()
}

func (k *diffKey) forget() {
	k.bucket.Forget()
	k.log.Forget()
	k.expires = false
}

func (k *diffKey) charge(l *diffLimit, now int64, c model.Call) (model.Answer, int64, model.Trace) {
	if k.isLog {
		return k.log.Charge(l.log, now, c)
	}
	return k.bucket.Charge(l.bucket, now, c)
}

func (k *diffKey) look(l *diffLimit, now int64, c model.Call) (model.Answer, model.Trace) {
	if k.isLog {
		return k.log.Look(l.log, now, c)
	}
	return k.bucket.Look(l.bucket, now, c)
}

func (k *diffKey) instants(l *diffLimit, now, cost int64) []int64 {
	if k.isLog {
		return k.log.Instants(l.log, now, cost)
	}
	return k.bucket.Instants(l.bucket, now, cost)
}

// windowsDiffer says that a log's window changes: the longer one then waits for hits that
// may expire with the shorter one.
func (k *diffKey) windowsDiffer() bool {
	for _, l := range k.limits {
		if l.log.Window != k.limits[0].log.Window {
			return true
		}
	}
	return false
}

// history is what a report of a disagreement shows.
func (k *diffKey) history() string {
	var b strings.Builder
	for i := max(0, k.ops-len(k.past)); i < k.ops; i++ {
		fmt.Fprintf(&b, "  %s\n", k.past[i%len(k.past)])
	}
	return b.String()
}

// diffReply is what was heard of one entry.
type diffReply struct {
	status int
	model.Answer
}

// diffTarget runs the calls of one batch at one instant and says which; 0 if it does not
// know.
type diffTarget interface {
	run(ctx context.Context, look bool, calls []diffCall) (now int64, out []diffReply, err error)
}

// nodeTarget runs the scripts, through the requests the package sends or, where those
// cannot say it (count, debit), by hand.
type nodeTarget struct{ node *redisNode }

func (n nodeTarget) run(ctx context.Context, look bool, calls []diffCall) (int64, []diffReply, error) {
	out := make([]diffReply, len(calls))
	for _, c := range calls {
		if c.count != 1 || c.debit != nil || c.back != nil || c.more != 0 {
			return n.runByHand(ctx, look, calls, out)
		}
	}
	reqs := make([]*request, len(calls))
	for i, c := range calls {
		r := freshRequest().begin(opCharge, c.limit.rule, keyHash{}, keySpace{}, c.cost)
		r.name = append(r.name[:0], c.key.name...)
		reqs[i] = r
		defer func() { r.release(); r.release() }()
	}
	run := n.node.charge
	if look {
		run = n.node.look
	}
	if err := run(ctx, reqs); err != nil {
		return 0, nil, err
	}
	for i, r := range reqs {
		out[i] = answerOf(r.rule, r.status, r.granted, 1, r.cost, r.state)
	}
	return reqs[0].now, out, nil
}

// answerOf is what the package makes of a reply entry.
func answerOf(rl *rule, status int, granted, count, cost int64, s state) diffReply {
	d := rl.decide(s, granted == count, cost)
	return diffReply{status: status, Answer: model.Answer{
		Granted: granted, Remaining: d.Remaining,
		RetryAfter: d.RetryAfter.Microseconds(), ResetAfter: d.ResetAfter.Microseconds(),
	}}
}

func (n nodeTarget) runByHand(ctx context.Context, look bool, calls []diffCall, out []diffReply) (int64, []diffReply, error) {
	script := n.node.scripts.charge
	if look {
		script = n.node.scripts.look
	}
	reqs := make([]*request, len(calls))
	type aheadOf struct {
		rule *rule
		life int64
	}
	rules := map[aheadOf]*rule{}
	for i, c := range calls {
		of := aheadOf{c.limit.rule, c.ahead}
		if rules[of] == nil {
			rules[of] = c.limit.rule.ahead(c.ahead)
		}
		r := freshRequest().begin(opCharge, rules[of], keyHash{}, keySpace{}, c.cost)
		r.name, r.count, r.debit = append(r.name[:0], c.key.name...), c.count, debitOf(c)
		if c.more > 0 {
			r.wants, r.leaser = c.more, r
		}
		reqs[i] = r
	}
	args, _ := appendArgs([]any{"evalsha", script.sha}, script.brief, reqs, nil)
	reply, err := n.node.client.Do(ctx, args...).Int64Slice()
	if err != nil && redis.HasErrorPrefix(err, "NOSCRIPT") {
		args[0], args[1] = "eval", script.text
		reply, err = n.node.client.Do(ctx, args...).Int64Slice()
	}
	if err != nil {
		return 0, nil, err
	}
	width := replyWidth(int64(len(reply)), len(calls))
	if width == 0 {
		return 0, nil, fmt.Errorf("%d values for %d entries", len(reply), len(calls))
	}
	for i, c := range calls {
		status, granted, s := replyEntry(reply, width, i)
		if !c.limit.rule.plausible(s) { // the node refuses such a reply, and so does its arithmetic
			return 0, nil, fmt.Errorf("implausible state %v in entry %d", s, i)
		}
		asked := c.count
		if granted > asked || look && granted > 0 { // a look speaks of the state before: one more would fit
			asked = granted
		}
		score := int64(0)
		if c.key.isLog && granted > c.count && !look {
			score, s.b = s.b, 0
		}
		out[i] = answerOf(c.limit.rule, status, granted, asked, c.cost, s)
		out[i].Score = score
	}
	return reply[0], out, nil
}

func debitOf(c diffCall) string {
	if c.back != nil {
		debit, all := "", int64(0)
		for _, b := range c.back {
			all += b.Units
			debit = c.limit.rule.takeBack(debit, all, b.Units, b.Score)
		}
		return debit
	}
	if c.debit == nil {
		return ""
	}
	if !c.key.isLog {
		return strconv.FormatInt(c.debit[0].Units, 10)
	}
	var b strings.Builder
	for i, d := range c.debit {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%d@%d", d.Units, d.Age)
	}
	return b.String()
}

// diffServer is the server under test and what there is to know of its clock.
type diffServer struct {
	client *redis.Client
	set    func(us int64) // stops the server's clock at an instant
	// embedded says that it is the in-process server, which lets time to live run down
	// as the clock goes forward and holds it while the clock goes back, where Redis
	// keeps the instant at which a key expires.
	embedded bool

	now  int64 // where the clock stands; 0: it runs
	ran  int64 // embedded: us that the clock has gone forward
	tick int64 // embedded: from where it goes forward next
}

func (s *diffServer) setClock(us int64) {
	s.set(us)
	s.now = us
	s.tick = min(s.tick, us)
}

// wall is the clock by which keys expire, read when a command arrives at now.
func (s *diffServer) wall(now int64) int64 {
	if !s.embedded {
		return now / 1000
	}
	s.ran, s.tick = s.ran+max(0, now-s.tick), max(s.tick, now)
	return s.ran
}

// deadline is the last reading of that clock at which a key lives that at wall was given
// so many milliseconds.
func (s *diffServer) deadline(wall, ttl int64) int64 {
	if !s.embedded {
		return wall + ttl
	}
	return wall + ttl*1000 - 1
}

// left is how many ms a key with this deadline has at wall.
func (s *diffServer) left(deadline, wall int64) int64 {
	if !s.embedded {
		return deadline - wall
	}
	return (deadline + 1 - wall) / 1000
}

// diffStats say what a run has exercised.
type diffStats struct {
	ops, refills, denials          int
	leaving, lastMicro, justLeft   int // operations on the edge of a window, by side
	forward, back                  int // steps of the clock
	shortest, longest              int64
	stoodStill, anchored           int
	converted, expired, anew       int
	trimmed, debits, partial       int
	ahead, backs                   int
	looks, batches, repeats, waits int
}

func (s *diffStats) edges() int { return s.leaving + s.lastMicro + s.justLeft }

func (s *diffStats) add(o *diffStats) {
	s.ops, s.refills, s.denials = s.ops+o.ops, s.refills+o.refills, s.denials+o.denials
	s.leaving, s.lastMicro, s.justLeft = s.leaving+o.leaving, s.lastMicro+o.lastMicro, s.justLeft+o.justLeft
	s.forward, s.back = s.forward+o.forward, s.back+o.back
	s.shortest, s.longest = min(s.shortest, o.shortest), max(s.longest, o.longest)
	s.stoodStill, s.anchored = s.stoodStill+o.stoodStill, s.anchored+o.anchored
	s.converted, s.expired, s.anew = s.converted+o.converted, s.expired+o.expired, s.anew+o.anew
	s.ahead, s.backs = s.ahead+o.ahead, s.backs+o.backs
	s.trimmed, s.debits, s.partial = s.trimmed+o.trimmed, s.debits+o.debits, s.partial+o.partial
	s.looks, s.batches, s.repeats, s.waits = s.looks+o.looks, s.batches+o.batches, s.repeats+o.repeats, s.waits+o.waits
}

func (s *diffStats) String() string {
	return fmt.Sprintf("%d operations: %d refills, %d denials, %d window-edge hits (%d at the edge, %d 1µs before, %d 1µs after), "+
		"%d clock steps (%d forward, %d back; %s back to %s forward); "+
		"%d met a clock that stood still, %d anchored it anew, %d expired keys, %d changed limits, %d logs begun anew, %d trimmed in part, "+
		"%d looks, %d batches with %d repeats of a key, %d debits, %d taken ahead, %d given back, %d partial grants, %d waits of exactly RetryAfter",
		s.ops, s.refills, s.denials, s.edges(), s.leaving, s.lastMicro, s.justLeft,
		s.forward+s.back, s.forward, s.back, time.Duration(s.shortest)*time.Microsecond, time.Duration(s.longest)*time.Microsecond,
		s.stoodStill, s.anchored, s.expired, s.converted, s.anew, s.trimmed,
		s.looks, s.batches, s.repeats, s.debits, s.ahead, s.backs, s.partial, s.waits)
}

// differential is one session: some keys, their limits, and a clock.
type differential struct {
	server *diffServer
	target diffTarget
	rng    *rand.Rand
	seed   uint64
	keys   []*diffKey
	stats  diffStats

	public bool // only what the public API can say: no counts, debits, changed limits
	runs   bool // the clock runs by itself
}

// differs is the error that reports a disagreement.
func (d *differential) differs(k *diffKey, format string, args ...any) error {
	return fmt.Errorf("seed %d: after %d operations: %s\nthe last operations on %s:\n%s",
		d.seed, d.stats.ops, fmt.Sprintf(format, args...), k.name, k.history())
}

// run makes one call of all these entries and compares every field.
func (d *differential) run(ctx context.Context, look bool, calls ...diffCall) ([]diffReply, error) {
	for i := range calls {
		if c := &calls[i]; look { // a look is one caller's
			c.count, c.more, c.ahead = max(1, c.count), 0, 0
		}
	}
	if d.runs {
		if err := d.dropDying(ctx, calls); err != nil {
			return nil, err
		}
	}
	now, out, err := d.target.run(ctx, look, calls)
	if err != nil {
		return nil, d.differs(calls[0].key, "the call failed: %v", err)
	}
	if now == 0 {
		now = d.server.now
	}
	if d.server.now != 0 && now != d.server.now {
		return nil, d.differs(calls[0].key, "the server says that it is %d, its clock stands at %d", now, d.server.now)
	}
	wall := d.server.wall(now)
	seen := map[*diffKey]bool{}
	renewed := map[*diffKey]int64{} // the time to live that its last call needs
	for i, c := range calls {
		k := c.key
		if k.expires && wall > k.deadline {
			k.forget()
			d.stats.expired++
		}
		var want model.Answer
		var tr model.Trace
		m := model.Call{Cost: c.cost, Count: c.count, Debit: c.debit, Back: c.back, More: c.more, Ahead: c.ahead}
		if look {
			want, tr = k.look(c.limit, now, m)
		} else {
			var ttl int64
			want, ttl, tr = k.charge(c.limit, now, m)
			if ttl > 0 && (tr.Renewed || k.isLog && d.server.left(k.deadline, wall) < ttl) {
				k.expires, k.deadline = true, d.server.deadline(wall, ttl+model.SpareMillis)
				renewed[k] = ttl
			}
			if _, ok := renewed[k]; ok && ttl > 0 {
				renewed[k] = max(renewed[k], ttl)
			}
		}
		if look && want.Granted > 0 || want.Score > 0 {
			want.RetryAfter = 0 // whoever was admitted does not wait
		}
		if want.Granted > c.count && !look {
			k.taken = append(k.taken, model.Back{Units: (want.Granted - c.count) * c.cost, Score: want.Score})
		}
		k.past[k.ops%len(k.past)] = diffEvent{c, look, now, want, out[i].Answer}
		k.ops++
		d.count(look, c, want, tr, seen[k])
		seen[k] = true
		if out[i].status != statusDecided || out[i].Answer != want {
			return nil, d.differs(k, "entry %d of %d: status %d, got %+v, want %+v", i+1, len(calls), out[i].status, out[i].Answer, want)
		}
	}
	if d.public && !d.server.embedded && d.server.now != 0 {
		if err := d.adopt(ctx, renewed, wall); err != nil {
			return nil, err
		}
	}
	if len(calls) > 1 {
		d.stats.batches++
	}
	return out, nil
}

func (d *differential) count(look bool, c diffCall, a model.Answer, tr model.Trace, repeat bool) {
	s := &d.stats
	for _, x := range []struct {
		n  *int
		is bool
	}{
		{&s.ops, true},
		{&s.looks, look},
		{&s.denials, !look && a.Granted == 0},
		{&s.partial, !look && a.Granted > 0 && a.Granted < c.count},
		{&s.debits, c.debit != nil},
		{&s.ahead, !look && a.Granted > c.count},
		{&s.backs, c.back != nil},
		{&s.repeats, repeat},
		{&s.refills, tr.Refilled},
		{&s.stoodStill, tr.StoodStill},
		{&s.anchored, tr.Anchored},
		{&s.converted, tr.Converted},
		{&s.anew, tr.Anew},
		{&s.trimmed, tr.Trimmed},
		// One edge an operation, the sharpest.
		{&s.leaving, tr.Leaving > 0},
		{&s.lastMicro, tr.Leaving == 0 && tr.LastMicro > 0},
		{&s.justLeft, tr.Leaving == 0 && tr.LastMicro == 0 && tr.JustLeft > 0},
	} {
		if x.is {
			*x.n++
		}
	}
}

// dropDying deletes the keys of a call that a running clock may let expire about now:
// which of the two instants comes first is nothing a test could know.
func (d *differential) dropDying(ctx context.Context, calls []diffCall) error {
	at, err := d.server.client.Time(ctx).Result()
	if err != nil {
		return err
	}
	for _, c := range calls {
		left := c.key.deadline - at.UnixMilli()
		if c.key.expires && -1000 < left && left < 4500 {
			c.key.forget()
			if err := d.server.client.Del(ctx, c.key.name).Err(); err != nil {
				return err
			}
		}
	}
	return nil
}

// moveTo puts the clock on an instant.
func (d *differential) moveTo(us int64) {
	if us == d.server.now {
		return
	}
	by := us - d.server.now
	if by > 0 {
		d.stats.forward++
	} else {
		d.stats.back++
	}
	d.stats.shortest, d.stats.longest = min(d.stats.shortest, by), max(d.stats.longest, by)
	d.server.setClock(us)
}

// The clock stays where every sum the scripts build is exact: 1990 to 2240.
func (d *differential) inRange(us int64) bool { return us > usDay*365*20 && us < usDay*365*270 }

// logUniform draws from low to high, every order of magnitude alike.
func logUniform(rng *rand.Rand, low, high int64) int64 {
	a, b := math.Log(float64(low)), math.Log(float64(high)+1)
	return min(high, max(low, int64(math.Exp(a+rng.Float64()*(b-a)))))
}

// The ends of what there is, and rates that no decimal fraction holds.
var bucketTable = []TokenBucket{
	{Rate: 1, Per: 30 * 24 * time.Hour, Burst: 12},
	{Rate: 1, Per: 30 * 24 * time.Hour, Burst: 1},
	{Rate: 7, Per: 30 * 24 * time.Hour, Burst: 3},
	{Rate: 1_000_000, Per: time.Second, Burst: 1},
	{Rate: 1_000_000, Per: time.Second, Burst: 10},
	{Rate: 1_000_000, Per: time.Second, Burst: 31_622_399_999_999},
	{Rate: 999_983, Per: time.Second, Burst: 10},
	{Rate: 999_983, Per: time.Second, Burst: 1<<53/999_983 - 1},
	{Rate: 7, Per: 3 * time.Microsecond, Burst: 100},
	{Rate: 3, Per: 7 * time.Microsecond, Burst: 100},
	{Rate: 1<<52 - 1, Per: time.Second, Burst: 1},
	{Rate: 1<<26 - 5, Per: time.Second, Burst: 1<<27 + 9},
	{Rate: 999_999, Per: 999_983 * time.Microsecond, Burst: 50},
	{Rate: 100, Per: time.Minute, Burst: 100},
	{Rate: 10, Per: time.Second, Burst: 20},
	{Rate: 3, Per: time.Second, Burst: 1},
	{Rate: 2_592_000_000_001, Per: 30 * 24 * time.Hour, Burst: 5},
	{Rate: 999_999_999_989, Per: 30 * 24 * time.Hour, Burst: 3},
}

var logTable = []SlidingLog{
	{Limit: 1, Window: MinWindow},
	{Limit: 1, Window: MaxWindow},
	{Limit: 3, Window: time.Second},
	{Limit: 10, Window: time.Minute},
	{Limit: 100, Window: time.Hour},
	{Limit: 2000, Window: 30 * 24 * time.Hour},
	{Limit: 12, Window: 1_000_003 * time.Microsecond},
	{Limit: 1500, Window: 1_009 * time.Microsecond},
}

// highestBurst is the largest that validation accepts: n * (Burst + 1) <= 2^53 for n / p
// in lowest terms, and a time to fill below MaxWindow.
func highestBurst(rate, per int64) int64 {
	var g, n, p big.Int
	g.GCD(nil, nil, big.NewInt(rate), big.NewInt(per))
	n.Div(big.NewInt(rate), &g)
	p.Div(big.NewInt(per), &g)
	var exact, fill big.Int
	exact.Div(big.NewInt(1<<53), &n)
	exact.Sub(&exact, big.NewInt(1))
	fill.Mul(big.NewInt(MaxWindow.Microseconds()), &n)
	fill.Sub(&fill, big.NewInt(1))
	fill.Div(&fill, &p)
	if fill.Cmp(&exact) < 0 {
		return fill.Int64()
	}
	return exact.Int64()
}

func randomBucket(rng *rand.Rand) TokenBucket {
	if rng.IntN(3) == 0 {
		return bucketTable[rng.IntN(len(bucketTable))]
	}
	for {
		// 1 per 30 days to 1,000,000 a second, with a numerator that leaves
		// fractions; below, some rates that are faster still.
		rate := logUniform(rng, 1, 1<<uint(1+rng.IntN(45)))
		token := logUniform(rng, 1, 30*usDay)
		if rate+1 > MaxWindow.Microseconds()/token {
			continue // Per would be too long
		}
		per := rate*token + rng.Int64N(token)
		for per > 1 && gcd(rate, per) != 1 {
			per--
		}
		if rng.IntN(4) == 0 { // whole microseconds a token: what most people have
			per = rate * token
		}
		if rng.IntN(12) == 0 {
			per = max(1, per/token)
		}
		most := highestBurst(rate, per)
		if most < 1 {
			continue
		}
		var burst int64
		switch rng.IntN(6) {
		case 0:
			burst = most
		case 1:
			burst = 1
		case 2:
			burst = logUniform(rng, 1, most)
		default:
			burst = logUniform(rng, 1, min(most, 50))
		}
		return TokenBucket{Rate: rate, Per: time.Duration(per) * time.Microsecond, Burst: burst}
	}
}

func randomLog(rng *rand.Rand) SlidingLog {
	if rng.IntN(3) == 0 {
		return logTable[rng.IntN(len(logTable))]
	}
	return logOf(rng, logUniform(rng, 1, 40))
}

func logOf(rng *rand.Rand, limit int64) SlidingLog {
	return SlidingLog{Limit: limit, Window: time.Duration(logUniform(rng, MinWindow.Microseconds(), MaxWindow.Microseconds())) * time.Microsecond}
}

// newKey makes a key of which the limit may change now and then.
func (d *differential) newKey(i int) (*diffKey, error) {
	k := &diffKey{name: fmt.Sprintf("diff:%d:%d", d.seed, i), isLog: i%2 == 1}
	limits := 1
	if !d.public && (i == 0 || d.rng.IntN(4) == 0) {
		limits = 2 + d.rng.IntN(2)
	}
	for len(k.limits) < limits {
		var l Limit
		if k.isLog {
			l = randomLog(d.rng)
			switch {
			case d.server.embedded: // it takes milliseconds for what Redis does in microseconds
				l = logOf(d.rng, min(100, l.(SlidingLog).Limit))
			case i == 1: // every session has one large log
				l = logOf(d.rng, 400+d.rng.Int64N(1600))
			}
			if len(k.limits) > 0 && d.rng.IntN(2) == 0 {
				l = SlidingLog{Limit: l.(SlidingLog).Limit, Window: k.limits[0].limit.(SlidingLog).Window}
			}
		} else {
			l = randomBucket(d.rng)
			if i == 0 { // and one slow bucket that changes: the longest products
				per := 1e11 + d.rng.Int64N(30*usDay-1e11)
				l = TokenBucket{Rate: 1 + d.rng.Int64N(20), Per: time.Duration(per) * time.Microsecond, Burst: 1 + d.rng.Int64N(10)}
			}
		}
		one, err := newDiffLimit(l)
		if err != nil {
			return nil, fmt.Errorf("seed %d: %#v should be valid: %w", d.seed, l, err)
		}
		k.limits = append(k.limits, one)
	}
	return k, nil
}

// newDifferential starts a session; public says for which kind of target.
func newDifferential(ctx context.Context, s *diffServer, target diffTarget, seed uint64, public bool) (*differential, error) {
	d := &differential{
		server: s, target: target, seed: seed, public: public,
		rng: rand.New(rand.NewPCG(seed, 0x72696e6766656e63)),
	}
	s.setClock(usDay*365*54 + d.rng.Int64N(usDay*365*40))
	if d.rng.IntN(8) == 0 { // close to where numbers end
		s.setClock(usDay*365*265 + d.rng.Int64N(usDay*365))
	}
	if err := s.client.FlushAll(ctx).Err(); err != nil {
		return nil, err
	}
	for i := range 10 {
		k, err := d.newKey(i)
		if err != nil {
			return nil, err
		}
		if public && i%4 >= 2 { // two keys of one limiter
			k.limits = d.keys[i-2].limits
		}
		d.keys = append(d.keys, k)
	}
	return d, nil
}

// call asks for a key as some caller might.
func (d *differential) call(k *diffKey) diffCall {
	c := diffCall{key: k, limit: &k.limits[0], count: 1}
	if len(k.limits) > 1 && d.rng.IntN(3) == 0 {
		c.limit = &k.limits[d.rng.IntN(len(k.limits))]
	}
	left := int64(1)
	if d.server.now != 0 {
		a, _ := k.look(c.limit, d.server.now, model.Call{Cost: 1, Count: 1})
		left = a.Remaining
	}
	highest := c.limit.rule.maxCost
	switch d.rng.IntN(8) {
	case 0, 1:
		c.cost = 1
	case 2, 3:
		c.cost = left
	case 4:
		c.cost = left + 1
	case 5:
		c.cost = highest
	case 6:
		c.cost = 1 + d.rng.Int64N(highest)
	default:
		c.cost = logUniform(d.rng, 1, highest)
	}
	c.cost = min(max(1, c.cost), highest)
	if !d.public && d.rng.IntN(5) == 0 {
		d.lease(&c)
	}
	return c
}

// extend gives a call what only the scripts understand yet.
func (d *differential) extend(c *diffCall) {
	if d.rng.IntN(3) > 0 {
		c.count = 1 + d.rng.Int64N(5)
		c.cost = min(c.limit.rule.maxCost, logUniform(d.rng, 1, max(1, 2*c.limit.rule.capacity/c.count)))
	}
	if d.rng.IntN(2) == 0 {
		if d.lease(c); c.back != nil && d.rng.IntN(2) == 0 {
			c.count = 0
		}
		return
	}
	if c.back != nil || d.rng.IntN(3) == 0 {
		return
	}
	if !c.key.isLog {
		c.debit = []model.Debit{{Units: logUniform(d.rng, 1, min(2*c.limit.rule.capacity, 1<<53-1))}}
		return
	}
	age := logUniform(d.rng, 1, c.limit.rule.window+c.limit.rule.window/2)
	switch d.rng.IntN(6) {
	case 0, 1:
		age = c.limit.rule.window + d.rng.Int64N(3) - 1
	case 2:
		age = d.rng.Int64N(2)
	}
	for range 1 + d.rng.IntN(3) {
		c.debit = append(c.debit, model.Debit{Units: 1 + d.rng.Int64N(min(20, c.limit.rule.capacity)), Age: age})
		age = d.rng.Int64N(age + 1)
	}
}

// lease makes a call take units ahead, or give some back, or both: what was taken, but
// sometimes more, or twice, or for another instant, as far as the scripts are concerned.
func (d *differential) lease(c *diffCall) {
	if window := c.limit.rule.window; d.rng.IntN(2) == 0 && window > 20 {
		if d.rng.IntN(4) > 0 { // so little that some is granted
			c.cost = min(c.cost, max(1, c.limit.rule.capacity/16))
		}
		c.more, c.ahead = logUniform(d.rng, 1, max(1, 200/c.cost)), logUniform(d.rng, 1, min(usSecond, window/10))
		if d.rng.IntN(4) == 0 {
			c.count = 0
		}
	}
	if c.more > 0 && d.rng.IntN(2) == 0 {
		return
	}
	for n := 1 + d.rng.IntN(2); n > 0 && len(c.key.taken) > 0; n-- {
		i := len(c.key.taken) - 1 - d.rng.IntN(min(4, len(c.key.taken)))
		b := c.key.taken[i]
		if d.rng.IntN(4) > 0 {
			c.key.taken = append(c.key.taken[:i:i], c.key.taken[i+1:]...)
		}
		switch d.rng.IntN(6) {
		case 0:
			b.Score += d.rng.Int64N(3) - 1
		case 1:
			b.Units += d.rng.Int64N(5)
		default:
			b.Units = 1 + d.rng.Int64N(b.Units)
		}
		b.Units = min(b.Units, 1000) // as many as a lease holds
		c.back = append(c.back, b)
	}
}

// batch is a call with others beside it, repeats among them.
func (d *differential) batch(c diffCall) []diffCall {
	calls := []diffCall{c}
	if d.rng.IntN(8) > 0 {
		return calls
	}
	for range 1 + d.rng.IntN(15) {
		k := c.key
		if d.rng.IntN(4) > 0 {
			k = d.keys[d.rng.IntN(len(d.keys))]
		}
		calls = append(calls, d.call(k))
	}
	d.rng.Shuffle(len(calls), func(i, j int) { calls[i], calls[j] = calls[j], calls[i] })
	return calls
}

// step moves the clock by chance: forward mostly, from 1 us to 60 days, and back.
func (d *differential) step(k *diffKey) {
	window := k.limits[0].rule.window
	by := int64(0)
	switch d.rng.IntN(20) {
	case 0, 1:
		by = -logUniform(d.rng, 1, 5_000)
	case 2:
		by = -(window + d.rng.Int64N(5) - 2)
	case 3:
		by = -logUniform(d.rng, 1, 2*window)
	case 4:
		by = -logUniform(d.rng, usSecond, 60*usDay)
	case 5, 6, 7:
		by = d.rng.Int64N(window + window/4 + 1)
	case 8, 9:
		by = window/max(1, k.limits[0].rule.capacity) + d.rng.Int64N(3) - 1
	case 10:
		by = 1
	default:
		by = logUniform(d.rng, 1, 60*usDay)
	}
	if at := d.server.now + by; d.inRange(at) {
		d.moveTo(at)
	}
}

// instant picks one at which something about the key changes.
func (d *differential) instant(c diffCall) (int64, bool) {
	at := c.key.instants(c.limit, d.server.now, c.cost)
	if len(at) == 0 {
		return 0, false
	}
	if c.key.expires && !d.server.embedded && d.rng.IntN(8) == 0 {
		us := (c.key.deadline + 1) * 1000
		return us, d.inRange(us)
	}
	for range 4 { // most of them lie ahead
		us := at[d.rng.IntN(len(at))]
		if c.key.isLog && len(at) > 3 && d.rng.IntN(2) == 0 {
			us = at[3+d.rng.IntN(len(at)-3)] // a hit leaves
		}
		if us > d.server.now || d.rng.IntN(3) == 0 {
			return us, d.inRange(us)
		}
	}
	return 0, false
}

// round is one thing that happens.
func (d *differential) round(ctx context.Context) error {
	k := d.keys[d.rng.IntN(len(d.keys))]
	if !k.isLog && d.rng.IntN(3) == 0 {
		k = d.keys[d.rng.IntN(len(d.keys))] // logs have more edges
	}
	c := d.call(k)
	if !d.public && !d.server.embedded && d.rng.IntN(100) == 0 {
		return d.trim(ctx)
	}
	switch what := d.rng.IntN(100); {
	case what < 52: // over an instant, microsecond by microsecond
		at, ok := d.instant(c)
		if !ok {
			d.step(k)
			return d.calls(ctx, c)
		}
		for by := range int64(3) {
			d.moveTo(at - 1 + by)
			if by > 0 && d.rng.IntN(3) == 0 {
				c = d.call(k)
			}
			if by == 0 && d.rng.IntN(8) == 0 {
				continue // or the instant itself comes first
			}
			calls := d.batch(c)
			if k.isLog && by < 2 {
				calls = append(calls, d.call(k))
			}
			if _, err := d.run(ctx, false, calls...); err != nil {
				return err
			}
		}
		return nil
	case what < 67:
		d.step(k)
		return d.calls(ctx, c)
	case what < 72: // until it is used up
		for range 2 + d.rng.IntN(4) {
			if err := d.calls(ctx, d.call(k)); err != nil {
				return err
			}
		}
		return nil
	case what < 76:
		if d.rng.IntN(2) == 0 {
			d.step(k)
		}
		if d.public {
			c.cost = 1
			_, err := d.run(ctx, true, c)
			return err
		}
		_, err := d.run(ctx, true, d.batch(c)...)
		return err
	case what < 90 && !d.public:
		if d.rng.IntN(2) == 0 {
			d.step(k)
		}
		if d.rng.IntN(4) == 0 {
			c.count, c.more, c.ahead, c.back = 1+d.rng.Int64N(5), 0, 0, nil
			_, err := d.run(ctx, true, c)
			return err
		}
		d.extend(&c)
		return d.calls(ctx, c)
	default:
		return d.wait(ctx, c)
	}
}

// trim lets more hits leave a log at once than one call forgets.
func (d *differential) trim(ctx context.Context) error {
	c := diffCall{key: d.keys[1], limit: &d.keys[1].limits[0], count: 1}
	window := c.limit.rule.window
	for _, x := range []struct{ after, cost int64 }{
		{window + 1, 300 + d.rng.Int64N(90)},
		{1 + d.rng.Int64N(window-1), 1 + d.rng.Int64N(9)},
		{0, 1},
	} {
		at := d.server.now + x.after
		if x.after == 0 {
			at = c.key.instants(c.limit, d.server.now, 1)[3] // the first have left
		}
		if !d.inRange(at) {
			return nil
		}
		d.moveTo(at)
		c.cost = x.cost
		if _, err := d.run(ctx, false, c); err != nil {
			return err
		}
	}
	return d.settle(ctx)
}

func (d *differential) calls(ctx context.Context, c diffCall) error {
	_, err := d.run(ctx, false, d.batch(c)...)
	return err
}

// wait asks until it is denied, and then waits as long as it was told: a microsecond less
// is too early, and then it fits.
func (d *differential) wait(ctx context.Context, c diffCall) error {
	c.back, c.count = nil, max(1, c.count)
	for tries := 0; ; tries++ {
		out, err := d.run(ctx, false, c)
		if err != nil {
			return err
		}
		a := out[0].Answer
		if a.Granted > 0 {
			if tries == 3 {
				return nil
			}
			if a.Remaining < c.limit.rule.maxCost {
				c.cost = a.Remaining + 1
			} else {
				c.cost = c.limit.rule.maxCost
			}
			continue
		}
		at := d.server.now + a.RetryAfter
		if !d.inRange(at) || c.key.windowsDiffer() {
			return nil
		}
		if d.server.embedded && d.server.deadline(d.server.ran, 0)+a.RetryAfter > c.key.deadline {
			return nil // it will have expired: its time to live did not grow when the clock went back
		}
		if a.RetryAfter > 1 {
			d.moveTo(at - 1)
			if out, err = d.run(ctx, false, c); err != nil {
				return err
			}
			if early := out[0].Answer; early.Granted != 0 || early.RetryAfter != 1 {
				return d.differs(c.key, "1µs before the end of a wait of %dµs: %+v", a.RetryAfter, early)
			}
		}
		d.moveTo(at)
		if out, err = d.run(ctx, false, c); err != nil {
			return err
		}
		if out[0].Granted < 1 {
			return d.differs(c.key, "denied after the wait of %dµs that was asked for", a.RetryAfter)
		}
		d.stats.waits++
		return nil
	}
}

// adopt takes over when keys expire whose calls may have shared an entry: the script renews
// a time to live once an entry, for what the last of its calls needs, and the referee once
// a call, for what the first needs. Anything outside of these two is a mistake.
func (d *differential) adopt(ctx context.Context, renewed map[*diffKey]int64, wall int64) error {
	for k, needs := range renewed {
		ttl, err := d.server.client.PTTL(ctx, k.name).Result()
		if err != nil {
			return err
		}
		is, most := wall+ttl.Milliseconds(), d.server.deadline(wall, needs+model.SpareMillis)
		if is < k.deadline || is > most {
			return d.differs(k, "it expires in %s, want %dms to %dms", ttl, k.deadline-wall, most-wall)
		}
		k.deadline = is
	}
	return nil
}

// settle compares what the server holds with what the referee does.
func (d *differential) settle(ctx context.Context) error {
	wall := d.server.wall(d.server.now)
	for _, k := range d.keys {
		if k.expires && wall > k.deadline {
			k.forget()
		}
		n, err := d.server.client.Exists(ctx, k.name).Result()
		if err != nil {
			return err
		}
		if (n == 1) != k.exists() {
			return d.differs(k, "the server has %d of the key, the referee says %t", n, k.exists())
		}
		if n == 0 {
			continue
		}
		if k.isLog {
			card, err := d.server.client.ZCard(ctx, k.name).Result()
			if err != nil {
				return err
			}
			// Calls that shared an entry also shared its trimming: more may be left of
			// what no longer counts.
			if stored := k.log.Stored(); int(card) < stored || (int(card) > stored && !d.public) {
				return d.differs(k, "%d members, the referee has %d hits", card, k.log.Stored())
			}
		}
		ttl, err := d.server.client.PTTL(ctx, k.name).Result()
		if err != nil {
			return err
		}
		if want := k.deadline - wall; !d.server.embedded && ttl.Milliseconds() != want {
			return d.differs(k, "time to live %s, want %dms", ttl, want)
		}
	}
	return nil
}

// session runs until so many operations are done.
func (d *differential) session(ctx context.Context, ops int) error {
	for next := differentialSettle; d.stats.ops < ops; {
		if err := d.round(ctx); err != nil {
			return err
		}
		if d.stats.ops >= next {
			if err := d.settle(ctx); err != nil {
				return err
			}
			next = d.stats.ops + differentialSettle
		}
	}
	return d.settle(ctx)
}

// diffOps is how many operations a run on real Redis makes.
func diffOps(t testing.TB) int {
	text := os.Getenv(differentialOpsEnv)
	if text == "" {
		return differentialOps
	}
	ops, err := strconv.Atoi(text)
	if err != nil || ops < 1 {
		t.Fatalf("%s=%q is not a number of operations", differentialOpsEnv, text)
	}
	return ops
}

func diffSeed(t testing.TB) uint64 {
	text := os.Getenv(differentialSeedEnv)
	if text == "" {
		return uint64(time.Now().UnixNano()) % 1e12
	}
	seed, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s=%q is not a seed", differentialSeedEnv, text)
	}
	return seed
}

// diffRun runs sessions of consecutive seeds and reports. A run that hardly met what it is
// about proves little: least is how many refills, denials and window-edge hits it needs.
func diffRun(t testing.TB, ops, least int, start func(seed uint64) (*differential, error)) {
	t.Helper()
	ctx := t.Context()
	begin, first := time.Now(), diffSeed(t)
	seed := first
	var total diffStats
	for ; total.ops < ops; seed++ {
		d, err := start(seed)
		if err != nil {
			t.Fatal(err)
		}
		err = d.session(ctx, min(differentialSession, ops-total.ops))
		total.add(&d.stats)
		if err != nil {
			t.Fatalf("a disagreement (repeat with %s=%d): %v", differentialSeedEnv, seed, err)
		}
	}
	t.Logf("seeds %d to %d: %s; 0 disagreements in %.1fs", first, seed-1, &total, time.Since(begin).Seconds())
	if total.refills < least || total.denials < least || total.edges() < least {
		t.Errorf("fewer than %d refills (%d), denials (%d) or window-edge hits (%d)", least, total.refills, total.denials, total.edges())
	}
}
