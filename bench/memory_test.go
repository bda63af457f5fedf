package main

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// The table of rivals in docs/memory.md is made of what this prints with -v: what Redis
// takes for one limited key, all told, when many have used one unit.
func TestMemoryOfAKeyOfEachSystem(t *testing.T) {
	const keys = 1 << 13
	// One unit comes back in six minutes: no key expires while the others are made, which
	// would look like a system that needs less.
	slow := limit{rate: 10, per: time.Hour, burst: 10}
	for _, sys := range systems {
		if sys.open == nil || sys.name == "noop" || sys.name == leased {
			continue // they have no keys of their own
		}
		t.Run(sys.name, func(t *testing.T) {
			s := redistest.Start(t, redistest.Options{})
			t.Logf("real redis-server %s", s.Addr())
			script, err := capture(t.Context(), s.Addr(), slow)
			if err != nil {
				t.Fatal(err)
			}
			system, err := sys.open(t.Context(), place{addrs: []string{s.Addr()}, script: script}, slow)
			if err != nil {
				t.Fatal(err)
			}
			defer system.close()
			figure := func(section, name string) int64 {
				text, err := s.Client().Info(t.Context(), section).Result()
				if err != nil {
					t.Fatal(err)
				}
				_, rest, _ := strings.Cut(text, name)
				n, err := strconv.ParseInt(rest[:strings.IndexAny(rest, "\r,")], 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
			call := func(i int) {
				// As long as an address of IPv4 with a name before it.
				if got, err := system.allow(t.Context(), fmt.Sprintf("address:10.20.%03d.%03d", i/256, i%256)); err != nil || got != allowed {
					t.Fatalf("call %d: %v, %v", i, got, err)
				}
			}
			call(keys) // scripts and connections
			before, already := figure("memory", "used_memory:"), figure("keyspace", "keys=")
			for i := range keys {
				call(i)
			}
			each := (figure("memory", "used_memory:") - before) / keys
			t.Logf("memory: %s: %d bytes a key", sys.name, each)
			if made := figure("keyspace", "keys=") - already; made != keys {
				t.Errorf("%d calls made %d keys", keys, made)
			}
			if each < 50 || each > 1000 {
				t.Errorf("%d bytes a key", each)
			}
		})
	}
}
