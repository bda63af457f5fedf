package ringfence

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence/internal/redistest"
)

// authority is a certificate authority made for one test.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	next int64
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir()}
	a.cert, a.key = a.sign(t, "ca", &x509.Certificate{
		Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

// sign makes a key and a certificate and leaves both in files; the authority's own is
// the first, signed by itself.
func (a *authority) sign(t *testing.T, name string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	aclMust(t, err)
	a.next++
	template.SerialNumber = big.NewInt(a.next)
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	aclMust(t, err)
	cert, err := x509.ParseCertificate(der)
	aclMust(t, err)
	raw, err := x509.MarshalECPrivateKey(key)
	aclMust(t, err)
	a.write(t, name+".crt", "CERTIFICATE", der)
	a.write(t, name+".key", "EC PRIVATE KEY", raw)
	return cert, key
}

func (a *authority) write(t *testing.T, name, kind string, der []byte) {
	t.Helper()
	aclMust(t, os.WriteFile(a.path(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

// server and client issue certificates.
func (a *authority) server(t *testing.T, name string, template x509.Certificate) {
	t.Helper()
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	a.sign(t, name, &template)
}

func (a *authority) client(t *testing.T, name string) tls.Certificate {
	t.Helper()
	a.sign(t, name, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	c, err := tls.LoadX509KeyPair(a.path(name+".crt"), a.path(name+".key"))
	aclMust(t, err)
	return c
}

func (a *authority) roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

var loopback = []net.IP{net.IPv4(127, 0, 0, 1)}

// startTLS starts a server that speaks nothing but TLS and has the certificate of that
// name; clients says whether it demands theirs.
func startTLS(t *testing.T, a *authority, cert string, clients bool, args ...string) *redistest.Server {
	t.Helper()
	auth := "no"
	if clients {
		auth = "yes"
	}
	admin := a.client(t, "admin")
	for try := 1; ; try++ {
		// The server's configuration has to name the port, so it is chosen here.
		// Somebody may take it in between: then another.
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		aclMust(t, err)
		port := l.Addr().(*net.TCPAddr).Port
		aclMust(t, l.Close())
		s, err := redistest.Launch(t.Context(), redistest.Options{
			Port: port,
			Args: append([]string{
				"port 0", "tls-port " + strconv.Itoa(port), "tls-auth-clients " + auth,
				"tls-cert-file " + a.path(cert+".crt"), "tls-key-file " + a.path(cert+".key"),
				"tls-ca-cert-file " + a.path("ca.crt"), "tls-replication yes",
			}, args...),
			Configure: func(o *redis.Options) {
				o.TLSConfig = &tls.Config{RootCAs: a.roots(), Certificates: []tls.Certificate{admin}, ServerName: "127.0.0.1"}
			},
		})
		if err == nil {
			t.Cleanup(s.Stop)
			t.Logf("real redis-server at %s", s.Addr())
			return s
		}
		if try == 5 || !strings.Contains(err.Error(), "taken") && !strings.Contains(err.Error(), "in use") {
			t.Fatal(err)
		}
	}
}

func tlsConfig(lines *sink, shard ShardConfig) Config {
	shard.ID = "a"
	return Config{
		Shards: []ShardConfig{shard}, HashKey: []byte("0123456789abcdef"), Logger: lines.logger(),
		Budget: 10 * time.Second, OperationTimeout: 10 * time.Second, Policy: PolicyClosed,
	}
}

// admits opens the ring and takes two of three.
func admits(t *testing.T, c Config) *Limiter {
	t.Helper()
	c.Strict = true
	redistest.NoLeaks(t)
	ring, err := Open(t.Context(), c)
	aclMust(t, err)
	t.Cleanup(func() { ring.Close() })
	l, err := ring.Limiter("api", TokenBucket{Rate: 1, Per: time.Hour, Burst: 3})
	aclMust(t, err)
	for i := range int64(2) {
		d, err := l.Allow(t.Context(), "k")
		if err != nil || d.Source != SourcePrimary || d.Remaining != 2-i {
			t.Fatalf("call %d: %+v, %v", i, d, err)
		}
	}
	return l
}

func overTLS(s *redistest.Server) string { return "rediss://" + s.Addr() }

func TestShardBehindAnAuthorityOfItsOwnIsReachedOverTLS(t *testing.T) {
	a, lines := newAuthority(t), &sink{}
	a.server(t, "server", x509.Certificate{IPAddresses: loopback})
	s := startTLS(t, a, "server", false)
	conf := &tls.Config{RootCAs: a.roots()}
	admits(t, tlsConfig(lines, ShardConfig{Primary: overTLS(s), TLS: conf}))
	if lines.String() != "" {
		t.Errorf("it warns:\n%s", lines)
	}
	if conf.ServerName != "" {
		t.Errorf("the caller's tls.Config was changed: ServerName %q", conf.ServerName)
	}
}

func TestNameInTheCertificateMayDifferFromTheAddress(t *testing.T) {
	a := newAuthority(t)
	a.server(t, "server", x509.Certificate{DNSNames: []string{"redis.internal"}})
	s := startTLS(t, a, "server", false)
	admits(t, tlsConfig(&sink{}, ShardConfig{Primary: overTLS(s), TLS: &tls.Config{RootCAs: a.roots(), ServerName: "redis.internal"}}))
}

func TestServerThatDemandsACertificateGetsIt(t *testing.T) {
	a := newAuthority(t)
	a.server(t, "server", x509.Certificate{IPAddresses: loopback})
	s := startTLS(t, a, "server", true)
	conf := &tls.Config{RootCAs: a.roots(), Certificates: []tls.Certificate{a.client(t, "service")}}
	admits(t, tlsConfig(&sink{}, ShardConfig{Primary: overTLS(s), TLS: conf}))
}

func TestTLSGoesThroughTheDialerOfTheConfiguration(t *testing.T) {
	a := newAuthority(t)
	a.server(t, "server", x509.Certificate{IPAddresses: loopback})
	s := startTLS(t, a, "server", true)
	conf := &tls.Config{RootCAs: a.roots(), Certificates: []tls.Certificate{a.client(t, "service")}}
	c := tlsConfig(&sink{}, ShardConfig{Primary: overTLS(s), TLS: conf})
	var dials atomic.Int32
	c.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
		dials.Add(1)
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	admits(t, c)
	if dials.Load() == 0 {
		t.Error("it was not used")
	}
}

func TestTLSWithUserPasswordAndDatabase(t *testing.T) {
	a := newAuthority(t)
	a.server(t, "server", x509.Certificate{IPAddresses: loopback})
	writer, _ := roles(t)
	s := startTLS(t, a, "server", false, "user "+writer.user+" "+writer.rules("p@ss:w/rd")+" +select")
	url := "rediss://" + writer.user + ":p%40ss%3Aw%2Frd@" + s.Addr() + "/3"
	l := admits(t, tlsConfig(&sink{}, ShardConfig{Primary: url, TLS: &tls.Config{RootCAs: a.roots()}}))
	_, name := l.Locate("k")
	keys := s.Client().Do(t.Context(), "info", "keyspace").String()
	if !strings.Contains(keys, "db3:") || strings.Contains(keys, "db0:") {
		t.Errorf("%s is not in database 3 alone: %s", name, keys)
	}
}

func TestReplicasSpeakTLSToo(t *testing.T) {
	a := newAuthority(t)
	a.server(t, "server", x509.Certificate{IPAddresses: loopback})
	primary := startTLS(t, a, "server", true, "repl-diskless-sync no")
	replica := startTLS(t, a, "server", true, "repl-diskless-sync no")
	aclMust(t, replica.ReplicaOf(t.Context(), primary))
	conf := &tls.Config{RootCAs: a.roots(), Certificates: []tls.Certificate{a.client(t, "service")}}
	l := admits(t, tlsConfig(&sink{}, ShardConfig{Primary: overTLS(primary), Replicas: []string{overTLS(replica)}, TLS: conf}))
	aclMust(t, replica.WaitInSync(t.Context()))
	aclMust(t, l.ring.ForceBreaker("a", BreakerForcedOpen))
	d, err := l.Allow(t.Context(), "k")
	if err != nil || d.Source != SourceReplica || !d.Allowed || d.Remaining != 0 {
		t.Errorf("%+v, %v", d, err)
	}
}

// Whatever is wrong with the certificates is in the log, and callers get an answer.
func TestTLSThatFailsIsLoggedAndTakesTheLadder(t *testing.T) {
	a, stranger := newAuthority(t), newAuthority(t)
	a.server(t, "server", x509.Certificate{IPAddresses: loopback})
	a.server(t, "elsewhere", x509.Certificate{DNSNames: []string{"redis.internal"}})
	plain := redistest.Start(t, redistest.Options{})
	server, elsewhere, mutual := startTLS(t, a, "server", false), startTLS(t, a, "elsewhere", false), startTLS(t, a, "server", true)
	trusting := &tls.Config{RootCAs: a.roots()}
	for _, c := range []struct {
		name, url string
		conf      *tls.Config
		says      string
		kind      string
	}{
		{"the system's roots", overTLS(server), nil, "certificate signed by unknown authority", "dial"},
		{"another authority", overTLS(server), &tls.Config{RootCAs: stranger.roots()}, "certificate signed by unknown authority", "dial"},
		{"another name", overTLS(elsewhere), trusting, "127.0.0.1", "dial"},
		{"no client certificate", overTLS(mutual), trusting, "certificate required", "dial"},
		{"a stranger's client certificate", overTLS(mutual), &tls.Config{RootCAs: a.roots(), Certificates: []tls.Certificate{stranger.client(t, "service")}}, "tls:", "dial"},
		{"no TLS to a port that wants it", "redis://" + server.Addr(), nil, "EOF", "dial"},
		{"TLS to a port that has none", overTLS(plain), trusting, "", ""},
	} {
		for _, dialer := range []string{"", ", own dialer"} {
			t.Run(c.name+dialer, func(t *testing.T) {
				lines, registry := &sink{}, prometheus.NewRegistry()
				config := tlsConfig(lines, ShardConfig{Primary: c.url, TLS: c.conf})
				config.Budget, config.OperationTimeout, config.Registerer = time.Second, time.Second, registry
				if dialer != "" {
					config.Dialer = new(net.Dialer).DialContext
				}
				redistest.NoLeaks(t)
				ring, err := Open(t.Context(), config)
				aclMust(t, err)
				defer ring.Close()
				l, err := ring.Limiter("api", TokenBucket{Rate: 1, Per: time.Hour, Burst: 3})
				aclMust(t, err)
				// A caller who finds an operation overdue does not wait, hence the pace.
				pace, until := time.NewTicker(5*time.Millisecond), time.Now().Add(20*time.Second)
				defer pace.Stop()
				for cause := CauseNone; cause != CauseBreaker; <-pace.C {
					start := time.Now()
					d, err := l.Allow(t.Context(), "k")
					if err != nil || d.Allowed || d.Source != SourcePolicy {
						t.Fatalf("%+v, %v", d, err)
					}
					if took := time.Since(start); took > 2*time.Second {
						t.Errorf("it took %s", took)
					}
					if cause = d.Cause; start.After(until) {
						t.Fatal("the breaker does not open")
					}
				}
				text := lines.String()
				if !strings.Contains(text, "level=WARN") || !strings.Contains(text, c.says) {
					t.Errorf("want %q in\n%s", c.says, text)
				}
				metrics := exposition(t, registry)
				if c.kind != "" {
					line := fmt.Sprintf(`ratelimiter_redis_errors_total{error_type=%q,shard_id="a"} `, c.kind)
					if !strings.Contains(metrics, line) || strings.Contains(metrics, line+"0\n") {
						t.Errorf("no error of type %s was counted", c.kind)
					}
					if unknown := `ratelimiter_unknown_charges_total{shard_id="a"} `; c.kind == "dial" && strings.Contains(metrics, unknown) && !strings.Contains(metrics, unknown+"0\n") {
						t.Error("a charge that was never sent is counted as unknown")
					}
				}
			})
		}
	}
}

// A server that accepts and then says nothing, in mid-handshake, holds nobody longer than
// anything else that hangs, nor Close.
func TestHandshakeThatHangsIsBounded(t *testing.T) {
	a := newAuthority(t)
	a.server(t, "server", x509.Certificate{IPAddresses: loopback})
	s := startTLS(t, a, "server", false)
	for _, own := range []bool{false, true} {
		t.Run(fmt.Sprintf("own dialer %t", own), func(t *testing.T) {
			proxy, err := redistest.NewProxy(s.Addr())
			aclMust(t, err)
			defer proxy.Close()
			proxy.Blackhole(true)
			c := tlsConfig(&sink{}, ShardConfig{Primary: "rediss://" + proxy.Addr(), TLS: &tls.Config{RootCAs: a.roots()}})
			c.Budget, c.OperationTimeout = 50*time.Millisecond, 200*time.Millisecond
			if own {
				c.Dialer = new(net.Dialer).DialContext
			}
			redistest.NoLeaks(t)
			ring, err := Open(t.Context(), c)
			aclMust(t, err)
			l, err := ring.Limiter("api", TokenBucket{Rate: 1, Per: time.Hour, Burst: 3})
			aclMust(t, err)
			for range 5 {
				start := time.Now()
				if d, err := l.Allow(t.Context(), "k"); err != nil || d.Source != SourcePolicy {
					t.Fatalf("%+v, %v", d, err)
				}
				if took := time.Since(start); took > 500*time.Millisecond {
					t.Errorf("a caller waited %s", took)
				}
			}
			start := time.Now()
			aclMust(t, ring.Close())
			if took := time.Since(start); took > 3*time.Second {
				t.Errorf("Close took %s", took)
			}
		})
	}
}

func TestTLSConfigurationIsPrintedAsNothingButSet(t *testing.T) {
	a := newAuthority(t)
	c := tlsConfig(&sink{}, ShardConfig{Primary: "rediss://127.0.0.1:1", TLS: &tls.Config{
		RootCAs: a.roots(), Certificates: []tls.Certificate{a.client(t, "service")}, ServerName: "redis.internal",
	}})
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		text := fmt.Sprintf(verb, c)
		if !strings.Contains(text, "TLS:set") || strings.Contains(text, "redis.internal") || strings.Contains(text, "Certificate") {
			t.Errorf("%s: %s", verb, text)
		}
	}
}

func TestTLSWithoutAnEncryptedURLIsRefused(t *testing.T) {
	for _, s := range []ShardConfig{
		{Primary: "redis://127.0.0.1:1"},
		{Client: redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"})},
	} {
		s.TLS = &tls.Config{}
		_, err := Open(t.Context(), tlsConfig(&sink{}, s))
		if err == nil || !strings.Contains(err.Error(), "Config.Shards[0].TLS") {
			t.Errorf("error %v, want one that names Config.Shards[0].TLS", err)
		}
		if s.Client != nil {
			aclMust(t, s.Client.Close())
		}
	}
}
