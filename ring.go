package ringfence

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"

	"github.com/dchest/siphash"
)

// The numbers in this block decide which shard owns a key. Every process that
// shares a set of shards must use the same ones, so changing any of them is a
// breaking change that moves keys; the golden vectors in
// testdata/ring_golden.txt exist to make that visible.
const (
	// ringSlotBits is how many leading bits of a key's hash name its slot. At
	// 17 bits the busiest of 16 shards stays within 5 % of the mean and the
	// table is 256 KiB, small enough to stay in a processor's second-level cache.
	ringSlotBits = 17
	ringSlots    = 1 << ringSlotBits

	// ringGamma is the increment of splitmix64: 2^64 divided by the golden
	// ratio, made odd.
	ringGamma = 0x9e3779b97f4a7c15

	// The key under which shard ids are hashed: the text "ringfence.shards",
	// read as two little-endian words. It is public on purpose: it has to be
	// equal everywhere, and ids come from the operator, not from a caller.
	ringIDKey0 = 0x636e6566676e6972
	ringIDKey1 = 0x7364726168732e65

	// The key of the fingerprint: the text "ringfence.fprint", likewise. It
	// differs from the one above so that no fingerprint equals an id's hash.
	ringPrintKey0 = 0x636e6566676e6972
	ringPrintKey1 = 0x746e697270662e65

	// ringLogBits is how many bits after the binary point ringLog keeps.
	ringLogBits = 40
)

const (
	// maxRingMembers bounds the time to build a ring, which grows with the
	// number of shards. The table itself could index 65,535.
	maxRingMembers = 1000

	// maxRingWeight keeps the product of a weight and a ringLog, at most
	// 1000 * 2^46, far from the end of 64 bits.
	maxRingWeight = 1000

	// defaultRingWeight is what a weight of 0, the zero value, stands for.
	defaultRingWeight = 1
)

// ringMember is one shard as the ring sees it.
type ringMember struct {
	id     string // the same in every process; it alone decides the shard's place
	weight int    // 1 to 1000, share of the keys relative to the other members; 0 means 1
}

// hashRing maps the hash of a key to the shard that owns it. It never changes
// once built, so any number of goroutines may read it without a lock; a new set
// of shards is a new hashRing.
//
// It holds a fixed table of 131,072 slots. A key belongs to the slot named by
// the leading bits of its hash, and a slot to the shard that scores highest in
// it: rendezvous hashing, also known as highest random weight (Thaler and
// Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM
// Transactions on Networking 6(1), 1998), with the logarithmic weights of
// Schindelhauer and Schomaker ("Weighted distributed hash tables", SPAA 2005).
// A shard's score depends on nothing but its own id, its own weight and the
// slot, so adding, removing or reweighting a shard moves keys to or from that
// shard only.
//
// Health is no input: a fault never moves a key. The type Ring of go-redis does
// the opposite, and hands the keys of a failed shard to the others.
type hashRing struct {
	// slots has a length the compiler knows, so that owner needs no bounds check.
	slots  [ringSlots]uint16 // slot -> index into the members as given
	counts []int32           // member -> how many slots it owns
	print  uint64
}

// buildRing returns the ring of the given members. The order of the members
// decides only how they are numbered, never who owns what.
//
// It refuses an empty list, more than 1,000 members, two members with one id
// and a weight outside 0 to 1000. It does not check how ids are spelled.
//
// One slot is 1/131,072 of the keys: a member whose part is not well above that
// (one of weight 1 among hundreds of weight 1000) may own no slot at all.
func buildRing(members []ringMember) (*hashRing, error) {
	if err := checkRingMembers(members); err != nil {
		return nil, err
	}
	order := ringOrder(members)

	r := &hashRing{counts: make([]int32, len(members))}
	fillRing(r, members, order)
	r.print = ringFingerprint(r, members, order)
	return r, nil
}

// owner returns the member, as an index into the members given to buildRing,
// that owns a key with this hash. The hash must be uniform over all 64 bits,
// and must be keyed wherever callers choose their keys: only its leading 17
// bits count.
func (r *hashRing) owner(hash uint64) int {
	return int(r.slots[hash>>(64-ringSlotBits)])
}

