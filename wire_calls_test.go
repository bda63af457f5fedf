package ringfence

import (
	"context"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

// inSlots are requests of so many hash slots, two of each, in an order in which no two of a
// slot are neighbours.
func inSlots(t *testing.T, kind opKind, slots int) []*request {
	t.Helper()
	rl := compiled(t, SlidingLog{Limit: 5, Window: time.Second})
	space, by := newKeySpace("rf"), map[int][]*request{}
	var full []int
	for i := uint64(0); len(full) < slots; i++ {
		r := freshRequest().begin(kind, rl, keyHash{i, 7}, space, 1)
		slot := slotOf(tagOf(r.key()))
		if by[slot] = append(by[slot], r); len(by[slot]) == 2 {
			full = append(full, slot)
		}
	}
	var out []*request
	for i := range 2 {
		for _, slot := range full {
			out = append(out, by[slot][i])
		}
	}
	return out
}

// byCluster says that each slot has a call of its own.
func byCluster(moved func()) wireScripts {
	return wireScripts{
		scripts: redisScripts, lookBySHA: "evalsha_ro", lookByText: "eval_ro", loaded: func() {}, moved: moved,
		follow: func(context.Context, []*request) error { return nil },
	}
}

// Each slot has one call, with all of its keys in the order in which they came, and nothing
// but the slots decides which calls there are.
func TestAnOperationOfAClusterIsOneCallOfEachSlot(t *testing.T) {
	for _, kind := range []opKind{opCharge, opLook, opReset} {
		reqs := inSlots(t, kind, 5)
		came := slices.Clone(reqs)
		say := byCluster(nil)
		var w wire
		w.start(&say, kind, reqs)
		if !slices.Equal(reqs, came) {
			t.Error("the batch itself was sorted")
		}
		if len(w.calls) != 5 {
			t.Fatalf("%d calls for 5 slots", len(w.calls))
		}
		var want []byte
		first := 0
		for _, end := range w.calls {
			call := w.reqs[first:end]
			if len(call) != 2 || slices.Index(came, call[0]) > slices.Index(came, call[1]) ||
				slotOf(tagOf(call[0].key())) != slotOf(tagOf(call[1].key())) {
				t.Errorf("call of %d keys that ends at %d: not one slot's, or not as they came", len(call), end)
			}
			switch kind {
			case opCharge:
				want, _ = appendScriptCall(want, "evalsha", redisScripts.charge.sha, true, call, nil)
			case opLook:
				want, _ = appendScriptCall(want, "evalsha_ro", redisScripts.look.sha, false, call, nil)
			default:
				want = appendUnlink(want, call)
			}
			first = end
		}
		if string(w.out) != string(want) {
			t.Errorf("it is written\n%q\nwant\n%q", w.out, want)
		}
	}
}

// What one call comes to is no other call's business: see each reply, in one piece and byte
// by byte, and with the connection closed behind.
func TestEveryCallOfAnOperationHasAnEndOfItsOwn(t *testing.T) {
	const (
		yes     = "*5\r\n:1\r\n:1\r\n:1\r\n:1\r\n:1\r\n"
		oom     = "-OOM command not allowed when used memory > 'maxmemory'.\r\n"
		down    = "-CLUSTERDOWN The cluster is down\r\n"
		moved   = "-MOVED 1 127.0.0.1:1\r\n"
		ask     = "-ASK 1 127.0.0.1:1\r\n"
		again   = "-TRYAGAIN Multiple keys request during rehashing of slot\r\n"
		implied = "*5\r\n:1\r\n:9\r\n:1\r\n:1\r\n:1\r\n" // nine of one granted
	)
	answered, stray := &errorType{name: "answered"}, &errorType{name: "stray"}
	for _, c := range []struct {
		name   string
		says   string
		closes bool
		calls  [3]*errorType
		err    *errorType // of the operation
		keeps  bool
		moved  int
	}{
		{"all are answered", yes + yes + yes, false, [3]*errorType{answered, answered, answered}, nil, true, 0},
		{"one is refused", yes + oom + yes, false, [3]*errorType{answered, typeOOM, answered}, nil, true, 0},
		{"all are refused", down + down + oom, false, [3]*errorType{typeClusterDown, typeClusterDown, typeOOM}, typeClusterDown, true, 0},
		{"one has moved", yes + yes + moved, false, [3]*errorType{answered, answered, stray}, nil, true, 1},
		{"all are elsewhere", ask + moved + again, false, [3]*errorType{stray, stray, stray}, nil, true, 1},
		{"one is elsewhere, the others are refused", oom + ask + oom, false, [3]*errorType{typeOOM, stray, typeOOM}, nil, true, 0},
		{"it ends after the first", yes, true, [3]*errorType{answered, typeEOF, typeEOF}, typeEOF, false, 0},
		{"it ends in the second", yes + "*5\r\n:1\r\n", true, [3]*errorType{answered, typeEOF, typeEOF}, typeEOF, false, 0},
		{"it ends before the first", "", true, [3]*errorType{typeEOF, typeEOF, typeEOF}, typeEOF, false, 0},
		{"it ends after one is sent away", ask + yes, true, [3]*errorType{stray, answered, typeEOF}, typeEOF, false, 0},
		{"it ends after one that wants the script", "-NOSCRIPT No matching script.\r\n" + yes, true, [3]*errorType{stray, answered, typeEOF}, typeEOF, false, 0},
		{"it stops after the first", yes, false, [3]*errorType{answered, typeTimeout, typeTimeout}, typeTimeout, false, 0},
		{"the second is nonsense", yes + "+OK\r\n" + yes, false, [3]*errorType{answered, typeProtocol, typeProtocol}, typeProtocol, false, 0},
		{"the second cannot be", yes + implied + yes, false, [3]*errorType{answered, typeProtocol, typeProtocol}, typeProtocol, false, 0},
		{"one reply too many", yes + yes + yes + yes, false, [3]*errorType{answered, answered, typeProtocol}, typeProtocol, false, 0},
		{"an error too many", yes + yes + oom + oom, false, [3]*errorType{answered, answered, typeProtocol}, typeProtocol, false, 0},
		{"an error without end", yes + "-" + strings.Repeat("x", maxErrorLine), false, [3]*errorType{answered, typeProtocol, typeProtocol}, typeProtocol, false, 0},
		{"we are not let in", yes + "-NOAUTH Authentication required.\r\n" + yes, false, [3]*errorType{answered, typeAuth, answered}, nil, false, 0},
		{"we are not let in, and it hangs up", "-NOAUTH Authentication required.\r\n", true, [3]*errorType{typeAuth, typeAuth, typeAuth}, typeAuth, false, 0},
		{"it is a replica", "-READONLY no\r\n" + yes + yes, false, [3]*errorType{typeReadonly, answered, answered}, nil, false, 0},
	} {
		for _, piece := range []int{1, 7, 1 << 20} {
			if strings.HasSuffix(c.name, "too many") && piece < len(c.says) {
				continue // what comes later is found before the connection is used again
			}
			near, far := net.Pipe()
			w := &wire{pool: &wirePool{}, conn: near}
			moves := 0
			say := byCluster(func() { moves++ })
			reqs := inSlots(t, opCharge, 3)
			w.start(&say, opCharge, reqs)
			sorted := slices.Clone(w.reqs)
			go func() {
				_, _ = io.ReadFull(far, make([]byte, len(w.out)))
				for left := c.says; left != ""; {
					n := min(piece, len(left))
					if _, err := io.WriteString(far, left[:n]); err != nil {
						return
					}
					left = left[n:]
				}
				if c.closes {
					_ = far.Close()
				}
			}()
			within := 10 * time.Second
			if c.err == typeTimeout {
				within = 50 * time.Millisecond
			}
			ended, err := w.goOn(&say, time.Now().Add(within))
			if !ended {
				err = w.abandon(&say, err)
			}
			if (err == nil) != (c.err == nil) || (err != nil && classify(err) != c.err) {
				t.Errorf("%s, pieces of %d: %v, want an error of %+v", c.name, piece, err, c.err)
			}
			if w.spoilt == c.keeps || moves != c.moved {
				t.Errorf("%s, pieces of %d: the connection is spoilt: %t; moved %d times, want %d", c.name, piece, w.spoilt, moves, c.moved)
			}
			for i, want := range c.calls {
				for _, r := range sorted[2*i : 2*i+2] {
					got := answered
					switch {
					case slices.Contains(w.strays, r):
						got = stray
					case r.failed != nil:
						got = classify(r.failed)
					case r.granted != 1:
						got = &errorType{name: "nothing"}
					}
					if got != want {
						t.Errorf("%s, pieces of %d, call %d: %s, want %s", c.name, piece, i, got.name, want.name)
					}
				}
			}
			_, _ = near.Close(), far.Close()
		}
	}
}

// A master that lost its scripts gets the text with the first of the calls that want it, and
// those are sent again alone.
func TestOnlyTheCallsThatWantTheScriptAreSentAgain(t *testing.T) {
	const (
		yes      = "*5\r\n:1\r\n:1\r\n:1\r\n:1\r\n:1\r\n"
		noscript = "-NOSCRIPT No matching script.\r\n"
		ask      = "-ASK 1 127.0.0.1:1\r\n"
	)
	for _, c := range []struct {
		name, first string
		again       []int // the calls that are sent again
		second      string
		want        string // of each call: y answered, s stray
	}{
		{"the script was lost in between", yes + noscript + noscript, []int{1, 2}, yes + yes, "yyy"},
		{"one is elsewhere", noscript + ask + noscript, []int{0, 2}, yes + yes, "ysy"},
		{"the one with the text is sent away", noscript + noscript + noscript, []int{0, 1, 2}, ask + noscript + yes, "ssy"},
	} {
		near, far := net.Pipe()
		w := &wire{pool: &wirePool{}, conn: near}
		loads := 0
		say := byCluster(func() {})
		say.loaded = func() { loads++ }
		w.start(&say, opCharge, inSlots(t, opCharge, 3))
		sorted := slices.Clone(w.reqs)
		var want []byte
		for i, call := range c.again {
			command, text := "evalsha", redisScripts.charge.sha
			if i == 0 {
				command, text = "eval", redisScripts.charge.text
			}
			want, _ = appendScriptCall(want, command, text, true, sorted[2*call:2*call+2], nil)
		}
		heard := make([]byte, len(want))
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.ReadFull(far, make([]byte, len(w.out)))
			_, _ = io.WriteString(far, c.first)
			_, _ = io.ReadFull(far, heard)
			_, _ = io.WriteString(far, c.second)
		}()
		ended, err := w.goOn(&say, time.Now().Add(10*time.Second))
		<-done
		if !ended || err != nil || w.spoilt || loads != 1 {
			t.Errorf("%s: ended %t, %v, spoilt %t, %d loads", c.name, ended, err, w.spoilt, loads)
		}
		if string(heard) != string(want) {
			t.Errorf("%s: the second time it sent\n%.200q\nwant\n%.200q", c.name, heard, want)
		}
		for i := range 3 {
			for _, r := range sorted[2*i : 2*i+2] {
				if is := slices.Contains(w.strays, r); is != (c.want[i] == 's') || is == (r.granted == 1) || r.failed != nil {
					t.Errorf("%s, call %d: stray %t, %d granted, %v", c.name, i, is, r.granted, r.failed)
				}
			}
		}
		_, _ = near.Close(), far.Close()
	}
}

