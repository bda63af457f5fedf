package ringfence_test

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/embedded"
	"github.com/ringfence/ringfence/internal/redistest"
)

// This file is one suite over every algorithm and every kind of server: what it asks of
// one it asks of all. Time stands still on the servers unless a test moves it.

// suiteStart is where the servers' clocks stand at first, in us.
const suiteStart = 1_795_239_934_123_456

// suiteHashKey makes the names of keys the same in every run.
var suiteHashKey = []byte("0123456789abcdef")

// suitePlace is a number of shards of one kind.
type suitePlace struct {
	real    bool
	shards  []ringfence.ShardConfig
	clients []*redis.Client // of the shards, for arranging and inspecting
	now     int64           // us
	setTime func(us int64)
}

// onRedis starts real servers whose clocks stand still.
func onRedis(t testing.TB, shards int) *suitePlace {
	t.Helper()
	p := &suitePlace{real: true}
	servers := make([]*redistest.Server, shards)
	for i := range servers {
		servers[i] = redistest.Start(t, redistest.Options{Clock: true})
		p.shards = append(p.shards, ringfence.ShardConfig{ID: fmt.Sprintf("real-%d", i), Primary: servers[i].URL()})
		p.clients = append(p.clients, servers[i].Client())
	}
	p.setTime = func(us int64) {
		t.Helper()
		for _, s := range servers {
			suiteMust(t, s.SetMicros(us))
		}
	}
	p.at(suiteStart)
	return p
}

// onEmbedded starts embedded shards whose clocks stand still.
func onEmbedded(t testing.TB, shards int) *suitePlace {
	t.Helper()
	servers, err := embedded.Start(shards)
	suiteMust(t, err)
	t.Cleanup(func() { _ = servers.Close() })
	p := &suitePlace{shards: servers.Config()}
	for i := range shards {
		addr, err := servers.Addr(i)
		suiteMust(t, err)
		t.Logf("embedded redis %s", addr)
		c := redis.NewClient(&redis.Options{
			Addr: addr, DisableIdentity: true,
			MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
		})
		t.Cleanup(func() { _ = c.Close() })
		p.clients = append(p.clients, c)
	}
	p.setTime = func(us int64) {
		t.Helper()
		for i := range shards {
			suiteMust(t, servers.SetTime(i, time.UnixMicro(us)))
		}
	}
	p.at(suiteStart)
	return p
}

// at stops all clocks at this instant.
func (p *suitePlace) at(us int64) { p.now = us; p.setTime(us) }

// step moves all clocks.
func (p *suitePlace) step(d time.Duration) { p.at(p.now + d.Microseconds()) }

// open opens a ring that never answers in place of a primary: an answer that is late or
// missing shows.
func (p *suitePlace) open(t testing.TB, adjust ...func(*ringfence.Config)) *ringfence.Ring {
	t.Helper()
	c := ringfence.Config{
		Shards: p.shards, HashKey: suiteHashKey, Policy: ringfence.PolicyClosed,
		Budget: 5 * time.Second, OperationTimeout: 5 * time.Second, Strict: true,
		Logger: slog.New(slog.DiscardHandler),
		// The clocks of the servers are stepped, which a denial kept here does not see.
		NearCacheKeys: -1,
	}
	for _, f := range adjust {
		f(&c)
	}
	r, err := ringfence.Open(t.Context(), c)
	suiteMust(t, err)
	t.Cleanup(func() { suiteMust(t, r.Close()) })
	return r
}

// client is the one of the shard that owns the key, and name the key's name there.
func (p *suitePlace) client(l *ringfence.Limiter, key string) (c *redis.Client, name string) {
	id, name := l.Locate(key)
	i := slices.IndexFunc(p.shards, func(s ringfence.ShardConfig) bool { return s.ID == id })
	return p.clients[i], name
}

// names are the names of all keys on all shards, but for the one that rings keep.
func (p *suitePlace) names(t testing.TB) []string {
	t.Helper()
	var out []string
	for _, c := range p.clients {
		some, err := c.Keys(context.Background(), "*").Result()
		suiteMust(t, err)
		out = append(out, some...)
	}
	return slices.DeleteFunc(out, func(n string) bool {
		return strings.HasSuffix(n, ":{fingerprint}") || strings.HasSuffix(n, ":{instances}")
	})
}

// onEachPlace runs a test on real servers and on embedded ones.
func onEachPlace(t *testing.T, shards int, f func(t *testing.T, p *suitePlace)) {
	t.Run("redis", func(t *testing.T) { f(t, onRedis(t, shards)) })
	t.Run("embedded", func(t *testing.T) { f(t, onEmbedded(t, shards)) })
}

// suiteKinds are the algorithms. Each limit admits n at once to a fresh key, and n again
// after per.
var suiteKinds = []struct {
	name  string
	limit func(n int64, per time.Duration) ringfence.Limit
}{
	{"token bucket", func(n int64, per time.Duration) ringfence.Limit {
		return ringfence.TokenBucket{Rate: n, Per: per, Burst: n}
	}},
	{"sliding log", func(n int64, per time.Duration) ringfence.Limit {
		return ringfence.SlidingLog{Limit: n, Window: per}
	}},
}