// share returns the part of all slots, from 0 to 1, that member i owns. Under a
// uniform hash it is the part of all keys, though not of all traffic.
func (r *hashRing) share(i int) float64 {
	return float64(r.counts[i]) / ringSlots
}

// fingerprint returns a number that is equal in two processes if and only if,
// short of a 64-bit collision, they have the same set of ids and weights, in
// any order, and agree on the owner of every slot.
func (r *hashRing) fingerprint() uint64 { return r.print }

func checkRingMembers(members []ringMember) error {
	if len(members) == 0 {
		return fmt.Errorf("ringfence: Shards is empty: list at least one shard")
	}
	if len(members) > maxRingMembers {
		return fmt.Errorf("ringfence: Shards has %d entries: list at most %d, or put several Redis servers behind one shard as a cluster",
			len(members), maxRingMembers)
	}
	seen := make(map[string]int, len(members))
	for i, m := range members {
		if first, ok := seen[m.id]; ok {
			return fmt.Errorf("ringfence: Shards[%d].ID is %q, which Shards[%d] has already: give every shard an ID of its own",
				i, m.id, first)
		}
		seen[m.id] = i
		if m.weight < 0 || m.weight > maxRingWeight {
			return fmt.Errorf("ringfence: Shards[%d].Weight is %d (shard %q): use 1 to %d, or leave it 0 for %d",
				i, m.weight, m.id, maxRingWeight, defaultRingWeight)
		}
	}
	return nil
}

// effectiveWeight is the weight with the default filled in.
func (m ringMember) effectiveWeight() int {
	if m.weight == 0 {
		return defaultRingWeight
	}
	return m.weight
}

// ringOrder returns the indexes of the members in the one order that everything
// below uses: heaviest first, and by id among equals. It makes the result
// independent of how the members were listed.
func ringOrder(members []ringMember) []int {
	order := make([]int, len(members))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		ma, mb := members[a], members[b]
		return cmp.Or(cmp.Compare(mb.effectiveWeight(), ma.effectiveWeight()), cmp.Compare(ma.id, mb.id))
	})
	return order
}

// fillRing finds the owner of every slot.
//
// In slot s (from 0) a member draws x, output s of a splitmix64 generator seeded
// with the hash of its id. Read as u = x/2^64 this is a uniform draw, and the
// member with the least -log2(u)/weight owns the slot. Two that agree on that to
// the last bit kept are told apart by the greater x, and then by the lesser id.
// All three depend on the member alone, so together they are one total order,
// and that is what confines every move to the member that changed.
//
// Two shortcuts make 131 million draws for 1,000 members affordable; neither
// changes an owner:
//
//   - Among members of equal weight the greatest x wins outright, as ringLog
//     never rises with x. So only the winner of each weight needs a logarithm,
//     and a ring of one weight needs none.
//   - A winner that would lose even with a lower bound of its logarithm needs
//     none either. The bound is 1-u <= -log2(u). With the heaviest first this
//     leaves some ten logarithms a slot when 1,000 weights all differ.
func fillRing(r *hashRing, members []ringMember, order []int) {
	// Local arrays rather than slices: the race detector does not instrument
	// what lives on the stack, and these are read in the innermost loop.
	var (
		seeds   [maxRingMembers]uint64 // place in order -> hash of the id
		ends    [maxRingMembers]int    // class -> place in order one past its last member
		weights [maxRingMembers]uint64 // class -> weight
		classes int
	)
	for place, i := range order {
		seeds[place] = siphash.Hash(ringIDKey0, ringIDKey1, []byte(members[i].id))
		weight := uint64(members[i].effectiveWeight())
		if classes == 0 || weights[classes-1] != weight {
			weights[classes] = weight
			classes++
		}
		ends[classes-1] = place + 1
	}

	step := uint64(0)
	for slot := range r.slots {
		step += ringGamma
		best, bestX, bestLog, bestWeight := 0, uint64(0), uint64(0), uint64(0)
		start := 0
		for c := range classes {
			// Strictly greater: at equal x the first, with the lesser id, stays.
			top, topX := start, ringMix(seeds[start]+step)
			for i := start + 1; i < ends[c]; i++ {
				if x := ringMix(seeds[i] + step); x > topX {
					top, topX = i, x
				}
			}
			start = ends[c]

			if classes == 1 {
				best = top
				break
			}
			weight := weights[c]
			if c > 0 && ringLogAtLeast(topX)*bestWeight > bestLog*weight {
				continue
			}
			// a/v < b/w, multiplied out so that nothing is rounded. At equal
			// quotients x decides, and x differs too: equal x would mean equal
			// logarithms, which are never 0, and so equal weights.
			log := ringLog(topX)
			mine, theirs := log*bestWeight, bestLog*weight
			if c == 0 || mine < theirs || mine == theirs && topX > bestX {
				best, bestX, bestLog, bestWeight = top, topX, log, weight
			}
		}
		owner := order[best]
		r.slots[slot] = uint16(owner)
		r.counts[owner]++
	}
}