// Whatever a server sends instead of several replies, in whatever pieces, nothing panics,
// and what is taken for a reply is one.
func FuzzRepliesAreWholeOrRefused(f *testing.F) {
	const two = "*3\r\n:1\r\n:2\r\n:3\r\n"
	f.Add([]byte(two+two+two), 3, 1, 5)
	f.Add([]byte(two+"-ERR x\r\n"+two), 3, 1, 1)
	f.Add([]byte(":2\r\n:1\r\n"), 2, -1, 2)
	f.Add([]byte("-ASK 1 a:1\r\n"+two+":"), 3, 1, 3)
	f.Fuzz(func(t *testing.T, text []byte, calls, entries, piece int) {
		calls, entries, piece = 1+max(0, min(calls, 40)), max(-1, min(entries, 200)), max(1, piece%64)
		var p replyReader
		p.reset()
		p.next(entries, calls == 1)
		done, ends := 0, 0
		for end := 0; end < len(text) && done < calls; {
			end = min(len(text), end+piece)
			for done < calls {
				whole, err := p.read(text[:end])
				if whole && err != nil {
					t.Fatalf("whole, and yet %v", err)
				}
				if err != nil {
					return
				}
				if !whole {
					if len(p.values) > replyHead+replyWide*max(0, entries) || p.at > end {
						t.Fatalf("%d values kept for %d entries, %d bytes read of %d", len(p.values), entries, p.at, end)
					}
					break
				}
				if p.failed == nil && !repliesTo(p.values, entries) {
					t.Fatalf("%d values for %d entries", len(p.values), entries)
				}
				// It is what it would be by itself.
				var alone replyReader
				alone.next(entries, true)
				if whole, err := alone.read(text[ends:p.at]); !whole || err != nil || !slices.Equal(alone.values, p.values) ||
					(alone.failed == nil) != (p.failed == nil) {
					t.Fatalf("%q by itself: %t, %v", text[ends:p.at], whole, err)
				}
				ends = p.at
				done++
				p.next(entries, done == calls-1)
			}
		}
	})
}

