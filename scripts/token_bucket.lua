-- token_bucket.lua: exact token bucket on a HASH.
--
-- A bucket gains n tokens every p us (n/p in lowest terms) and holds burst of them.
-- What is kept is not the tokens but the time until it would be full, which needs no
-- rounding: d us and r/n of one. A token is p/n us = pq us and pr/n (p = pq * n + pr),
-- the whole bucket bq us and br/n. (The same idea as the virtual scheduling form of
-- the GCRA, ITU-T I.371, kept with `last` so that a clock that steps back can be told.)
--
-- Limit: n, pq, pr, bq, br, burst as above; unit names them, "n:p:burst".
--   Precondition, checked by Go: n * (burst + 1) <= 2^53, bq <= 366 days. Then every
--   product below is exact: cost * pr + r < n * (burst + 1).
-- State, the fields of the HASH:
--   d  whole us until full, as of t        r  and this many n-ths of one
--   t  us, this server's clock             u  the unit of the limit that wrote it
-- A key that is not there is a full bucket. TTL: until full, plus slack and a minute; see
-- keep in shared.lua.
-- Reply: a, b = d, r after the call (look: before it), as of this instant; c = us by which the key's
--   clock is ahead of this server's (it stepped back), 0 otherwise. The tokens left
--   are (burst * p - (d * n + r)) / p; Go works that out.
--
-- A clock that steps back by at most the time to fill stops the refill until it has
-- caught up; by more, the bucket goes on from the new instant with the tokens it has.
--
-- A changed limit finds the tokens as of now under the old one, as many as the new
-- bucket holds, the part of a token rounded down to what r can say (less than 1 us/n).
-- From then on the new rate fills it: a denied call writes that down too. If it did not,
-- the wait it is told would be wrong, and a bucket emptied at 1 a day would stay at 1 a
-- day; and if the part of a token were dropped, denied calls under two limits by turns
-- would keep it from ever growing.

-- most_us is 366 days.
local most_us = 31622400000000

-- The largest whole x with x tokens worth at most a us and b/n of one.
local function bucket_whole(a, b, n, pq, pr)
  local x = math.floor((a + b / n) / (pq + pr / n))
  while x > 0 do
    local k = math.floor(x * pr / n)
    local q, r = x * pq + k, x * pr - k * n
    if q < a or (q == a and r <= b) then break end
    x = x - 1
  end
  while true do
    local y = x + 1
    local k = math.floor(y * pr / n)
    local q, r = y * pq + k, y * pr - k * n
    if q > a or (q == a and r > b) then return x end
    x = y
  end
end

-- How many whole tokens are there when d and r/n us are missing.
local function bucket_left(d, r, n, pq, pr, bq, br)
  local a, b = bq - d, br - r
  if b < 0 then
    a, b = a - 1, b + n
  end
  if a < 0 then return 0 end
  return bucket_whole(a, b, n, pq, pr)
end

-- floor(f * x / p) for f < p and x up to 366 days of us, below 2^45: seven bits at a
-- time, from 2^42 down, so that no product passes 2^53.
local function bucket_scale(f, x, p)
  local whole, rest, unit = 0, 0, 4398046511104
  while unit >= 1 do
    local digit = math.floor(x / unit)
    x = x - digit * unit
    rest = rest * 128 + f * digit
    local k = math.floor(rest / p)
    whole, rest = whole * 128 + k, rest - k * p
    unit = unit / 128
  end
  return whole
end

-- Reads a bucket that is not as usual. See bucket_read.
local function bucket_mend(key, limit, state)
  if state.err then
    if string.find(state.err, 'WRONGTYPE', 1, true) then return 1 end
    return 3
  end
  local unit = state[4]
  if not (state[1] or state[2] or state[3] or unit) then
    -- A HASH with other fields is somebody else's.
    if call('EXISTS', key) == 1 then return 2 end
    return 0, 0, 0, now, 0, false
  end
  local d, r, t = number(state[1] or ''), number(state[2] or ''), number(state[3] or '')
  if not (d and r and t and unit) or d < 0 or r < 0 or t < 0
    or d % 1 ~= 0 or r % 1 ~= 0 or t % 1 ~= 0 or t > 9007199254740991 then
    return 2
  end
  -- In the unit of the limit that wrote it.
  local old_n, old_p, old_burst = string.match(unit, '^(%d+):(%d+):(%d+)$')
  local n, p, burst = number(old_n or ''), number(old_p or ''), number(old_burst or '')
  -- What Go would have refused must not get into the arithmetic: beyond 2^53 the
  -- searches above never end.
  if not (n and p and burst) or n < 1 or p < 1 or burst < 1
    or n * (burst + 1) > 9007199254740992 or p > most_us or r >= n then
    return 2
  end
  local pq = floor(p / n)
  local pr = p - pq * n
  local k = floor(burst * pr / n)
  local bq, br = burst * pq + k, burst * pr - k * n
  if bq > most_us then return 2 end
  if d > bq or (d == bq and r > br) then
    d, r = bq, br
  end
  local elapsed = now - t
  if elapsed >= 0 then
    t = now
    d = d - elapsed
    if d < 0 then
      d, r = 0, 0
    end
  elseif -elapsed > bq then
    t = now
  end
  if unit == limit[8] then return 0, d, r, t, 0, true, true end
  -- whole tokens are there, and f p-ths of one.
  local whole = bucket_left(d, r, n, pq, pr, bq, br)
  k = floor(whole * pr / n)
  local f = (bq - d - whole * pq - k) * n + (br - r - whole * pr + k * n)
  n, pq, pr, burst = limit[2], limit[3], limit[4], limit[7]
  if whole >= burst then return 0, 0, 0, t, 0, true, true end
  local missing = burst - whole
  local back = bucket_scale(f, pq * n + pr, p)
  k = floor(missing * pr / n)
  local kb = floor(back / n)
  d, r = missing * pq + k - kb, missing * pr - k * n - (back - kb * n)
  if r < 0 then
    d, r = d - 1, r + n
  end
  return 0, d, r, t, 0, true, true