// onEachKind runs a test for every algorithm on every kind of server, on a ring with one
// limiter for n every per.
func onEachKind(t *testing.T, shards int, n int64, per time.Duration, f func(t *testing.T, p *suitePlace, r *ringfence.Ring, l *ringfence.Limiter)) {
	onEachPlace(t, shards, func(t *testing.T, p *suitePlace) {
		r := p.open(t)
		for _, k := range suiteKinds {
			t.Run(k.name, func(t *testing.T) {
				p.at(suiteStart)
				f(t, p, r, suiteLimiter(t, r, strings.ReplaceAll(k.name, " ", "-"), k.limit(n, per)))
			})
		}
	})
}

func suiteLimiter(t testing.TB, r *ringfence.Ring, name string, limit ringfence.Limit) *ringfence.Limiter {
	t.Helper()
	l, err := r.Limiter(name, limit)
	suiteMust(t, err)
	return l
}

func suiteMust(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// takeExactly asks for cost units and wants the primary's own answer.
func takeExactly(t testing.TB, l *ringfence.Limiter, key string, cost int64) ringfence.Decision {
	t.Helper()
	d, err := l.AllowN(context.Background(), key, cost)
	suiteMust(t, err)
	return exactly(t, d)
}

// peek is takeExactly without taking.
func peek(t testing.TB, l *ringfence.Limiter, key string) ringfence.Decision {
	t.Helper()
	d, err := l.Peek(context.Background(), key)
	suiteMust(t, err)
	return exactly(t, d)
}

func exactly(t testing.TB, d ringfence.Decision) ringfence.Decision {
	t.Helper()
	if d.Source != ringfence.SourcePrimary || d.Cause != ringfence.CauseNone {
		t.Fatalf("answered by %s because of %q, want by the primary", d.Source, d.Cause)
	}
	return d
}

// wantDecision compares what a Decision says of the limit.
func wantDecision(t testing.TB, what string, d ringfence.Decision, allowed bool, remaining int64, retry, reset time.Duration) {
	t.Helper()
	if d.Allowed != allowed || d.Remaining != remaining || d.RetryAfter != retry || d.ResetAfter != reset {
		t.Errorf("%s: allowed %t, %d left, retry in %s, reset in %s; want %t, %d, %s, %s", what,
			d.Allowed, d.Remaining, d.RetryAfter, d.ResetAfter, allowed, remaining, retry, reset)
	}
}

func TestAFreshKeyStartsFullAndAllOfOneInstantCount(t *testing.T) {
	const n, per = 7, 700 * time.Millisecond
	onEachKind(t, 1, n, per, func(t *testing.T, _ *suitePlace, _ *ringfence.Ring, l *ringfence.Limiter) {
		wantDecision(t, "a look at a fresh key", peek(t, l, "k"), true, n, 0, 0)
		for i := int64(1); i <= n; i++ {
			d := takeExactly(t, l, "k", 1)
			if !d.Allowed || d.Remaining != n-i || d.Limit != n || d.RetryAfter != 0 {
				t.Fatalf("call %d of %d at one instant: %+v", i, n, d)
			}
		}
		d := takeExactly(t, l, "k", 1)
		if d.Allowed || d.Remaining != 0 || d.RetryAfter <= 0 || d.RetryAfter > per || d.ResetAfter != per {
			t.Errorf("call %d: %+v", n+1, d)
		}
	})
}

func TestWeightedCostIsTakenWholeOrNotAtAll(t *testing.T) {
	onEachKind(t, 1, 10, time.Second, func(t *testing.T, _ *suitePlace, _ *ringfence.Ring, l *ringfence.Limiter) {
		for _, c := range []struct {
			cost    int64
			allowed bool
			left    int64
		}{
			{7, true, 3},
			{4, false, 3}, // 3 are left, and stay
			{10, false, 3},
			{2, true, 1},
			{2, false, 1},
			{1, true, 0},
			{1, false, 0},
		} {
			if d := takeExactly(t, l, "k", c.cost); d.Allowed != c.allowed || d.Remaining != c.left {
				t.Errorf("cost %d: allowed %t, %d left; want %t, %d", c.cost, d.Allowed, d.Remaining, c.allowed, c.left)
			}
		}
	})
}

// A client who does not stop asking is admitted at the very instant it was told at
// first, and not a microsecond before.
func TestDeniedCallsTakeNothingAndExtendNoWait(t *testing.T) {
	const n, per = 4, time.Second
	onEachKind(t, 1, n, per, func(t *testing.T, p *suitePlace, _ *ringfence.Ring, l *ringfence.Limiter) {
		for _, cost := range []int64{1, 3, n} {
			key := fmt.Sprint("k", cost)
			for range n {
				takeExactly(t, l, key, 1)
				p.step(time.Millisecond)
			}
			first := takeExactly(t, l, key, cost)
			if first.Allowed {
				t.Fatalf("cost %d: admitted beyond the limit", cost)
			}
			due := p.now + first.RetryAfter.Microseconds()
			stored := suiteDump(t, p, l, key)
			for p.now < due-1 {
				p.at(min(p.now+17_001, due-1))
				for range 3 {
					d := takeExactly(t, l, key, cost)
					if d.Allowed || p.now+d.RetryAfter.Microseconds() != due {
						t.Fatalf("cost %d, %d us early: allowed %t, retry at %d, want %d", cost, due-p.now, d.Allowed, p.now+d.RetryAfter.Microseconds(), due)
					}
				}
			}
			if now := suiteDump(t, p, l, key); now != stored {
				t.Errorf("cost %d: denied calls changed what is stored from %q to %q", cost, stored, now)
			}
			p.at(due)
			if d := takeExactly(t, l, key, cost); !d.Allowed {
				t.Errorf("cost %d: denied at the instant promised: %+v", cost, d)
			}
		}
	})
}

// suiteDump is the stored state as one string.
func suiteDump(t testing.TB, p *suitePlace, l *ringfence.Limiter, key string) string {
	t.Helper()
	c, name := p.client(l, key)
	ctx := context.Background()
	kind, err := c.Type(ctx, name).Result()
	suiteMust(t, err)
	switch kind {
	case "hash":
		h, err := c.HGetAll(ctx, name).Result()
		suiteMust(t, err)
		return fmt.Sprint(h)
	case "zset":
		z, err := c.ZRangeWithScores(ctx, name, 0, -1).Result()
		suiteMust(t, err)
		return fmt.Sprintf("%v", z)
	case "string":
		s, err := c.Get(ctx, name).Result()
		suiteMust(t, err)
		return s
	}
	return kind
}

func TestResetAfterIsTheInstantTheKeyIsFullAgain(t *testing.T) {
	const n, per = 5, 300 * time.Millisecond
	onEachKind(t, 1, n, per, func(t *testing.T, p *suitePlace, _ *ringfence.Ring, l *ringfence.Limiter) {
		takeExactly(t, l, "k", 2)
		p.step(7 * time.Millisecond)
		d := takeExactly(t, l, "k", 1)
		p.step(d.ResetAfter - time.Microsecond)
		if d := peek(t, l, "k"); d.ResetAfter != time.Microsecond || d.Remaining != n-1 {
			t.Errorf("one microsecond before: %+v", d)
		}
		p.step(time.Microsecond)
		wantDecision(t, "at that instant", peek(t, l, "k"), true, n, 0, 0)
		wantDecision(t, "all at once", takeExactly(t, l, "k", n), true, 0, 0, per)
	})
}

func TestPeekTakesNothing(t *testing.T) {
	onEachKind(t, 1, 3, time.Minute, func(t *testing.T, p *suitePlace, _ *ringfence.Ring, l *ringfence.Limiter) {
		for range 10 {
			wantDecision(t, "fresh", peek(t, l, "k"), true, 3, 0, 0)
		}
		if c, name := p.client(l, "k"); c.Exists(t.Context(), name).Val() != 0 {
			t.Error("looking at a fresh key wrote it")
		}
		takeExactly(t, l, "k", 2)
		before := suiteDump(t, p, l, "k")
		for range 10 {
			if d := peek(t, l, "k"); !d.Allowed || d.Remaining != 1 {
				t.Fatalf("one left: %+v", d)
			}
		}
		takeExactly(t, l, "k", 1)
		denied := takeExactly(t, l, "k", 1)
		if d := peek(t, l, "k"); d != denied {
			t.Errorf("Peek says %+v where Allow says %+v", d, denied)
		}
		if before == suiteDump(t, p, l, "k") {
			t.Error("the last unit left no trace: this test sees nothing")
		}
	})
}

func TestResetForgetsWhatTheKeyHasUsed(t *testing.T) {
	onEachKind(t, 3, 3, time.Minute, func(t *testing.T, p *suitePlace, _ *ringfence.Ring, l *ringfence.Limiter) {
		suiteMust(t, l.Reset(t.Context(), "never seen"))
		takeExactly(t, l, "k", 3)
		takeExactly(t, l, "other", 3)
		suiteMust(t, l.Reset(t.Context(), "k"))
		wantDecision(t, "after Reset", takeExactly(t, l, "k", 3), true, 0, 0, time.Minute)
		if d := peek(t, l, "other"); d.Allowed {
			t.Error("Reset forgot another key too")
		}
	})
}

// Timelines, instants in ms unless us is given.
func TestTimelines(t *testing.T) {
	type row struct {
		at          time.Duration
		cost        int64
		allowed     bool
		left        int64
		retry, wait time.Duration // RetryAfter, ResetAfter
	}
	const ms, us = time.Millisecond, time.Microsecond
	for _, c := range []struct {
		limit ringfence.Limit
		rows  []row
	}{
		{ringfence.SlidingLog{Limit: 3, Window: time.Second}, []row{
			{0, 1, true, 2, 0, 1000 * ms},
			{0, 1, true, 1, 0, 1000 * ms},
			{400 * ms, 1, true, 0, 0, 1000 * ms},
			{400 * ms, 1, false, 0, 600 * ms, 1000 * ms},
			{999*ms + 999*us, 1, false, 0, 1 * us, 400*ms + 1*us},
			{1000 * ms, 1, true, 1, 0, 1000 * ms}, // exactly one window after an admitted one
			{1000 * ms, 1, true, 0, 0, 1000 * ms},
			{1000 * ms, 1, false, 0, 400 * ms, 1000 * ms},
			{1400 * ms, 2, false, 1, 600 * ms, 600 * ms},
			{1400 * ms, 1, true, 0, 0, 1000 * ms},
			{2000 * ms, 3, false, 2, 400 * ms, 400 * ms},
			{2400 * ms, 3, true, 0, 0, 1000 * ms},
			{9000 * ms, 3, true, 0, 0, 1000 * ms}, // and long after
		}},
		{ringfence.TokenBucket{Rate: 1, Per: time.Second, Burst: 3}, []row{
			{0, 1, true, 2, 0, 1000 * ms},
			{0, 2, true, 0, 0, 3000 * ms},
			{400 * ms, 1, false, 0, 600 * ms, 2600 * ms},
			{999*ms + 999*us, 1, false, 0, 1 * us, 2000*ms + 1*us},
			{1000 * ms, 1, true, 0, 0, 3000 * ms},
			{3500 * ms, 3, false, 2, 500 * ms, 500 * ms},
			{3500 * ms, 2, true, 0, 0, 2500 * ms}, // half a token stays
			{4000 * ms, 1, true, 0, 0, 3000 * ms},
			{99000 * ms, 3, true, 0, 0, 3000 * ms}, // never above Burst
			{99000 * ms, 1, false, 0, 1000 * ms, 3000 * ms},
		}},
		// The worked numbers of Decision.
		{ringfence.TokenBucket{Rate: 10, Per: time.Second, Burst: 20}, []row{
			{0, 17, true, 3, 0, 1700 * ms},
			{50 * ms, 2, true, 1, 0, 1850 * ms}, // of 3.5
			{50 * ms, 1, true, 0, 0, 1950 * ms},
			{50 * ms, 2, false, 0, 150 * ms, 1950 * ms}, // of 0.5
		}},
		// Three tokens in 10 us: a token is 3.33 us, and none is lost or found.
		{ringfence.TokenBucket{Rate: 3, Per: 10 * us, Burst: 3}, []row{
			{0, 3, true, 0, 0, 10 * us},
			{3 * us, 1, false, 0, 1 * us, 7 * us},
			{4 * us, 1, true, 0, 0, 10 * us}, // 1.2 were there; 9.33 us are missing
			{6 * us, 1, false, 0, 1 * us, 8 * us},
			{7 * us, 1, true, 0, 0, 10 * us}, // 1.1; 9.67 us
			{10 * us, 1, true, 0, 0, 10 * us},
			{13 * us, 1, false, 0, 1 * us, 7 * us},
		}},
	} {
		t.Run(c.limit.String(), func(t *testing.T) {
			onEachPlace(t, 1, func(t *testing.T, p *suitePlace) {
				l := suiteLimiter(t, p.open(t), "timeline", c.limit)
				for i, r := range c.rows {
					p.at(suiteStart + r.at.Microseconds())
					wantDecision(t, fmt.Sprintf("row %d at %s, cost %d", i, r.at, r.cost),
						takeExactly(t, l, "k", r.cost), r.allowed, r.left, r.retry, r.wait)
				}
			})
		})
	}
}

// Whatever the arrivals: no window of a sliding log holds more than the limit, and no
// call is denied that would have fitted.
func TestASlidingLogAdmitsExactlyTheLimitInAnyWindow(t *testing.T) {
	const n, window, calls = 5, 100 * time.Millisecond, 400
	onEachPlace(t, 1, func(t *testing.T, p *suitePlace) {
		l := suiteLimiter(t, p.open(t), "any-window", ringfence.SlidingLog{Limit: n, Window: window})
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rnd := rand.New(rand.NewPCG(seed, 0))
		type admitted struct{ at, cost int64 }
		var log []admitted
		yes := 0
		for i := range calls {
			switch rnd.IntN(4) {
			case 0: // the same instant
			case 1: // an instant at which one leaves the window, or a microsecond before
				if len(log) > 0 {
					p.at(max(p.now, log[rnd.IntN(len(log))].at+window.Microseconds()-rnd.Int64N(2)))
				}
			default:
				p.at(p.now + rnd.Int64N(40_000))
			}
			used := int64(0)
			for _, a := range log {
				if a.at > p.now-window.Microseconds() {
					used += a.cost
				}
			}
			cost := 1 + rnd.Int64N(3)
			d := takeExactly(t, l, "k", cost)
			if d.Allowed != (used+cost <= n) {
				t.Fatalf("call %d of cost %d with %d used: allowed %t", i, cost, used, d.Allowed)
			}
			if d.Allowed {
				log = append(log, admitted{p.now, cost})
				yes++
			}
		}
		if yes < calls/10 || yes > calls*9/10 {
			t.Errorf("%d of %d admitted: the arrivals do not press the limit", yes, calls)
		}
	})
}

func TestAllowManyDecidesInOrderOverShardsAndOperations(t *testing.T) {
	const n, keys, entries = 4, 60, 500 // 500 entries on 3 shards: several operations each
	onEachKind(t, 3, n, time.Hour, func(t *testing.T, p *suitePlace, _ *ringfence.Ring, l *ringfence.Limiter) {
		rnd := rand.New(rand.NewPCG(1, 2))
		reqs := make([]ringfence.Request, entries)
		for i := range reqs {
			reqs[i] = ringfence.Request{Key: fmt.Sprint("k", rnd.IntN(keys)), Cost: 1 + rnd.Int64N(3)}
		}
		got, err := l.AllowMany(t.Context(), reqs)
		suiteMust(t, err)
		if len(got) != len(reqs) {
			t.Fatalf("%d decisions for %d requests", len(got), len(reqs))
		}
		used, shards := map[string]int64{}, map[string]bool{}
		for i, q := range reqs {
			want := used[q.Key]+q.Cost <= n
			if want {
				used[q.Key] += q.Cost
			}
			d := exactly(t, got[i])
			if owner, _ := l.Locate(q.Key); d.Shard != owner {
				t.Errorf("entry %d: shard %q, owner %q", i, d.Shard, owner)
			}
			shards[d.Shard] = true
			if d.Allowed != want || d.Remaining != n-used[q.Key] {
				t.Errorf("entry %d, %v: allowed %t, %d left; want %t, %d", i, q, d.Allowed, d.Remaining, want, n-used[q.Key])
			}
		}
		if len(shards) != len(p.shards) {
			t.Errorf("the keys lie on %d of %d shards", len(shards), len(p.shards))
		}
		none, err := l.AllowMany(t.Context(), nil)
		if err != nil || len(none) != 0 {
			t.Errorf("of nothing: %v, %v", none, err)
		}
	})
}

func TestOneInvalidEntryOfAllowManyChargesNothing(t *testing.T) {
	onEachKind(t, 3, 4, time.Hour, func(t *testing.T, p *suitePlace, _ *ringfence.Ring, l *ringfence.Limiter) {
		before := len(p.names(t))
		for _, bad := range []struct {
			entry ringfence.Request
			field string
		}{
			{ringfence.Request{Key: "", Cost: 1}, "reqs[150].Key"},
			{ringfence.Request{Key: strings.Repeat("k", 513), Cost: 1}, "reqs[150].Key"},
			{ringfence.Request{Key: "k", Cost: 0}, "reqs[150].Cost"},
			{ringfence.Request{Key: "k", Cost: -1}, "reqs[150].Cost"},
			{ringfence.Request{Key: "k", Cost: 5}, "reqs[150].Cost"},
		} {
			reqs := make([]ringfence.Request, 200)
			for i := range reqs {
				reqs[i] = ringfence.Request{Key: fmt.Sprint("k", i), Cost: 1}
			}
			reqs[150] = bad.entry
			got, err := l.AllowMany(t.Context(), reqs)
			wantField(t, err, bad.field)
			if got != nil {
				t.Errorf("%s: decisions beside the error", bad.field)
			}
		}
		_, err := l.AllowMany(t.Context(), make([]ringfence.Request, ringfence.MaxMany+1))
		wantField(t, err, "reqs")
		if after := len(p.names(t)); after != before {
			t.Errorf("%d keys were written", after-before)
		}
	})
}

// commandCalls is how often a server has run commands since CONFIG RESETSTAT, by name.
func commandCalls(t testing.TB, c *redis.Client) map[string]int {
	t.Helper()
	text, err := c.Info(context.Background(), "commandstats").Result()
	suiteMust(t, err)
	out := map[string]int{}
	for line := range strings.Lines(text) {
		name, rest, ok := strings.Cut(strings.TrimPrefix(line, "cmdstat_"), ":calls=")
		if !ok {
			continue
		}
		count, _, _ := strings.Cut(rest, ",")
		out[name], err = strconv.Atoi(count)
		suiteMust(t, err)
	}
	return out
}

func TestAllowManyIsOneRoundTripAShard(t *testing.T) {
	p := onRedis(t, 3)
	r := p.open(t)
	for _, k := range suiteKinds {
		l := suiteLimiter(t, r, strings.ReplaceAll(k.name, " ", "-"), k.limit(10, time.Hour))
		perShard := map[string]int{}
		var reqs []ringfence.Request
		for i := 0; len(reqs) < 3*64; i++ { // MaxBatch of them for each
			key := fmt.Sprint("k", i)
			if id, _ := l.Locate(key); perShard[id] < 64 {
				perShard[id]++
				reqs = append(reqs, ringfence.Request{Key: key, Cost: 1})
			}
		}
		for _, c := range p.clients {
			suiteMust(t, c.ConfigResetStat(t.Context()).Err())
		}
		_, err := l.AllowMany(t.Context(), reqs)
		suiteMust(t, err)
		for i, c := range p.clients {
			calls := commandCalls(t, c)
			if calls["evalsha"] != 1 || calls["eval"] != 0 || calls["script|load"] != 0 {
				t.Errorf("%s, shard %d: %d EVALSHA, %d EVAL", k.name, i, calls["evalsha"], calls["eval"])
			}
		}
	}
}

func TestEveryKeyHasATTLThatOutlivesItsStateByLittle(t *testing.T) {
	const n, per, slack = 300, 90 * time.Second, 65 * time.Second // scripts/head.lua: a minute to spare
	onEachKind(t, 1, n, per, func(t *testing.T, p *suitePlace, _ *ringfence.Ring, l *ringfence.Limiter) {
		check := func(what string, d ringfence.Decision) {
			t.Helper()
			c, name := p.client(l, "k")
			ttl := c.PTTL(t.Context(), name).Val()
			// What only repairs need not know when the key's state ends.
			if ttl < d.ResetAfter || ttl > max(d.ResetAfter, per)+slack+time.Millisecond {
				t.Errorf("%s: TTL %s, while the state lasts %s", what, ttl, d.ResetAfter)
			}
		}
		check("first", takeExactly(t, l, "k", 1))
		p.step(11*time.Millisecond + 7*time.Microsecond)
		check("second", takeExactly(t, l, "k", n-1))
		p.step(time.Millisecond)
		check("denied", takeExactly(t, l, "k", n))
		p.step(30 * time.Second)
		check("denied later", takeExactly(t, l, "k", n))
		c, name := p.client(l, "k")
		p.step(c.PTTL(t.Context(), name).Val() + time.Millisecond)
		if left := p.names(t); slices.Contains(left, name) {
			t.Error("an idle key does not vanish")
		}
	})
}

// A denied call finds it out at once, an admitted one when it comes in another minute than
// the one before: looking at the time to live at every call would be dear.
func TestAKeyWithoutATTLGetsOneWithinAMinuteOfCallsEvenIfDenied(t *testing.T) {
	const n, per = 3, 2 * time.Minute
	onEachKind(t, 1, n, per, func(t *testing.T, p *suitePlace, _ *ringfence.Ring, l *ringfence.Limiter) {
		for _, c := range []struct {
			key         string
			first, cost int64
			later       time.Duration
			allowed     bool
		}{
			{"denied", n, 1, 0, false},
			{"admitted", 1, 1, time.Minute, true},
		} {
			takeExactly(t, l, c.key, c.first)
			cl, name := p.client(l, c.key)
			if !cl.Persist(t.Context(), name).Val() {
				t.Fatalf("%s: there was no TTL to take away", c.key)
			}
			peek(t, l, c.key) // may not write, so it repairs nothing
			if ttl := cl.PTTL(t.Context(), name).Val(); ttl != -1 {
				t.Errorf("%s: a look gave the key a TTL of %s", c.key, ttl)
			}
			p.step(c.later)
			d := takeExactly(t, l, c.key, c.cost)
			if d.Allowed != c.allowed {
				t.Fatalf("%s: allowed %t", c.key, d.Allowed)
			}
			if ttl := cl.PTTL(t.Context(), name).Val(); ttl < d.ResetAfter || ttl > per+66*time.Second {
				t.Errorf("%s: TTL %s, want %s to %s", c.key, ttl, d.ResetAfter, per+66*time.Second)
			}
		}
	})
}

// A log that was begun under a short window lives as long as a longer one needs it.
func TestALongerWindowLengthensTheTTLAtOnce(t *testing.T) {
	onEachPlace(t, 1, func(t *testing.T, p *suitePlace) {
		short := suiteLimiter(t, p.open(t), "w", ringfence.SlidingLog{Limit: 10, Window: time.Second})
		long := suiteLimiter(t, p.open(t), "w", ringfence.SlidingLog{Limit: 10, Window: time.Hour})
		takeExactly(t, short, "k", 1)
		p.step(time.Millisecond)
		takeExactly(t, long, "k", 9)
		p.step(70 * time.Second)
		if d := takeExactly(t, long, "k", 10); d.Allowed {
			t.Error("10 more of 10 an hour are admitted 70 s after 9")
		}
	})
}

// hostileKeys would do harm if they were part of a key's name, a pattern or a command.
var hostileKeys = []string{
	"{", "}", "}{", "{}", "{a}", "{b}", "a}b{c", "{{x}}", "\n", "\r\nFLUSHALL\r\n", "\x00", "a\x00b", "a\x00",
	"\xff\xfe", "\xc3\x28", "*", "?", "[a-z]*", "rf:1:{fingerprint}", ":", " ", "a ", " a", "a", "A", "'", "\"", "\\",
	"$(x)", "%s", "-1", "0", "nil", "é", "e\u0301", strings.Repeat("{", 512), strings.Repeat("\x00", 512),
}

func TestHostileKeysAreSeparateHarmlessAndNowhereInTheNames(t *testing.T) {
	onEachKind(t, 3, 2, time.Hour, func(t *testing.T, p *suitePlace, _ *ringfence.Ring, l *ringfence.Limiter) {
		before := p.names(t)
		for _, left := range []int64{1, 0} {
			for _, k := range hostileKeys {
				if d := takeExactly(t, l, k, 1); !d.Allowed || d.Remaining != left {
					t.Errorf("key %q: allowed %t, %d left, want %d", k, d.Allowed, d.Remaining, left)
				}
			}
		}
		reqs := make([]ringfence.Request, len(hostileKeys))
		for i, k := range hostileKeys {
			reqs[i] = ringfence.Request{Key: k, Cost: 1}
		}
		many, err := l.AllowMany(t.Context(), reqs)
		suiteMust(t, err)
		for i, d := range many {
			if exactly(t, d).Allowed {
				t.Errorf("key %q: admitted thrice", hostileKeys[i])
			}
		}
		pattern := regexp.MustCompile(`^rf:1:\{[A-Za-z0-9_-]{22}\}$`)
		added := slices.DeleteFunc(p.names(t), func(n string) bool { return slices.Contains(before, n) })
		if len(added) != len(hostileKeys) {
			t.Errorf("%d keys were written for %d", len(added), len(hostileKeys))
		}
		for _, name := range added {
			if !pattern.MatchString(name) {
				t.Errorf("name %q", name)
			}
		}
		for _, k := range hostileKeys {
			if _, name := p.client(l, k); !slices.Contains(added, name) {
				t.Errorf("key %q: Locate says %q, which is not there", k, name)
			}
			suiteMust(t, l.Reset(t.Context(), k))
		}
		if now := p.names(t); len(now) != len(before) {
			t.Errorf("%d keys are left after Reset", len(now)-len(before))
		}
		long := "a-key-that-would-be-seen-in-its-name"
		takeExactly(t, l, long, 1)
		for _, name := range p.names(t) {
			if strings.Contains(name, "seen") {
				t.Errorf("the name %q holds the key", name)
			}
		}
	})
}

// poisons put something at a key that the limiter did not write. The state has been
// charged once before.
var poisons = map[string]struct {
	kind string // the algorithm it is meant for; "" is all
	put  func(c *redis.Client, name string) error
}{
	"a string": {"", func(c *redis.Client, name string) error {
		return c.Set(context.Background(), name, "x", 0).Err()
	}},
	"a list": {"", func(c *redis.Client, name string) error {
		c.Del(context.Background(), name)
		return c.RPush(context.Background(), name, "x").Err()
	}},
	"a set": {"", func(c *redis.Client, name string) error {
		c.Del(context.Background(), name)
		return c.SAdd(context.Background(), name, "x").Err()
	}},
	"a hash with other fields": {"", func(c *redis.Client, name string) error {
		c.Del(context.Background(), name)
		return c.HSet(context.Background(), name, "balance", 12).Err()
	}},
	"a sorted set with other members": {"", func(c *redis.Client, name string) error {
		c.Del(context.Background(), name)
		return c.ZAdd(context.Background(), name, redis.Z{Score: 12, Member: "alice"}, redis.Z{Score: 13, Member: "bob"}).Err()
	}},
	"d not a number":           poisonField("d", "nan"),
	"d infinite":               poisonField("d", "inf"),
	"d negative":               poisonField("d", "-1"),
	"d a word":                 poisonField("d", "abc"),
	"d empty":                  poisonField("d", ""),
	"d a fraction":             poisonField("d", "0.5"),
	"r not a number":           poisonField("r", "nan"),
	"r too large":              poisonField("r", "1e300"),
	"t not a number":           poisonField("t", "-nan"),
	"t in the year 1e86":       poisonField("t", "1e100"),
	"u a word":                 poisonField("u", "x"),
	"u zero":                   poisonField("u", "0:0:0"),
	"u beyond 2^53":            poisonField("u", "9007199254740992:1:9007199254740992"),
	"u of a long period":       poisonField("u", "1:"+strings.Repeat("9", 300)+":1000000000"),
	"u of an endless period":   poisonField("u", "1:"+strings.Repeat("9", 400)+":1000000000"),
	"u of a long time to fill": poisonField("u", "1:31622400000000:2"),
	"no u": {"token bucket", func(c *redis.Client, name string) error {
		return c.HDel(context.Background(), name, "u").Err()
	}},
	"only u": {"token bucket", func(c *redis.Client, name string) error {
		return c.HDel(context.Background(), name, "d", "r", "t").Err()
	}},
	"a member of no number":        poisonMember("alice", suiteStart),
	"a member of the wrong length": poisonMember("37", suiteStart),
	"a member of 16 digits":        poisonMember("@1234567890123456", suiteStart),
	"a member with garbage behind": poisonMember("17x", suiteStart),
	"a member with a wild offset":  poisonMember("17~x", suiteStart),
	"a member with a huge offset":  poisonMember("17~"+strings.Repeat("9", 400), suiteStart),
	"a score with a fraction":      poisonMember("17", suiteStart+0.5),
	"a score without end":          poisonMember("17", math.Inf(1)),
	"a score of the year 1e86":     poisonMember("17", 1e100),
}

type poison = struct {
	kind string
	put  func(c *redis.Client, name string) error
}

func poisonField(field, value string) poison {
	return poison{"token bucket", func(c *redis.Client, name string) error {
		return c.HSet(context.Background(), name, field, value).Err()
	}}
}

func poisonMember(member string, score float64) poison {
	return poison{"sliding log", func(c *redis.Client, name string) error {
		return c.ZAdd(context.Background(), name, redis.Z{Score: score, Member: member}).Err()
	}}
}

func TestAPoisonedKeySpoilsOnlyItsOwnEntryAndResetHealsIt(t *testing.T) {
	const n, keys, bad = 5, 64, 17
	names := make([]string, 0, len(poisons))
	for name := range poisons {
		names = append(names, name)
	}
	slices.Sort(names)
	onEachPlace(t, 1, func(t *testing.T, p *suitePlace) {
		r := p.open(t)
		for _, k := range suiteKinds {
			l := suiteLimiter(t, r, strings.ReplaceAll(k.name, " ", "-"), k.limit(n, time.Hour))
			for _, name := range names {
				poison := poisons[name]
				if poison.kind != "" && poison.kind != k.name {
					continue
				}
				t.Run(k.name+" meets "+name, func(t *testing.T) {
					reqs := make([]ringfence.Request, keys)
					for i := range reqs {
						reqs[i] = ringfence.Request{Key: fmt.Sprint(name, i), Cost: 1}
					}
					_, err := l.AllowMany(t.Context(), reqs)
					suiteMust(t, err)
					sick := reqs[bad].Key
					c, stored := p.client(l, sick)
					suiteMust(t, poison.put(c, stored))
					before := suiteDump(t, p, l, sick)
					for round := int64(2); round <= n+1; round++ {
						got, err := l.AllowMany(t.Context(), reqs)
						suiteMust(t, err)
						for i, d := range got {
							if i == bad {
								if d.Cause != ringfence.CauseCorrupt || d.Source != ringfence.SourcePolicy || d.Allowed || d.Remaining != ringfence.Unknown {
									t.Fatalf("the poisoned key: %+v", d)
								}
								continue
							}
							if exactly(t, d).Allowed != (round <= n) || d.Remaining != max(0, n-round) {
								t.Fatalf("round %d, key %d beside it: %+v", round, i, d)
							}
						}
					}
					d, err := l.Peek(t.Context(), sick)
					suiteMust(t, err)
					if d.Cause != ringfence.CauseCorrupt {
						t.Errorf("a look: %+v", d)
					}
					if d, err = l.Allow(t.Context(), sick); err != nil || d.Cause != ringfence.CauseCorrupt || d.Allowed {
						t.Errorf("a call by itself: %+v, %v", d, err)
					}
					if after := suiteDump(t, p, l, sick); after != before {
						t.Errorf("what is not ours was changed from %q to %q", before, after)
					}
					suiteMust(t, l.Reset(t.Context(), sick))
					if d := takeExactly(t, l, sick, 1); !d.Allowed || d.Remaining != n-1 {
						t.Errorf("after Reset: %+v", d)
					}
				})
			}
		}
	})
}

func TestOneKeyUnderTwoLimitersOrAlgorithmsIsTwoKeys(t *testing.T) {
	onEachPlace(t, 2, func(t *testing.T, p *suitePlace) {
		r, other := p.open(t), p.open(t)
		var limiters []*ringfence.Limiter
		for _, k := range suiteKinds {
			for _, name := range []string{"a", "b", "ab"} {
				limiters = append(limiters, suiteLimiter(t, r, strings.ReplaceAll(k.name[:5], " ", "-")+name, k.limit(2, time.Hour)))
			}
		}
		// One name, another algorithm: only another ring (a later release, say) can have it.
		limiters = append(limiters, suiteLimiter(t, other, "slidia", suiteKinds[0].limit(2, time.Hour)))
		limiters = append(limiters, suiteLimiter(t, other, "slidi", suiteKinds[0].limit(2, time.Hour)))
		for _, left := range []int64{1, 0} {
			for i, l := range limiters {
				if d := takeExactly(t, l, "bk", 1); !d.Allowed || d.Remaining != left {
					t.Errorf("limiter %d %q: %+v", i, l.Name(), d)
				}
			}
		}
		// And two rings with one configuration share.
		if d := takeExactly(t, suiteLimiter(t, other, "slidib", suiteKinds[1].limit(2, time.Hour)), "bk", 1); d.Allowed {
			t.Errorf("another ring does not see what was used: %+v", d)
		}
	})
}
