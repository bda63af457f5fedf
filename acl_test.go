package ringfence

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence/internal/redistest"
)

// What Go sends besides what the scripts call. HELLO and AUTH need no permission.
// Optional is what can be refused without any decision being the worse for it, and what
// is lost then.
var (
	primarySends = []string{"evalsha", "eval", "evalsha_ro", "eval_ro", "script|load", "unlink", "info", "time", "hset", "pexpire", "hgetall", "hdel"}
	readerSends  = []string{"evalsha_ro", "eval_ro", "script|load", "info"}
	aclOptional  = []string{"script|load", "info", "hgetall", "hdel"}
)

// commandsOf finds every command that a script calls.
func commandsOf(t *testing.T, s script) []string {
	t.Helper()
	calls := regexp.MustCompile(`call\('([A-Z]+)'`).FindAllStringSubmatch(s.text, -1)
	if all := strings.Count(s.text, "call("); len(calls) == 0 || len(calls) != all {
		t.Fatalf("%d of the script's %d calls name their command", len(calls), all)
	}
	var names []string
	for _, c := range calls {
		names = append(names, strings.ToLower(c[1]))
	}
	return names
}

func sortedSet(lists ...[]string) []string {
	all := slices.Concat(lists...)
	slices.Sort(all)
	return slices.Compact(all)
}

// roles are the least that a server must permit, by role.
func roles(t *testing.T) (primary, reader aclRole) {
	charge, look, beat := commandsOf(t, redisScripts.charge), commandsOf(t, redisScripts.look), commandsOf(t, redisScripts.beat)
	primary = aclRole{"ringfence", "~rf:*", sortedSet(charge, look, beat, primarySends)}
	reader = aclRole{"ringfence-reader", "%R~rf:*", sortedSet(look, readerSends)}
	return primary, reader
}

type aclRole struct {
	user, keys string
	commands   []string
}

// rules are what follows the user's name in ACL SETUSER and in a server's configuration.
func (r aclRole) rules(password string) string {
	return "reset on >" + password + " " + r.keys + " resetchannels -@all +" + strings.Join(r.commands, " +")
}

const aclPassword = "hush-5f1c0de"

// aclPlace is a primary and its replica, each with the user of its role.
type aclPlace struct {
	primary, replica *redistest.Server
	writer, reader   aclRole
}

func startACL(t *testing.T) *aclPlace {
	t.Helper()
	p := &aclPlace{}
	p.writer, p.reader = roles(t)
	p.primary = redistest.Start(t, redistest.Options{Args: []string{
		"repl-diskless-sync no", "user " + p.writer.user + " " + p.writer.rules(aclPassword),
	}})
	p.replica = redistest.Start(t, redistest.Options{ReplicaOf: p.primary, Args: []string{
		"repl-diskless-sync no", "user " + p.reader.user + " " + p.reader.rules(aclPassword),
	}})
	aclMust(t, p.replica.WaitInSync(t.Context()))
	return p
}

