-- shared.lua: what token_bucket.lua and sliding_log.lua have in common.

-- How many of more calls of this cost are taken ahead when callers have left left units: an
-- eighth of them at most, so that near the limit nobody takes what others need at once. None
-- if a caller did not fit: then less than the cost is left.
local function ahead_of(left, cost, more)
  return math.max(0, math.min(more, floor(left / (8 * cost))))
end

--@charge
-- Makes a key last until us from now, and as much longer as head.lua says.
local function keep(key, us)
  call('PEXPIRE', key, floor(us / 1000) + spare_ms)
end
