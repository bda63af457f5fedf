package ringfence_test

import (
	"bufio"
	"context"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence"
)

// What is stored is a contract with every other process and with the next release:
// these tests read the bytes. See scripts/README.md.

// storedAs are all fields or members with their scores, in order.
func storedAs(t testing.TB, p *suitePlace, l *ringfence.Limiter, key string) string {
	t.Helper()
	c, name := p.client(l, key)
	ctx := context.Background()
	var raw []string
	switch kind := c.Type(ctx, name).Val(); kind {
	case "hash":
		fields, err := c.HGetAll(ctx, name).Result()
		suiteMust(t, err)
		for f, v := range fields {
			raw = append(raw, f+"="+v)
		}
		slices.Sort(raw)
	case "zset":
		members, err := c.ZRangeWithScores(ctx, name, 0, -1).Result()
		suiteMust(t, err)
		for _, z := range members {
			raw = append(raw, fmt.Sprint(z.Member, "@", strconv.FormatFloat(z.Score, 'f', -1, 64)))
		}
	default:
		raw = append(raw, kind)
	}
	return strings.Join(raw, " ")
}

func TestTheStoredBytesOfABucket(t *testing.T) {
	onEachPlace(t, 1, func(t *testing.T, p *suitePlace) {
		r := p.open(t)
		// 3 tokens in 10 ms: a token is 3333 us and 1/3.
		l := suiteLimiter(t, r, "b", ringfence.TokenBucket{Rate: 3, Per: 10 * time.Millisecond, Burst: 30})
		for _, row := range []struct {
			what    string
			step    time.Duration
			cost    int64
			allowed bool
			want    string
		}{
			{"one", 0, 1, true, "d=3333 r=1 t=1795239934123456 u=3:10000:30"},
			{"two more at once", 0, 2, true, "d=10000 r=0 t=1795239934123456 u=3:10000:30"},
			{"one after 4 ms", 4 * time.Millisecond, 1, true, "d=9333 r=1 t=1795239934127456 u=3:10000:30"},
			{"denied", time.Millisecond, 29, false, "d=9333 r=1 t=1795239934127456 u=3:10000:30"},
			{"after a step back", -9 * time.Millisecond, 1, true, "d=12666 r=2 t=1795239934127456 u=3:10000:30"},
			{"long after", time.Hour, 30, true, "d=100000 r=0 t=1795243534119456 u=3:10000:30"},
			// Back by more than the time to fill: the bucket goes on from there, and keeps
			// what it has even when the call is denied.
			{"after a great step back, denied", -time.Hour, 1, false, "d=100000 r=0 t=1795239934119456 u=3:10000:30"},
			{"and on", 5 * time.Millisecond, 1, true, "d=98333 r=1 t=1795239934124456 u=3:10000:30"},
		} {
			p.step(row.step)
			if d := takeExactly(t, l, "k", row.cost); d.Allowed != row.allowed {
				t.Errorf("%s: allowed %t", row.what, d.Allowed)
			}
			if got := storedAs(t, p, l, "k"); got != row.want {
				t.Errorf("%s: %s\nwant %s", row.what, got, row.want)
			}
		}
		// Another limit under the same name (a process with a new configuration): what is left
		// moves over. 30 * 98333.33/100000 used are 29.5, so half a token is left and 59.5 of
		// 60 are missing: 59500 us at once, written by the denied call, 58500 after 2 ms and
		// one token more.
		next := suiteLimiter(t, p.open(t), "b", ringfence.TokenBucket{Rate: 1, Per: time.Millisecond, Burst: 60})
		if d := takeExactly(t, next, "k", 1); d.Allowed {
			t.Errorf("a changed limit minted a token: %+v", d)
		}
		p.step(2 * time.Millisecond)
		if d := takeExactly(t, next, "k", 1); !d.Allowed {
			t.Errorf("a changed limit does not go on: %+v", d)
		}
		want := "d=58500 r=0 t=1795239934126456 u=1:1000:60"
		if got := storedAs(t, p, next, "k"); got != want {
			t.Errorf("after the change: %s\nwant %s", got, want)
		}
	})
}

