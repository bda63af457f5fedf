package ringfence

import (
	"context"
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"math/big"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence/internal/model"
	"github.com/ringfence/ringfence/internal/redistest"
)

// startDiffServer starts a real server whose clock the test moves. Keys expire only when
// they are looked at, so that a run can be repeated.
func startDiffServer(t testing.TB) (*redistest.Server, *diffServer) {
	t.Helper()
	s := redistest.Start(t, redistest.Options{Clock: true, Args: []string{"enable-debug-command local"}})
	if err := s.Client().Do(t.Context(), "DEBUG", "SET-ACTIVE-EXPIRE", "0").Err(); err != nil {
		t.Fatal(err)
	}
	return s, &diffServer{
		client: s.Client(),
		set:    func(us int64) { _ = s.SetMicros(us) }, // it fails the test itself
	}
}

func diffNode(t testing.TB, url string, plain bool) *redisNode {
	t.Helper()
	n, err := newRedisNode(url, nodeConfig{timeout: 30 * time.Second, poolSize: 4, loaded: func() {}}, plain)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.close() })
	return n
}

func TestScriptsOnRedisAgreeWithTheRefereeInEveryField(t *testing.T) {
	s, server := startDiffServer(t)
	target := nodeTarget{diffNode(t, s.URL(), false)}
	ops := diffOps(t)
	least := ops / 10
	if ops < differentialOps { // few sessions differ much
		least = ops / 20
	}
	diffRun(t, ops, least, func(seed uint64) (*differential, error) {
		return newDifferential(t.Context(), server, target, seed, false)
	})
}

// ringTarget asks through the public API.
type ringTarget struct {
	ring     *Ring
	limiters map[*diffLimit]*Limiter
	users    map[*diffKey]string
}

// session makes limiters for the limits of a session, and learns the names of its keys.
func (r *ringTarget) session(d *differential) error {
	r.limiters, r.users = map[*diffLimit]*Limiter{}, map[*diffKey]string{}
	for i, k := range d.keys {
		l, user := r.limiters[&k.limits[0]], fmt.Sprintf("user %d", i)
		if l == nil {
			var err error
			if l, err = r.ring.Limiter(fmt.Sprintf("s%d.%d", d.seed, i), k.limits[0].limit); err != nil {
				return err
			}
			r.limiters[&k.limits[0]] = l
		}
		r.users[k] = user
		k.name = string(r.ring.space.append(nil, l.keys.hash(user)))
	}
	return nil
}

func (r *ringTarget) run(ctx context.Context, look bool, calls []diffCall) (int64, []diffReply, error) {
	out := make([]diffReply, len(calls))
	many := map[*Limiter][]int{}
	for i, c := range calls {
		l := r.limiters[c.limit]
		many[l] = append(many[l], i)
	}
	for l, at := range many {
		var ds []Decision
		var err error
		switch first := calls[at[0]]; {
		case look:
			ds = make([]Decision, 1)
			ds[0], err = l.Peek(ctx, r.users[first.key])
		case len(at) == 1:
			ds = make([]Decision, 1)
			ds[0], err = l.AllowN(ctx, r.users[first.key], first.cost)
		default:
			var reqs []Request
			for _, i := range at {
				reqs = append(reqs, Request{Key: r.users[calls[i].key], Cost: calls[i].cost})
			}
			ds, err = l.AllowMany(ctx, reqs)
		}
		if err != nil {
			return 0, nil, err
		}
		for j, d := range ds {
			if d.Source != SourcePrimary || d.Cause != CauseNone || d.Limit != l.rule.capacity {
				return 0, nil, fmt.Errorf("%+v", d)
			}
			out[at[j]].Answer = model.Answer{
				Remaining:  d.Remaining,
				RetryAfter: d.RetryAfter.Microseconds(),
				ResetAfter: d.ResetAfter.Microseconds(),
			}
			if d.Allowed {
				out[at[j]].Granted = 1
			}
		}
	}
	return 0, out, nil
}

func diffRunPublic(t *testing.T, server *diffServer, shards []ShardConfig, ops int) {
	t.Helper()
	ring, err := Open(t.Context(), Config{
		Shards: shards, HashKey: []byte("0123456789abcdef"),
		Budget: time.Minute, OperationTimeout: time.Minute, NearCacheKeys: -1,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ring.Close() })
	target := &ringTarget{ring: ring}
	diffRun(t, ops, ops/20, func(seed uint64) (*differential, error) {
		d, err := newDifferential(t.Context(), server, target, seed, true)
		if err == nil {
			err = target.session(d)
		}
		return d, err
	})
}

func TestPublicAPIOnRedisAgreesWithTheReferee(t *testing.T) {
	s, server := startDiffServer(t)
	diffRunPublic(t, server, []ShardConfig{{ID: "a", Primary: s.URL()}}, min(10_000, diffOps(t)))
}

