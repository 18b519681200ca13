-- Counts one attempt on every counter. If any counter requires a wait, does not count the attempt.
--
-- KEYS     the counters, narrowest first, in one hash slot
-- ARGV     for each counter: attempts allowed before a wait, milliseconds after which one attempt is forgiven,
--          milliseconds of the first wait; and finally the longest wait
-- Returns  {milliseconds to wait, number of earlier attempts on the last counter, current time}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local longest = tonumber(ARGV[#ARGV])
local counts, wait = {}, 0
for i, key in ipairs(KEYS) do
  local state = redis.call('HMGET', key, 'n', 'at', 'until')
  local at = tonumber(state[2]) or now
  local forgiven = math.max(0, now - at) / tonumber(ARGV[3 * i - 1])
  -- Limit the count to `free` + 32. This limit, and the limit of the wait, matter only if another program writes to
  -- these keys.
  local n = math.min(tonumber(state[1]) or 0, tonumber(ARGV[3 * i - 2]) + 32)
  counts[i] = math.max(0, n - forgiven)
  local left = (tonumber(state[3]) or 0) - now
  if left > longest then
    left = longest
    redis.call('HSET', key, 'until', string.format('%.0f', now + longest))
  end
  wait = math.max(wait, left)
end
local crowd = math.floor(counts[#KEYS])
if wait > 0 then
  return {math.ceil(wait), crowd, now}
end
for i, key in ipairs(KEYS) do
  local free, forgive, first = tonumber(ARGV[3 * i - 2]), tonumber(ARGV[3 * i - 1]), tonumber(ARGV[3 * i])
  local n = counts[i] + 1
  local delay = 0
  -- A fraction of an attempt is forgiven between two consecutive attempts. This must not postpone the first wait.
  if n > free - 0.5 then
    delay = math.min(longest, math.floor(first * 2 ^ math.min(30, math.max(0, n - free))))
  end
  redis.call('HSET', key, 'n', tostring(n), 'at', tostring(now), 'until', tostring(now + delay))
  redis.call('PEXPIRE', key, math.ceil(n * forgive) + delay)
end
return {0, crowd, now}
