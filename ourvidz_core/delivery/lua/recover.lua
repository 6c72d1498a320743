-- Jobs whose worker is silent run again; one whose workers keep dying is handed to the caller to bury.
-- KEYS: lease job meta fence retry done finished
-- ARGV: max_interruptions delay_ms lease_ms worker window_ms
-- Answers {recovered ids, {id, raw, meta} of each that is not tried again}.
local lease, job, meta_key, fence, retry, done, finished = unpack(KEYS)
local max_interruptions, delay_ms, lease_ms, worker = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local now = now_ms()
local recovered, buried = {}, {}

local function meta_of(id)
  return read_meta(meta_key, id) or {token = redis.call('INCR', fence), attempt = 0, worker = worker}
end

local function interrupt(id, raw, meta, reason)
  meta.interruptions = (meta.interruptions or 0) + 1
  add_reason(meta, reason)
  if meta.interruptions >= max_interruptions then
    -- The caller holds it now, under a token and lease of its own, until it has reported the failure.
    meta.token = redis.call('INCR', fence)
    meta.worker = worker
    redis.call('ZADD', lease, now + lease_ms, id)
    table.insert(buried, {id, raw, cjson.encode(meta)})
  else
    redis.call('ZREM', lease, id)
    redis.call('ZADD', retry, now + delay_ms, id)
    table.insert(recovered, id)
  end
  write_meta(meta_key, id, meta)
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', lease, '-inf', now, 'LIMIT', 0, 100)) do
  local raw, meta = redis.call('HGET', job, id), meta_of(id)
  if raw then
    interrupt(id, raw, meta, 'worker ' .. meta.worker .. ' stopped responding')
  else
    redis.call('ZREM', lease, id)
  end
end

-- A job has a lease or waits for another try. One with neither lost it to an eviction or to a person's hand, and
-- nobody would ever look for it. The counts say whether there is one without going through them all.
if redis.call('HLEN', job) > redis.call('ZCARD', lease) + redis.call('ZCARD', retry) then
  for _, id in ipairs(redis.call('HKEYS', job)) do
    if not redis.call('ZSCORE', lease, id) and not redis.call('ZSCORE', retry, id) then
      interrupt(id, redis.call('HGET', job, id), meta_of(id), 'its lease was lost')
    end
  end
end
if redis.call('HLEN', meta_key) > redis.call('HLEN', job) then
  for _, id in ipairs(redis.call('HKEYS', meta_key)) do
    -- Without its message it cannot run, and it would keep the producer's repetition of it out.
    if redis.call('HEXISTS', job, id) == 0 then redis.call('HDEL', meta_key, id) end
  end
end
trim(done, finished, now, tonumber(ARGV[5]))
return {recovered, buried}
