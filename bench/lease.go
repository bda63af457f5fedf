package main

import "github.com/ringfence/ringfence"

// leaseOptions are the options of a limiter with leases.
func leaseOptions() []ringfence.LimiterOption {
	return []ringfence.LimiterOption{ringfence.WithLease(ringfence.Lease{Max: 64})}
}
