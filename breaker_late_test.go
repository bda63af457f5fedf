package ringfence

import (
	"errors"
	"testing"
	"time"
)

func TestALateResultDoesNotKeepTheBreakerFromProbing(t *testing.T) {
	now := time.Unix(1000, 0)
	config, err := BreakerConfig{}.withDefaults("Breaker")
	if err != nil {
		t.Fatal(err)
	}
	config.OpenPeriod, config.MaxOpenPeriod = time.Hour, time.Hour // no timer fires in this test
	b := newBreaker(config, func() time.Time { return now }, func() uint64 { return 0 },
		func() {}, func(_, _ BreakerState) {})
	defer b.close()
	fault := errors.New("refused")
	var reports []func(error)
	for range config.Failures + 1 {
		report, err := b.begin()
		if err != nil {
			t.Fatal(err)
		}
		reports = append(reports, report)
	}
	for _, report := range reports {
		report(fault)
	}
	if got := b.stats(); got.State != BreakerOpen || got.Failures != uint64(config.Failures)+1 {
		t.Fatalf("after the failures: %+v", got)
	}
	now = now.Add(time.Hour)
	report, err := b.beginProbe()
	if err != nil {
		t.Fatalf("no probe: %v; the state is %s", err, b.stats().State)
	}
	report(nil)
	if got := b.stats().State; got != BreakerClosed {
		t.Errorf("after a good probe the breaker is %s", got)
	}
}
