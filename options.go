package ringfence

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
)

// The bounds and defaults of a Config.
const (
	// MaxShards is the most shards a ring can have.
	MaxShards = 1000
	// MaxLimiters is the most limiters a ring can have: each is a metric label.
	MaxLimiters = 1000
	// MaxKeyBytes is the longest key of a call. Longer ones are refused: hashing
	// megabytes for a client who sends them would be the attack.
	MaxKeyBytes = 512
	// MaxMany is the most entries of one AllowMany.
	MaxMany = 1000

	defaultBudget    = 20 * time.Millisecond
	defaultTimeout   = 250 * time.Millisecond
	defaultInFlight  = 4
	defaultBatch     = 64
	defaultQueue     = 4096
	defaultLocalKeys = 65536
)

// FailurePolicy says what happens when neither the shard's primary nor a replica can
// tell what is left of a key.
type FailurePolicy uint8

// The failure policies.
const (
	// PolicyOpen admits the call and says so in Source and Cause. The default: a
	// limiter must not take the service down with it.
	PolicyOpen FailurePolicy = iota
	// PolicyClosed denies it.
	PolicyClosed
	// PolicyLocal lets this process admit its part of the limit, limit /
	// Config.Instances (or the processes counted), counting in its own memory.
	PolicyLocal
)

// String returns "open", "closed" or "local".
func (p FailurePolicy) String() string {
	return nameOf([]string{"open", "closed", "local"}, int(p))
}

func (p FailurePolicy) validate(field string) error {
	if p > PolicyLocal {
		return invalid(field, uint8(p), "must be PolicyOpen, PolicyClosed or PolicyLocal")
	}
	return nil
}

// Config is what Open needs. Only Shards must be set; the zero value of every other
// field takes its default. Printing a Config shows no credentials.
type Config struct {
	// Shards are the members of the ring: 1 to MaxShards. Every process must list the
	// same ids and weights; the order does not matter.
	Shards []ShardConfig
	// Prefix begins the name of every key: 1 to 32 of [a-zA-Z0-9_.:-], default "rf".
	// Rings with different prefixes share nothing.
	Prefix string
	// HashKey is the secret with which keys are hashed, 16 bytes; all processes must
	// have the same. Unset, a published constant is used, with a warning: somebody who
	// chooses keys could then aim them at one shard.
	HashKey []byte
	// Instances is how many processes share the ring: 1 to 1,000,000. While a shard is
	// away each admits its part, so too low a number admits too much. 0, the default: they
	// are counted by heartbeats, every 5 s on every shard. A process that ends is counted
	// for 25 s more, one that starts by the others within 5 s; a shard that is away keeps
	// the count it had, and one that nobody has told of another process has a count of 1.
	Instances int
	// InstanceID tells this process from the others, for counting them and for dealing out
	// parts that do not divide evenly; default random. At most 64 bytes. Two processes
	// with one id are counted once.
	InstanceID string
	// Policy is the failure policy of limiters that set none; default PolicyOpen.
	Policy FailurePolicy
	// Budget is the longest a caller waits, whatever Redis does: 1 ms to 1 min,
	// default 20 ms. A quarter of it is kept for asking a replica, where there is one.
	Budget time.Duration
	// OperationTimeout bounds one script call, which goes on when its callers have
	// left: 1 ms to 1 min, at least Budget, default 250 ms (or Budget if that is
	// longer).
	OperationTimeout time.Duration
	// InFlight is the most operations under way at once per shard, each on a connection
	// of its own: 1 to 256, default 4.
	InFlight int
	// MaxBatch is the most entries one operation carries: 1 to 256, default 64. Calls that
	// ask for the same cost of one key share an entry, so that an operation carries up to
	// 16 times as many calls; with 1 it carries one call. When a server hangs, what is of
	// unknown fate is what InFlight operations carry and what the operations did that
	// failed before the breaker opened, which are BreakerConfig.Failures - 1 at most.
	MaxBatch int
	// Queue is the most calls waiting for an operation per shard, the entries of AllowMany
	// counted one by one: 1 to 1,000,000, default 4,096. Beyond it calls take the ladder at
	// once; one AllowMany may exceed it by its own entries.
	Queue int
	// MaxLocalKeys is the most keys counted in this process's own memory while shards
	// are away: 1 to 10,000,000, default 65,536. A bucket takes about 140 bytes, a log in
	// constant use up to 1.7 KB (65 slices of its window). When all of
	// them are in use, further keys share counters and may be denied early; a key in
	// use is never forgotten.
	MaxLocalKeys int
	// NearCacheKeys is the most denials kept in this process so that calls which the
	// primary would deny need not ask it, see WithNearCache: up to 16,777,216, default
	// 16,384 (about 130 KB, and 130 bytes for each denial in it), rounded up to a power of
	// two; negative: none.
	NearCacheKeys int
	// Breaker is the circuit breaker of every shard.
	Breaker BreakerConfig
	// Top remembers who calls most and who is denied most, if its Keys are set.
	Top TopConfig
	// Observers are told of every call, in this order: at most MaxObservers. None costs
	// nothing.
	Observers []Observer
	// Strict makes Open fail when a shard cannot be reached or is too old. By default
	// it only warns: a limiter must not keep a service from starting.
	Strict bool
	// Name tells rings on one Registerer apart: it becomes the label "ring" on all
	// metrics. [a-z0-9_.-], at most 64; empty: no such label.
	Name string
	// Registerer takes the metrics; nil: none are kept. Close unregisters them.
	Registerer prometheus.Registerer
	// LatencyObjective is the time a decision may take to be a good event of the SLO
	// decision_latency: default 5 ms.
	LatencyObjective time.Duration
	// Logger hears of what is worth a human's eye, at most one line per kind and shard
	// in 10 s; nil: slog.Default().
	Logger *slog.Logger
	// Dialer opens the connections of shards given by URL; nil: net.Dialer. It must be
	// safe for concurrent use.
	Dialer func(ctx context.Context, network, addr string) (net.Conn, error)
	// Now is this process's clock, for back-off and local shares; nil: time.Now. What
	// Redis decides uses the server's clock.
	Now func() time.Time
	// Rand gives 64 random bits, for jitter; nil: math/rand/v2. It must be safe for
	// concurrent use.
	Rand func() uint64
}

