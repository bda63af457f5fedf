package ringfence

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// node is one server of a shard, as the rest of the package sees it. A method's error
// is what go-redis or the server said; classify tells what it means. All methods may be
// called from many goroutines.
type node interface {
	// charge runs the charge script and puts the replies into the requests. With no
	// requests it is a probe: the server checks all that it checks before a charge.
	charge(ctx context.Context, reqs []*request) error
	// look does the same without changing anything, and is a probe of a replica.
	look(ctx context.Context, reqs []*request) error
	// reset deletes the keys.
	reset(ctx context.Context, reqs []*request) error
	// info asks the server what it is.
	info(ctx context.Context) (nodeInfo, error)
	// now is the server's clock.
	now(ctx context.Context) (time.Time, error)
	// agree writes this process's fingerprint under name and returns those that others
	// wrote within the last two minutes.
	agree(ctx context.Context, name, fingerprint string) (others []string, err error)
	// beat sends a heartbeat and returns how many processes there are; beats is how many
	// a replica knows of.
	beat(ctx context.Context, name, member string) (int64, error)
	beats(ctx context.Context, name string) (int64, error)
	// load puts the scripts into the server's cache.
	load(ctx context.Context) error
	pool() *redis.PoolStats
	addr() string
	close() error
}

// nodeInfo is what a server says of itself.
type nodeInfo struct {
	version       string // "7.0.15"
	valkey        bool
	primary       bool
	replID        string
	replID2       string
	linkUp        bool
	lag           time.Duration // replica: since it last heard of its primary
	evictionRule  string
	memoryIsBound bool
}

// redisNode is a server behind go-redis.
type redisNode struct {
	client  redis.UniversalClient
	owned   bool
	scripts scripts
	plain   bool
	where   string
	loaded  func()                // told of each script the server had to be given
	unknown atomic.Pointer[error] // why the server does not know who we are, until it does
}

type nodeConfig struct {
	timeout  time.Duration
	poolSize int
	dialer   dialer
	tls      *tls.Config // for rediss://; nil: the system's roots
	loaded   func()
	gate     *refusals // shared by all servers of a shard
}

// newRedisNode connects to nothing yet. go-redis's defaults are meant for commands that
// may be repeated and callers who can wait; here
//   - nothing is sent twice: what timed out may have run, and would be charged again;
//   - one time-out bounds dialing, waiting for a connection, writing and reading;
//   - no notification may stretch the time-outs (maintenance mode makes them 10 s);
//   - the pool holds every operation that can be in flight, and those of the probes;
//   - the pool does not hear of dials that fail, see failLater.
func newRedisNode(url string, c nodeConfig, plain bool) (*redisNode, error) {
	o, err := parseURL(url)
	if err != nil {
		return nil, err
	}
	o.MaxRetries = -1
	o.DialerRetries = 1
	o.DialTimeout = c.timeout
	o.ReadTimeout = c.timeout
	o.WriteTimeout = c.timeout
	o.PoolTimeout = c.timeout
	o.ContextTimeoutEnabled = true
	o.PoolSize = c.poolSize
	o.DisableIdentity = true
	o.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	if o.TLSConfig != nil && c.tls != nil {
		host := o.TLSConfig.ServerName
		o.TLSConfig = c.tls.Clone()
		if o.TLSConfig.ServerName == "" {
			o.TLSConfig.ServerName = host
		}
	}
	o.Dialer = dialerOf(c.dialer, o.TLSConfig, c.timeout, c.gate, false)
	n := &redisNode{client: redis.NewClient(o), owned: true, where: o.Addr, loaded: c.loaded}
	n.setScripts(plain)
	return n, nil
}

func newClientNode(client redis.UniversalClient, c nodeConfig, plain bool) *redisNode {
	n := &redisNode{client: client, where: "client", loaded: c.loaded}
	if one, ok := client.(*redis.Client); ok {
		n.where = one.Options().Addr
	}
	n.setScripts(plain)
	return n
}

func (n *redisNode) setScripts(plain bool) {
	n.plain, n.scripts = plain, redisScripts
	if plain {
		n.scripts = plainScripts
	}
}

// dialer opens connections.
type dialer = func(ctx context.Context, network, addr string) (net.Conn, error)

// dialerOf is the user's dialer, or go-redis's own, with TLS where that is wanted.
func dialerOf(users dialer, conf *tls.Config, timeout time.Duration, gate *refusals, reader bool) dialer {
	if users != nil {
		return failLater(gate.through(withTLS(users, conf), reader))
	}
	return failLater(gate.through(redis.NewDialer(&redis.Options{TLSConfig: conf, DialTimeout: timeout}), reader))
}

