package ringfence

import (
	"fmt"
	"math/bits"
	"time"
)

// The bounds of every limit. What lies outside is refused by Validate.
const (
	// MaxWindow is the longest window of a limit: 366 days. For a token bucket it
	// is the time an empty bucket takes to fill.
	MaxWindow = 366 * 24 * time.Hour
	// MinWindow is the shortest window of a sliding log.
	MinWindow = time.Millisecond
	// MaxLogLimit is the most entries a sliding log may hold: about 100 bytes of
	// Redis memory each once a key holds more than 128.
	MaxLogLimit = 1_000_000
	// MaxLogCost is the highest cost of one call on a sliding log: every unit is
	// an entry of its own, and Redis does nothing else while it writes them.
	MaxLogCost = 1_000
	// maxExact is the largest integer below which a Lua number is exact.
	maxExact = 1 << 53
)

// Limit is a rule: how often something may happen for one key. The limits of
// this package are plain structs; caller code does not change with the
// algorithm. The interface is sealed, because a limit lives in the Lua scripts.
type Limit interface {
	// Validate returns nil, or an error that names the field, its value and what
	// is accepted; it matches ErrInvalid.
	Validate() error
	// WorstCase returns the most units that can be admitted for one key within
	// any stretch of time of this length, ends included, while the primary answers
	// and its clock does not step. It is 0 for a negative length and saturates at
	// the largest int64.
	WorstCase(in time.Duration) int64
	// String prints the limit and its worst case in one window.
	String() string

	compile() (*rule, error)
}

// TokenBucket admits Rate units every Per on average, and up to Burst at once. A
// fresh key has Burst tokens; a call of cost n takes n if they are there, and is
// denied, taking none, if they are not. Tokens come back one by one, evenly, and
// the arithmetic is exact: no rate drifts, however odd. In any stretch T at most
// Burst + Rate x T/Per units are admitted. State is one HASH a key.
//
// The zero value is not valid. Values are safe to copy and to share.
type TokenBucket struct {
	// Rate is how many tokens come back every Per; at least 1.
	Rate int64
	// Per is the time in which Rate tokens come back: whole microseconds, 1 us to
	// MaxWindow.
	Per time.Duration
	// Burst is the size of the bucket and the highest cost of one call; at least
	// 1. Filling an empty bucket (Burst/Rate x Per) may take MaxWindow at most.
	Burst int64
}

// SlidingLog admits at most Limit units in any window of length Window, exactly:
// every admitted unit is remembered for one window, and the call exactly one
// window after an admitted one finds its unit free again. State is one ZSET a
// key with an entry a unit (about 15 bytes each up to 128 entries, about 100
// beyond), so prefer TokenBucket for large limits.
//
// The zero value is not valid. Values are safe to copy and to share.
type SlidingLog struct {
	// Limit is the most units in any window: 1 to MaxLogLimit. One call may cost
	// min(Limit, MaxLogCost) at most.
	Limit int64
	// Window is the length of the window: whole microseconds, MinWindow to
	// MaxWindow.
	Window time.Duration
}

var (
	_ Limit = TokenBucket{}
	_ Limit = SlidingLog{}
)

// Validate implements Limit.
func (b TokenBucket) Validate() error {
	_, err := b.compile()
	return err
}

// WorstCase implements Limit: Burst + floor(Rate x in / Per).
func (b TokenBucket) WorstCase(in time.Duration) int64 {
	if in < 0 || b.Per <= 0 || b.Rate <= 0 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(b.Rate), uint64(in))
	if hi >= uint64(b.Per) {
		return maxInt64
	}
	q, _ := bits.Div64(hi, lo, uint64(b.Per))
	if q > uint64(maxInt64-b.Burst) {
		return maxInt64
	}
	return b.Burst + int64(q)
}

// String implements Limit.
func (b TokenBucket) String() string {
	return fmt.Sprintf("token bucket: %d per %s, burst %d (at most %d in any %s)",
		b.Rate, b.Per, b.Burst, b.WorstCase(b.Per), b.Per)
}

// Validate implements Limit.
func (l SlidingLog) Validate() error {
	_, err := l.compile()
	return err
}

// WorstCase implements Limit: Limit for every window begun. A stretch of exactly
// one window, ends included, touches two.
func (l SlidingLog) WorstCase(in time.Duration) int64 {
	if in < 0 || l.Window <= 0 {
		return 0
	}
	windows := int64(in/l.Window) + 1
	hi, lo := bits.Mul64(uint64(windows), uint64(max(l.Limit, 0)))
	if hi > 0 || lo > maxInt64 {
		return maxInt64
	}
	return int64(lo)
}

// String implements Limit.
func (l SlidingLog) String() string {
	return fmt.Sprintf("sliding log: %d per %s (at most %d in any %s)", l.Limit, l.Window, l.Limit, l.Window)
}

const maxInt64 = 1<<63 - 1
