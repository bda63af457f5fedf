package ringfence

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ringfence/ringfence/internal/redistest"
)

// refusal is one way in which a server does not let us.
type refusal struct {
	name, url, prefix string
	kind              string // error_type, if the operation fails as a whole
	opens             bool   // Open's check-up gets through
}

// startRefusing starts one server that refuses in all these ways, by user.
func startRefusing(t *testing.T) (*redistest.Server, []refusal) {
	t.Helper()
	writer, _ := roles(t)
	rules := writer.rules(aclPassword)
	s := redistest.Start(t, redistest.Options{Args: []string{
		"requirepass " + aclPassword + "-default",
		"user right " + rules,
		"user nocall " + rules + " -evalsha",
		"user nowrite " + rules + " -hset",
		"user noread " + rules + " -hvals",
		"user nothing on >" + aclPassword,
	}, Configure: withPassword(aclPassword + "-default")})
	at := func(credentials string) string { return "redis://" + credentials + s.Addr() }
	return s, []refusal{
		{name: "no password", url: at(""), kind: "auth"},
		{name: "a wrong password", url: at("right:" + aclPassword + "-wrong@"), kind: "auth"},
		{name: "a wrong password of the default user", url: at(":" + aclPassword + "-wrong@"), kind: "auth"},
		{name: "an unknown user", url: at("nobody:" + aclPassword + "@"), kind: "auth"},
		{name: "a user without any permission", url: at("nothing:" + aclPassword + "@"), kind: "noperm"},
		{name: "a user without the script call", url: at("nocall:" + aclPassword + "@"), kind: "noperm", opens: true},
		{name: "a user without a command in the script", url: at("nowrite:" + aclPassword + "@"), kind: "noperm", opens: true},
		{name: "a user without the script's first read", url: at("noread:" + aclPassword + "@"), opens: true},
		{name: "a user of other keys", url: at("right:" + aclPassword + "@"), prefix: "other", kind: "noperm", opens: true},
		{name: "a database without the permission to select it", url: at("right:"+aclPassword+"@") + "/3", kind: "noperm"},
	}
}

func TestRefusalIsLoggedTakesThePolicyAndLeavesTheBreakerClosed(t *testing.T) {
	_, refusals := startRefusing(t)
	for _, c := range refusals {
		t.Run(c.name, func(t *testing.T) {
			lines, registry := &sink{}, prometheus.NewRegistry()
			config := Config{
				Shards: []ShardConfig{{ID: "a", Primary: c.url}}, Prefix: c.prefix,
				HashKey: []byte("0123456789abcdef"), Logger: lines.logger(), Registerer: registry,
				Budget: 10 * time.Second, OperationTimeout: 10 * time.Second, Instances: 1,
			}
			redistest.NoLeaks(t)
			ring, err := Open(t.Context(), config)
			aclMust(t, err)
			defer ring.Close()
			said := []string{fmt.Sprintf("%v %+v %#v", config, config, config)}
			bucket := TokenBucket{Rate: 1, Per: time.Hour, Burst: 5}
			for _, p := range []FailurePolicy{PolicyOpen, PolicyClosed, PolicyLocal} {
				l, err := ring.Limiter("api-"+p.String(), bucket, WithPolicy(p))
				aclMust(t, err)
				for i := range 8 {
					d, err := l.Allow(t.Context(), "k")
					aclMust(t, err)
					wantSource, wantAllowed := SourcePolicy, p == PolicyOpen
					if p == PolicyLocal {
						wantSource, wantAllowed = SourceLocal, i < 5
					}
					if d.Source != wantSource || d.Cause != CauseError || d.Allowed != wantAllowed {
						t.Fatalf("policy %s, call %d: %+v; %+v\n%s", p, i, d, ring.Stats()[0].Breaker, lines)
					}
				}
				if c.kind != "" { // of the scripts: Reset is told in other words
					some := fmt.Sprintf(`ratelimiter_redis_errors_total{error_type=%q,shard_id="a"} `, c.kind)
					if text := exposition(t, registry); !strings.Contains(text, some) || strings.Contains(text, some+"0\n") {
						t.Errorf("no error of type %s was counted", c.kind)
					}
				}
				if err := l.Reset(t.Context(), "k"); err != nil {
					if !errors.Is(err, ErrUnavailable) {
						t.Errorf("Reset: %v", err)
					}
					said = append(said, err.Error())
				}
			}
			stats := ring.Stats()[0]
			if stats.Breaker.State != BreakerClosed || stats.Breaker.Failures != 0 {
				t.Errorf("the breaker has opened: %+v", stats.Breaker)
			}
			if !strings.Contains(lines.String(), "level=WARN msg=\"ringfence: Redis refuses") {
				t.Errorf("not logged:\n%s", lines)
			}
			metrics := exposition(t, registry)
			config.Strict, config.Registerer = true, nil
			strict, err := Open(t.Context(), config)
			if c.opens {
				aclMust(t, err)
				aclMust(t, strict.Close())
			} else if !errors.Is(err, ErrUnreachable) {
				t.Errorf("with Strict: %v, want ErrUnreachable", err)
			} else {
				said = append(said, err.Error())
			}
			said = append(said, lines.String(), metrics, driverLog.String(), fmt.Sprintf("%+v", stats))
			for _, text := range said {
				if strings.Contains(text, aclPassword) || strings.Contains(text, "0123456789abcdef") {
					t.Errorf("it shows a secret: %s", text)
				}
			}
		})
	}
}

