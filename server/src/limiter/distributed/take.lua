-- Credits unspent tokens to one bucket, and then takes tokens from that bucket: at least `need`, or none. The script
-- runs atomically and uses the clock of Redis.
--
-- KEYS[1]  the bucket, a hash:
--            at      when `debt` was computed, in microseconds of the Redis clock (TIME)
--            debt    nanoseconds of refill until the bucket is full
--            x       debt beyond that of an empty bucket, left over from a larger burst
--            e, t    nanoseconds per token, and nanoseconds from empty to full
--            v, vt   version of the plan that `e` and `t` come from, and when a caller last used that version
--            s       start of the epoch in which the bucket was last used
--            y       nanoseconds of refill since `s`, including refill lost while the bucket was full, minus the
--                    tokens taken. The bucket never contains more than that, even if its burst is raised. Absent if
--                    greater than `LARGEST`
--            g       generation: changes when tokens granted earlier can no longer be credited
--            m, mt   the lowest `debt` since the mark `mt`
--            n, nt   the lowest `debt` since the mark `nt`, which is earlier than `mt`
-- KEYS[2]  the partition's epoch, a hash in the same slot:
--            run     run ID of the Redis process on which the epoch began
--            s       start of the epoch, in microseconds of TIME
--            c       1 if a caller confirmed before the start that it knows the start
--            ok      time of the latest response that a caller without an outage has confirmed receiving in time
-- ARGV     1 e   2 t   3 v   4 need: the least number of tokens to grant   5 want: the most tokens to grant
--          6 back: the number of returned tokens   7 when the oldest of the returned tokens was taken
--          8 time of the latest response that the caller received in time
--          9 start of the caller's outage, or 0; 1 if the caller has never received a response and other callers may
--            have an outage
--         10 start of the epoch that the previous response promised, or 0; a call before that start confirms the
--            promise
--         11 microseconds from a loss of state to the new epoch   12 lease TTL in microseconds
--         13 generation in which the returned tokens were taken
--         14 tokens that requests are waiting for; the rest of `want` is for later
--         15 microseconds after which the caller counts the response as late
-- Returns  {0, now, granted, debt, g}, or {1, now, microseconds until the epoch starts or the caller may call again}
--
-- **Granting.** Waiting requests are granted as many of the tokens they need as the bucket contains. A grant that
-- includes tokens for later is at most half of what the bucket contains, so that callers near the limit leave some
-- tokens for each other.
--
-- **Crediting.** Returned tokens must never make the bucket fuller than if the tokens had not been taken. If the tokens
-- had not been taken, the debt would have been lower by `back * e` until it reached zero. After that, the bucket would
-- have been full and would have lost refill that it has in fact received. The lost refill is at most the time since the
-- tokens were taken, and at most the amount by which `back * e` exceeds the lowest debt since then:
--
--   credit = min(debt, back * e, max(back * e - (now - taken), lowest debt since a mark no later than `taken`))
--
-- Then every stored minimum is lowered by the credit, so that the next return is credited as if these tokens had never
-- been taken. A change to `e` or `t`, a new epoch, or a clock that was set back starts a new generation, in which
-- earlier tokens are not credited.
--
-- **Plans.** Callers may know different versions of a plan. The newest version is used, unless no caller has used it
-- for `OUTDATED`. In that case, version numbers have started over, for example because the database was restored from
-- a backup.
--
-- Numbers are integers below 2^53, where doubles are exact. A bucket that takes longer than 104 days to fill is exact
-- to two nanoseconds.
--
-- **Expiry.** A bucket is kept for a minute plus twice the time until it is full. A full bucket is equivalent to a new
-- one unless the plan has been edited. The time beyond the refill covers a rate that was lowered since the bucket was
-- last used.
local OUTDATED = 10000000
-- If a caller received a response within the last `CONNECTED` microseconds, no caller has allowed requests from its
-- share yet. Callers do so only after their second probe, at least 830 ms after they detect an outage. Responses that
-- take up to 500 ms are still confirmed often enough.
local CONNECTED = 800000
-- A confirmation is stored only if it is newer than the stored confirmation by more than this many microseconds.
local CONFIRMED = 50000
-- 52 days in nanoseconds. Larger sums are not exact.
local LARGEST = 2 ^ 52

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local e, t, v = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local need, want = tonumber(ARGV[4]), tonumber(ARGV[5])
local back, taken_at = tonumber(ARGV[6]), tonumber(ARGV[7])
local heard, outage = tonumber(ARGV[8]), tonumber(ARGV[9])
local promised, delay, lease = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local back_generation, waiting = tonumber(ARGV[13]), tonumber(ARGV[14])
-- To use an epoch that it was promised, a caller must call within this many microseconds after the epoch's start. This
-- time is longer than the call may take to arrive.
local PROMISED = delay - 100000
-- An unconfirmed start is postponed only after this many microseconds of the delay have passed. By then, a caller that
-- received the start in time has confirmed it. If starts were postponed earlier, callers could postpone the start of
-- the epoch for each other indefinitely.
local KNOWN = math.max(50000, tonumber(ARGV[15]))
-- By this many microseconds after the start of an epoch, callers that were promised the epoch have received and
-- confirmed a response. The confirmation requires two calls, each of which may take one deadline.
local SETTLED = 50000 + 3 * tonumber(ARGV[15])

