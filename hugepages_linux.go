package ringfence

import (
	"syscall"
	"unsafe"
)

// inHugePages asks the kernel to keep memory without pointers in huge pages as soon as it is
// used. One that was built without them refuses, one that is set up to give none takes no notice.
func inHugePages(b []byte) {
	page := uintptr(syscall.Getpagesize())
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) % page
	if n := uintptr(len(b)); n > skip+page {
		_ = syscall.Madvise(b[skip:n-(n-skip)%page], syscall.MADV_HUGEPAGE)
	}
}
