// Takes the screenshots for the README and the landing page: node journey.mjs CHROMIUM ADDRESS ../pictures pictures

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";

export async function pictures(world) {
  const my = await world.visitor();
  const { page, base } = my;
  my.email = "ada@northwind.example";
  await my.registered("Northwind Maps");
  const plans = [];
  for (const plan of [
    { name: "Free", default_rpm: 60, burst: 10, daily_quota: 5000 },
    { name: "Starter", default_rpm: 600, burst: 50, monthly_quota: 1_000_000 },
    { name: "Business", default_rpm: 6000, burst: 400, monthly_quota: 20_000_000, strict: true },
  ]) {
    plans.push((await my.api("POST", "/admin/plans", plan)).id);
  }
  const year = new Date().getFullYear() + 1;
  const keys = [];
  for (const [name, plan, more] of [
    ["Press office", 0, { expires_at: `${year}-03-01T00:00:00Z` }],
    ["Internal dashboard", 2, {}],
    ["Partner: Contoso", 2, { rpm_override: 12000 }],
    ["Hackathon", 0, {}],
    ["Delivery trackers", 2, {}],
    ["Web shop", 1, {}],
    ["Mobile app", 1, {}],
  ]) {
    const key = await my.api("POST", "/admin/api-keys", { name, plan_id: plans[plan], ...more });
    if (!/Press|Hackathon/.test(name)) await fetch(`${base}/v1/echo`, { headers: { "x-api-key": key.key } });
    keys.push(key);
  }
  await my.api("PATCH", `/admin/api-keys/${keys[3].api_key.id}`, { is_active: false });
  while (!(await my.api("GET", `/admin/api-keys/${keys[6].api_key.id}`)).last_used_at) await page.waitForTimeout(200);

  const take = async (name, theme) => {
    await page.emulateMedia({ colorScheme: theme, reducedMotion: "reduce" });
    await page.waitForTimeout(300);
    const session = await my.context.newCDPSession(page);
    const { data } = await session.send("Page.captureScreenshot", { format: "webp", quality: 82 });
    writeFileSync(join(world.shots, `${name}.webp`), Buffer.from(data, "base64"));
  };
  await page.setViewportSize({ width: 1180, height: 730 });
  await my.navigate("API keys").click();
  await page.getByRole("row").nth(7).waitFor();
  await take("keys", "light");

  // Shows a day of traffic. The server has just started, so the numbers in its responses are replaced.
  await page.route((url) => url.pathname === "/admin/usage", async (route) => {
    const usage = await (await route.fetch()).json();
    const first = Date.parse(usage.from);
    const start = (hour) => new Date(first + hour * 3_600_000).toISOString();
    const shape = (hour) => 1 + Math.sin(((new Date(start(hour)).getUTCHours() - 8) / 24) * 2 * Math.PI);
    const counts = (allowed, rejected) => ({ allowed, rejected, allowed_cost: allowed, rejected_cost: rejected });
    const names = keys.filter((key) => /Mobile|Web|Delivery|dashboard/.test(key.api_key.name));
    const weights = [1, 0.55, 0.3, 0.15];
    const other = { key_id: null, plan_id: null, endpoint: null, policy: null, other: false };
    const buckets = [];
    const total = (all) => all.reduce((sum, it) => counts(sum.allowed + it.allowed, sum.rejected + it.rejected), counts(0, 0));
    for (let hour = 0; hour < 24; hour += 1) {
      for (const [at, key] of names.entries()) {
        const allowed = Math.round(weights[at] * (300 + 900 * shape(hour) + 60 * Math.sin(7 * hour + at)));
        const rejected = at === 1 && shape(hour) > 1.6 ? Math.round(allowed * 0.22) : Math.round(allowed * 0.006);
        buckets.push({ ...other, start: start(hour), key_id: key.api_key.id, ...counts(allowed, rejected) });
      }
    }
    const by = (fits) => buckets.filter(fits);
    if (usage.group_by === "key") {
      usage.buckets = buckets;
      usage.groups = names.map((key) => ({ ...other, key_id: key.api_key.id, name: key.api_key.name, last_seen_at: usage.to, ...total(by((it) => it.key_id === key.api_key.id)) }));
    } else {
      usage.buckets = Array.from({ length: 24 }, (_, hour) => ({ ...other, start: start(hour), ...total(by((it) => it.start === start(hour))) }));
    }
    usage.total = total(buckets);
    // The console requests the previous period by day. That period has less traffic.
    if (usage.bucket === "day") usage.total = counts(Math.round(usage.total.allowed * 0.93), Math.round(usage.total.rejected * 0.62));
    return route.fulfill({ json: usage });
  });
  await page.setViewportSize({ width: 1180, height: 770 });
  await my.navigate("Usage").click();
  await page.getByRole("row", { name: /Mobile app/ }).waitFor();
  await take("usage-light", "light");
  await take("usage-dark", "dark");
  await my.navigate("API keys").click();
  await page.getByRole("row").nth(7).waitFor();

  await page.setViewportSize({ width: 1180, height: 800 });
  await my.button("Create key").click();
  await my.field("Name").fill("Route planner");
  await page.locator("#key_plan").selectOption({ label: "Free (60/min)" });
  await my.button("Create key").click();
  await my.button("Send until 429").waitFor();
  await my.button("Send until 429").click();
  await my.status(429);
  await page.waitForTimeout(7000);
  await my.button("Send until 429").click();
  await page.waitForTimeout(2500);
  await my.button("Send until 429").click();
  await page.waitForTimeout(4000);
  await my.button("Send 1").click();
  await page.waitForTimeout(300);
  await page.locator("dialog[open] .plot").scrollIntoViewIfNeeded();
  // No complete key is published, not even a key from a deleted database.
  await page.evaluate(() => {
    const texts = document.createTreeWalker(document.querySelector("dialog[open]"), NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const text = texts.currentNode;
      text.data = text.data.replace(/(qk_\w{8})\w+/, "$1…").replace(/localhost:\d+/, "localhost:8080");
    }
  });
  assert.ok(!/qk_\w{9}/.test(await page.locator("body").innerText()), "a complete key is visible");
  await take("try-it-light", "light");
  await take("try-it-dark", "dark");
  await my.context.close();
}
