-- End a job in one step: the callback is durable, the job is no longer in flight.
-- KEYS: lease job meta done retry finished outbox rows dead cancel cancelled
-- ARGV: id token is_final row_id row callback_delay_ms dead_entry window_ms
-- Answers 'done', 'already' or 'fenced'.
local lease, job, meta_key, done, retry, finished, outbox, rows, dead, cancel, cancelled = unpack(KEYS)
local id, token, is_final, row_id, row, delay_ms, dead_entry, window_ms = unpack(ARGV)
local now = now_ms()
local meta = read_meta(meta_key, id)
if not meta or meta.token ~= tonumber(token) then
  -- A receipt tells the lost reply of our own finish from somebody else's.
  return redis.call('ZSCORE', finished, token) and 'already' or 'fenced'
end
if row_id ~= '' then
  redis.call('HSET', rows, row_id, row)
  redis.call('ZADD', outbox, now + tonumber(delay_ms), row_id)
end
if dead_entry ~= '' then redis.call('LPUSH', dead, dead_entry) end
if is_final == '1' then redis.call('ZADD', done, now, id) end
redis.call('ZADD', finished, now, token)
if meta.token % 100 == 0 then trim(done, finished, now, tonumber(window_ms)) end -- as whoever recovers jobs does
redis.call('ZREM', lease, id)
redis.call('ZREM', retry, id)
if redis.call('EXISTS', cancel, cancelled) > 0 then
  redis.call('ZREM', cancelled, id)
  redis.pcall('SREM', cancel, id)
end
redis.call('HDEL', job, id)
redis.call('HDEL', meta_key, id)
return 'done'