end

-- Reads a bucket and brings it up to now, in the unit of limit.
-- Returns status, d, r, t, the instant at which it was to be full, exists, and mend: the
-- clock stepped back too far, or another limit wrote it, which is to be written down even
-- by a call that is denied.
local function bucket_read(key, limit)
  local state = pcall('HMGET', key, 'd', 'r', 't', 'u')
  if state[4] == limit[8] then
    local r = state[2]
    local d, t = number(state[1] or ''), number(state[3] or '')
    r = r == '0' and 0 or number(r or '')
    local bq = limit[5]
    if d and r and t and d >= 0 and t >= 0 and r >= 0 and r < limit[2]
      and (d < bq or (d == bq and r <= limit[6]))
      and d % 1 == 0 and r % 1 == 0 and t % 1 == 0 and t <= 9007199254740991 then
      local full = t + d
      if t <= now then
        if full < now then return 0, 0, 0, now, full, true end
        return 0, full - now, r, now, full, true
      end
      if t - now <= bq then return 0, d, r, t, full, true end
    end
  end
  return bucket_mend(key, limit, state)
end

-- How many of count callers of this cost fit, and of more further calls, and the bucket
-- after them.
local function bucket_take(limit, d, r, cost, count, more)
  if count + more == 0 then return 0, d, r end
  local n, pq, pr, bq = limit[2], limit[3], limit[4], limit[5]
  local units = cost
  if count ~= 1 or more > 0 then
    local left = bucket_left(d, r, n, pq, pr, bq, limit[6])
    count = math.min(count, floor(left / cost))
    if more > 0 then count = count + ahead_of(left - count * cost, cost, more) end
    if count < 1 then return 0, d, r end
    units = cost * count
  end
  local nd, nr = d + units * pq, r + units * pr
  if nr >= n then
    local k = floor(nr / n)
    nd, nr = nd + k, nr - k * n
  end
  if nd > bq or (nd == bq and nr > limit[6]) then return 0, d, r end
  return count, nd, nr
end

--@look
local function bucket_look(key, limit, cost, count)
  local status, d, r, t = bucket_read(key, limit)
  if status ~= 0 then return status end
  local granted = bucket_take(limit, d, r, cost, count, 0)
  return 0, granted, d, r, t - now
end

--@charge
local function bucket_charge(key, limit, cost, count, more, debit)
  local status, d, r, t, full, exists, anew = bucket_read(key, limit)
  if status ~= 0 then return status end
  local write = false
  if debit ~= '0' then
    -- Negative: taken ahead and given back, never beyond full.
    local n, units = limit[2], math.max(math.min(number(debit), limit[7]), -limit[7])
    local nr = r + units * limit[4]
    local k = floor(nr / n)
    d, r = d + units * limit[3] + k, nr - k * n
    if d > limit[5] or (d == limit[5] and r > limit[6]) then
      d, r = limit[5], limit[6]
    elseif d < 0 then
      d, r = 0, 0
    end
    -- What is given back brings the end of use forward only.
    write, anew = true, anew or units > 0
  end
  local granted
  granted, d, r = bucket_take(limit, d, r, cost, count, more)
  if granted > 0 or anew or write then
    local at = t == now and now_text or format('%d', t)
    if anew or not exists then
      call('HSET', key, 'd', format('%d', d), 'r', format('%d', r), 't', at, 'u', limit[8])
      keep(key, d + t - now)
    else
      -- Without fractions r is always 0.
      if limit[2] == 1 then
        call('HSET', key, 'd', format('%d', d), 't', at)
      else
        call('HSET', key, 'd', format('%d', d), 'r', format('%d', r), 't', at)
      end
      if d + t >= full - full % minute_us + minute_us then keep(key, d + t - now) end
    end
  elseif exists and call('PTTL', key) == -1 then
    keep(key, limit[5] + t - now)
  end
  return 0, granted, d, r, t - now
end
