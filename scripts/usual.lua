-- usual.lua: an entry as nearly all are, decided in one go. It is a token bucket without
-- fractions (n = 1), which is new or was written by the same limit with a clock that is not
-- ahead of this one, and nothing to tell of what was admitted elsewhere. Whatever differs is left
-- to the other files; what is decided here is what token_bucket.lua would decide, see there.
--
-- It is no function, and nor is what comes before it: a call of one key, as nearly all are on a
-- Redis Cluster and where callers are few, takes a tenth longer for making two (docs/performance-scripts.md).
--
-- In: key; unit, bq, one (us that a caller's units take), count and more, as in frame.lua; back,
-- the us that what is given back takes, below 0, or nil. said and heard keep, from entry to entry,
-- the last number that was written as text and the last text that was read: keys that came
-- together often have them in common, and both take longer than comparing.
-- Out: granted and a, the us until full; granted stays nil if the bucket is not as usual.

-- HVALS tells a key that is not there from a hash of somebody else's, which takes HMGET a second
-- command, and is short. The values come as HSET has put them there as long as Redis keeps the
-- hash in one piece, as it does with so few unless it is set up otherwise. In another order, as
-- the embedded server has them, they are not taken for a bucket but left to the other files: d
-- may not be above bq, t has to be, and r is 0.
local state = pcall('HVALS', key)
local full, fits
if state[4] == unit then
  if state[3] ~= heard then heard, heard_t = state[3], number(state[3]) end
  a = number(state[1])
  local t = heard_t
  if state[2] == '0' and a and t and a >= 0 and a <= bq and t > bq and t <= now and a % 1 == 0 and t % 1 == 0 then
    full = t + a
    a = full > now and full - now or 0
    fits = count
  end
elseif state.err then
  if not string.find(state.err, 'WRONGTYPE', 1, true) then granted, a = -3, 0 end
elseif not state[1] then
  a, fits = 0, count
end
if fits then
  if back then a = a + back > 0 and a + back or 0 end
  local left = bq - a - count * one
  if left < 0 then
    fits = floor((bq - a) / one)
  elseif more > 0 then
    -- What ahead_of in shared.lua says.
    left = floor(left / (8 * one))
    fits = count + (left < more and left or more)
  end
  if fits > 0 or back then
    a = a + fits * one
    if a ~= said then said, said_d, said_ms = a, format('%d', a), nil end
    if full then
      call('HSET', key, 'd', said_d, 't', now_text)
    else
      call('HSET', key, 'd', said_d, 'r', '0', 't', now_text, 'u', unit)
    end
    if not full or a + now >= full - full % minute_us + minute_us then
      said_ms = said_ms or format('%d', floor(a / 1000) + spare_ms)
      call('PEXPIRE', key, said_ms)
    end
  elseif full and call('PTTL', key) == -1 then
    call('PEXPIRE', key, floor(bq / 1000) + spare_ms)
  end
  granted = fits
end
