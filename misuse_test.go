package ringfence_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// wantField wants an error about misuse that names this field.
func wantField(t testing.TB, err error, field string) ringfence.FieldError {
	t.Helper()
	var f *ringfence.FieldError
	if !errors.Is(err, ringfence.ErrInvalid) || !errors.As(err, &f) || f.Field != field {
		t.Errorf("error %v, want one about %s", err, field)
		return ringfence.FieldError{}
	}
	if f.Fix == "" || !strings.Contains(err.Error(), f.Value) || len(err.Error()) > 500 {
		t.Errorf("error %v: it should name the value and what to do, briefly", err)
	}
	return *f
}

// noContext is what a caller without one passes.
var noContext context.Context

func TestACallThatIsWrongIsRefusedAndNothingIsSent(t *testing.T) {
	p := onRedis(t, 2)
	r := p.open(t)
	ctx := t.Context()
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	expired, cancel := context.WithDeadline(ctx, time.Unix(1, 0))
	defer cancel()
	megabyte := strings.Repeat("k", 1<<20)
	for _, k := range suiteKinds {
		l := suiteLimiter(t, r, strings.ReplaceAll(k.name, " ", "-"), k.limit(10, time.Minute))
		for _, c := range p.clients {
			suiteMust(t, c.ConfigResetStat(ctx).Err())
		}
		for _, c := range []struct {
			what, key string
			ctx       context.Context
			cost      int64
			field     string // "" is another error than ErrInvalid
			value     string
			is        error
		}{
			{"an empty key", "", ctx, 1, "key", `""`, nil},
			{"a key of a megabyte", megabyte, ctx, 1, "key", "(1048576 bytes)", nil},
			{"a key one byte too long", megabyte[:513], ctx, 1, "key", "(513 bytes)", nil},
			{"cost 0", "k", ctx, 0, "cost", "0", nil},
			{"cost -1", "k", ctx, -1, "cost", "-1", nil},
			{"the least cost", "k", ctx, math.MinInt64, "cost", "-9223372036854775808", nil},
			{"a cost above capacity", "k", ctx, 11, "cost", "11", nil},
			{"a cost above 2^53", "k", ctx, 1<<53 + 1, "cost", "9007199254740993", nil},
			{"the highest cost", "k", ctx, math.MaxInt64, "cost", "9223372036854775807", nil},
			{"no context", "k", noContext, 1, "ctx", "nil", nil},
			{"a canceled context", "k", canceled, 1, "", "", context.Canceled},
			{"an expired context", "k", expired, 1, "", "", context.DeadlineExceeded},
		} {
			check := func(how string, err error) {
				t.Helper()
				if c.field == "" {
					if !errors.Is(err, c.is) || errors.Is(err, ringfence.ErrInvalid) {
						t.Errorf("%s, %s, %s: %v", k.name, how, c.what, err)
					}
				} else if f := wantField(t, err, c.field); f.Value != c.value {
					t.Errorf("%s, %s, %s: value %s, want %s", k.name, how, c.what, f.Value, c.value)
				}
			}
			d, err := l.AllowN(c.ctx, c.key, c.cost)
			check("AllowN", err)
			if d != (ringfence.Decision{}) {
				t.Errorf("%s, %s: a Decision beside the error: %+v", k.name, c.what, d)
			}
			if c.cost != 1 {
				continue
			}
			_, err = l.Allow(c.ctx, c.key)
			check("Allow", err)
			_, err = l.Peek(c.ctx, c.key)
			check("Peek", err)
			check("Reset", l.Reset(c.ctx, c.key))
			if c.field != "key" {
				_, err = l.AllowMany(c.ctx, []ringfence.Request{{Key: c.key, Cost: 1}})
				check("AllowMany", err)
			}
		}
		for i, c := range p.clients {
			for name, calls := range commandCalls(t, c) {
				if slices.Contains([]string{"eval", "evalsha", "eval_ro", "evalsha_ro", "unlink", "del"}, name) {
					t.Errorf("shard %d was sent %d %s", i, calls, name)
				}
			}
		}
		if d := peek(t, l, "k"); d.Remaining != 10 {
			t.Errorf("%s: something was charged: %+v", k.name, d)
		}
		if d := takeExactly(t, l, megabyte[:512], 10); !d.Allowed {
			t.Errorf("%s: the longest key and the highest cost: %+v", k.name, d)
		}
	}
	// A log takes at most 1,000 a call, whatever its limit.
	l := suiteLimiter(t, r, "large", ringfence.SlidingLog{Limit: 5000, Window: time.Minute})
	_, err := l.AllowN(ctx, "k", 1001)
	wantField(t, err, "cost")
	if d := takeExactly(t, l, "k", 1000); d.Remaining != 4000 {
		t.Errorf("1,000 of 5,000: %+v", d)
	}
}