func TestTheStoredBytesOfALog(t *testing.T) {
	onEachPlace(t, 1, func(t *testing.T, p *suitePlace) {
		r := p.open(t)
		l := suiteLimiter(t, r, "log", ringfence.SlidingLog{Limit: 12, Window: 10 * time.Millisecond})
		const t0 = "1795239934123456"
		for _, row := range []struct {
			what    string
			step    time.Duration
			cost    int64
			allowed bool
			want    string
		}{
			{"one", 0, 1, true, "11@" + t0},
			{"two more at once", 0, 2, true, "11@" + t0 + " 12@" + t0 + " 13@" + t0},
			{"after a step back by less than the window", -time.Millisecond, 1, true,
				"11@" + t0 + " 12@" + t0 + " 13@" + t0 + " 14@" + t0},
			{"after 9 ms: nothing has left", 9 * time.Millisecond, 7, true,
				"11@" + t0 + " 12@" + t0 + " 13@" + t0 + " 14@" + t0 +
					" 15@1795239934131456 16@1795239934131456 17@1795239934131456 18@1795239934131456 19@1795239934131456" +
					" 210@1795239934131456 211@1795239934131456"},
			{"denied", time.Millisecond, 2, false,
				"11@" + t0 + " 12@" + t0 + " 13@" + t0 + " 14@" + t0 +
					" 15@1795239934131456 16@1795239934131456 17@1795239934131456 18@1795239934131456 19@1795239934131456" +
					" 210@1795239934131456 211@1795239934131456"},
			{"one window after the first: four have left", time.Millisecond, 2, true,
				"15@1795239934131456 16@1795239934131456 17@1795239934131456 18@1795239934131456 19@1795239934131456" +
					" 210@1795239934131456 211@1795239934131456 212@1795239934133456 213@1795239934133456"},
			// Back by more than the window: the key's clock goes on from its newest score,
			// and says in the member's name how far it is ahead: 3600 s.
			{"after a great step back", -time.Hour, 1, true,
				"15@1795239934131456 16@1795239934131456 17@1795239934131456 18@1795239934131456 19@1795239934131456" +
					" 210@1795239934131456 211@1795239934131456 212@1795239934133456" +
					" 214~3600000000@1795239934133456 215~3600000000@1795239934133456"},
			{"and on, 8 ms later", 8 * time.Millisecond, 1, true,
				"212@1795239934133456 214~3600000000@1795239934133456 215~3600000000@1795239934133456 216~3600000000@1795239934141456"},
			{"a window of silence: it begins anew", 10 * time.Millisecond, 1, true, "11@1795236334151456"},
		} {
			p.step(row.step)
			if d := takeExactly(t, l, "k", row.cost); d.Allowed != row.allowed {
				t.Errorf("%s: allowed %t: %+v", row.what, d.Allowed, d)
			}
			if got := storedAs(t, p, l, "k"); got != row.want {
				t.Errorf("%s: %s\nwant %s", row.what, got, row.want)
			}
		}
	})
}

// A step back by more than the window is written down even by a denied call, with a TTL.
func TestADeniedCallAnchorsALogAfterAGreatStepBack(t *testing.T) {
	onEachPlace(t, 1, func(t *testing.T, p *suitePlace) {
		l := suiteLimiter(t, p.open(t), "log", ringfence.SlidingLog{Limit: 2, Window: 10 * time.Millisecond})
		takeExactly(t, l, "k", 2)
		p.step(-time.Hour)
		d := takeExactly(t, l, "k", 1)
		wantDecision(t, "denied", d, false, 0, 10*time.Millisecond, 10*time.Millisecond)
		if got, want := storedAs(t, p, l, "k"), "11@1795239934123456 13~3600000000@1795239934123456"; got != want {
			t.Errorf("%s, want %s", got, want)
		}
		c, name := p.client(l, "k")
		if ttl := c.PTTL(t.Context(), name).Val(); ttl <= 0 || ttl > 66*time.Second {
			t.Errorf("TTL %s", ttl)
		}
		p.step(10 * time.Millisecond)
		if d := takeExactly(t, l, "k", 2); !d.Allowed {
			t.Errorf("a window of starvation is over: %+v", d)
		}
	})
}

// writeFixtures is for the release: go test -run TestStatesOfEveryReleaseGoOn -write-fixtures v1.2.3
var writeFixtures = flag.String("write-fixtures", "", "write testdata/storage/<release>-*.txt from this source")

// A fixture is a state as a release left it, and what the key is asked next.
type fixture struct {
	limiter, key, name string // name is the key's in Redis
	micros             int64  // the server's clock
	ttl                int64  // ms
	dump               []byte
}

func (f fixture) write(t *testing.T, path, release string) {
	text := fmt.Sprintf("# A key as %s left it: DUMP of Redis %s. Written by -write-fixtures; never edited.\nlimiter %s\nkey %s\nname %s\nmicros %d\nttl-ms %d\ndump %s\n",
		release, "7.0", f.limiter, f.key, f.name, f.micros, f.ttl, hex.EncodeToString(f.dump))
	suiteMust(t, os.MkdirAll(filepath.Dir(path), 0o755))
	suiteMust(t, os.WriteFile(path, []byte(text), 0o644))
}

