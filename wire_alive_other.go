//go:build !unix || aix

package ringfence

import "net"

// alive takes every connection to be, since it cannot be looked at without reading.
func alive(net.Conn) bool { return true }
