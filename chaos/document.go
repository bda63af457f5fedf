package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/ringfence/ringfence/internal/redistest"
)

// writeDocument makes docs/faults.md of the results and of the machine it runs on.
func writeDocument(ctx context.Context, results, file string) error {
	all, err := readResults(results)
	if err != nil {
		return err
	}
	version, err := redisVersion(ctx)
	if err != nil {
		return err
	}
	return writeFile(file, []byte(document(all, setup(version))))
}

// redisVersion is that of the redis-server which the matrix starts.
func redisVersion(ctx context.Context) (string, error) {
	binary := os.Getenv(redistest.BinaryEnv)
	if binary == "" {
		binary = "redis-server"
	}
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", binary, err)
	}
	if m := regexp.MustCompile(`v=(\S+)`).FindSubmatch(out); m != nil {
		return string(m[1]), nil
	}
	return strings.TrimSpace(string(out)), nil
}

// setup is the machine and the versions, in a sentence.
func setup(redisVersion string) string {
	client := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if d.Path == "github.com/redis/go-redis/v9" {
				client = d.Version
			}
		}
	}
	cpu := runtime.GOARCH
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if m := regexp.MustCompile(`model name\s*: (.*)`).FindSubmatch(text); m != nil {
			cpu = string(m[1])
		}
	}
	return fmt.Sprintf("%d cores (%s, %s/%s), clients and servers on the same machine; Redis %s, %s, go-redis %s.",
		runtime.NumCPU(), cpu, runtime.GOOS, runtime.GOARCH, redisVersion, strings.Replace(runtime.Version(), "go", "Go ", 1), client)
}

// document is the text. What it says of bounds is what bounds.go computes.
func document(all []result, setup string) string {
	var b strings.Builder
	bad := 0
	for _, r := range all {
		if !r.OK {
			bad++
		}
	}
	note := ""
	if bad > 0 {
		note = " What the table calls BROKEN is not shown to hold."
	}
	deadInVain, _ := mostInVain(callsDead, full.hold)
	sickInVain, _ := mostInVain(callsSick, 0)
	fmt.Fprintf(&b, `<!-- Made by "go run ./chaos -doc docs/faults.md" of chaos/results.json. -->

# Faults

What happens to callers when Redis breaks, fault by fault: every one of them is done to real redis-servers, Sentinel sets and Clusters, with every failure policy and both algorithms, and what was admitted is compared with a bound that was computed beforehand. To repeat all of it, or one fault:

`+"```sh\nmake chaos\nmake chaos FAULT=kill,stop\n```"+`

It takes about six minutes, prints the table below, writes [results.json](../chaos/results.json) and exits with 1 when a cell broke a bound or could not be run; lost packets need root. A run that was interrupted goes on where it was, `+"`make chaos AGAIN=1`"+` plays all of it again. A short form of it is part of `+"`make test`"+`.

The record: %d cells, %d within their bounds, %d not. %s%s

## How a cell is played

A cell is a policy and an algorithm. Two processes (rings, with `+"`Instances`"+` 2) share %d keys of %d units an hour; the window is so long that nothing comes back while the cell lives. %d units of each key are used beforehand. Then %d calls a second come in, open to all keys, the fault begins %s later and stays for %s (if no other time is given), the processes recover, and calls go on until nothing is left. Budget %s, operation time-out %s; with nothing away, callers wait up to %s, so that a busy machine is not taken for a fault. The breaker has its defaults.

The policies `+"`open`, `closed` and `local`"+` are of a shard without a replica, so that they answer at all; `+"`share`"+` is a shard with one (behind it, closed). A Sentinel set and a Cluster have replicas, so shares answer there for all three policies, and the policy only where a replica does not in time.

## What the columns mean, and what bounds them

- **admitted**: units admitted in the whole cell, by whomever. **bound**: the most that may be, by the table of faults. That holds for what no policy admitted, too, whatever the policy. To each bound the units of debits are added of which nobody knows whether the shard heard (`+"`ratelimiter_settle_lost_total`"+`). "Calls offered meanwhile" are counted from the beginning of the load, and for `+"`open`"+` also those that this machine was too busy to answer in time afterwards.
- **p50, p99.9, max**: call times while the fault is on. The longest may be the budget plus what scheduling adds: 10 ms and three times what this machine's own timers were late by at worst, which is measured meanwhile, and never more than %s in all, so that a caller who waits for the operation instead of its budget is always found out. A fault during which something broke while the machine's own timers were more than %s late, so that its times say nothing, is played again, %d times in all at most. While a shard is dead the median must be below 5 ms.
- **back after**: until the primary decides for all keys in both processes: since the fault ended, or where servers mend it themselves since it began. At most the servers' own time (Sentinel: down-after %s + 2.1 s; planned: 2.1 s; Cluster: node-timeout %s + 5.5 s), an open period of the breaker that has just begun (it doubles from 100 ms to 5 s), an operation's time-out and 1.1 s. After three seconds of outage that is %s.
- **calls**: operations and probes that the busier process sent to the shard meanwhile. Of a dead shard (also: silent, busy, loading): the three failures that open the breaker, one operation more, whose outlasting the budget is forgiven, the %d that may have been in flight, and the probes, %d in the first minute at most; connections are counted apart and bounded likewise. A shard that answers probes and refuses charges gets as much again after each probe. Elsewhere the shard is there, and calls are not bounded.
- Also checked in every cell: no call gets an error; a shard that keeps its data holds every acknowledged charge, and at most one for each call that was given up, or whose debit got lost and was counted; of a dead shard no more than what is sent in vain can carry: %d operations a process and outage (the %d failures before the one that opens the breaker, and the %d in flight) of %d calls, since there are no more callers at once (of few keys an operation carries up to %d calls). A shard that answers probes gets %d operations after each. Close takes 2 s at most, and no goroutine is left.

## The faults

"keys x limit" is %d.

| fault | what happens | most admitted |
|---|---|---|
`, len(all), len(all)-bad, bad, setup, note,
		keyCount, perKey, full.before, full.rate, lead, full.hold, budget, operationTimeout, patience,
		budget+slack(time.Hour, false), tooLate, mostPlays, downAfter, nodeTimeout, mostRecovery(0, full.hold), inFlight, mostProbes(time.Minute),
		deadInVain, breakerFailures-1, inFlight, mostCarried, 16*maxBatch, sickInVain, keyCount*perKey)
	for _, f := range matrix {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", f.name, f.does, f.promise)
	}
	b.WriteString(`
Where a replica is asked, what it has not heard of is admitted once more: that is the lag of asynchronous replication, and nothing on top of it can promise less. Where some processes reach the primary and others do not (` + "`loss-50`, `latency-over`, `flapping`" + `), the primary gives away what others hold as their shares.

Of ` + "`three-of-eight`" + ` the rates are one process's: 16,667 calls a second, due at their times whether or not others have returned. Also required: the 99th percentile, counted from when a call was due, below 10 ms while shards are away; all shards back within a minute; at most 1 % of the calls for shards that are there answered by others; in its first minute away a shard gets as many calls as above. Each cell has 200 keys there.

## The table

`)
	b.WriteString(markdownTable(all))
	return b.String()
}
