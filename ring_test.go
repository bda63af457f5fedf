package ringfence

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"math"
	"math/bits"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/dchest/siphash"
)

var writeRingGolden = flag.Bool("write-ring-golden", false,
	"rewrite testdata/ring_golden.txt; a changed line in it is a breaking change")

func mustBuildRing(t testing.TB, members []ringMember) *hashRing {
	t.Helper()
	r, err := buildRing(members)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// ringOf gives every id the weight 1.
func ringOf(ids ...string) []ringMember {
	members := make([]ringMember, len(ids))
	for i, id := range ids {
		members[i] = ringMember{id: id, weight: 1}
	}
	return members
}

func ringIDs(n int, format string) []string {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = fmt.Sprintf(format, i)
	}
	return ids
}

// ringMoves counts the slots that changed hands between two rings, by
// "from>to". It looks at every slot, so it is exact for uniformly hashed keys.
func ringMoves(before []ringMember, r1 *hashRing, after []ringMember, r2 *hashRing) map[[2]string]int {
	moves := map[[2]string]int{}
	for slot := range r1.slots {
		from, to := before[r1.slots[slot]].id, after[r2.slots[slot]].id
		if from != to {
			moves[[2]string{from, to}]++
		}
	}
	return moves
}

// ringReferee is the rule of the table with no shortcut: every member, in
// whatever order, is compared with the best so far by (log/weight, x, id).
func ringReferee(members []ringMember, slot int) int {
	type score struct {
		x, log, weight uint64
		id             string
	}
	scoreOf := func(m ringMember) score {
		id := siphash.Hash(ringIDKey0, ringIDKey1, []byte(m.id))
		x := ringMix(id + uint64(slot+1)*ringGamma)
		return score{x, ringLog(x), uint64(max(m.weight, 1)), m.id}
	}
	beats := func(a, b score) bool {
		switch {
		case a.log*b.weight != b.log*a.weight:
			return a.log*b.weight < b.log*a.weight
		case a.x != b.x:
			return a.x > b.x
		default:
			return a.id < b.id
		}
	}
	best, bestScore := 0, scoreOf(members[0])
	for i, m := range members[1:] {
		if s := scoreOf(m); beats(s, bestScore) {
			best, bestScore = i+1, s
		}
	}
	return best
}

// ringIDSets are twenty ways in which people name 16 shards.
func ringIDSets() map[string][]string {
	uuids := func(seed uint64) []string {
		rng := rand.New(rand.NewPCG(seed, 1))
		ids := make([]string, 16)
		for i := range ids {
			a, b := rng.Uint64(), rng.Uint64()
			ids[i] = fmt.Sprintf("%08x-%04x-4%03x-a%03x-%012x", a>>32, a>>16&0xffff, a&0xfff, b>>52, b&0xffffffffffff)
		}
		return ids
	}
	return map[string][]string{
		"redis-N":            ringIDs(16, "redis-%d"),
		"redis-NN":           ringIDs(16, "redis-%02d"),
		"shardN":             ringIDs(16, "shard%d"),
		"shard-NNNN":         ringIDs(16, "shard-%04d"),
		"bare numbers":       ringIDs(16, "%d"),
		"hexadecimal digits": ringIDs(16, "%x"),
		"single letters":     strings.Split("abcdefghijklmnop", ""),
		"capital letters":    strings.Split("ABCDEFGHIJKLMNOP", ""),
		"a letter repeated":  {"a", "aa", "aaa", "aaaa", "aaaaa", "aaaaaa", "aaaaaaa", "aaaaaaaa", "b", "bb", "bbb", "bbbb", "bbbbb", "bbbbbb", "bbbbbbb", "bbbbbbbb"},
		"Greek letters":      {"alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi", "omicron", "pi"},
		"addresses":          ringIDs(16, "10.0.0.%d"),
		"addresses, port":    ringIDs(16, "10.0.%d.7_6379"),
		"one host, ports":    ringIDs(16, "127.0.0.1_70%02d"),
		"Kubernetes":         ringIDs(16, "redis-master-%d.redis-headless.limits.svc.cluster.local"),
		"ElastiCache":        ringIDs(16, "limits-%04d-001.abc123.0001.euw1.cache.amazonaws.com"),
		"zones":              {"eu-west-1a.0", "eu-west-1a.1", "eu-west-1a.2", "eu-west-1a.3", "eu-west-1b.0", "eu-west-1b.1", "eu-west-1b.2", "eu-west-1b.3", "eu-west-1c.0", "eu-west-1c.1", "eu-west-1c.2", "eu-west-1c.3", "eu-west-1d.0", "eu-west-1d.1", "eu-west-1d.2", "eu-west-1d.3"},
		"uuids, first":       uuids(1),
		"uuids, second":      uuids(2),
		"uuids, third":       uuids(3),
		"64 characters":      ringIDs(16, strings.Repeat("x", 62)+"%02d"),
	}
}

