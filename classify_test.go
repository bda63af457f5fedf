package ringfence

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/redis/go-redis/v9"
)

// serverSaid is what go-redis makes of an error reply it has no type for.
type serverSaid string

func (e serverSaid) Error() string { return string(e) }
func (serverSaid) RedisError()     {}

type timeoutError struct{}

func (timeoutError) Error() string   { return "timed out" }
func (timeoutError) Timeout() bool   { return true }
func (timeoutError) Temporary() bool { return true }

// The texts are word for word those of Redis 7.0 in the state named.
func TestWhatServersAndConnectionsSayIsUnderstood(t *testing.T) {
	refused := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	tests := []struct {
		state string
		err   error
		want  *errorType
	}{
		{"a legacy script on a replica", serverSaid("READONLY You can't write against a read only replica. script: 0123456789012345678901234567890123456789, on @user_script:1."), typeReadonly},
		{"a script with a #! line on a replica", serverSaid("READONLY You can't write against a read only replica."), typeReadonly},
		{"a write in a script without writes", serverSaid("ERR Write commands are not allowed from read-only scripts. script: 01, on @user_script:1."), typeOther},
		{"a script the server does not have", serverSaid("NOSCRIPT No matching script. Please use EVAL."), typeNoScript},
		{"a replica without its primary", serverSaid("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'."), typeMasterDown},
		{"starting", serverSaid("LOADING Redis is loading the dataset in memory"), typeLoading},
		{"out of memory", serverSaid("OOM command not allowed when used memory > 'maxmemory'."), typeOOM},
		{"cannot save", serverSaid("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk."), typeMisconf},
		{"too few replicas", serverSaid("NOREPLICAS Not enough good replicas to write."), typeNoReplicas},
		{"a slow script", serverSaid("BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE."), typeBusy},
		{"a cluster without all slots", serverSaid("CLUSTERDOWN The cluster is down"), typeClusterDown},
		{"a slot on the move", serverSaid("TRYAGAIN Multiple keys request during rehashing of slot"), typeMoved},
		{"a slot of which masters disagree whose it is", fmt.Errorf("charging: %w", errRedirected), typeMoved},
		{"a slot elsewhere", serverSaid("MOVED 3999 127.0.0.1:6381"), typeMoved},
		{"a slot half elsewhere", serverSaid("ASK 3999 127.0.0.1:6381"), typeMoved},
		{"no password", serverSaid("NOAUTH Authentication required."), typeAuth},
		{"another password", serverSaid("WRONGPASS invalid username-password pair or user is disabled."), typeAuth},
		{"not allowed", serverSaid("NOPERM this user has no permissions to run the 'evalsha' command"), typeNoPerm},
		{"not allowed inside a script", serverSaid("ERR The user executing the script can't run this command or subcommand script: 01, on @user_script:1."), typeNoPerm},
		{"not allowed inside a script, Redis 7.2", serverSaid("ERR ACL failure in script: User u has no permissions to run the 'zadd' command"), typeNoPerm},
		{"another type", serverSaid("WRONGTYPE Operation against a key holding the wrong kind of value"), typeWrongType},
		{"too many clients", serverSaid("ERR max number of clients reached"), typeDial},
		{"something new", serverSaid("ERR something new"), typeOther},
		{"a prefix is a whole word", serverSaid("OOMPH of a kind"), typeOther},
		{"wrapped", fmt.Errorf("charging: %w", serverSaid("LOADING Redis is loading the dataset in memory")), typeLoading},

		{"nobody listens", refused, typeRefused},
		{"nobody listens, found by the handshake", fmt.Errorf("failed to initialize connection: %w", refused), typeRefused},
		{"no route", &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.EHOSTUNREACH)}, typeDial},
		{"a name that does not exist", &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: "x"}}, typeDial},
		{"a dial that takes too long", &net.OpError{Op: "dial", Net: "tcp", Err: timeoutError{}}, typeDial},
		{"a silent server", &net.OpError{Op: "read", Net: "tcp", Err: os.ErrDeadlineExceeded}, typeTimeout},
		{"the operation's time is over", context.DeadlineExceeded, typeTimeout},
		{"another time-out", timeoutError{}, typeTimeout},
		{"closed by the server", io.EOF, typeEOF},
		{"closed in mid-reply", io.ErrUnexpectedEOF, typeEOF},
		{"reset", &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.ECONNRESET)}, typeEOF},
		{"too many clients, as seen while writing", &net.OpError{Op: "write", Net: "tcp", Err: os.NewSyscallError("write", syscall.EPIPE)}, typeEOF},
		{"closed by us", &net.OpError{Op: "read", Net: "tcp", Err: net.ErrClosed}, typeEOF},
		{"no connection free", redis.ErrPoolTimeout, typePoolTimeout},
		{"no connection allowed", redis.ErrPoolExhausted, typePoolTimeout},
		{"a reply that is not ours", fmt.Errorf("%w: 3 values", errProtocol), typeProtocol},
		{"a client that is closed", redis.ErrClosed, typeBroken},
		{"anything else", errors.New("who knows"), typeBroken},
	}
	for _, c := range tests {
		t.Run(c.state, func(t *testing.T) {
			if got := classify(c.err); got != c.want {
				t.Errorf("%v: %+v, want %+v", c.err, *got, *c.want)
			}
		})
	}
}

