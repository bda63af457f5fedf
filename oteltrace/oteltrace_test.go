package oteltrace_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/codes"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/embedded"
	"github.com/ringfence/ringfence/internal/redistest"
	"github.com/ringfence/ringfence/oteltrace"
)

const secretKey = "user:somebody-7f3a"

// traced is a ring whose spans are kept.
type traced struct {
	ring     *ringfence.Ring
	limiter  *ringfence.Limiter
	spans    *tracetest.SpanRecorder
	provider *sdk.TracerProvider
}

func open(t testing.TB) *traced {
	t.Helper()
	shards, err := embedded.Start(2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = shards.Close() })
	for i := range 2 {
		addr, err := shards.Addr(i)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("embedded redis %s", addr)
	}
	x := &traced{spans: tracetest.NewSpanRecorder()}
	x.provider = sdk.NewTracerProvider(sdk.WithSpanProcessor(x.spans))
	observer, err := oteltrace.New(x.provider)
	if err != nil {
		t.Fatal(err)
	}
	redistest.NoLeaks(t)
	x.ring, err = ringfence.Open(context.Background(), ringfence.Config{
		Shards: shards.Config(), Observers: []ringfence.Observer{observer}, Logger: slog.New(slog.DiscardHandler),
		Policy: ringfence.PolicyClosed, Budget: 5 * time.Second, OperationTimeout: 5 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = x.ring.Close() })
	if x.limiter, err = x.ring.Limiter("api", ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 5}); err != nil {
		t.Fatal(err)
	}
	return x
}

// last is the newest span, its attributes as text.
func (x *traced) last(t *testing.T) (sdk.ReadOnlySpan, map[string]string) {
	t.Helper()
	all := x.spans.Ended()
	if len(all) == 0 {
		t.Fatal("no span")
	}
	span := all[len(all)-1]
	got := map[string]string{}
	for _, a := range span.Attributes() {
		got[string(a.Key)] = a.Value.Emit()
	}
	return span, got
}

func wantAttributes(t *testing.T, got, want map[string]string) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("attributes %v, want %v", got, want)
	}
}

func TestEveryCallIsOneSpanBelowTheCallersOwn(t *testing.T) {
	x := open(t)
	ctx, parent := x.provider.Tracer("test").Start(context.Background(), "request")
	before := time.Now()
	d, err := x.limiter.AllowN(ctx, secretKey, 4)
	after := time.Now()
	if err != nil || !d.Allowed {
		t.Fatal(d, err)
	}
	span, got := x.last(t)
	wantAttributes(t, got, map[string]string{"ringfence.limit": "api", "ringfence.outcome": "allowed", "ringfence.cost": "4", "ringfence.shard_id": d.Shard, "ringfence.source": "primary"})
	if span.Name() != "ringfence.allow" || span.Parent().SpanID() != parent.SpanContext().SpanID() || span.SpanContext().TraceID() != parent.SpanContext().TraceID() {
		t.Errorf("%s is below %s of trace %s", span.Name(), span.Parent().SpanID(), span.SpanContext().TraceID())
	}
	if span.StartTime().Before(before.Add(-time.Millisecond)) || span.EndTime().After(after.Add(time.Millisecond)) || !span.EndTime().After(span.StartTime()) {
		t.Errorf("the span is from %s to %s, the call from %s to %s", span.StartTime(), span.EndTime(), before, after)
	}

	if d, err = x.limiter.AllowN(ctx, secretKey, 4); err != nil || d.Allowed {
		t.Fatal(d, err)
	}
	span, got = x.last(t)
	if got["ringfence.outcome"] != "denied" || span.Status().Code != codes.Unset {
		t.Errorf("denied: %v, status %v", got, span.Status())
	}

	if err := x.ring.ForceBreaker(d.Shard, ringfence.BreakerForcedOpen); err != nil {
		t.Fatal(err)
	}
	if _, err = x.limiter.Allow(ctx, secretKey); err != nil {
		t.Fatal(err)
	}
	_, got = x.last(t)
	wantAttributes(t, got, map[string]string{"ringfence.limit": "api", "ringfence.outcome": "denied", "ringfence.cost": "1", "ringfence.shard_id": d.Shard, "ringfence.source": "policy", "ringfence.cause": "breaker"})
	if n := len(x.spans.Ended()); n != 3 {
		t.Errorf("%d spans of 3 calls", n)
	}
}

