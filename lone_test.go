package ringfence

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// loneStates are what a key can hold when a lone call comes, after a call of the limit has
// written it 1 s before; loneNow is the server's clock.
var loneStates = []struct {
	name   string
	fields []any // of the HASH, set over what is there; nil: the key is deleted; or a command that makes it
}{
	{"nothing", nil},
	{"what the call before left", []any{}},
	{"an empty bucket", []any{"d", "10000000"}},
	{"nearly empty", []any{"d", "9999999"}},
	{"a microsecond too empty for one more", []any{"d", "10000001", "t", fmt.Sprint(int64(loneNow))}},
	{"just room for one more", []any{"d", "9000000", "t", fmt.Sprint(int64(loneNow))}},
	{"more missing than it holds", []any{"d", "10000002"}},
	{"just full", []any{"d", "1000000"}},
	{"full long since", []any{"d", "5"}},
	{"a clock that is ahead", []any{"t", fmt.Sprint(int64(loneNow) + 7)}},
	{"a clock of the next hour", []any{"t", fmt.Sprint(int64(loneNow) + 3_600_000_000)}},
	{"a fraction", []any{"r", "1"}},
	{"a fraction that is none", []any{"r", "x"}},
	{"half a microsecond missing", []any{"d", "0.5"}},
	{"half a microsecond of its clock", []any{"t", fmt.Sprint(int64(loneNow)-3) + ".5"}},
	{"less than nothing missing", []any{"d", "-1"}},
	{"a clock before 1970", []any{"t", "-1"}},
	{"no number missing", []any{"d", "nan"}},
	{"no clock", []any{"t", ""}},
	{"another limit's", []any{"u", "1:500000:20"}},
	{"nobody's", []any{"u", "x"}},
	{"somebody else's", []any{"", ""}}, // a HASH with that field alone
	{"something that is no hash", []any{"SET", "5"}},
	{"a field more", []any{"x", "1"}},
	{"in another order", []any{"HSET", "u", loneUnit, "t", fmt.Sprint(int64(loneNow) - 5), "r", "0", "d", "9000000"}},
	{"the clock first", []any{"HSET", "t", fmt.Sprint(int64(loneNow) - 5), "r", "0", "d", "9000000", "u", loneUnit}},
	{"no fraction but a clock", []any{"HSET", "d", "0", "t", fmt.Sprint(int64(loneNow) - 5), "r", "0", "u", loneUnit}},
	{"other fields", []any{"HSET", "a", "5", "b", "1", "c", "7", "e", "x"}},
	{"kept as a table", []any{"HSET", "d", "9000000", "r", "0", "t", fmt.Sprint(int64(loneNow) - 5), "u", loneUnit, "x", strings.Repeat("x", 100)}},
}

// loneUnit is the unit of the limit in loneCompare.
const loneUnit = "1:1000000:10"

const loneNow = 1_700_000_000_000_000

// loneCompare compares what a call alone decides, answers and writes with what it does among
// others, where no entry is decided in one go.
func loneCompare(t *testing.T, s *redistest.Server, sc scripts) error {
	t.Helper()
	n := diffNode(t, s.URL(), false)
	long := mutate(t, redisScripts, "usual, back = limit[1] == '1' and", "usual, back = false and limit[1] == '1' and")
	ctx, space := t.Context(), newKeySpace("rf")
	rl := compiled(t, TokenBucket{Rate: 1, Per: time.Second, Burst: 10})
	aclMust(t, s.Client().FlushAll(ctx).Err()) // what a mutant left
	number := uint64(0)
	ask := func(count, cost, more int64, debit string, h keyHash, others bool) (*request, error) {
		r := freshRequest().begin(opCharge, rl, h, space, cost)
		r.count, r.debit = count, debit
		if more > 0 {
			r.wants, r.leaser = more, r
		}
		reqs := []*request{r}
		if others {
			number++
			reqs = append(reqs, freshRequest().begin(opCharge, compiled(t, SlidingLog{Limit: 5, Window: time.Second}), keyHash{2, number}, space, 1))
		}
		return r, n.charge(ctx, reqs)
	}
	for _, state := range loneStates {
		for _, persist := range []bool{false, true} {
			for _, call := range []struct {
				count, cost, more int64
				debit             string
			}{{1, 1, 0, ""}, {1, 3, 0, ""}, {1, 10, 0, ""}, {2, 1, 0, ""}, {4, 3, 0, ""}, {0, 1, 0, ""}, {1, 1, 5, ""}, {0, 1, 5, ""}, {0, 1, 0, "2"}, {1, 1, 0, "2"}, {1, 1, 0, "-1"}, {4, 3, 2, ""}, {1, 1, 5, "-3"}, {0, 1, 5, "-3"}, {0, 1, 0, "-20"}} {
				for _, step := range []int64{0, 59_000_000} { // of the next minute, too
					number++
					h := map[bool]keyHash{false: {1, number}, true: {3, number}}
					var said [2]string
					for i, others := range []bool{false, true} {
						what := fmt.Sprintf("%s, TTL taken away %t, count %d cost %d more %d debit %q, step %d", state.name, persist, call.count, call.cost, call.more, call.debit, step)
						aclMust(t, s.SetMicros(loneNow-1_000_000))
						n.scripts = redisScripts
						if _, err := ask(1, 1, 0, "", h[others], true); err != nil {
							t.Fatalf("%s: %v", what, err)
						}
						n.scripts = map[bool]scripts{false: sc, true: long}[others]
						name := string(space.append(nil, h[others]))
						aclMust(t, lonePut(ctx, s, name, state.fields, persist))
						aclMust(t, s.SetMicros(loneNow+step))
						r, err := ask(call.count, call.cost, call.more, call.debit, h[others], others)
						if err != nil {
							return fmt.Errorf("%s: %w", what, err)
						}
						held := s.Client().HGetAll(ctx, name).Val()
						ttl := s.Client().PTTL(ctx, name).Val()
						said[i] = fmt.Sprintf("%d %d %d %v %v %v", r.now, r.status, r.granted, r.state, held, ttl)
						if i == 1 && said[0] != said[1] {
							return fmt.Errorf("%s: alone %s, among others %s", what, said[0], said[1])
						}
					}
				}
			}
		}
	}
	return nil
}