func aclMust(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func aclURL(user string, s *redistest.Server) string {
	return "redis://" + user + ":" + aclPassword + "@" + s.Addr()
}

// aclOutcome is what one run of the suite found.
type aclOutcome struct {
	wrong  []string // decisions that are not what they must be
	logged string   // warnings
	denied []string // of ACL LOG
}

func (o *aclOutcome) fail(format string, args ...any) {
	o.wrong = append(o.wrong, fmt.Sprintf(format, args...))
}

// run does everything that ringfence does, on empty servers, and judges the outcome.
func (p *aclPlace) run(t *testing.T) *aclOutcome {
	t.Helper()
	ctx, o, lines := t.Context(), &aclOutcome{}, &sink{}
	admin := p.primary.Client()
	aclMust(t, admin.FlushAll(ctx).Err())
	for _, s := range []*redistest.Server{p.primary, p.replica} {
		aclMust(t, s.Client().ScriptFlush(ctx).Err())
		aclMust(t, s.Client().ACLLogReset(ctx).Err())
	}
	// A process that left long ago, for HDEL.
	aclMust(t, admin.HSet(ctx, newKeySpace("rf").fingerprint(), "gone", time.Now().Add(-2*time.Hour).Unix()).Err())

	redistest.NoLeaks(t)
	ring, err := Open(ctx, Config{NearCacheKeys: -1,
		Shards: []ShardConfig{{
			ID: "a", Primary: aclURL(p.writer.user, p.primary),
			Replicas: []string{aclURL(p.reader.user, p.replica)},
		}},
		HashKey: []byte("0123456789abcdef"), Logger: lines.logger(),
		Budget: 10 * time.Second, OperationTimeout: 10 * time.Second,
	})
	aclMust(t, err)
	defer ring.Close()
	bucket, err := ring.Limiter("bucket", TokenBucket{Rate: 1, Per: time.Hour, Burst: 3})
	aclMust(t, err)
	log, err := ring.Limiter("log", SlidingLog{Limit: 3, Window: time.Hour})
	aclMust(t, err)

	// Without the scripts in the server's memory, as after a restart.
	forget := func() {
		for _, s := range []*redistest.Server{p.primary, p.replica} {
			aclMust(t, s.Client().ScriptFlush(ctx).Err())
		}
	}
	forget()
	expect := func(what string, d Decision, err error, source Source, allowed bool, left int64) {
		if err != nil || d.Source != source || d.Allowed != allowed || d.Remaining != left {
			o.fail("%s: %+v, %v; want %s, allowed %t, %d left", what, d, err, source, allowed, left)
		}
	}
	allow := func(what string, l *Limiter, key string, allowed bool, left int64) Decision {
		d, err := l.Allow(ctx, key)
		expect(what, d, err, SourcePrimary, allowed, left)
		return d
	}
	for _, l := range []*Limiter{bucket, log} {
		name := func(key string) string { _, k := l.Locate(key); return k }
		for i := range int64(3) {
			allow("allow", l, "k", true, 2-i)
		}
		if d := allow("deny", l, "k", false, 0); d.RetryAfter <= 0 {
			o.fail("a denied call of %s may come back in %s", l.Name(), d.RetryAfter)
		}
		aclMust(t, admin.Persist(ctx, name("k")).Err())
		allow("deny", l, "k", false, 0)
		if ttl := admin.PTTL(ctx, name("k")).Val(); ttl <= 0 {
			o.fail("a key of %s without a time to live was left so", l.Name())
		}
		for _, loaded := range []bool{false, true} {
			if !loaded {
				forget()
			}
			d, err := l.Peek(ctx, "k")
			expect("peek", d, err, SourcePrimary, false, 0)
		}
		many, err := l.AllowMany(ctx, []Request{{"k", 1}, {"m", 2}, {"n", 1}, {"m", 2}})
		if err != nil {
			o.fail("AllowMany: %v", err)
		} else {
			for i, want := range []struct {
				allowed bool
				left    int64
			}{{false, 0}, {true, 1}, {true, 2}, {false, 1}} {
				expect("many", many[i], nil, SourcePrimary, want.allowed, want.left)
			}
		}
		if err := l.Reset(ctx, "k"); err != nil {
			o.fail("reset: %v", err)
		}
		allow("after reset", l, "k", true, 2)
	}
	fractions, err := ring.Limiter("fractions", TokenBucket{Rate: 7, Per: time.Hour, Burst: 3}) // not the usual way
	aclMust(t, err)
	allow("a new key of a rate with fractions", fractions, "k", true, 2)
	p.oddLogs(t, log, allow)

	degraded := lines.String()
	aclMust(t, p.replica.WaitInSync(ctx))
	forget()
	aclMust(t, ring.ForceBreaker("a", BreakerForcedOpen))
	for _, l := range []*Limiter{bucket, log} {
		for key, want := range map[string]int64{"k": 1, "n": 1, "m": 0, "fresh": 2} {
			d, err := l.Allow(ctx, key)
			expect("replica "+key, d, err, SourceReplica, true, want)
		}
	}
	// Three of three are gone: the look has to say when there will be one again.
	d, err := log.Allow(ctx, "full")
	expect("replica full", d, err, SourceReplica, false, 0)

	o.logged = degraded
	for _, s := range []*redistest.Server{p.primary, p.replica} {
		entries, err := s.Client().ACLLog(ctx, 100).Result()
		aclMust(t, err)
		for _, e := range entries {
			o.denied = append(o.denied, e.Object)
		}
	}
	return o
}

// oddLogs are the rarer ways through the sliding log.
func (p *aclPlace) oddLogs(t *testing.T, log *Limiter, allow func(what string, l *Limiter, key string, allowed bool, left int64) Decision) {
	t.Helper()
	ctx, admin := t.Context(), p.primary.Client()
	add := func(key string, at time.Time, member string) {
		_, name := log.Locate(key)
		aclMust(t, admin.ZAdd(ctx, name, redis.Z{Score: float64(at.UnixMicro()), Member: member}).Err())
	}
	now := time.Now()
	add("stale", now.Add(-3*time.Hour), "11") // all of it is past: begun anew
	allow("stale", log, "stale", true, 2)
	add("half", now.Add(-3*time.Hour), "11") // part of it is: trimmed
	add("half", now.Add(-time.Minute), "12")
	allow("half", log, "half", true, 1)
	add("ahead", now.Add(10*time.Hour), "11") // the clock has stepped back: anchored
	allow("ahead", log, "ahead", true, 1)
	for i := range int64(3) {
		allow("full", log, "full", true, 2-i)
	}
}

func TestUsersWithTheDocumentedPermissionsDecideExactlyAndAreRefusedNothing(t *testing.T) {
	o := startACL(t).run(t)
	for _, w := range o.wrong {
		t.Error(w)
	}
	if o.logged != "" {
		t.Errorf("warnings:\n%s", o.logged)
	}
	if len(o.denied) > 0 {
		t.Errorf("the servers refused %q", o.denied)
	}
}

// What may be missing shows as a warning or in the server's ACL LOG alone; what may not
// shows in the decisions.
func TestEveryDocumentedPermissionIsNeeded(t *testing.T) {
	p := startACL(t)
	for _, role := range []struct {
		aclRole
		server *redistest.Server
	}{{p.writer, p.primary}, {p.reader, p.replica}} {
		for _, c := range role.commands {
			t.Run(role.user+" without "+c, func(t *testing.T) {
				set := func(sign string) {
					aclMust(t, role.server.Client().Do(t.Context(), "acl", "setuser", role.user, sign+c).Err())
				}
				set("-")
				o := p.run(t)
				set("+")
				optional := slices.Contains(aclOptional, c)
				if !optional && len(o.wrong) == 0 {
					t.Error("no decision is the worse for it: it is not needed")
				}
				if optional && len(o.wrong) > 0 {
					t.Errorf("it is called optional, and yet:\n%s", strings.Join(o.wrong, "\n"))
				}
				if !slices.Contains(o.denied, c) {
					t.Errorf("the server refused %q, want %q among it", o.denied, c)
				}
				if optional && c != "script|load" && o.logged == "" {
					t.Error("nobody is told")
				}
			})
		}
	}
	if o := p.run(t); len(o.wrong)+len(o.denied) > 0 {
		t.Errorf("with all of them back: %q, refused %q", o.wrong, o.denied)
	}
}

// The permissions in the document are made from the scripts, so that they follow when a
// script begins to use another command.
func TestDocumentListsThePermissionsThatTheScriptsNeed(t *testing.T) {
	raw, err := os.ReadFile("docs/security.md")
	aclMust(t, err)
	primary, reader := roles(t)
	for _, r := range []aclRole{primary, reader} {
		if line := "\nACL SETUSER " + r.user + " " + r.rules("PASSWORD") + "\n"; !strings.Contains(string(raw), line) {
			t.Errorf("docs/security.md lacks this line:\n%s", line)
		}
	}
	for _, c := range aclOptional {
		if !strings.Contains(string(raw), "| `"+strings.ReplaceAll(c, "|", `\|`)+"` |") {
			t.Errorf("docs/security.md does not say what is lost without %s", c)
		}
	}
}

// A replica that is promoted takes charges, for which a reader's user has no permission.
func TestReadersUserRefusesToCharge(t *testing.T) {
	p := startACL(t)
	aclMust(t, p.replica.Promote(t.Context()))
	lines := &sink{}
	ring, err := Open(context.Background(), Config{NearCacheKeys: -1,
		Shards:  []ShardConfig{{ID: "a", Primary: aclURL(p.reader.user, p.replica)}},
		HashKey: []byte("0123456789abcdef"), Logger: lines.logger(),
		Budget: 10 * time.Second, OperationTimeout: 10 * time.Second, Policy: PolicyClosed,
	})
	aclMust(t, err)
	defer ring.Close()
	l, err := ring.Limiter("bucket", TokenBucket{Rate: 1, Per: time.Hour, Burst: 3})
	aclMust(t, err)
	d, err := l.Allow(t.Context(), "k")
	if err != nil || d.Allowed || d.Source != SourcePolicy || d.Cause != CauseError {
		t.Errorf("%+v, %v", d, err)
	}
	if n := p.replica.Client().DBSize(t.Context()).Val(); n != 0 {
		t.Errorf("%d keys were written", n)
	}
}

// Somebody who has got hold of the password can spoil limits, and nothing else.
func TestUserOfThePrimaryReachesNothingBesidesItsKeys(t *testing.T) {
	p := startACL(t)
	ctx := t.Context()
	aclMust(t, p.primary.Client().Set(ctx, "other", "x", 0).Err())
	c := redis.NewClient(&redis.Options{Addr: p.primary.Addr(), Username: p.writer.user, Password: aclPassword, MaxRetries: -1})
	defer c.Close()
	for _, command := range []string{
		"get other", "hmget other f", "hset other f v", "unlink other", "keys *", "scan 0", "flushall", "config get *", "acl list",
		"script flush", "script kill", "function list", "client list", "monitor", "shutdown nosave", "replicaof no one", "subscribe rf:1",
		"get rf:1:{x}", "set rf:1:{x} y", "del rf:1:{x}", "rename rf:1:{x} rf:1:{y}",
	} {
		var args []any
		for word := range strings.FieldsSeq(command) {
			args = append(args, word)
		}
		if err := c.Do(ctx, args...).Err(); err == nil || !strings.HasPrefix(err.Error(), "NOPERM") {
			t.Errorf("%s: %v, want NOPERM", command, err)
		}
	}
	for _, script := range []string{
		"return redis.call('GET', 'other')", "return redis.call('HSET', 'other', 'f', 'v')",
		"return redis.call('UNLINK', 'other')", "return redis.call('SET', 'rf:1:{x}', 'v')",
	} {
		if err := c.Eval(ctx, script, []string{"rf:1:{x}"}).Err(); err == nil || classify(err) != typeNoPerm {
			t.Errorf("%s: %v, want a refusal", script, err)
		}
	}
	if got := p.primary.Client().Get(ctx, "other").Val(); got != "x" {
		t.Errorf("the other key holds %q", got)
	}
}