// ShardConfig names one shard: a Redis primary and its replicas, by URL or by ready-made
// clients.
type ShardConfig struct {
	// ID names the shard for good: it decides which keys are its own, and is a metric
	// label. [a-zA-Z0-9_.-], 1 to 64. Addresses may change; ids should not.
	ID string
	// Primary is redis://[user:password@]host[:port][/db], or rediss:// for TLS.
	//
	// It can also name a Sentinel set, redis+sentinel://[user:password@]host[:port],.../master[/db],
	// whose master is the primary, or a whole Redis Cluster, redis+cluster://[user:password@]host[:port],...,
	// each of whose masters is a shard then, with the ids <ID>-0, <ID>-1 and so on. The
	// credentials are the servers'; rediss+sentinel and rediss+cluster are for TLS.
	Primary string
	// Replicas are the replicas' URLs; none, one or several.
	Replicas []string
	// TLS is how to speak TLS to the rediss:// URLs of Primary and Replicas: RootCAs
	// for a certificate authority of your own, Certificates where the server asks for
	// one too. ServerName, if empty, is each URL's host. nil: the system's roots and no
	// certificate. It is copied; ready-made clients have their own.
	TLS *tls.Config
	// Weight is the shard's part of the keys relative to the others: 1 to 1000, default
	// 1.
	Weight int
	// Client, instead of Primary, is a ready-made client for the primary. It is never
	// closed. It should have MaxRetries -1 and short time-outs; calls that charge or reset
	// are marked as not to be retried whatever it says.
	Client redis.UniversalClient
	// ReplicaClients, instead of Replicas, are ready-made clients for them.
	ReplicaClients []redis.UniversalClient
	// PlainScripts sends the scripts without the "#!lua" line, for servers that do not
	// know it: those of package embedded. Redis 7 and Valkey need it unset.
	PlainScripts bool
}

var (
	idPattern     = regexp.MustCompile(`^[a-zA-Z0-9_.-]{1,64}$`)
	namePattern   = regexp.MustCompile(`^[a-z0-9_.-]{1,64}$`)
	schemePattern = regexp.MustCompile(`^[a-z]{1,8}([+-][a-z]{1,8})?://$`)
	// addressPattern is host, host:port or either with a database, and nothing.
	addressPattern = regexp.MustCompile(`^(([a-zA-Z0-9_.-]+|\[[0-9a-fA-F:.%]+\])?(:[0-9]{1,5})?(/[0-9]{0,5})?)?$`)
	prefixPattern  = regexp.MustCompile(`^[a-zA-Z0-9_.:-]{1,32}$`)
)

