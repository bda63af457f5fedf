package histories

import (
	"errors"
	"testing"
	"time"

	"github.com/ringfence/ringfence"
)

// Judged by time: see CheckQuota and CheckDenials. Nothing is lost for good, either: at rest
// all quota of a key can be had.
func TestSimulatedLeasesKeepToTheLimitAndLoseNothing(t *testing.T) {
	from, to := seedsOf(t, 8)
	began, entries, by, returned := time.Now(), 0, map[string]int{}, 0.0
	t.Log("embedded redis in memory, in virtual time")
	for seed := from; seed < to; seed++ {
		o := simulateLeases(t, seed, nothing)
		for _, e := range o.events {
			if by[sourceOf(e)]++; sourceOf(e) == ringfence.SourceLease.String() {
				by[sourceOf(e)+" of a "+e.Key.Limiter]++
			}
		}
		entries += len(o.events)
		returned += o.returned
		if to == from+1 {
			t.Logf("history of seed %d:\n%s", seed, o.trace())
		}
		if err := errors.Join(append(o.quotaErrs(), o.broken...)...); err != nil {
			t.Errorf("seed %d: %v\nReplay it: RINGFENCE_SIM_SEED=%d go test -v -run '^%s$' (in internal/histories)", seed, err, seed, t.Name())
		}
	}
	t.Logf("%d seeds, %d entries in %v: %v; %.0f units were returned", to-from, entries, time.Since(began).Round(time.Millisecond), by, returned)
	if to == from+1 {
		return
	}
	for _, kind := range []string{"bucket", "log"} {
		if by["lease of a "+kind] == 0 {
			t.Errorf("no lease of a %s was used", kind)
		}
	}
	if returned == 0 {
		t.Error("nothing was returned")
	}
}

func TestASeedWithLeasesReplays(t *testing.T) {
	t.Log("embedded redis in memory, in virtual time")
	const seed = 2
	first, again := simulateLeases(t, seed, nothing).trace(), simulateLeases(t, seed, nothing).trace()
	if first != again {
		t.Errorf("seed %d went differently the second time. First:\n%s\nThen:\n%s", seed, first, again)
	}
}

func TestPlantedBugsAreCaughtWithLeases(t *testing.T) {
	t.Log("embedded redis in memory, in virtual time")
	for name, c := range map[string]struct {
		bug   plant
		seeds []uint64 // long enough for the bug to show, and short
	}{
		"double charge": {twice, []uint64{4, 6, 7}}, "lost charge": {forget, []uint64{2, 8}}, "FLUSHALL": {flush, []uint64{5}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, seed := range c.seeds {
				if o := simulateLeases(t, seed, c.bug); errors.Join(o.quotaErrs()...) == nil {
					t.Errorf("seed %d: the judge did not notice", seed)
				}
			}
		})
	}
}