func TestABatchIsOneSpanWithCounts(t *testing.T) {
	x := open(t)
	reqs := []ringfence.Request{{Key: secretKey, Cost: 3}, {Key: secretKey, Cost: 3}, {Key: "b", Cost: 1}}
	many, err := x.limiter.AllowMany(context.Background(), reqs)
	if err != nil {
		t.Fatal(err)
	}
	span, got := x.last(t)
	wantAttributes(t, got, map[string]string{"ringfence.limit": "api", "ringfence.outcome": "mixed", "ringfence.cost": "7", "ringfence.entries": "3", "ringfence.allowed": "2", "ringfence.denied": "1"})
	if span.Name() != "ringfence.allow_many" || len(x.spans.Ended()) != 1 {
		t.Errorf("%s, %d spans", span.Name(), len(x.spans.Ended()))
	}
	if err := x.ring.ForceBreaker(many[0].Shard, ringfence.BreakerForcedOpen); err != nil {
		t.Fatal(err)
	}
	if _, err := x.limiter.AllowMany(context.Background(), reqs[:1]); err != nil {
		t.Fatal(err)
	}
	_, got = x.last(t)
	wantAttributes(t, got, map[string]string{"ringfence.limit": "api", "ringfence.outcome": "denied", "ringfence.cost": "3", "ringfence.entries": "1", "ringfence.allowed": "0", "ringfence.denied": "1", "ringfence.fallbacks": "1"})
}

func TestRefusedCallsAreSpansToo(t *testing.T) {
	x := open(t)
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := x.limiter.Allow(canceled, secretKey)
	span, got := x.last(t)
	if !errors.Is(err, context.Canceled) || got["ringfence.outcome"] != "canceled" || span.Status().Code != codes.Unset {
		t.Errorf("canceled: %v, %v, %v", err, got, span.Status())
	}
	_, err = x.limiter.AllowMany(context.Background(), []ringfence.Request{{Key: secretKey, Cost: 1}, {Key: secretKey, Cost: 99}})
	span, got = x.last(t)
	wantAttributes(t, got, map[string]string{"ringfence.limit": "api", "ringfence.outcome": "error", "error.type": "invalid", "ringfence.entries": "2"})
	if err == nil || span.Status().Code != codes.Error || span.Name() != "ringfence.allow_many" {
		t.Errorf("misuse: %v, %v", err, span.Status())
	}
	if err := x.ring.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = x.limiter.Allow(context.Background(), secretKey)
	if _, got = x.last(t); err == nil || got["error.type"] != "closed" {
		t.Errorf("closed: %v, %v", err, got)
	}
}

func TestNoSpanHoldsAKey(t *testing.T) {
	x := open(t)
	ctx := context.Background()
	_, _ = x.limiter.Allow(ctx, secretKey)
	_, _ = x.limiter.AllowN(ctx, secretKey, -1)
	_, _ = x.limiter.Allow(ctx, strings.Repeat(secretKey, 100))
	_, _ = x.limiter.AllowMany(ctx, []ringfence.Request{{Key: secretKey, Cost: 1}, {Key: secretKey, Cost: 0}})
	_, redisKey := x.limiter.Locate(secretKey)
	if n := len(x.spans.Ended()); n != 4 {
		t.Fatalf("%d spans of 4 calls", n)
	}
	for _, s := range tracetest.SpanStubsFromReadOnlySpans(x.spans.Ended()) {
		if text := fmt.Sprintf("%+v", s); strings.Contains(text, "somebody") || strings.Contains(text, redisKey) {
			t.Errorf("a span holds a key: %s", text)
		}
	}
}

func TestNewNeedsAProvider(t *testing.T) {
	if o, err := oteltrace.New(nil); o != nil || !errors.Is(err, oteltrace.ErrNoProvider) {
		t.Errorf("%v, %v", o, err)
	}
}

// What the observer adds to a call: a tracer that records nothing, and the SDK's recording
// every span and giving it to nobody.
func BenchmarkObserve(b *testing.B) {
	observation := ringfence.Observation{Limiter: "api", Entries: 1, Cost: 1, Took: time.Millisecond,
		Decision: ringfence.Decision{Allowed: true, Source: ringfence.SourcePrimary, Shard: "a"}}
	run := func(name string, o ringfence.Observer, err error) {
		b.Run(name, func(b *testing.B) {
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				o.Observe(context.Background(), observation)
			}
		})
	}
	o, err := oteltrace.New(noop.NewTracerProvider())
	run("noop", o, err)
	o, err = oteltrace.New(sdk.NewTracerProvider(sdk.WithSampler(sdk.NeverSample())))
	run("never-sampled", o, err)
	o, err = oteltrace.New(sdk.NewTracerProvider(sdk.WithSampler(sdk.AlwaysSample())))
	run("recorded", o, err)
}
