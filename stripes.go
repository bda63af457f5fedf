package ringfence

import (
	"runtime"
	"unsafe"
)

// What every call counts, and hardly anybody reads, is kept in stripes: a caller counts in
// the one that its stack points to, so that callers on two processors seldom write to one
// cache line, and a goroutine keeps to its stripe for as long as it calls from one place.

// cacheLines is what a stripe takes at least: two lines, for processors fetch them in pairs.
const cacheLines = 128

// The number of stripes is a power of two, four for each processor within these bounds: of
// two callers at work on two processors one time in eight, at most, meets the other.
const (
	minStripes = 8
	maxStripes = 256
)

func stripeCount() int {
	n := minStripes
	for n < 4*runtime.GOMAXPROCS(0) && n < maxStripes {
		n *= 2
	}
	return n
}

// place is where a caller counts: any number, taken modulo the number of stripes. Stacks
// are at least 2 KiB apart, and often a power of two, so the bits of the address above that
// are mixed.
func place() uint {
	var here byte
	at := uint64(uintptr(unsafe.Pointer(&here))) >> 11 // only a number: nothing is read there
	return uint(at * ringGamma >> 32)
}

// gates are callGates of which each call takes one, and which close together.
type gates struct {
	all  []paddedGate
	idle chan struct{} // closed when the last call has left the closed gates
}

type paddedGate struct {
	callGate
	_ [cacheLines - unsafe.Sizeof(callGate{})%cacheLines]byte
}

func newGates(n int) *gates {
	g := &gates{all: make([]paddedGate, n), idle: make(chan struct{})}
	for i := range g.all {
		g.all[i].idle = make(chan struct{})
	}
	return g
}

// at is the gate of a place. Who enters it leaves it, and no other.
func (g *gates) at(place uint) *callGate {
	return &g.all[place&uint(len(g.all)-1)].callGate
}

func (g *gates) closed() bool { return g.all[0].closed() }

// close closes the gates, the first one first, and says whether they were open.
func (g *gates) close() bool {
	if !g.all[0].close() {
		return false
	}
	for i := range g.all[1:] {
		g.all[i+1].close()
	}
	go func() {
		for i := range g.all {
			<-g.all[i].idle
		}
		close(g.idle)
	}()
	return true
}
