// Package ringfence limits how often something may happen, across every process that
// shares a set of Redis servers.
//
// A limit (the rule) holds for each key (who is limited) of a limiter. A call asks for
// cost units of a key's quota and gets a Decision. Keys are spread over shards, each a
// Redis primary with its replicas, by consistent hashing; a Lua script on the key's shard
// decides atomically, by that server's clock.
//
//	ring, err := ringfence.Open(ctx, ringfence.Config{
//		Shards: []ringfence.ShardConfig{
//			{ID: "a", Primary: "redis://10.0.0.1:6379", Replicas: []string{"redis://10.0.0.2:6379"}},
//			{ID: "b", Primary: "redis://10.0.0.3:6379", Replicas: []string{"redis://10.0.0.4:6379"}},
//		},
//	})
//	api, err := ring.Limiter("api", ringfence.TokenBucket{Rate: 100, Per: time.Second, Burst: 200})
//	d, err := api.Allow(ctx, "user:42")
//
// # What holds
//
// While a key's primary answers, never more than the limit is admitted, whatever the
// number of processes, goroutines and costs, and a call is denied only if admitting it
// then would exceed the limit. A denied call takes nothing and extends no wait. A charge
// is made at most once per call: what may have run is never sent again.
//
// Every caller is answered within the budget (20 ms by default, plus scheduling),
// whatever Redis does. A fault of Redis is never an error of Allow: it is a Source and a
// Cause in the Decision, a metric and a log line. Errors are misuse and the caller's own
// context.
//
// # When the primary does not answer
//
// The answer comes from a ladder: a replica that has been promoted answers as primary;
// otherwise a replica is asked once per key what is left, and this process admits its
// share of that, (limit - used) / processes, counting in its own memory; otherwise
// the failure policy answers: PolicyOpen (default), PolicyClosed or PolicyLocal. What was
// admitted out of shares is told to the shard when its primary answers again. While a
// shard is away, then, a limit holds as well as the number of processes is right
// (Config.Instances, or counted by heartbeats); under PolicyOpen with no replica it does
// not hold at all, and Decision.Source says so.
//
// Keys never move because of a fault. The type Ring of go-redis has the same name and
// does the opposite: it hands a failed shard's keys to its neighbours, which starts every
// limit anew, twice.
//
// # Clocks
//
// Time is the shard's own, read once inside the script; clients' clocks do not matter. A
// step of that clock admits at most one limit extra (forward) or starves for at most one
// window (backward).
//
// # What it costs
//
// One decision is one round trip, and part of one script call, shared with whatever other
// calls were waiting. A token bucket keeps one HASH a key, a sliding log one ZSET with a
// member a unit. Every key has a TTL and idle keys vanish. Redis must not evict keys
// (maxmemory-policy noeviction): evicting one forgives its limit. Redis 7.0 or Valkey 7.2
// are needed.
package ringfence
