-- Takes tokens of one bucket, or none; gives back unspent ones first.
--
-- KEYS[1]  the bucket, a hash:
--            at   when `debt` was right, in microseconds of TIME
--            debt nanoseconds until the bucket is full, at `at`
--            e, t nanoseconds a token takes to come back, nanoseconds from empty to full
--            v    the version of the plan that `e` and `t` are of
--            s    the start of the epoch that the bucket was last used in
--            m, n the least `debt` before a call since `mt`; the same since `nt`, which is earlier
-- KEYS[2]  the partition's epoch, a hash in the same slot:
--            run  the run id of the server that it began on
--            s    its start, in microseconds of TIME
--            ok   the latest of its answers that anybody has told to have heard
-- ARGV     1 e   2 t   3 v   4 need   5 want   6 back   7 when `back` was taken
--          8 the last answer heard   9 since when the caller is away, or 0
--          10 the start of the epoch that it was told of since, or 0   11 microseconds to a new epoch
--          12 for how many microseconds tokens may be spent
-- Answers  {0, now, granted, debt}, or {1, now, microseconds to the start of the epoch}
--
-- Numbers are whole and below 2^53, where doubles are exact; a bucket that takes longer than 104 days to fill
-- is kept to two nanoseconds. Two windows after its last use a bucket is full, and expires.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local e, t, v = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local need, want = tonumber(ARGV[4]), tonumber(ARGV[5])
local back, taken_at = tonumber(ARGV[6]), tonumber(ARGV[7])
local heard, away = tonumber(ARGV[8]), tonumber(ARGV[9])
local promised, delay, lease = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])

local function whole(number)
  return string.format('%.0f', number)
end

-- Is this the server, and the state, that the epoch began on? For a caller that was away a new one begins too,
-- unless it was told of this one and has waited for it, or others are being answered.
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
local epoch = redis.call('HMGET', KEYS[2], 'run', 's', 'ok')
local start, ok = tonumber(epoch[2]), tonumber(epoch[3]) or 0
local told = promised > 0 and start == promised
local answered = ok > away and ok <= now and now - ok < 1000000
if epoch[1] ~= run or not start or start > now + delay
  or (away > 0 and start <= now and not told and not answered) then
  start = now + delay
  ok = 0
  redis.call('HSET', KEYS[2], 'run', run, 's', whole(start), 'ok', '0')
end
if start > now then
  return {1, now, start - now}
end
if told then
  heard = now
end
if heard > ok + 100000 and heard <= now and heard >= start then
  redis.call('HSET', KEYS[2], 'ok', whole(heard))
end

local b = redis.call('HMGET', KEYS[1], 'at', 'debt', 'e', 't', 'v', 's', 'm', 'mt', 'n', 'nt')
local at, debt = tonumber(b[1]), tonumber(b[2])
local m, mt, n, nt = tonumber(b[7]), tonumber(b[8]), tonumber(b[9]), tonumber(b[10])
local changed = false
if at then
  local e0, t0, v0 = tonumber(b[3]), tonumber(b[4]), tonumber(b[5])
  if now < at then
    -- The clock was set back: from here it refills anew.
    at = now
    changed = true
  end
  debt = math.max(0, debt - (now - at) * 1000)
  if v < v0 then
    e, t = e0, t0
    v = v0
  elseif e0 ~= e or t0 ~= t then
    -- As many tokens are missing as before: debt * e / e0, rounded up, in exact steps of 12 bits.
    local whole_tokens = math.floor(debt / e0)
    local rest = debt - whole_tokens * e0
    local q, r = 0, 0
    for shift = 36, 0, -12 do
      local limb = math.floor(e / 2 ^ shift) % 4096
      local x = r * 4096 + rest * limb
      local d = math.floor(x / e0)
      q = q * 4096 + d
      r = x - d * e0
    end
    if r > 0 then
      q = q + 1
    end
    debt = math.min(t, whole_tokens * e + q)
    -- What went before is counted in other tokens.
    m, mt, n, nt = nil, nil, nil, nil
    changed = true
  end
else
  debt = 0
end
if tonumber(b[6]) ~= start then
  -- Not used in this epoch: it was empty when that began.
  debt = math.max(debt, t - (now - start) * 1000)
  m, mt, n, nt = nil, nil, nil, nil
  changed = at ~= nil
end
debt = math.min(debt, t)

-- The least debt since some time before a lease was taken bounds what its return may credit: had the tokens
-- never been taken, the bucket would have been full then, and refilled nothing.
m = m and math.min(m, debt) or debt
n = n and math.min(n, debt) or debt
mt = mt or now
nt = nt or now
if back > 0 then
  local bound = 0
  if taken_at >= mt then
    bound = m
  elseif taken_at >= nt then
    bound = n
  end
  debt = debt - math.min(back * e, bound, debt)
  m = math.min(m, debt)
  n = math.min(n, debt)
  changed = true
end

local granted = 0
if want > 0 then
  local there = math.floor((t - debt) / e)
  if there >= need then
    -- Near the limit the rest is left for others.
    granted = math.min(want, math.max(need, math.floor(there / 2)))
    debt = debt + granted * e
    changed = true
    -- A new mark from time to time, and where the one there is would credit nothing of this grant.
    if now - mt > 2 * lease or now < mt or m < granted * e then
      n, nt = m, mt
      m, mt = debt, now
    end
  end
end
if changed then
  redis.call('HSET', KEYS[1], 'at', whole(now), 'debt', whole(debt), 'e', whole(e), 't', whole(t),
    'v', whole(v), 's', whole(start), 'm', whole(m), 'mt', whole(mt), 'n', whole(n), 'nt', whole(nt))
  redis.call('PEXPIRE', KEYS[1], whole(math.ceil(2 * t / 1000000) + 60000))
end
return {0, now, granted, debt}
