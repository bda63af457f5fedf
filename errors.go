package ringfence

import (
	"errors"
	"fmt"
)

// The errors callers can test for with errors.Is. A Redis fault is not among
// them for Allow, AllowN, AllowMany and Peek: it is a Source and a Cause.
var (
	// ErrClosed: the ring has been closed.
	ErrClosed = errors.New("ringfence: the ring is closed")
	// ErrInvalid: an argument, a limit or the configuration is wrong. The error
	// that wraps it names the field and the value; see FieldError.
	ErrInvalid = errors.New("ringfence: invalid")
	// ErrUnavailable: Reset could not be done, or nobody knows whether it was,
	// because the shard did not answer. Silent success would be a lie.
	ErrUnavailable = errors.New("ringfence: the shard is unavailable")
	// ErrUnreachable: Open with Config.Strict found shards it could not reach or
	// that are too old.
	ErrUnreachable = errors.New("ringfence: shards unreachable")
)

// FieldError names what was wrong, the value it had and what to do. It matches
// ErrInvalid with errors.Is.
type FieldError struct {
	// Field is the name of the argument or field, as in "Config.Shards[1].ID".
	Field string
	// Value is the value it had, shortened where it is long.
	Value string
	// Fix says which values are accepted.
	Fix string
}

// Error returns the three parts in one line.
func (e *FieldError) Error() string {
	return fmt.Sprintf("ringfence: %s = %s: %s", e.Field, e.Value, e.Fix)
}

// Unwrap returns ErrInvalid.
func (e *FieldError) Unwrap() error { return ErrInvalid }

// verbatim is a value that is described, not quoted: nil, or the length of a secret.
type verbatim string

func invalid(field string, value any, fix string, args ...any) error {
	var v string
	switch x := value.(type) {
	case string:
		v = fmt.Sprintf("%q", shorten(x))
	default:
		v = shorten(fmt.Sprint(x))
	}
	return &FieldError{Field: field, Value: v, Fix: fmt.Sprintf(fix, args...)}
}

// shorten keeps an error readable when somebody passes a key of a megabyte.
func shorten(s string) string {
	const most = 64
	if len(s) <= most {
		return s
	}
	return s[:most] + fmt.Sprintf("... (%d bytes)", len(s))
}