func TestAConfigurationThatIsWrongIsRefused(t *testing.T) {
	shard := func(id string) ringfence.ShardConfig {
		return ringfence.ShardConfig{ID: id, Primary: "redis://127.0.0.1:1"}
	}
	many := make([]ringfence.ShardConfig, 1001)
	for i := range many {
		many[i] = shard(fmt.Sprint("s", i))
	}
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"})
	defer client.Close()
	for _, c := range []struct {
		what  string
		field string
		value string
		with  func(c *ringfence.Config)
	}{
		{"no shards", "Config.Shards", "[]", func(c *ringfence.Config) { c.Shards = nil }},
		{"1,001 shards", "Config.Shards", "1001", func(c *ringfence.Config) { c.Shards = many }},
		{"no id", "Config.Shards[0].ID", `""`, func(c *ringfence.Config) { c.Shards[0].ID = "" }},
		{"an id of two words", "Config.Shards[1].ID", `"a b"`, func(c *ringfence.Config) { c.Shards[1].ID = "a b" }},
		{"an id with a line break", "Config.Shards[1].ID", `"b\n"`, func(c *ringfence.Config) { c.Shards[1].ID = "b\n" }},
		{"an id with a brace", "Config.Shards[1].ID", `"{b}"`, func(c *ringfence.Config) { c.Shards[1].ID = "{b}" }},
		{"an id of 65 characters", "Config.Shards[1].ID", `"` + strings.Repeat("x", 64) + `... (65 bytes)"`, func(c *ringfence.Config) { c.Shards[1].ID = strings.Repeat("x", 65) }},
		{"one id twice", "Config.Shards[1].ID", `"a"`, func(c *ringfence.Config) { c.Shards[1].ID = "a" }},
		{"a weight below zero", "Config.Shards[0].Weight", "-1", func(c *ringfence.Config) { c.Shards[0].Weight = -1 }},
		{"a weight of 1,001", "Config.Shards[0].Weight", "1001", func(c *ringfence.Config) { c.Shards[0].Weight = 1001 }},
		{"no address", "Config.Shards[0].Primary", `""`, func(c *ringfence.Config) { c.Shards[0].Primary = "" }},
		{"an address and a client", "Config.Shards[0].Primary", `"redis://127.0.0.1:1"`, func(c *ringfence.Config) { c.Shards[0].Client = client }},
		{"another scheme", "Config.Shards[1].Primary", `"http://127.0.0.1:1"`, func(c *ringfence.Config) { c.Shards[1].Primary = "http://127.0.0.1:1" }},
		{"no scheme", "Config.Shards[0].Primary", `"127.0.0.1:6379"`, func(c *ringfence.Config) { c.Shards[0].Primary = "127.0.0.1:6379" }},
		{"a query", "Config.Shards[0].Primary", `"redis://127.0.0.1:1"`, func(c *ringfence.Config) { c.Shards[0].Primary = "redis://127.0.0.1:1?max_retries=3" }},
		{"a replica's query", "Config.Shards[0].Replicas[1]", `"redis://host"`, func(c *ringfence.Config) {
			c.Shards[0].Replicas = []string{"redis://host", "redis://host?db=1"}
		}},
		{"no client for a replica", "Config.Shards[0].ReplicaClients[0]", "nil", func(c *ringfence.Config) { c.Shards[0].ReplicaClients = make([]redis.UniversalClient, 1) }},
		{"replicas in two ways", "Config.Shards[0].Replicas", "1", func(c *ringfence.Config) {
			c.Shards[0].Replicas, c.Shards[0].ReplicaClients = []string{"redis://host"}, []redis.UniversalClient{client}
		}},
		{"17 replicas", "Config.Shards[0].Replicas", "17", func(c *ringfence.Config) { c.Shards[0].Replicas = make([]string, 17) }},
		{"a prefix with a brace", "Config.Prefix", `"{x}"`, func(c *ringfence.Config) { c.Prefix = "{x}" }},
		{"a long prefix", "Config.Prefix", `"` + strings.Repeat("x", 33) + `"`, func(c *ringfence.Config) { c.Prefix = strings.Repeat("x", 33) }},
		{"a short hash key", "Config.HashKey", "(15 bytes)", func(c *ringfence.Config) { c.HashKey = []byte("s3cret-s3cret-s") }},
		{"instances below zero", "Config.Instances", "-1", func(c *ringfence.Config) { c.Instances = -1 }},
		{"a long instance id", "Config.InstanceID", `"` + strings.Repeat("x", 64) + `... (65 bytes)"`, func(c *ringfence.Config) { c.InstanceID = strings.Repeat("x", 65) }},
		{"a policy that is none", "Config.Policy", "9", func(c *ringfence.Config) { c.Policy = 9 }},
		{"a budget below a millisecond", "Config.Budget", "999.999µs", func(c *ringfence.Config) { c.Budget = time.Millisecond - 1 }},
		{"a budget beyond a minute", "Config.Budget", "1m0.000000001s", func(c *ringfence.Config) { c.Budget = time.Minute + 1 }},
		{"a time-out below the budget", "Config.OperationTimeout", "5ms", func(c *ringfence.Config) { c.OperationTimeout = 5 * time.Millisecond }},
		{"257 in flight", "Config.InFlight", "257", func(c *ringfence.Config) { c.InFlight = 257 }},
		{"a batch of 257", "Config.MaxBatch", "257", func(c *ringfence.Config) { c.MaxBatch = 257 }},
		{"a queue below zero", "Config.Queue", "-1", func(c *ringfence.Config) { c.Queue = -1 }},
		{"too many local keys", "Config.MaxLocalKeys", "10000001", func(c *ringfence.Config) { c.MaxLocalKeys = 10_000_001 }},
		{"a name in capitals", "Config.Name", `"A"`, func(c *ringfence.Config) { c.Name = "A" }},
		{"an objective below zero", "Config.LatencyObjective", "-1ns", func(c *ringfence.Config) { c.LatencyObjective = -1 }},
	} {
		config := ringfence.Config{Shards: []ringfence.ShardConfig{shard("a"), shard("b")}}
		c.with(&config)
		ring, err := ringfence.Open(t.Context(), config)
		if f := wantField(t, err, c.field); f.Value != c.value {
			t.Errorf("%s: value %s, want %s", c.what, f.Value, c.value)
		}
		if ring != nil {
			t.Errorf("%s: a ring beside the error", c.what)
			suiteMust(t, ring.Close())
		}
	}
	_, err := ringfence.Open(noContext, ringfence.Config{Shards: many[:1]})
	wantField(t, err, "ctx")
}

