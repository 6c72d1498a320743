-- Prepended to every script. Time is Redis's own, so no worker's clock matters.
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function read_meta(meta_key, id)
  local text = redis.call('HGET', meta_key, id)
  return text and cjson.decode(text) or nil
end

local function write_meta(meta_key, id, meta)
  redis.call('HSET', meta_key, id, cjson.encode(meta))
end

-- Reasons are kept as one text, a line each: cjson cannot tell an empty array from an empty object.
local function add_reason(meta, reason)
  meta.reasons = (meta.reasons and meta.reasons ~= '') and (meta.reasons .. '\n' .. reason) or reason
end

-- The id of the job in a message, whatever its envelope.
local function id_of(raw)
  local ok, value = pcall(cjson.decode, raw)
  for _ = 1, 3 do -- the envelopes that wire/payloads.py opens, in the same order
    if not ok then break end
    if type(value) == 'string' then
      ok, value = pcall(cjson.decode, value)
    elseif type(value) == 'table' and type(value[1]) == 'string' and value[2] == nil then
      ok, value = pcall(cjson.decode, value[1])
    elseif type(value) == 'table' and type(value.data) == 'string' and value.type == nil and value.id == nil then
      ok, value = pcall(cjson.decode, value.data)
    else
      break
    end
  end
  if ok and type(value) == 'table' and type(value.id) == 'string' and #value.id > 0 and #value.id <= 128 then
    return value.id
  end
  -- No usable id: the bytes themselves are the identity, so even such a message is never only in memory.
  return 'sha1:' .. redis.sha1hex(raw)
end

-- Raise the fencing token, take the lease and keep the raw bytes. Answers the meta that the claim is told, as text.
local function take(keys, id, raw, meta, worker, lease_until)
  meta.token = redis.call('INCR', keys.fence)
  meta.attempt = (meta.attempt or 0) + 1
  meta.worker = worker
  meta.claimed_at = now_ms()
  local text = cjson.encode(meta)
  redis.call('HSET', keys.job, id, raw)
  redis.call('HSET', keys.meta, id, text)
  redis.call('ZADD', keys.lease, lease_until, id)
  return text
end

-- What is over is remembered for a while, and never more of it than a million jobs.
local function trim(done, finished, now, window_ms)
  redis.call('ZREMRANGEBYSCORE', done, '-inf', now - window_ms)
  redis.call('ZREMRANGEBYRANK', done, 0, -1000001)
  redis.call('ZREMRANGEBYSCORE', finished, '-inf', now - 3600000)
end
