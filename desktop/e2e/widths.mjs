// Tests that no page scrolls sideways at any width from 320 to 1920 pixels, and that cards and fields are evenly
// spaced.

import assert from "node:assert/strict";
import { active, isBilling } from "./billing.mjs";

/** The tested widths: every 5 pixels, and the pixels at and next to the style sheet's breakpoints. */
const steps = Array.from({ length: 321 }, (_, at) => 320 + 5 * at);
const breakpoints = [30, 56, 73, 80].flatMap((rem) => [16 * rem - 1, 16 * rem, 16 * rem + 1]);
const all = [...new Set([...steps, ...breakpoints])].sort((a, b) => a - b);

/** Returns the cards and tables that are less than 16 pixels above the next card or table. Runs in the page. */
function tooClose() {
  const boxes = [...document.querySelectorAll("main :is(.card, .empty, table.groups)")].map((it) => [it, it.getBoundingClientRect()]);
  const found = [];
  for (const [one, a] of boxes) {
    for (const [other, b] of boxes) {
      const isBelow = b.top >= a.top && b.left < a.right && b.right > a.left && one !== other && !one.contains(other);
      if (isBelow && b.top - a.bottom < 15.5) found.push([one.textContent.slice(0, 30), other.textContent.slice(0, 30), b.top - a.bottom]);
    }
  }
  return found;
}

/** Returns the fields of a dialog that are not 16 pixels above the next field. Runs in the page. */
function uneven() {
  const fields = [...document.querySelectorAll("dialog[open] .field")].map((it) => [it.textContent, it.getBoundingClientRect()]);
  const next = (a) => fields.map(([, b]) => b).filter((b) => b.top > a.top && b.left < a.right && b.right > a.left).sort((b, c) => b.top - c.top)[0];
  // If two fields are side by side, the distance is measured from the lower of their bottom edges.
  const bottom = (a) => Math.max(...fields.map(([, b]) => b).filter((b) => b.top === a.top).map((b) => b.bottom));
  return fields.filter(([, a]) => next(a) && Math.abs(next(a).top - bottom(a) - 16) > 0.5).map(([text, a]) => [text, next(a).top - bottom(a)]);
}

export async function widths(world) {
  const my = await world.visitor();
  const { page, base } = my;
  await my.registered("Northwind Maps");
  const plan = await my.api("POST", "/admin/plans", {
    name: "Business with a long name",
    default_rpm: 60_000_000,
    daily_quota: 999_999_999_999,
    monthly_quota: 999_999_999_999_999,
    strict: true,
  });
  const names = ["Mobile app", "Partner: Contoso International", "Internal dashboard"];
  const created = [];
  const keys = [];
  for (const name of names) {
    created.push(await my.api("POST", "/admin/api-keys", { name, plan_id: plan.id, expires_at: "2199-01-01T00:00:00Z" }));
    keys.push(created.at(-1).api_key);
    await my.api("POST", "/admin/service-tokens", { name });
  }
  const hook = await my.api("POST", "/admin/webhooks", { name: names[1], url: `https://hooks.example.com/${"quota-alerts-".repeat(12)}` });
  // Deliveries to this webhook fail, so that its page shows errors. The server must allow webhooks to this machine.
  const failing = (await my.api("POST", "/admin/webhooks", { name: names[0], url: "http://127.0.0.1:9/quota" })).webhook.id;
  await my.api("POST", `/admin/webhooks/${failing}/test`);
  while (!(await my.api("GET", `/admin/webhooks/${failing}/deliveries`)).items[0].error) await page.waitForTimeout(200);
  for (const { key } of created) await fetch(`${base}/v1/echo`, { headers: { "x-api-key": key } });
  while (!(await my.api("GET", "/admin/usage")).total.allowed) await page.waitForTimeout(200);
  await my.api("PATCH", `/admin/api-keys/${keys[0].id}`, { is_active: false });
  await page.route(isBilling, (route) => route.fulfill({ json: { ...active(), access: "past_due", access_ends_at: "2199-01-01T00:00:00Z" } }));
  for (const path of ["", "/usage", "/usage?range=30d&view=table", `/usage?key_id=${keys[0].id}`, "/plans", "/api-keys", `/api-keys/${keys[0].id}`, "/service-tokens", "/webhooks", `/webhooks/${hook.webhook.id}`, `/webhooks/${failing}`, "/alerts", "/audit", "/billing", "/settings"]) {
    await page.goto(`${base}/console${path}`);
    await page.locator("main h1").waitFor();
    await page.waitForFunction(() => !document.querySelector(".skeleton"));
    for (const width of all) {
      await page.setViewportSize({ width, height: 800 });
      await my.fits(`/console${path} at ${width}`);
      if (width % 320 === 0) assert.deepEqual(await page.evaluate(tooClose), [], `/console${path} at ${width}`);
    }
  }
  // On phones, filters leave most of the screen to the list.
  await page.setViewportSize({ width: 390, height: 844 });
  for (const [path, label, value] of [["/audit", "Resource", "plan"], ["/api-keys", "Status", "active"]]) {
    await page.goto(`${base}/console${path}`);
    await my.button("Filters").waitFor();
    const filters = await page.locator(".filters").boundingBox();
    assert.ok(filters.height < 844 / 10 && filters.y + filters.height < 844 / 2, `${path}: ${JSON.stringify(filters)}`);
    const filter = page.getByLabel(label, { exact: true });
    assert.ok(!(await filter.isVisible()), path);
    await my.button("Filters").click();
    await filter.selectOption(value);
    await my.fits(`filters of ${path}`);
    await my.inspect(`filters${path.replace("/", "-")}`);
    await page.setViewportSize({ width: 390, height: 844 });
    await my.button("Filters (1)").click();
    await filter.waitFor({ state: "hidden" });
  }
  // The first card on a key's page contains the limits. The buttons that stop the key from working come last.
  await page.goto(`${base}/console/api-keys/${keys[1].id}`);
  await my.button("Delete").waitFor();
  const cards = await page.locator("main .card h2").allTextContents();
  assert.deepEqual(cards.slice(0, 2), ["Limits", "Details"]);
  const actions = page.locator("[aria-labelledby='key-details'] .actions button");
  assert.deepEqual(await actions.allTextContents(), ["Edit", "Rotate", "Deactivate", "Delete"]);
  // Home's cards have the same height, and every row has the same number of cards.
  await page.goto(`${base}/console`);
  await page.locator(".stat").nth(3).waitFor();
  for (const width of all) {
    await page.setViewportSize({ width, height: 800 });
    const boxes = await page.locator(".stat").evaluateAll((all) => all.map((it) => it.getBoundingClientRect()).map(({ top, width, height }) => [top, width, height]));
    const inRow = (top) => boxes.filter(([other]) => other === top).length;
    assert.ok(boxes.every(([top]) => inRow(top) === inRow(boxes[0][0])), `cards at ${width}: ${JSON.stringify(boxes)}`);
    assert.ok(boxes.every(([, , height]) => Math.abs(height - boxes[0][2]) < 1), `cards at ${width}: ${JSON.stringify(boxes)}`);
  }
  await page.goto(`${base}/console/api-keys`);
  await page.setViewportSize({ width: 390, height: 844 });
  await my.button("Create key").click();
  await my.field("Expires (optional)").waitFor();
  for (const width of all) {
    await page.setViewportSize({ width, height: 800 });
    await my.fits(`new key at ${width}`);
    if (width % 320 === 0) assert.deepEqual(await page.evaluate(uneven), [], `new key at ${width}`);
  }
  await my.context.close();
}