func TestALimiterThatIsWrongIsRefused(t *testing.T) {
	p := onEmbedded(t, 1)
	r := p.open(t)
	ok := ringfence.TokenBucket{Rate: 1, Per: time.Second, Burst: 1}
	for _, c := range []struct {
		what, name, field string
		limit             ringfence.Limit
		opts              []ringfence.LimiterOption
	}{
		{"no name", "", "name", ok, nil},
		{"a name in capitals", "Api", "name", ok, nil},
		{"a name of two lines", "a\n", "name", ok, nil},
		{"a name of 65 characters", strings.Repeat("a", 65), "name", ok, nil},
		{"no limit", "a", "limit", nil, nil},
		{"a pointer to no bucket", "a", "limit", (*ringfence.TokenBucket)(nil), nil},
		{"a pointer to no log", "a", "limit", (*ringfence.SlidingLog)(nil), nil},
		{"a rate of zero", "a", "TokenBucket.Rate", ringfence.TokenBucket{Per: time.Second, Burst: 1}, nil},
		{"a log of nothing", "a", "SlidingLog.Limit", ringfence.SlidingLog{Window: time.Second}, nil},
		{"a log in no time", "a", "SlidingLog.Window", ringfence.SlidingLog{Limit: 1}, nil},
		{"no option", "a", "opts", ok, []ringfence.LimiterOption{nil}},
		{"a policy that is none", "a", "WithPolicy", ok, []ringfence.LimiterOption{ringfence.WithPolicy(3)}},
		{"a budget of nothing", "a", "WithBudget", ok, []ringfence.LimiterOption{ringfence.WithBudget(0)}},
		{"a budget beyond the time-out", "a", "WithBudget", ok, []ringfence.LimiterOption{ringfence.WithBudget(6 * time.Second)}},
	} {
		l, err := r.Limiter(c.name, c.limit, c.opts...)
		wantField(t, err, c.field)
		if l != nil {
			t.Errorf("%s: a limiter beside the error", c.what)
		}
	}

	first := suiteLimiter(t, r, "api", ok)
	if again := suiteLimiter(t, r, "api", ok); again != first {
		t.Error("asking again gives another limiter")
	}
	if again := suiteLimiter(t, r, "api", &ok); again != first || again.Limit() != ok {
		t.Error("the same limit by its address gives another limiter")
	}
	for what, again := range map[string]func() (*ringfence.Limiter, error){
		"another limit": func() (*ringfence.Limiter, error) {
			return r.Limiter("api", ringfence.TokenBucket{Rate: 2, Per: time.Second, Burst: 1})
		},
		"another algorithm": func() (*ringfence.Limiter, error) {
			return r.Limiter("api", ringfence.SlidingLog{Limit: 1, Window: time.Second})
		},
		"another policy": func() (*ringfence.Limiter, error) {
			return r.Limiter("api", ok, ringfence.WithPolicy(ringfence.PolicyOpen))
		},
		"another budget": func() (*ringfence.Limiter, error) { return r.Limiter("api", ok, ringfence.WithBudget(time.Second)) },
	} {
		if _, err := again(); err == nil {
			t.Errorf("%s under the same name is accepted", what)
		} else {
			wantField(t, err, "name")
		}
	}
	for i := 1; i < ringfence.MaxLimiters; i++ {
		suiteLimiter(t, r, fmt.Sprint("l", i), ok)
	}
	_, err := r.Limiter("one-too-many", ok)
	wantField(t, err, "name")
	if suiteLimiter(t, r, "api", ok) != first {
		t.Error("a full ring has forgotten its first limiter")
	}
}

