package httplimit_test

import (
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence/httplimit"
)

func mustTrust(t testing.TB, cidrs ...string) httplimit.ClientIP {
	t.Helper()
	ip, err := httplimit.TrustedProxies(cidrs...)
	if err != nil {
		t.Fatal(err)
	}
	return ip
}

func request(remote string, xff ...string) *http.Request {
	return &http.Request{RemoteAddr: remote, Header: http.Header{"X-Forwarded-For": xff}}
}

func TestClientAddress(t *testing.T) {
	ours := mustTrust(t, "10.0.0.0/8", "fd00::/8", "192.0.2.1")
	nobody := httplimit.ClientIP{}
	whole, wide, three := ours, ours, ours
	whole.IPv6Bits, wide.IPv6Bits, three.MaxHops = 128, 48, 3
	const proxy = "10.0.0.1:4711"
	for _, c := range []struct {
		name   string
		ip     httplimit.ClientIP
		remote string
		xff    []string
		want   string
	}{
		// Who is asked at all.
		{"without the field the peer is the client", ours, "203.0.113.7:1", nil, "203.0.113.7"},
		{"a proxy without the field is the client", ours, proxy, nil, "10.0.0.1"},
		{"an untrusted peer may write what it likes", ours, "203.0.113.7:1", []string{"198.51.100.1"}, "203.0.113.7"},
		{"the zero value trusts nobody", nobody, proxy, []string{"198.51.100.1"}, "10.0.0.1"},
		{"a trusted peer names the client", ours, proxy, []string{"198.51.100.1"}, "198.51.100.1"},
		{"a trusted single address names the client", ours, "192.0.2.1:1", []string{"198.51.100.1"}, "198.51.100.1"},
		{"its neighbour does not", ours, "192.0.2.2:1", []string{"198.51.100.1"}, "192.0.2.2"},
		{"a peer without a port is a peer", ours, "10.0.0.1", []string{"198.51.100.1"}, "198.51.100.1"},

		// The walk.
		{"the leftmost entry is the client's own invention", ours, proxy, []string{"1.1.1.1, 198.51.100.1"}, "198.51.100.1"},
		{"trusted proxies are passed from the right", ours, proxy, []string{"1.1.1.1, 198.51.100.1, 10.2.0.1, 10.3.0.1"}, "198.51.100.1"},
		{"a trusted address left of the client proves nothing", ours, proxy, []string{"10.9.9.9, 198.51.100.1, 10.2.0.1"}, "198.51.100.1"},
		{"the second line is the proxy's", ours, proxy, []string{"1.1.1.1", "198.51.100.1"}, "198.51.100.1"},
		{"lines are joined: all of the second is trusted", ours, proxy, []string{"1.1.1.1, 198.51.100.1", "10.2.0.1, 10.3.0.1"}, "198.51.100.1"},
		{"three lines, one entry each", ours, proxy, []string{"198.51.100.1", "10.2.0.1", "10.3.0.1"}, "198.51.100.1"},
		{"an all-trusted chain is the leftmost machine", ours, proxy, []string{"10.7.0.1, 10.2.0.1"}, "10.7.0.1"},
		{"spaces and tabs do not matter", ours, proxy, []string{"1.1.1.1 ,\t 198.51.100.1 \t,  10.2.0.1  "}, "198.51.100.1"},
		{"nor does their absence", ours, proxy, []string{"1.1.1.1,198.51.100.1,10.2.0.1"}, "198.51.100.1"},

		// What is not an address ends the walk at the peer.
		{"an empty field", ours, proxy, []string{""}, "10.0.0.1"},
		{"an empty last entry", ours, proxy, []string{"198.51.100.1,"}, "10.0.0.1"},
		{"an empty entry between proxies", ours, proxy, []string{"198.51.100.1, , 10.2.0.1"}, "10.0.0.1"},
		{"an empty last line", ours, proxy, []string{"198.51.100.1", ""}, "10.0.0.1"},
		{"empty entries left of the client are not reached", ours, proxy, []string{",,,198.51.100.1"}, "198.51.100.1"},
		{"only commas", ours, proxy, []string{",,,,"}, "10.0.0.1"},
		{"unknown", ours, proxy, []string{"198.51.100.1, unknown"}, "10.0.0.1"},
		{"a unix socket's name", ours, proxy, []string{"198.51.100.1, unix:"}, "10.0.0.1"},
		{"leading zeros, octal to some", ours, proxy, []string{"203.0.113.009"}, "10.0.0.1"},
		{"three numbers", ours, proxy, []string{"203.0.113"}, "10.0.0.1"},
		{"one number", ours, proxy, []string{"3405803783"}, "10.0.0.1"},
		{"quotes", ours, proxy, []string{`"203.0.113.7"`}, "10.0.0.1"},
		{"brackets without a port", ours, proxy, []string{"[2001:db8::1]"}, "10.0.0.1"},
		{"a port that is none", ours, proxy, []string{"203.0.113.7:http"}, "10.0.0.1"},
		{"a port too high", ours, proxy, []string{"203.0.113.7:65536"}, "10.0.0.1"},
		{"an empty port", ours, proxy, []string{"203.0.113.7:"}, "10.0.0.1"},
		{"a NUL byte", ours, proxy, []string{"203.0.113.7\x00"}, "10.0.0.1"},
		{"a network", ours, proxy, []string{"203.0.113.0/24"}, "10.0.0.1"},
		{"a bad entry left of the client is not reached", ours, proxy, []string{"unknown, 198.51.100.1"}, "198.51.100.1"},

		// Ports.
		{"an IPv4 address with a port", ours, proxy, []string{"203.0.113.7:50001"}, "203.0.113.7"},
		{"another port is the same client", ours, proxy, []string{"203.0.113.7:50002"}, "203.0.113.7"},
		{"an IPv6 address with a port", ours, proxy, []string{"[2001:db8:1:2::9]:443"}, "2001:db8:1:2::/64"},

		// IPv6.
		{"an IPv6 client is its /64", ours, proxy, []string{"2001:db8:1:2:3:4:5:6"}, "2001:db8:1:2::/64"},
		{"its other addresses are the same client", ours, proxy, []string{"2001:db8:1:2:ffff::1"}, "2001:db8:1:2::/64"},
		{"an IPv6 peer is its /64 too", ours, "[2001:db8:1:2::5]:1", nil, "2001:db8:1:2::/64"},
		{"an IPv6 proxy", ours, "[fd12::1]:1", []string{"2001:db8::1, fd13::7"}, "2001:db8::/64"},
		{"IPv6 whole", whole, proxy, []string{"2001:db8:1:2:3:4:5:6"}, "2001:db8:1:2:3:4:5:6/128"},
		{"IPv6 by /48", wide, proxy, []string{"2001:db8:1:2:3:4:5:6"}, "2001:db8:1::/48"},
		{"IPv4 stays whole whatever the IPv6 bits", wide, proxy, []string{"198.51.100.1"}, "198.51.100.1"},
		{"a zone is dropped", ours, proxy, []string{"fe80::1%eth0"}, "fe80::/64"},
		{"a peer's zone is dropped, trusted or not", ours, "[fd12::1%eth0]:1", []string{"198.51.100.1"}, "198.51.100.1"},
		{"IPv4 in IPv6 is IPv4", ours, proxy, []string{"::ffff:198.51.100.1"}, "198.51.100.1"},
		{"IPv4 in IPv6, in hexadecimal", ours, proxy, []string{"::ffff:c633:6401"}, "198.51.100.1"},
		{"IPv4 in IPv6 with a zone", ours, proxy, []string{"::ffff:198.51.100.1%x"}, "198.51.100.1"},
		{"a dual-stack listener's peer is trusted as IPv4", ours, "[::ffff:10.0.0.1]:1", []string{"198.51.100.1"}, "198.51.100.1"},
		{"a proxy in IPv6 clothes is passed", ours, proxy, []string{"198.51.100.1, ::ffff:10.2.0.1"}, "198.51.100.1"},

		// Bounds.
		{"as many entries as MaxHops", three, proxy, []string{"198.51.100.1, 10.2.0.1, 10.3.0.1"}, "198.51.100.1"},
		{"one more", three, proxy, []string{"198.51.100.1, 10.2.0.1, 10.3.0.1, 10.4.0.1"}, "10.0.0.1"},
		{"one more in lines of their own", three, proxy, []string{"198.51.100.1", "10.2.0.1", "10.3.0.1", "10.4.0.1"}, "10.0.0.1"},
		{"32 entries by default", ours, proxy, []string{"198.51.100.1" + strings.Repeat(",10.2.0.1", 31)}, "198.51.100.1"},
		{"not 33", ours, proxy, []string{"198.51.100.1" + strings.Repeat(",10.2.0.1", 32)}, "10.0.0.1"},
		{"an entry of 128 bytes, spaces included", ours, proxy, []string{"1.1.1.1," + strings.Repeat(" ", 116) + "198.51.100.1"}, "198.51.100.1"},
		{"one of 129", ours, proxy, []string{"1.1.1.1," + strings.Repeat(" ", 117) + "198.51.100.1"}, "10.0.0.1"},
		{"a lone entry of 128 bytes", ours, proxy, []string{strings.Repeat(" ", 116) + "198.51.100.1"}, "198.51.100.1"},
		{"a lone one of 129", ours, proxy, []string{strings.Repeat(" ", 117) + "198.51.100.1"}, "10.0.0.1"},
		{"a zone of a megabyte", ours, proxy, []string{"fe80::1%" + strings.Repeat("z", 1<<20)}, "10.0.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := c.ip.Key(request(c.remote, c.xff...))
			if err != nil || got != c.want {
				t.Errorf("%q, %v, want %q", got, err, c.want)
			}
		})
	}
}

