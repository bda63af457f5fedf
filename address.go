package ringfence

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

// target is what a shard's URL names: one server, what a Sentinel set calls its master,
// or a whole Redis Cluster.
type target struct {
	kind     targetKind
	one      *redis.Options // oneServer
	addrs    []string       // sentinels, or nodes of the cluster
	master   string         // sentinelSet
	username string
	password string
	db       int
	tls      *tls.Config
}

// secured is the TLS configuration to use, nil for none: the user's, where there is one.
func (t *target) secured(users *tls.Config) *tls.Config {
	if t.tls == nil || users == nil {
		return t.tls
	}
	return users.Clone()
}

type targetKind uint8

const (
	oneServer targetKind = iota
	sentinelSet
	redisCluster
)

// parseTarget reads
//
//	redis://[user:password@]host[:port][/db]                       one server
//	redis+sentinel://[user:password@]host[:port],.../master[/db]   26379 by default
//	redis+cluster://[user:password@]host[:port],...                6379 by default
//
// and the same with rediss for TLS to the servers. The credentials are the servers', not
// the sentinels'.
func parseTarget(raw string) (*target, error) {
	scheme, rest, ok := strings.Cut(raw, "://")
	if !ok {
		return nil, errors.New("it is not a URL")
	}
	base, kind, _ := strings.Cut(scheme, "+")
	if base != "redis" && base != "rediss" {
		return nil, fmt.Errorf("the scheme %q is not known", shorten(scheme))
	}
	t := &target{}
	switch kind {
	case "":
		one, err := parseURL(raw)
		t.one = one
		return t, err
	case "sentinel":
		t.kind = sentinelSet
	case "cluster":
		t.kind = redisCluster
	default:
		return nil, fmt.Errorf("the scheme %q is not known", shorten(scheme))
	}
	if strings.ContainsAny(rest, "?#") {
		return nil, errors.New("it has a query or a fragment, which mean nothing here")
	}
	hosts, path, _ := strings.Cut(rest, "/")
	if at := strings.LastIndexByte(hosts, '@'); at >= 0 {
		if err := t.credentials(hosts[:at]); err != nil {
			return nil, err
		}
		hosts = hosts[at+1:]
	}
	if err := t.hosts(hosts); err != nil {
		return nil, err
	}
	if base == "rediss" {
		t.tls = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	return t, t.path(path)
}

func (t *target) credentials(userinfo string) error {
	name, secret, _ := strings.Cut(userinfo, ":")
	var err1, err2 error
	t.username, err1 = url.PathUnescape(name)
	t.password, err2 = url.PathUnescape(secret)
	if err1 != nil || err2 != nil {
		return errors.New("its user or password is not percent-encoded")
	}
	return nil
}

func (t *target) hosts(list string) error {
	port := "6379"
	if t.kind == sentinelSet {
		port = "26379"
	}
	for host := range strings.SplitSeq(list, ",") {
		u, err := url.Parse("redis://" + host)
		if err != nil || u.User != nil {
			return errors.New("one of its hosts is none")
		}
		if err := checkHost(u); err != nil {
			return err
		}
		p := u.Port()
		if p == "" {
			p = port
		}
		t.addrs = append(t.addrs, net.JoinHostPort(u.Hostname(), p))
	}
	if len(t.addrs) > 64 {
		return fmt.Errorf("it names %d hosts; 64 are enough", len(t.addrs))
	}
	return nil
}

func (t *target) path(path string) error {
	if t.kind == redisCluster {
		if path != "" {
			return errors.New("a cluster has no path: it has database 0 alone")
		}
		return nil
	}
	master, db, _ := strings.Cut(path, "/")
	var err error
	if t.master, err = url.PathUnescape(master); err != nil || t.master == "" {
		return errors.New("its path must begin with the name of the master")
	}
	if db != "" {
		if t.db, err = strconv.Atoi(db); err != nil || t.db < 0 {
			return errors.New("its path must end with the number of a database, or without one")
		}
	}
	return nil
}
