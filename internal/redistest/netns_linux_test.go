package redistest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// testNetns skips for users who may not make namespaces: build/skips.txt says why
// that is no failure. For root, as in CI, their absence is one.
func testNetns(t *testing.T) *Netns {
	t.Helper()
	n, err := LaunchNetns()
	if errors.Is(err, ErrNoPrivilege) && os.Geteuid() != 0 {
		t.Skip(err)
	}
	must(t, err)
	t.Cleanup(n.Stop)
	return n
}

// roundTrip sends PING over an open connection and returns how long the reply
// took, false if none came within the bound.
func roundTrip(t *testing.T, conn net.Conn, bound time.Duration) (time.Duration, bool) {
	t.Helper()
	start := time.Now()
	must(t, conn.SetDeadline(start.Add(bound)))
	if _, err := conn.Write([]byte("PING\r\n")); err != nil {
		t.Fatal(err)
	}
	return awaitPong(t, conn, start)
}

func awaitPong(t *testing.T, conn net.Conn, start time.Time) (time.Duration, bool) {
	t.Helper()
	reply := make([]byte, len("+PONG\r\n"))
	_, err := conn.Read(reply)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, false
	}
	must(t, err)
	return time.Since(start), true
}

func dial(t *testing.T, s *Server) net.Conn {
	t.Helper()
	var d net.Dialer
	conn, err := d.DialContext(deadline(t), "tcp4", s.Addr())
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestServerInANamespaceIsReachedByItsOwnAddressOnly(t *testing.T) {
	n := testNetns(t)
	s := Start(t, Options{Netns: n, Clock: true})
	if want := fmt.Sprintf("%s:%d", n.ServerIP(), s.port); s.Addr() != want || s.URL() != "redis://"+want {
		t.Errorf("address %s, want %s", s.Addr(), want)
	}
	must(t, s.Step(time.Hour))
	wantMoved(t, s, time.Hour)
	info, err := s.Client().ClientInfo(deadline(t)).Result()
	must(t, err)
	if host, _, _ := net.SplitHostPort(info.Addr); host != n.ClientIP().String() {
		t.Errorf("the server sees the client at %s, want %s", host, n.ClientIP())
	}
	if conn, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", s.port)); err == nil {
		_ = conn.Close()
		t.Error("it is on 127.0.0.1, too")
	}
	big := strings.Repeat("x", 3<<20) // many packets, both ways
	must(t, s.Client().Set(deadline(t), "big", big, 0).Err())
	got, err := s.Client().Get(deadline(t), "big").Result()
	must(t, err)
	if got != big {
		t.Errorf("%d bytes came back", len(got))
	}

	s.Kill()
	// A new connection: the end of the open ones is still on its way here.
	var d net.Dialer
	if _, err := d.DialContext(deadline(t), "tcp4", s.Addr()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("killed server: %v, want connection refused", err)
	}
	must(t, s.Restart(deadline(t)))
	wantMoved(t, s, time.Hour)
}

