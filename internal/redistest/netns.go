package redistest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// ErrNoPrivilege says that this process may not make network namespaces.
var ErrNoPrivilege = errors.New("redistest: network namespaces take Linux, root (CAP_NET_ADMIN and CAP_SYS_ADMIN) and /dev/net/tun; run the test as root, in a container with --privileged")

// Netns is a network namespace of its own with one cable to this machine, on
// which packets can be lost and delayed. Servers are put into it with
// [Options].Netns, as many as you like. All methods may be called from any
// goroutine.
//
// [Proxy] breaks connections; this breaks packets, below TCP: nobody refuses,
// nobody closes, the kernels on both sides retransmit, and a new connection
// hangs in its handshake. The cable takes time: what [Server.Kill] does to open
// connections reaches the client a moment after Kill has returned.
//
// Servers in one namespace talk to each other without crossing the cable.
// Servers in two namespaces of one process cross both cables; [Netns.Cut] parts
// them while clients still reach both. A server in a namespace reaches nothing
// on 127.0.0.1 outside, nor any other network.
//
// The cable is two TUN devices and a goroutine that carries packets between
// them. So it needs no ip, tc, iptables or nft, and no kernel modules for them
// (delay with tc takes sch_netem, which many kernels lack). And nothing can be
// left behind: the kernel removes the devices and the namespace when the
// process ends, however it ends.
//
// The addresses are from 198.19.0.0/16, the upper half of the range that RFC
// 2544 sets aside for test benches. They exist on this machine only.
type Netns struct {
	index          int
	client, server netip.Addr
	toServer, out  *cable // out carries what the servers send, to whomever
	wires          *wires
	stopping       context.Context
	stop           context.CancelFunc
	running        sync.WaitGroup
	lost           atomic.Int64

	mu    sync.Mutex
	drop  bool            // guarded by mu
	loss  float64         // guarded by mu; percent
	delay time.Duration   // guarded by mu
	cut   map[*Netns]bool // guarded by mu
	rng   *rand.Rand      // guarded by mu
}

// packetsInFlight bounds what one direction of a cable holds back; more are
// lost, as in any router. 4,096 packets of 1,500 bytes are 6 MB.
const packetsInFlight = 1 << 12

// cable is one direction.
type cable struct {
	queue   chan packet
	deliver func([]byte)
}

type packet struct {
	data []byte
	due  time.Time
}

// namespaces finds the receiver of a packet from one namespace to another.
var namespaces struct {
	mu       sync.Mutex
	byServer map[netip.Addr]*Netns // guarded by mu
}

// LaunchNetns makes a namespace; end it with [Netns.Stop]. The error is
// [ErrNoPrivilege] if this process may not.
func LaunchNetns() (*Netns, error) {
	n := &Netns{cut: map[*Netns]bool{}, rng: rand.New(rand.NewPCG(1, 2))}
	n.stopping, n.stop = context.WithCancel(context.Background())
	if err := n.open(); err != nil {
		n.stop()
		return nil, err
	}
	n.toServer = n.connect(n.wires.toServer)
	n.out = n.connect(n.route)

	namespaces.mu.Lock()
	if namespaces.byServer == nil {
		namespaces.byServer = map[netip.Addr]*Netns{}
	}
	namespaces.byServer[n.server] = n
	namespaces.mu.Unlock()

	n.running.Go(func() { n.wires.readClient(n.fromClient) })
	n.running.Go(func() { n.wires.readServer(func(b []byte) { n.send(n.out, b) }) })
	return n, nil
}

// StartNetns makes a namespace for one test, fails the test if that is not
// possible (see [ErrNoPrivilege]), and removes it when the test ends. Make it
// before the servers in it: what is made later is stopped earlier.
func StartNetns(t TB) *Netns {
	t.Helper()
	n, err := LaunchNetns()
	if err != nil {
		t.Fatalf("%v", err)
		return nil
	}
	t.Cleanup(n.Stop)
	return n
}

// Stop removes the namespace. Servers that still run in it die. Calling it
// again does nothing.
func (n *Netns) Stop() {
	namespaces.mu.Lock()
	delete(namespaces.byServer, n.server)
	namespaces.mu.Unlock()
	n.stop()
	n.wires.close()
	n.running.Wait()
}

// ServerIP returns the address of the servers in the namespace.
func (n *Netns) ServerIP() netip.Addr { return n.server }

// ClientIP returns the address that servers in the namespace see clients of
// this machine come from.
func (n *Netns) ClientIP() netip.Addr { return n.client }