func lonePut(ctx context.Context, s *redistest.Server, name string, fields []any, persist bool) error {
	c := s.Client()
	if fields == nil {
		return c.Del(ctx, name).Err()
	}
	if len(fields) > 0 && (fields[0] == "SET" || fields[0] == "HSET") {
		if err := c.Del(ctx, name).Err(); err != nil {
			return err
		}
		if err := c.Do(ctx, append([]any{fields[0], name}, fields[1:]...)...).Err(); err != nil {
			return err
		}
		// Only x was long, but a hash that has become a table stays one.
		if fields = nil; c.Type(ctx, name).Val() == "hash" {
			if err := c.HDel(ctx, name, "x").Err(); err != nil {
				return err
			}
		}
	}
	if len(fields) > 0 && fields[0] == "" {
		if err := c.HDel(ctx, name, "d", "r", "t").Err(); err != nil {
			return err
		}
		if err := c.HSet(ctx, name, "balance", 12).Err(); err != nil {
			return err
		}
		if err := c.HDel(ctx, name, "u").Err(); err != nil {
			return err
		}
		fields = nil
	}
	if len(fields) > 0 {
		if err := c.HSet(ctx, name, fields...).Err(); err != nil {
			return err
		}
	}
	if persist {
		return c.Persist(ctx, name).Err()
	}
	return nil
}

// loneMutations are mistakes of usual.lua and of the short form that need a state which no call
// leaves behind.
var loneMutations = []struct{ name, old, mutant string }{
	{"a fraction is forgotten", "if state[2] == '0' and a and t", "if a and t"},
	{"what a bucket cannot lack is believed", "and a <= bq and t > bq", "and t > bq"},
	{"half a microsecond counts", "and a % 1 == 0 and t % 1 == 0 then", "and t % 1 == 0 then"},
	{"half a microsecond of the clock counts", "and a % 1 == 0 and t % 1 == 0 then", "and a % 1 == 0 then"},
	{"somebody else's hash is begun", "elseif not state[1] then", "elseif not state[4] then"},
	{"something that is no hash is begun", "if not string.find(state.err, 'WRONGTYPE', 1, true) then granted, a = -3, 0 end", "a, fits = 0, count"},
	{"a denied call leaves a key without an end", "elseif full and call('PTTL', key) == -1 then", "elseif false then"},
	{"a denied call gives what is not there an end", "elseif full and call('PTTL', key) == -1 then", "elseif true then"},
	{"less than nothing may be missing", "a >= 0 and a <= bq and t > bq", "a <= bq and t > bq"},
	{"a clock may be before 1970", "a >= 0 and a <= bq and t > bq", "a >= 0 and a <= bq"},
	{"the clock may stand where what is missing does", "a >= 0 and a <= bq and t > bq", "a >= 0"},
	{"a time to live is not renewed in the next minute", "if not full or a + now >= full - full % minute_us + minute_us then", "if not full then"},
	{"all callers are one", "number(args[4] or 1)", "1"},
	{"a status is told as granted", "granted, a, b, c = -status, 0, 0, 0", "granted, a, b, c = status, 0, 0, 0"},
	{"a status is told with what was tried", "granted, a, b, c = -status, 0, 0, 0", "granted, b, c = -status, 0, 0"},
}

// A call that usual.lua decides comes to what the other files make of it, whatever the key
// holds; and this comparison sees every mistake of which the run against the referee, in
// which every key was written by a call, knows nothing.
func TestALoneCallComesToWhatItWouldAmongOthers(t *testing.T) {
	s, _ := startDiffServer(t)
	if err := loneCompare(t, s, redisScripts); err != nil {
		t.Error(err)
	}
	for _, m := range loneMutations {
		err := loneCompare(t, s, mutate(t, redisScripts, m.old, m.mutant))
		if err == nil {
			t.Errorf("%s: not found", m.name)
			continue
		}
		t.Logf("%s: %v", m.name, err)
	}
}
