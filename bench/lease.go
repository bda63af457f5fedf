package main

import "github.com/ringfence/ringfence"

// leaseOptions are the options of a limiter with leases; none while the library has no
// leases, and then the system is left out of the run.
func leaseOptions() []ringfence.LimiterOption { return nil }
