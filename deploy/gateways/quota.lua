-- Checks a request with Quota. haproxy.cfg calls this script with `http-request lua.quota`, and the `quota` backend in
-- that file adds the service token, verifies Quota's certificate and keeps connections open.
local URL = "http://127.0.0.1:8404/v1/forward-auth"
local LIMITS = {
  "x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "ratelimit-policy", "ratelimit", "x-quota-degraded",
}
local TITLES = { [401] = "Unauthorized", [402] = "Payment Required", [429] = "Too Many Requests", [503] = "Service Unavailable" }

core.register_action("quota", { "http-req" }, function(txn)
  local consumer = txn.http:req_get_headers()
  -- The endpoint to record in usage.
  local headers = { ["x-forwarded-method"] = { txn.sf:method() }, ["x-forwarded-uri"] = { txn.sf:path() } }
  -- Copies every value, so that Quota can reject a request with two keys.
  for _, name in ipairs({ "x-api-key", "authorization" }) do
    local values = consumer[name]
    if values then
      headers[name] = {}
      for n = 0, #values do table.insert(headers[name], values[n]) end
    end
  end

  local answer = core.httpclient():get{ url = URL, headers = headers, timeout = 2000 }
  local function field(name)
    local values = answer and answer.headers and answer.headers[name]
    -- Ignores a header with several values, because Quota never sends one.
    return values and not values[1] and values[0] or nil
  end
  local decision = field("x-quota-decision")
  if answer and answer.status == 200 and decision == "allowed" then
    -- If this script fails, HAProxy continues to process the request. Therefore, haproxy.cfg denies requests for which
    -- this variable is not set.
    txn:set_var("txn.quota_allowed", true)
    for _, name in ipairs(LIMITS) do
      if field(name) then txn:set_var("txn." .. name:gsub("-", "_"), field(name)) end
    end
    return
  end

  local status = 503
  if decision and decision ~= "allowed" and TITLES[answer.status] then status = answer.status end
  local reply = txn:reply{ status = status, body = ('{"title":"%s","status":%d}'):format(TITLES[status], status) }
  reply:add_header("content-type", "application/problem+json")
  reply:add_header("cache-control", "no-store")
  for _, name in ipairs({ "retry-after", "www-authenticate", table.unpack(LIMITS) }) do
    if field(name) then reply:add_header(name, field(name)) end
  end
  txn:done(reply)
end)
