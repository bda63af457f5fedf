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
	s, err := launch(context.Background(), o, dataServer, t)
	if err != nil {
		t.Fatalf("%v", err)
		return nil
	}
	t.Cleanup(s.Stop)
	logReal(t, s)
	return s
}

// logReal says that the test runs against real servers, in the words by which
// the summary of a test run tells such tests from others.
func logReal(t TB, servers ...*Server) {
	t.Helper()
	for _, s := range servers {
		t.Logf("real redis-server %s", s.Addr())
	}
}
