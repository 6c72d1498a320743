-- Take the oldest job: raise the fencing token, take the lease, keep the raw bytes, and only then pop.
-- KEYS: queue lease job meta done fence retry cancel cancelled   ARGV: lease_ms worker side
-- Answers nil, {'claimed', id, raw, meta} or {'duplicate', id, raw}.
local queue, lease, job, meta_key, done, fence, retry, cancel, cancelled = unpack(KEYS)
local lease_ms, worker, side = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local keys = {lease = lease, job = job, meta = meta_key, fence = fence}

local function claim(id, raw, meta)
  meta = take(keys, id, raw, meta, worker, lease_ms)
  -- The producer writes the set itself; a key of another type there must not stop the queue.
  meta.is_cancelled = redis.call('ZSCORE', cancelled, id) ~= false or redis.pcall('SISMEMBER', cancel, id) == 1
  return {'claimed', id, raw, cjson.encode(meta)}
end

-- Jobs that run again are older than anything in the list.
local due = redis.call('ZRANGEBYSCORE', retry, '-inf', now_ms(), 'LIMIT', 0, 1)[1]
if due then
  local raw = redis.call('HGET', job, due)
  if raw then
    local answer = claim(due, raw, read_meta(meta_key, due) or {})
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
  answer = claim(id, raw, {})
end
redis.call(side == 'left' and 'LPOP' or 'RPOP', queue)
return answer