// When the server is somewhere else, connections to where it was are used no more: idle ones
// are closed at once, others when their operation has ended.
func TestConnectionsToWhereTheServerWasAreClosed(t *testing.T) {
	answer := func(conn net.Conn, _ string) { _, _ = io.WriteString(conn, "*0\r\n") }
	old, present := scriptedServer(t, answer), scriptedServer(t, answer)
	p := &wirePool{network: "tcp", address: old, dial: new(net.Dialer).DialContext, all: map[*wire]struct{}{}}
	defer p.close()
	idle, err := p.connect(t.Context())
	aclMust(t, err)
	busy, err := p.connect(t.Context())
	aclMust(t, err)
	p.put(idle)
	p.move(old)
	if all, free := p.counts(); all != 2 || free != 1 || !p.owns(busy) {
		t.Errorf("it is where it was: %d connections, %d idle", all, free)
	}
	p.move(present)
	if _, err := idle.conn.Write([]byte("x")); err == nil {
		t.Error("an idle connection is open still")
	}
	if _, err := busy.conn.Write([]byte("x")); err != nil || p.owns(busy) {
		t.Errorf("one in use: %v; the pool's still: %t", err, p.owns(busy))
	}
	p.put(busy)
	if all, free := p.counts(); all != 0 || free != 0 {
		t.Errorf("%d connections, %d idle, want none", all, free)
	}
	w, err := p.connect(t.Context())
	aclMust(t, err)
	if got := w.conn.RemoteAddr().String(); got != present || !p.owns(w) {
		t.Errorf("connected to %s, want %s", got, present)
	}
}
