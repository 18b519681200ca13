-- Takes one attempt from every counter, or from none if any of them requires a wait.
--
-- KEYS     the counters, narrowest first, in one hash slot
-- ARGV     for each counter: attempts without a wait, milliseconds after which one is forgiven, milliseconds of the
--          first wait; and finally the longest wait
-- Returns  {milliseconds to wait, attempts of the last counter before this one, the time}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local longest = tonumber(ARGV[#ARGV])
local counts, wait = {}, 0
for i, key in ipairs(KEYS) do
  local state = redis.call('HMGET', key, 'n', 'at', 'until')
  local at = tonumber(state[2]) or now
  local forgiven = math.max(0, now - at) / tonumber(ARGV[3 * i - 1])
  -- More attempts than this have no further effect. Both bounds are reached only if something else writes to these
  -- keys.
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
  -- A fraction of an attempt may have been forgiven between two immediate attempts.
  if n > free - 0.5 then
    delay = math.min(longest, math.floor(first * 2 ^ math.min(30, math.max(0, n - free))))
  end
  redis.call('HSET', key, 'n', tostring(n), 'at', tostring(now), 'until', tostring(now + delay))
  redis.call('PEXPIRE', key, math.ceil(n * forgive) + delay)
end
return {0, crowd, now}
