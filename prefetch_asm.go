//go:build amd64 || arm64

package ringfence

import "unsafe"

// prefetch has the processor fetch a cache line that is to be written soon, and does not
// wait for it. Go has no name for that outside of its runtime.
//
//go:noescape
func prefetch(p unsafe.Pointer)
