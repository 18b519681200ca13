// Tests Home, Usage, a key's page and the live tail with real traffic. Compares the numbers on these pages with the
// test's own counts of responses.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

const number = (n) => n.toLocaleString("en-US");
const percent = (part, whole) => (whole ? `${(Math.round((part * 1000) / whole) / 10).toFixed(1)}%` : "–");

/** The requests that the test has sent, and their responses. */
class Log {
  requests = [];

  constructor(replicas, gateway) {
    Object.assign(this, { replicas, gateway });
  }

  /** Returns the address for the next request: the replicas take turns. */
  get base() {
    return this.replicas[this.requests.length % this.replicas.length];
  }

  record(key, endpoint, cost, status, policies, id) {
    this.requests.push({ key: key.api_key.name, endpoint, cost, allowed: status === 200, policy: policies?.[0], id });
  }

  async echo(key, times = 1) {
    for (let n = 0; n < times; n += 1) {
      const response = await fetch(`${this.base}/v1/echo`, { headers: { "x-api-key": key.key } });
      const body = await response.json();
      this.record(key, "GET /v1/echo", 1, response.status, body["violated-policies"], response.headers.get("x-request-id"));
    }
  }

  async check(key, endpoint, cost, times = 1) {
    for (let n = 0; n < times; n += 1) {
      const response = await fetch(`${this.base}/v1/check`, {
        method: "POST",
        headers: { "content-type": "application/json", authorization: `Bearer ${this.gateway}` },
        body: JSON.stringify({ key: key.key, endpoint, cost }),
      });
      const body = await response.json();
      assert.equal(response.status, 200, JSON.stringify(body));
      const denying = body.limits.filter((it) => it.remaining < cost).map((it) => it.policy);
      this.record(key, endpoint, cost, body.allowed ? 200 : 429, denying, response.headers.get("x-request-id"));
    }
  }

  /** Counts the requests that match, or adds up their cost. */
  count(fits = () => true, weigh = () => 1) {
    const sum = (of) => of.reduce((sum, it) => sum + weigh(it), 0);
    const found = this.requests.filter(fits);
    const allowed = sum(found.filter((it) => it.allowed));
    const rejected = sum(found.filter((it) => !it.allowed));
    return { allowed, rejected, total: allowed + rejected };
  }
}

export async function usage(world) {
  const my = await world.visitor();
  await my.registered("Usage");

  // Before the first request, the page says that there are no requests.
  await my.navigate("Usage").click();
  await my.heading("No requests yet").waitFor();
  await my.page.getByText("curl -i").waitFor();
  await my.inspect("usage-none");

  const { log, app, slow, counted, quota } = await traffic(my, [my.base], 1);
  await home(my, log, quota);
  await usagePage(my, log, app);
  await keyPage(my, log, counted);
  await liveTail(my, log, app, slow);
  await states(my);
  await my.context.close();
}

/** Sends more than 5,000 requests to two replicas. Home and Usage on one replica show the totals of both. */
export async function recount(world) {
  assert.ok(world.second, "this part requires a second replica");
  const my = await world.visitor();
  await my.registered("Recount");
  const { log, app, quota } = await traffic(my, [my.base, world.second], 34);
  assert.ok(log.requests.length >= 5000, `${log.requests.length}`);
  await my.page.reload();
  await home(my, log, quota);
  await usagePage(my, log, app);
  console.log(`recount: ${log.requests.length} requests to two replicas`);
  await my.context.close();
}

