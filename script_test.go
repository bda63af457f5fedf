package ringfence

import (
	"encoding/binary"
	"errors"
	"math"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// The digests by which servers know the scripts. A change of one is a change of what is
// sent to every server: processes of two releases then run side by side on one key, each
// with its own script. Before you put in the new digest, ask whether either reads what
// the other writes (scripts/README.md has the rule), and whether the frozen states in
// testdata/storage still go on (TestStatesOfEveryReleaseGoOn).
func TestTheScriptsAreTheOnesThatWerePinned(t *testing.T) {
	for _, c := range []struct {
		name string
		got  script
		want string
	}{
		{"charge on Redis", redisScripts.charge, "54328f257ecc962cd3e18b9c1d68be746473b9a5"},
		{"look on Redis", redisScripts.look, "dbfc1dca9b7d96922cbd99ca1c42478ffced0337"},
		{"charge, plain", plainScripts.charge, "ec8985dc95ae5d7b2a31f6160c12032781fbaaab"},
		{"look, plain", plainScripts.look, "67413db9b4729ea7ec20c216bf9015d870e3f022"},
		{"heartbeat on Redis", redisScripts.beat, "ed467ead3c08dd666bb64b682d63b3240bc48f39"},
		{"heartbeat, plain", plainScripts.beat, "eed587d96b42c04b20c8b43e4e42bd96aa0f3497"},
	} {
		if c.got.sha != c.want {
			t.Errorf("%s: %s, pinned %s", c.name, c.got.sha, c.want)
		}
	}
}

func TestOnlyTheLookScriptIsMarkedAsNotWriting(t *testing.T) {
	for _, c := range []struct {
		name, head string
		s          script
	}{
		{"charge on Redis", "#!lua\n", redisScripts.charge},
		{"look on Redis", "#!lua flags=no-writes\n", redisScripts.look},
		{"charge, plain", "local", plainScripts.charge},
		{"look, plain", "local", plainScripts.look},
		{"heartbeat on Redis", "#!lua\n", redisScripts.beat},
		{"heartbeat, plain", "local", plainScripts.beat},
	} {
		if !strings.HasPrefix(c.s.text, c.head) {
			t.Errorf("%s begins with %.30q", c.name, c.s.text)
		}
		writes := regexp.MustCompile(`'(HSET|ZADD|ZREM|UNLINK|PEXPIRE|ZREMRANGEBYRANK)'`).MatchString(c.s.text)
		if writes == strings.HasPrefix(c.name, "look") {
			t.Errorf("%s: writes %t", c.name, writes)
		}
		if strings.Contains(c.s.text, "--") {
			t.Errorf("%s is sent with comments", c.name)
		}
	}
}

// Every script says at its head what it is given and what it replies.
func TestTheScriptHeadersSayWhatEachValueMeans(t *testing.T) {
	header := func(text string) string {
		var b strings.Builder
		for line := range strings.Lines(text) {
			if !strings.HasPrefix(line, "--") {
				break
			}
			b.WriteString(line)
		}
		return b.String()
	}
	for _, c := range []struct {
		file, text string
		says       []string
	}{
		{"frame.lua", frameLua, []string{"KEYS[i]", "ARGV[1] ", "ARGV[2 .. 1 + 8m]", "ARGV[2 + 8m ..]", "run ", "limit ", "cost ", "count ", "more ", "debit ", "Empty: ", "ARGV[1] unit", "ARGV[2] bq", "ARGV[3] one", "ARGV[4] count", "Reply: ", "granted ", "-1 ", "-2 ", "-3 ", "a, b, c "}},
		{"usual.lua", usualLua, []string{"In: key", "unit", "bq", "one (us", "count", "Out: granted and a"}},
		{"token_bucket.lua", tokenBucketLua, []string{"Limit: n, pq, pr, bq, br, burst", "unit", "Precondition", "State", "d ", "r ", "t ", "u ", "Reply: ", "TTL"}},
		{"sliding_log.lua", slidingLogLua, []string{"Limit: limit", "window us", "State: ", "Reply: ", "b = us", "c = us", "TTL"}},
		{"instances.lua", instancesLua, []string{"KEYS[1]", "ARGV[1]", "ARGV[2]", "ARGV[3]", "Reply"}},
	} {
		head := header(c.text)
		for _, s := range c.says {
			if !strings.Contains(head, s) {
				t.Errorf("the header of %s does not say %q", c.file, s)
			}
		}
	}
	// The numbers in the header are those of the code.
	if limitArgs != 8 || runArgs != 6 || eachArgs != 2 || replyNarrow != 2 || replyWide != 4 || replyHead != 1 {
		t.Error("the sizes differ from the header of frame.lua")
	}
	r := freshRequest().begin(opCharge, compiled(t, SlidingLog{Limit: 5, Window: time.Second}), keyHash{}, newKeySpace("rf"), 3)
	other := freshRequest().begin(opCharge, r.rule, keyHash{}, newKeySpace("rf"), 2)
	args, limits := appendArgs(nil, true, []*request{r, r, other}, nil)
	if len(limits) != 1 || len(args) != 1+3+1+limitArgs+2*runArgs {
		t.Errorf("%d arguments, %d limits", len(args), len(limits))
	}
	want := []any{"3", r, r, other, "1", "2", "5", "1000000", "0", "0", "0", "0", "0", "2", "1", "3", "1", "0", "0", "1", "1", "2", "1", "0", "0"}
	if !slices.Equal(args, want) {
		t.Errorf("arguments %v, want %v", args, want)
	}
}

func replyRequests(t testing.TB) []*request {
	return []*request{
		{count: 1, rule: compiled(t, TokenBucket{Rate: 10, Per: time.Second, Burst: 20})},
		{count: 1, rule: compiled(t, TokenBucket{Rate: 3, Per: 10 * time.Microsecond, Burst: 5})},
		{count: 1, rule: compiled(t, SlidingLog{Limit: 5, Window: time.Second})},
	}
}

// goodReply is one to replyRequests.
func goodReply() []int64 {
	return []int64{1_795_239_934_123_456,
		1, 1_850_000, 0, 0,
		0, 16, 2, 7,
		0, 5, 100_000, 400_000}
}

func TestAReplyIsTakenWholeOrNotAtAll(t *testing.T) {
	reqs := replyRequests(t)
	if err := decodeReply(goodReply(), reqs); err != nil {
		t.Fatal(err)
	}
	if r := reqs[0]; r.granted != 1 || r.state != (state{a: 1_850_000}) || r.now != goodReply()[0] || r.status != 0 {
		t.Errorf("the first: %+v", r)
	}
	if r := reqs[2]; r.granted != 0 || r.state != (state{5, 100_000, 400_000}) {
		t.Errorf("the last: %+v", r)
	}
	if err := decodeReply([]int64{12}, nil); err != nil {
		t.Errorf("a probe: %v", err)
	}
	// Where b and c are 0 for all, they are left out; and a status is below 0.
	reqs = replyRequests(t)
	if err := decodeReply([]int64{7, 1, 9, -statusCorrupt, 0, 0, 5}, reqs); err != nil {
		t.Fatal(err)
	}
	if a, b, c := reqs[0], reqs[1], reqs[2]; a.granted != 1 || a.state != (state{a: 9}) || a.status != 0 || a.now != 7 ||
		b.granted != 0 || b.state != (state{}) || b.status != statusCorrupt ||
		c.granted != 0 || c.state != (state{a: 5}) || c.status != 0 {
		t.Errorf("narrow: %+v, %+v, %+v", a, b, c)
	}

	set := func(at int, v int64) []int64 { r := goodReply(); r[at] = v; return r }
	for what, reply := range map[string][]int64{
		"nothing":                        nil,
		"one entry too few":              goodReply()[:9],
		"one value too few":              goodReply()[:12],
		"one value too many":             append(goodReply(), 0),
		"narrow, one value too few":      {1, 1, 1, 1, 1, 1},
		"a clock before 1970":            set(0, -1),
		"a clock beyond 2^53":            set(0, 1<<53),
		"a status that is none":          set(1, -4),
		"the smallest status":            set(1, math.MinInt64),
		"two granted of one":             set(1, 2),
		"a state although corrupt":       {1, 1, 0, 0, 0, -statusCorrupt, 1, 0, 0, 1, 5, 1, 1},
		"a state although of wrong type": {1, 1, 0, 0, 0, -statusWrongType, 0, 0, 1, 1, 5, 1, 1},
		"narrow, a state although":       {1, 1, 0, -statusRefused, 1, 1, 5},
		"a bucket more than empty":       set(2, 2_000_001),
		"narrow, a bucket too empty":     {1, 1, 2_000_001, 0, 16, 0, 5},
		"n thirds of a us":               set(7, 3),
		"more than empty by a third":     {1, 1, 0, 0, 0, 0, 16, 3, 0, 1, 5, 1, 1},
		"a negative state":               set(10, -1),
		"a wait of ages":                 set(11, 1<<53),
		"a largest integer":              set(7, math.MaxInt64),
		"a smallest integer":             set(7, math.MinInt64),
	} {
		reqs := replyRequests(t)
		if err := decodeReply(reply, reqs); !errors.Is(err, errProtocol) {
			t.Errorf("%s: %v", what, err)
		}
		for i, r := range reqs {
			if r.granted != 0 || r.now != 0 || r.status != 0 || r.state != (state{}) {
				t.Errorf("%s: request %d was told %+v all the same", what, i, r)
			}
		}
	}
}

// Whatever a server replies: an error, or a state that makes a sane Decision.
func FuzzDecodeReply(f *testing.F) {
	pack := func(values []int64) []byte {
		var b []byte
		for _, v := range values {
			b = binary.LittleEndian.AppendUint64(b, uint64(v))
		}
		return b
	}
	f.Add(pack(goodReply()))
	f.Add(pack(goodReply()[:7]))
	f.Add(pack([]int64{7, 1, 9, -statusCorrupt, 0, 0, 5}))
	f.Add([]byte{})
	bad := goodReply()
	bad[7] = math.MaxInt64
	f.Add(pack(bad))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var reply []int64
		for len(raw) >= 8 {
			reply = append(reply, int64(binary.LittleEndian.Uint64(raw)))
			raw = raw[8:]
		}
		reqs := replyRequests(t)
		err := decodeReply(reply, reqs)
		if err != nil {
			if !errors.Is(err, errProtocol) {
				t.Errorf("error %v is not about the protocol", err)
			}
			return
		}
		for i, r := range reqs {
			for _, cost := range []int64{1, r.rule.maxCost} {
				d := r.rule.decide(r.state, r.granted > 0, cost)
				if d.Remaining < 0 || d.Remaining > d.Limit || d.RetryAfter < 0 || d.ResetAfter < 0 {
					t.Errorf("entry %d, state %v, cost %d: %+v", i, r.state, cost, d)
				}
			}
		}
	})
}