func TestAClosedRingRefusesEverything(t *testing.T) {
	p := onEmbedded(t, 1)
	r := p.open(t)
	limit := ringfence.TokenBucket{Rate: 1, Per: time.Second, Burst: 1}
	l := suiteLimiter(t, r, "api", limit)
	suiteMust(t, r.Close())
	suiteMust(t, r.Close()) // again: nothing
	ctx := t.Context()
	_, err1 := l.Allow(ctx, "k")
	_, err2 := l.AllowMany(ctx, []ringfence.Request{{Key: "k", Cost: 1}})
	_, err3 := l.Peek(ctx, "k")
	_, err4 := r.Limiter("api", limit)
	_, err5 := r.Limiter("other", limit)
	for i, err := range []error{err1, err2, err3, err4, err5, l.Reset(ctx, "k")} {
		if !errors.Is(err, ringfence.ErrClosed) {
			t.Errorf("call %d: %v", i, err)
		}
	}
	// What needs no server goes on, and does not panic.
	l.Locate("k")
	r.Stats()
	if names := p.names(t); len(names) != 0 {
		t.Errorf("something was written: %v", names)
	}
}

// secrets are in the configurations below and must be nowhere else.
var secrets = []string{"s3cret", "alice", "0123456789abcdef", "48 49 50 51", "MDEyMzQ1Njc4"}

func wantNoSecret(t testing.TB, what, text string) {
	t.Helper()
	for _, s := range secrets {
		if strings.Contains(text, s) {
			t.Errorf("%s shows %q: %s", what, s, text)
		}
	}
}