// withDefaults checks everything and fills in what is unset.
func (c Config) withDefaults() (Config, error) {
	if len(c.Shards) == 0 {
		return c, invalid("Config.Shards", verbatim("[]"), "must name at least one shard")
	}
	if len(c.Shards) > MaxShards {
		return c, invalid("Config.Shards", len(c.Shards), "must be at most %d shards", MaxShards)
	}
	if c.Prefix == "" {
		c.Prefix = defaultPrefix
	}
	if !prefixPattern.MatchString(c.Prefix) {
		return c, invalid("Config.Prefix", c.Prefix, "must be 1 to 32 of [a-zA-Z0-9_.:-]")
	}
	if len(c.HashKey) != 0 && len(c.HashKey) != 16 {
		return c, invalid("Config.HashKey", verbatim(fmt.Sprintf("(%d bytes)", len(c.HashKey))), "must be 16 random bytes, the same in every process")
	}
	if len(c.InstanceID) > 64 {
		return c, invalid("Config.InstanceID", c.InstanceID, "must be at most 64 bytes")
	}
	if err := c.Policy.validate("Config.Policy"); err != nil {
		return c, err
	}
	if c.Name != "" && !namePattern.MatchString(c.Name) {
		return c, invalid("Config.Name", c.Name, "must be 1 to 64 of [a-z0-9_.-]")
	}
	numbers := []struct {
		field         string
		value         *int
		fallback, max int
	}{
		{"InFlight", &c.InFlight, defaultInFlight, 256},
		{"MaxBatch", &c.MaxBatch, defaultBatch, 256},
		{"Queue", &c.Queue, defaultQueue, 1_000_000},
		{"MaxLocalKeys", &c.MaxLocalKeys, defaultLocalKeys, 10_000_000},
	}
	for _, n := range numbers {
		if *n.value == 0 {
			*n.value = n.fallback
		}
		if *n.value < 1 || *n.value > n.max {
			return c, invalid("Config."+n.field, *n.value, "must be 1 to %d, or 0 for the default of %d", n.max, n.fallback)
		}
	}
	if c.Instances < 0 || c.Instances > 1_000_000 {
		return c, invalid("Config.Instances", c.Instances, "must be 1 to 1000000, or 0 to count them")
	}
	if c.NearCacheKeys == 0 {
		c.NearCacheKeys = defaultNearCacheKeys
	}
	if c.NearCacheKeys > maxNearCacheKeys {
		return c, invalid("Config.NearCacheKeys", c.NearCacheKeys, "must be at most %d, 0 for the default of %d, or negative for none", maxNearCacheKeys, defaultNearCacheKeys)
	}
	if c.Budget == 0 {
		c.Budget = defaultBudget
	}
	if err := checkBudget("Config.Budget", c.Budget); err != nil {
		return c, err
	}
	if c.OperationTimeout == 0 {
		c.OperationTimeout = max(defaultTimeout, c.Budget)
	}
	if c.OperationTimeout < c.Budget || c.OperationTimeout > time.Minute {
		return c, invalid("Config.OperationTimeout", c.OperationTimeout, "must be Budget (%s) to 1m, or 0 for the default of 250ms", c.Budget)
	}
	if c.LatencyObjective == 0 {
		c.LatencyObjective = 5 * time.Millisecond
	}
	if c.LatencyObjective < 0 {
		return c, invalid("Config.LatencyObjective", c.LatencyObjective, "must be positive, or 0 for the default of 5ms")
	}
	var err error
	if c.Breaker, err = c.Breaker.withDefaults("Config.Breaker"); err != nil {
		return c, err
	}
	if c.Top, err = c.Top.withDefaults("Config.Top"); err != nil {
		return c, err
	}
	if err := checkObservers("Config.Observers", c.Observers); err != nil {
		return c, err
	}
	c.Observers = slices.Clone(c.Observers)
	seen := map[string]int{}
	c.Shards = append([]ShardConfig(nil), c.Shards...)
	for i := range c.Shards {
		field := fmt.Sprintf("Config.Shards[%d]", i)
		if err := c.Shards[i].check(field); err != nil {
			return c, err
		}
		if j, twice := seen[c.Shards[i].ID]; twice {
			return c, invalid(field+".ID", c.Shards[i].ID, "is the id of Config.Shards[%d] too; every shard needs its own", j)
		}
		seen[c.Shards[i].ID] = i
	}
	return c, nil
}

func checkBudget(field string, d time.Duration) error {
	if d < time.Millisecond || d > time.Minute {
		return invalid(field, d, "must be 1ms to 1m, or 0 for the default of 20ms")
	}
	return nil
}

// checkClient refuses clients that are not of one server.
func checkClient(field string, c redis.UniversalClient) error {
	switch c := c.(type) {
	case *redis.ClusterClient:
		return invalid(field, verbatim("*redis.ClusterClient"), "must be a client of one server; give a Redis Cluster by URL, as redis+cluster://host,host")
	case *redis.Ring:
		return invalid(field, verbatim("*redis.Ring"), "must be a client of one server; a redis.Ring moves keys when a server fails; make every server a shard")
	case *redis.Client:
		if c == nil {
			return invalid(field, verbatim("nil"), "must be a client")
		}
	}
	return nil
}