// Drop with true loses every packet in both directions, also those that Delay
// holds back: a pulled cable. With false it plugs it in again; TCP then delivers
// what it still retransmits, after a pause that grew with the length of the
// outage (0.2 s, doubling).
func (n *Netns) Drop(on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.drop = on
}

// Loss loses packets at random, each direction by itself: Loss(50) loses half
// of the requests and half of the replies. 0 or less loses none, 100 or more
// all. The order of luck is the same in every run.
func (n *Netns) Loss(percent float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.loss = percent
}

// Delay holds every packet for d, in each direction: a round trip takes 2d
// longer, and the handshake of a new connection as much again. Packets stay in
// order, also when the delay is changed.
func (n *Netns) Delay(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.delay = max(d, 0)
}

// Cut with true loses every packet between the two namespaces, in both
// directions, while this machine still reaches both: the partition in which
// clients go on writing to a primary that its replicas and Sentinels have lost.
// With false it ends.
func (n *Netns) Cut(other *Netns, on bool) {
	n.setCut(other, on)
	other.setCut(n, on)
}

func (n *Netns) setCut(other *Netns, on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if on {
		n.cut[other] = true
	} else {
		delete(n.cut, other)
	}
}

// Lost returns how many packets were lost on purpose so far.
func (n *Netns) Lost() int { return int(n.lost.Load()) }

// connect starts one direction of the cable.
func (n *Netns) connect(deliver func([]byte)) *cable {
	c := &cable{queue: make(chan packet, packetsInFlight), deliver: deliver}
	n.running.Go(func() { n.carry(c) })
	return c
}

// send puts a packet on the cable, or loses it.
func (n *Netns) send(c *cable, data []byte) {
	n.mu.Lock()
	lose := n.drop || n.loss > 0 && n.rng.Float64()*100 < n.loss
	delay := n.delay
	n.mu.Unlock()
	if lose {
		n.lost.Add(1)
		return
	}
	p := packet{data: data}
	if delay > 0 {
		p.due = time.Now().Add(delay)
	}
	select {
	case c.queue <- p:
	default:
		n.lost.Add(1)
	}
}

func (n *Netns) carry(c *cable) {
	for {
		var p packet
		select {
		case <-n.stopping.Done():
			return
		case p = <-c.queue:
		}
		if wait := time.Until(p.due); !p.due.IsZero() && wait > 0 {
			timer := time.NewTimer(wait)
			select {
			case <-n.stopping.Done():
				timer.Stop()
				return
			case <-timer.C:
			}
		}
		if n.dropping() {
			n.lost.Add(1)
			continue
		}
		c.deliver(p.data)
	}
}

func (n *Netns) dropping() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.drop
}

// fromClient takes a packet of this machine. Only those for the servers come
// this way; the kernel also sends some of its own, which nobody needs.
func (n *Netns) fromClient(data []byte) {
	if to, ok := destination(data); ok && to == n.server {
		n.send(n.toServer, data)
	}
}

// route passes on what a server has sent: to this machine, or to another
// namespace, whose cable it has to survive too.
func (n *Netns) route(data []byte) {
	to, ok := destination(data)
	if !ok {
		return
	}
	if to == n.client {
		n.wires.toClient(data)
		return
	}
	namespaces.mu.Lock()
	other := namespaces.byServer[to]
	namespaces.mu.Unlock()
	if other == nil {
		return // to nowhere
	}
	if n.isCutFrom(other) {
		n.lost.Add(1)
		return
	}
	other.send(other.toServer, data)
}

func (n *Netns) isCutFrom(other *Netns) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cut[other]
}

// destination reads the header of an IPv4 packet; false for any other.
func destination(data []byte) (netip.Addr, bool) {
	if len(data) < 20 || data[0]>>4 != 4 {
		return netip.Addr{}, false
	}
	return netip.AddrFrom4([4]byte(data[16:20])), true
}

// reaches reports whether a server in n (nil: in none) can connect to another.
func (n *Netns) reaches(to *Server) error {
	if n != nil && to.opts.Netns == nil {
		return fmt.Errorf("redistest: a server in a network namespace cannot reach %s outside; give that one a Netns too", to.Addr())
	}
	return nil
}

// place puts the i-th of servers that all have to reach each other into the
// namespace that of(i) names.
func place(options []Options, of func(i int) *Netns) error {
	if of == nil {
		return nil
	}
	for i := range options {
		options[i].Netns = of(i)
		if (options[i].Netns == nil) != (options[0].Netns == nil) {
			return fmt.Errorf("redistest: Netns(%d) and Netns(0): one is a namespace and the other is none, so the two could not reach each other; return one for every i, or leave Netns nil", i)
		}
	}
	return nil
}
