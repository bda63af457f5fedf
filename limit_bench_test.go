package ringfence

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// What is the most that this Redis could do? The same script with the same arguments,
// in full batches of 64 keys, written beforehand and sent over four connections, each of
// which always has one batch more under way than Redis is working on; replies are read and
// thrown away. Then as many callers of Allow as stated. The two take turns; "share" is the
// part of the limit that callers get, by medians:
//
//	go test -run '^$' -bench ShareOfThePhysicalLimit -benchtime 20x .
func BenchmarkShareOfThePhysicalLimit(b *testing.B) {
	s := redistest.Start(b, redistest.Options{})
	r, err := Open(context.Background(), Config{
		Shards: []ShardConfig{{ID: "a", Primary: s.URL()}}, HashKey: []byte("0123456789abcdef"),
		Budget: 10 * time.Second, OperationTimeout: 10 * time.Second,
	})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	limit := TokenBucket{Rate: 1000, Per: time.Minute, Burst: 1_000_000}
	l, err := r.Limiter("bench", limit)
	if err != nil {
		b.Fatal(err)
	}
	keys := make([]string, 100_000)
	for i := range keys {
		keys[i] = fmt.Sprint("user:", i)
	}
	raw := newRawLoad(b, s.Addr(), l, keys)
	const turn = 100 * time.Millisecond
	for _, callers := range []int{64, 512} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			var most, ours []time.Duration // for a decision
			for b.Loop() {
				most = append(most, raw.run(b, turn))
				ours = append(ours, allowLoad(b, l, keys, callers, turn))
			}
			limit, got := medianOf(most), medianOf(ours)
			b.ReportMetric(1e9/float64(limit), "limit/s")
			b.ReportMetric(1e9/float64(got), "allow/s")
			b.ReportMetric(float64(limit)/float64(got), "share")
			b.ReportMetric(0, "ns/op") // of a turn, which says nothing
		})
	}
}

func medianOf(d []time.Duration) time.Duration {
	sorted := append([]time.Duration(nil), d...)
	for i := range sorted {
		for j := i; j > 0 && sorted[j] < sorted[j-1]; j-- {
			sorted[j], sorted[j-1] = sorted[j-1], sorted[j]
		}
	}
	return sorted[len(sorted)/2]
}

// rawLoad are connections and the frames to send over them.
type rawLoad struct {
	wires  []*wire
	frames [][]byte
	want   int
}

const rawBatch = 64

func newRawLoad(b *testing.B, addr string, l *Limiter, keys []string) *rawLoad {
	n, err := newLeanNode("redis://"+addr, nodeConfig{timeout: 10 * time.Second, poolSize: 1, loaded: func() {}}, false)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = n.close() })
	if err := n.load(context.Background()); err != nil {
		b.Fatal(err)
	}
	load := &rawLoad{want: replyHead + replyNarrow*rawBatch}
	for range 4 {
		w, err := n.wires.connect(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		load.wires = append(load.wires, w)
	}
	for range 256 {
		var reqs []*request
		for range rawBatch {
			h := l.keys.hash(keys[rand.IntN(len(keys))])
			reqs = append(reqs, l.ring.newRequest(opCharge, l.rule, h, 1))
		}
		frame, _ := appendScriptCall(nil, "evalsha", redisScripts.charge.sha, true, reqs, nil)
		load.frames = append(load.frames, frame)
	}
	return load
}

// run sends for so long and returns the time for a decision.
func (load *rawLoad) run(b *testing.B, turn time.Duration) time.Duration {
	start := time.Now()
	var batches atomic.Int64
	var all sync.WaitGroup
	for i, w := range load.wires {
		all.Go(func() {
			if err := w.conn.SetDeadline(start.Add(time.Minute)); err != nil {
				b.Error(err)
				return
			}
			send := func() bool {
				_, err := w.conn.Write(load.frames[rand.IntN(len(load.frames))])
				return err == nil
			}
			ok := send()
			ok = send() && ok
			for under := 2; ok && under > 0; under-- {
				if ok = load.readOne(w) == nil; !ok {
					break
				}
				batches.Add(1)
				if time.Since(start) < turn {
					ok = send()
					under++
				}
			}
			if !ok {
				b.Errorf("connection %d broke", i)
			}
		})
	}
	all.Wait()
	return time.Since(start) / time.Duration(max(1, batches.Load()*rawBatch))
}

// readOne reads one reply; what has arrived of the next one stays.
func (load *rawLoad) readOne(w *wire) error {
	for {
		if end := replyEnd(w.in, load.want); end > 0 {
			w.in = append(w.in[:0], w.in[end:]...)
			return nil
		}
		if len(w.in) == cap(w.in) {
			w.in = append(w.in, make([]byte, 16<<10)...)[:len(w.in)]
		}
		n, err := w.conn.Read(w.in[len(w.in):cap(w.in)])
		if w.in = w.in[:len(w.in)+n]; err != nil {
			return err
		}
	}
}

// replyEnd is where a reply of so many numbers ends, 0 if it has not arrived whole.
func replyEnd(b []byte, want int) int {
	lines := 0
	for i, c := range b {
		if c == '\n' {
			if lines++; lines == want+1 {
				return i + 1
			}
		}
	}
	return 0
}

// allowLoad lets callers call for so long and returns the time for a decision.
func allowLoad(b *testing.B, l *Limiter, keys []string, callers int, turn time.Duration) time.Duration {
	start := time.Now()
	var decided atomic.Int64
	var all sync.WaitGroup
	for c := range callers {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(c), uint64(start.UnixNano())))
			n := int64(0)
			for ; time.Since(start) < turn; n++ {
				d, err := l.Allow(context.Background(), keys[rng.IntN(len(keys))])
				if err != nil || d.Source != SourcePrimary {
					b.Errorf("%+v, %v", d, err)
					break
				}
			}
			decided.Add(n)
		})
	}
	all.Wait()
	return time.Since(start) / time.Duration(max(1, decided.Load()))
}
