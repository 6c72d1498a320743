-- Give a job back, to run again after a delay.
-- KEYS: lease meta retry   ARGV: id token delay_ms reason counts_as_attempt
-- Answers 1, or 0 where somebody else has the job now.
local lease, meta_key, retry = unpack(KEYS)
local id, token, delay_ms, reason, counts = unpack(ARGV)
local meta = read_meta(meta_key, id)
if not meta or meta.token ~= tonumber(token) then return 0 end
if reason ~= '' then add_reason(meta, reason) end
if counts ~= '1' then meta.attempt = meta.attempt - 1 end
write_meta(meta_key, id, meta)
redis.call('ZREM', lease, id)
redis.call('ZADD', retry, now_ms() + tonumber(delay_ms), id)
return 1
