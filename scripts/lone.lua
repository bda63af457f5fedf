-- lone.lua: the most usual entry, decided in one go, and the most usual call, which is one such
-- entry, before anything else is set up. On a Redis Cluster nearly every call is of one key,
-- and setting up costs such a call as much as deciding: a table of limits, numbers that it
-- does not need, and a function object for each function of the other files.
--
-- It is a token bucket without fractions (n = 1), which is new or was written by the same
-- limit with a clock that is not ahead of this one, and callers who have nothing to tell and
-- take nothing ahead. Whatever differs is left to the other files; what is decided here is
-- what token_bucket.lua would decide, see there.
--
-- A charge of one entry of a bucket without fractions may say what it asks in 6 values, which
-- saves Redis parsing and copying nine others. What is not as usual goes on as if it had said
-- everything. ARGV: 1 "0"; 2 unit, "1:p:burst"; 3 p; 4 bq; 5 cost; 6 count, as in frame.lua.

--@look
--@charge
-- one is how many us a caller's units take. Returns how many callers fit and the us until full
-- after that, or nothing if the bucket is not as usual.
local function usual(key, unit, bq, one, count)
  local state = pcall('HMGET', key, 'd', 'r', 't', 'u')
  local d, full
  if state[4] == unit then
    if state[2] ~= '0' then return end
    local t = number(state[3] or '')
    d = number(state[1] or '')
    if not (d and t and d >= 0 and t >= 0 and d <= bq and t <= now and d % 1 == 0 and t % 1 == 0) then return end
    full = t + d
    d = full > now and full - now or 0
  elseif state[1] or state[2] or state[3] or state[4] or state.err or call('EXISTS', key) ~= 0 then
    return
  else
    d = 0
  end
  if d + count * one > bq then count = floor((bq - d) / one) end
  if count < 1 then
    if full and call('PTTL', key) == -1 then keep(key, bq) end
    return 0, d
  end
  d = d + count * one
  if not full then
    call('HSET', key, 'd', format('%d', d), 'r', '0', 't', now_text, 'u', unit)
    keep(key, d)
  else
    call('HSET', key, 'd', format('%d', d), 't', now_text)
    if d + now >= full - full % minute_us + minute_us then keep(key, d) end
  end
  return count, d
end

if args[1] == '0' and KEYS[1] then
  local granted, d = usual(KEYS[1], args[2], number(args[4]), number(args[5]) * number(args[3]), number(args[6]))
  if granted then return { now, 0, granted, d, 0, 0 } end
  args = {
    '1', '1', '1', args[3], '0', args[4], '0', string.match(args[2], '%d+$'), args[2],
    '1', '1', args[5], args[6], '0', '0',
  }
end
