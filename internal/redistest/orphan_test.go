package redistest

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
)

// orphanEnv makes this test binary a parent that starts servers and hangs.
const orphanEnv = "REDISTEST_ORPHAN"

func orphanMain() {
	if how := os.Getenv(orphanEnv); how == "netns" || how == "unprivileged" {
		orphanNetns(how)
		return
	}
	for range 2 {
		s, err := Launch(context.Background(), Options{Clock: runtime.GOOS == "linux"})
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		fmt.Println(s.Addr(), s.dir)
	}
	if os.Getenv(orphanEnv) == "panic" {
		panic("as a failing test does")
	}
	_, _ = os.Stdin.Read(make([]byte, 1)) // until killed
}

func TestServersDieWithTheirParent(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Log("only Linux has a parent-death signal; see childAttr")
		return
	}
	for _, how := range []string{"SIGKILL", "panic"} {
		t.Run(how, func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), orphanEnv+"="+how)
			stdin, err := cmd.StdinPipe()
			must(t, err)
			defer stdin.Close()
			stdout, err := cmd.StdoutPipe()
			must(t, err)
			must(t, cmd.Start())

			var addrs []string
			lines := bufio.NewScanner(stdout)
			for len(addrs) < 2 && lines.Scan() {
				addr, dir, ok := strings.Cut(lines.Text(), " ")
				if !ok || strings.HasPrefix(addr, "error") {
					t.Fatal(lines.Text())
				}
				t.Cleanup(func() { _ = os.RemoveAll(dir) }) // nobody is left to do it
				addrs = append(addrs, addr)
			}
			if how == "SIGKILL" {
				must(t, cmd.Process.Kill())
			}
			if err := cmd.Wait(); err == nil {
				t.Error("the parent ended well")
			}
			if len(addrs) != 2 {
				t.Fatalf("the parent started %q", addrs)
			}
			for _, addr := range addrs {
				eventually(t, "server "+addr+" dies", func() bool {
					conn, err := net.Dial("tcp4", addr)
					if err == nil {
						_ = conn.Close()
					}
					return err != nil
				})
			}
		})
	}
}
