package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ringfence/ringfence/internal/redistest"
)

// BenchmarkAllow is what one decision costs the client: time, bytes, allocations.
//
//	make microbench PKG=./bench
//
// The callers share b.N calls of the workload distinct. Throughput is better compared
// with `make bench`, which lets the systems take turns.
func BenchmarkAllow(b *testing.B) {
	server := redistest.Start(b, redistest.Options{Args: []string{"io-threads 1"}})
	w, err := workloadNamed("distinct")
	if err != nil {
		b.Fatal(err)
	}
	ctx := context.Background()
	script, err := capture(ctx, server.Addr(), w.limit)
	if err != nil {
		b.Fatal(err)
	}
	c := newCalls(w)
	for _, s := range systems {
		if s.open == nil || (s.name == leased && len(leaseOptions()) == 0) {
			continue
		}
		for _, callers := range []int{1, 64} {
			b.Run(fmt.Sprintf("%s/callers=%d", s.name, callers), func(b *testing.B) {
				i, err := s.open(ctx, place{addrs: []string{server.Addr()}, script: script}, w.limit)
				if err != nil {
					b.Fatal(err)
				}
				defer i.close()
				for at := range callers { // connections are opened, scripts loaded
					if _, err := i.allow(ctx, c.at(at)); err != nil {
						b.Fatal(err)
					}
				}
				var next atomic.Int64
				var wg sync.WaitGroup
				b.ReportAllocs()
				b.ResetTimer()
				for range callers {
					wg.Go(func() {
						for at := next.Add(1); at <= int64(b.N); at = next.Add(1) {
							if _, err := i.allow(ctx, c.at(int(at))); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
			})
		}
	}
}
