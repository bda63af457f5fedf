package redistest

import "context"

// TB is the part of [testing.TB] that this package needs, so that it need not
// import testing.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Cleanup(func())
	Logf(format string, args ...any)
}

// Start launches a server for one test, fails the test if that is not possible
// (a missing redis-server is a failure, not a skip), and stops the server when
// the test ends.
func Start(t TB, o Options) *Server {
	t.Helper()
	s, err := launch(context.Background(), o, t)
	if err != nil {
		t.Fatalf("%v", err)
		return nil
	}
	t.Cleanup(s.Stop)
	t.Logf("real redis-server at %s", s.Addr())
	return s
}
