package redistest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

const day = 24 * time.Hour

// serverMicros asks with TIME.
func serverMicros(t *testing.T, s *Server) int64 {
	t.Helper()
	now, err := s.Client().Time(deadline(t)).Result()
	must(t, err)
	return now.UnixMicro()
}

// scriptMicros asks with TIME inside EVAL, n times in one script.
func scriptMicros(t *testing.T, s *Server, n int) []int64 {
	t.Helper()
	raw, err := s.Client().Eval(deadline(t), `
		local out = {}
		for i = 1, ARGV[1] do
			local now = redis.call('TIME')
			out[i] = now[1] * 1000000 + now[2]
		end
		return out`, nil, n).Int64Slice()
	must(t, err)
	return raw
}

// wantMoved checks that the server's clock is off the real one by offset. The
// real time is read before and after, so that a slow machine cannot fail it.
func wantMoved(t *testing.T, s *Server, offset time.Duration) {
	t.Helper()
	for name, ask := range map[string]func() int64{
		"TIME":         func() int64 { return serverMicros(t, s) },
		"TIME in EVAL": func() int64 { return scriptMicros(t, s, 1)[0] },
	} {
		low := time.Now().Add(offset).UnixMicro()
		got := ask()
		high := time.Now().Add(offset).UnixMicro()
		if got < low || got > high {
			t.Errorf("offset %v: %s is %d, want %d to %d", offset, name, got, low, high)
		}
	}
}

func TestClockWithoutAStepIsReal(t *testing.T) {
	s := Start(t, Options{Clock: true})
	wantMoved(t, s, 0)
	if got := s.ClockOffset(); got != 0 {
		t.Errorf("offset %v", got)
	}
}

func TestStepIsVisibleToTheVeryNextCommand(t *testing.T) {
	s := Start(t, Options{Clock: true})
	var total time.Duration
	for _, d := range []time.Duration{
		time.Microsecond, -time.Microsecond, 999 * time.Microsecond, time.Millisecond, -time.Second,
		30 * time.Second, -time.Hour, time.Hour, 60 * day, -120 * day, 60 * day, -30 * time.Second,
	} {
		must(t, s.Step(d))
		total += d
		wantMoved(t, s, total)
		if got := s.ClockOffset(); got != total {
			t.Errorf("offset %v, want %v", got, total)
		}
	}
	must(t, s.ResetClock())
	wantMoved(t, s, 0)
}

func TestFrozenClockShowsExactlyTheGivenMicrosecond(t *testing.T) {
	s := Start(t, Options{Clock: true})
	const at = 1_795_239_934_123_456
	want := func(us int64) {
		t.Helper()
		if got := serverMicros(t, s); got != us {
			t.Errorf("TIME is %d, want %d", got, us)
		}
		for i, got := range scriptMicros(t, s, 3) {
			if got != us {
				t.Errorf("TIME %d in EVAL is %d, want %d", i, got, us)
			}
		}
	}
	must(t, s.SetMicros(at))
	want(at)
	for _, d := range []time.Duration{time.Microsecond, -2 * time.Microsecond, 60 * day, -60 * day} {
		must(t, s.Step(d))
	}
	want(at - 1)
	must(t, s.Freeze(time.UnixMicro(at).Add(999))) // nanoseconds are dropped
	want(at)
	must(t, s.SetMicros(0))
	want(0)
}

func TestUnfrozenClockRunsOnFromWhereItStood(t *testing.T) {
	s := Start(t, Options{Clock: true})
	at := time.Now().Add(10 * day)
	must(t, s.Freeze(at))
	before := time.Now()
	must(t, s.Unfreeze())
	must(t, s.Unfreeze()) // running already
	first := serverMicros(t, s)
	passed := time.Since(before)
	if since := time.Duration(first-at.UnixMicro()) * time.Microsecond; since < 0 || since > passed+time.Microsecond {
		t.Errorf("%v after the frozen instant, while %v passed", since, passed)
	}
	eventually(t, "the clock runs", func() bool { return serverMicros(t, s) > first })
}

func TestKeysExpireByTheSteppedClock(t *testing.T) {
	ctx := deadline(t)
	s := Start(t, Options{Clock: true})
	must(t, s.Freeze(time.Now()))
	c := s.Client()
	must(t, c.Set(ctx, "k", "v", time.Minute).Err())

	must(t, s.Step(-time.Hour))
	ttl, err := c.PTTL(ctx, "k").Result()
	must(t, err)
	if want := time.Hour + time.Minute; ttl != want {
		t.Errorf("TTL %v after a step back, want %v", ttl, want)
	}
	must(t, s.Step(time.Hour+time.Minute-time.Millisecond))
	ttl, err = c.PTTL(ctx, "k").Result()
	must(t, err)
	if ttl != time.Millisecond {
		t.Errorf("TTL %v, want 1 ms", ttl)
	}
	must(t, s.Step(2*time.Millisecond))
	n, err := c.Exists(ctx, "k").Result()
	must(t, err)
	if n != 0 {
		t.Error("the key outlived its TTL")
	}
}