// ringMix is the output function of splitmix64 (Steele, Lea and Flood, "Fast
// splittable pseudorandom number generators", OOPSLA 2014, with Stafford's
// thirteenth set of constants). It is a bijection: two members draw the same
// number in a slot only if their ids have the same 64-bit hash.
func ringMix(z uint64) uint64 {
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// ringLog returns -log2(x/2^64) in units of 2^-40, rounded up: from 1 for the
// greatest x to 64*2^40 for 1 and, by definition, for 0. It is never below the
// exact value and less than 1.001 units above it, and it never rises with x.
//
// Integers only: floating-point logarithms differ between processors in the last
// bit, and one bit is enough for two processes to disagree about a key. The
// method is the bit-by-bit one (Majithia and Levan, "A note on base-2 logarithm
// computations", Proceedings of the IEEE 61(10), 1973): squaring a number in
// [1,2) doubles its logarithm, and whether the square reaches 2 is the next bit.
// Every step rounds downwards and none swaps two numbers, which gives both the
// bound and the order promised above.
func ringLog(x uint64) uint64 {
	if x == 0 {
		x = 1
	}
	zeros := bits.LeadingZeros64(x)
	log := uint64(63 - zeros)
	m := x << zeros // m/2^63 is in [1,2)
	for range ringLogBits {
		m, _ = bits.Mul64(m, m) // m/2^62 is in [1,4)
		bit := m >> 63
		log = log<<1 | bit
		m <<= 1 - bit
	}
	return 64<<ringLogBits - log
}

// ringLogAtLeast returns a lower bound of ringLog(x) that costs one shift: 1-u,
// rounded down, where u = x/2^64.
func ringLogAtLeast(x uint64) uint64 { return ^x >> (64 - ringLogBits) }

// ringFingerprint hashes the members in ring order and the owner of every slot.
// The slots are in it so that two processes with one configuration, but with
// releases or processors that disagree, are found out too.
func ringFingerprint(r *hashRing, members []ringMember, order []int) uint64 {
	// The lengths keep ("ab","c") and ("a","bc") apart.
	buf := make([]byte, 0, 2*ringSlots+32*len(members))
	buf = binary.LittleEndian.AppendUint32(buf, uint32(len(members)))
	places := make([]uint16, len(members))
	for place, i := range order {
		places[i] = uint16(place)
		m := members[i]
		buf = binary.LittleEndian.AppendUint32(buf, uint32(len(m.id)))
		buf = append(buf, m.id...)
		buf = binary.LittleEndian.AppendUint32(buf, uint32(m.effectiveWeight()))
	}
	// Places in the order rather than indexes, which depend on the listing.
	for _, owner := range &r.slots {
		buf = binary.LittleEndian.AppendUint16(buf, places[owner])
	}
	return siphash.Hash(ringPrintKey0, ringPrintKey1, buf)
}