func TestAPeerWithoutAnAddressIsAnErrorNotAnEmptyKey(t *testing.T) {
	ip := mustTrust(t, "10.0.0.0/8")
	for _, remote := range []string{"", "@", "/run/app.sock", "localhost:80", ":80", "10.0.0.1:http", strings.Repeat("1", 1<<20)} {
		key, err := ip.Key(request(remote, "198.51.100.1"))
		if !errors.Is(err, httplimit.ErrNoAddr) || key != "" {
			t.Errorf("RemoteAddr %.20q: %q, %v, want ErrNoAddr", remote, key, err)
		}
	}
}

func TestClientIPOutOfRangeIsAnError(t *testing.T) {
	for _, ip := range []httplimit.ClientIP{{IPv6Bits: -1}, {IPv6Bits: 129}, {MaxHops: -1}, {MaxHops: 1025}} {
		if key, err := ip.Key(request("203.0.113.7:1")); err == nil || key != "" {
			t.Errorf("%+v: %q, %v, want an error", ip, key, err)
		}
	}
	// A network that was never set matches nothing, and nothing breaks.
	ip := httplimit.ClientIP{Trusted: []netip.Prefix{{}}, IPv6Bits: 1, MaxHops: 1024}
	if key, err := ip.Key(request("203.0.113.7:1", "1.1.1.1")); err != nil || key != "203.0.113.7" {
		t.Errorf("%q, %v", key, err)
	}
}

