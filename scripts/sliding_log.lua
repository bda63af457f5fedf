-- sliding_log.lua: exact sliding log on a ZSET, one member a unit.
--
-- Limit: limit (units in any window), window us, ahead us (of a lease: its life).
-- State: the score of a member is the instant it was admitted, in us; it counts while
--   score + window > now, so a call exactly one window later finds it gone. Its name
--   is its place in the order of arrival: one character for the number of digits
--   ('0' + digits), then the digits. So names are unique, byte order is the order of
--   arrival at equal scores (9 before 10), and Redis stores most of them as integers.
--   A member whose digits are followed by "~off" was written after this server's
--   clock had stepped back by more than a window: the key's clock is off us ahead,
--   and its scores go on rising. The newest member always has the highest number
--   and says the offset in force; what others say counts for nothing. TTL: until the
--   newest has left the window, plus slack, plus up to a minute to spare.
--   Units taken ahead, for a lease, are scored at the end of it, and with them those of the
--   call that asks for it: ahead us after now, or at the newest score if that is later. A
--   newest member scored ahead of the call that wrote it last has ">lead" behind all else
--   in its name: that was lead us before its score, and there the key's clock was. What is
--   scored below the newest is added first, and the newest then named anew.
-- Reply: a = units in the window after the call, look: before it (above limit if it was lowered);
--   b = us until a call of this cost fits, 0 if it does now or never will, and 0 if all
--   of count were admitted; of units taken ahead, if any were, their score;
--   c = us until the window is empty.
--
-- A clock that steps back by at most a window stands still for the key until it has
-- caught up; by more, the key's clock goes on from where it was (see "~off").
-- A changed limit applies to the members there are. A longer window finds only what the
-- shorter one had kept: what it trimmed or let expire is gone.
-- Old members go on the way of an admitted call: at most 256, or twice what the call
-- adds if that is more, so that neither Redis is held nor a heap can grow.

-- The suffix of the newest member, lead us ahead of the key's clock.
local function log_ahead(suffix, lead)
  if lead <= 0 then return suffix end
  return suffix .. '>' .. format('%d', lead)
end

