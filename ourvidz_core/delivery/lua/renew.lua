-- Keep the lease of a job that is being worked on.
-- KEYS: lease meta retry   ARGV: id token lease_ms
-- Answers 1, or 0 where somebody else has the job now.
local lease, meta_key, retry = unpack(KEYS)
local meta = read_meta(meta_key, ARGV[1])
if not meta or meta.token ~= tonumber(ARGV[2]) then return 0 end
redis.call('ZREM', retry, ARGV[1]) -- reaped a moment ago and not taken yet: still ours
redis.call('ZADD', lease, now_ms() + tonumber(ARGV[3]), ARGV[1])
return 1
