package ringfence

import (
	"fmt"
	"net"
	"net/url"
	"strings"
	"testing"
)

func TestShardURLs(t *testing.T) {
	for _, c := range []struct {
		url, addr, user, password string
		db                        int
		tls                       string // server name
	}{
		{"redis://host", "host:6379", "", "", 0, ""},
		{"redis://host:1234", "host:1234", "", "", 0, ""},
		{"redis://host:1234/", "host:1234", "", "", 0, ""},
		{"redis://host/7", "host:6379", "", "", 7, ""},
		{"redis://10.0.0.1:6379", "10.0.0.1:6379", "", "", 0, ""},
		{"redis://[::1]:6379", "[::1]:6379", "", "", 0, ""},
		{"redis://[::1]", "[::1]:6379", "", "", 0, ""},
		{"redis://user:secret@host", "host:6379", "user", "secret", 0, ""},
		{"redis://:secret@host", "host:6379", "", "secret", 0, ""},
		{"redis://user:p%40ss%2Fword@host/3", "host:6379", "user", "p@ss/word", 3, ""},
		{"rediss://host:6380", "host:6380", "", "", 0, "host"},
		{"rediss://user:secret@shard.example.org/1", "shard.example.org:6379", "user", "secret", 1, "shard.example.org"},
	} {
		o, err := parseURL(c.url)
		if err != nil {
			t.Errorf("%s: %v", c.url, err)
			continue
		}
		name := ""
		if o.TLSConfig != nil {
			name = o.TLSConfig.ServerName
		}
		if o.Addr != c.addr || o.Username != c.user || o.Password != c.password || o.DB != c.db || name != c.tls {
			t.Errorf("%s: %s, %q:%q, db %d, TLS %q", c.url, o.Addr, o.Username, o.Password, o.DB, name)
		}
	}
}

func TestURLsThatNameNoServerAreRefused(t *testing.T) {
	for _, u := range badURLs {
		if o, err := parseURL(u); err == nil {
			t.Errorf("%q is taken for %s", u, o.Addr)
		}
	}
}

// badURLs name no server; where there is a password it is s3cret.
var badURLs = []string{
	"", "host", "host:6379", "10.0.0.1:6379", "redis:", "redis:/", "redis://", "redis:///0", "redis:host:6379", "redis://:6379",
	"http://host", "tcp://host:6379", "unix:///tmp/redis.sock", "redis+srv://host", "REDIS", "://host",
	"redis://host?db=1", "redis://host:6379?max_retries=5", "redis://host#x", "redis://host/x", "redis://host/1/2", "redis://host/-1",
	"redis://host:port", "redis://host:99999999", "redis://host:6379:6379", "redis://[::1", "redis://]", "redis://[]", "redis://ho st", "redis://host\n", "redis://%zz",
	"redis://user:s3cret@", "redis://user:s3cret@?x=1", "redis://user:s3cret@host?x=1", "redis://user:s3cret@host:port",
	"redis://user:s3cret", "redis://us%zzer:s3cret@host", "redis://user:s3cret%@host", "user:s3cret@host:6379", "s3cret@host", ":s3cret@host",
	"redis:/user:s3cret@host", "redis:user:s3cret@host", "redis//user:s3cret@host", "http://user:s3cret@host", "user:s3cret://x@host",
	"redis://user:s3cret/host", "redis://user:s3cret#x@", "redis://host?password=s3cret", "redis://user@s3cret:host",
	"redis://host/s3cret", "redis://host#s3cret", "redis://user:s3cret @host", "redis://user:s3cret@host@", "redis ://user:s3cret@host",
}