func (s *ShardConfig) check(field string) error {
	if !idPattern.MatchString(s.ID) {
		return invalid(field+".ID", s.ID, "must be 1 to 64 of [a-zA-Z0-9_.-], and stay the same when addresses change")
	}
	if s.Weight == 0 {
		s.Weight = 1
	}
	if s.Weight < 1 || s.Weight > 1000 {
		return invalid(field+".Weight", s.Weight, "must be 1 to 1000, or 0 for 1")
	}
	if (s.Primary == "") == (s.Client == nil) {
		return invalid(field+".Primary", redactURL(s.Primary), "set either Primary, as redis://host:6379, or Client")
	}
	if len(s.Replicas) > 0 && len(s.ReplicaClients) > 0 {
		return invalid(field+".Replicas", len(s.Replicas), "set either Replicas or ReplicaClients")
	}
	if len(s.Replicas)+len(s.ReplicaClients) > 16 {
		return invalid(field+".Replicas", len(s.Replicas)+len(s.ReplicaClients), "must be at most 16")
	}
	if s.Client != nil {
		if err := checkClient(field+".Client", s.Client); err != nil {
			return err
		}
	}
	for i, c := range s.ReplicaClients {
		if c == nil {
			return invalid(fmt.Sprintf("%s.ReplicaClients[%d]", field, i), verbatim("nil"), "must be a client")
		}
		if err := checkClient(fmt.Sprintf("%s.ReplicaClients[%d]", field, i), c); err != nil {
			return err
		}
	}
	urls := append([]string{s.Primary}, s.Replicas...)
	encrypted := false
	for i, u := range urls {
		name := field + ".Primary"
		if i > 0 {
			name = fmt.Sprintf("%s.Replicas[%d]", field, i-1)
		} else if s.Client != nil {
			continue
		}
		t, err := parseTarget(u)
		if err != nil {
			return invalid(name, redactURL(u), "%s; write redis://[user:password@]host[:port][/db], or rediss:// for TLS, or redis+sentinel://host,host/master, or redis+cluster://host,host", err)
		}
		if t.kind != oneServer && (i > 0 || len(urls) > 1 || len(s.ReplicaClients) > 0) {
			return invalid(name, redactURL(u), "a Sentinel set or a Redis Cluster knows its replicas itself; leave Replicas empty")
		}
		encrypted = encrypted || strings.HasPrefix(strings.ToLower(u), "rediss")
	}
	if s.TLS != nil && !encrypted {
		return invalid(field+".TLS", "(set)", "is for rediss:// URLs, and there is none; write rediss:// or leave it nil")
	}
	return nil
}

// parseURL reads a shard's URL. Options in the query are refused: the ones that matter
// to a limiter are ringfence's to set.
func parseURL(raw string) (*redis.Options, error) {
	u, err := url.Parse(raw)
	switch {
	case err != nil:
		return nil, fmt.Errorf("it is not a URL")
	case u.Scheme != "redis" && u.Scheme != "rediss":
		return nil, fmt.Errorf("its scheme is not known")
	case checkHost(u) != nil:
		return nil, checkHost(u)
	case u.RawQuery != "" || u.Fragment != "":
		return nil, fmt.Errorf("it has a query or a fragment, which mean nothing here")
	}
	o, err := redis.ParseURL(raw)
	if err != nil || o.DB < 0 {
		return nil, fmt.Errorf("its path must be empty or the number of a database")
	}
	return o, nil
}

