package httplimit

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
)

const (
	defaultIPv6Bits = 64
	defaultMaxHops  = 32
	limitMaxHops    = 1024
	// maxHop is the longest entry looked at, spaces included. The longest sensible
	// one, an IPv6 address in brackets with zone and port, has some 65 bytes.
	maxHop = 128
)

// ErrNoAddr says that http.Request.RemoteAddr holds no IP address, as on a unix
// socket, where it is "@". There is then no peer that could be trusted to name
// the client. A server that listens on a unix socket behind a proxy must set
// RemoteAddr itself, or use another key.
var ErrNoAddr = errors.New("httplimit: RemoteAddr holds no IP address")

var errClientIP = errors.New("httplimit: ClientIP")

// ClientIP finds the address of the client that sent a request, behind proxies
// that are known by their addresses.
//
// X-Forwarded-For grows to the right: each proxy appends the address it was
// called from. What stands left of the entry written by the first trusted proxy
// was written by the client and can be anything. So the walk goes from the right,
// over all lines of the field together, and stops at the first address that is
// not a trusted proxy: that is the client. In detail:
//
//   - The peer (RemoteAddr) is not trusted: it is the client, and the field is
//     ignored.
//   - An entry may carry a port ("203.0.113.7:5000", "[2001:db8::1]:5000", as some
//     load balancers write), which is dropped. Anything else that is not an
//     address ("unknown", "203.0.113.009", "[2001:db8::1]" without a port, an empty
//     entry, more than 128 bytes) ends the walk, and the peer counts as the client:
//     nobody vouches for what stands left of such an entry. Empty entries are not
//     passed over, because a proxy that fails to fill in an address leaves one, and
//     left of it is what the client wrote. All such requests share the peer's key.
//   - All entries are trusted: the leftmost one is the client. It is a machine of
//     ours that calls another through the proxies.
//   - More than MaxHops entries to look at: the peer.
//
// An address in IPv6 clothes (::ffff:203.0.113.7) is the IPv4 address, and zones
// are dropped. The RFC 7239 field Forwarded is not read: a proxy that writes only
// that one should be made to write X-Forwarded-For. So is every proxy that passes
// the client's X-Forwarded-For on without appending to it: no reader can tell.
//
// The zero value trusts nobody and is ready to use. Do not change the fields while
// it is in use; its methods are safe for concurrent use.
type ClientIP struct {
	// Trusted holds the networks of our own proxies. An address within them can
	// name any client. Empty: X-Forwarded-For is ignored. IPv4 networks must be
	// given as such, not within ::ffff:0:0/96, where they match nothing.
	Trusted []netip.Prefix
	// IPv6Bits is how many leading bits of an IPv6 address make one client: 1 to
	// 128; 0 means 64, which is what one connection is usually given. An IPv4
	// address always counts whole.
	IPv6Bits int
	// MaxHops is the most entries of X-Forwarded-For that are looked at: 1 to
	// 1,024; 0 means 32. It bounds the work on a field of a megabyte, which
	// net/http lets through.
	MaxHops int
}

