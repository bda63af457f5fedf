-- frame.lua: one call, many entries. It is the whole of both scripts, of charge and of look:
-- Go puts the other files in where it says "--@include", and takes of every file what stands
-- before the first of these lines, and what stands behind
--
--   --@look      in the look script alone
--   --@charge    in the charge script alone
--   --@both      in both again
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
--           "-units@score,..." (sliding log). Empty: the entries of this run differ in
--           more and debit, and say these themselves, 2 values each, right behind it
--
-- A charge of one run of a bucket without fractions (n = 1), with neither more nor debit,
-- says so in 3 or 4 values, which saves Redis parsing and copying a dozen others:
-- ARGV[1] unit; ARGV[2] bq; ARGV[3] one, the us that a caller's units take (cost * p);
-- ARGV[4] count, where it is not 1.
--
-- Every number is an integer below 2^53: those are exact in Lua. They are written
-- out with %d, because tostring keeps 14 digits on Redis, and as text, because Redis
-- takes longer than Lua to write a number.
--
-- Reply: {now us, then for each entry granted, a, b, c}, or, where b and c are 0 for all of
-- them, as for buckets without fractions, {now us, then for each entry granted, a}
--   granted  how many of count were admitted (look: would be), and of more; or below 0:
--            -1 the key holds another type; -2 its value was not written by this script;
--            -3 Redis refused the read. Then nothing was written and the rest is 0. One bad
--            key spoils no other entry.
--   a, b, c  the state after that (look: as it is), by algorithm; see the two files
--
-- Time is this server's own, read once: KEYS are decided as of one instant.

--@include head.lua

local keys, n = KEYS, #KEYS
-- A table made with room for one entry need not grow for it.
local reply, out, wide = n > 0 and { now, 0, 0 } or { now }, 1, false
local limits, at
-- What entries ask for, up to and with number last.
local limit, cost, count, more, debit, each
local i, last, usual = 1, 0, false
--@charge
local unit, bq, one, back
local said, said_d, said_ms, heard, heard_t
if args[2] and not args[5] then
  unit, bq, one, count = args[1], number(args[2]), number(args[3]), number(args[4] or 1)
  more, last, usual = 0, n, true
end
--@both
if last == 0 then
  limits, at = {}, 2
  for j = 1, number(args[1]) do
    limits[j] = {
      args[at], number(args[at + 1]), number(args[at + 2]), number(args[at + 3]),
      number(args[at + 4]), number(args[at + 5]), number(args[at + 6]), args[at + 7],
    }
    at = at + 8
  end
end

-- The other files' functions, made when the first entry needs them.
local bucket, log

while i <= n do
  if i > last or each then
    if i > last then
      limit, cost, count = limits[number(args[at + 1])], number(args[at + 2]), number(args[at + 3])
      more, debit, last = number(args[at + 4]), args[at + 5], i + number(args[at]) - 1
      at = at + 6
      each = debit == ''
--@charge
      unit, bq, one = limit[8], limit[5], cost * limit[3]
--@both
    end
    if each then more, debit, at = number(args[at]), args[at + 1], at + 2 end
--@charge
    usual, back = limit[1] == '1' and limit[2] == 1, nil
    if usual and debit ~= '0' then
      back = number(debit) * limit[3]
      usual = back < 0
    end
--@both
  end
  local key, granted, a, b, c = keys[i], nil, nil, 0, 0
--@charge
  if usual then
--@include usual.lua
  end
--@both
  if not granted then
    if not bucket then
--@include shared.lua
--@include token_bucket.lua
--@include sliding_log.lua
--@look
      bucket, log = bucket_look, log_look
--@charge
      bucket, log = bucket_charge, log_charge
--@both
    end
--@charge
    -- As if a short call had said everything.
    if not limit then
      local p, burst = string.match(unit, '(%d+):(%d+)$')
      limit = { '1', 1, number(p), 0, bq, 0, number(burst), unit }
      cost, debit = one / limit[3], '0'
    end
--@both
    local status
    status, granted, a, b, c = (limit[1] == '1' and bucket or log)(key, limit, cost, count, more, debit)
    if status ~= 0 then granted, a, b, c = -status, 0, 0, 0 end
    if not wide and (b ~= 0 or c ~= 0) then
      local narrow = reply
      reply, out, wide = { now }, 1, true
      for j = 2, 2 * i - 2, 2 do
        reply[out + 1], reply[out + 2], reply[out + 3], reply[out + 4] = narrow[j], narrow[j + 1], 0, 0
        out = out + 4
      end
    end
  end
  reply[out + 1], reply[out + 2] = granted, a
  if wide then
    reply[out + 3], reply[out + 4] = b, c
    out = out + 2
  end
  out = out + 2
  i = i + 1
end
return reply
