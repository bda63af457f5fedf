//go:build !linux

package redistest

import (
	"context"
	"errors"
)

// clock exists on Linux only: elsewhere newClock refuses and no method is ever
// called.
type clock struct{}

func newClock(context.Context, string) (*clock, error) {
	return nil, errors.New("redistest: the clock shim needs 64-bit Linux; leave Options.Clock unset")
}

func (*clock) environ() []string                           { return nil }
func (*clock) attached() bool                              { return false }
func (*clock) change(func(setting) (setting, error)) error { return ErrNoClock }
func (*clock) get() setting                                { return setting{} }
func (*clock) frozen() bool                                { return false }
func (*clock) close()                                      {}
