-- Which jobs were asked to stop. The producer's set has no times, so what it holds is moved to where it can expire.
-- KEYS: cancel cancelled   ARGV: window_ms id ...
-- Answers {ids asked for since the last look, those of the given ids that shall stop}.
local cancel, cancelled = unpack(KEYS)
local now = now_ms()
local fresh, marked = redis.call('SPOP', cancel, 100), {}
for _, id in ipairs(fresh) do redis.call('ZADD', cancelled, now, id) end
for index = 2, #ARGV do
  if redis.call('ZSCORE', cancelled, ARGV[index]) then table.insert(marked, ARGV[index]) end
end
redis.call('ZREMRANGEBYSCORE', cancelled, '-inf', now - tonumber(ARGV[1]))
return {fresh, marked}