local function whole(number)
  return string.format('%.0f', number)
end

-- Converts nanoseconds of refill from `e0` per token to `e` per token: number * e / e0, computed exactly, 12 bits at a
-- time. Also returns the remainder of the division.
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

-- A new epoch begins if Redis has no epoch, if the current epoch began on another Redis process, or if the clock was
-- set back and the current epoch starts later than `delay` from now. A new epoch also begins if the caller has decided
-- requests without the counters, with two exceptions. One is that the caller was promised this epoch and calls soon
-- after its start. The other is that other callers have received responses since. A caller that has just started cannot
-- know whether other callers have decided requests without the counters. If no caller has received a response for a
-- while, the new caller assumes that other callers have done so.
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
local epoch = redis.call('HMGET', KEYS[2], 'run', 's', 'ok', 'c')
local start, ok = tonumber(epoch[2]), tonumber(epoch[3]) or 0
local returns_in_time = promised > 0 and start == promised and now - start < PROMISED
local others_connected = (ok > outage and ok <= now and now - ok < CONNECTED) or (outage == 1 and ok == 0)
local is_stranger = outage > 0 and start and start <= now and not returns_in_time and not others_connected
-- Callers that were promised the epoch are about to confirm a response. If a caller with slow responses could begin
-- another epoch before then, it could keep all other callers from recovering. Therefore, until the epoch has settled, a
-- caller that would begin another epoch is told to call again later.
local is_settling = is_stranger and epoch[4] == '1' and now - start < SETTLED
if epoch[1] ~= run or not start or start > now + delay or (is_stranger and not is_settling) then
  start = now + delay
  ok = 0
  redis.call('HSET', KEYS[2], 'run', run, 's', whole(start), 'ok', '0', 'c', '0')
elseif start > now then
  if promised == start then
    redis.call('HSET', KEYS[2], 'c', '1')
  elseif outage > 0 and epoch[4] ~= '1' and start - now < delay - KNOWN then
    -- Perhaps no caller has received a response with this start, so the start is postponed. Otherwise, a caller whose
    -- next call comes after the start would have no promise to use the epoch.
    start = now + delay
    redis.call('HSET', KEYS[2], 's', whole(start))
  end
end
if start > now then
  return {1, now, start - now}
end
if is_settling then
  return {1, now, start + SETTLED - now}
end
-- Callers with an outage are ignored: they may not receive this response in time, and would then continue without the
-- counters. If the stored response is in the future, the clock has been set back since.
local confirmed = ok <= now and ok or 0
if outage == 0 and heard > confirmed + CONFIRMED and heard <= now and heard >= start then
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
    -- The clock was set back. Refill continues from the new time.
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
      -- As many tokens are missing as before the edit. Since the time of the edit is unknown, the bucket counts as
      -- having refilled at the lower of the two rates since its last use.
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
  -- This is the first use in this epoch, at whose start every bucket was empty.
  local missing = debt + beyond
  debt = math.max(debt, t - (now - start) * 1000)
  beyond = math.max(0, missing - debt)
  gathered = (now - start) * 1000
  new_generation = true
  -- Unless the bucket is full, it is stored even if nothing is granted. Otherwise, if the rate is raised later, the
  -- bucket would count as having refilled at the higher rate since the start.
  changed = changed or at ~= nil or debt > 0
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
    -- Set a new mark if the current one is old, or if a return of this whole grant could not be credited in full under
    -- the current one.
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
  redis.call('PEXPIRE', KEYS[1], whole(math.ceil(2 * (debt + beyond) / 1000000) + 60000))
elseif in_use then
  redis.call('HSET', KEYS[1], 'vt', whole(vt))
end
return {0, now, granted, debt, g}