func TestTheBusiestOf16ShardsHasAtMost5PercentMoreKeysThanTheMean(t *testing.T) {
	const keys = 1_000_000
	hashes := make([]uint64, keys)
	var buf []byte
	for i := range hashes {
		buf = strconv.AppendInt(append(buf[:0], "user:"...), int64(i), 10)
		hashes[i] = siphash.Hash(1, 2, buf)
	}
	sets := ringIDSets()
	if len(sets) != 20 {
		t.Fatalf("%d sets of ids, want 20", len(sets))
	}
	worst := 0.0
	for name, ids := range sets {
		r := mustBuildRing(t, ringOf(ids...))
		var counts [16]int
		for _, h := range hashes {
			counts[r.owner(h)]++
		}
		got := float64(slices.Max(counts[:])) * 16 / keys
		worst = max(worst, got)
		if got > 1.05 {
			t.Errorf("%s: peak over mean is %.4f, want at most 1.05", name, got)
		}
	}
	t.Logf("worst peak over mean of 20 sets: %.4f", worst)
}

func TestAddingAShardMovesLittleMoreThanItsPartAndOnlyToIt(t *testing.T) {
	worst := math.Inf(-1)
	for _, n := range []int{1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 31, 63, 100, 199} {
		after := ringOf(ringIDs(n+1, "redis-%d")...)
		before := after[:n]
		r1, r2 := mustBuildRing(t, before), mustBuildRing(t, after)
		newcomer, moved := after[n].id, 0
		for move, slots := range ringMoves(before, r1, after, r2) {
			moved += slots
			if move[1] != newcomer {
				t.Errorf("%d+1 shards: %d slots moved from %s to %s, which is not new", n, slots, move[0], move[1])
			}
		}
		over := float64(moved)/ringSlots - 1/float64(n+1)
		worst = max(worst, over)
		if over > 0.01 {
			t.Errorf("%d+1 shards: %.4f of the keys moved, want at most %.4f", n, float64(moved)/ringSlots, 1/float64(n+1)+0.01)
		}
		if moved == 0 {
			t.Errorf("%d+1 shards: the new shard got nothing", n)
		}
	}
	t.Logf("most moved beyond 1/(n+1): %.2f %% of all keys", 100*worst)
}

func TestRemovingAShardMovesItsOwnKeysOnly(t *testing.T) {
	for _, weights := range [][]int{{1}, {1, 2, 3}} {
		before := ringOf(ringIDs(12, "redis-%d")...)
		for i := range before {
			before[i].weight = weights[i%len(weights)]
		}
		r1 := mustBuildRing(t, before)
		for gone := range before {
			after := slices.Delete(slices.Clone(before), gone, gone+1)
			moved := 0
			for move, slots := range ringMoves(before, r1, after, mustBuildRing(t, after)) {
				moved += slots
				if move[0] != before[gone].id {
					t.Errorf("weights %v: without %s, %d slots moved from %s to %s", weights, before[gone].id, slots, move[0], move[1])
				}
			}
			if want := int(r1.counts[gone]); moved != want {
				t.Errorf("weights %v: %d slots moved, want the %d of %s", weights, moved, want, before[gone].id)
			}
		}
	}
}

func TestReweightingAShardMovesKeysOnlyToItOrOnlyFromIt(t *testing.T) {
	before := []ringMember{{"a", 1}, {"b", 1}, {"c", 2}, {"d", 10}, {"e", 10}, {"f", 1000}, {"g", 37}}
	r1 := mustBuildRing(t, before)
	for i, m := range before {
		for _, weight := range []int{1, 2, 3, 9, 10, 11, 500, 1000} {
			after := slices.Clone(before)
			after[i].weight = weight
			for move, slots := range ringMoves(before, r1, after, mustBuildRing(t, after)) {
				if weight > m.weight && move[1] != m.id || weight <= m.weight && move[0] != m.id {
					t.Errorf("%s from weight %d to %d: %d slots moved from %s to %s", m.id, m.weight, weight, slots, move[0], move[1])
				}
			}
		}
	}
}