func TestTrustedProxiesRefuses(t *testing.T) {
	for _, c := range []struct{ name, cidr, want string }{
		{"nothing", "", "neither a network"},
		{"a name", "proxy.internal", "neither a network"},
		{"a list", "10.0.0.0/8,fd00::/8", "not a network"},
		{"a mask written out", "10.0.0.0/255.0.0.0", "not a network"},
		{"a mask too long", "10.0.0.0/33", "not a network"},
		{"leading zeros", "010.0.0.0/8", "not a network"},
		{"an address with a port", "10.0.0.1:80", "neither a network"},
		{"a zone", "fe80::1%eth0", "without zone"},
		{"a zone in a network", "fe80::%eth0/64", "not a network"},
		{"bits behind the mask", "10.1.2.3/8", "write 10.0.0.0/8 or 10.1.2.3/32"},
		{"everybody", "0.0.0.0/0", "trusts every address"},
		{"everybody in IPv6", "::/0", "trusts every address"},
		{"everybody in IPv6 clothes", "::ffff:0:0/96", "trusts every address"},
		{"a network half in, half out of the mapped addresses", "::ffff:0:0/90", "reaches beyond"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ip, err := httplimit.TrustedProxies("10.0.0.0/8", c.cidr)
			if err == nil || !strings.Contains(err.Error(), c.want) || ip.Trusted != nil {
				t.Errorf("%v, %v, want an error with %q", ip, err, c.want)
			}
		})
	}
	if ip := mustTrust(t); ip.Trusted != nil {
		t.Errorf("no networks: %v", ip)
	}
	if got := mustTrust(t, "::ffff:10.0.0.0/104").Trusted[0].String(); got != "10.0.0.0/8" {
		t.Errorf("a mapped network became %s", got)
	}
}

