-- lone.lua: the most usual call by itself, decided before anything else is set up. On a
-- Redis Cluster nearly every call is of one key, and setting up costs such a call as much as
-- deciding: a table of limits, numbers that it does not need, and a function object for
-- each function of the other files.
--
-- It is a token bucket without fractions (n = 1), which is new or was written by the same
-- limit with a clock that is not ahead of this one, and callers who have nothing to tell and
-- take nothing ahead. Whatever differs is left to the other files; what is decided here is
-- what token_bucket.lua would decide, see there.
--
-- ARGV of a call of one entry, as in frame.lua: 1 m; 2 algorithm, 3 n, 4 pq, 5 pr, 6 bq,
-- 7 br, 8 burst, 9 unit; 10 run, 11 limit, 12 cost, 13 count, 14 more, 15 debit.

--@look
--@charge
local args = ARGV
if #args == 15 and args[2] == '1' and args[3] == '1' and args[14] == '0' and args[15] == '0' and not KEYS[2] then
  local key, bq = KEYS[1], number(args[6])
  local state = pcall('HMGET', key, 'd', 'r', 't', 'u')
  local d, full
  if state[4] == args[9] and state[2] == '0' then
    local t = number(state[3] or '')
    d = number(state[1] or '')
    if d and t and d >= 0 and t >= 0 and d <= bq and t <= now and d % 1 == 0 and t % 1 == 0 then
      full = t + d
      d = full > now and full - now or 0
    else
      d = nil
    end
  elseif not (state[1] or state[2] or state[3] or state[4] or state.err) and call('EXISTS', key) == 0 then
    d = 0
  end
  if d then
    local count, one = number(args[13]), number(args[12]) * number(args[4])
    if d + count * one > bq then count = floor((bq - d) / one) end
    if count < 1 then
      if full and call('PTTL', key) == -1 then keep(key, bq) end
      return { now, 0, 0, d, 0, 0 }
    end
    local taken = d + count * one
    if not full then
      call('HSET', key, 'd', format('%d', taken), 'r', '0', 't', now_text, 'u', args[9])
      keep(key, taken)
    else
      call('HSET', key, 'd', format('%d', taken), 't', now_text)
      if taken + now >= full - full % minute_us + minute_us then keep(key, taken) end
    end
    return { now, 0, count, taken, 0, 0 }
  end
end
