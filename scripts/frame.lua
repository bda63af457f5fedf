-- frame.lua: one call, many entries. Every file has a part for both scripts, one for
-- the look script (from "--@look") and one for the charge script (from "--@charge").
-- Go puts together a script from head.lua, lone.lua, token_bucket.lua, sliding_log.lua and
-- this file, in this order, taking of each the common part and the script's own
--
-- and, for a Redis server, a first line: "#!lua" for charge (so that Redis checks
-- out-of-memory, read-only and missing replicas before the first line runs) and
-- "#!lua flags=no-writes" for look (so that a replica runs it). The embedded
-- server does not know such a line and gets none.
--
-- KEYS[i]   the key of entry i. Every key stands alone: no two need to share a slot.
--
-- ARGV[1]   m, the number of limits in the table that follows
-- ARGV[2 .. 1 + 8m]   the limits, 8 values each, the first saying which algorithm:
--   1 token bucket   1, n, pq, pr, bq, br, burst, unit        see token_bucket.lua
--   2 sliding log    2, limit, window us, ahead us, 0, 0, 0, 0   see sliding_log.lua
-- ARGV[2 + 8m ..]   the entries, in runs of neighbours that ask for the same, 6 values a
-- run, in the order of KEYS:
--   run     how many entries it is, at least 1; together as many as KEYS
--   limit   which limit of the table, from 1
--   cost    units each caller asks for, 1 to the limit's highest cost
--   count   how many callers ask for it, first come first served; 0: none, the entry
--           only tells a debit or takes ahead
--   more    how many further calls of that cost are taken ahead, for a lease, if all of
--           count fit: at most an eighth of what is left after those
--   debit   what was admitted elsewhere while this server was away, taken without
--           asking: "0", or units (token bucket), or "units@age us,..." (sliding log); or
--           what was taken ahead and is given back: "-units" (token bucket) or
--           "-units@score,..." (sliding log)
--
-- A charge of one entry may be shorter, see lone.lua: then ARGV[1] is 0.
--
-- Every number is an integer below 2^53: those are exact in Lua. They are written
-- out with %d, because tostring keeps 14 digits on Redis, and as text, because Redis
-- takes longer than Lua to write a number.
--
-- Reply: {now us, then for each entry status, granted, a, b, c}
--   status   0 decided; 1 the key holds another type; 2 its value was not written by
--            this script; 3 Redis refused the read. Unless 0, nothing was written and
--            the rest is 0. One bad key spoils no other entry.
--   granted  how many of count were admitted (look: would be), and of more
--   a, b, c  the state after that (look: as it is), by algorithm; see the two files
--
-- Time is this server's own, read once: KEYS are decided as of one instant.

local limits = {}
local at = 2
for j = 1, number(args[1]) do
  limits[j] = {
    args[at], number(args[at + 1]), number(args[at + 2]), number(args[at + 3]),
    number(args[at + 4]), number(args[at + 5]), number(args[at + 6]), args[at + 7],
  }
  at = at + 8
end

-- short decides entries of buckets without fractions that are as usual, if there is a way that
-- is shorter; a lone entry has been there already.
local function run(bucket, log, short)
  local keys, args = KEYS, args
  local reply, out = { now }, 1
  local i, n = 1, #keys
  while i <= n do
    local limit, cost, count = limits[number(args[at + 1])], number(args[at + 2]), number(args[at + 3])
    local more, debit = number(args[at + 4]), args[at + 5]
    local decide, last = limit[1] == '1' and bucket or log, i + number(args[at]) - 1
    at = at + 6
    local as_usual = short and keys[2] and limit[1] == '1' and limit[2] == 1 and more == 0 and debit == '0'
    local unit, bq, one = limit[8], limit[5], cost * limit[3]
    for e = i, last do
      local status, granted, a, b, c = 0
      if as_usual then granted, a = short(keys[e], unit, bq, one, count) end
      if not granted then status, granted, a, b, c = decide(keys[e], limit, cost, count, more, debit) end
      reply[out + 1] = status
      reply[out + 2] = granted or 0
      reply[out + 3] = a or 0
      reply[out + 4] = b or 0
      reply[out + 5] = c or 0
      out = out + 5
    end
    i = last + 1
  end
  return reply
end

--@look
return run(bucket_look, log_look)
--@charge
return run(bucket_charge, log_charge, usual)
