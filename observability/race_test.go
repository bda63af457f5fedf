//go:build race

package observability_test

// raced says that the race detector is on.
const raced = true
