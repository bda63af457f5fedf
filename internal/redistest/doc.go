// Package redistest starts real redis-server processes, breaks them on
// command, and cleans up behind them. Tests use [Start]; programs that need a
// throw-away Redis (the demo) use [Launch]. The package does not import
// testing, so that a binary built on it carries no test flags.
//
// A server lives on 127.0.0.1, on a port nobody else can take while the server
// is killed, in a directory of its own, and keeps nothing on disk: every
// restart is an empty restart. It dies with the process that started it, even
// if that process is killed with SIGKILL (Linux).
//
// What can be done to a server:
//
//   - [Server.Kill], [Server.Restart]: it crashes, it comes back empty.
//   - [Server.Pause], [Server.Resume]: it hangs with its connections open.
//   - [Server.ReplicaOf], [Server.Promote], [Server.WaitInSync]: replication.
//   - [Server.Step], [Server.Freeze]: its wall clock jumps or stands still.
//   - [Proxy]: the network between client and server misbehaves.
//   - [Netns]: so does the one below TCP: packets are lost and late.
//
// [StartProgram] starts another program under the same guarantee.
//
// [StartCluster] and [StartSentinel] start whole Redis Clusters and Sentinel
// sets of such servers. A node of a cluster keeps its identity and slots, though
// not its data, over a restart; so does a Sentinel what it knew.
//
// The absence of redis-server is a failure, never a skip: a suite that quietly
// tests nothing looks exactly like one that passes. [Count] lets a suite prove
// that it used real servers.
package redistest
