// Command ringfence is the command line tool of the library ringfence, which rate-limits
// on a ring of Redis shards.
//
//	ringfence demo            four app instances share one limit while a shard dies and returns
//	ringfence demo --redis    the same on real redis-servers with replicas
//	ringfence drill           an incident from the first slow reply to the resolved page
//	ringfence version
//
// It exits with 0 when all is well, 1 when the demo or the drill did not hold what it promises, 2 when
// it was called wrongly or a program it needs is missing, 130 when it was interrupted.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/redis/go-redis/v9/logging"
)

// The exit codes.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130
)

const usage = `ringfence rate-limits on a ring of Redis shards; this is its command line tool.

usage: ringfence <command> [flags]

  demo      watch four app instances share one limit while a shard dies and returns
  drill     rehearse an incident: a slow shard, the page, mitigation, recovery
  version   print the version of this build
  help      print this text

"ringfence demo -h" and "ringfence drill -h" list their flags.
`

func main() {
	// go-redis reports every refused dial on stderr, in the middle of the table.
	logging.Disable()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the process at once
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run is the whole program but for the process: it returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return exitUsage
	}
	switch args[0] {
	case "demo":
		return runDemo(ctx, args[1:], standardScript, stdout, stderr)
	case "drill":
		return runDrill(ctx, args[1:], standardDrill, stdout, stderr)
	case "version", "-version", "--version":
		fmt.Fprintln(stdout, version())
		return exitOK
	case "help", "-h", "-help", "--help":
		fmt.Fprint(stdout, usage)
		return exitOK
	default:
		fmt.Fprintf(stderr, "ringfence: there is no command %q\n\n%s", args[0], usage)
		return exitUsage
	}
}

// version says what the build knows of itself.
func version() string {
	parts := []string{"ringfence"}
	if info, ok := debug.ReadBuildInfo(); ok {
		setting := map[string]string{}
		for _, s := range info.Settings {
			setting[s.Key] = s.Value
		}
		if info.Main.Version != "" {
			parts = append(parts, info.Main.Version)
		}
		if revision := setting["vcs.revision"]; revision != "" {
			parts = append(parts, "commit", revision[:min(12, len(revision))])
		}
		if setting["vcs.modified"] == "true" {
			parts = append(parts, "(modified)")
		}
	}
	parts = append(parts, runtime.Version(), runtime.GOOS+"/"+runtime.GOARCH)
	return strings.Join(parts, " ")
}