/** Sends 154 * `scale` - 3 requests with three keys, and waits until the server has counted them. */
async function traffic(my, replicas, scale) {
  const quota = 40 * scale;
  const wide = await my.api("POST", "/admin/plans", { name: "Wide", default_rpm: 600_000 });
  const narrow = await my.api("POST", "/admin/plans", { name: "Narrow", default_rpm: 1, burst: 5 });
  const daily = await my.api("POST", "/admin/plans", { name: "Daily", default_rpm: 600_000, daily_quota: quota, monthly_quota: 5000 });
  const create = (name, plan) => my.api("POST", "/admin/api-keys", { name, plan_id: plan.id });
  const app = await create("Mobile app", wide);
  const slow = await create("Slow lane", narrow);
  const counted = await create("Counted", daily);
  await create("Never used", wide);
  const gateway = (await my.api("POST", "/admin/service-tokens", { name: "Edge" })).token;
  const log = new Log(replicas, gateway);
  await log.echo(app, 60 * scale);
  await log.check(app, "GET /orders", 1, 25 * scale);
  await log.check(app, "POST /orders", 3, 15 * scale);
  await log.echo(slow, 14 * scale);
  await log.echo(counted, quota - 7);
  // The 7 tokens that are left are enough for two requests with a cost of 3.
  await log.check(counted, "POST /orders", 3, 4);
  await untilCounted(my, log);
  const all = log.count();
  assert.ok(all.rejected >= 8 && all.allowed > 100 * scale, JSON.stringify(all));
  return { log, app, slow, counted, quota };
}

