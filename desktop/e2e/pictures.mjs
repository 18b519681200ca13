// Takes the pictures for the README: node journey.mjs CHROMIUM ADDRESS ../pictures pictures

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
  await page.setViewportSize({ width: 1180, height: 660 });
  await my.navigate("API keys").click();
  await page.getByRole("row").nth(7).waitFor();
  await take("keys", "light");

  await page.setViewportSize({ width: 1180, height: 730 });
  await my.button("New key").click();
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
  // No complete key is published, not even one of a deleted database.
  await page.evaluate(() => {
    const texts = document.createTreeWalker(document.querySelector("dialog[open]"), NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const text = texts.currentNode;
      text.data = text.data.replace(/(qk_\w{8})\w+/, "$1…").replace(/localhost:\d+/, "localhost:8080");
    }
  });
  assert.ok(!/qk_\w{9}/.test(await page.locator("body").innerText()), "a complete key is visible");
  await take("try-it", "dark");
  await my.context.close();
}
