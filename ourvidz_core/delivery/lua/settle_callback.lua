-- A callback was delivered, is to be sent again, or is given up.
-- KEYS: outbox rows undelivered   ARGV: row_id verdict row delay_ms
local outbox, rows, undelivered = unpack(KEYS)
local row_id, verdict, row, delay_ms = unpack(ARGV)
if redis.call('HEXISTS', rows, row_id) == 0 then return 0 end
if verdict == 'postponed' then
  redis.call('HSET', rows, row_id, row)
  redis.call('ZADD', outbox, now_ms() + tonumber(delay_ms), row_id)
  return 1
end
if verdict == 'given_up' then redis.call('LPUSH', undelivered, row) end
redis.call('HDEL', rows, row_id)
redis.call('ZREM', outbox, row_id)
return 1
