//go:build !linux

package ringfence

// inHugePages leaves it to the kernel.
func inHugePages([]byte) {}
