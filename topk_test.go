package ringfence_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ringfence/ringfence"
)

func withTop(c *ringfence.Config) { c.Top = ringfence.TopConfig{Keys: 64} }

func topKeys(t *testing.T, r *ringfence.Ring, q ringfence.TopQuery) map[string]ringfence.TopKey {
	t.Helper()
	list, err := r.Top(q)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]ringfence.TopKey{}
	for _, k := range list.Keys {
		out[k.Limiter+"/"+k.Key] = k
	}
	return out
}

func TestTopCountsEveryDecidedCallOnceByKey(t *testing.T) {
	m := openMetered(t, 3, withTop)
	ctx := context.Background()
	for i := range 14 { // 10 of them admitted
		if _, err := m.bucket.Allow(ctx, "hot"); err != nil {
			t.Fatal(err)
		}
		if i%7 == 0 {
			if _, err := m.log.AllowMany(ctx, []ringfence.Request{{Key: "many", Cost: 3}, {Key: "many", Cost: 3}, {Key: "other", Cost: 1}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	// What is no decision is not counted.
	_, _ = m.bucket.Allow(ctx, "")
	_, _ = m.bucket.AllowN(ctx, "hot", -1)
	_, _ = m.bucket.AllowMany(ctx, []ringfence.Request{{Key: "hot", Cost: 1}, {Key: "", Cost: 1}})
	if _, err := m.bucket.Peek(ctx, "hot"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]struct {
		by   ringfence.TopBy
		keys map[string]int64
	}{
		"calls":  {ringfence.TopCalls, map[string]int64{"bucket/hot": 14, "log/many": 4, "log/other": 2}},
		"denied": {ringfence.TopDenied, map[string]int64{"bucket/hot": 4, "log/many": 3}},
	} {
		got := topKeys(t, m.Ring, ringfence.TopQuery{By: want.by})
		if len(got) != len(want.keys) {
			t.Errorf("%s: %v", name, got)
		}
		for k, n := range want.keys {
			if got[k].AtLeast != n || got[k].AtMost != n {
				t.Errorf("%s: %s has %d to %d, want %d", name, k, got[k].AtLeast, got[k].AtMost, n)
			}
		}
	}
	if m.Ring.Stats() == nil || len(topKeys(t, m.Ring, ringfence.TopQuery{Limiter: "log"})) != 2 {
		t.Error("the keys of one limiter are not two")
	}
	list, err := m.bucket.Top(ringfence.TopCalls, 1)
	if err != nil || len(list.Keys) != 1 || list.Total != 14 || list.OneIn != 1 || list.Span <= 0 {
		t.Errorf("%+v, %v", list, err)
	}
}

// A shard's list holds its own keys only, and all lists together hold all of them.
func TestTopOfAShardAgreesWithLocate(t *testing.T) {
	const keys = 40
	// Counters enough for all keys, however they fall into the stripes.
	m := openMetered(t, 3, func(c *ringfence.Config) { c.Top = ringfence.TopConfig{Keys: 4 * keys} })
	for i := range keys {
		if _, err := m.bucket.Allow(context.Background(), fmt.Sprint("user-", i)); err != nil {
			t.Fatal(err)
		}
	}
	seen := 0
	for _, s := range m.Stats() {
		for _, k := range topKeys(t, m.Ring, ringfence.TopQuery{Shard: s.ID, N: ringfence.MaxTop}) {
			seen++
			shard, redisKey := m.bucket.Locate(k.Key)
			if shard != s.ID || k.Shard != s.ID || k.RedisKey != redisKey {
				t.Errorf("%+v is listed for %s; Locate says %s, %s", k, s.ID, shard, redisKey)
			}
		}
	}
	if seen != keys {
		t.Errorf("%d keys on all shards, want %d", seen, keys)
	}
}

func TestTopRefusesWhatItCannotShow(t *testing.T) {
	off := openMetered(t, 1, nil)
	if _, err := off.bucket.Top(ringfence.TopCalls, 5); !errors.Is(err, ringfence.ErrInvalid) || !strings.Contains(err.Error(), "Config.Top.Keys") {
		t.Errorf("a ring without TopConfig: %v", err)
	}
	m := openMetered(t, 1, withTop)
	for field, q := range map[string]ringfence.TopQuery{
		"By": {By: 2}, "N": {N: ringfence.MaxTop + 1}, "shardID": {Shard: "nowhere"}, "Limiter": {Limiter: "nobody"},
	} {
		if _, err := m.Top(q); !errors.Is(err, ringfence.ErrInvalid) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	if _, err := m.Top(ringfence.TopQuery{N: -1}); !errors.Is(err, ringfence.ErrInvalid) {
		t.Errorf("N = -1: %v", err)
	}
	for _, c := range []ringfence.TopConfig{{Keys: 15}, {Keys: -1}, {Keys: 4097}, {Keys: 64, Window: time.Millisecond}, {Window: 25 * time.Hour}} {
		_, err := ringfence.Open(t.Context(), ringfence.Config{Shards: m.shards.Config(), Top: c})
		if !errors.Is(err, ringfence.ErrInvalid) || !strings.Contains(err.Error(), "Config.Top.") {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// recorder is an Observer.
type recorder struct {
	mu  sync.Mutex
	got []ringfence.Observation
	ctx []context.Context
}

func (r *recorder) Observe(ctx context.Context, o ringfence.Observation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	o.Many = append([]ringfence.Decision(nil), o.Many...)
	r.got, r.ctx = append(r.got, o), append(r.ctx, ctx)
}

type panicking struct{ secret string }

func (p panicking) Observe(context.Context, ringfence.Observation) { panic(p.secret) }

type ctxKey struct{}

func TestObserversHearOfEveryCallOnce(t *testing.T) {
	first, last := &recorder{}, &recorder{}
	var log bytes.Buffer // slog's handler has a lock, and the calls here are one after another
	m := openMetered(t, 2, func(c *ringfence.Config) {
		c.Observers = []ringfence.Observer{first, panicking{"what-ctx-held"}, last}
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
	})
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), ctxKey{}, 1))
	d, err := m.bucket.AllowN(ctx, marker, 3)
	if err != nil || !d.Allowed || d.Source != ringfence.SourcePrimary {
		t.Fatalf("a panicking observer changed the decision: %+v, %v", d, err)
	}
	many, err := m.log.AllowMany(ctx, []ringfence.Request{{Key: marker, Cost: 4}, {Key: marker, Cost: 4}, {Key: "b", Cost: 1}})
	if err != nil {
		t.Fatal(err)
	}
	_, _ = m.bucket.AllowN(ctx, marker, -1)
	_, _ = m.bucket.AllowMany(ctx, []ringfence.Request{{Key: marker, Cost: 1}, {}})
	_, _ = m.bucket.Allow(nil, marker) //nolint:staticcheck // the misuse under test
	cancel()
	_, _ = m.bucket.Allow(ctx, marker)
	for _, r := range []*recorder{first, last} {
		if len(r.got) != 6 {
			t.Fatalf("%d observations, want 6: %+v", len(r.got), r.got)
		}
		if o := r.got[0]; o.Limiter != "bucket" || o.Entries != 1 || o.Cost != 3 || o.Decision != d || o.Err != nil || o.Many != nil || o.Took <= 0 {
			t.Errorf("AllowN: %+v", o)
		}
		o := r.got[1]
		if o.Limiter != "log" || o.Entries != 3 || o.Cost != 9 || len(o.Many) != 3 || o.Many[0] != many[0] || o.Many[1].Allowed || o.Err != nil {
			t.Errorf("AllowMany: %+v", o)
		}
		for i, want := range []struct {
			entries int
			err     error
		}{{1, ringfence.ErrInvalid}, {2, ringfence.ErrInvalid}, {1, ringfence.ErrInvalid}, {1, context.Canceled}} {
			if o := r.got[2+i]; o.Entries != want.entries || !errors.Is(o.Err, want.err) || o.Cost != 0 || o.Decision.Allowed {
				t.Errorf("refused %d: %+v", i, o)
			}
		}
		for i, c := range r.ctx {
			if c == nil || (i != 4) != (c.Value(ctxKey{}) != nil) {
				t.Errorf("observation %d has another context than the call", i)
			}
		}
		if text := fmt.Sprintf("%+v", r.got); strings.Contains(text, marker) {
			t.Error("an observation holds a key")
		}
	}
	if text := log.String(); strings.Count(text, "panicked") != 1 || strings.Contains(text, "what-ctx-held") {
		t.Errorf("the log: %s", text)
	}
}

func TestObserversAreChecked(t *testing.T) {
	for _, all := range [][]ringfence.Observer{{nil}, make([]ringfence.Observer, 9)} {
		_, err := ringfence.Open(t.Context(), ringfence.Config{Shards: []ringfence.ShardConfig{{ID: "a", Primary: "redis://127.0.0.1:1"}}, Observers: all})
		if !errors.Is(err, ringfence.ErrInvalid) || !strings.Contains(err.Error(), "Config.Observers") {
			t.Errorf("%d observers: %v", len(all), err)
		}
	}
}
