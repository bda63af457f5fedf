// Package histories checks what a ring promises with a judge who knows nothing of how it
// works. Concurrent clients of several rings call a few keys while the shards are broken;
// every call is written down with its invocation, its return and its answer; and porcupine
// (github.com/anishathalye/porcupine) looks for an order of the calls, one at a time, in
// which a plain counter gives the same answers. Finding none is a bug.
//
// Histories come from real servers (real_test.go) and from a simulation in virtual time
// (sim_test.go), where calls, costs, latencies and faults are all drawn from one seed.
//
// # The counter
//
// Every key stands alone: it has used some of its limit. The windows are a year long and
// the tests are minutes, so nothing comes back by itself, and a token bucket and a sliding
// log are the same counter.
//
//   - An answer of the primary is exact: it says whether the cost fitted and what was left,
//     which gives away what was used before.
//   - A call that somebody else answered, or that was canceled, may have been charged by the
//     primary all the same: its request may have been on the way. It is charged at most
//     once, at any time after the call began, or never. Not so if the breaker was open: such
//     a call has sent nothing.
//   - What a share admitted (source replica) is told to the primary later. It is charged in
//     any parts and at any time after the call, at most once, or never. A call that was sent
//     and left can be both charged and told; that the ladder takes one back as soon as it
//     knows of the other is not demanded here.
//   - Reset uses nothing any more. One that failed does so once, at any time after it
//     began, or never.
//   - Faults that lose data are part of the history: a server that comes back empty has
//     used nothing ([Recorder.Wiped]); a promoted replica has used at most what its primary
//     had ([Recorder.Lagged]). What is lost without such an entry is a lost charge.
//   - When every operation has ended and every connection is silent, what was not charged by
//     then never will be ([Recorder.Quiet]).
//
// Linearizable means then, for every key: at most the limit is admitted by primaries; a call
// is denied only if it would not have fitted; no acknowledged charge is lost, made twice, or
// made before its call or after its return; no call sees what a later one did.
//
// # Leases
//
// Quota that processes have taken ahead ([ringfence.WithLease]) is used where and when no
// server sees it, so the counter cannot say what a primary has to answer. Simulations with
// leases have windows of seconds and are judged by time instead:
//
//   - [CheckQuota]: what primaries and leases admit keeps to the limit by the instants at
//     which it is used, a log's exactly and a bucket's but for what was held when the time
//     began. Some runs have a limit that never comes back and is used up to the end, where
//     one unit that is admitted twice shows.
//   - [CheckDenials]: in good weather, with nothing used to begin with, a primary denies for
//     what was used and what other processes hold, and a log for a lease's life longer.
//   - When all has been at rest for a window and a lease's life, the clients of one process
//     can have the whole limit; no process holds more than its bounds.
//
// Processes are closed in the middle and others take their places. In a third of the runs
// servers are emptied, their clocks stepped, replicas that lag promoted and keys Reset: such
// an event excuses as much as the limit, so the others are the strict ones.
//
// # What is not shown
//
//   - Refill and expiry without leases: the differential tests compare those with an exact
//     referee.
//   - That denials out of the near cache are due where leases are returned elsewhere.
//   - That shares and policies keep to their bounds: the fault matrix and the tests of the
//     ladder measure what they admit. Here they only explain charges of the primary.
//   - The order of two entries for one key within one AllowMany.
//   - More than the histories that were drawn: it is testing, not proof.
package histories
