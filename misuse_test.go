package ringfence_test

import (
	"errors"
	"testing"

	"github.com/ringfence/ringfence"
)

// wantField wants an error about misuse that names this field.
func wantField(t testing.TB, err error, field string) *ringfence.FieldError {
	t.Helper()
	var f *ringfence.FieldError
	if !errors.Is(err, ringfence.ErrInvalid) || !errors.As(err, &f) || f.Field != field {
		t.Errorf("error %v, want one about %s", err, field)
		return nil
	}
	return f
}