// RunDifferentialOnEmbedded is what a test outside this package calls, because the package
// embedded imports this one.
func RunDifferentialOnEmbedded(t *testing.T, shard ShardConfig, set func(at time.Time), public bool) {
	t.Helper()
	client := redis.NewClient(&redis.Options{Addr: strings.TrimPrefix(shard.Primary, "redis://"), MaxRetries: -1})
	t.Cleanup(func() { _ = client.Close() })
	server := &diffServer{client: client, set: func(us int64) { set(time.UnixMicro(us)) }, embedded: true}
	ops := min(8_000, diffOps(t)) // it is slow
	if public {
		diffRunPublic(t, server, []ShardConfig{shard}, ops/5)
		return
	}
	target := nodeTarget{diffNode(t, shard.Primary, true)}
	diffRun(t, ops, ops/20, func(seed uint64) (*differential, error) {
		return newDifferential(t.Context(), server, target, seed, false)
	})
}

func TestScriptsAgreeWithTheRefereeWhileTheClockRuns(t *testing.T) {
	s, server := startDiffServer(t)
	target := nodeTarget{diffNode(t, s.URL(), false)}
	seed := diffSeed(t)
	d, err := newDifferential(t.Context(), server, target, seed, false)
	if err != nil {
		t.Fatal(err)
	}
	// Limits that time enough passes for while the test runs.
	for i, k := range d.keys {
		var l Limit = TokenBucket{Rate: 1 + d.rng.Int64N(9_973), Per: time.Duration(1+d.rng.Int64N(1_000_000)) * time.Microsecond, Burst: 1 + d.rng.Int64N(20)}
		if k.isLog {
			l = SlidingLog{Limit: 1 + d.rng.Int64N(20), Window: time.Duration(1000+d.rng.Int64N(200_000)) * time.Microsecond}
		}
		one, err := newDiffLimit(l)
		if err != nil {
			t.Fatalf("key %d: %#v: %v", i, l, err)
		}
		k.limits = []diffLimit{one}
	}
	_ = s.Unfreeze()
	server.now, d.runs = 0, true
	steps := 0
	for d.stats.ops < 5_000 {
		k := d.keys[d.rng.IntN(len(d.keys))]
		if d.rng.IntN(10) == 0 {
			by := logUniform(d.rng, 1, 10*usSecond)
			switch d.rng.IntN(4) {
			case 0:
				by = -by
			case 1:
				by = -k.limits[0].rule.window
			case 2:
				by = logUniform(d.rng, 1, 60*usDay)
			}
			_ = s.Step(time.Duration(by) * time.Microsecond)
			steps++
		}
		if _, err := d.run(t.Context(), d.rng.IntN(8) == 0, d.batch(d.call(k))...); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d, %d steps of the running clock: %s", seed, steps, &d.stats)
	if d.stats.refills == 0 || d.stats.denials == 0 || d.stats.stoodStill == 0 || d.stats.anchored == 0 {
		t.Error("a running clock never met a refill, a denial, a clock that stood still or one anchored anew")
	}
}

// mutations are mistakes that the scripts could have. Each was a line of them once.
var mutations = []struct{ name, old, mutant string }{
	{"a bucket does not hold its last fraction", "nr > limit[6]) then return 0, d, r end", "nr >= limit[6]) then return 0, d, r end"},
	{"a bucket holds a fraction too much", "if nd > bq or (nd == bq and nr > limit[6]) then return 0, d, r end", "if nd > bq then return 0, d, r end"},
	{"a bucket fills beyond full", "if full < now then return", "if full < now - 1 then return"},
	{"a full bucket keeps a fraction missing", "if full < now then return 0, 0, 0,", "if full < now then return 0, 0, r,"},
	{"a bucket loses a fraction when it is nearly full", "if full < now then return", "if full <= now then return"},
	{"a bucket of another limit fills beyond full", "if d < 0 then\n      d, r = 0, 0\n    end", "if d < -1 then\n      d, r = 0, 0\n    end"},
	{"a full bucket of another limit keeps a fraction missing", "if d < 0 then\n      d, r = 0, 0\n    end", "if d < 0 then\n      d = 0\n    end"},
	{"the part of a microsecond is dropped", "nd, nr = nd + k, nr - k * n", "nd, nr = nd + k, 0"},
	{"the part of a microsecond is not carried", "nd, nr = nd + k, nr - k * n", "nr = nr - k * n"},
	{"a bucket is anchored a microsecond late", "if t - now <= bq then return", "if t - now <= bq + 1 then return"},
	{"every step back is written down", "if t - now <= bq then return", "if false then return"},
	{"a bucket is never anchored", "if t - now <= bq then return", "if true then return"},
	{"a bucket of another limit is anchored a microsecond early", "elseif -elapsed > bq then", "elseif -elapsed >= bq then"},
	{"a bucket of another limit is anchored a microsecond late", "elseif -elapsed > bq then", "elseif -elapsed > bq + 1 then"},
	{"a bucket of another limit is anchored at every step back", "elseif -elapsed > bq then", "elseif elapsed < 0 then"},
	{"a bucket of another limit is never anchored", "elseif -elapsed > bq then", "elseif false then"},
	{"an anchor is not written by a denied call", "if unit == limit[8] then return 0, d, r, t, 0, true, true end", "if unit == limit[8] then return 0, d, r, t, 0, true end"},
	{"a changed limit is not written by a denied call", "return 0, d, r, t, 0, true, true\nend", "return 0, d, r, t, 0, true\nend"},
	{"an anchored bucket waits", "elseif -elapsed > bq then\n    t = now", "elseif -elapsed > bq then\n    t = t"},
	{"a bucket's clock goes back with the server's", "local at = t == now and now_text or format('%d', t)", "local at = now_text"},
	{"an instant is written with 14 digits", "now_text or format('%d', t)", "tostring(t)"},
	{"a changed limit mints a full bucket", "if whole >= burst then", "if whole >= 0 then"},
	{"a changed limit mints one token", "local missing = burst - whole", "local missing = burst - whole - 1"},
	{"a changed limit drops the part of a token", "local back = bucket_scale(f, pq * n + pr, p)", "local back = 0"},
	{"a changed limit rounds up", "local back = bucket_scale(f, pq * n + pr, p)", "local back = bucket_scale(f, pq * n + pr, p) + 1"},
	{"another limit's bucket is taken as it is", "if state[4] == limit[8] then", "if state[4] then"},
	{"another limit's bucket is not converted", "if unit == limit[8] then return", "if unit then return"},
	{"a debit goes below empty", "if d > limit[5] or (d == limit[5] and r > limit[6]) then", "if false then"},
	{"a debit is forgotten when the call is denied", "write, anew = true, anew or units > 0", "write, anew = units < 0, anew"},
	{"what a bucket gets back is not written down when the call is denied", "write, anew = true, anew or units > 0", "write, anew = false, anew or units > 0"},
	{"what a bucket gets back makes it more than full", "elseif d < 0 then", "elseif false then"},
	{"what a bucket gets back is taken", "math.max(math.min(number(debit), limit[7]), -limit[7])", "math.abs(math.max(math.min(number(debit), limit[7]), -limit[7]))"},
	{"what a bucket gets back is forgotten", "math.max(math.min(number(debit), limit[7]), -limit[7])", "math.max(math.min(number(debit), limit[7]), 0)"},
	{"all callers of a count pay for one", "units = cost * count", "units = cost"},
	{"a count is granted one too many", "math.min(count, floor(left / cost))", "math.min(count, floor(left / cost) + 1)"},
	{"a count is granted one too few", "math.min(count, floor(left / cost))", "math.min(count, math.ceil(left / cost) - 1)"},
	{"more is taken ahead than an eighth", "math.min(more, floor(left / (8 * cost)))", "math.min(more, floor(left / cost))"},
	{"an eighth is rounded up", "math.min(more, floor(left / (8 * cost)))", "math.min(more, math.ceil(left / (8 * cost)))"},
	{"more is taken ahead than is asked for", "math.min(more, floor(left / (8 * cost)))", "floor(left / (8 * cost))"},
	{"a bucket's eighth is of what was left before the callers", "ahead_of(left - count * cost, cost, more)", "ahead_of(left, cost, more)"},
	{"a log's eighth is of what was left before the callers", "ahead_of(limit[2] - used - granted * cost, cost, more)", "ahead_of(limit[2] - used, cost, more)"},
	{"callers are scored ahead though nothing else is", "if more > 0 then granted, ahead = granted + more, limit[4] end", "granted, ahead = granted + more, limit[4]"},
	{"a key has no slack", "local minute_us, slack_ms = 60000000, 5000", "local minute_us, slack_ms = 60000000, 0"},
	{"a bucket's time to live forgets the clock that stands still", "keep(key, d + t - now)", "keep(key, d)"},
	{"a time to live is a millisecond short", "local spare_ms = 1 + slack_ms", "local spare_ms = slack_ms"},
	{"a bucket's time to live is not renewed in time", "full - full % minute_us + minute_us then keep", "full + minute_us then keep"},
	{"a bucket's time to live is never renewed", "full - full % minute_us + minute_us then keep", "9e15 then keep"},
	{"a log's time to live is not renewed in time", "call('PTTL', key) < floor(", "call('PTTL', key) < 0 * floor("},
	{"a bucket does not say that its clock stands still", "return 0, granted, d, r, t - now\nend\nlocal function log_ahead", "return 0, granted, d, r, 0\nend\nlocal function log_ahead"},

	{"a hit counts one microsecond too long", "format('%d', t - limit[3]))", "string.format('%.0f', t - limit[3] - 1))"},
	{"a hit counts one microsecond too short", "format('%d', t - limit[3]))", "string.format('%.0f', t - limit[3] + 1))"},
	{"the edge of the window has 14 digits", "format('%d', t - limit[3]))", "tostring(t - limit[3]))"},
	{"a hit has 14 digits", "local at = score == now and now_text or format('%d', score)", "local at = tostring(score)"},
	{"a log is anchored a microsecond early", "if base - t <= limit[3] then", "if base - t < limit[3] then"},
	{"a log is anchored a microsecond late", "if base - t <= limit[3] then", "if base - t <= limit[3] + 1 then"},
	{"a log is never anchored", "if base - t <= limit[3] then", "if true then"},
	{"a log's anchor forgets the one before", "off = '~' .. format('%d', offset + base - t)", "off = '~' .. format('%d', base - t)"},
	{"a log's anchor is not written", "if anchor then", "if false then"},
	{"a log's clock goes back with the server's", "t = base\n  end\n  local card", "end\n  local card"},
	{"9 sorts after 10", "return string.char(48 + #digits) .. digits .. suffix", "return '1' .. digits .. suffix"},
	{"a hit takes the name of the newest", "log_name(seq + i, i == units and suffix or '')", "log_name(seq + i - 1, i == units and suffix or '')"},
	{"the second 500 hits take the names of the first", "seq, units = seq + some, units - some", "units = units - some"},
	{"an old clock outlives its hits", "if used == 0 and (card > 0 or debit ~= '0') then", "if false then"},
	{"a log that began anew keeps its old clock", "seq, suffix, t, gap, score, expired, anew = 0, '', now, 0, now, 0, true", "seq, suffix, gap, score, expired, anew = 0, '', 0, t, 0, true"},
	{"trimming takes a hit that counts", "call('ZREMRANGEBYRANK', key, 0, some - 1)", "call('ZREMRANGEBYRANK', key, 0, some)"},
	{"trimming leaves one", "call('ZREMRANGEBYRANK', key, 0, some - 1)", "call('ZREMRANGEBYRANK', key, 0, some - 2)"},
	{"trimming takes too much at once", "math.max(256, 2 * units)", "math.max(1000, 2 * units)"},
	{"a wait is for the hit after", "local gone = used + cost - limit[2]", "local gone = used + cost - limit[2] + 1"},
	{"a wait forgets the hits that no longer count", "local rank = expired + gone - 1", "local rank = gone - 1"},
	{"a wait forgets that the clock stands still", "return number(oldest[2]) - t + limit[3] + gap", "return number(oldest[2]) - t + limit[3]"},
	{"the last call that fits is denied", "floor((limit[2] - used) / cost)", "floor((limit[2] - used - 1) / cost)"},
	{"a call too many is admitted", "floor((limit[2] - used) / cost)", "math.ceil((limit[2] - used) / cost)"},
	{"a debit of just one window ago counts", "if age < limit[3] then", "if age <= limit[3] then"},
	{"a debit takes the highest number from the newest", "if latest and newest and score > latest then", "if false then"},
	{"a debit is not counted", "added = added + units", "added = added"},
	{"a time to live is as short as it can be", "1 + slack_ms + 60000", "1 + slack_ms"},
	{"a unit is not written when the limit changes", "if anew or not exists then\n      call('HSET'", "if not exists then\n      call('HSET'"},
	{"a part of a microsecond is not written", "call('HSET', key, 'd', format('%d', d), 'r', format('%d', r), 't', at)", "call('HSET', key, 'd', format('%d', d), 't', at)"},
	{"a log's time to live forgets the clock that stands still", "local needed = limit[3] + gap + top - t", "local needed = limit[3] + top - t"},
	{"a log's time to live forgets what lies ahead", "local needed = limit[3] + gap + top - t", "local needed = limit[3] + gap"},
	{"an anchor's time to live forgets what lies ahead", "keep(key, limit[3] + gap + math.max(0, score - t))", "keep(key, limit[3] + gap)"},
	{"what is taken ahead counts from now", "if ahead > 0 then at = math.max(t + ahead, score) end", ""},
	{"what is taken ahead lies before the newest", "if ahead > 0 then at = math.max(t + ahead, score) end", "if ahead > 0 then at = t + ahead end"},
	{"what is taken ahead moves the key's clock", "return suffix .. '>' .. format('%d', lead)", "return suffix"},
	{"what lies ahead holds the clock where it was", "log_rename(key, newest, score, log_add(key, at, seq, units, suffix), suffix, t)", "log_add(key, at, seq, units, suffix)"},
	{"the newest is renamed as of another instant", "log_add(key, score, seq, 1, log_ahead(suffix, score - t))", "log_add(key, score, seq, 1, log_ahead(suffix, score - t + 1))"},
	{"the newest is not found under its old name", "  call('ZREM', key, newest)\n  return seq", "  return seq"},
	{"the score of what is taken ahead is not told", "if ahead > 0 then\n      b = at\n    elseif", "if ahead > 0 then\n      b = t\n    elseif"},
	{"what is given back may be over", "'(' .. format('%d', t)\n  for", "format('%d', t)\n  for"},
	{"what is given back was for later", "call('ZREMRANGEBYRANK', key, -later - some, -later - 1)", "call('ZREMRANGEBYRANK', key, -some, -1)"},
	{"one too many is given back", "call('ZREMRANGEBYRANK', key, -later - some, -later - 1)", "call('ZREMRANGEBYRANK', key, -later - some - 1, -later - 1)"},
	{"what is given back is still counted", "used, card, added = used - added, card - added, 0", "card, added = card - added, 0"},
	{"a log that was given back keeps its name for the newest", "newest or later == 0", "newest"},
	{"a usual bucket holds a microsecond too much", "if left < 0 then", "if left < -1 then"},
	{"a usual bucket grants one too many", "fits = floor((bq - a) / one)", "fits = floor((bq - a) / one) + 1"},
	{"a usual bucket does not hold its last token", "fits = floor((bq - a) / one)", "fits = math.ceil((bq - a) / one) - 1"},
	{"some of a usual call's callers are none", "fits = floor((bq - a) / one)", "fits = 0"},
	{"all callers of a usual call pay for one", "a = a + fits * one", "a = a + one"},
	{"a usual bucket is not refilled", "a = full > now and full - now or 0", "a = full > now and a or 0"},
	{"a usual bucket fills beyond full", "a = full > now and full - now or 0", "a = full - now"},
	{"a usual call takes another limit's bucket as it is", "if state[4] == unit then", "if state[4] then"},
	{"a usual call goes back with the server's clock", "and t > bq and t <= now and", "and t > bq and"},
	{"a short call that is not as usual has another cost", "cost, debit = one / limit[3], '0'", "cost, debit = 1, '0'"},
	{"a short call that is not as usual has another burst", "0, number(burst), unit }", "0, 1, unit }"},
	{"a short call that is not as usual has another rate", "'1', 1, number(p), 0, bq", "'1', 1, 1, 0, bq"},
	{"a short call that is not as usual has another capacity", "number(p), 0, bq, 0", "number(p), 0, 1, 0"},
	{"a usual bucket that is new has no time to live", "if not full or a + now >= full - full %", "if full and a + now >= full - full %"},
	{"a usual bucket's time to live is not renewed", "if not full or a + now >= full - full % minute_us + minute_us then", "if not full then"},
	{"a usual bucket's eighth is rounded up", "left = floor(left / (8 * one))", "left = math.ceil(left / (8 * one))"},
	{"more of a usual bucket is taken ahead than an eighth", "left = floor(left / (8 * one))", "left = floor(left / one)"},
	{"a usual bucket's eighth is of what was left before the callers", "left = floor(left / (8 * one))", "left = floor((bq - a) / (8 * one))"},
	{"more of a usual bucket is taken ahead than is asked for", "(left < more and left or more)", "left"},
	{"what a usual bucket gets back makes it more than full", "a + back > 0 and a + back or 0", "a + back"},
	{"what a usual bucket gets back is not written down when the call is denied", "if fits > 0 or back then", "if fits > 0 then"},
	{"what a usual bucket gets back is forgotten", "if back then a =", "if false then a ="},
	{"what a run gets back the next one gets, too", "usual, back = limit[1] == '1' and limit[2] == 1, nil", "usual = limit[1] == '1' and limit[2] == 1"},
	{"what the entries of a run tell is passed over", "more, debit, at = number(args[at]), args[at + 1], at + 2", "more, debit, at = number(args[at]), '0', at + 2"},
	{"what the entries of a run take ahead is passed over", "more, debit, at = number(args[at]), args[at + 1], at + 2", "more, debit, at = 0, args[at + 1], at + 2"},
	{"the second of a run has the words of the first", "more, debit, at = number(args[at]), args[at + 1], at + 2", "more, debit = number(args[at]), args[at + 1]"},
	{"what a log's entries tell is passed over", "if each then more, debit, at =", "if each and limit[1] == '2' then at = at + 2 elseif each then more, debit, at ="},
	{"a usual bucket is written with another's number", "if a ~= said then said, said_d, said_ms = a,", "if not said then said, said_d, said_ms = a,"},
	{"a usual bucket's time to live is another's", "said, said_d, said_ms = a, format('%d', a), nil end", "said, said_d = a, format('%d', a) end"},
	{"a usual bucket's clock is another's", "if state[3] ~= heard then", "if not heard then"},
	{"a debit is told as usual", "usual = back < 0", "usual = true"},
	{"a bucket with fractions is decided as usual", "usual, back = limit[1] == '1' and limit[2] == 1, nil", "usual, back = limit[1] == '1', nil"},
	{"one call's cost is taken of all in a run", "unit, bq, one = limit[8], limit[5], cost * limit[3]", "unit, bq, one = limit[8], limit[5], limit[3]"},
	{"what is not as usual is not decided", "if not granted then\n    if not bucket", "if not usual then\n    if not bucket"},
	{"what was usual before is decided so again", "usual, back = limit[1] == '1' and", "usual, back = usual or limit[1] == '1' and"},
	{"the time of a server is short of a digit", "#time[2] == 6 and time[1] .. time[2] or", "time[1] .. time[2] or"},
	{"a state is told without its fraction", "if not wide and (b ~= 0 or c ~= 0) then", "if not wide and c ~= 0 then"},
	{"a state is told without its clock", "if not wide and (b ~= 0 or c ~= 0) then", "if not wide and b ~= 0 then"},
	{"what came before a wide entry is forgotten", "narrow[j], narrow[j + 1], 0, 0", "narrow[j], 0, 0, 0"},
	{"what came before a wide entry is another's", "narrow[j], narrow[j + 1], 0, 0", "narrow[2], narrow[3], 0, 0"},
	{"what comes after a wide entry is narrow", "reply[out + 3], reply[out + 4] = b, c\n    out = out + 2", "reply[out + 3], reply[out + 4] = b, c"},
	{"a run is a call longer", "i + number(args[at]) - 1", "i + number(args[at])"},
	{"a look takes the state for empty", "if granted == 0 then wait = log_wait(key, limit, t, gap, expired, used, cost) end", "if granted == 0 then wait = 0 end"},
}

// luaFunction cuts one function out of a script.
func luaFunction(t *testing.T, file, name string) string {
	t.Helper()
	_, rest, ok := strings.Cut(file, "local function "+name+"(")
	body, _, ended := strings.Cut(rest, "\nend\n")
	if !ok || !ended {
		t.Fatalf("no function %s", name)
	}
	return "local function " + name + "(" + body + "\nend\n"
}

// The sums of token_bucket.lua that a plain product and quotient would get wrong by one
// once in a thousand times, too seldom for a mistake to show among random calls.
func TestLongSumsOfTheBucketScriptAreExact(t *testing.T) {
	s, _ := startDiffServer(t)
	seed := diffSeed(t)
	rng := rand.New(rand.NewPCG(seed, 2))
	t.Logf("seed %d", seed)
	const rows = 2_000
	wrong := func(body, expression string, row func() (args []int64, want *big.Int)) int {
		args, want := []any{}, make([]string, rows)
		width := 0
		for i := range want {
			numbers, w := row()
			for _, n := range numbers {
				args = append(args, n)
			}
			want[i], width = w.String(), len(numbers)
		}
		text := body + `
			local out = {}
			for i = 0, #ARGV - 1, ` + strconv.Itoa(width) + ` do
				local a = {}
				for j = 1, ` + strconv.Itoa(width) + ` do a[j] = tonumber(ARGV[i + j]) end
				out[#out + 1] = string.format('%.0f', ` + expression + `)
			end
			return out`
		got, err := s.Client().Eval(t.Context(), text, nil, args...).StringSlice()
		if err != nil {
			t.Fatal(err)
		}
		differ := 0
		for i := range want {
			if got[i] != want[i] {
				differ++
			}
		}
		return differ
	}

	most := MaxWindow.Microseconds()
	scale := func() ([]int64, *big.Int) {
		x, p := 1+rng.Int64N(most), 2+rng.Int64N(most-1)
		if rng.IntN(3) == 0 {
			x = most
		}
		f := rng.Int64N(p)
		// Half of them as close below a whole quotient as there is: f * x = p - 1 mod p.
		if near := new(big.Int).ModInverse(big.NewInt(x), big.NewInt(p)); near != nil && rng.IntN(2) == 0 {
			f = p - near.Int64()
		}
		want := new(big.Int).Mul(big.NewInt(f), big.NewInt(x))
		return []int64{f, x, p}, want.Div(want, big.NewInt(p))
	}
	body := luaFunction(t, tokenBucketLua, "bucket_scale")
	if n := wrong(body, "bucket_scale(a[1], a[2], a[3])", scale); n != 0 {
		t.Errorf("bucket_scale: %d of %d wrong", n, rows)
	}
	if n := wrong("", "math.floor(a[1] * a[2] / a[3])", scale); n == 0 {
		t.Error("a plain product is exact, too: this test shows nothing")
	}

	whole := func() ([]int64, *big.Int) {
		b := randomBucket(rng)
		burst := highestBurst(b.Rate, b.Per.Microseconds())
		r, err := TokenBucket{Rate: b.Rate, Per: b.Per, Burst: burst}.compile()
		if err != nil {
			t.Fatal(err)
		}
		// x tokens, or x less an n-th of a us: only the exact quotient tells.
		x := burst - rng.Int64N(min(burst, 1000))
		have := new(big.Int).Mul(big.NewInt(x), big.NewInt(r.p))
		if rng.IntN(2) == 0 {
			have.Sub(have, big.NewInt(1))
		}
		q, m := new(big.Int).DivMod(have, big.NewInt(r.n), new(big.Int))
		return []int64{q.Int64(), m.Int64(), r.n, r.pq, r.pr}, have.Div(have, big.NewInt(r.p))
	}
	body = luaFunction(t, tokenBucketLua, "bucket_whole")
	if n := wrong(body, "bucket_whole(a[1], a[2], a[3], a[4], a[5])", whole); n != 0 {
		t.Errorf("bucket_whole: %d of %d wrong", n, rows)
	}
	if n := wrong("", "math.floor((a[1] + a[2] / a[3]) / (a[4] + a[5] / a[3]))", whole); n == 0 {
		t.Error("a plain quotient is exact, too: this test shows nothing")
	}
}

// mutate returns the scripts with one piece replaced wherever it stands.
func mutate(t *testing.T, from scripts, old, mutant string) scripts {
	t.Helper()
	found := false
	one := func(s script) script {
		if !strings.Contains(s.text, old) {
			return s
		}
		found = true
		text := strings.ReplaceAll(s.text, old, mutant)
		sum := sha1.Sum([]byte(text))
		return script{text: text, sha: hex.EncodeToString(sum[:]), brief: s.brief}
	}
	out := scripts{charge: one(from.charge), look: one(from.look)}
	if !found {
		t.Fatalf("the scripts no longer contain %q", old)
	}
	return out
}

// A test that cannot fail proves nothing. Every one of these mistakes must be found.
func TestDifferentialRunFindsEveryMistakePutIntoTheScripts(t *testing.T) {
	s, server := startDiffServer(t)
	node := diffNode(t, s.URL(), false)
	target := nodeTarget{node}
	const enough = 100 // sessions
	first := diffSeed(t)
	t.Logf("seeds from %d", first)
	for _, m := range mutations {
		node.scripts = mutate(t, redisScripts, m.old, m.mutant)
		ops, found := 0, error(nil)
		for seed := first; found == nil && seed < first+enough; seed++ {
			d, err := newDifferential(t.Context(), server, target, seed, false)
			if err != nil {
				t.Fatal(err)
			}
			found = d.session(t.Context(), differentialSession)
			ops += d.stats.ops
		}
		if found == nil {
			t.Errorf("%s: not found in %d operations", m.name, ops)
			continue
		}
		line, _, _ := strings.Cut(found.Error(), "\n")
		// An error of arithmetic is a mistake found; a name that is none is a bad mutant.
		if strings.Contains(line, "Error compiling") || strings.Contains(line, "nonexistent global") {
			t.Errorf("%s: the script does not even run: %s", m.name, line)
			continue
		}
		t.Logf("%s: found after %d operations", m.name, ops)
	}
}

// diffCharge is one call of the charge script.
func diffCharge(t *testing.T, target nodeTarget, calls ...diffCall) []diffReply {
	t.Helper()
	_, out, err := target.run(t.Context(), false, calls)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func mustLimit(t *testing.T, l Limit) *diffLimit {
	t.Helper()
	d, err := newDiffLimit(l)
	if err != nil {
		t.Fatal(err)
	}
	return &d
}

func TestTenThousandHitsOnOneScoreLoseNone(t *testing.T) {
	s, server := startDiffServer(t)
	target := nodeTarget{diffNode(t, s.URL(), false)}
	const hits, window = 10_000, 1_000_003
	limit := mustLimit(t, SlidingLog{Limit: hits, Window: window * time.Microsecond})
	key := &diffKey{name: "hits", isLog: true}
	one := diffCall{key: key, limit: limit, cost: 1, count: 1}
	const start = 1_790_000_000_123_456
	server.setClock(start)
	for n := int64(0); n < hits; {
		batch := make([]diffCall, 100)
		for i := range batch {
			batch[i] = one
		}
		for _, r := range diffCharge(t, target, batch...) {
			n++
			if r.Granted != 1 || r.Remaining != hits-n {
				t.Fatalf("hit %d: %+v", n, r)
			}
		}
	}
	scores, err := s.Client().ZRangeWithScores(t.Context(), key.name, 0, -1).Result()
	if err != nil {
		t.Fatal(err)
	}
	if len(scores) != hits {
		t.Errorf("%d members, want %d", len(scores), hits)
	}
	for i, z := range scores { // at one score the order of the bytes is that of arrival
		if want := fmt.Sprintf("%c%d", '0'+len(fmt.Sprint(i+1)), i+1); z.Member != want || z.Score != start {
			t.Fatalf("member %d is %v at %f, want %q", i+1, z.Member, z.Score, want)
		}
	}
	for _, step := range []struct{ at, granted, retry int64 }{
		{start, 0, window},
		{start + window - 1, 0, 1},
		{start + window, 1, 0},
	} {
		server.setClock(step.at)
		if r := diffCharge(t, target, one)[0]; r.Granted != step.granted || r.RetryAfter != step.retry {
			t.Errorf("%dµs later: %+v", step.at-start, r)
		}
	}
}

func TestChangingALimitToAndFroNeverMints(t *testing.T) {
	s, server := startDiffServer(t)
	target := nodeTarget{diffNode(t, s.URL(), false)}
	seed := diffSeed(t)
	rng := rand.New(rand.NewPCG(seed, 1))
	t.Logf("seed %d", seed)
	server.setClock(1_790_000_000_123_456)
	for i := range 300 {
		limits := []*diffLimit{mustLimit(t, randomBucket(rng)), mustLimit(t, randomBucket(rng)), mustLimit(t, randomBucket(rng))}
		key := &diffKey{name: fmt.Sprintf("mint:%d", i)}
		most, admitted := limits[0].rule.capacity, int64(0)
		for n := range 40 {
			l := limits[n%len(limits)]
			cost := min(l.rule.maxCost, logUniform(rng, 1, max(1, most/4)))
			r := diffCharge(t, target, diffCall{key: key, limit: l, cost: cost, count: 1})[0]
			if n == 0 && r.Granted == 0 {
				t.Fatalf("a fresh bucket denied: %+v", r)
			}
			admitted += r.Granted * cost
			if admitted > most || admitted+r.Remaining > most {
				t.Fatalf("%v, %v, %v by turns: %d admitted and %d left of %d, with no time passed",
					limits[0].limit, limits[1].limit, limits[2].limit, admitted, r.Remaining, most)
			}
		}
	}
}

// The wait a denied caller is told counts from the new rate, so the new rate must fill the
// bucket from then on.
func TestRaisedLimitAppliesAtOnceToAnEmptyBucket(t *testing.T) {
	s, server := startDiffServer(t)
	target := nodeTarget{diffNode(t, s.URL(), false)}
	key := &diffKey{name: "raised"}
	slow := mustLimit(t, TokenBucket{Rate: 1, Per: 24 * time.Hour, Burst: 1})
	fast := mustLimit(t, TokenBucket{Rate: 10, Per: time.Second, Burst: 50})
	const start = 1_790_000_000_123_456
	server.setClock(start)
	if r := diffCharge(t, target, diffCall{key: key, limit: slow, cost: 1, count: 1})[0]; r.Granted != 1 {
		t.Fatalf("%+v", r)
	}
	ask := diffCall{key: key, limit: fast, cost: 50, count: 1}
	r := diffCharge(t, target, ask)[0]
	if want := 5 * usSecond; r.Granted != 0 || r.RetryAfter != want {
		t.Fatalf("%+v, want a wait of %dµs", r, want)
	}
	server.setClock(start + r.RetryAfter - 1)
	if r := diffCharge(t, target, ask)[0]; r.Granted != 0 || r.RetryAfter != 1 {
		t.Errorf("1µs early: %+v", r)
	}
	server.setClock(start + r.RetryAfter)
	if r := diffCharge(t, target, ask)[0]; r.Granted != 1 {
		t.Errorf("after the wait: %+v", r)
	}
}

// While a change is rolled out, processes ask under the old and the new limit by turns.
func TestDeniedCallsUnderTwoLimitsByTurnsDoNotStopTheRefill(t *testing.T) {
	s, server := startDiffServer(t)
	target := nodeTarget{diffNode(t, s.URL(), false)}
	key := &diffKey{name: "turns"}
	limits := []*diffLimit{
		mustLimit(t, TokenBucket{Rate: 1, Per: time.Minute, Burst: 1}),
		mustLimit(t, TokenBucket{Rate: 7, Per: 421 * time.Second, Burst: 1}), // a little slower
	}
	const start = 1_790_000_000_123_456
	server.setClock(start)
	ask := func(i int64) int64 {
		return diffCharge(t, target, diffCall{key: key, limit: limits[i%2], cost: 1, count: 1})[0].Granted
	}
	if ask(0) != 1 {
		t.Fatal("a fresh bucket denied")
	}
	for ms := int64(10); ; ms += 10 {
		server.setClock(start + ms*1000)
		if ask(ms/10) == 1 {
			// 421/7 s = 60.143 s a token at the slower rate.
			if ms < 60_000 || ms > 60_150 {
				t.Errorf("a token came back after %dms, want 60.0 to 60.15s", ms)
			}
			return
		}
		if ms > 61_000 {
			t.Fatal("no token came back in 61s")
		}
	}
}
