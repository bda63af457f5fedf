package main

import (
	"math/rand/v2"
	"time"
)

// gaps returns the times between the arrivals of a Poisson process of rate a second. The
// same seed gives the same arrivals: all systems get the same ones.
func gaps(seed uint64, rate float64) func() time.Duration {
	random := rand.New(rand.NewPCG(seed, 0))
	return func() time.Duration {
		return time.Duration(random.ExpFloat64() / rate * float64(time.Second))
	}
}
