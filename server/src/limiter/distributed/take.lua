-- Takes tokens from one bucket, all-or-nothing below `need`, after crediting tokens that come back unspent.
-- One call is one atomic step on Redis's own clock.
--
-- KEYS[1]  the bucket, a hash:
--            at      when `debt` was computed, in microseconds of TIME
--            debt    nanoseconds of refill until the bucket is full
--            x       nanoseconds missing beyond an empty bucket, from before the burst was made smaller
--            e, t    nanoseconds per token; nanoseconds from empty to full
--            v, vt   version of the plan that `e` and `t` come from; when a caller of that version last called
--            s       start of the epoch in which the bucket was last used
--            y       nanoseconds of refill since then, less those taken, also if the bucket was full meanwhile; no
--                    bucket holds more, whatever its burst becomes. None if they are more than `LARGEST`
--            g       generation: a new number whenever grants made before lose their value
--            m, mt   the least `debt` since `mt`
--            n, nt   the least `debt` since `nt`, which is before `mt`
-- KEYS[2]  the partition's epoch, a hash in the same slot:
--            run     run id of the Redis process that the epoch began on
--            s       its start, in microseconds of TIME
--            ok      the latest answer that a caller who uses the counters has confirmed receiving in time
-- ARGV     1 e   2 t   3 v   4 need   5 want   6 back   7 when the oldest of `back` was taken
--          8 latest answer the caller received in time   9 since when the caller has had none, or 0; 1 if it has never had
--            one and is not the only caller
--         10 start of the epoch that the answer before promised, or 0   11 microseconds to a new epoch
--         12 microseconds for which granted tokens may be spent   13 generation in which `back` was taken
--         14 tokens that requests are waiting for now; the rest of `want` is held for later
-- Returns  {0, now, granted, debt, g}, or {1, now, microseconds until the epoch starts}
--
-- **Granting.** What requests wait for is granted as far as the bucket goes. What is only held for later gets at
-- most half of what is there, so that callers near the limit leave something for each other.
--
-- **Crediting.** Tokens that come back must never make the bucket fuller than if they had not been taken. Had they
-- not been, the debt would have been lower by `back * e`, until it reached zero; from then on refill would have been
-- wasted that in fact was not. So the difference shrinks by at most the time since, and it never shrinks below the
-- least debt since the tokens were taken:
--
--   credit = min(debt, back * e, max(back * e - (now - taken), least debt since a mark no later than `taken`))
--
-- Afterwards every remembered minimum is lowered by the credit: the next return is judged on a history in which
-- these tokens were never taken. Nothing is credited across a change of `e` or `t`, a new epoch, or a clock that
-- went back; each starts a new generation.
--
-- **Plans.** Callers may know different versions of a plan. The newest wins, unless no caller has used it for
-- `OUTDATED`: then versions have started over, as they do when a database is restored from a backup.
--
-- Numbers are whole and below 2^53, where doubles are exact; a bucket that takes longer than 104 days to fill is
-- exact to two nanoseconds. A bucket that is not used for twice the time it takes to fill is full, and expires.
local OUTDATED = 10000000
-- Microseconds after the start of an epoch in which callers that were promised it return.
local PROMISED = 500000
-- 52 days, in nanoseconds. Longer sums are not exact.
local LARGEST = 2 ^ 52

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local e, t, v = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local need, want = tonumber(ARGV[4]), tonumber(ARGV[5])
local back, taken_at = tonumber(ARGV[6]), tonumber(ARGV[7])
local heard, away = tonumber(ARGV[8]), tonumber(ARGV[9])
local promised, delay, lease = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local back_generation, waiting = tonumber(ARGV[13]), tonumber(ARGV[14])

local function whole(number)
  return string.format('%.0f', number)
end

-- So many nanoseconds of refill at `e0` a token, at `e` a token: number * e / e0 in exact steps of 12 bits, with what is
-- left of the last nanosecond.
local function exchanged(number, e0, e)
  local whole_tokens = math.floor(number / e0)
  local rest = number - whole_tokens * e0
  local q, r = 0, 0
  for shift = 36, 0, -12 do
    local limb = math.floor(e / 2 ^ shift) % 4096
    local x = r * 4096 + rest * limb
    local d = math.floor(x / e0)
    q = q * 4096 + d
    r = x - d * e0
  end
  return whole_tokens * e + q, r
end

-- A new epoch begins when this is another process than the one the epoch began on, or when its state is older than
-- that. It also begins when the caller has served without the counters, unless it was promised this epoch and returns
-- at its start, having served nothing since, or other callers were being answered meanwhile. A caller that is new among others cannot know
-- whether they have served without the counters: they have if nobody was answered for a while.
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
local epoch = redis.call('HMGET', KEYS[2], 'run', 's', 'ok')
local start, ok = tonumber(epoch[2]), tonumber(epoch[3]) or 0
local told = promised > 0 and start == promised and now - start < PROMISED
local answered = (ok > away and ok <= now and now - ok < 1000000) or (away == 1 and ok == 0)
if epoch[1] ~= run or not start or start > now + delay
  or (away > 0 and start <= now and not told and not answered) then
  start = now + delay
  ok = 0
  redis.call('HSET', KEYS[2], 'run', run, 's', whole(start), 'ok', '0')