// TrustedProxies returns a ClientIP that trusts these networks, each in CIDR
// notation ("10.0.0.0/8", "fd00::/8") or a single address ("10.1.2.3"). With none
// it trusts nobody. It is an error if one cannot be parsed, has bits set behind
// the mask (10.1.2.3/8 is more often a slip than a wish to trust 10.0.0.0/8),
// carries a zone, or covers every address there is (/0), which would let every
// client choose its own address.
func TrustedProxies(cidrs ...string) (ClientIP, error) {
	var c ClientIP
	for _, s := range cidrs {
		p, err := parsePrefix(s)
		if err != nil {
			return ClientIP{}, fmt.Errorf("httplimit: TrustedProxies: %.80q: %w", s, err)
		}
		c.Trusted = append(c.Trusted, p)
	}
	return c, nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	var p netip.Prefix
	if strings.Contains(s, "/") {
		var err error
		if p, err = netip.ParsePrefix(s); err != nil {
			return netip.Prefix{}, errors.New("not a network in CIDR notation")
		}
	} else {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return netip.Prefix{}, errors.New("neither a network in CIDR notation nor an address without zone")
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	if p.Addr().Is4In6() {
		// Addresses are unmapped before they are compared, so the network must be.
		if p.Bits() < 96 {
			return netip.Prefix{}, errors.New("reaches beyond the IPv4 addresses mapped into IPv6; give the IPv4 network")
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	if p.Bits() == 0 {
		return netip.Prefix{}, errors.New("trusts every address, so that every client could choose its own")
	}
	if m := p.Masked(); m != p {
		return netip.Prefix{}, fmt.Errorf("has bits set behind the mask; write %s or %s/%d", m, p.Addr(), p.Addr().BitLen())
	}
	return p, nil
}

// Key returns the client's address as a key: "203.0.113.7", or the network of
// IPv6Bits "2001:db8:1:2::/64". It is a [KeyFunc]. It never returns an empty key:
// the error is ErrNoAddr when there is no peer address, or names the field of c
// that is out of range.
func (c ClientIP) Key(r *http.Request) (string, error) {
	a, err := c.Addr(r)
	if err != nil {
		return "", err
	}
	if a.Is4() {
		return a.String(), nil
	}
	bits := c.IPv6Bits
	if bits == 0 {
		bits = defaultIPv6Bits
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return "", fmt.Errorf("%w: %w", errClientIP, err)
	}
	return p.String(), nil
}

// Addr returns the client's address, whole, unmapped and without zone. Its errors
// are those of Key.
func (c ClientIP) Addr(r *http.Request) (netip.Addr, error) {
	if c.IPv6Bits < 0 || c.IPv6Bits > 128 {
		return netip.Addr{}, fmt.Errorf("%w: IPv6Bits = %d: want 1 to 128, or 0 for 64", errClientIP, c.IPv6Bits)
	}
	if c.MaxHops < 0 || c.MaxHops > limitMaxHops {
		return netip.Addr{}, fmt.Errorf("%w: MaxHops = %d: want 1 to 1024, or 0 for 32", errClientIP, c.MaxHops)
	}
	peer, ok := parseHop(r.RemoteAddr)
	if !ok {
		return netip.Addr{}, ErrNoAddr
	}
	if !c.trusts(peer) {
		return peer, nil
	}
	hops := c.MaxHops
	if hops == 0 {
		hops = defaultMaxHops
	}
	client := peer
	lines := r.Header.Values("X-Forwarded-For")
	for i := len(lines) - 1; i >= 0; i-- {
		for line, more := lines[i], true; more; {
			if hops == 0 {
				return peer, nil
			}
			hops--
			var entry string
			if entry, line, more, ok = cutLast(line); !ok {
				return peer, nil
			}
			addr, ok := parseHop(entry)
			if !ok {
				return peer, nil
			}
			if !c.trusts(addr) {
				return addr, nil
			}
			client = addr
		}
	}
	return client, nil
}

func (c *ClientIP) trusts(a netip.Addr) bool {
	for _, p := range c.Trusted {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// cutLast splits the entry right of the last comma off line and trims it. more
// says whether there was a comma, ok is false when the entry is too long. The
// work does not depend on the length of line.
func cutLast(line string) (entry, rest string, more, ok bool) {
	tail := line[max(0, len(line)-maxHop-1):]
	i := strings.LastIndexByte(tail, ',')
	if i < 0 && len(line) > maxHop {
		return "", "", false, false
	}
	entry = strings.Trim(tail[i+1:], " \t")
	if i < 0 {
		return entry, "", false, true
	}
	return entry, line[:len(line)-len(tail)+i], true, true
}

// parseHop parses an address with or without a port.
func parseHop(s string) (netip.Addr, bool) {
	if len(s) > maxHop {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		ap, err := netip.ParseAddrPort(s)
		if err != nil {
			return netip.Addr{}, false
		}
		a = ap.Addr()
	}
	return a.WithZone("").Unmap(), true
}
