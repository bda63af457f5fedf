//go:build !unix

package redistest

import "os"

// canSignal false makes Launch refuse, so the signals below are never sent.
const canSignal = false

var stopSignal, continueSignal = os.Kill, os.Kill