end
if start > now then
  return {1, now, start - now}
end
-- A caller that is away may not get this answer in time either, and serves on without the counters then.
if away == 0 and heard > ok + 100000 and heard <= now and heard >= start then
  redis.call('HSET', KEYS[2], 'ok', whole(heard))
end

local b = redis.call('HMGET', KEYS[1], 'at', 'debt', 'e', 't', 'v', 's', 'm', 'mt', 'n', 'nt', 'g', 'vt', 'x', 'y')
local at, debt = tonumber(b[1]), tonumber(b[2])
local m, mt, n, nt = tonumber(b[7]), tonumber(b[8]), tonumber(b[9]), tonumber(b[10])
local g, vt, beyond, gathered = tonumber(b[11]), now, tonumber(b[13]) or 0, tonumber(b[14])
local changed, new_generation, in_use = false, not g, false
if at then
  local e0, t0, v0 = tonumber(b[3]), tonumber(b[4]), tonumber(b[5])
  local vt0 = tonumber(b[12]) or at
  if now < at then
    -- The clock went back. Refill continues from here.
    at = now
    vt0 = math.min(vt0, now)
    changed, new_generation = true, true
  end
  local refill, edited = (now - at) * 1000, false
  if v < v0 and now - vt0 < OUTDATED then
    e, t, v, vt = e0, t0, v0, vt0
  else
    in_use = now - vt0 >= OUTDATED / 2
    if e0 ~= e or t0 ~= t then
      -- As many tokens are missing as before. When the edit was made is not known, so since the last use the bucket has
      -- refilled at the lower of the two rates.
      local missing, more = exchanged(debt + beyond, e0, e)
      if more > 0 then
        missing = missing + 1
      end
      if e < e0 then
        refill = exchanged(refill, e0, e)
      end
      debt = math.min(t, missing)
      beyond = missing - debt
      if gathered then
        gathered = math.min(exchanged(gathered, e0, e), LARGEST)
      end
      edited, changed, new_generation = true, true, true
    end
  end
  beyond = math.max(0, beyond - math.max(0, refill - debt))
  debt = math.max(0, debt - refill)
  if gathered then
    gathered = gathered + refill
    if edited and debt < t - gathered then
      beyond = math.max(0, beyond - (t - gathered - debt))
      debt = t - gathered
    end
  end
else
  debt = 0
end
if tonumber(b[6]) ~= start then
  -- First use in this epoch, in which every bucket started empty.
  local missing = debt + beyond
  debt = math.max(debt, t - (now - start) * 1000)
  beyond = math.max(0, missing - debt)
  gathered = (now - start) * 1000
  new_generation = true
  changed = changed or at ~= nil
end
if gathered and gathered >= LARGEST then
  gathered = nil
end
if new_generation then
  g = math.max(now, (g or 0) + 1)
  m, mt, n, nt = debt, now, debt, now
end

m = math.min(m, debt)
n = math.min(n, debt)
if back > 0 then
  local credit = 0
  if back_generation == g and taken_at <= now then
    local least = 0
    if taken_at >= mt then
      least = m
    elseif taken_at >= nt then
      least = n
    end
    credit = math.min(debt, back * e, math.max(back * e - (now - taken_at) * 1000, least))
  end
  debt = debt - credit
  gathered = gathered and gathered + credit
  m = math.max(0, m - credit)
  n = math.max(0, n - credit)
  changed = true
end

local granted = 0
if want > 0 then
  local there = math.floor((t - debt) / e)
  if there >= need then
    granted = math.min(want, math.max(math.min(waiting, there), math.floor(there / 2)))
  end
  if granted > 0 then
    debt = debt + granted * e
    gathered = gathered and gathered - granted * e
    changed = true
    -- A new mark from time to time, and when the present one could not credit this grant in full.
    if now - mt > 2 * lease or m < granted * e then
      n, nt = m, mt
      m, mt = debt, now
    end
  end
end
if changed then
  redis.call('HSET', KEYS[1], 'at', whole(now), 'debt', whole(debt), 'e', whole(e), 't', whole(t),
    'v', whole(v), 's', whole(start), 'm', whole(m), 'mt', whole(mt), 'n', whole(n), 'nt', whole(nt),
    'g', whole(g), 'vt', whole(vt))
  if beyond > 0 or b[13] then
    redis.call('HSET', KEYS[1], 'x', whole(beyond))
  end
  if gathered then
    redis.call('HSET', KEYS[1], 'y', whole(gathered))
  elseif b[14] then
    redis.call('HDEL', KEYS[1], 'y')
  end
  redis.call('PEXPIRE', KEYS[1], whole(math.ceil(2 * (t + beyond) / 1000000) + 60000))
elseif in_use then
  redis.call('HSET', KEYS[1], 'vt', whole(vt))
end
return {0, now, granted, debt, g}
