package redistest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"
)

const (
	clockFileBytes = 16
	// shimAttached is what the shim writes into the second word.
	shimAttached int64 = 0x72696e6766656e63
)

// clock is the test's end of the control file that the shim reads.
type clock struct {
	shim, control string // paths

	mu     sync.Mutex
	mem    []byte  // guarded by mu; the mapped control file, nil once closed
	final  setting // guarded by mu; the setting at close
	closed bool    // guarded by mu
}

func newClock(ctx context.Context, dir string) (*clock, error) {
	if strconv.IntSize != 64 {
		return nil, errors.New("redistest: the clock shim needs a 64-bit system")
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	library, err := shimLibrary()
	if err != nil {
		return nil, err
	}
	c := &clock{shim: filepath.Join(dir, "clockshim.so"), control: filepath.Join(dir, "clock")}
	if err := os.WriteFile(c.shim, library, 0o700); err != nil {
		return nil, fmt.Errorf("redistest: writing the clock shim: %w", err)
	}
	f, err := os.OpenFile(c.control, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("redistest: making the clock's control file: %w", err)
	}
	defer f.Close() // the mapping stays
	if err := f.Truncate(clockFileBytes); err != nil {
		return nil, fmt.Errorf("redistest: making the clock's control file: %w", err)
	}
	c.mem, err = syscall.Mmap(int(f.Fd()), 0, clockFileBytes, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("redistest: mapping the clock's control file: %w", err)
	}
	return c, nil
}

// environ is the environment for one start of the server. It also takes back
// the shim's sign of life, so that attached speaks of that start.
func (c *clock) environ() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		atomic.StoreInt64(c.word(1), 0)
	}
	preload := c.shim
	if outer := os.Getenv("LD_PRELOAD"); outer != "" {
		preload += ":" + outer
	}
	return append(os.Environ(), "LD_PRELOAD="+preload, "RINGFENCE_CLOCK="+c.control)
}

func (c *clock) attached() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.closed && atomic.LoadInt64(c.word(1)) == shimAttached
}

func (c *clock) change(f func(setting) (setting, error)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return errors.New("the server was stopped")
	}
	next, err := f(settingOf(atomic.LoadInt64(c.word(0))))
	if err != nil {
		return err
	}
	if err := next.validate(); err != nil {
		return err
	}
	atomic.StoreInt64(c.word(0), next.word())
	return nil
}

func (c *clock) get() setting {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return c.final
	}
	return settingOf(atomic.LoadInt64(c.word(0)))
}

func (c *clock) frozen() bool { return c.get().frozen }

func (c *clock) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.final = settingOf(atomic.LoadInt64(c.word(0)))
	c.closed = true
	_ = syscall.Munmap(c.mem)
	c.mem = nil
}

// word returns the i-th word of the control file. Requires mu, and not closed.
// A mapping starts on a page, so its words are aligned for atomic use.
func (c *clock) word(i int) *int64 { return (*int64)(unsafe.Pointer(&c.mem[8*i])) }
