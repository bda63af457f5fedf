//go:build !unix

package ringfence

import "net"

// alive takes every connection to be, since it cannot be looked at without reading.
func alive(net.Conn) bool { return true }

// readable takes every connection to be, so that nobody looks at it again and again.
func readable(net.Conn) bool { return true }
