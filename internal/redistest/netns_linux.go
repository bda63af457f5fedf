package redistest

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxNamespaces is how many pairs of addresses 198.19.0.0/16 has, four
// addresses to a pair.
const maxNamespaces = 1 << 14

// wires are the two ends of the cable and the thread at the far one.
type wires struct {
	near, far *os.File // TUN devices: on this machine, in the namespace
	thread    *nsThread
}

// open makes the namespace and the cable.
func (n *Netns) open() (err error) {
	w := &wires{}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.near, err = n.openNear(); err != nil {
		return err
	}
	if w.thread, err = startThread(); err != nil {
		return err
	}
	err = w.thread.do(func() (err error) {
		w.far, err = n.openFar()
		return err
	})
	n.wires = w
	return err
}

// openNear makes the device on this machine. Its name holds the index of the
// namespace, and the kernel gives a name to one process only: so all processes
// on the machine have different addresses, without asking each other.
func (n *Netns) openNear() (*os.File, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("redistest: listing the addresses of this machine: %w", err)
	}
	for try := range maxNamespaces {
		n.setIndex((os.Getpid() + try) % maxNamespaces)
		if other := covering(addrs, n.server); other != nil {
			return nil, fmt.Errorf("redistest: the network %s of this machine overlaps 198.19.0.0/16, which the test namespaces use; run the test where it does not", other)
		}
		name := n.deviceName()
		tun, err := openTun(name)
		if errors.Is(err, syscall.EBUSY) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if err := configure(name, n.client, n.server, netip.PrefixFrom(n.client, 32)); err != nil {
			_ = tun.Close()
			return nil, err
		}
		return tun, nil
	}
	return nil, fmt.Errorf("redistest: all %d test namespaces of this machine are taken", maxNamespaces)
}

func (n *Netns) deviceName() string { return fmt.Sprintf("ringfence%d", n.index) }

func (n *Netns) setIndex(i int) {
	n.index = i
	n.client = netip.AddrFrom4([4]byte{198, 19, byte(i >> 6), byte(i<<2) + 1})
	n.server = n.client.Next()
}

// covering returns the network that addr is part of, among those given.
func covering(addrs []net.Addr, addr netip.Addr) net.Addr {
	for _, a := range addrs {
		if network, ok := a.(*net.IPNet); ok {
			if ones, bits := network.Mask.Size(); ones < bits && network.Contains(addr.AsSlice()) {
				return network
			}
		}
	}
	return nil
}

// openFar makes the device in the namespace of the calling thread. Its network
// is the whole range, so that it is the way to every other namespace.
func (n *Netns) openFar() (*os.File, error) {
	const name = "ringfence"
	tun, err := openTun(name)
	if err != nil {
		return nil, err
	}
	if err := configure(name, n.server, n.client, netip.PrefixFrom(n.server, 16)); err != nil {
		_ = tun.Close()
		return nil, err
	}
	// Servers in one namespace talk to each other over its loopback.
	if err := configure("lo", loopback, netip.Addr{}, netip.PrefixFrom(loopback, 8)); err != nil {
		_ = tun.Close()
		return nil, err
	}
	return tun, nil
}

// openTun makes a TUN device in the namespace of the calling thread. The kernel
// removes it with its last descriptor.
func openTun(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, privilege("opening /dev/net/tun", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, privilege("making the device "+name, err)
	}
	// Only now: the runtime's poller takes a descriptor without a device for
	// one in error.
	return os.NewFile(uintptr(fd), "tun "+name), nil
}