-- The name of member number seq.
local function log_name(seq, suffix)
  local digits = format('%d', seq)
  return string.char(48 + #digits) .. digits .. suffix
end

-- Reads a log. Returns status, t (now by the key's clock), gap (us by which that
-- clock stands still ahead of real time), card, expired, seq and suffix of the newest
-- member, its score, and its name where the clock must be anchored anew. The suffix is
-- without lead.
local function log_read(key, limit)
  local newest = pcall('ZREVRANGE', key, '0', '0', 'WITHSCORES')
  if newest.err then
    if string.find(newest.err, 'WRONGTYPE', 1, true) then return 1 end
    return 3
  end
  local name = newest[1]
  if not name then return 0, now, 0, 0, 0, 0, '', now end
  local score = number(newest[2])
  local width, digits, off = string.match(name, '^(.)(%d+)(.*)$')
  if not width or not score or string.byte(width) - 48 ~= #digits or #digits > 15
    or score < 0 or score > 9007199254740991 or score % 1 ~= 0 then
    return 2
  end
  local seq, offset, base = digits + 0, 0, score
  if off ~= '' then
    local at = string.find(off, '>', 1, true)
    if at then
      local lead = number(string.match(string.sub(off, at), '^>(%d+)$') or '')
      if not lead or lead > score then return 2 end
      base, off = score - lead, string.sub(off, 1, at - 1)
    end
  end
  if off ~= '' then
    offset = number(string.match(off, '^~(%d+)$') or '')
    if not offset or offset > 9007199254740991 then return 2 end
  end
  local t, gap, anchor = now + offset, 0, nil
  if t < base then
    if base - t <= limit[3] then
      gap = base - t
    else
      off = '~' .. format('%d', offset + base - t)
      anchor = name
    end
    t = base
  end
  local card = call('ZCARD', key)
  local expired = call('ZCOUNT', key, '-inf', format('%d', t - limit[3]))
  return 0, t, gap, card, expired, seq, off, score, anchor
end

-- How many of count callers of this cost fit beside used units.
local function log_fit(limit, used, cost, count)
  local fit = floor((limit[2] - used) / cost)
  if fit > count then return count end
  return fit > 0 and fit or 0
end

-- us until a call of this cost fits when it does not now.
local function log_wait(key, limit, t, gap, expired, used, cost)
  local gone = used + cost - limit[2]
  if gone < 1 or gone > used then return 0 end
  local rank = expired + gone - 1
  local oldest = call('ZRANGE', key, rank, rank, 'WITHSCORES')
  return number(oldest[2]) - t + limit[3] + gap
end

--@look
local function log_look(key, limit, cost, count)
  local status, t, gap, card, expired, _, _, score = log_read(key, limit)
  if status ~= 0 then return status end
  local used = card - expired
  local granted, wait, empty = log_fit(limit, used, cost, count), 0, 0
  if granted == 0 then wait = log_wait(key, limit, t, gap, expired, used, cost) end
  if used > 0 then empty = score - t + limit[3] + gap end
  return 0, granted, used, wait, empty
end

--@charge
-- Adds units members numbered from seq + 1 at one score, the last of them with the suffix.
local function log_add(key, score, seq, units, suffix)
  local at = score == now and now_text or format('%d', score)
  if units == 1 then
    call('ZADD', key, at, log_name(seq + 1, suffix))
    return seq + 1
  end
  while units > 0 do
    local some, args = math.min(units, 500), {}
    for i = 1, some do
      args[2 * i - 1] = at
      args[2 * i] = log_name(seq + i, i == units and suffix or '')
    end
    call('ZADD', key, unpack(args))
    seq, units = seq + some, units - some
  end
  return seq
end

-- Names the newest member anew, with the highest number and as of t. Returns that number.
-- The new one first: a key without members is gone, and its time to live with it.
local function log_rename(key, newest, score, seq, suffix, t)
  seq = log_add(key, score, seq, 1, log_ahead(suffix, score - t))
  call('ZREM', key, newest)
  return seq
end

-- Gives back what was taken ahead and not used: "-units@score,...". Of what is scored
-- there or earlier, and after t, the latest go: whoever's that is, as many units of his
-- are left at scores that are no earlier. Returns the units removed, the highest number
-- and the newest score.
local function log_back(key, t, seq, suffix, debit, score)
  local removed, newest, after = 0, false, '(' .. format('%d', t)
  for units, at in string.gmatch(debit, '(%d+)@(%d+)') do
    local later = call('ZCOUNT', key, '(' .. at, '+inf')
    local some = math.min(number(units), 1000, call('ZCOUNT', key, after, at))
    if some > 0 then
      call('ZREMRANGEBYRANK', key, -later - some, -later - 1)
      removed, newest = removed + some, newest or later == 0
    end
  end
  if newest then
    newest = call('ZREVRANGE', key, '0', '0', 'WITHSCORES')
    if not newest[1] then return removed, 0, now end
    score = number(newest[2])
    seq = log_rename(key, newest[1], score, seq, suffix, t)
  end
  return removed, seq, score
end

-- Takes what was admitted elsewhere: "units@age us,...", oldest first. Then the newest
-- member is named anew, so that it still has the highest number. Returns the units
-- added, the highest number and the newest score.
local function log_debit(key, limit, t, seq, suffix, debit, newest, score)
  local added, latest = 0, nil
  for units, age in string.gmatch(debit, '(%d+)@(%d+)') do
    units, age = math.min(number(units), 1000), number(age)
    if age < limit[3] then
      seq = log_add(key, t - age, seq, units, suffix)
      added = added + units
      latest = t - age
    end
  end
  if latest and newest and score > latest then
    seq, latest = log_rename(key, newest, score, seq, suffix, t), score
  end
  return added, seq, latest or score
end

local function log_charge(key, limit, cost, count, more, debit)
  local status, t, gap, card, expired, seq, suffix, score, anchor = log_read(key, limit)
  if status ~= 0 then return status end
  local used, write = card - expired, false
  if anchor then
    seq = log_rename(key, anchor, score, seq, suffix, t)
    write = true
  end
  if debit ~= '0' then
    local added
    if string.byte(debit) == 45 then
      added, seq, score = log_back(key, t, seq, suffix, debit, score)
      used, card, added = used - added, card - added, 0
    else
      local newest = call('ZREVRANGE', key, '0', '0')[1]
      added, seq, score = log_debit(key, limit, t, seq, suffix, debit, newest, score)
    end
    used, write = used + added, write or added > 0
  end
  local granted, ahead = log_fit(limit, used, cost, count), 0
  if more > 0 then
    more = ahead_of(limit[2] - used - granted * cost, cost, more)
    if more > 0 then granted, ahead = granted + more, limit[4] end
  end
  if granted > 0 then
    local units, anew = granted * cost, write or card == 0
    if used == 0 and (card > 0 or debit ~= '0') then
      -- Nothing left of it: begin anew, with the server's own clock and short names.
      call('UNLINK', key)
      seq, suffix, t, gap, score, expired, anew = 0, '', now, 0, now, 0, true
    elseif expired > 0 then
      local some = math.min(expired, math.max(256, 2 * units))
      call('ZREMRANGEBYRANK', key, 0, some - 1)
      expired = expired - some
    end
    local at, top = t, score
    if ahead > 0 then at = math.max(t + ahead, score) end
    if at >= score then
      log_add(key, at, seq, units, log_ahead(suffix, at - t))
      top = at
    else
      local newest = call('ZREVRANGE', key, '0', '0')[1]
      log_rename(key, newest, score, log_add(key, at, seq, units, suffix), suffix, t)
    end
    -- Under which window its time to live was set a log does not say.
    local needed = limit[3] + gap + top - t
    if anew or call('PTTL', key) < floor(needed / 1000) + 1 + slack_ms then
      keep(key, needed)
    end
    used = used + units
    local b = 0
    if ahead > 0 then
      b = at
    elseif granted < count then
      b = log_wait(key, limit, t, gap, expired, used, cost)
    end
    return 0, granted, used, b, needed
  end
  if write or (card > 0 and call('PTTL', key) == -1) then
    keep(key, limit[3] + gap + math.max(0, score - t))
  end
  local empty = 0
  if used > 0 then empty = score - t + limit[3] + gap end
  return 0, 0, used, log_wait(key, limit, t, gap, expired, used, cost), empty
end