// What follows from an error decides whether callers are let down or charged twice, so it
// is written out here once more.
func TestWhatFollowsFromEachKindOfError(t *testing.T) {
	const trips, ran, refused, moved = 1, 2, 4, 8
	want := map[*errorType]int{
		typeTimeout: trips | ran, typeEOF: trips | ran, typeProtocol: trips | ran, typeBroken: trips | ran,
		typeRefused: trips, typeDial: trips, typeLoading: trips, typeClusterDown: trips, typeNoReplicas: trips,
		typeOOM: trips, typeMisconf: trips, typeBusy: trips,
		typeReadonly: trips | moved, typeMasterDown: trips | moved, typeMoved: trips | moved,
		typePoolTimeout: 0, typeNoScript: 0, typeWrongType: 0,
		typeAuth: refused, typeNoPerm: refused,
		typeOther: ran,
	}
	for _, e := range append([]*errorType{typeBroken}, errorTypes...) {
		got := 0
		for i, is := range []bool{e.trips, e.ran, e.refused, e.moved} {
			if is {
				got |= 1 << i
			}
		}
		if w, ok := want[e]; !ok || got != w {
			t.Errorf("%s: %04b, want %04b (listed: %t)", e.name, got, w, ok)
		}
	}
}

func TestThePrimaryIsChosenByWhoTookWhosePlace(t *testing.T) {
	down := errors.New("down")
	primary := func(id, before string) view { return view{nodeInfo{primary: true, replID: id, replID2: before}, nil} }
	replica := func(id string) view { return view{nodeInfo{replID: id}, nil} }
	silent := func(v view) view { v.err = down; return v }
	const none = "0000000000000000000000000000000000000000"
	tests := []struct {
		name    string
		current int
		views   []view
		chosen  int
		split   bool
	}{
		{"all is well", 0, []view{primary("A", none), replica("A")}, 0, false},
		{"nobody answers", 0, []view{silent(view{}), silent(view{})}, 0, false},
		{"the primary is silent, its replica is one still", 0, []view{silent(primary("A", none)), replica("A")}, 0, false},
		{"the primary is silent, its replica was promoted", 0, []view{silent(primary("A", none)), primary("B", "A")}, 1, false},
		{"the primary was never heard of, another is one", 0, []view{silent(view{}), primary("B", "A")}, 1, false},
		{"the primary was demoted", 0, []view{replica("B"), primary("B", "A")}, 1, false},
		{"all were demoted", 0, []view{replica("C"), replica("C")}, 0, false},
		{"two: the second took the first one's place", 0, []view{primary("A", none), primary("B", "A")}, 1, false},
		{"two: the first took the second one's place", 1, []view{primary("B", "A"), primary("A", none)}, 0, false},
		{"two: the present one took the other's place", 1, []view{primary("A", none), primary("B", "A")}, 1, false},
		{"two that know nothing of each other", 0, []view{primary("A", none), primary("B", none)}, 0, true},
		{"two that know nothing of each other, the second in use", 1, []view{primary("A", none), primary("B", none)}, 1, true},
		{"two that do not say", 0, []view{primary("", ""), primary("", "")}, 0, true},
		{"the old one came back empty", 1, []view{primary("C", none), primary("B", "A")}, 1, true},
		{"the present one is silent, and the one whose place it took is a primary still", 1, []view{primary("A", none), silent(primary("B", "A"))}, 1, false},
		{"the present one is silent, and a stranger is a primary", 1, []view{primary("C", none), silent(primary("B", "A"))}, 0, false},
		{"the present one was demoted to its predecessor", 1, []view{primary("A", none), replica("A")}, 0, false},
		{"three, each promoted from the last", 0, []view{primary("A", none), primary("B", "A"), primary("C", "B")}, 2, false},
		{"a replica and two primaries", 0, []view{replica("A"), primary("A", none), primary("B", "A")}, 2, false},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			if chosen, split := choosePrimary(c.current, c.views); chosen != c.chosen || split != c.split {
				t.Errorf("%d, split %t, want %d, %t", chosen, split, c.chosen, c.split)
			}
		})
	}
}
