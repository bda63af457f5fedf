-- usual.lua: an entry as nearly all are, decided in one go. It is a token bucket without
-- fractions (n = 1), which is new or was written by the same limit with a clock that is not
-- ahead of this one, and nothing to tell of what was admitted elsewhere. Whatever differs is left
-- to the other files; what is decided here is what token_bucket.lua would decide, see there.
--
-- It is no function, and nor is what comes before it: a call of one key, as nearly all are on a
-- Redis Cluster and where callers are few, takes a tenth longer for making two (docs/performance-scripts.md).
--
-- In: key; unit, bq, one (us that a caller's units take), count and more, as in frame.lua; back,
-- the us that what is given back takes, below 0, or nil.
-- Out: granted and a, the us until full; granted stays nil if the bucket is not as usual.

local state = pcall('HMGET', key, 'd', 'r', 't', 'u')
local full, fits
if state[4] == unit then
  local t = number(state[3] or '')
  a = number(state[1] or '')
  if state[2] == '0' and a and t and a >= 0 and t >= 0 and a <= bq and t <= now and a % 1 == 0 and t % 1 == 0 then
    full = t + a
    a = full > now and full - now or 0
    fits = count
  end
elseif not (state[1] or state[2] or state[3] or state[4] or state.err) and call('EXISTS', key) == 0 then
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
    if not full then
      call('HSET', key, 'd', format('%d', a), 'r', '0', 't', now_text, 'u', unit)
      call('PEXPIRE', key, floor(a / 1000) + spare_ms)
    else
      call('HSET', key, 'd', format('%d', a), 't', now_text)
      if a + now >= full - full % minute_us + minute_us then call('PEXPIRE', key, floor(a / 1000) + spare_ms) end
    end
  elseif full and call('PTTL', key) == -1 then
    call('PEXPIRE', key, floor(bq / 1000) + spare_ms)
  end
  granted = fits
end
