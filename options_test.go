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

// What parses names a host and a port; what is shown of it shows no credentials.
func FuzzParseURL(f *testing.F) {
	for _, u := range badURLs {
		f.Add(u)
	}
	f.Add("redis://user:s3cret@host:6379/1")
	f.Add("rediss://[::1]:6379")
	f.Fuzz(func(t *testing.T, raw string) {
		shown := redactURL(raw)
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