// checkHost says what is wrong with a URL's host and port.
func checkHost(u *url.URL) error {
	switch {
	case u.Hostname() == "":
		return errors.New("it names no host")
	case strings.ContainsAny(u.Hostname(), "[]"), strings.Contains(u.Hostname(), ":") && !strings.HasPrefix(u.Host, "["):
		return errors.New("its host is not one; an IPv6 address needs brackets")
	case u.Port() != "" && !isPort(u.Port()):
		return errors.New("its port is not one; ports are 1 to 65535")
	}
	return nil
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

// redactURL is a URL without its credentials and without a query, also when it is none:
// then whatever may be a password is left out.
func redactURL(raw string) string {
	scheme, rest, ok := strings.Cut(raw, "://")
	if scheme += "://"; !ok || !schemePattern.MatchString(scheme) {
		// Not "user:secret@host" or what else there is before the last @.
		scheme, rest = "", raw
	}
	at := strings.LastIndexByte(rest, '@')
	if at >= 0 {
		rest = rest[at+1:]
	}
	if end := strings.IndexAny(rest, "?#"); end >= 0 {
		rest = rest[:end]
	}
	if !addressPattern.MatchString(rest) {
		rest = "..." // a colon may stand before a password
	}
	if at >= 0 {
		rest = "redacted@" + rest
	}
	return scheme + rest
}

// String shows the configuration without credentials and without HashKey.
func (c Config) String() string {
	key := "unset"
	if len(c.HashKey) > 0 {
		key = "set"
	}
	return fmt.Sprintf("{Shards:%v Prefix:%s HashKey:%s Instances:%d Policy:%s Budget:%s OperationTimeout:%s InFlight:%d MaxBatch:%d Breaker:%+v Strict:%t Name:%s}",
		c.Shards, c.Prefix, key, c.Instances, c.Policy, c.Budget, c.OperationTimeout, c.InFlight, c.MaxBatch, c.Breaker, c.Strict, c.Name)
}

// GoString is String, so that %#v shows no credentials either.
func (c Config) GoString() string { return "ringfence.Config" + c.String() }

// Format writes String whatever the verb: %d and others would show the fields.
func (c Config) Format(f fmt.State, verb rune) { printSafely(f, verb, c) }

// MarshalText is String, so that JSON shows no credentials either.
func (c Config) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// LogValue is String, for log/slog.
func (c Config) LogValue() slog.Value { return slog.StringValue(c.String()) }

// String shows the shard without credentials.
func (s ShardConfig) String() string {
	replicas := make([]string, len(s.Replicas))
	for i, r := range s.Replicas {
		replicas[i] = redactURL(r)
	}
	primary := redactURL(s.Primary)
	if s.Client != nil {
		primary = "(client)"
	}
	conf := "unset"
	if s.TLS != nil {
		conf = "set" // it holds a private key
	}
	return fmt.Sprintf("{ID:%s Primary:%s Replicas:%v+%d clients TLS:%s Weight:%d}", s.ID, primary, replicas, len(s.ReplicaClients), conf, s.Weight)
}

// GoString is String, so that %#v shows no credentials either.
func (s ShardConfig) GoString() string { return "ringfence.ShardConfig" + s.String() }

// Format writes String whatever the verb: %d and others would show the fields.
func (s ShardConfig) Format(f fmt.State, verb rune) { printSafely(f, verb, s) }

// printSafely is what Format does for all that holds secrets.
func printSafely(f fmt.State, verb rune, v interface {
	fmt.Stringer
	fmt.GoStringer
}) {
	text := v.String()
	switch {
	case verb == 'v' && f.Flag('#'):
		text = v.GoString()
	case verb == 'q':
		text = strconv.Quote(text)
	}
	_, _ = io.WriteString(f, text) // fmt keeps the error
}

// MarshalText is String, so that JSON shows no credentials either.
func (s ShardConfig) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue is String, for log/slog.
func (s ShardConfig) LogValue() slog.Value { return slog.StringValue(s.String()) }

// LimiterOption adjusts one limiter; see WithPolicy and WithBudget.
type LimiterOption func(*limiterOptions) error

type limiterOptions struct {
	policy FailurePolicy
	budget time.Duration
	near   time.Duration
	lease  Lease
}

// WithPolicy sets the limiter's failure policy instead of Config.Policy. A policy set
// for a shard at run time wins over both.
func WithPolicy(p FailurePolicy) LimiterOption {
	return func(o *limiterOptions) error {
		o.policy = p
		return p.validate("WithPolicy")
	}
}

// WithBudget sets the longest a caller of this limiter waits instead of Config.Budget: 1
// ms to 1 min.
func WithBudget(d time.Duration) LimiterOption {
	return func(o *limiterOptions) error {
		o.budget = d
		return checkBudget("WithBudget", d)
	}
}

// WithNearCache sets how long a denial by the primary may be repeated without asking it:
// 0 to MaxNearCache, default 1 s; 0 turns that off for the limiter. It is never repeated
// for longer than the primary would deny the call, so nothing changes but the time it
// takes; except that a Reset in another process, a limit raised in another process, units
// that another process returns ([WithLease]), a key that the server has lost, and a clock of
// the server that steps forward take effect here up to max later.
func WithNearCache(max time.Duration) LimiterOption {
	return func(o *limiterOptions) error {
		if max < 0 || max > MaxNearCache {
			return invalid("WithNearCache", max, "must be 0 (off) to %s", MaxNearCache)
		}
		o.near = max
		return nil
	}
}
