-- Jobs whose worker is silent run again; one whose workers keep dying is handed to the caller to bury.
-- KEYS: lease job meta fence retry   ARGV: max_interruptions delay_ms lease_ms worker
-- Answers {recovered ids, {id, raw, meta} of each that is not tried again}.
local lease, job, meta_key, fence, retry = unpack(KEYS)
local max_interruptions, delay_ms, lease_ms, worker = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local now = now_ms()
local recovered, buried = {}, {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', lease, '-inf', now, 'LIMIT', 0, 100)) do
  local raw, meta = redis.call('HGET', job, id), read_meta(meta_key, id)
  if not raw or not meta then
    redis.call('ZREM', lease, id)
  else
    meta.interruptions = (meta.interruptions or 0) + 1
    add_reason(meta, 'worker ' .. meta.worker .. ' stopped responding')
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
end
return {recovered, buried}
