package ringfence

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// asBulks are arguments as go-redis writes them.
func asBulks(args []any) []byte {
	b := appendCount(nil, len(args))
	for _, a := range args {
		switch a := a.(type) {
		case string:
			b = appendBulk(b, a)
		case *request:
			b = appendBulk(b, a.key())
		}
	}
	return b
}

// What is sent is what go-redis would send for the same call.
func TestAScriptCallIsWrittenAsGoRedisWritesIt(t *testing.T) {
	bucket := compiled(t, TokenBucket{Rate: 3, Per: 10 * time.Microsecond, Burst: 5})
	log := compiled(t, SlidingLog{Limit: 5000, Window: time.Second})
	space := newKeySpace("rf")
	var reqs []*request
	for i, rl := range []*rule{bucket, bucket, log, bucket, log} {
		r := freshRequest().begin(opCharge, rl, keyHash{uint64(i), 7}, space, int64(1+1200*i))
		reqs = append(reqs, r)
	}
	reqs[1].count, reqs[2].debit, reqs[3].count = 4711, "3@17,1@2", 0
	reqs[3].leaser = &request{wants: 12}
	args, _ := appendArgs([]any{"evalsha", redisScripts.charge.sha}, true, reqs, nil)
	want := asBulks(args)
	got, limits := appendScriptCall(nil, "evalsha", redisScripts.charge.sha, true, reqs, nil)
	if string(got) != string(want) || len(limits) != 2 {
		t.Errorf("%q\nwant\n%q", got, want)
	}
	if head := "*55\r\n$7\r\nevalsha\r\n$40\r\n"; !strings.HasPrefix(string(got), head) {
		t.Errorf("it begins with %q, want %q", got[:len(head)], head)
	}
	if got, want := string(appendUnlink(nil, reqs[:1])), fmt.Sprintf("*2\r\n$6\r\nunlink\r\n$%d\r\n%s\r\n", len(reqs[0].key()), reqs[0].key()); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	// One run: in few words where it is usual.
	whole := compiled(t, TokenBucket{Rate: 1, Per: time.Second, Burst: 1200})
	for _, c := range []struct {
		rule         *rule
		count, wants int64
		debit        string
		brief        bool
	}{
		{whole, 1, 0, "", true}, {whole, 4711, 0, "", true}, {whole, 0, 0, "", true},
		{whole, 1, 0, "2", false}, {whole, 1, 3, "", false}, {bucket, 1, 0, "", false}, {log, 1, 0, "", false},
	} {
		for _, brief := range []bool{true, false} {
			for n := 1; n <= 3; n++ {
				var reqs []*request
				for i := range n {
					r := freshRequest().begin(opCharge, c.rule, keyHash{uint64(i), 7}, space, 1100)
					r.count, r.debit = c.count, c.debit
					if c.wants > 0 {
						r.wants, r.leaser = c.wants, r
					}
					reqs = append(reqs, r)
				}
				args, _ := appendArgs([]any{"evalsha", redisScripts.charge.sha}, brief, reqs, nil)
				want := asBulks(args)
				got, _ := appendScriptCall(nil, "evalsha", redisScripts.charge.sha, brief, reqs, nil)
				if short := len(args)-3-n <= 4; string(got) != string(want) || short != (brief && c.brief) {
					t.Errorf("%d values: %q\nwant\n%q", len(args), got, want)
				}
				reqs[n-1].cost = 1099 // no run
				if args, _ := appendArgs(nil, brief, reqs, nil); n > 1 && len(args)-1-n <= 4 {
					t.Errorf("two costs are said in %v", args)
				}
			}
		}
	}
	// What differs only in what is taken ahead and given back is one run, unless a few are quite
	// the same.
	for _, c := range []struct {
		own  string // of each entry: the letter says what is given back
		want int    // values behind the table of limits
	}{
		{"a", runArgs}, {"aa", runArgs}, {"aaaa", runArgs}, {"ab", runArgs + 2*eachArgs}, {"aab", runArgs + 3*eachArgs},
		{"abab", runArgs + 4*eachArgs}, {"aaab", 2 * runArgs}, {"abbb", 2 * runArgs}, {"abbbcd", runArgs + runArgs + runArgs + 2*eachArgs},
		{"abccc", runArgs + 2*eachArgs + runArgs}, {"abX", runArgs + 2*eachArgs + runArgs}, {"XY", runArgs + 2*eachArgs}, {"-a-", runArgs + 3*eachArgs},
	} {
		var reqs []*request
		for i, own := range c.own {
			r := freshRequest().begin(opCharge, whole, keyHash{uint64(i), 7}, space, 1)
			if r.debit = fmt.Sprintf("-%d", own); own == '-' {
				r.debit = ""
			}
			r.wants, r.leaser = int64(own%3), r
			if own < 'a' && own != '-' {
				r.count = 0
			}
			reqs = append(reqs, r)
		}
		args, _ := appendArgs(nil, true, reqs, nil)
		if got := len(args) - 1 - len(reqs) - 1 - limitArgs; got != c.want {
			t.Errorf("%s takes %d values, want %d: %v", c.own, got, c.want, args)
		}
		if got, _ := appendScriptCall(nil, "evalsha", "x", true, reqs, nil); string(got) != string(asBulks(append([]any{"evalsha", "x"}, args...))) {
			t.Errorf("%s: %q", c.own, got)
		}
	}
	// A probe has no entry.
	if got, _ := appendScriptCall(nil, "evalsha", "x", true, nil, nil); string(got) != "*4\r\n$7\r\nevalsha\r\n$1\r\nx\r\n$1\r\n0\r\n$1\r\n0\r\n" {
		t.Errorf("a call without entries is %q", got)
	}
	if args, _ := appendArgs(nil, true, nil, nil); len(args) != 2 {
		t.Errorf("a call without entries has the arguments %v", args)
	}
	for _, v := range []int64{0, 9, 10, 1023, 1024, -1, 1<<53 - 1} {
		if got, want := string(appendNumber(nil, v)), string(appendBulk(nil, fmt.Sprint(v))); got != want {
			t.Errorf("%d is written %q, want %q", v, got, want)
		}
	}
}