// readsFresh tells what the doc comment of Step says: up to Redis 7.0 TIME is
// read afresh inside a script, from 7.2 on once per script.
func readsFresh(t *testing.T, s *Server) bool {
	t.Helper()
	info, err := s.Client().Info(deadline(t), "server").Result()
	must(t, err)
	if strings.Contains(info, "valkey_version:") {
		return false
	}
	var major, minor int
	_, after, _ := strings.Cut(info, "redis_version:")
	if _, err := fmt.Sscanf(after, "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major < 7 || major == 7 && minor < 2
}

func TestScriptSeesAStepWhileItRunsOnRedis70(t *testing.T) {
	ctx := deadline(t)
	s := Start(t, Options{Clock: true})
	must(t, s.Client().Ping(ctx).Err())
	done := make(chan error, 1)
	var first, last int64
	go func() {
		got, err := s.Client().Eval(ctx, `
			local function now() local t = redis.call('TIME') return t[1] * 1000000 + t[2] end
			redis.call('SET', 'started', 1)
			local first, last = now(), 0
			for i = 1, 300000 do
				last = now()
				if last - first > 1000000000 then break end
			end
			return {first, last}`, nil).Int64Slice()
		if err == nil {
			first, last = got[0], got[1]
		}
		done <- err
	}()
	// The script is under way, or not yet: then step again, always forward.
	var err error
	for stepped := false; !stepped; {
		select {
		case err = <-done:
			stepped = true
		case <-time.After(20 * time.Millisecond):
			must(t, s.Step(time.Hour))
		}
	}
	must(t, err)
	if saw, fresh := last-first > 1_000_000_000, readsFresh(t, s); saw != fresh {
		t.Errorf("saw the step: %v; reads afresh: %v", saw, fresh)
	}
}

func TestKeyDoesNotExpireWhileItsScriptRuns(t *testing.T) {
	s := Start(t, Options{Clock: true})
	got, err := s.Client().Eval(deadline(t), `
		redis.call('SET', 'k', 1, 'PX', 1)
		for i = 1, 30000 do redis.call('TIME') end
		return redis.call('EXISTS', 'k')`, nil).Int()
	must(t, err)
	if got != 1 {
		t.Error("the key expired inside the script")
	}
	eventually(t, "the key expires afterwards", func() bool {
		n, err := s.Client().Exists(deadline(t), "k").Result()
		return err == nil && n == 0
	})
}

func TestClockKeepsItsSettingOverRestart(t *testing.T) {
	s := Start(t, Options{Clock: true})
	must(t, s.Step(42*day))
	must(t, s.Restart(deadline(t)))
	wantMoved(t, s, 42*day)
}

func TestStepsFromManyGoroutinesAddUp(t *testing.T) {
	s := Start(t, Options{Clock: true})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				if err := s.Step(time.Second); err != nil {
					t.Error(err)
				}
				_ = s.Client().Time(context.Background()).Err()
			}
		})
	}
	wg.Wait()
	wantMoved(t, s, 800*time.Second)
}

func TestClockOfAServerWithoutShimIsAnErrorAndFailsTheTest(t *testing.T) {
	tb := &fakeTB{}
	s := Start(tb, Options{})
	defer tb.finish()
	calls := map[string]func() error{
		"step":     func() error { return s.Step(time.Second) },
		"freeze":   func() error { return s.Freeze(time.Now()) },
		"set":      func() error { return s.SetMicros(1) },
		"unfreeze": s.Unfreeze,
		"reset":    s.ResetClock,
	}
	for name, call := range calls {
		if err := call(); !errors.Is(err, ErrNoClock) {
			t.Errorf("%s: %v, want ErrNoClock", name, err)
		}
	}
	if len(tb.failures) != len(calls) {
		t.Errorf("%d failures, want %d", len(tb.failures), len(calls))
	}
	if got := s.ClockOffset(); got != 0 {
		t.Errorf("offset %v", got)
	}
}

func TestImpossibleClockSettingsAreRefused(t *testing.T) {
	s, err := Launch(deadline(t), Options{Clock: true})
	must(t, err)
	wantError(t, s.Step(time.Nanosecond), "whole number of microseconds")
	wantError(t, s.SetMicros(-1), "before 1970")
	wantError(t, s.SetMicros(maxMicros+1), "out of range")
	must(t, s.SetMicros(5))
	wantError(t, s.Step(-time.Second), "out of range")
	if got := serverMicros(t, s); got != 5 {
		t.Errorf("a refused setting moved the clock to %d", got)
	}
	s.Stop()
	wantError(t, s.Step(time.Second), "stopped")
	_ = s.ClockOffset()
}

func TestSettingSurvivesPacking(t *testing.T) {
	for _, us := range []int64{0, 1, -1, 1_795_239_934_123_456, maxMicros, -maxMicros} {
		for _, frozen := range []bool{false, true} {
			v := setting{frozen: frozen, micros: us}
			if got := settingOf(v.word()); got != v {
				t.Errorf("%+v became %+v", v, got)
			}
		}
	}
}
