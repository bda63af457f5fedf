package ringfence

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// tallied are the metrics of one limiter and one shard, on a clock that every look at moves
// by one ns and that the test moves besides.
type tallied struct {
	*metrics
	limiter *limiterMetrics
	shard   *shard
	now     atomic.Int64
	looks   atomic.Int64
}

func newTallied(t *testing.T) *tallied {
	t.Helper()
	rule, err := TokenBucket{Rate: 10, Per: time.Second, Burst: 10}.compile()
	if err != nil {
		t.Fatal(err)
	}
	m := &tallied{metrics: newMetrics(Config{Registerer: prometheus.NewRegistry(), LatencyObjective: 5 * time.Millisecond})}
	m.ring = &Ring{}
	m.ring.config.Now = func() time.Time {
		m.looks.Add(1)
		return m.ring.began.Add(time.Duration(m.now.Add(1)))
	}
	m.limiter = m.forLimiter("l", rule)
	m.shard = &shard{id: "a", metrics: m.forShard("a")}
	return m
}

func (m *tallied) gather() {
	m.gatherShard(m.shard.metrics)
	m.gatherLimiter(m.limiter)
}

func valueOf(c prometheus.Counter) float64 {
	var out dto.Metric
	if err := c.Write(&out); err != nil {
		return -1
	}
	return out.GetCounter().GetValue()
}

func TestWhatIsAnsweredHereIsCountedOnceWhateverIsGatheredMeanwhile(t *testing.T) {
	m := newTallied(t)
	const callers, calls = 8, 3000
	answers := []Decision{{Source: SourceCache}, {Source: SourceLease, Allowed: true}, {Source: SourceCache}}
	stop := make(chan struct{})
	var all, scrapes sync.WaitGroup
	for range 2 {
		scrapes.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					m.gather()
				}
			}
		})
	}
	for range callers {
		all.Go(func() {
			for i := range calls {
				d := answers[i%len(answers)]
				m.limiter.decidedHere(m.shard, &d, 1+int64(i%2), m.now.Load(), place())
			}
		})
	}
	all.Wait()
	close(stop)
	scrapes.Wait()
	m.gather()
	const each = callers * calls / 3
	l := m.limiter
	for _, row := range []struct {
		name string
		got  float64
		want float64
	}{
		{"denied by the cache", valueOf(l.decisions[outcomeDenied][SourceCache]), 2 * each},
		{"allowed by leases", valueOf(l.decisions[outcomeAllowed][SourceLease]), each},
		{"denied by leases", valueOf(l.decisions[outcomeDenied][SourceLease]), 0},
		{"hits", valueOf(l.nearHits), 2 * each},
		{"requested", valueOf(l.requested), 3 * each * 3 / 2},
		{"granted", valueOf(l.granted), each * 3 / 2},
		{"events of the latency SLO", valueOf(m.latencyEvents[0]), 3 * each},
		{"events of the availability SLO", valueOf(m.availability[0]), 0},
	} {
		if row.got != row.want {
			t.Errorf("%s: %v, want %v", row.name, row.got, row.want)
		}
	}
	for o, want := range []uint64{each, 2 * each} {
		if got, _ := seen(t, m.shard.metrics.latency[o]); got["count"] != want {
			t.Errorf("%s: %d in the histogram, want %d", outcomeNames[o], got["count"], want)
		}
	}
}

func TestOfAnswersInQuickSuccessionOneIn64IsTimedAndOthersAllAre(t *testing.T) {
	m := newTallied(t)
	denied := func(took time.Duration) {
		start := m.now.Load()
		m.now.Add(int64(took))
		m.limiter.decidedHere(m.shard, &Decision{Source: SourceCache}, 1, start, 0)
	}
	for range 1 + 10*timedCalls {
		denied(100 * time.Nanosecond)
	}
	if n := m.looks.Load(); n != 11 {
		t.Errorf("the clock was looked at %d times for %d answers, want 11", n, 1+10*timedCalls)
	}
	for range 20 {
		m.now.Add(timedEvery)
		denied(300 * time.Microsecond)
	}
	if n := m.looks.Load(); n != 31 {
		t.Errorf("the clock was looked at %d times, want 31", n)
	}
	denied(100 * time.Nanosecond) // not timed: it counts as the last one that was
	m.gather()
	m.gather()
	got, h := seen(t, m.shard.metrics.latency[outcomeDenied])
	if quick, slow := got["le 5e-05"], got["count"]-got["le 0.0003"]; quick != 1+10*timedCalls || slow != 21 {
		t.Errorf("%d quick ones and %d slow ones, want %d and 21", quick, slow, 1+10*timedCalls)
	}
	if sum, want := h.GetSampleSum(), 641*101e-9+21*300.001e-6; sum < want*0.9999 || sum > want*1.0001 {
		t.Errorf("they took %v s, want %v", sum, want)
	}
}

func TestASlowAnswerFromHereIsABadEventOfTheLatencySLO(t *testing.T) {
	m := newTallied(t)
	for _, took := range []time.Duration{time.Millisecond, 6 * time.Millisecond} {
		start := m.now.Load()
		m.now.Add(int64(took))
		m.limiter.decidedHere(m.shard, &Decision{Source: SourceCache}, 1, start, 0)
	}
	m.gather()
	if all, bad := valueOf(m.latencyEvents[0]), valueOf(m.latencyEvents[1]); all != 2 || bad != 1 {
		t.Errorf("%v events and %v bad ones, want 2 and 1", all, bad)
	}
}
