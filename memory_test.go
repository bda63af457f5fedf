package ringfence_test

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// docs/memory.md is made of what this prints with -v.
func TestMemoryOfAKeyIsAsDocumented(t *testing.T) {
	s := redistest.Start(t, redistest.Options{})
	r, err := ringfence.Open(t.Context(), exactConfig(ringfence.ShardConfig{ID: "a", Primary: s.URL()}))
	suiteMust(t, err)
	defer r.Close()
	ctx := context.Background()
	usage := func(l *ringfence.Limiter, key string) int64 {
		_, name := l.Locate(key)
		n, err := s.Client().MemoryUsage(ctx, name, 0).Result()
		suiteMust(t, err)
		return n
	}
	bucket := suiteLimiter(t, r, "bucket", ringfence.TokenBucket{Rate: 100, Per: time.Second, Burst: 1_000_000})
	takeExactly(t, bucket, "k", 500_000)
	t.Logf("memory: token bucket: %d bytes", usage(bucket, "k"))
	if n := usage(bucket, "k"); n > 160 {
		t.Errorf("a bucket takes %d bytes, docs/memory.md says 136", n)
	}
	// MEMORY USAGE leaves out the table of keys and that of expiries.
	used := func() int64 {
		text, err := s.Client().Info(ctx, "memory").Result()
		suiteMust(t, err)
		_, rest, _ := strings.Cut(text, "used_memory:")
		n, err := strconv.ParseInt(strings.TrimSpace(rest[:strings.IndexByte(rest, '\n')]), 10, 64)
		suiteMust(t, err)
		return n
	}
	log := suiteLimiter(t, r, "log", ringfence.SlidingLog{Limit: 1_000_000, Window: 24 * time.Hour})
	for _, c := range []struct{ entries, most int64 }{
		{1, 130}, {10, 250}, {100, 2000}, {128, 2400}, {129, 18_000}, {1000, 115_000}, {10_000, 1_200_000}, {100_000, 12_000_000},
	} {
		key := fmt.Sprint("k", c.entries)
		for left := c.entries; left > 0; left -= 1000 {
			takeExactly(t, log, key, min(left, 1000))
		}
		n := usage(log, key)
		t.Logf("memory: sliding log of %d: %d bytes, %d an entry", c.entries, n, n/c.entries)
		if n > c.most {
			t.Errorf("a log of %d takes %d bytes, more than documented", c.entries, n)
		}
	}
	const keys = 1 << 14
	for _, l := range []*ringfence.Limiter{bucket, log} {
		before := used()
		for i := 0; i < keys; i += 512 {
			reqs := make([]ringfence.Request, 512)
			for j := range reqs {
				reqs[j] = ringfence.Request{Key: fmt.Sprint("many", i+j), Cost: 1}
			}
			_, err := l.AllowMany(ctx, reqs)
			suiteMust(t, err)
		}
		each := (used() - before) / keys
		t.Logf("memory: %s: %d keys with one unit used: %d bytes each in all", l.Name(), keys, each)
		if each > 300 {
			t.Errorf("%s: %d bytes a key, more than documented", l.Name(), each)
		}
	}
}