func readFixture(t *testing.T, path string) fixture {
	t.Helper()
	file, err := os.Open(path)
	suiteMust(t, err)
	defer file.Close()
	values := map[string]string{}
	for in := bufio.NewScanner(file); in.Scan(); {
		if name, value, ok := strings.Cut(in.Text(), " "); ok && name != "#" {
			values[name] = value
		}
	}
	f := fixture{limiter: values["limiter"], key: values["key"], name: values["name"]}
	f.micros, err = strconv.ParseInt(values["micros"], 10, 64)
	suiteMust(t, err)
	f.ttl, err = strconv.ParseInt(values["ttl-ms"], 10, 64)
	suiteMust(t, err)
	f.dump, err = hex.DecodeString(values["dump"])
	suiteMust(t, err)
	return f
}

// fixtureLimits are the limits of the fixtures, by the name of the limiter. They stay as
// they are for good; new ones get new names.
var fixtureLimits = map[string]ringfence.Limit{
	"fixture-bucket": ringfence.TokenBucket{Rate: 7, Per: time.Second, Burst: 20},
	"fixture-log":    ringfence.SlidingLog{Limit: 20, Window: time.Second},
}

// prepareFixture leaves a key with 14 used: 4 at the beginning, 10 after 300 ms.
func prepareFixture(t *testing.T, p *suitePlace, l *ringfence.Limiter, key string) {
	t.Helper()
	p.at(suiteStart)
	takeExactly(t, l, key, 4)
	p.step(300 * time.Millisecond)
	takeExactly(t, l, key, 10)
}

// Every state that a release has ever left goes on in this one as it would have there:
// under the same name, with the same units left, and with a TTL.
func TestStatesOfEveryReleaseGoOn(t *testing.T) {
	p := onRedis(t, 1)
	r := p.open(t)
	if *writeFixtures != "" {
		for limiter, limit := range fixtureLimits {
			l := suiteLimiter(t, r, limiter, limit)
			prepareFixture(t, p, l, "user:42")
			c, name := p.client(l, "user:42")
			dump, err := c.Dump(t.Context(), name).Result()
			suiteMust(t, err)
			fixture{limiter, "user:42", name, p.now, c.PTTL(t.Context(), name).Val().Milliseconds(), []byte(dump)}.
				write(t, filepath.Join("testdata", "storage", *writeFixtures+"-"+limiter+".txt"), *writeFixtures)
			suiteMust(t, l.Reset(t.Context(), "user:42"))
		}
	}
	paths, err := filepath.Glob("testdata/storage/*.txt")
	suiteMust(t, err)
	if len(paths) < 2 {
		t.Fatalf("only %d fixtures", len(paths))
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			f := readFixture(t, path)
			l := suiteLimiter(t, r, f.limiter, fixtureLimits[f.limiter])
			c, name := p.client(l, f.key)
			if name != f.name {
				t.Errorf("the key is called %s, this release looks for %s", f.name, name)
			}
			p.at(f.micros)
			suiteMust(t, c.RestoreReplace(t.Context(), name, time.Duration(f.ttl)*time.Millisecond, string(f.dump)).Err())
			// The bucket gained 7 x 0.3 = 2.1 of its 4 back before the 10 went.
			left := map[string]int64{"fixture-bucket": 8, "fixture-log": 6}[f.limiter]
			if d := peek(t, l, f.key); d.Remaining != left {
				t.Errorf("a look: %+v, want %d left", d, left)
			}
			if d := takeExactly(t, l, f.key, left+1); d.Allowed {
				t.Errorf("one too many: %+v", d)
			}
			if d := takeExactly(t, l, f.key, left); !d.Allowed || d.Remaining != 0 {
				t.Errorf("the rest: %+v", d)
			}
			p.step(700 * time.Millisecond) // 4.9 and what there was come back; the log's first 4 leave
			back := map[string]int64{"fixture-bucket": 5, "fixture-log": 4}[f.limiter]
			if d := takeExactly(t, l, f.key, back); !d.Allowed || d.Remaining != 0 {
				t.Errorf("700 ms later: %+v, want %d to fit", d, back)
			}
			if ttl := c.PTTL(t.Context(), name).Val(); ttl <= 0 || ttl > 70*time.Second {
				t.Errorf("TTL %s", ttl)
			}
			// As it would have been here from the start.
			suiteMust(t, l.Reset(t.Context(), f.key))
			prepareFixture(t, p, l, f.key)
			own := storedAs(t, p, l, f.key)
			suiteMust(t, c.RestoreReplace(t.Context(), name, time.Duration(f.ttl)*time.Millisecond, string(f.dump)).Err())
			if old := storedAs(t, p, l, f.key); old != own {
				t.Logf("this release stores %s where that one stored %s", own, old)
			}
			suiteMust(t, l.Reset(t.Context(), f.key))
		})
	}
}