func TestEqualWeightsOwnTheSameWhateverTheNumber(t *testing.T) {
	one := ringOf(ringIDs(9, "redis-%d")...)
	many := slices.Clone(one)
	for i := range many {
		many[i].weight = 1000
	}
	if mustBuildRing(t, one).slots != mustBuildRing(t, many).slots {
		t.Error("nine shards of weight 1 and nine of weight 1000 own different slots")
	}
}

func TestAWeightIsRespectedWithin3Percent(t *testing.T) {
	// One ring in a table of 2^17 slots scatters by chance: a member that owns n
	// slots by about sqrt(n). So a row whose least member owns fewer than about
	// 10,000 is averaged over rings with other ids, which leaves the bias, if any.
	for _, row := range []struct {
		weights []int
		rings   int
	}{
		{[]int{1, 1}, 1},
		{[]int{1, 2}, 1},
		{[]int{1, 2, 3, 4}, 1},
		{[]int{1, 1, 1, 2, 2, 3}, 1},
		{[]int{100, 200, 700}, 1},
		{[]int{333, 334}, 1},
		{[]int{1, 9, 10, 10, 20}, 20},
		{[]int{1, 1, 1, 1, 1, 1, 1, 1, 100}, 20},
		{[]int{1, 99}, 20},
		{[]int{1, 150, 150}, 60},
	} {
		total := 0
		for _, w := range row.weights {
			total += w
		}
		got := make([]float64, len(row.weights))
		for n := range row.rings {
			members := make([]ringMember, len(row.weights))
			for i, w := range row.weights {
				members[i] = ringMember{id: fmt.Sprintf("redis-%d.%d", n, i), weight: w}
			}
			r := mustBuildRing(t, members)
			for i := range members {
				got[i] += r.share(i) / float64(row.rings)
			}
		}
		for i, w := range row.weights {
			want := float64(w) / float64(total)
			if off := got[i]/want - 1; math.Abs(off) > 0.03 {
				t.Errorf("weights %v over %d rings: member %d has %.5f of the keys, want %.5f (%+.1f %%)",
					row.weights, row.rings, i, got[i], want, 100*off)
			}
		}
	}
}

func TestAWeightOfZeroIsAWeightOfOne(t *testing.T) {
	r1 := mustBuildRing(t, []ringMember{{"a", 0}, {"b", 2}})
	r2 := mustBuildRing(t, []ringMember{{"a", 1}, {"b", 2}})
	if r1.slots != r2.slots || r1.fingerprint() != r2.fingerprint() {
		t.Error("weight 0 and weight 1 differ")
	}
}

func TestTheOrderInWhichShardsAreListedDoesNotMatter(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	for _, weights := range [][]int{{1}, {1, 5}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}} {
		members := ringOf(ringIDs(20, "redis-%d")...)
		for i := range members {
			members[i].weight = weights[i%len(weights)]
		}
		r1 := mustBuildRing(t, members)
		for range 5 {
			shuffled := slices.Clone(members)
			rng.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
			r2 := mustBuildRing(t, shuffled)
			if moves := ringMoves(members, r1, shuffled, r2); len(moves) > 0 {
				t.Errorf("weights %v: slots changed hands: %v", weights, moves)
			}
			if r1.fingerprint() != r2.fingerprint() {
				t.Errorf("weights %v: fingerprints %016x and %016x", weights, r1.fingerprint(), r2.fingerprint())
			}
		}
	}
}

func TestTheFingerprintTellsSetsApart(t *testing.T) {
	seen := map[uint64]string{}
	for _, members := range [][]ringMember{
		{{"a", 1}},
		{{"a", 2}}, // owns the same slots
		{{"b", 1}},
		{{"a", 1}, {"b", 1}},
		{{"a", 2}, {"b", 2}}, // owns the same slots
		{{"a", 1}, {"b", 2}},
		{{"a", 2}, {"b", 1}},
		{{"ab", 1}, {"c", 1}},
		{{"a", 1}, {"bc", 1}},
		{{"a", 1}, {"b", 1}, {"c", 1}},
	} {
		print := mustBuildRing(t, members).fingerprint()
		if other, ok := seen[print]; ok {
			t.Errorf("%v and %s have the fingerprint %016x", members, other, print)
		}
		seen[print] = fmt.Sprint(members)
	}
}