// configure gives a device its address and brings it up, in the namespace of
// the calling thread. peer is the other end, if there is one.
func configure(name string, local, peer netip.Addr, network netip.Prefix) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("redistest: configuring the device %s: %w", name, err)
	}
	defer func() { _ = unix.Close(fd) }()
	address := func(request uint, ip []byte) error {
		ifr, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		if err := ifr.SetInet4Addr(ip); err != nil {
			return err
		}
		return unix.IoctlIfreq(fd, request, ifr)
	}
	mask := net.CIDRMask(network.Bits(), 32)
	err = address(unix.SIOCSIFADDR, local.AsSlice())
	if err == nil && peer.IsValid() && network.Bits() == 32 {
		err = address(unix.SIOCSIFDSTADDR, peer.AsSlice())
	}
	if err == nil {
		err = address(unix.SIOCSIFNETMASK, mask)
	}
	if err == nil {
		err = bringUp(fd, name)
	}
	if err != nil {
		return privilege("configuring the device "+name, err)
	}
	return nil
}

func bringUp(fd int, name string) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil {
		return err
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// privilege turns what the kernel says to those who may not into ErrNoPrivilege.
func privilege(what string, err error) error {
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ENXIO) {
		return fmt.Errorf("%w (%s: %w)", ErrNoPrivilege, what, err)
	}
	return fmt.Errorf("redistest: %s: %w", what, err)
}

func (w *wires) toServer(data []byte) { _, _ = w.far.Write(data) }  // a full device loses packets,
func (w *wires) toClient(data []byte) { _, _ = w.near.Write(data) } // as a network may

func (w *wires) readServer(each func([]byte)) { read(w.far, each) }
func (w *wires) readClient(each func([]byte)) { read(w.near, each) }

// read hands out packets until the device is closed.
func read(tun *os.File, each func([]byte)) {
	buf := make([]byte, 1<<16)
	for {
		n, err := tun.Read(buf)
		if err != nil {
			return
		}
		each(append([]byte(nil), buf[:n]...))
	}
}

// close removes all of it; Netns.Stop may call it twice.
func (w *wires) close() {
	for _, tun := range []*os.File{w.near, w.far} {
		if tun != nil {
			_ = tun.Close()
		}
	}
	if w.thread != nil {
		w.thread.end()
	}
}

func (n *Netns) spawner() spawner              { return n.wires.thread }
func (n *Netns) inside(job func() error) error { return n.wires.thread.do(job) }

// nsThread is a goroutine locked to a thread that is in a namespace of its own.
// What it forks is born there, and dies with the thread, as with forker.
type nsThread struct {
	running sync.WaitGroup

	mu    sync.Mutex
	jobs  chan func() // guarded by mu
	ended bool        // guarded by mu
}

var errNetnsStopped = errors.New("redistest: the network namespace was stopped")

func startThread() (*nsThread, error) {
	t := &nsThread{jobs: make(chan func())}
	jobs, entered := t.jobs, make(chan error, 1)
	t.running.Add(1)
	go t.enter(jobs, entered)
	if err := <-entered; err != nil {
		t.end()
		return nil, privilege("making a network namespace", err)
	}
	return t, nil
}

// enter moves the thread into a new namespace and serves jobs. It never unlocks
// the thread, and so takes it along when it ends: nothing else of this process
// must ever run in the namespace.
func (t *nsThread) enter(jobs chan func(), entered chan error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread cannot end before the process. While we hold it,
		// another goroutine gets another thread.
		held := make(chan error, 1)
		go t.enter(jobs, held)
		entered <- <-held
		runtime.UnlockOSThread()
		return
	}
	defer t.running.Done()
	err := unix.Unshare(unix.CLONE_NEWNET)
	entered <- err
	for job := range jobs {
		job()
	}
}

// do runs job on the thread.
func (t *nsThread) do(job func() error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return errNetnsStopped
	}
	result := make(chan error, 1)
	t.jobs <- func() { result <- job() }
	return <-result
}

func (t *nsThread) start(cmd *exec.Cmd) error { return t.do(cmd.Start) }

// release does nothing: the thread lives until the namespace is stopped.
func (t *nsThread) release() {}

func (t *nsThread) end() {
	t.mu.Lock()
	if !t.ended {
		t.ended = true
		close(t.jobs)
	}
	t.mu.Unlock()
	t.running.Wait()
}
