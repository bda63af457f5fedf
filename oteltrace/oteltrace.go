// Package oteltrace makes an OpenTelemetry span of every call of a limiter.
//
//	observer, err := oteltrace.New(otel.GetTracerProvider())
//	...
//	ring, err := ringfence.Open(ctx, ringfence.Config{Observers: []ringfence.Observer{observer}, ...})
//
// The span "ringfence.allow", of kind internal, has the caller's span as its parent and
// these attributes:
//
//	ringfence.limit      the name of the limiter
//	ringfence.outcome    allowed, denied, error or canceled; mixed for a batch of both
//	ringfence.cost       units asked for
//	ringfence.shard_id   the shard that owns the key
//	ringfence.source     who answered: primary, replica, local, policy ...
//	ringfence.cause      why it was not the primary; absent when it was
//	error.type           invalid or closed, for a call that was refused
//
// An AllowMany is one span, "ringfence.allow_many", with ringfence.entries,
// ringfence.allowed, ringfence.denied and, when not all of its entries were answered by
// primaries, ringfence.fallbacks in place of shard, source and cause.
//
// The key is in none of them, nor is the text of an error. That is why go-redis's own
// instrumentation, redisotel, is not what to use here: it records statements, unless told
// not to, and a script's keys are in them; and it sees operations, which carry the calls
// of many callers, not calls.
//
// A denied call is no error; only misuse and a closed ring set the span's status to Error.
package oteltrace

import (
	"context"
	"errors"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/ringfence/ringfence"
)

const scope = "github.com/ringfence/ringfence/oteltrace"

// The attributes of a span.
const (
	limitKey     = attribute.Key("ringfence.limit")
	outcomeKey   = attribute.Key("ringfence.outcome")
	costKey      = attribute.Key("ringfence.cost")
	shardKey     = attribute.Key("ringfence.shard_id")
	sourceKey    = attribute.Key("ringfence.source")
	causeKey     = attribute.Key("ringfence.cause")
	entriesKey   = attribute.Key("ringfence.entries")
	allowedKey   = attribute.Key("ringfence.allowed")
	deniedKey    = attribute.Key("ringfence.denied")
	fallbacksKey = attribute.Key("ringfence.fallbacks")
	errorKey     = attribute.Key("error.type")
)

// ErrNoProvider says that New was given nil.
var ErrNoProvider = errors.New("oteltrace: the TracerProvider is nil; give otel.GetTracerProvider()")

// New returns an Observer for ringfence.Config.Observers. Which calls are recorded is the
// sampler's decision; without a recorded span no attributes are made. It is safe for
// concurrent use if the provider is, as those of OpenTelemetry are.
func New(p trace.TracerProvider) (ringfence.Observer, error) {
	if p == nil {
		return nil, ErrNoProvider
	}
	return &observer{tracer: p.Tracer(scope)}, nil
}

type observer struct{ tracer trace.Tracer }

// Observe implements ringfence.Observer.
func (t *observer) Observe(ctx context.Context, o ringfence.Observation) {
	end := time.Now()
	name := "ringfence.allow"
	if o.Many != nil || o.Entries > 1 {
		name = "ringfence.allow_many"
	}
	_, span := t.tracer.Start(ctx, name, trace.WithSpanKind(trace.SpanKindInternal), trace.WithTimestamp(end.Add(-o.Took)))
	if span.IsRecording() {
		describe(span, o)
	}
	span.End(trace.WithTimestamp(end))
}

func describe(span trace.Span, o ringfence.Observation) {
	span.SetAttributes(limitKey.String(o.Limiter))
	switch {
	case o.Err != nil:
		span.SetAttributes(entriesKey.Int(o.Entries))
		refused(span, o.Err)
	case o.Many != nil:
		batch(span, o)
	default:
		d := o.Decision
		span.SetAttributes(outcomeKey.String(outcome(d.Allowed)), costKey.Int64(o.Cost), shardKey.String(d.Shard), sourceKey.String(d.Source.String()))
		if d.Cause != ringfence.CauseNone {
			span.SetAttributes(causeKey.String(d.Cause.String()))
		}
	}
}

func refused(span trace.Span, err error) {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		span.SetAttributes(outcomeKey.String("canceled"))
		return
	}
	// Not err's text: it quotes what the caller gave.
	kind := "invalid"
	if errors.Is(err, ringfence.ErrClosed) {
		kind = "closed"
	}
	span.SetAttributes(outcomeKey.String("error"), errorKey.String(kind))
	span.SetStatus(codes.Error, kind)
}

func batch(span trace.Span, o ringfence.Observation) {
	allowed, fallbacks := 0, 0
	for _, d := range o.Many {
		if d.Allowed {
			allowed++
		}
		if d.Cause != ringfence.CauseNone {
			fallbacks++
		}
	}
	what := "mixed"
	if allowed == 0 || allowed == len(o.Many) {
		what = outcome(allowed > 0)
	}
	span.SetAttributes(outcomeKey.String(what), costKey.Int64(o.Cost), entriesKey.Int(o.Entries), allowedKey.Int(allowed), deniedKey.Int(len(o.Many)-allowed))
	if fallbacks > 0 {
		span.SetAttributes(fallbacksKey.Int(fallbacks))
	}
}

func outcome(allowed bool) string {
	if allowed {
		return "allowed"
	}
	return "denied"
}