// The bound is on the work, which the clock shows only roughly: 10,000 walks over
// a megabyte each take milliseconds when bounded and minutes when not.
func TestAFieldOfAMegabyteCostsNoMoreThanAShortOne(t *testing.T) {
	ip := mustTrust(t, "10.0.0.0/8")
	for _, c := range []struct{ name, xff string }{
		{"trusted addresses", strings.Repeat("10.2.0.1,", 1<<20/9)},
		{"trusted addresses, none empty", strings.Repeat("10.2.0.1,", 1<<20/9) + "10.2.0.1"},
		{"commas", strings.Repeat(",", 1<<20)},
		{"spaces", strings.Repeat(" ", 1<<20)},
		{"no comma at all", strings.Repeat("1", 1<<20)},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := request("10.0.0.1:1", c.xff)
			start := time.Now()
			for range 10_000 {
				if key, err := ip.Key(r); err != nil || key != "10.0.0.1" {
					t.Fatalf("%q, %v", key, err)
				}
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("10,000 walks took %v", took)
			}
		})
	}
}

func FuzzClientAddress(f *testing.F) {
	for _, s := range []string{
		"", ",", "1.1.1.1, 198.51.100.1", "unknown", "203.0.113.009", "fe80::1%eth0", "::ffff:10.0.0.1",
		"[2001:db8::1]:443", "[::1]", "1.1.1.1:80", "10.0.0.1,10.0.0.2", strings.Repeat("10.0.0.1,", 40),
	} {
		f.Add("10.0.0.1:1", s, "10.0.0.2", 0)
		f.Add("203.0.113.7:1", s, "", 64)
		f.Add(s, s, s, 48)
	}
	ours := mustTrust(f, "10.0.0.0/8", "fd00::/8")
	f.Fuzz(func(t *testing.T, remote, line1, line2 string, bits int) {
		ip := ours
		ip.IPv6Bits = bits
		r := request(remote, line1, line2)
		key, err := ip.Key(r)
		if (err == nil) == (key == "") {
			t.Fatalf("key %q, error %v: want exactly one", key, err)
		}
		if bits < 0 || bits > 128 {
			if err == nil {
				t.Fatalf("IPv6Bits %d was accepted", bits)
			}
			return
		}
		peer, peerErr := httplimit.ClientIP{IPv6Bits: bits}.Addr(r)
		if (err == nil) != (peerErr == nil) {
			t.Fatalf("error %v, but %v for the peer: the field must not decide that", err, peerErr)
		}
		if err != nil {
			return
		}
		addr, err := ip.Addr(r)
		if err != nil || !addr.IsValid() || addr.Zone() != "" || addr.Is4In6() {
			t.Fatalf("address %v, %v", addr, err)
		}
		trusted := false
		for _, p := range ours.Trusted {
			trusted = trusted || p.Contains(peer)
		}
		if !trusted && addr != peer {
			t.Fatalf("peer %v is not trusted, yet the client is %v", peer, addr)
		}
		// A key is an address or a network in the one way of writing it.
		if a, err := netip.ParseAddr(key); err == nil {
			if a != addr || a.String() != key {
				t.Fatalf("key %q of %v", key, addr)
			}
		} else if p, err := netip.ParsePrefix(key); err != nil || p.String() != key || !p.Contains(addr) || p.Masked() != p {
			t.Fatalf("key %q of %v: %v", key, addr, err)
		}
		// Whatever a client writes to the left of what our proxy appends is ignored.
		spoofed := request("10.0.0.1:1", line1, line2+", 198.51.100.1")
		if key, err := ours.Key(spoofed); err != nil || key != "198.51.100.1" {
			t.Fatalf("spoofed: %q, %v", key, err)
		}
	})
}

func BenchmarkClientAddress(b *testing.B) {
	ip := mustTrust(b, "10.0.0.0/8", "fd00::/8")
	r := request("10.0.0.1:1", "1.1.1.1, 198.51.100.1, 10.2.0.1")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ip.Key(r); err != nil {
			b.Fatal(err)
		}
	}
}