func TestNothingThatIsPrintedShowsCredentials(t *testing.T) {
	s := redistest.Start(t, redistest.Options{
		Args:      []string{"user alice on >s3cret ~* &* +@all"},
		Configure: func(o *redis.Options) { o.Username, o.Password = "alice", "s3cret" },
	})
	url := "redis://alice:s3cret@" + s.Addr()
	c := ringfence.Config{
		Shards:  []ringfence.ShardConfig{{ID: "a", Primary: url + "/1", Replicas: []string{url + "/2"}}},
		HashKey: suiteHashKey, Logger: slog.New(slog.DiscardHandler), Budget: time.Second, OperationTimeout: time.Second,
		Strict: true,
	}
	r, err := ringfence.Open(t.Context(), c)
	suiteMust(t, err)
	defer r.Close()
	l := suiteLimiter(t, r, "api", ringfence.TokenBucket{Rate: 1, Per: time.Second, Burst: 1})
	takeExactly(t, l, "k", 1) // the credentials are right

	shard := c.Shards[0]
	for what, v := range map[string]any{
		"Config": c, "*Config": &c, "ShardConfig": shard, "*ShardConfig": &shard, "[]ShardConfig": c.Shards,
		"a struct with a Config": struct{ Config ringfence.Config }{c},
		"Ring":                   r, "Limiter": l, "Stats": r.Stats(),
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d", "%t", "%c", "%o", "%b", "%x", "%X", "%e"} {
			wantNoSecret(t, what+" with "+verb, fmt.Sprintf(verb, v))
		}
		var text, js bytes.Buffer
		slog.New(slog.NewTextHandler(&text, nil)).Info("x", "value", v)
		slog.New(slog.NewJSONHandler(&js, nil)).Info("x", "value", v)
		wantNoSecret(t, what+" in slog text", text.String())
		wantNoSecret(t, what+" in slog JSON", js.String())
		if raw, err := json.Marshal(v); err == nil {
			wantNoSecret(t, what+" in JSON", string(raw))
		}
	}
	if text := c.String(); !strings.Contains(text, s.Addr()) || !strings.Contains(text, "ID:a") {
		t.Errorf("%s names neither shard nor address", text)
	}
}

// What is wrong with the credentials, or with the URL that holds them, is said without
// them: in the error, and in the log.
func TestNoErrorAndNoLogLineShowsCredentials(t *testing.T) {
	s := redistest.Start(t, redistest.Options{
		Args:      []string{"requirepass open-sesame"},
		Configure: func(o *redis.Options) { o.Password = "open-sesame" },
	})
	for _, primary := range []string{
		"redis://alice:s3cret@" + s.Addr(), // refused by the server
		"redis://:s3cret@" + s.Addr(),
		"redis://alice:s3cret@127.0.0.1:1", // nobody there
		"rediss://alice:s3cret@" + s.Addr(),
		"redis://alice:s3cret@no-such-host.invalid",
		"redis://alice:s3cret@127.0.0.1:port",
		"redis://alice:s3cret@127.0.0.1?x=1",
		"redis://alice:s3cret%@127.0.0.1",
		"redis://alice:s3cret@127.0.0.1/s3cret",
		"redis://alice:s3cret",
		"alice:s3cret@127.0.0.1:6379",
		"redis:/alice:s3cret@127.0.0.1",
		"http://alice:s3cret@127.0.0.1",
		"redis://alice:s3cret@@127.0.0.1#s3cret",
		"redis+cluster://alice:s3cret@" + s.Addr(),
		"redis+cluster://alice:s3cret@127.0.0.1:1,127.0.0.1:2",
		"redis+cluster://alice:s3cret@127.0.0.1:port",
		"redis+cluster://alice:s3cret%@127.0.0.1",
		"redis+cluster://alice:s3cret@127.0.0.1/s3cret",
		"redis+sentinel://alice:s3cret@127.0.0.1:1/s",
		"redis+sentinel://alice:s3cret@127.0.0.1:1",
		"redis+sentinel://alice:s3cret@127.0.0.1:1/m/s3cret",
		"rediss+sentinel://alice:s3cret@" + s.Addr() + "/m",
	} {
		var log bytes.Buffer
		for i, c := range []ringfence.ShardConfig{
			{ID: "a", Primary: primary},
			{ID: "a", Primary: s.URL(), Replicas: []string{primary}},
		} {
			r, err := ringfence.Open(t.Context(), ringfence.Config{
				Shards: []ringfence.ShardConfig{c}, HashKey: suiteHashKey, Strict: true,
				Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
			})
			if err == nil {
				suiteMust(t, r.Close())
			}
			if i == 0 && !errors.Is(err, ringfence.ErrInvalid) && !errors.Is(err, ringfence.ErrUnreachable) {
				t.Errorf("%s: %v", primary, err)
			}
			wantNoSecret(t, "the error about "+primary, fmt.Sprintf("%v %+v %#v", err, err, err))
		}
		wantNoSecret(t, "the log about "+primary, log.String())
	}
}
