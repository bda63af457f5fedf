package ringfence

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"
)

// vmFlags are what the kernel says of the memory at an address.
func vmFlags(t *testing.T, at uintptr) string {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	inside := false
	for lines := bufio.NewScanner(bytes.NewReader(smaps)); lines.Scan(); {
		var from, to uintptr
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x ", &from, &to); n == 2 {
			inside = from <= at && at < to
		}
		if flags, ok := strings.CutPrefix(lines.Text(), "VmFlags:"); ok && inside {
			return flags + " "
		}
	}
	t.Fatalf("nothing is mapped at %#x", at)
	return ""
}

// The kernel knows that the table of leases is to be in huge pages, all of it but a part of a
// page at its ends; whether it has any to give is up to the machine.
func TestTheTableOfLeasesIsInHugePages(t *testing.T) {
	_, err := os.Stat("/sys/kernel/mm/transparent_hugepage")
	there := err == nil // else it was built without them, refuses, and nothing is different
	p := newLeasePages()
	from, size, page := uintptr(unsafe.Pointer(&p.places[0])), leasePlaces*unsafe.Sizeof(leasePlace{}), uintptr(os.Getpagesize())
	for _, off := range []uintptr{page, size / 2, size - 2*page} {
		if flags := vmFlags(t, from+off); strings.Contains(flags, " hg ") != there {
			t.Errorf("%d bytes into the table the memory has the flags%s; hg among them is to be %t", off, flags, there)
		}
	}
}

// Of any slice only whole pages are spoken of, and what it holds stays.
func TestOnlyWholePagesAreHuge(t *testing.T) {
	page := os.Getpagesize()
	all := bytes.Repeat([]byte("ringfence"), page)
	want := bytes.Clone(all)
	for _, from := range []int{0, 1, page - 1, page, page + 1} {
		for _, n := range []int{0, 1, page - 1, page, page + 1, 2*page - 1, 2 * page, 3*page + 1} {
			inHugePages(all[from : from+n])
		}
	}
	inHugePages(nil)
	if !bytes.Equal(all, want) {
		t.Error("memory that is to be in huge pages has changed")
	}
}
