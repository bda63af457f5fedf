-- head.lua: what everything else uses. Names are local because every access to a global is a
-- look-up in a table.

local call, pcall, number = redis.call, redis.pcall, tonumber
local floor, format = math.floor, string.format
local args = ARGV

-- Time is this server's own, read once. now is us since 1970, now_text the same as text:
-- Redis takes longer to write a number of 16 digits than to read a key, and format longer
-- than joining the two parts that the server gives.
local time = call('TIME')
local now_text = #time[2] == 6 and time[1] .. time[2] or format('%d', time[1] * 1000000 + time[2])
local now = number(now_text)

--@charge
-- A key is needed until some instant, its end, and rising calls put that off. Changing a
-- time to live is dear, and a key that lives for milliseconds is dearer still, because
-- Redis searches for keys that have expired. So a key gets a minute more than it needs. A
-- bucket, which says under which limit it was written, gets another time to live when its
-- end passes into another minute of its clock; a log when it has less than it needs.
local minute_us, slack_ms = 60000000, 5000
local spare_ms = 1 + slack_ms + 60000
