package httplimit

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"github.com/ringfence/ringfence"
)

// Limiter is the part of *ringfence.Limiter this package needs. Implementations
// must be safe for concurrent use. Name and Limit are read once, by [New].
type Limiter interface {
	// AllowN charges cost units to key, or denies and charges nothing. Its error
	// means that the call was wrong or that ctx is done, never a denial.
	AllowN(ctx context.Context, key string, cost int64) (ringfence.Decision, error)
	// Name is the policy's name in the header fields: [a-z0-9_.-], 1 to 64 bytes.
	Name() string
	// Limit is the rule, for the numbers in the header fields.
	Limit() ringfence.Limit
}

// KeyFunc says whom a request is charged to. An error, or an empty key, goes to
// the handler of [WithOnError] wrapped in a [*KeyError]: the request is neither
// let through uncharged nor charged to a key shared with others. It is called
// from many goroutines at once.
//
// A key made from something the client chooses freely (a header, a query
// parameter) does not limit a client that changes it; use what has been
// authenticated, or the address ([ClientIP.Key]).
type KeyFunc func(*http.Request) (string, error)

// CostFunc says how many units a request costs: 1 or more, and no more than the
// limit can ever have at once. Less than 1 goes to the handler of [WithOnError]
// as ErrCost; to exempt a request use [WithSkip]. It is called from many
// goroutines at once.
type CostFunc func(*http.Request) int64

// DeniedFunc answers a denied request. All header fields, Retry-After included,
// have been set by then; the status has not. d.Source and d.Cause say whether
// the quota is used up or a policy denied because nobody knew. It is called from
// many goroutines at once.
type DeniedFunc func(w http.ResponseWriter, r *http.Request, d ringfence.Decision)

// ErrorFunc answers a request about which no decision was made. [ErrorStatus]
// gives the status the default one uses. The error may quote the key: do not
// show it to the client. It is called from many goroutines at once.
type ErrorFunc func(w http.ResponseWriter, r *http.Request, err error)

// The errors callers can test for with errors.Is.
var (
	// ErrNoKey: the key function returned an empty key and no error.
	ErrNoKey = errors.New("httplimit: the key function returned an empty key")
	// ErrCost: the cost function returned less than 1.
	ErrCost = errors.New("httplimit: the cost function returned less than 1")
)

// KeyError wraps what went wrong in a key function, ErrNoKey included.
type KeyError struct {
	// Err is the key function's error; never nil.
	Err error
}

// Error returns the text of Err after what failed.
func (e *KeyError) Error() string { return "httplimit: key: " + e.Err.Error() }

// Unwrap returns Err.
func (e *KeyError) Unwrap() error { return e.Err }

// Option changes what [New] builds. An invalid one makes New return an error.
type Option func(*middleware) error

// WithCost charges every request what cost says, instead of 1. Header numbers
// are then in the same units; see [WithQuotaUnit]. nil is an error.
func WithCost(cost CostFunc) Option {
	return func(m *middleware) error {
		if cost == nil {
			return errors.New("httplimit: WithCost: the function is nil")
		}
		m.cost = cost
		return nil
	}
}

// WithSkip exempts the requests for which skip returns true, such as health
// checks: nothing is charged and no header field is set. nil is an error.
func WithSkip(skip func(*http.Request) bool) Option {
	return func(m *middleware) error {
		if skip == nil {
			return errors.New("httplimit: WithSkip: the function is nil")
		}
		m.skip = skip
		return nil
	}
}

// WithHeaders chooses the families of header fields. The default is
// HeadersStandard alone: X-RateLimit-Reset is delta seconds to some clients and a
// Unix time to others, so sending it is for somebody to decide who knows the
// clients. An unknown bit is an error.
func WithHeaders(h Headers) Option {
	return func(m *middleware) error {
		if h&^headersAll != 0 {
			return fmt.Errorf("httplimit: WithHeaders(%d): unknown family", h)
		}
		m.send = h
		return nil
	}
}

