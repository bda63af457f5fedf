package ringfence

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/redis/go-redis/v9"
)

// errorType is one value of the label error_type, and what follows from it.
type errorType struct {
	name string
	// trips: it counts against the server, towards opening the breaker.
	trips bool
	// ran: the operation may have run, so what it charged is unknown.
	ran bool
	// refused: the server will not do it for us. Waiting changes nothing, so the breaker
	// stays closed, somebody is told, and the failure policy answers without asking a
	// replica.
	refused bool
	// moved: the server is not, or no longer, the primary.
	moved bool
}

// The kinds of error. What the servers say word for word, and what go-redis makes of it,
// was tried out on Redis 7.0; scripts with a "#!lua" line are checked before they run, so
// what the server refuses it has not applied.
var (
	typeTimeout     = &errorType{name: "timeout", trips: true, ran: true}
	typeRefused     = &errorType{name: "refused", trips: true}
	typeDial        = &errorType{name: "dial", trips: true}
	typeEOF         = &errorType{name: "eof", trips: true, ran: true}
	typePoolTimeout = &errorType{name: "pool_timeout"}
	typeLoading     = &errorType{name: "loading", trips: true}
	typeReadonly    = &errorType{name: "readonly", trips: true, moved: true}
	typeMasterDown  = &errorType{name: "masterdown", trips: true, moved: true}
	typeClusterDown = &errorType{name: "clusterdown", trips: true}
	typeMoved       = &errorType{name: "moved", trips: true, moved: true}
	typeNoReplicas  = &errorType{name: "noreplicas", trips: true}
	typeOOM         = &errorType{name: "oom", trips: true}
	typeMisconf     = &errorType{name: "misconf", trips: true}
	typeBusy        = &errorType{name: "busy", trips: true}
	typeNoScript    = &errorType{name: "noscript"}
	typeAuth        = &errorType{name: "auth", refused: true}
	typeNoPerm      = &errorType{name: "noperm", refused: true}
	typeWrongType   = &errorType{name: "wrongtype"}
	typeProtocol    = &errorType{name: "protocol", trips: true, ran: true}
	typeOther       = &errorType{name: "other", ran: true}
	typeBroken      = &errorType{name: "other", trips: true, ran: true} // a connection, in a way not foreseen
)

// errorTypes are all kinds, for initialising the metric.
var errorTypes = []*errorType{
	typeTimeout, typeRefused, typeDial, typeEOF, typePoolTimeout, typeLoading, typeReadonly,
	typeMasterDown, typeClusterDown, typeMoved, typeNoReplicas, typeOOM, typeMisconf, typeBusy,
	typeNoScript, typeAuth, typeNoPerm, typeWrongType, typeProtocol, typeOther,
}

// errorPrefixes are the words with which a server's refusal begins.
var errorPrefixes = []struct {
	prefix string
	is     *errorType
}{
	{"LOADING ", typeLoading},
	{"READONLY ", typeReadonly},
	{"MASTERDOWN ", typeMasterDown},
	{"CLUSTERDOWN ", typeClusterDown},
	{"MOVED ", typeMoved},
	{"ASK ", typeMoved},
	{"TRYAGAIN ", typeMoved},
	{"NOREPLICAS ", typeNoReplicas},
	{"OOM ", typeOOM},
	{"MISCONF ", typeMisconf},
	{"BUSY ", typeBusy},
	{"NOSCRIPT ", typeNoScript},
	{"NOAUTH ", typeAuth},
	{"WRONGPASS ", typeAuth},
	{"NOPERM ", typeNoPerm},
	{"WRONGTYPE ", typeWrongType},
}

// classify says which kind an error of an operation is. It must not be nil.
func classify(err error) *errorType {
	var said redis.Error
	if errors.As(err, &said) {
		text := said.Error()
		for _, p := range errorPrefixes {
			if strings.HasPrefix(text, p.prefix) {
				return p.is
			}
		}
		switch {
		case strings.Contains(text, "The user executing the script can't"),
			strings.Contains(text, "ACL failure in script"):
			return typeNoPerm
		case strings.Contains(text, "Protocol error: unauthenticated"):
			// What NOAUTH is for a command of more than ten words; then Redis hangs up.
			return typeAuth
		case strings.Contains(text, "max number of clients"):
			return typeDial
		}
		return typeOther
	}
	if errors.Is(err, errRedirected) {
		return typeMoved
	}
	var op *net.OpError
	var cert *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &cert), errors.As(err, &record),
		// An alert: crypto/tls calls both sides' an operation. A server that wants
		// another certificate says so only after the client's first command.
		errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error"):
		return typeDial
	case errors.Is(err, errProtocol):
		return typeProtocol
	case errors.Is(err, redis.ErrPoolTimeout), errors.Is(err, redis.ErrPoolExhausted):
		return typePoolTimeout
	case errors.Is(err, syscall.ECONNREFUSED):
		return typeRefused
	case errors.As(err, &op) && op.Op == "dial":
		return typeDial
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), isTimeout(err):
		return typeTimeout
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, net.ErrClosed):
		return typeEOF
	}
	return typeBroken
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}
