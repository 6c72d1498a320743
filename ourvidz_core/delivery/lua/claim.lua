-- Take the oldest job: raise the fencing token, take the lease, keep the raw bytes, and only then pop.
-- KEYS: queue lease job meta done fence retry   ARGV: lease_ms worker side
-- Answers nil, {'claimed', id, raw, meta} or {'duplicate', id, raw}.
local queue, lease, job, meta_key, done, fence, retry = unpack(KEYS)
local lease_ms, worker, side = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local now = now_ms()

local function id_of(raw)
  local ok, value = pcall(cjson.decode, raw)
  for _ = 1, 2 do
    if not ok then break end
    if type(value) == 'string' then
      ok, value = pcall(cjson.decode, value)
    elseif type(value) == 'table' and type(value[1]) == 'string' and value[2] == nil then
      ok, value = pcall(cjson.decode, value[1])
    elseif type(value) == 'table' and type(value.data) == 'string' and value.type == nil then
      ok, value = pcall(cjson.decode, value.data)
    end
  end
  if ok and type(value) == 'table' and type(value.id) == 'string' and #value.id > 0 and #value.id <= 128 then
    return value.id
  end
  -- No usable id: the bytes themselves are the identity, so even such a message is never only in memory.
  return 'sha1:' .. redis.sha1hex(raw)
end

local function take(id, raw, meta)
  meta.token = redis.call('INCR', fence)
  meta.attempt = (meta.attempt or 0) + 1
  meta.worker = worker
  redis.call('HSET', job, id, raw)
  write_meta(meta_key, id, meta)
  redis.call('ZADD', lease, now + lease_ms, id)
  return {'claimed', id, raw, cjson.encode(meta)}
end

-- Jobs that run again are older than anything in the list.
local due = redis.call('ZRANGEBYSCORE', retry, '-inf', now, 'LIMIT', 0, 1)[1]
if due then
  local raw, meta = redis.call('HGET', job, due), read_meta(meta_key, due)
  if raw and meta then
    local answer = take(due, raw, meta)
    redis.call('ZREM', retry, due)
    return answer
  end
  redis.call('ZREM', retry, due)
end

local raw = redis.call('LINDEX', queue, side == 'left' and 0 or -1)
if not raw then return nil end
local id = id_of(raw)
local answer
if redis.call('ZSCORE', done, id) or redis.call('HEXISTS', meta_key, id) == 1 then
  answer = {'duplicate', id, raw}
else
  answer = take(id, raw, {})
end
redis.call(side == 'left' and 'LPOP' or 'RPOP', queue)
return answer
