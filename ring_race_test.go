//go:build race

package ringfence

// ringSlowed lifts the bound on the time to build a ring.
const ringSlowed = true
