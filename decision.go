package ringfence

import "time"

// Source says who answered a call.
type Source uint8

// The sources of a Decision.
const (
	// SourceNone: nobody decided; the call was refused as misuse or canceled.
	SourceNone Source = iota
	// SourcePrimary: the shard's primary (or the replica that has been promoted
	// in its place). The only exact answer.
	SourcePrimary
	// SourceReplica: this process, out of its share of what a replica said was
	// left when the primary went away.
	SourceReplica
	// SourceLocal: this process alone, on its part of the limit ([PolicyLocal]).
	SourceLocal
	// SourcePolicy: nobody knew; [PolicyOpen] admitted or [PolicyClosed] denied.
	SourcePolicy
	// SourceLease: this process, out of quota that it had taken from the primary beforehand
	// ([WithLease]). Age is how long ago that was asked for; Remaining is what was left then
	// and what is held still.
	SourceLease
	// SourceCache: this process, which had been told by the primary that such a call
	// is denied for longer than this ([WithNearCache]). It denies what the primary
	// would deny; Remaining and the waits are as if nobody had been admitted since.
	SourceCache
)

var sourceNames = [...]string{"none", "primary", "replica", "local", "policy", "lease", "cache"}

// String returns the value of the metric label "source".
func (s Source) String() string { return nameOf(sourceNames[:], int(s)) }

// Cause says why a call was not answered by the shard's primary.
type Cause uint8

// The causes of a Decision that did not come from a primary.
const (
	// CauseNone: the primary answered.
	CauseNone Cause = iota
	// CauseBreaker: the shard's circuit breaker was open (or forced open).
	CauseBreaker
	// CauseBudget: the primary did not answer within the budget, or its oldest
	// operation in flight was already older than that; or what the key's share admitted
	// while the primary was away was still on its way there.
	CauseBudget
	// CauseError: the operation failed, or could not be queued.
	CauseError
	// CauseCorrupt: the key holds a value of another type, or not one that the
	// scripts wrote. Only this key is concerned; delete it with Reset.
	CauseCorrupt
)

var causeNames = [...]string{"", "breaker", "budget", "error", "corrupt"}

// String returns the value of the metric label "reason"; empty for CauseNone.
func (c Cause) String() string { return nameOf(causeNames[:], int(c)) }

func nameOf(names []string, i int) string {
	if i < len(names) {
		return names[i]
	}
	return "unknown"
}

// Unknown is the value of Decision.Remaining when nobody knows what is left.
const Unknown = -1

// Decision is the answer to one call. It holds durations, never instants: the
// clock is the shard's and nobody else's.
//
// The worked numbers are for TokenBucket{Rate: 10, Per: time.Second, Burst: 20}
// whose bucket held 3.5 tokens when a call of cost 2 arrived.
type Decision struct {
	// Allowed says whether the call may go on. Here true: 2 <= 3.5.
	Allowed bool
	// Limit is the most units one key can ever have left at once: Burst of a
	// token bucket, Limit of a sliding log. Here 20.
	Limit int64
	// Remaining is how many whole units are left after this call, rounded down;
	// [Unknown] when nobody knows, as when a policy answered. Here 1 (of 1.5).
	Remaining int64
	// RetryAfter is how long until a call of the same cost can be admitted if
	// nobody else calls, rounded up to a microsecond; 0 when Allowed. Had the
	// bucket held 0.5, a call of cost 2 would be denied with 150 ms. When a policy
	// denied it is the time until the shard is probed again, at least 100 ms.
	RetryAfter time.Duration
	// ResetAfter is how long until nothing of the quota is used any more if nobody
	// calls, rounded up to a microsecond; 0 when unknown. Here 1.85 s: 18.5
	// tokens are missing.
	ResetAfter time.Duration
	// Source says who answered. SourcePrimary is exact, and so is SourceCache but for what
	// [WithNearCache] names; for SourceLease see [WithLease].
	Source Source
	// Shard is the id of the shard that owns the key.
	Shard string
	// Age is how old the information behind the decision is: 0 from the primary, and 0
	// from a policy or a local count, which rest on none. Out of a share it is how long
	// ago the replica was asked, and by how long that lagged behind its primary then: a
	// replica that had last heard of its primary 1 s before it was asked, 2 s ago, makes
	// it 3 s. A replica says its lag in whole seconds, at check-ups and probes. Of a denial
	// that is repeated it is how long ago the call began that the primary denied; out of a
	// lease, how long ago that was asked for.
	Age time.Duration
	// Cause says why the primary did not answer; CauseNone when it did.
	Cause Cause
}
