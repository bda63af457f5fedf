package ringfence_test

import (
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence"
)

// Whatever the key: it is refused as documented, or the primary answers.
func FuzzAnyKeyIsRefusedAsDocumentedOrAnswered(f *testing.F) {
	for _, k := range hostileKeys {
		f.Add(k, int64(1))
	}
	f.Add("", int64(1))
	f.Add(strings.Repeat("k", 513), int64(1))
	f.Add("k", int64(-1))
	f.Add("k", int64(1<<60))
	const most = 5
	p := onEmbedded(f, 2)
	r := p.open(f)
	var limiters []*ringfence.Limiter
	for _, k := range suiteKinds {
		limiters = append(limiters, suiteLimiter(f, r, strings.ReplaceAll(k.name, " ", "-"), k.limit(most, time.Hour)))
	}
	f.Fuzz(func(t *testing.T, key string, cost int64) {
		for _, l := range limiters {
			d, err := l.AllowN(t.Context(), key, cost)
			switch {
			case key == "" || len(key) > ringfence.MaxKeyBytes:
				wantField(t, err, "key")
				continue
			case cost < 1 || cost > most:
				wantField(t, err, "cost")
				continue
			}
			suiteMust(t, err)
			if exactly(t, d); !d.Allowed || d.Remaining != most-cost {
				t.Errorf("a fresh key %q, cost %d: %+v", key, cost, d)
			}
			suiteMust(t, l.Reset(t.Context(), key))
			if d := peek(t, l, key); d.Remaining != most {
				t.Errorf("after Reset of %q: %+v", key, d)
			}
		}
	})
}
