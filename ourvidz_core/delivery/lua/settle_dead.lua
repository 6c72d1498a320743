-- A dead letter runs again or is thrown away.
-- KEYS: queue dead meta done cancel cancelled   ARGV: entry verdict raw side
-- Answers 1, 0 where the letter is not there, or -1 where its job is in flight.
local queue, dead, meta_key, done, cancel, cancelled = unpack(KEYS)
local entry, verdict, raw, side = unpack(ARGV)
local id = id_of(raw)
if verdict == 'requeue' and redis.call('HEXISTS', meta_key, id) == 1 then return -1 end
if redis.call('LREM', dead, 1, entry) == 0 then return 0 end
if verdict == 'requeue' then
  redis.call('ZREM', done, id)
  redis.call('ZREM', cancelled, id)
  redis.pcall('SREM', cancel, id)
  redis.call(side == 'left' and 'RPUSH' or 'LPUSH', queue, raw)
end
return 1