/** Waits until the server has counted all requests, and has saved when keys and tokens were last used. */
async function untilCounted(my, log) {
  const deadline = Date.now() + 20_000;
  for (;;) {
    const stats = await my.api("GET", "/admin/stats");
    const [token] = (await my.api("GET", "/admin/service-tokens")).items;
    if (stats.requests_today === log.requests.length && stats.unused_keys === 1 && token.last_used_at) return;
    assert.ok(stats.requests_today <= log.requests.length, `${stats.requests_today} of ${log.requests.length} counted`);
    assert.ok(Date.now() < deadline, `only ${stats.requests_today} of ${log.requests.length} counted`);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

const legend = async (scope, name) => (await scope.locator(".legend", { hasText: name }).locator("strong").textContent()).trim();

async function home(my, log, quota) {
  const { page } = my;
  await my.navigate("Home").click();
  const card = (name) => page.locator(".stat").filter({ hasText: name });
  await card("Requests today").locator("strong").getByText(number(log.requests.length), { exact: true }).waitFor();
  const all = log.count();
  assert.equal(await card("Rejected today").locator("strong").textContent(), number(all.rejected));
  assert.ok((await card("Rejected today").innerText()).includes(percent(all.rejected, all.total)));
  assert.match(await card("Active keys").innerText(), /\b4\b[\s\S]*of 4, 1 never used/);
  const used = log.count((it) => it.key === "Counted" && it.allowed, (it) => it.cost).allowed;
  assert.ok((await card("Closest").innerText()).includes("Counted"), await card("Closest").innerText());
  const chart = page.locator(".chart");
  assert.equal(await legend(chart, "Allowed"), number(all.allowed));
  assert.equal(await legend(chart, "Rejected"), number(all.rejected));
  const attention = page.locator("section", { has: page.getByRole("heading", { name: "Needs attention" }) });
  assert.ok(used >= quota * 0.8, `${used}`);
  await attention.getByRole("link", { name: "Counted" }).waitFor();
  // At least 5% of the requests were rejected, so *Needs attention* also shows the rejection rate.
  assert.ok(all.rejected * 20 >= all.total, JSON.stringify(all));
  await attention.getByText(`${percent(all.rejected, all.total)} (${number(all.rejected)} of ${number(all.total)}) in the last 24 hours`).waitFor();
  const top = page.locator("section", { has: page.getByRole("heading", { name: "Top keys, last 24 hours" }) });
  for (const key of ["Mobile app", "Slow lane", "Counted"]) {
    const { total, rejected } = log.count((it) => it.key === key);
    const note = rejected ? `${number(total)} requests, ${number(rejected)} rejected` : `${number(total)} requests`;
    await top.locator("li", { hasText: key }).getByText(note, { exact: true }).waitFor();
  }
  await my.inspect("home-traffic");
  // Requests have been checked with a service token, so all four of the first steps are done.
  await page.getByText("4 of 4 done").waitFor();
}

/** Returns the cells of the table row with this name in its first cell. */
async function cells(page, name) {
  const row = page.locator("table.groups tbody tr", { has: page.locator("th", { hasText: name }) });
  await row.waitFor();
  return Object.fromEntries(await row.locator("td[data-label]").evaluateAll((them) => them.map((it) => [it.dataset.label, it.textContent])));
}

async function usagePage(my, log, app) {
  const { page } = my;
  await my.navigate("Usage").click();
  const chart = page.locator(".chart");
  await chart.waitFor();
  const strip = (name) => page.locator(".stat").filter({ has: page.locator("span", { hasText: new RegExp(`^${name}$`) }) }).locator("strong");
  const matches = async (expected, rateName = "Rejection rate") => {
    assert.equal(await strip("Allowed").textContent(), number(expected.allowed));
    assert.equal(await strip("Rejected").textContent(), number(expected.rejected));
    assert.equal(await strip(rateName).textContent(), percent(expected.rejected, expected.total));
    assert.equal(await legend(chart, "Allowed"), number(expected.allowed));
    assert.equal(await legend(chart, "Rejected"), number(expected.rejected));
  };
  await matches(log.count());
  await my.inspect("usage");
  for (const key of ["Mobile app", "Slow lane", "Counted"]) {
    const expected = log.count((it) => it.key === key);
    const row = await cells(page, key);
    assert.deepEqual(
      [row.Allowed, row.Rejected, row["Rejection rate"]],
      [number(expected.allowed), number(expected.rejected), percent(expected.rejected, expected.total)],
      key,
    );
  }

  // Shows usage by endpoint and by policy.
  await page.getByRole("link", { name: "By endpoint" }).click();
  for (const endpoint of ["GET /v1/echo", "GET /orders", "POST /orders"]) {
    const expected = log.count((it) => it.endpoint === endpoint);
    const row = await cells(page, endpoint);
    assert.deepEqual([row.Allowed, row.Rejected], [number(expected.allowed), number(expected.rejected)], endpoint);
  }
  assert.match(page.url(), /group=endpoint/);
  await my.inspect("usage-endpoints");
  await page.getByRole("link", { name: "By policy" }).click();
  for (const [policy, name] of [["rpm", "Rate limit"], ["daily", "Daily quota"]]) {
    const expected = log.count((it) => !it.allowed && it.policy === policy);
    assert.equal((await cells(page, name)).Rejected, number(expected.rejected), policy);
  }
  await my.inspect("usage-policies");

  // Shows cost instead of requests.
  await page.locator("#count").selectOption({ label: "Cost" });
  const cost = (it) => it.cost;
  await page.waitForFunction(() => location.search.includes("count=cost"));
  await chart.getByText(/^Cost per hour/).waitFor();
  await matches(log.count(undefined, cost));
  await page.getByRole("link", { name: "By key" }).click();
  const counted = log.count((it) => it.key === "Counted", cost);
  const row = await cells(page, "Counted");
  assert.deepEqual([row.Allowed, row.Rejected], [number(counted.allowed), number(counted.rejected)]);
  await page.locator("#count").selectOption({ label: "Requests" });
  await matches(log.count());

  // A click on a row filters the page, and the URL contains all choices.
  await page.locator("table.groups").getByRole("link", { name: "Mobile app" }).click();
  await page.waitForFunction((id) => location.search.includes(id), app.api_key.id);
  await page.waitForFunction(
    ([name, text]) => [...document.querySelectorAll(".stat")].some((it) => it.textContent.startsWith(name) && it.querySelector("strong").textContent === text),
    ["Allowed", number(log.count((it) => it.key === "Mobile app").allowed)],
  );
  await matches(log.count((it) => it.key === "Mobile app"));
  await page.locator("table.groups").getByRole("link", { name: "GET /orders" }).click();
  await page.getByText("only. Show all endpoints").waitFor();
  const orders = log.count((it) => it.key === "Mobile app" && it.endpoint === "GET /orders");
  await page.waitForFunction((text) => document.querySelector(".legend strong").textContent === text, number(orders.allowed));
  await matches(orders);
  await page.reload();
  await page.waitForFunction((text) => document.querySelector(".legend strong")?.textContent === text, number(orders.allowed));
  await page.goto(`${my.base}/console/usage`);
  await chart.waitFor();

  // Uses only the keyboard. The last bar is the current hour. If a new hour has just started, this bar contains only
  // some of the requests.
  await page.locator(".chart-plot").focus();
  await page.keyboard.press("End");
  const readout = () => page.locator(".chart-plot").getAttribute("aria-valuetext");
  assert.match(await readout(), /^\w{3} \d+ \w{3}, \d\d:00–\d\d:00 UTC · [\d,]+ allowed · [\d,]+ rejected( \(\d+\.\d%\))? so far$/);
  await page.keyboard.press("Home");
  assert.match(await readout(), /0 allowed · 0 rejected$/);
  await my.inspect("usage-selected");
  // A series can be hidden, and the URL contains this choice.
  await page.locator(".legend.rejected").focus();
  await page.keyboard.press("Space");
  await page.waitForFunction(() => location.search.includes("hide=rejected"));
  assert.equal(await page.locator("rect.rejected").count(), 0);
  await page.reload();
  await chart.waitFor();
  assert.equal(await page.locator(".legend.rejected").getAttribute("aria-pressed"), "false");
  await page.locator(".legend.rejected").click();
  assert.ok((await page.locator("rect.rejected").count()) > 0);

  // The table has the same numbers.
  await my.button("Table").click();
  const sums = await page.locator(".chart-table tbody tr").evaluateAll((rows) =>
    rows.reduce(
      (sums, row) => {
        const [allowed, rejected] = [...row.querySelectorAll("td")].map((it) => Number(it.textContent.replace(/\D/g, "")));
        return [sums[0] + allowed, sums[1] + rejected];
      },
      [0, 0],
    ));
  const all = log.count();
  assert.deepEqual(sums, [all.allowed, all.rejected]);
  await my.inspect("usage-table");
  await my.button("Table").click();

  // Shows days, and zooms into one day.
  await page.locator("#range").selectOption({ label: "Last 7 days" });
  await chart.getByText(/^Requests per day/).waitFor();
  await matches(all);
  assert.equal(await page.locator(".chart-plot rect.allowed").count(), 1, "days without requests have no bar");
  await my.inspect("usage-week");
  await page.locator(".chart-plot").focus();
  await page.keyboard.press("End");
  await page.keyboard.press("Enter");
  await chart.getByText(/^Requests per hour/).waitFor();
  assert.match(page.url(), /range=custom&from=\d{4}-\d\d-\d\d&to=\d{4}-\d\d-\d\d/);
  await page.getByLabel("First day").waitFor();
  await my.inspect("usage-custom");
  await page.goBack();
  await chart.getByText(/^Requests per day/).waitFor();

  // The export has the same numbers.
  const download = page.waitForEvent("download");
  await my.button("Export CSV").click();
  const lines = readFileSync(await (await download).path(), "utf8").trim().split("\r\n");
  assert.equal(lines[0], "start,allowed,rejected,allowed_cost,rejected_cost");
  const column = (at) => lines.slice(1).reduce((sum, line) => sum + Number(line.split(",")[at]), 0);
  const costs = log.count(undefined, cost);
  assert.deepEqual([1, 2, 3, 4].map(column), [all.allowed, all.rejected, costs.allowed, costs.rejected]);
}

async function keyPage(my, log, counted) {
  const { page } = my;
  await page.goto(`${my.base}/console/api-keys/${counted.api_key.id}`);
  await my.heading("Counted").waitFor();
  const used = log.count((it) => it.key === "Counted" && it.allowed, (it) => it.cost).allowed;
  const meter = (name) => page.locator(".meter").filter({ hasText: name }).locator("strong");
  await meter("Daily quota").getByText(`${used} of 40 used`).waitFor();
  await meter("Monthly quota").getByText(`${number(used)} of 5,000 used`).waitFor();
  const chart = page.locator(".chart");
  await chart.waitFor();
  const own = log.count((it) => it.key === "Counted");
  assert.equal(await legend(chart, "Allowed"), number(own.allowed));
  assert.equal(await legend(chart, "Rejected"), number(own.rejected));
  const rows = page.locator("table.decisions tbody tr");
  await rows.nth(9).waitFor();
  assert.equal(await rows.count(), 10);
  const latest = log.requests.filter((it) => it.key === "Counted").slice(-10).reverse();
  assert.deepEqual(await rows.locator("td[data-label='Request ID']").allTextContents(), latest.map((it) => it.id));
  await my.inspect("key-usage");

  // Shows the burn-down of the quotas.
  await page.getByRole("link", { name: "View usage" }).click();
  const burn = page.locator(".burn-down").filter({ hasText: "Daily quota" });
  await burn.getByText(`${used} of 40 used`).waitFor();
  await page.locator(".burn-down").filter({ hasText: "Monthly quota" }).getByText(`${number(used)} of 5,000 used`).waitFor();
  await my.inspect("usage-burn-down");
}

async function liveTail(my, log, app, slow) {
  const { page } = my;
  await page.goto(`${my.base}/console/usage`);
  await my.button("Open live tail").click();
  const drawer = page.locator("dialog[open]");
  const rows = drawer.locator("tbody tr");
  await rows.first().waitFor();
  const before = await rows.count();
  const started = Date.now();
  await log.echo(app, 3);
  const id = log.requests.at(-1).id;
  await drawer.getByText(id).waitFor();
  console.log(`live tail: shown after ${Date.now() - started} ms`);
  assert.ok(Date.now() - started < 30_000);
  assert.ok((await rows.count()) >= Math.min(before + 3, 500));
  await my.inspect("live-tail");
  // Scrolling pauses the list.
  await drawer.locator(".tail-list").evaluate((it) => it.scrollTo(0, 400));
  await drawer.getByText("Paused until you scroll to the top").waitFor();
  await log.echo(app, 2);
  await drawer.getByRole("button", { name: "Show 2 new" }).waitFor();
  assert.equal(await drawer.getByText(log.requests.at(-1).id).count(), 0);
  await drawer.getByRole("button", { name: "Show 2 new" }).click();
  await drawer.getByText(log.requests.at(-1).id).waitFor();
  // Finds out why a request was denied.
  const denied = log.requests.findLast((it) => it.key === "Slow lane" && !it.allowed);
  await drawer.getByLabel("Request ID").fill(denied.id);
  await drawer.getByLabel("Request ID").press("Tab");
  await page.waitForFunction(() => document.querySelectorAll("dialog[open] tbody tr").length === 1);
  assert.match(await rows.innerText(), /Slow lane[\s\S]*Rejected[\s\S]*Rate limit/);
  await drawer.getByLabel("Request ID").fill("");
  await drawer.getByLabel("Request ID").press("Tab");
  await drawer.getByLabel("Outcome").selectOption("rejected");
  await page.waitForFunction((count) => document.querySelectorAll("dialog[open] tbody tr").length === count, log.count().rejected);
  // While the server is unreachable, the list says that it is reconnecting. Afterward, the list is live again.
  const calls = /\/admin\/decisions/;
  await page.route(calls, (route) => route.abort());
  await drawer.getByText("Reconnecting…").waitFor();
  await my.inspect("live-tail-reconnecting");
  await page.unroute(calls);
  await drawer.getByText("Live", { exact: true }).waitFor();
  await drawer.getByRole("button", { name: "Close" }).click();
  await drawer.waitFor({ state: "detached" });
}

/** Tests the page if no requests match the filters, and if the data cannot be refreshed. */
async function states(my) {
  const { page } = my;
  await page.goto(`${my.base}/console/usage?endpoint=DELETE%20%2Fnothing`);
  await my.heading("No matching requests").waitFor();
  await my.inspect("usage-no-match");
  await page.getByRole("link", { name: "Clear filters" }).click();
  await page.locator(".chart").waitFor();
  await page.clock.install();
  await page.reload();
  await page.locator(".chart").waitFor();
  const calls = /\/admin\/usage/;
  await page.route(calls, (route) => route.abort());
  await page.clock.fastForward("00:35");
  await page.getByText("Couldn't refresh.").waitFor();
  assert.equal(await page.locator(".chart").count(), 1, "the data stays on the page");
  await my.inspect("usage-stale");
  await page.unroute(calls);
  await my.button("Retry").click();
  await page.getByText("Couldn't refresh.").waitFor({ state: "detached" });
}