// The permission comes, and the next call is exact: nothing has to be restarted.
func TestPermissionGrantedLaterIsUsedAtOnce(t *testing.T) {
	s, _ := startRefusing(t)
	lines := &sink{}
	redistest.NoLeaks(t)
	ring, err := Open(t.Context(), Config{
		Shards:  []ShardConfig{{ID: "a", Primary: "redis://nocall:" + aclPassword + "@" + s.Addr()}},
		HashKey: []byte("0123456789abcdef"), Logger: lines.logger(),
		Budget: 10 * time.Second, OperationTimeout: 10 * time.Second, Policy: PolicyClosed,
	})
	aclMust(t, err)
	defer ring.Close()
	l, err := ring.Limiter("api", TokenBucket{Rate: 1, Per: time.Hour, Burst: 2})
	aclMust(t, err)
	for range 10 {
		if d, err := l.Allow(t.Context(), "k"); err != nil || d.Allowed {
			t.Fatalf("%+v, %v", d, err)
		}
	}
	aclMust(t, s.Client().Do(t.Context(), "acl", "setuser", "nocall", "+evalsha").Err())
	if d, err := l.Allow(t.Context(), "k"); err != nil || d.Source != SourcePrimary || d.Remaining != 1 {
		t.Errorf("%+v, %v", d, err)
	}
}

// Whoever watches the log must not be told of a corrupt key when a permission is missing.
func TestReadThatIsRefusedIsNotTakenForACorruptKey(t *testing.T) {
	s, _ := startRefusing(t)
	lines := &sink{}
	redistest.NoLeaks(t)
	ring, err := Open(t.Context(), Config{
		Shards:  []ShardConfig{{ID: "a", Primary: "redis://noread:" + aclPassword + "@" + s.Addr()}},
		HashKey: []byte("0123456789abcdef"), Logger: lines.logger(),
		Budget: 10 * time.Second, OperationTimeout: 10 * time.Second,
	})
	aclMust(t, err)
	defer ring.Close()
	l, err := ring.Limiter("api", TokenBucket{Rate: 1, Per: time.Hour, Burst: 2})
	aclMust(t, err)
	d, err := l.Allow(t.Context(), "k")
	if err != nil || d.Cause != CauseError {
		t.Errorf("%+v, %v", d, err)
	}
	if text := lines.String(); strings.Contains(text, "did not write") || !strings.Contains(text, "docs/security.md") {
		t.Errorf("it says:\n%s", text)
	}
}
