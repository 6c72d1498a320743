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
