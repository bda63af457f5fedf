-- head.lua: what the other files share. Names are local because every access to a global
-- is a look-up in a table.

local call, number = redis.call, tonumber
local floor, format = math.floor, string.format

-- Time is this server's own, read once. now is us since 1970, now_text the same as text:
-- Redis takes longer to write a number of 16 digits than to read a key.
local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local now_text = format('%d', now)

--@look
--@charge
-- Gives the key a time to live of at least so many ms. Changing it is dear, and a key
-- that lives for milliseconds is dearer still, because Redis searches for keys that have
-- expired: so it gets a minute more, and is left alone while that lasts. anew: whatever
-- it has.
local spare_ms = 60000
local function keep(key, ms, anew)
  if anew or call('PTTL', key) < ms then
    call('PEXPIRE', key, ms + spare_ms)
  end
end