// failLater turns a failed dial into a connection that fails when it is used. go-redis
// counts failed dials over the life of a pool, and after as many as the pool is large
// dials nothing for anybody any more but asks once a second, for ever and beyond Close.
// That is 60 dials a minute to a dead server, and a second more until it is found alive;
// when to try again is the breaker's to decide.
func failLater(dial dialer) dialer {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			// Joined with nothing, because go-redis takes one layer off what fails in its
			// handshake: a certificate's error, or that it was a dial, would be lost.
			return deadConn{errors.Join(err)}, nil
		}
		return conn, nil
	}
}

// deadConn is a connection that was never made.
type deadConn struct{ err error }

// Read says why there is no connection, and so does Write; the rest does nothing.
func (c deadConn) Read([]byte) (int, error) { return 0, c.err }

// Write is like Read.
func (c deadConn) Write([]byte) (int, error) { return 0, c.err }

// Close does nothing.
func (c deadConn) Close() error { return nil }

// LocalAddr is nowhere.
func (c deadConn) LocalAddr() net.Addr { return &net.TCPAddr{} }

// RemoteAddr is nowhere.
func (c deadConn) RemoteAddr() net.Addr { return &net.TCPAddr{} }

// SetDeadline does nothing.
func (c deadConn) SetDeadline(time.Time) error { return nil }

// SetReadDeadline does nothing.
func (c deadConn) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline does nothing.
func (c deadConn) SetWriteDeadline(time.Time) error { return nil }

// SyscallConn fails, which is how go-redis finds out that a connection in its pool is not
// fit for use: one whose dial outlasted the operation that wanted it ends up there.
func (c deadConn) SyscallConn() (syscall.RawConn, error) { return nil, c.err }

// withTLS adds what go-redis does itself only for its own dialer.
func withTLS(dial dialer, conf *tls.Config) dialer {
	if conf == nil {
		return dial
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		raw, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		conn := tls.Client(raw, named(conf, addr))
		if err := conn.HandshakeContext(ctx); err != nil {
			return nil, errors.Join(err, raw.Close())
		}
		return conn, nil
	}
}

// named is conf for a server that is known by its address: a node of a Cluster, or a member
// of a Sentinel set.
func named(conf *tls.Config, addr string) *tls.Config {
	if conf.ServerName != "" || conf.InsecureSkipVerify {
		return conf
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		host = addr
	}
	conf = conf.Clone()
	conf.ServerName = host
	return conf
}

// once marks a command as not to be repeated, whatever the client's options say.
type once struct{ *redis.IntSliceCmd }

// NoRetry is what go-redis asks for before it would repeat a command.
func (once) NoRetry() bool { return true }

// onceUnlink is once for a reset: repeated, it would wipe out what was charged and
// acknowledged since it was first executed.
type onceUnlink struct{ *redis.IntCmd }

// NoRetry is like once's.
func (onceUnlink) NoRetry() bool { return true }

// callBuffers hold the arguments of a call while it is built.
type callBuffers struct {
	args   []any
	limits []*rule
}

var callPool = sync.Pool{New: func() any { return new(callBuffers) }}

// run calls one script. A server that does not have it gets it along: NOSCRIPT is the
// one refusal after which sending again is safe, because nothing ran. call and callText
// are the commands' names, as arguments: a string constant costs no allocation so.
func (n *redisNode) run(ctx context.Context, call, callText any, s script, reqs []*request) error {
	b := callPool.Get().(*callBuffers)
	b.args, b.limits = appendArgs(append(b.args[:0], call, s.shaArg), s.brief, reqs, b.limits[:0])
	cmd := once{redis.NewIntSliceCmd(ctx, b.args...)}
	err := n.client.Process(ctx, cmd)
	if err != nil && redis.HasErrorPrefix(err, "NOSCRIPT") {
		n.loaded()
		b.args[0], b.args[1] = callText, s.text
		cmd = once{redis.NewIntSliceCmd(ctx, b.args...)}
		err = n.client.Process(ctx, cmd)
	}
	clear(b.args)
	clear(b.limits)
	callPool.Put(b)
	if err = n.account(err); err != nil {
		return err
	}
	return decodeReply(cmd.Val(), reqs)
}

// account gives the lost connections of a server that wants a password their reason. It
// answers our scripts with an error and hangs up, which the next operation may find out
// first: an outage, so it seems, and the breaker would open on it.
func (n *redisNode) account(err error) error {
	why := n.unknown.Load()
	if err == nil {
		if why != nil {
			n.unknown.Store(nil)
		}
		return nil
	}
	switch t := classify(err); {
	case t == typeAuth:
		n.unknown.Store(&err)
	case t == typeEOF && why != nil:
		return *why
	case why != nil:
		n.unknown.Store(nil)
	}
	return err
}