// readWhole reads a reply that arrives in pieces of so many bytes.
func readWhole(text string, entries, piece int) (p replyReader, whole bool, err error) {
	p.next(entries, true)
	for end := 0; end < len(text); {
		end = min(len(text), end+piece)
		if whole, err = p.read([]byte(text[:end])); err != nil {
			return p, false, err
		}
		if whole && end < len(text) {
			return p, false, errors.New("whole before its end")
		}
	}
	return p, whole, nil
}

func TestARepliesOfAnyPiecesIsReadWhole(t *testing.T) {
	tests := []struct {
		text    string
		entries int
		values  []int64
		failed  string
	}{
		{"*3\r\n:1\r\n:-20\r\n:999999999999999999\r\n", 1, []int64{1, -20, 999999999999999999}, ""},
		{"*5\r\n:1\r\n:2\r\n:3\r\n:4\r\n:5\r\n", 1, []int64{1, 2, 3, 4, 5}, ""},
		{"*5\r\n:1\r\n:2\r\n:3\r\n:4\r\n:5\r\n", 2, []int64{1, 2, 3, 4, 5}, ""},
		{"*1\r\n:0\r\n", 0, []int64{0}, ""},
		{":2\r\n", -1, []int64{2}, ""},
		{"-NOSCRIPT No matching script.\r\n", 6, nil, "NOSCRIPT No matching script."},
		{"-\r\n", -1, nil, ""},
	}
	for _, c := range tests {
		for piece := 1; piece <= len(c.text); piece++ {
			p, whole, err := readWhole(c.text, c.entries, piece)
			if err != nil || !whole || !slices.Equal(p.values, c.values) {
				t.Errorf("%q in pieces of %d: %v %t %v", c.text, piece, p.values, whole, err)
			}
			if said := p.failed; (said != nil) != (c.text[0] == '-') || (said != nil && said.Error() != c.failed) {
				t.Errorf("%q: the server's error is %v", c.text, said)
			}
		}
	}
}