func TestDroppedPacketsHangOpenAndNewConnectionsUntilTheCableIsBack(t *testing.T) {
	n := testNetns(t)
	s := Start(t, Options{Netns: n})
	conn := dial(t, s)
	if _, ok := roundTrip(t, conn, 5*time.Second); !ok {
		t.Fatal("no reply")
	}
	if n.Lost() != 0 {
		t.Errorf("%d packets lost on a good cable", n.Lost())
	}
	n.Drop(true)
	start := time.Now()
	if _, ok := roundTrip(t, conn, 50*time.Millisecond); ok {
		t.Error("a reply without packets")
	}
	short, cancel := context.WithTimeout(deadline(t), 50*time.Millisecond)
	defer cancel()
	var d net.Dialer
	if _, err := d.DialContext(short, "tcp4", s.Addr()); !errors.Is(err, os.ErrDeadlineExceeded) && !isExpired(err) {
		t.Errorf("new connection: %v, want a time-out", err)
	}
	if n.Lost() == 0 {
		t.Error("nothing was lost")
	}
	n.Drop(false)
	must(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	took, ok := awaitPong(t, conn, start) // what was sent while it hung
	if !ok || took < 100*time.Millisecond {
		t.Errorf("reply %v after %v", ok, took)
	}
	t.Logf("the reply came %v after the cable was pulled", took)
}

func TestLostPacketsAreRetransmittedAndCounted(t *testing.T) {
	n := testNetns(t)
	s := Start(t, Options{Netns: n})
	conn := dial(t, s)
	n.Loss(20)
	start := time.Now()
	slow := 0
	for n.Lost() < 5 {
		took, ok := roundTrip(t, conn, 15*time.Second)
		if !ok {
			t.Fatal("TCP gave up")
		}
		if took > 100*time.Millisecond { // the kernel's least time to a retransmission is 200 ms
			slow++
		}
	}
	t.Logf("5 packets lost in %v, %d slow replies", time.Since(start), slow)
	if slow == 0 {
		t.Error("no reply was held up by a lost packet")
	}
	n.Loss(0)
	before := n.Lost()
	for range 100 {
		if _, ok := roundTrip(t, conn, 15*time.Second); !ok {
			t.Fatal("no reply")
		}
	}
	if n.Lost() != before {
		t.Errorf("%d packets lost after the end of the loss", n.Lost()-before)
	}
	n.Loss(100)
	if _, ok := roundTrip(t, conn, 50*time.Millisecond); ok {
		t.Error("a reply although every packet is lost")
	}
}

func TestDelayHoldsPacketsInBothDirections(t *testing.T) {
	const d = 30 * time.Millisecond
	n := testNetns(t)
	s := Start(t, Options{Netns: n})
	conn := dial(t, s)
	n.Delay(d)
	took, ok := roundTrip(t, conn, 5*time.Second)
	if !ok || took < 2*d {
		t.Errorf("round trip %v, %v; want %v or more", took, ok, 2*d)
	}
	start := time.Now()
	fresh := dial(t, s)
	if took := time.Since(start); took < 2*d {
		t.Errorf("handshake %v, want %v or more", took, 2*d)
	}
	// A delay adds to the latency, it does not limit how much is under way.
	const commands = 200
	start = time.Now()
	if _, err := fresh.Write([]byte(strings.Repeat("PING\r\n", commands))); err != nil {
		t.Fatal(err)
	}
	must(t, fresh.SetDeadline(time.Now().Add(10*time.Second)))
	lines := bufio.NewScanner(fresh)
	for range commands {
		if !lines.Scan() {
			t.Fatal(lines.Err())
		}
	}
	if took := time.Since(start); took > commands*d/2 {
		t.Errorf("%d pipelined replies took %v", commands, took)
	}
	n.Delay(-1)
	eventually(t, "the delay is gone", func() bool {
		took, ok := roundTrip(t, conn, 5*time.Second)
		return ok && took < 2*d
	})
	if n.Lost() != 0 {
		t.Errorf("%d packets lost", n.Lost())
	}
}

func TestCutPartsTwoNamespacesWhileClientsReachBoth(t *testing.T) {
	ctx := deadline(t)
	a, b := testNetns(t), testNetns(t)
	primary := Start(t, Options{Netns: a})
	replica := Start(t, Options{Netns: b, ReplicaOf: primary})
	must(t, replica.WaitInSync(ctx))

	a.Cut(b, true)
	must(t, primary.Client().Set(ctx, "k", "v", 0).Err())
	size, err := replica.Client().DBSize(ctx).Result()
	must(t, err)
	if size != 0 {
		t.Error("the write crossed the cut")
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if err := replica.WaitInSync(short); !isExpired(err) {
		t.Errorf("error %v, want a deadline", err)
	}
	b.Cut(a, false) // from either side
	must(t, replica.WaitInSync(ctx))
	must(t, replica.Client().Get(ctx, "k").Err())
}

func TestOnlyAReplicaOutsideReachesItsPrimaryInside(t *testing.T) {
	ctx := deadline(t)
	n := testNetns(t)
	inside, outside := Start(t, Options{Netns: n}), Start(t, Options{})
	wantError(t, inside.ReplicaOf(ctx, outside), "cannot reach "+outside.Addr(), "give that one a Netns")
	_, err := Launch(ctx, Options{Netns: n, ReplicaOf: outside})
	wantError(t, err, "cannot reach "+outside.Addr())
	_, err = LaunchSentinel(ctx, SentinelOptions{Netns: onlyFirst(n)})
	wantError(t, err, "Netns(1)", "leave Netns nil")
	_, err = LaunchCluster(ctx, ClusterOptions{Netns: onlyFirst(n)})
	wantError(t, err, "Netns(1)", "leave Netns nil")

	must(t, outside.ReplicaOf(ctx, inside))
	must(t, outside.WaitInSync(ctx))
}

func onlyFirst(n *Netns) func(int) *Netns {
	return func(i int) *Netns {
		if i == 0 {
			return n
		}
		return nil
	}
}

func TestClusterSurvivesItsMasterBehindAPulledCable(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	master, rest := testNetns(t), testNetns(t)
	c := StartCluster(t, ClusterOptions{ReplicasPer: 1, NodeTimeout: time.Second, Netns: func(i int) *Netns {
		if i == 0 {
			return master
		}
		return rest
	}})
	old, replica := c.Nodes()[0], c.Nodes()[3]
	master.Drop(true)
	eventually(t, "the replica takes over", func() bool { return c.MasterOf(0) == replica })
	master.Drop(false)
	must(t, c.WaitReady(ctx))
	if replicas := c.ReplicasOf(replica); len(replicas) != 1 || replicas[0] != old {
		t.Errorf("%d replicas, want the former master", len(replicas))
	}
}

func TestSentinelsReplaceAMasterThatClientsStillReach(t *testing.T) {
	t.Parallel()
	ctx := deadline(t)
	master, rest := testNetns(t), testNetns(t)
	set := StartSentinel(t, SentinelOptions{Replicas: 1, Netns: func(i int) *Netns {
		if i == 0 {
			return master
		}
		return rest
	}})
	old, replica := set.Servers()[0], set.Servers()[1]
	master.Cut(rest, true)
	eventually(t, "the replica is promoted", func() bool {
		must(t, old.Client().Set(ctx, "k", "lost", 0).Err()) // all the while
		return set.Master(ctx) == replica
	})
	must(t, old.Client().Set(ctx, "k", "lost", 0).Err())
	n, err := replica.Client().Exists(ctx, "k").Result()
	must(t, err)
	if n != 0 {
		t.Error("a write crossed the cut")
	}
}

func TestStoppedNamespaceLeavesNothing(t *testing.T) {
	n := testNetns(t)
	device := n.deviceName()
	if _, err := net.InterfaceByName(device); err != nil {
		t.Errorf("no device while it runs: %v", err)
	}
	s := Start(t, Options{Netns: n})
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", s.process().cmd.Process.Pid))
	must(t, err)
	if theirs == threadNetns(t, "self") {
		t.Fatal("the server is in no namespace of its own")
	}
	n.Stop() // with a server inside
	n.Stop()
	eventually(t, "the server dies with the namespace", func() bool { return !s.Running() })
	wantError(t, s.Restart(deadline(t)), "namespace was stopped")
	_, err = Launch(deadline(t), Options{Netns: n})
	wantError(t, err, "namespace was stopped")
	eventually(t, "the device is removed", func() bool {
		_, err := net.InterfaceByName(device)
		return err != nil
	})
	eventually(t, "no thread of this process is left in it", func() bool {
		tasks, err := filepath.Glob("/proc/self/task/*")
		must(t, err)
		for _, task := range tasks {
			if link, err := os.Readlink(task + "/ns/net"); err == nil && link == theirs {
				return false
			}
		}
		return true
	})
}

func threadNetns(t *testing.T, task string) string {
	t.Helper()
	link, err := os.Readlink("/proc/" + task + "/ns/net")
	must(t, err)
	return link
}

func TestManyNamespacesHaveDifferentAddresses(t *testing.T) {
	seen := map[string]bool{}
	for range 5 {
		n := testNetns(t)
		seen[n.ServerIP().String()] = true
		seen[n.ClientIP().String()] = true
	}
	if len(seen) != 10 {
		t.Errorf("%d different addresses for 5 namespaces", len(seen))
	}

	tb := &fakeTB{}
	device := StartNetns(tb).deviceName()
	tb.finish()
	if _, err := net.InterfaceByName(device); err == nil || len(tb.failures) != 0 {
		t.Errorf("the device outlives its test; failures %q", tb.failures)
	}
}

func TestAddressesOfTheLastNamespaceAreInRange(t *testing.T) {
	n := &Netns{}
	n.setIndex(maxNamespaces - 1)
	if n.client.String() != "198.19.255.253" || n.server.String() != "198.19.255.254" {
		t.Errorf("%s and %s", n.client, n.server)
	}
	vpn := &net.IPNet{IP: net.IPv4(198, 18, 0, 1), Mask: net.CIDRMask(15, 32)}
	ours := &net.IPNet{IP: n.client.AsSlice(), Mask: net.CIDRMask(32, 32)}
	if got := covering([]net.Addr{ours, vpn}, n.server); got != vpn {
		t.Errorf("overlap with %v, want %v", got, vpn)
	}
	if got := covering([]net.Addr{ours}, n.server); got != nil {
		t.Errorf("overlap with %v", got)
	}
}

func TestNamespaceWithoutPrivilegeIsAnErrorThatSaysWhatToDo(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), orphanEnv+"=unprivileged", "GORACE=atexit_sleep_ms=0")
	if os.Getuid() == 0 {
		const nobody = 65534
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "as root") || !strings.Contains(string(out), "no privilege: true") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestNamespaceAndItsServersDieWithTheirParent(t *testing.T) {
	testNetns(t) // or skip
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), orphanEnv+"=netns")
	stdin, err := cmd.StdinPipe()
	must(t, err)
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	var device, dir string
	var pid int
	if _, err := fmt.Fscan(stdout, &device, &pid, &dir); err != nil {
		t.Error(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // nobody is left to do it
	if _, err := net.InterfaceByName(device); err != nil {
		t.Errorf("device %s: %v", device, err)
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	eventually(t, "the server dies", func() bool {
		state := processState(pid)
		return state == 0 || state == 'Z' // dead, and nobody's business to reap here
	})
	eventually(t, "the device goes", func() bool {
		_, err := net.InterfaceByName(device)
		return err != nil
	})
}

// orphanNetns is the parent of the tests above.
func orphanNetns(how string) {
	n, err := LaunchNetns()
	if how == "unprivileged" {
		fmt.Println("no privilege:", errors.Is(err, ErrNoPrivilege), err)
		return
	}
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	s, err := Launch(context.Background(), Options{Netns: n})
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	fmt.Println(n.deviceName(), s.process().cmd.Process.Pid, s.dir)
	_, _ = os.Stdin.Read(make([]byte, 1)) // until killed
}