// WithQuotaUnit sends unit as the parameter qu of RateLimit-Policy: what q counts
// when it is not requests. The draft names "content-bytes" and
// "concurrent-requests". Letters a-z, digits and '-', 1 to 64 bytes; anything
// else is an error. Default: no qu, which means requests.
func WithQuotaUnit(unit string) Option {
	return func(m *middleware) error {
		if !spelled(unit, "-") {
			return fmt.Errorf("httplimit: WithQuotaUnit(%.80q): want 1 to 64 of a-z, 0-9 and -", unit)
		}
		m.unit = unit
		return nil
	}
}

// WithOnDenied answers denied requests with f instead of the default: status 429
// and a problem document (RFC 9457) of the draft's type quota-exceeded, or of its
// type temporary-reduced-capacity when a policy denied (Decision.Source is
// SourcePolicy), for then nobody knows whether the client's quota is used up.
// That is 429 too and not 503: load balancers take servers out that answer 503,
// which is no help while Redis is away. nil is an error.
func WithOnDenied(f DeniedFunc) Option {
	return func(m *middleware) error {
		if f == nil {
			return errors.New("httplimit: WithOnDenied: the function is nil")
		}
		m.onDenied = f
		return nil
	}
}

// WithOnError answers requests about which no decision was made with f instead
// of the default: the status of [ErrorStatus] and a problem document that does
// not quote the error. f is not called when the request was canceled. nil is an
// error.
func WithOnError(f ErrorFunc) Option {
	return func(m *middleware) error {
		if f == nil {
			return errors.New("httplimit: WithOnError: the function is nil")
		}
		m.onError = f
		return nil
	}
}

// New returns a middleware that limits every request by l, charged to what key
// returns. l and key are required. It returns an error for a missing or invalid
// argument, name, limit or option. The middleware holds no state of its own and
// may wrap any number of handlers; it and the handlers it returns are safe for
// concurrent use. It panics when given a nil handler, as http.Handle does.
//
// When the request's context has been canceled while the limiter was deciding,
// nothing is written at all: the client is gone. (net/http then notes an empty
// 200 that nobody receives; a logger should look at r.Context().Err().) A
// deadline that has passed is another matter, because net/http sets none: some
// middleware did, its client may well be waiting, and an empty 200 would look
// like success. It goes to the handler of [WithOnError], by default as 503.
func New(l Limiter, key KeyFunc, opts ...Option) (func(http.Handler) http.Handler, error) {
	if l == nil {
		return nil, errors.New("httplimit: New: the limiter is nil")
	}
	if key == nil {
		return nil, errors.New("httplimit: New: the key function is nil; say who is limited, for example with ClientIP.Key")
	}
	m := &middleware{limiter: l, key: key, send: HeadersStandard, onError: writeError}
	for i, opt := range opts {
		if opt == nil {
			return nil, fmt.Errorf("httplimit: New: option %d is nil", i)
		}
		if err := opt(m); err != nil {
			return nil, err
		}
	}
	name, limit := l.Name(), l.Limit()
	if !spelled(name, "_.-") {
		return nil, fmt.Errorf("httplimit: New: limiter name %.80q: want 1 to 64 of a-z, 0-9, _, . and -", name)
	}
	if limit == nil {
		return nil, fmt.Errorf("httplimit: New: limiter %q has no limit", name)
	}
	if err := limit.Validate(); err != nil {
		return nil, fmt.Errorf("httplimit: New: limiter %q: %w", name, err)
	}
	m.fields = newFields(name, limit, m.unit, m.send)
	if m.onDenied == nil {
		m.onDenied = newWriteDenied(name)
	}
	return func(next http.Handler) http.Handler {
		if next == nil {
			panic("httplimit: nil handler")
		}
		return &handler{m, next}
	}, nil
}

// spelled reports whether s is 1 to 64 of a-z, 0-9 and the bytes of more. Such a
// string needs no escaping in a header field or in JSON.
func spelled(s, more string) bool {
	if len(s) < 1 || len(s) > 64 {
		return false
	}
next:
	for i := range len(s) {
		c := s[i]
		if 'a' <= c && c <= 'z' || '0' <= c && c <= '9' {
			continue
		}
		for j := range len(more) {
			if c == more[j] {
				continue next
			}
		}
		return false
	}
	return true
}