func (n *redisNode) charge(ctx context.Context, reqs []*request) error {
	return n.run(ctx, "evalsha", "eval", n.scripts.charge, reqs)
}

func (n *redisNode) look(ctx context.Context, reqs []*request) error {
	if n.plain { // the embedded server takes TIME for a write
		return n.run(ctx, "evalsha", "eval", n.scripts.look, reqs)
	}
	return n.run(ctx, "evalsha_ro", "eval_ro", n.scripts.look, reqs)
}

func (n *redisNode) reset(ctx context.Context, reqs []*request) error {
	args := make([]any, 1, len(reqs)+1)
	args[0] = "unlink"
	for _, r := range reqs {
		args = append(args, r)
	}
	return n.account(n.client.Process(ctx, onceUnlink{redis.NewIntCmd(ctx, args...)}))
}

func (n *redisNode) load(ctx context.Context) error {
	for _, s := range []script{n.scripts.charge, n.scripts.look} {
		if err := n.client.ScriptLoad(ctx, s.text).Err(); err != nil {
			return err
		}
		n.loaded()
	}
	return nil
}

func (n *redisNode) info(ctx context.Context) (nodeInfo, error) {
	if n.plain { // the embedded server has neither replicas nor eviction
		return nodeInfo{primary: true, version: "7.0.0", evictionRule: "noeviction"}, n.client.Ping(ctx).Err()
	}
	text, err := n.client.Info(ctx, "server", "replication", "memory").Result()
	if err != nil {
		return nodeInfo{}, err
	}
	return parseInfo(text), nil
}

func parseInfo(text string) nodeInfo {
	var i nodeInfo
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		switch name {
		case "redis_version":
			if i.version == "" {
				i.version = value
			}
		case "valkey_version":
			i.version, i.valkey = value, true
		case "role":
			i.primary = value == "master"
		case "master_replid":
			i.replID = value
		case "master_replid2":
			i.replID2 = value
		case "master_link_status":
			i.linkUp = value == "up"
		case "master_last_io_seconds_ago":
			if s, err := strconv.Atoi(value); err == nil && s >= 0 {
				i.lag = time.Duration(s) * time.Second
			}
		case "master_link_down_since_seconds":
			if s, err := strconv.Atoi(value); err == nil && s >= 0 {
				i.lag = time.Duration(s) * time.Second
			}
		case "maxmemory":
			i.memoryIsBound = value != "0"
		case "maxmemory_policy":
			i.evictionRule = value
		}
	}
	return i
}

// tooOld says whether the server lacks what the scripts need.
func (i nodeInfo) tooOld() bool {
	major, rest, _ := strings.Cut(i.version, ".")
	minor, _, _ := strings.Cut(rest, ".")
	a, err1 := strconv.Atoi(major)
	b, err2 := strconv.Atoi(minor)
	if err1 != nil || err2 != nil {
		return false // it does not say; the scripts will tell
	}
	if i.valkey {
		return a < 7 || (a == 7 && b < 2)
	}
	return a < 7
}

func (n *redisNode) now(ctx context.Context) (time.Time, error) { return n.client.Time(ctx).Result() }

func (n *redisNode) agree(ctx context.Context, name, fingerprint string) ([]string, error) {
	const fresh, kept = 2 * time.Minute, time.Hour
	at, err := n.now(ctx)
	if err != nil {
		return nil, err
	}
	pipe := n.client.Pipeline()
	pipe.HSet(ctx, name, fingerprint, at.Unix())
	pipe.PExpire(ctx, name, kept)
	all := pipe.HGetAll(ctx, name)
	if _, err := pipe.Exec(ctx); err != nil {
		return nil, err
	}
	var others, old []string
	for f, seen := range all.Val() {
		unix, err := strconv.ParseInt(seen, 10, 64)
		age := at.Sub(time.Unix(unix, 0))
		switch {
		case f == fingerprint:
		case err != nil || age > kept:
			old = append(old, f)
		case age < fresh:
			others = append(others, f)
		}
	}
	if len(old) > 0 {
		err = n.client.HDel(ctx, name, old...).Err()
	}
	return others, err
}

func (n *redisNode) pool() *redis.PoolStats { return n.client.PoolStats() }

func (n *redisNode) addr() string { return n.where }

func (n *redisNode) close() error {
	if !n.owned {
		return nil
	}
	return n.client.Close()
}
