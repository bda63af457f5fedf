package ringfence

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/ringfence/ringfence/internal/topk"
)

// The bounds of TopConfig and of what is asked of it.
const (
	// MaxTopKeys is the most counters TopConfig.Keys can ask for.
	MaxTopKeys = 4096
	// MaxTop is the most keys that Top and the handler return at once.
	MaxTop = 100

	minTopKeys    = 16
	defaultWindow = 10 * time.Minute
)

// TopConfig says whether a ring remembers who calls most and who is denied most: see
// Ring.Top, Limiter.Top and package tophttp. The zero value does not, because keys are
// often personal (addresses, accounts) and are otherwise kept nowhere in the clear.
//
// Each limiter then keeps two lists, for calls and for denied calls. In each half of the
// window a list has Keys counters (algorithm: Space-Saving, Metwally et al. 2005; a fourth
// of the counters for a fourth of the keys). Of N calls in a half window, every key with
// more than 4 x N / Keys is listed, and no count is further off than that; usually it is a
// fourth of it, and TopKey says how far each may be off. Of the first 1,024 calls of
// a half window or more (up to 4,096) each is counted; from then on one in 64, drawn at
// random, counts for 64, which adds a standard deviation of sqrt(63 x calls) to the count
// of a key: 8 % at 10,000.
//
// A list takes at most 4 x Keys x (128 bytes + the length of its keys) over both halves;
// a limiter with the largest keys (512 bytes) and Keys = 256 takes 1.3 MB at the very
// most, for both lists.
type TopConfig struct {
	// Keys is the number of counters of each list: 16 to 4,096; 0: no keys are kept. 256
	// finds every key that has more than 1.6 % of a limiter's calls.
	Keys int
	// Window is how far back the lists reach: between half of it and all of it. 1 s to
	// 24 h; 0: 10 min.
	Window time.Duration
}

func (c TopConfig) withDefaults(field string) (TopConfig, error) {
	if c.Keys != 0 && (c.Keys < minTopKeys || c.Keys > MaxTopKeys) {
		return c, invalid(field+".Keys", c.Keys, "must be %d to %d, or 0 to keep no keys", minTopKeys, MaxTopKeys)
	}
	if c.Window == 0 {
		c.Window = defaultWindow
	}
	if c.Window < time.Second || c.Window > 24*time.Hour {
		return c, invalid(field+".Window", c.Window, "must be 1s to 24h, or 0 for the default of 10m")
	}
	return c, nil
}

// TopBy says by what keys are ranked.
type TopBy uint8

// The rankings.
const (
	// TopCalls: the hottest keys, by decided calls whatever their cost.
	TopCalls TopBy = iota
	// TopDenied: the most limited keys, by denied calls.
	TopDenied
)

var topByNames = []string{"calls", "denied"}

// String returns "calls" or "denied".
func (b TopBy) String() string { return nameOf(topByNames, int(b)) }

// TopKey is one key of a TopList.
type TopKey struct {
	// Limiter is the name of the limiter.
	Limiter string
	// Key is the key as the caller gave it, not hashed. Treat it as the callers' data.
	Key string
	// Shard is the id of the shard that owns the key now.
	Shard string
	// RedisKey is the key's name in Redis, as Limiter.Locate returns it.
	RedisKey string
	// AtLeast and AtMost are between how many calls of this process the key had. When
	// TopList.OneIn is above 1 they bound what was drawn.
	AtLeast, AtMost int64
}

// TopList is who called, or was denied, most. It knows of this process's calls only.
type TopList struct {
	// Keys are the keys, those with the highest AtLeast first.
	Keys []TopKey
	// Total is the number of calls counted for the limiters looked at, on all shards:
	// all calls for TopCalls, denied calls for TopDenied.
	Total int64
	// Span is how far back it reaches.
	Span time.Duration
	// OneIn is 1 if every call was counted, 64 if a part of them was drawn at random.
	OneIn int
}

// TopQuery says what Ring.Top is to show. The zero value is the 20 hottest keys of all
// limiters and shards.
type TopQuery struct {
	// By is the ranking.
	By TopBy
	// Limiter is the name of a limiter; empty: all of them.
	Limiter string
	// Shard is the id of the shard that owns the keys; empty: any.
	Shard string
	// N is how many keys: 1 to MaxTop; 0: 20.
	N int
}

