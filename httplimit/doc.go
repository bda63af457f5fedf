// Package httplimit puts a rate limit in front of an http.Handler and tells
// clients where they stand. It needs the standard library and ringfence only.
//
//	ip, err := httplimit.TrustedProxies("10.0.0.0/8")
//	...
//	limit, err := httplimit.New(limiter, ip.Key)
//	...
//	http.Handle("/api/", limit(api))
//
// A request goes through these steps:
//
//  1. [WithSkip] says whether the request is exempt.
//  2. The [KeyFunc] says whom to charge. It is required: there is no default key,
//     because a wrong one limits everybody together or nobody.
//  3. [WithCost] says how much to charge; 1 by default.
//  4. The limiter decides. A Redis fault is not an error here: the limiter's own
//     ladder (replica, share, policy) has answered by then.
//  5. The header fields below are set, on allowed and on denied responses alike.
//  6. Allowed: the next handler runs, with the ResponseWriter untouched, so that
//     http.ResponseController, hijacking and server push work as before. Denied:
//     429 with Retry-After; see [WithOnDenied]. Neither decided: [WithOnError].
//
// # Header fields
//
// RateLimit-Policy and RateLimit follow draft-ietf-httpapi-ratelimit-headers-11
// (23 May 2026), a work in progress, in the syntax of RFC 9651. They were checked
// against the text of revisions 08 to 11. From 08 on both are Lists of Strings
// with the parameters q, qu, w, pk and r, t, pk; a field in that syntax is not
// understood by clients of revision 07 and older. What t means has changed: the
// time until the quota resets in 08 and 09, until additional quota is there in
// 10, and in 11 the effective window, "the number of seconds within which the
// client can use no more than the available quota". This package implements 11.
//
// For the limiter "api" with TokenBucket{Rate: 100, Per: time.Second, Burst: 200}
// a first request of cost 1 is answered with
//
//	RateLimit-Policy: "api";q=200;w=2
//	RateLimit: "api";r=199;t=2
//
// and one that came too early with
//
//	RateLimit-Policy: "api";q=200;w=2
//	RateLimit: "api";r=0;t=1
//	Retry-After: 1
//
// where
//
//   - q is the most units a key can have at once: Burst of a token bucket, Limit
//     of a sliding log.
//   - w is the time in which q units come back, in seconds: Burst / Rate x Per of
//     a token bucket, Window of a sliding log.
//   - r is Decision.Remaining. When that is unknown (-1, as when a policy
//     answered) the whole RateLimit field is left out, for r is required in it.
//   - t of a token bucket is the time in which r units come back (one unit if r is
//     0): 199 units at 100 a second are 1.99 s, so 2. A client that spreads r over
//     t, and one that spends r at once and then waits t, both get the full rate,
//     as nearly as whole seconds allow, and are not denied. So r/t of an allowed
//     response promises no more than the limit's own rate, which section 6 of the
//     draft asks servers to see to. The time until the bucket is full would be
//     wrong at both ends: near 0 when hardly anything is used, and the whole
//     window when one more unit is about to come back.
//   - t of a sliding log is Decision.ResetAfter: by then everything has come back.
//     That is cautious, as some units come back earlier; a Decision does not say
//     when.
//   - t of a denied response is at most Retry-After, as section 6 asks.
//   - qu is left out, which means requests, unless [WithQuotaUnit] sets it.
//   - pk, the optional partition key, is never sent. It would carry the key, or
//     something made from it, to whoever reads the response, and a client that
//     asks for one key at a time has no use for it.
//
// All times are whole seconds rounded up and at least 1; the draft knows no
// smaller unit. A limit whose window is shorter than a second is therefore
// understated: TokenBucket{Rate: 1000, Per: time.Second, Burst: 10} is sent as
// q=10;w=1. Integers are capped at 999,999,999,999,999, the largest an RFC 9651
// Integer can be.
//
// For older clients [WithHeaders] adds X-RateLimit-Limit (q), X-RateLimit-Remaining
// (r) and X-RateLimit-Reset (Decision.ResetAfter in delta seconds, not a point in
// time).
//
// A middleware adds its RateLimit-Policy and RateLimit items to those already
// there, so that two of them (by address, then by user) show both. Of the
// X-RateLimit fields, which can hold one limit only, the innermost wins.
package httplimit