func TestTheTableIsWhatComparingEveryShardWithEveryOtherGives(t *testing.T) {
	rng := rand.New(rand.NewPCG(11, 13))
	for _, n := range []int{1, 2, 3, 10, 50, 300} {
		for _, heaviest := range []int{1, 2, 10, 1000} {
			members := ringOf(ringIDs(n, "redis-%d")...)
			for i := range members {
				members[i].weight = rng.IntN(heaviest + 1)
			}
			r := mustBuildRing(t, members)
			for range 200 {
				slot := rng.IntN(ringSlots)
				if got, want := int(r.slots[slot]), ringReferee(members, slot); got != want {
					t.Fatalf("%d members of weight up to %d, slot %d: owner %d, want %d", n, heaviest, slot, got, want)
				}
			}
		}
	}
}

func FuzzRingAgreesWithTheRefereeInAnyOrder(f *testing.F) {
	f.Add([]byte{1, 0}, uint64(1))
	f.Add([]byte{1, 0, 1, 0, 2, 0, 255, 3}, uint64(2))
	f.Fuzz(func(t *testing.T, weights []byte, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 0))
		members := []ringMember{{fmt.Sprintf("%x", seed), 1}}
		for i := 0; i+1 < len(weights) && i < 200; i += 2 {
			weight := (int(weights[i]) | int(weights[i+1])<<8) % (maxRingWeight + 1)
			members = append(members, ringMember{fmt.Sprintf("%x.%d", rng.Uint32(), i), weight})
		}
		r1 := mustBuildRing(t, members)
		backwards := slices.Clone(members)
		slices.Reverse(backwards)
		r2 := mustBuildRing(t, backwards)
		if r1.fingerprint() != r2.fingerprint() {
			t.Errorf("fingerprints %016x and, listed backwards, %016x", r1.fingerprint(), r2.fingerprint())
		}
		for range 100 {
			h := rng.Uint64()
			got, want := r1.owner(h), ringReferee(members, int(h>>(64-ringSlotBits)))
			if got != want || backwards[r2.owner(h)].id != members[want].id {
				t.Fatalf("hash %016x: owner %d, want %d; listed backwards %s, want %s",
					h, got, want, backwards[r2.owner(h)].id, members[want].id)
			}
		}
	})
}

func TestTheLogarithmIsWithinOneUnitNeverLowAndNeverRises(t *testing.T) {
	xs := []uint64{0, 1, 2, 3, math.MaxUint64, math.MaxUint64 - 1, 1 << 63, 1<<63 - 1, 1<<63 + 1}
	rng := rand.New(rand.NewPCG(3, 5))
	for range 20_000 {
		x := rng.Uint64()
		xs = append(xs, x, x>>rng.IntN(64), ^(x >> rng.IntN(64)))
	}
	slices.Sort(xs)
	const unit = 1.0 / (1 << ringLogBits)
	before := uint64(math.MaxUint64)
	for _, x := range xs {
		got := ringLog(x)
		if got > before {
			t.Fatalf("ringLog(%#x) = %d is more than that of the number before it, %d", x, got, before)
		}
		before = got
		if low := ringLogAtLeast(x); low > got {
			t.Fatalf("ringLogAtLeast(%#x) = %d is more than ringLog, %d", x, low, got)
		}
		// Near 2^64 the distance to it is what float64 can hold exactly enough.
		exact := 64 - math.Log2(float64(max(x, 1)))
		if x > 1<<63 {
			exact = -math.Log1p(-math.Ldexp(float64(-x), -64)) / math.Ln2
		}
		const slack = 1e-13 // of float64, a tenth of a unit
		if off := float64(got)*unit - exact; off < -slack || off > 1.001*unit+slack {
			t.Fatalf("ringLog(%#x) is off by %.4f units", x, off/unit)
		}
	}
	for _, row := range []struct{ x, want uint64 }{
		{0, 64 << ringLogBits}, {1, 64 << ringLogBits}, {2, 63 << ringLogBits}, {1 << 63, 1 << ringLogBits}, {math.MaxUint64, 1},
	} {
		if got := ringLog(row.x); got != row.want {
			t.Errorf("ringLog(%#x) = %d, want %d", row.x, got, row.want)
		}
	}
	if hi, _ := bits.Mul64(ringLog(0), maxRingWeight); hi != 0 {
		t.Error("the greatest logarithm times the greatest weight does not fit 64 bits")
	}
}

