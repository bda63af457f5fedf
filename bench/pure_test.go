package main

import (
	"bufio"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestHistogramIsExactToOnePartIn64(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	var h histogram
	var all []int64
	for range 100_000 {
		ns := int64(math.Exp(random.Float64() * 25)) // 1 ns to 72 s
		all = append(all, ns)
		h.record(time.Duration(ns))
	}
	slices.Sort(all)
	for _, q := range []float64{0, 0.001, 0.5, 0.9, 0.99, 0.999, 1} {
		exact := all[max(0, int(math.Ceil(q*float64(len(all))))-1)]
		got := int64(h.quantile(q))
		if got < exact || float64(got) > float64(exact)*(1+1.0/64)+1 {
			t.Errorf("quantile %g is %d, the exact one is %d", q, got, exact)
		}
	}
}

func TestHistogramBucketsFollowOneAnother(t *testing.T) {
	for i := range histogramBuckets - 1 {
		top := bucketTop(i)
		if bucketOf(top) != i || bucketOf(top+1) != i+1 {
			t.Fatalf("bucket %d ends at %d, yet %d is in %d and %d in %d", i, top, top, bucketOf(top), top+1, bucketOf(top+1))
		}
	}
	if got := bucketOf(math.MaxInt64); got != histogramBuckets-1 {
		t.Errorf("the longest duration is in bucket %d", got)
	}
	if got := bucketOf(-5); got != 0 {
		t.Errorf("a negative duration is in bucket %d", got)
	}
}

func TestHistogramsAddUp(t *testing.T) {
	var a, b histogram
	a.record(10)
	b.record(30)
	b.record(30)
	a.add(&b)
	if a.total != 3 || a.quantile(0.3) != 10 || a.quantile(0.5) != 30 {
		t.Errorf("10, 30, 30 add up to %d with the quantiles %d and %d", a.total, a.quantile(0.3), a.quantile(0.5))
	}
	if got := new(histogram).quantile(0.5); got != 0 {
		t.Errorf("the median of nothing is %d", got)
	}
}

// TestCallsAreCountedAsTheyWereMade compares the count afterwards with one made call by call.
func TestCallsAreCountedAsTheyWereMade(t *testing.T) {
	w, err := workloadNamed("zipf")
	if err != nil {
		t.Fatal(err)
	}
	c := newCalls(w)
	attempts := []int64{0, 1, 1000, sequenceLen/2 + 7, sequenceLen - 1, sequenceLen, 2*sequenceLen + 5}
	want := make([]int64, c.keys)
	for caller, n := range attempts {
		at := c.start(caller, len(attempts))
		for range n {
			want[c.sequence[at&(sequenceLen-1)]]++
			at++
		}
	}
	if !slices.Equal(c.counts(attempts), want) {
		t.Error("the counts differ")
	}
}

func TestZipfIsWhatItSays(t *testing.T) {
	w, _ := workloadNamed("zipf")
	c := newCalls(w)
	seen := make([]float64, w.keys)
	for _, k := range c.sequence {
		seen[k]++
	}
	var sum float64
	for k := range w.keys {
		sum += math.Pow(float64(k+1), -w.skew)
	}
	for _, k := range []int{0, 1, 9, 99} {
		want := math.Pow(float64(k+1), -w.skew) / sum * sequenceLen
		if math.Abs(seen[k]-want) > 5*math.Sqrt(want) {
			t.Errorf("key %d is called %g times, Zipf says %g", k, seen[k], want)
		}
	}
}

func TestArrivalsHaveTheRateAndTheSpreadOfPoisson(t *testing.T) {
	gap := gaps(7, 1000)
	const n = 100_000
	var sum, squares float64
	for range n {
		s := gap().Seconds()
		sum, squares = sum+s, squares+s*s
	}
	mean := sum / n
	deviation := math.Sqrt(squares/n - mean*mean)
	if math.Abs(mean-0.001) > 0.00002 || math.Abs(deviation-0.001) > 0.00003 {
		t.Errorf("gaps of %g s on average, deviation %g; want 0.001 of both", mean, deviation)
	}
}

func TestWhatALimitGrants(t *testing.T) {
	l := limit{rate: 10, burst: 10, per: time.Second}
	for _, c := range []struct {
		name    string
		shape   shape
		calls   int64
		elapsed time.Duration
		want    int64
	}{
		{"a bucket grants its burst", bucket, 1000, 0, 10},
		{"and what flows in, whole units", bucket, 1000, 1290 * time.Millisecond, 22},
		{"but not more than is asked", bucket, 7, time.Second, 7},
		{"a window grants its limit", window, 1000, 999 * time.Millisecond, 10},
		{"and again in the next", window, 1000, 1500 * time.Millisecond, 20},
		{"but not more than is asked", window, 4, 2 * time.Second, 4},
		{"in a started window as many as came", window, 1010, 1010 * time.Millisecond, 20},
	} {
		if got := c.shape.expect(l, []int64{c.calls}, c.elapsed); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
	if got := bucket.expect(l, []int64{3, 100, 0}, 0); got != 13 {
		t.Errorf("three keys are granted %d, want 13", got)
	}
}

func TestWrongNumbersAreCalledWrong(t *testing.T) {
	named := func(id string) workload {
		w, err := workloadNamed(id)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	for _, c := range []struct {
		workload                     string
		shape                        shape
		granted, expected, undecided int64
		want                         bool
	}{
		{"distinct", bucket, 100, 100, 0, true},
		{"distinct", bucket, 99, 100, 0, false},
		{"distinct", bucket, 101, 100, 5, false},
		{"denied", bucket, 22, 22, 0, true},
		{"denied", bucket, 20, 22, 0, true},
		{"denied", bucket, 23, 22, 0, false},
		{"denied", bucket, 19, 22, 0, false},
		{"denied", bucket, 19, 22, 1, true},
		{"denied", window, 30, 20, 0, true},
		{"denied", window, 31, 20, 0, false},
		{"zipf", bucket, 9800, 10000, 0, true},
		{"zipf", bucket, 10001, 10000, 0, false},
		{"zipf", bucket, 9000, 10000, 0, false},
		{"zipf", window, 10200, 10000, 0, true},
		{"zipf", window, 10400, 10000, 0, false},
	} {
		if got := c.shape.right(named(c.workload), c.granted, c.expected, c.undecided); got != c.want {
			t.Errorf("%s, shape %d: %d granted of %d expected with %d undecided: right is %t", c.workload, c.shape, c.granted, c.expected, c.undecided, got)
		}
	}
}

func TestWhatRingfenceSendsIsOverheard(t *testing.T) {
	stream := "*3\r\n$6\r\nSCRIPT\r\n$4\r\nLOAD\r\n$8\r\nreturn 1\r\n" +
		"*5\r\n$7\r\nevalsha\r\n$40\r\ne0e1f9fabfc9d4800c877a703b823ac0578ff8db\r\n$1\r\n1\r\n$1\r\nk\r\n$2\r\na\r\n\r\n"
	if _, err := parseCommands([]byte(stream)); err == nil {
		t.Error("a value of another length than announced is not noticed")
	}
	commands, err := parseCommands([]byte(strings.Replace(stream, "$2\r\na\r\n\r\n", "$2\r\n\r\n\r\n", 1)))
	if err != nil || len(commands) != 2 || commands[1][4] != "\r\n" {
		t.Fatalf("%q, %v", commands, err)
	}
	if c := captureFrom(commands); c != nil {
		t.Error("a batch was found where there is none")
	}
	batch := append([]string{"EVALSHA", commands[1][1], "64"}, slices.Repeat([]string{"k"}, 64)...)
	c := captureFrom(append(commands, append(batch, "x", "y")))
	if c == nil || c.text != "return 1" || len(c.single.tail) != 1 || !slices.Equal(c.batch.tail, []string{"x", "y"}) {
		t.Errorf("captured %+v", c)
	}
}

func TestRepliesOfIntegers(t *testing.T) {
	read := func(s string) ([]int64, error) { return readIntegers(bufio.NewReader(strings.NewReader(s)), nil) }
	if got, err := read("*3\r\n:1\r\n:0\r\n:1234567890123456\r\n"); err != nil || !slices.Equal(got, []int64{1, 0, 1234567890123456}) {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"-ERR no\r\n", "*2\r\n:1\r\n", "*1\r\n$1\r\n", "*1\r\n:x\r\n", "*1\r\n:\r\n", ""} {
		if got, err := read(bad); err == nil {
			t.Errorf("%q is read as %v", bad, got)
		}
	}
	if _, err := replyGrant([]int64{1, -1, 0}, 1, 0); err == nil {
		t.Error("an entry that was not decided counts as decided")
	}
	if got, err := replyGrant([]int64{1, 0, 0, 1, 5}, 2, 1); err != nil || got != 1 {
		t.Errorf("the second entry is granted %d, %v", got, err)
	}
}

func TestMetersAreRead(t *testing.T) {
	busy, total, err := parseStat("cpu  100 10 20 1000 50 1 2 3 77 0\ncpu0 1 2 3\n")
	if err != nil || busy != 136*tick || total != 1186*tick {
		t.Errorf("busy %s of %s, %v", busy, total, err)
	}
	if _, _, err := parseStat("intr 1 2 3\n"); err == nil {
		t.Error("another line is read")
	}
	got, err := parseServerCPU("# CPU\r\nused_cpu_sys:1.5\r\nused_cpu_user:2.25\r\nused_cpu_sys_children:9\r\nused_cpu_user_children:9\r\n")
	if err != nil || got != 3750*time.Millisecond {
		t.Errorf("%s, %v", got, err)
	}
	if _, err := parseServerCPU("used_cpu_sys:1.5\r\n"); err == nil {
		t.Error("half a reading is taken for a whole one")
	}
	if got, err := processCPU(); err != nil || got <= 0 {
		t.Errorf("this process has used %s, %v", got, err)
	}
}

// TestACellIsWhatWasMeasured: throughput over the measured part, costs over what the
// meters saw, which may be longer. The pacer is no part of what the client costs, but a
// part of what we took of the machine.
func TestACellIsWhatWasMeasured(t *testing.T) {
	var s sums
	for range 1000 {
		s.latency.record(20 * time.Microsecond)
	}
	s.finished = 1000
	s.pacer = 10 * time.Millisecond
	at := time.Unix(0, 0)
	s.before = usage{at: at}
	s.after = usage{at: at.Add(2 * time.Second), client: 40 * time.Millisecond, server: 20 * time.Millisecond,
		machine: time.Second, total: 4 * time.Second, allocs: 4000, bytes: 8000}
	c := s.cell(timing{measured: time.Second})
	if c.perSecond != 1000 || c.client != 15*time.Microsecond || c.server != 10*time.Microsecond || c.allocs != 2 || c.bytes != 4 {
		t.Errorf("%+v", c)
	}
	if math.Abs(c.others-0.235) > 1e-9 {
		t.Errorf("others took %g of the machine, want (1 s - 60 ms) / 4 s", c.others)
	}
}

func TestSummariesAreMedians(t *testing.T) {
	cells := []cell{
		{perSecond: 300, granted: 3, expected: 3, right: true, p50: 3 * time.Microsecond, calls: 10, failed: 1},
		{perSecond: 100, granted: 1, expected: 1, right: true, p50: 9 * time.Microsecond, calls: 10, others: 0.5},
		{perSecond: 200, granted: 2, expected: 2, right: true, p50: 1 * time.Microsecond, calls: 10},
	}
	r := summary("w", 64, "s", cells)
	if r.DecisionsPerSecond != 200 || r.Granted != 2 || r.Expected != 2 || r.P50 != 3 || r.Slowest != 100 || r.Fastest != 300 ||
		r.Rounds != 3 || r.Disturbed != 1 || !r.Right || r.Failed != 1 || r.Calls != 30 {
		t.Errorf("%+v", r)
	}
	cells[0].right = false
	if summary("w", 64, "s", cells).Right {
		t.Error("one wrong round goes unnoticed")
	}
	if got := summary("w", 64, "s", cells[:2]).DecisionsPerSecond; got != 200 {
		t.Errorf("the median of 300 and 100 is %g", got)
	}
}

func TestOptionsAreBounded(t *testing.T) {
	ok := options{}
	if err := ok.complete(true); err != nil || ok.rounds != 3 || ok.closed.measured != 300*time.Millisecond {
		t.Errorf("%+v, %v", ok, err)
	}
	for name, o := range map[string]options{
		"rounds": {rounds: 101}, "cell": {closed: timing{measured: time.Minute}}, "open": {open: timing{measured: time.Hour}},
		"repeats": {repeats: 3}, "system": {systems: []string{"nobody"}}, "workload": {workloads: []string{"idle"}}, "callers": {callers: []int{0}},
	} {
		if err := o.complete(false); err == nil {
			t.Errorf("a bad %s is accepted", name)
		}
	}
}
