package histories

import (
	"cmp"
	"os"
	"strconv"
	"testing"
	"time"
)

// seedsOf reads which seeds to run: those of RINGFENCE_SIM_SEED (one, to replay it), or as
// many as RINGFENCE_SIM_SEEDS says, or so many.
func seedsOf(t *testing.T, usual uint64) (from, to uint64) {
	t.Helper()
	if one := os.Getenv("RINGFENCE_SIM_SEED"); one != "" {
		n, err := strconv.ParseUint(one, 10, 63)
		if err != nil {
			t.Fatalf("RINGFENCE_SIM_SEED=%s: must be the number of a seed", one)
		}
		return n, n + 1
	}
	many := cmp.Or(os.Getenv("RINGFENCE_SIM_SEEDS"), strconv.FormatUint(usual, 10))
	n, err := strconv.ParseUint(many, 10, 32)
	if err != nil || n == 0 {
		t.Fatalf("RINGFENCE_SIM_SEEDS=%s: must be how many seeds to run", many)
	}
	return 1, n + 1
}

func TestSimulatedHistoriesAreLinearizableAndRingsRecover(t *testing.T) {
	from, to := seedsOf(t, 100)
	began, entries, by := time.Now(), 0, map[string]int{}
	t.Log("embedded redis in memory, in virtual time")
	for seed := from; seed < to; seed++ {
		o := simulate(t, seed, nothing)
		for _, e := range o.events {
			by[sourceOf(e)]++
		}
		entries += len(o.events)
		if to == from+1 {
			t.Logf("history of seed %d:\n%s", seed, o.trace())
		}
		if err := o.err(); err != nil {
			t.Errorf("seed %d: %v\nReplay it: RINGFENCE_SIM_SEED=%d go test -v -run '^%s$' (in internal/histories)", seed, err, seed, t.Name())
		}
	}
	t.Logf("%d seeds, %d entries in %v: %v", to-from, entries, time.Since(began).Round(time.Millisecond), by)
}

// sourceOf sorts the entries for the summary.
func sourceOf(e Event) string {
	switch {
	case e.Kind >= Wipe:
		return e.Kind.String()
	case e.Err != nil:
		return "failed or canceled"
	case e.Kind == Reset:
		return "reset"
	}
	return e.Decision.Source.String()
}

func TestASeedReplays(t *testing.T) {
	t.Log("embedded redis in memory, in virtual time")
	for seed := uint64(1); seed <= 6; seed++ {
		first, again := simulate(t, seed, nothing).trace(), simulate(t, seed, nothing).trace()
		if first != again {
			t.Errorf("seed %d went differently the second time. First:\n%s\nThen:\n%s", seed, first, again)
		}
	}
}

func TestPlantedBugsAreCaughtInTheSimulation(t *testing.T) {
	t.Log("embedded redis in memory, in virtual time")
	for name, bug := range map[string]plant{"double charge": twice, "lost charge": forget, "FLUSHALL": flush} {
		t.Run(name, func(t *testing.T) {
			const seeds = 6
			caught := 0
			for seed := uint64(1); seed <= seeds; seed++ {
				o := simulate(t, seed, bug)
				if len(o.broken) > 0 {
					t.Errorf("seed %d: the bug is in the server, yet the ring broke a promise: %v", seed, o.broken)
				}
				if err := Check(o.events); err != nil {
					caught++
				}
			}
			// A run may be too short for the bug to show.
			if t.Logf("caught in %d of %d seeds", caught, seeds); caught < seeds-1 {
				t.Error("the checker lets too many through")
			}
		})
	}
}