func TestTheHashKeysSpellTheirNames(t *testing.T) {
	for _, row := range []struct {
		text   string
		k0, k1 uint64
	}{
		{"ringfence.shards", ringIDKey0, ringIDKey1},
		{"ringfence.fprint", ringPrintKey0, ringPrintKey1},
	} {
		var got []byte
		for _, k := range []uint64{row.k0, row.k1} {
			for range 8 {
				got = append(got, byte(k))
				k >>= 8
			}
		}
		if string(got) != row.text {
			t.Errorf("key spells %q, want %q", got, row.text)
		}
	}
}

func TestARingThatCannotBeIsRefusedInWordsThatHelp(t *testing.T) {
	for _, row := range []struct {
		name    string
		members []ringMember
		want    string
	}{
		{"none", nil,
			`ringfence: Shards is empty: list at least one shard`},
		{"too many", ringOf(ringIDs(1001, "s%d")...),
			`ringfence: Shards has 1001 entries: list at most 1000, or put several Redis servers behind one shard as a cluster`},
		{"duplicate id", ringOf("a", "b", "a"),
			`ringfence: Shards[2].ID is "a", which Shards[0] has already: give every shard an ID of its own`},
		{"negative weight", []ringMember{{"a", 1}, {"b", -1}},
			`ringfence: Shards[1].Weight is -1 (shard "b"): use 1 to 1000, or leave it 0 for 1`},
		{"too heavy", []ringMember{{"a", 1001}},
			`ringfence: Shards[0].Weight is 1001 (shard "a"): use 1 to 1000, or leave it 0 for 1`},
	} {
		t.Run(row.name, func(t *testing.T) {
			r, err := buildRing(row.members)
			if err == nil || err.Error() != row.want {
				t.Errorf("error %v, want %s", err, row.want)
			}
			if r != nil {
				t.Error("a ring came with the error")
			}
		})
	}
}

func TestSharesAreCountedAndAddUpToOne(t *testing.T) {
	members := []ringMember{{"a", 1}, {"b", 2}, {"c", 7}}
	r := mustBuildRing(t, members)
	counts, sum := make([]int, len(members)), 0.0
	for _, owner := range &r.slots {
		counts[owner]++
	}
	for i, n := range counts {
		if got, want := r.share(i), float64(n)/ringSlots; got != want {
			t.Errorf("share(%d) = %v, want %v", i, got, want)
		}
		sum += r.share(i)
	}
	if sum != 1 { // exact: every share is a whole number of 2^-17
		t.Errorf("shares add up to %v", sum)
	}
}

func TestOneShardOwnsEverything(t *testing.T) {
	r := mustBuildRing(t, ringOf("a"))
	if r.owner(0) != 0 || r.owner(math.MaxUint64) != 0 || r.share(0) != 1 {
		t.Error("the only shard does not own every slot")
	}
}

func TestALookupAllocatesNothing(t *testing.T) {
	r := mustBuildRing(t, ringOf(ringIDs(16, "redis-%d")...))
	h, sum := uint64(0), 0
	allocs := testing.AllocsPerRun(1000, func() {
		sum += r.owner(h)
		h += ringGamma
	})
	if allocs != 0 {
		t.Errorf("%v allocations a lookup, want 0 (sum %d)", allocs, sum)
	}
}

// ringsOf1000 are the cheapest and the dearest thousand shards to build.
func ringsOf1000() map[string][]ringMember {
	equal := ringOf(ringIDs(1000, "redis-%d")...)
	distinct := slices.Clone(equal)
	for i := range distinct {
		distinct[i].weight = i + 1
	}
	return map[string][]ringMember{"equal weights": equal, "distinct weights": distinct}
}

func TestAThousandShardsAreBuiltWithin16MBAndASecond(t *testing.T) {
	for name, members := range ringsOf1000() {
		t.Run(name, func(t *testing.T) {
			// The best of five, so that a busy machine fails nothing. The bound is
			// for 64-bit processors without the race detector; elsewhere the time
			// is only logged (a 32-bit build of distinct weights takes longer).
			bounded := !ringSlowed && strconv.IntSize == 64
			best, bytesUsed := time.Hour, uint64(0)
			var r *hashRing
			for try := 0; try < 5 && (try == 0 || bounded && best > time.Second); try++ {
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				start := time.Now()
				r = mustBuildRing(t, members)
				best = min(best, time.Since(start))
				runtime.ReadMemStats(&after)
				bytesUsed = after.TotalAlloc - before.TotalAlloc
			}
			// Everything allocated on the way, including what is garbage after.
			if bytesUsed > 16<<20 {
				t.Errorf("%d bytes allocated to build, want at most 16 MiB", bytesUsed)
			}
			kept := unsafe.Sizeof(*r) + uintptr(cap(r.counts))*unsafe.Sizeof(r.counts[0])
			t.Logf("built in %v; %d bytes allocated, %d kept", best, bytesUsed, kept)
			if bounded && best > time.Second {
				t.Errorf("built in %v, want at most 1s", best)
			}
			for i := range members {
				if name == "equal weights" && r.share(i) == 0 {
					t.Errorf("shard %s owns nothing", members[i].id)
				}
			}
		})
	}
}