// Top returns the n keys of this limiter with the most calls or denied calls; n is 1 to
// MaxTop, 0: 20. It is an error if Config.Top.Keys is not set.
func (l *Limiter) Top(by TopBy, n int) (TopList, error) {
	return l.ring.Top(TopQuery{By: by, Limiter: l.name, N: n})
}

// Top returns the keys with the most calls or denied calls in this process, of all
// limiters and shards or of one. It is an error if Config.Top.Keys is not set, or if this
// process has no such limiter or shard.
func (r *Ring) Top(q TopQuery) (TopList, error) {
	if q.N == 0 {
		q.N = 20
	}
	switch {
	case r.config.Top.Keys == 0:
		return TopList{}, invalid("Config.Top.Keys", 0, "must be set for a ring that is asked for its top keys: %d to %d", minTopKeys, MaxTopKeys)
	case q.By > TopDenied:
		return TopList{}, invalid("TopQuery.By", uint8(q.By), "must be TopCalls or TopDenied")
	case q.N < 1 || q.N > MaxTop:
		return TopList{}, invalid("TopQuery.N", q.N, "must be 1 to %d, or 0 for 20", MaxTop)
	}
	if q.Shard != "" {
		if _, err := r.find(q.Shard); err != nil {
			return TopList{}, err
		}
	}
	limiters := r.limitersNamed(q.Limiter)
	if q.Limiter != "" && len(limiters) == 0 {
		return TopList{}, invalid("TopQuery.Limiter", q.Limiter, "must be the name of a limiter of this process")
	}
	out := TopList{OneIn: 1, Keys: []TopKey{}}
	now := r.clock()
	for _, l := range limiters {
		l.addTop(&out, q, now)
	}
	slices.SortStableFunc(out.Keys, func(a, b TopKey) int {
		return cmp.Or(cmp.Compare(b.AtLeast, a.AtLeast), cmp.Compare(b.AtMost, a.AtMost))
	})
	out.Keys = slices.Clip(out.Keys[:min(q.N, len(out.Keys))])
	return out, nil
}

// limitersNamed is the limiter of that name, or all of them in the order of their names.
func (r *Ring) limitersNamed(name string) []*Limiter {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*Limiter
	for _, l := range r.limiters {
		if name == "" || name == l.name {
			out = append(out, l)
		}
	}
	slices.SortFunc(out, func(a, b *Limiter) int { return cmp.Compare(a.name, b.name) })
	return out
}

// addTop adds what this limiter has to say.
func (l *Limiter) addTop(out *TopList, q TopQuery, now int64) {
	list := l.top.lists[q.By].Top(now, q.N, func(key string) bool {
		if q.Shard == "" {
			return true
		}
		owner, _ := l.Locate(key)
		return owner == q.Shard
	})
	out.Total += int64(list.Total)
	out.Span = max(out.Span, list.Span)
	if list.Sampled {
		out.OneIn = topk.OneIn
	}
	for _, e := range list.Entries {
		k := TopKey{Limiter: l.name, Key: e.Key, AtLeast: int64(e.AtLeast), AtMost: int64(e.AtMost)}
		k.Shard, k.RedisKey = l.Locate(e.Key)
		out.Keys = append(out.Keys, k)
	}
}

// limiterTop are the two lists of one limiter. A nil one keeps none.
type limiterTop struct {
	lists [TopDenied + 1]*topk.Sketch
}

func (c TopConfig) forLimiter() *limiterTop {
	if c.Keys == 0 {
		return nil
	}
	t := &limiterTop{}
	for i := range t.lists {
		t.lists[i] = topk.NewSketch(c.Keys, c.Window)
	}
	return t
}

// decided counts one entry of a call that was answered, at now on the ring's clock.
func (t *limiterTop) decided(key string, allowed bool, now int64) {
	if t == nil {
		return
	}
	draw := rand.Uint32()
	t.lists[TopCalls].Add(key, now, draw)
	if !allowed {
		t.lists[TopDenied].Add(key, now, draw>>16)
	}
}
