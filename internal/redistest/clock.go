package redistest

import (
	"errors"
	"fmt"
	"time"
)

// ErrNoClock says that the server was started on the real clock.
var ErrNoClock = errors.New("the server runs on the real clock; start it with Options{Clock: true}")

// maxMicros bounds what the clock may show and how far it may be moved: the
// year 4253. Redis itself multiplies seconds by a million in places.
const maxMicros = int64(1) << 56

// Step moves the server's wall clock by d, forward or back; on a frozen clock it
// moves the frozen instant. d must be whole microseconds. The next command sees
// it. The monotonic clock is untouched.
//
// Like all clock methods it returns an error if the clock cannot be moved as
// asked. On a server made by [Start] that error has already failed the test, so
// a test need not look at it.
//
// On Redis 7.0 TIME is read afresh each time, by a client and inside a script
// alike: two calls of redis.call('TIME') in one script may differ, and a step
// is seen even by a script that is running. (Redis 7.2 and later read the clock
// once per command, or once per script.) Expiry does not work that way: whether
// a key has expired is decided by an instant that Redis notes when the command,
// or the whole script, starts. On a frozen clock the two agree.
//
// A step of more than repl-timeout (60 s) forward makes Redis drop its
// replication links and connect again, and a step on a Sentinel makes it tilt.
func (s *Server) Step(d time.Duration) error {
	return s.setClock("step", func(now setting) (setting, error) {
		if d%time.Microsecond != 0 {
			return now, fmt.Errorf("%v is not a whole number of microseconds, the unit of the server's clock", d)
		}
		now.micros += d.Microseconds()
		return now, nil
	})
}

// Freeze stops the clock at an instant, of which the microseconds count.
//
// Nothing in Redis that waits by the wall clock then times out: WAIT and the
// blocking commands do not return by their time-out.
func (s *Server) Freeze(at time.Time) error { return s.SetMicros(at.UnixMicro()) }

// SetMicros stops the clock at exactly us microseconds after 1970.
func (s *Server) SetMicros(us int64) error {
	return s.setClock("freeze", func(setting) (setting, error) {
		if us < 0 {
			return setting{}, fmt.Errorf("%d µs is before 1970", us)
		}
		return setting{frozen: true, micros: us}, nil
	})
}

// Unfreeze lets a frozen clock run on from where it stands, which is no step.
// [Server.ResetClock] returns to real time.
func (s *Server) Unfreeze() error {
	return s.setClock("unfreeze", func(now setting) (setting, error) {
		if now.frozen {
			return setting{micros: now.micros - time.Now().UnixMicro()}, nil
		}
		return now, nil
	})
}

// ResetClock returns the server to real time.
func (s *Server) ResetClock() error {
	return s.setClock("reset", func(setting) (setting, error) { return setting{}, nil })
}

// ClockOffset returns how far the server's clock is ahead of the real one. On a
// frozen clock that shrinks as real time passes; without the shim it is 0.
func (s *Server) ClockOffset() time.Duration {
	if s.clock == nil {
		return 0
	}
	now := s.clock.get()
	if now.frozen {
		now.micros -= time.Now().UnixMicro()
	}
	return time.Duration(now.micros) * time.Microsecond
}

func (s *Server) setClock(what string, change func(setting) (setting, error)) error {
	err := ErrNoClock
	if s.clock != nil {
		err = s.clock.change(change)
	}
	if err == nil {
		return nil
	}
	err = fmt.Errorf("redistest: cannot %s the clock of redis-server at %s: %w", what, s.Addr(), err)
	if s.fatalf != nil {
		s.fatalf("%v", err)
	}
	return err
}

// setting is what the shim reads: real time plus micros, or frozen at micros.
type setting struct {
	frozen bool
	micros int64
}

// word packs a setting into the one word that the shim loads atomically; see
// shim/clockshim.c.
func (v setting) word() int64 {
	w := v.micros << 1
	if v.frozen {
		w |= 1
	}
	return w
}

func settingOf(word int64) setting { return setting{frozen: word&1 == 1, micros: word >> 1} }

func (v setting) validate() error {
	if v.micros > maxMicros || v.micros < -maxMicros || v.frozen && v.micros < 0 {
		return fmt.Errorf("%d µs is out of range; the clock shows 1970 to 4253", v.micros)
	}
	return nil
}