type middleware struct {
	limiter  Limiter
	key      KeyFunc
	cost     CostFunc                 // nil: 1
	skip     func(*http.Request) bool // nil: none
	send     Headers
	unit     string
	fields   fields
	onDenied DeniedFunc
	onError  ErrorFunc
}

type handler struct {
	*middleware
	next http.Handler
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.skip != nil && h.skip(r) {
		h.next.ServeHTTP(w, r)
		return
	}
	d, err := h.decide(r)
	if err != nil {
		if !gone(r.Context(), err) {
			h.onError(w, r, err)
		}
		return
	}
	h.fields.write(w.Header(), d)
	if d.Allowed {
		h.next.ServeHTTP(w, r)
		return
	}
	w.Header().Set("Retry-After", strconv.FormatInt(seconds(d.RetryAfter), 10))
	h.onDenied(w, r, d)
}

func (m *middleware) decide(r *http.Request) (ringfence.Decision, error) {
	key, err := m.key(r)
	if err == nil && key == "" {
		err = ErrNoKey
	}
	if err != nil {
		return ringfence.Decision{}, &KeyError{Err: err}
	}
	cost := int64(1)
	if m.cost != nil {
		if cost = m.cost(r); cost < 1 {
			return ringfence.Decision{}, fmt.Errorf("%w: %d", ErrCost, cost)
		}
	}
	return m.limiter.AllowN(r.Context(), key, cost)
}

// gone reports whether err came about because the request was canceled.
func gone(ctx context.Context, err error) bool {
	return errors.Is(ctx.Err(), context.Canceled) &&
		(errors.Is(err, context.Canceled) || errors.Is(err, context.Cause(ctx)))
}

// ErrorStatus returns the HTTP status the default error handler answers with:
//
//   - 503 for a deadline that has passed and a ring that has been closed;
//   - 500 where the server is set up wrongly or the program is at fault: a cost
//     below 1, a peer without an IP address ([ErrNoAddr]), an invalid [ClientIP],
//     and every error not in this list;
//   - 400 for any other failure of the key function, an empty key included, as the
//     request lacks what identifies its sender;
//   - 400 for ringfence.ErrInvalid from the limiter: a key that is too long, a cost
//     the limit can never admit.
//
// For a nil error it returns 200.
func ErrorStatus(err error) int {
	var keyErr *KeyError
	switch {
	case err == nil:
		return http.StatusOK
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, ringfence.ErrClosed):
		return http.StatusServiceUnavailable
	case errors.Is(err, ErrCost), errors.Is(err, ErrNoAddr), errors.Is(err, errClientIP):
		return http.StatusInternalServerError
	case errors.As(err, &keyErr), errors.Is(err, ringfence.ErrInvalid):
		return http.StatusBadRequest
	}
	return http.StatusInternalServerError
}

func writeError(w http.ResponseWriter, _ *http.Request, err error) {
	status := ErrorStatus(err)
	writeProblem(w, status, []byte(`{"title":"`+http.StatusText(status)+`","status":`+strconv.Itoa(status)+"}\n"))
}

// newWriteDenied builds both documents once; name needs no escaping.
func newWriteDenied(name string) DeniedFunc {
	const types = "https://iana.org/assignments/http-problem-types#"
	rest := `,"status":429,"violated-policies":["` + name + `"]}` + "\n"
	exceeded := []byte(`{"type":"` + types + `quota-exceeded","title":"Quota Exceeded"` + rest)
	reduced := []byte(`{"type":"` + types + `temporary-reduced-capacity","title":"Temporary Reduced Capacity"` + rest)
	return func(w http.ResponseWriter, _ *http.Request, d ringfence.Decision) {
		body := exceeded
		if d.Source == ringfence.SourcePolicy {
			body = reduced
		}
		writeProblem(w, http.StatusTooManyRequests, body)
	}
}

func writeProblem(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("Cache-Control", "no-store") // RFC 6585: a 429 must not be stored
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write(body) // the client may be gone, and there is nobody else to tell
}
