-- Take callbacks that are due. Their due time moves on, so that whoever dies with one leaves it to others.
-- KEYS: outbox rows   ARGV: limit hold_ms
-- Answers {row_id, row, ...} and, last, the milliseconds until the next one is due (-1: none).
local outbox, rows = unpack(KEYS)
local now = now_ms()
local answer = {}
if redis.call('HLEN', rows) > redis.call('ZCARD', outbox) then
  for _, row_id in ipairs(redis.call('HKEYS', rows)) do
    redis.call('ZADD', outbox, 'NX', now, row_id) -- its time was lost, and it would never be due
  end
end
for _, row_id in ipairs(redis.call('ZRANGEBYSCORE', outbox, '-inf', now, 'LIMIT', 0, tonumber(ARGV[1]))) do
  local row = redis.call('HGET', rows, row_id)
  if row then
    redis.call('ZADD', outbox, now + tonumber(ARGV[2]), row_id)
    table.insert(answer, row_id)
    table.insert(answer, row)
  else
    redis.call('ZREM', outbox, row_id)
  end
end
local following = redis.call('ZRANGE', outbox, 0, 0, 'WITHSCORES')
table.insert(answer, following[2] and math.max(0, following[2] - now) or -1)
return answer