func TestNoURLIsShownWithItsCredentials(t *testing.T) {
	for _, u := range append([]string{"redis://user:s3cret@host:6379/1", "rediss://:s3cret@host", "redis://s3cret@host", "redis://user:a@s3cret@host"}, badURLs...) {
		shown := redactURL(u)
		if strings.Contains(shown, "s3cret") || strings.Contains(shown, "user") {
			t.Errorf("%q is shown as %q", u, shown)
		}
		if _, err := parseURL(u); err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: %v", u, err)
		}
	}
	for u, want := range map[string]string{
		"redis://user:s3cret@host:6379/1": "redis://redacted@host:6379/1",
		"rediss://[::1]:6379":             "rediss://[::1]:6379",
		"redis+sentinel://a/b":            "redis+sentinel://...",
		"http://host":                     "http://host",
		"host:6379":                       "host:6379",
		"":                                "",
	} {
		if got := redactURL(u); got != want {
			t.Errorf("%q is shown as %q, want %q", u, got, want)
		}
	}
}

// wantSoundTarget wants of a URL of any kind that what parses names addresses that can be
// dialed, and that nothing said of it shows its password.
func wantSoundTarget(t *testing.T, raw, shown string) {
	t.Helper()
	target, err := parseTarget(raw)
	said := shown
	if err != nil {
		said += err.Error()
	}
	scheme, rest, _ := strings.Cut(raw, "://")
	if at := strings.LastIndexByte(rest, '@'); at >= 0 && len(scheme) > 0 {
		// Long enough not to be in the words of an error by accident, and not what the host or
		// the scheme says as well.
		_, secret, ok := strings.Cut(rest[:at], ":")
		if ok && len(secret) > 12 && !strings.Contains(scheme+rest[at:], secret) && strings.Contains(said, secret) {
			t.Errorf("%q: the password shows in %q", raw, said)
		}
	}
	if err != nil || target.kind == oneServer {
		return
	}
	if n := len(target.addrs); n < 1 || n > 64 {
		t.Errorf("%q names %d hosts", raw, n)
	}
	for _, addr := range target.addrs {
		host, port, err := net.SplitHostPort(addr)
		if err != nil || host == "" || !isPort(port) {
			t.Errorf("%q: address %q: %v", raw, addr, err)
		}
	}
	if (target.kind == sentinelSet) != (target.master != "") || target.db < 0 || (target.kind == redisCluster && target.db != 0) {
		t.Errorf("%q: %+v", raw, target.kind)
	}
}

// What parses names a host and a port; what is shown of it shows no credentials.
func FuzzParseURL(f *testing.F) {
	for _, u := range badURLs {
		f.Add(u)
	}
	f.Add("redis://user:s3cret@host:6379/1")
	f.Add("rediss://[::1]:6379")
	f.Add("0://:0000000000000@00000000000000") // a password that is part of the host's name
	for _, u := range []string{
		"redis+sentinel://user:s3cret@host:1,[::1]:2/master/3", "rediss+sentinel://host/m%2Fn", "redis+cluster://:s3cret@a,b:7000,c",
		"redis+cluster://user:s3%40cret@a@b", "redis+sentinel://user:s3cret@host", "redis+cluster://a,,b", "redis+sentinel://a/m/-1", "redis+cluster://a:b:c", "redis+cluster://a:0",
	} {
		f.Add(u)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		shown := redactURL(raw)
		wantSoundTarget(t, raw, shown)
		o, err := parseURL(raw)
		if err != nil {
			return
		}
		if _, _, err := net.SplitHostPort(o.Addr); err != nil {
			t.Errorf("%q: address %q: %v", raw, o.Addr, err)
		}
		u, err := url.Parse(raw)
		if err != nil {
			t.Fatalf("%q parses and does not: %v", raw, err)
		}
		if secret, ok := u.User.Password(); ok && secret != "" {
			encoded := u.User.String()
			if at := strings.Index(shown, "@"); at < 0 || strings.Contains(shown[:at], encoded) {
				t.Errorf("%q is shown as %q", raw, shown)
			}
		}
		for _, text := range []string{fmt.Sprint(ShardConfig{Primary: raw}), fmt.Sprintf("%#v", ShardConfig{Primary: raw})} {
			if !strings.Contains(text, shown) {
				t.Errorf("%q is printed as %q", raw, text)
			}
		}
	})
}
