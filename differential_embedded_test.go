package ringfence_test

import (
	"testing"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/embedded"
)

func runOnEmbedded(t *testing.T, public bool) {
	t.Helper()
	s, err := embedded.Start(1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	shard := s.Config()[0]
	t.Logf("embedded redis %s", shard.Primary)
	ringfence.RunDifferentialOnEmbedded(t, shard, func(at time.Time) {
		if err := s.SetTime(0, at); err != nil {
			t.Error(err)
		}
	}, public)
}

func TestScriptsOnTheEmbeddedServerAgreeWithTheReferee(t *testing.T) { runOnEmbedded(t, false) }

func TestPublicAPIOnTheEmbeddedServerAgreesWithTheReferee(t *testing.T) { runOnEmbedded(t, true) }
