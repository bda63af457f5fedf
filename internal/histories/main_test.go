package histories

import (
	"testing"

	"go.uber.org/goleak"
)

// TestMain fails the run when anything outlives the rings that were closed. In a bubble of
// virtual time the bubble itself sees to that.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
