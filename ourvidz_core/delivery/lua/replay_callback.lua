-- A callback goes out now: one that was given up, or one that waits.
-- KEYS: outbox rows undelivered   ARGV: row_id given_up_row row
-- Answers 1, or 0 where it is not there.
local outbox, rows, undelivered = unpack(KEYS)
local row_id, given_up_row, row = unpack(ARGV)
if given_up_row ~= '' then
  if redis.call('LREM', undelivered, 1, given_up_row) == 0 then return 0 end
elseif redis.call('HEXISTS', rows, row_id) == 0 then
  return 0
end
redis.call('HSET', rows, row_id, row)
redis.call('ZADD', outbox, now_ms(), row_id)
return 1
