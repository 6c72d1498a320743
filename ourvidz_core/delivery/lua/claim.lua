-- Take the oldest job: raise the fencing token, take the lease, keep the raw bytes, and only then pop.
-- KEYS: queue lease job meta done fence retry cancel cancelled   ARGV: lease_ms worker side
-- Answers nil, {'claimed', id, raw, meta, is_cancelled} or {'duplicate', id, raw}.
local queue, lease, job, meta_key, done, fence, retry, cancel, cancelled = unpack(KEYS)
local lease_ms, worker, side = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local keys = {lease = lease, job = job, meta = meta_key, fence = fence}

local now = now_ms()

-- The producer writes the set itself; a key of another type there must not stop the queue.
local function is_cancelled(id)
  if redis.call('EXISTS', cancel, cancelled) == 0 then return false end
  return redis.call('ZSCORE', cancelled, id) ~= false or redis.pcall('SISMEMBER', cancel, id) == 1
end

local function claim(id, raw, meta)
  local text = take(keys, id, raw, meta, worker, now + lease_ms)
  return {'claimed', id, raw, text, is_cancelled(id) and 1 or 0}
end

-- Jobs that run again are older than anything in the list.
local due = redis.call('ZRANGEBYSCORE', retry, '-inf', now, 'LIMIT', 0, 1)[1]
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
