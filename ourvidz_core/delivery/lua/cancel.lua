-- Cancel a job wherever it is: one that waits is taken out, for the caller to report; one in flight is marked.
-- A long list is looked through in parts, from the end where messages arrive: what is taken meanwhile moves nothing
-- that was not looked at yet, and what arrives meanwhile is only looked at twice.
-- KEYS: queue lease job meta done fence retry cancel cancelled   ARGV: id worker lease_ms start count side
-- Answers {'taken', id, raw, meta}, {'running'}, {'absent'}, or {'more'} where the list goes on.
local queue, lease, job, meta_key, done, fence, retry, cancel, cancelled = unpack(KEYS)
local id, worker, lease_ms, start, count, side = unpack(ARGV)
start, count = tonumber(start), tonumber(count)
local keys = {lease = lease, job = job, meta = meta_key, fence = fence}

-- The mark stays until the caller has reported it: if the caller dies, the next to take the job does that.
local function take_out(message, known)
  redis.call('ZADD', cancelled, now_ms(), id)
  return {'taken', id, message, take(keys, id, message, known, worker, now_ms() + tonumber(lease_ms))}
end

local meta, raw = read_meta(meta_key, id), redis.call('HGET', job, id)
if meta and raw and redis.call('ZREM', retry, id) == 1 then
  return take_out(raw, meta)
end
if meta then
  redis.call('ZADD', cancelled, now_ms(), id)
  return {'running'}
end
if redis.call('ZSCORE', done, id) then
  redis.call('ZREM', cancelled, id)
  return {'absent'}
end
local part
if side == 'left' then
  part = redis.call('LRANGE', queue, -(start + count), -(start + 1))
else
  part = redis.call('LRANGE', queue, start, start + count - 1)
end
for _, message in ipairs(part) do
  -- Looking for the text first is a hundred times cheaper than reading every message.
  if string.find(message, id, 1, true) and id_of(message) == id then
    local answer = take_out(message, {})
    redis.call('LREM', queue, 1, message)
    return answer
  end
end
return {#part == count and 'more' or 'absent'}