// ringGoldenRings are the rings of testdata/ring_golden.txt.
func ringGoldenRings() []struct {
	name    string
	members []ringMember
} {
	mixed := ringOf(ringIDs(24, "redis-%02d.example")...)
	for i := range mixed {
		mixed[i].weight = []int{1, 10, 100, 1000, 7, 3 + i}[i%6]
	}
	return []struct {
		name    string
		members []ringMember
	}{
		{"one", ringOf("only")},
		{"two", ringOf("a", "b")},
		{"three", ringOf("a", "b", "c")},
		{"sixteen", ringOf(ringIDs(16, "redis-%d")...)},
		{"weighted", []ringMember{{"small", 1}, {"medium", 2}, {"large", 4}}},
		{"mixed", mixed},
	}
}

// ringGoldenHashes are 64 hashes: both ends, both sides of some slot borders,
// and the rest scattered.
func ringGoldenHashes() []uint64 {
	const slot = 1 << (64 - ringSlotBits)
	hashes := []uint64{0, slot - 1, slot, 1<<63 - 1, 1 << 63, math.MaxUint64 - slot, math.MaxUint64 - slot + 1, math.MaxUint64}
	for i := uint64(1); len(hashes) < 64; i++ {
		hashes = append(hashes, ringMix(i*ringGamma))
	}
	return hashes
}

const ringGoldenHeader = `# Golden vectors of the ring: which shard owns which hash.
#
# Every process, release and processor must agree with this file. CHANGING A LINE
# IS A BREAKING CHANGE: during a rolling upgrade two releases would count one key
# on two shards. Adding a ring is fine:
#
#	go test -run Golden . -write-ring-golden
#
# ring NAME          starts a ring
# member ID WEIGHT   one shard of it
# fingerprint HEX    covers the members and the owner of all 131,072 slots
# owner HASH ID      who owns a key with this 64-bit hash
`

func TestOwnersAndFingerprintsMatchTheGoldenVectors(t *testing.T) {
	const path = "testdata/ring_golden.txt"
	var got bytes.Buffer
	got.WriteString(ringGoldenHeader)
	for _, ring := range ringGoldenRings() {
		r := mustBuildRing(t, ring.members)
		fmt.Fprintf(&got, "\nring %s\n", ring.name)
		for _, m := range ring.members {
			fmt.Fprintf(&got, "member %s %d\n", m.id, m.weight)
		}
		fmt.Fprintf(&got, "fingerprint %016x\n", r.fingerprint())
		for _, h := range ringGoldenHashes() {
			fmt.Fprintf(&got, "owner %016x %s\n", h, ring.members[r.owner(h)].id)
		}
	}
	if *writeRingGolden {
		if err := os.WriteFile(path, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	g, w := bufio.NewScanner(&got), bufio.NewScanner(bytes.NewReader(want))
	for line, different := 1, 0; different < 10; line++ {
		moreG, moreW := g.Scan(), w.Scan()
		if !moreG && !moreW {
			break
		}
		if g.Text() != w.Text() || moreG != moreW {
			t.Errorf("%s:%d: the ring says %q, the file %q", path, line, g.Text(), w.Text())
			different++
		}
	}
}

func BenchmarkRingLookup(b *testing.B) {
	for _, shards := range []int{1, 16, 1000} {
		b.Run(fmt.Sprintf("shards=%d", shards), func(b *testing.B) {
			r := mustBuildRing(b, ringOf(ringIDs(shards, "redis-%d")...))
			b.ReportAllocs()
			h, sum := uint64(0), 0
			for b.Loop() {
				sum += r.owner(h)
				h += ringGamma // wanders over the whole table
			}
			runtime.KeepAlive(sum)
		})
	}
}

func BenchmarkRingBuild(b *testing.B) {
	for name, members := range ringsOf1000() {
		for _, shards := range []int{16, 1000} {
			b.Run(fmt.Sprintf("%s/shards=%d", strings.ReplaceAll(name, " ", "-"), shards), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					mustBuildRing(b, members[:shards])
				}
			})
		}
	}
}
