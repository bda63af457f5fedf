//go:build !amd64 && !arm64

package ringfence

import "unsafe"

// prefetch leaves it to the processor.
func prefetch(unsafe.Pointer) {}
