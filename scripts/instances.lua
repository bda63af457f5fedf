-- instances.lua: how many processes share the ring, counted by their heartbeats. Sent as
-- EVAL every few seconds, with "#!lua" before it on a Redis server.
--
-- KEYS[1]  <prefix>:<storage version>:{instances}: ZSET, a member a process, its score the
--          instant of its last heartbeat, us of this server's clock
-- ARGV[1]  the process, the same for as long as it lives
-- ARGV[2]  us without a heartbeat after which a process is gone
-- ARGV[3]  ms after which the key is gone if nobody sends any
-- Reply    how many processes there are, this one among them
--
-- After this server's clock stepped back, processes that have ended count until it has
-- caught up: rather too many, since too few admit too much.

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[1])
local gone = redis.call('ZCOUNT', KEYS[1], '-inf', string.format('%.0f', now - tonumber(ARGV[2])))
if gone > 0 then
  redis.call('ZREMRANGEBYRANK', KEYS[1], 0, gone - 1)
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return redis.call('ZCARD', KEYS[1])
