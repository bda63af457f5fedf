package ringfence

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

func compiled(t testing.TB, l Limit) *rule {
	t.Helper()
	r, err := l.compile()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestALimitIsCompiledToLowestTerms(t *testing.T) {
	for _, c := range []struct {
		limit Limit
		want  rule
		args  string
	}{
		{TokenBucket{Rate: 10, Per: time.Second, Burst: 20},
			rule{capacity: 20, maxCost: 20, window: 2_000_000, n: 1, p: 100_000, pq: 100_000, bq: 2_000_000},
			"1 1 100000 0 2000000 0 20 1:100000:20"},
		// 3 tokens in 10 us: a token is 3 us and 1/3, five are 16 us and 2/3.
		{TokenBucket{Rate: 3, Per: 10 * time.Microsecond, Burst: 5},
			rule{capacity: 5, maxCost: 5, window: 17, n: 3, p: 10, pq: 3, pr: 1, bq: 16, br: 2},
			"1 3 3 1 16 2 5 3:10:5"},
		// More than one token a us.
		{TokenBucket{Rate: 7_000_000, Per: time.Second, Burst: 10},
			rule{capacity: 10, maxCost: 10, window: 2, n: 7, p: 1, pq: 0, pr: 1, bq: 1, br: 3},
			"1 7 0 1 1 3 10 7:1:10"},
		{SlidingLog{Limit: 5, Window: time.Minute},
			rule{capacity: 5, maxCost: 5, window: 60_000_000},
			"2 5 60000000 0 0 0 0 0"},
		{SlidingLog{Limit: MaxLogLimit, Window: MaxWindow},
			rule{capacity: 1_000_000, maxCost: 1000, window: 31_622_400_000_000},
			"2 1000000 31622400000000 0 0 0 0 0"},
	} {
		got := *compiled(t, c.limit)
		if args := strings.Trim(fmt.Sprint(got.args), "[]"); args != c.args {
			t.Errorf("%s: arguments %q, want %q", c.limit, args, c.args)
		}
		brief := ""
		if got.n == 1 { // without fractions: unit, bq
			for _, word := range []string{got.args[7].(string), fmt.Sprint(got.bq)} {
				brief += string(appendBulk(nil, word))
			}
		}
		if got.brief != brief {
			t.Errorf("%s: briefly %q, want %q", c.limit, got.brief, brief)
		}
		c.want.algo, c.want.args, c.want.words, c.want.brief = got.algo, got.args, got.words, got.brief
		if got != c.want {
			t.Errorf("%s: %+v, want %+v", c.limit, got, c.want)
		}
	}
}

// The worked numbers of Decision: 10 a second, burst 20.
func TestAStateIsTurnedIntoTheWorkedNumbersOfDecision(t *testing.T) {
	bucket := compiled(t, TokenBucket{Rate: 10, Per: time.Second, Burst: 20})
	thirds := compiled(t, TokenBucket{Rate: 3, Per: 10 * time.Microsecond, Burst: 5})
	log := compiled(t, SlidingLog{Limit: 5, Window: time.Second})
	const ms = time.Millisecond
	for _, c := range []struct {
		what         string
		rule         *rule
		state        state
		allowed      bool
		cost         int64
		left         int64
		retry, reset time.Duration
	}{
		{"1.5 left", bucket, state{a: 1_850_000}, true, 2, 1, 0, 1850 * ms},
		{"0.5 left, 2 wanted", bucket, state{a: 1_950_000}, false, 2, 0, 150 * ms, 1950 * ms},
		{"full", bucket, state{}, true, 1, 20, 0, 0},
		{"empty", bucket, state{a: 2_000_000}, false, 20, 0, 2000 * ms, 2000 * ms},
		{"the clock is 7 ms ahead", bucket, state{a: 1_950_000, c: 7000}, false, 2, 0, 157 * ms, 1957 * ms},
		{"a whole token, to the us", bucket, state{a: 1_900_000}, false, 2, 1, 100 * ms, 1900 * ms},
		{"one us less", bucket, state{a: 1_900_001}, false, 1, 0, time.Microsecond, 1900*ms + time.Microsecond},
		{"5 - 3.4 us: 1.6", thirds, state{a: 11, b: 1}, true, 1, 1, 0, 12 * time.Microsecond},
		{"a third of a us too little", thirds, state{a: 13, b: 2}, false, 1, 0, time.Microsecond, 14 * time.Microsecond},
		{"to the third", thirds, state{a: 13, b: 1}, false, 2, 1, 4 * time.Microsecond, 14 * time.Microsecond},
		{"a log of 3", log, state{a: 3, c: 400_000}, true, 1, 2, 0, 400 * ms},
		{"a full log", log, state{a: 5, b: 100_000, c: 400_000}, false, 1, 0, 100 * ms, 400 * ms},
		{"a log whose limit was lowered", log, state{a: 9, b: 100_000, c: 400_000}, false, 1, 0, 100 * ms, 400 * ms},
	} {
		d := c.rule.decide(c.state, c.allowed, c.cost)
		want := Decision{Allowed: c.allowed, Limit: c.rule.capacity, Remaining: c.left, RetryAfter: c.retry, ResetAfter: c.reset}
		if d != want {
			t.Errorf("%s: %+v, want %+v", c.what, d, want)
		}
	}
}

// Against exact rational arithmetic, over odd rates.
func TestBucketArithmeticIsExact(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	tried := 0
	for range 200_000 {
		b := TokenBucket{
			Rate:  1 + rnd.Int64N(1<<(1+rnd.UintN(40))),
			Per:   time.Duration(1+rnd.Int64N(1<<(1+rnd.UintN(44)))) * time.Microsecond,
			Burst: 1 + rnd.Int64N(1<<(1+rnd.UintN(50))),
		}
		r, err := b.compile()
		if err != nil {
			continue
		}
		tried++
		s := state{a: rnd.Int64N(r.bq + 1), b: rnd.Int64N(r.n)}
		if !r.plausible(s) {
			s.b = 0
		}
		if rnd.IntN(4) == 0 {
			s.c = rnd.Int64N(1 << 40)
		}
		cost := 1 + rnd.Int64N(b.Burst)
		n := big.NewInt(r.n)
		missing := new(big.Int).Mul(big.NewInt(s.a), n)
		missing.Add(missing, big.NewInt(s.b)) // in n-ths of a us
		whole := new(big.Int).Mul(big.NewInt(b.Burst), big.NewInt(r.p))
		left := new(big.Int).Div(new(big.Int).Sub(whole, missing), big.NewInt(r.p))
		if got := r.remaining(s); got != left.Int64() {
			t.Fatalf("%s, state %v: %d left, want %d", b, s, got, left)
		}
		over := new(big.Int).Mul(big.NewInt(cost), big.NewInt(r.p))
		over.Add(over, missing).Sub(over, whole)
		want := int64(0)
		if over.Sign() > 0 {
			over.Add(over, n).Sub(over, big.NewInt(1)).Div(over, n)
			want = over.Int64() + s.c
		}
		if got := r.retryAfter(s, cost); got != want {
			t.Fatalf("%s, state %v: cost %d fits in %d us, want %d", b, s, cost, got, want)
		}
	}
	if tried < 20_000 {
		t.Errorf("only %d valid limits were tried", tried)
	}
}

func TestStringNamesTheWorstCase(t *testing.T) {
	for _, c := range []struct {
		limit Limit
		want  string
	}{
		{TokenBucket{Rate: 100, Per: time.Second, Burst: 200}, "token bucket: 100 per 1s, burst 200 (at most 300 in any 1s)"},
		{TokenBucket{Rate: 1, Per: time.Hour, Burst: 1}, "token bucket: 1 per 1h0m0s, burst 1 (at most 2 in any 1h0m0s)"},
		{SlidingLog{Limit: 100, Window: time.Minute}, "sliding log: 100 per 1m0s (at most 100 in any 1m0s)"},
	} {
		if got := c.limit.String(); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}

func TestWorstCase(t *testing.T) {
	bucket := TokenBucket{Rate: 10, Per: time.Second, Burst: 20}
	log := SlidingLog{Limit: 5, Window: time.Second}
	for _, c := range []struct {
		limit Limit
		in    time.Duration
		want  int64
	}{
		{bucket, -1, 0},
		{bucket, 0, 20},
		{bucket, 99 * time.Millisecond, 20},
		{bucket, 100 * time.Millisecond, 21},
		{bucket, time.Hour, 36_020},
		{TokenBucket{Rate: math.MaxInt64, Per: 1, Burst: 1}, math.MaxInt64, math.MaxInt64},
		{TokenBucket{Rate: 1, Per: 1, Burst: math.MaxInt64}, time.Second, math.MaxInt64},
		{TokenBucket{}, time.Second, 0},
		{log, -1, 0},
		{log, 0, 5},
		{log, time.Second - 1, 5},
		{log, time.Second, 10}, // ends included: it touches two windows
		{log, 10 * time.Second, 55},
		{SlidingLog{Limit: math.MaxInt64, Window: 1}, math.MaxInt64 - 1, math.MaxInt64},
		{SlidingLog{}, time.Second, 0},
	} {
		if got := c.limit.WorstCase(c.in); got != c.want {
			t.Errorf("%v in %s: %d, want %d", c.limit, c.in, got, c.want)
		}
	}
}

// The worst case is reached: a call at both ends of the stretch.
func TestTheWorstCaseOfABucketIsReached(t *testing.T) {
	b := TokenBucket{Rate: 10, Per: time.Second, Burst: 20}
	r := compiled(t, b)
	in := 1500 * time.Millisecond
	admitted := b.Burst // at its beginning
	s := state{a: r.bq - in.Microseconds()}
	admitted += r.remaining(s) // and at its end
	if admitted != b.WorstCase(in) {
		t.Errorf("%d, said %d", admitted, b.WorstCase(in))
	}
}

func TestLimitsAtTheirBoundsAreAcceptedAndBeyondNameTheField(t *testing.T) {
	const us, ms = time.Microsecond, time.Millisecond
	const most = 1 << 53
	for _, c := range []struct {
		limit Limit
		field string // "" is accepted
		value string
	}{
		{TokenBucket{Rate: 1, Per: us, Burst: 1}, "", ""},
		{TokenBucket{Rate: 1, Per: us, Burst: 31_622_400_000_000}, "", ""}, // 366 days to fill
		{TokenBucket{Rate: 1, Per: us, Burst: 31_622_400_000_001}, "TokenBucket.Burst", "31622400000001"},
		{TokenBucket{Rate: 1, Per: MaxWindow, Burst: 1}, "", ""},
		{TokenBucket{Rate: 1, Per: MaxWindow, Burst: 2}, "TokenBucket.Burst", "2"},
		{TokenBucket{Rate: 1000, Per: MaxWindow, Burst: 1000}, "", ""},
		{TokenBucket{Rate: 1 << 52, Per: us, Burst: 1}, "", ""},
		{TokenBucket{Rate: 1 << 52, Per: us, Burst: 2}, "TokenBucket.Burst", "2"},
		{TokenBucket{Rate: 1<<52 + 1, Per: us, Burst: 1}, "TokenBucket.Rate", "4503599627370497"},
		{TokenBucket{Rate: math.MaxInt64, Per: us, Burst: 1}, "TokenBucket.Rate", "9223372036854775807"},
		{TokenBucket{Rate: 1_000_000, Per: time.Second, Burst: most}, "TokenBucket.Burst", "9007199254740992"},
		{TokenBucket{}, "TokenBucket.Rate", "0"},
		{TokenBucket{Rate: -1, Per: time.Second, Burst: 1}, "TokenBucket.Rate", "-1"},
		{TokenBucket{Rate: 1, Burst: 1}, "TokenBucket.Per", "0s"},
		{TokenBucket{Rate: 1, Per: -time.Second, Burst: 1}, "TokenBucket.Per", "-1s"},
		{TokenBucket{Rate: 1, Per: 999, Burst: 1}, "TokenBucket.Per", "999ns"},
		{TokenBucket{Rate: 1, Per: us + 1, Burst: 1}, "TokenBucket.Per", "1.001µs"},
		{TokenBucket{Rate: 1, Per: MaxWindow + us, Burst: 1}, "TokenBucket.Per", "8784h0m0.000001s"},
		{TokenBucket{Rate: 1, Per: math.MaxInt64, Burst: 1}, "TokenBucket.Per", "2562047h47m16.854775807s"},
		{TokenBucket{Rate: 1, Per: time.Second}, "TokenBucket.Burst", "0"},
		{TokenBucket{Rate: 1, Per: time.Second, Burst: -5}, "TokenBucket.Burst", "-5"},
		{TokenBucket{Rate: 1, Per: time.Second, Burst: math.MaxInt64}, "TokenBucket.Burst", "9223372036854775807"},
		{SlidingLog{Limit: 1, Window: ms}, "", ""},
		{SlidingLog{Limit: MaxLogLimit, Window: MaxWindow}, "", ""},
		{SlidingLog{}, "SlidingLog.Limit", "0"},
		{SlidingLog{Limit: -1, Window: time.Second}, "SlidingLog.Limit", "-1"},
		{SlidingLog{Limit: MaxLogLimit + 1, Window: time.Second}, "SlidingLog.Limit", "1000001"},
		{SlidingLog{Limit: math.MinInt64, Window: time.Second}, "SlidingLog.Limit", "-9223372036854775808"},
		{SlidingLog{Limit: 1}, "SlidingLog.Window", "0s"},
		{SlidingLog{Limit: 1, Window: -time.Second}, "SlidingLog.Window", "-1s"},
		{SlidingLog{Limit: 1, Window: ms - us}, "SlidingLog.Window", "999µs"},
		{SlidingLog{Limit: 1, Window: ms + 1}, "SlidingLog.Window", "1.000001ms"},
		{SlidingLog{Limit: 1, Window: MaxWindow + us}, "SlidingLog.Window", "8784h0m0.000001s"},
	} {
		err := c.limit.Validate()
		if c.field == "" {
			if err != nil {
				t.Errorf("%+v: %v", c.limit, err)
			}
			continue
		}
		var f *FieldError
		if !errors.Is(err, ErrInvalid) || !errors.As(err, &f) || f.Field != c.field || f.Value != c.value || f.Fix == "" {
			t.Errorf("%+v: %v, want one about %s = %s", c.limit, err, c.field, c.value)
		}
	}
}

// An error about a Burst names the largest that is accepted, and that one is.
func TestTheLargestBurstAnErrorNamesIsTheLargestAccepted(t *testing.T) {
	number := regexp.MustCompile(`must be at most (\d+) with`)
	rnd := rand.New(rand.NewPCG(5, 6))
	pairs := []TokenBucket{
		{Rate: 1, Per: time.Microsecond}, {Rate: 999_999_937, Per: time.Second}, {Rate: 3, Per: MaxWindow},
		{Rate: 1 << 52, Per: time.Microsecond}, {Rate: 1<<53 - 111, Per: time.Hour}, {Rate: 86_399_999_999, Per: 24 * time.Hour},
	}
	for range 2000 {
		pairs = append(pairs, TokenBucket{
			Rate: 1 + rnd.Int64N(1<<(1+rnd.UintN(52))),
			Per:  time.Duration(1+rnd.Int64N(1<<(1+rnd.UintN(43)))) * time.Microsecond,
		})
	}
	named := 0
	for _, b := range pairs {
		b.Burst = math.MaxInt64
		err := b.Validate()
		if err == nil {
			t.Errorf("%v accepted", b)
			continue
		}
		m := number.FindStringSubmatch(err.Error())
		if m == nil {
			var f *FieldError
			if !errors.As(err, &f) || f.Field != "TokenBucket.Rate" {
				t.Errorf("%v names no largest Burst", err)
			}
			continue
		}
		named++
		b.Burst, _ = strconv.ParseInt(m[1], 10, 64)
		if err := b.Validate(); err != nil {
			t.Errorf("the largest accepted is not: %v", err)
		}
		b.Burst++
		if b.Validate() == nil {
			t.Errorf("%v: one more than the largest is accepted", b)
		}
	}
	if named < len(pairs)/2 {
		t.Errorf("only %d of %d errors named a Burst", named, len(pairs))
	}
}
