-- head.lua: what the other files share. Names are local because every access to a global
-- is a look-up in a table.

local call, pcall, number = redis.call, redis.pcall, tonumber
local floor, format = math.floor, string.format
local args = ARGV

-- Time is this server's own, read once. now is us since 1970, now_text the same as text:
-- Redis takes longer to write a number of 16 digits than to read a key.
local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local now_text = format('%d', now)

--@look
--@charge
-- A key is needed until some instant, its end, and rising calls put that off. Changing a
-- time to live is dear, and a key that lives for milliseconds is dearer still, because
-- Redis searches for keys that have expired. So a key gets a minute more than it needs. A
-- bucket, which says under which limit it was written, gets another time to live when its
-- end passes into another minute of its clock; a log when it has less than it needs.
local minute_us, minute_ms = 60000000, 60000
local slack_ms = 5000
local function keep(key, us)
  call('PEXPIRE', key, floor(us / 1000) + 1 + slack_ms + minute_ms)
end
