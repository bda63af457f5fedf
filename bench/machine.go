package main

import (
	"context"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// describe says where this runs; unknown things stay empty.
func describe(ctx context.Context) about {
	a := about{
		Date: time.Now().UTC().Format(time.DateOnly), CPUs: runtime.GOMAXPROCS(0), Go: runtime.Version(),
		System: runtime.GOOS + "/" + runtime.GOARCH, Modules: map[string]string{},
	}
	if raw, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		a.Machine = valueOf(string(raw), "model name", ":")
	}
	if raw, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		a.System += ", Linux " + strings.TrimSpace(string(raw))
	}
	binary := os.Getenv(redistest.BinaryEnv)
	if binary == "" {
		binary = "redis-server"
	}
	if out, err := exec.CommandContext(ctx, binary, "--version").Output(); err == nil {
		a.Redis = strings.TrimSpace(string(out))
		if _, rest, ok := strings.Cut(a.Redis, " v="); ok {
			a.Redis, _, _ = strings.Cut(rest, " ")
		}
	}
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return a
	}
	wanted := map[string]bool{"github.com/redis/go-redis/v9": true}
	for _, s := range systems {
		wanted[s.module] = true
	}
	for _, m := range build.Deps {
		if wanted[m.Path] {
			a.Modules[m.Path] = m.Version
		}
	}
	return a
}

// valueOf is what follows the separator in the first line that begins with name.
func valueOf(text, name, separator string) string {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, name) {
			_, value, _ := strings.Cut(line, separator)
			return strings.TrimSpace(value)
		}
	}
	return ""
}