func TestWhatIsNotTheReplyIsRefused(t *testing.T) {
	for _, c := range []struct {
		text    string
		entries int
	}{
		{"*2\r\n:1\r\n", 0}, // too many
		{"*1\r\n:1\r\n", 1}, // too few
		{"*4\r\n:1\r\n", 1}, // neither narrow nor wide
		{"*7\r\n:1\r\n", 2},
		{"*-1\r\n", 0},            // nil
		{"*1000000000000\r\n", 1}, // a length nobody believes
		{"*9999999999999999999\r\n", 1},
		{"*1\r\n$1\r\n1\r\n", 0},  // a string
		{"*1\r\n*1\r\n:1\r\n", 0}, // nested
		{"*1\r\n_\r\n", 0},        // RESP3
		{"*1\r\n:\r\n", 0},
		{"*1\r\n:-\r\n", 0},
		{"*1\r\n:1x\r\n", 0},
		{"*1\r\n:1 \r\n", 0},
		{"*1\r\n:+1\r\n", 0},
		{"*1\r\n:01\r\n", 0},
		{"*1\r\n:-0\r\n", 0},
		{"*1\r\n:1\n:2\n", 0},
		{"*1\r\n:1\r\n:2\r\n", 0},     // one more
		{"*3\r\n:1\r\n-ERR x\r\n", 1}, // an error inside
		{"-ERR a\r\n-ERR b\r\n", 2},
		{":1\r\n:2\r\n", -1},
		{"+OK\r\n", -1},
		{"", -1},
		{"*0\r\n", 0},
		{"-" + strings.Repeat("x", maxErrorLine), 1},
		{"HTTP/1.1 400 Bad Request\r\n\r\n", 1},
	} {
		p, whole, err := readWhole(c.text, c.entries, max(1, len(c.text)))
		if whole {
			t.Errorf("%q is taken for a reply: %v, %v", c.text, p.values, p.failed)
		}
		if c.text != "" && !errors.Is(err, errProtocol) {
			t.Errorf("%q: %v", c.text, err)
		}
	}
}

// Whatever a server sends, in whatever pieces, nothing panics, no more is kept than the
// reply can be long, and what is taken for a reply has the right number of values.
func FuzzAReplyIsWholeOrRefused(f *testing.F) {
	f.Add([]byte("*3\r\n:1\r\n:2\r\n:3\r\n"), 1, 5)
	f.Add([]byte("*5\r\n:1\r\n:2\r\n:3\r\n:4\r\n:5\r\n"), 1, 5)
	f.Add([]byte("-ERR x\r\n"), 6, 1)
	f.Add([]byte(":2\r\n"), -1, 2)
	f.Add([]byte("*7\r\n$6\r\nserver\r\n*0\r\n"), 1, 3)
	f.Fuzz(func(t *testing.T, text []byte, entries, piece int) {
		entries, piece = max(-1, min(entries, 2000)), max(1, piece%64)
		p, whole, err := readWhole(string(text), entries, piece)
		switch {
		case whole && err != nil:
			t.Errorf("whole, and yet %v", err)
		case whole && p.failed == nil && !repliesTo(p.values, entries):
			t.Errorf("%d values for %d entries", len(p.values), entries)
		case len(p.values) > replyHead+replyWide*max(0, entries):
			t.Errorf("%d values kept for %d entries", len(p.values), entries)
		}
		next, _, err := skipReply(text, 0, 4)
		if next > len(text) || (err != nil && next >= 0) {
			t.Errorf("skipped to %d of %d, %v", next, len(text), err)
		}
	})
}

// repliesTo says whether so many values can be a reply.
func repliesTo(values []int64, entries int) bool {
	if entries < 0 {
		return len(values) == 1
	}
	return replyWidth(int64(len(values)), entries) > 0
}

func TestAGreetingIsSkippedAsAWhole(t *testing.T) {
	const hello = "*4\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nmodules\r\n*1\r\n*2\r\n+a\r\n$-1\r\n"
	for end := range len(hello) {
		if next, _, err := skipReply([]byte(hello[:end]), 0, 4); next >= 0 || err != nil {
			t.Fatalf("%q is skipped to %d, %v", hello[:end], next, err)
		}
	}
	if next, failed, err := skipReply([]byte(hello), 0, 4); next != len(hello) || failed != nil || err != nil {
		t.Errorf("%d, %v, %v", next, failed, err)
	}
	if _, failed, _ := skipReply([]byte("-WRONGPASS x\r\n"), 0, 4); classify(failed) != typeAuth {
		t.Errorf("%v", failed)
	}
	for _, bad := range []string{"$99999\r\n", "$-2\r\n", "*99999\r\n", "*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n", "%1\r\n", "*1\r\n!"} {
		if _, _, err := skipReply([]byte(bad), 0, 4); !errors.Is(err, errProtocol) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
