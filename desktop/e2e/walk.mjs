// Takes screenshots of every page and form for review: node journey.mjs CHROMIUM ADDRESS FOLDER walk
//
// The screenshots show the pages with and without data, with a slow network, and with a failing or unreachable server.
// Most are taken at six widths, in light and dark mode. Content that is wider than the window is reported.

import { join } from "node:path";
import { isBilling, states } from "./billing.mjs";

const widths = [320, 390, 768, 1024, 1280, 1920];
const themes = ["light", "dark"];

export async function walk(world) {
  const my = await world.visitor();
  const { page, base } = my;
  let count = 0;
  /** Takes screenshots of the current view, by default at every width and in every theme. */
  const take = async (name, some = widths, shades = themes) => {
    for (const width of some) {
      await page.setViewportSize({ width, height: width < 700 ? 800 : 900 });
      for (const theme of shades) {
        await page.emulateMedia({ colorScheme: theme, reducedMotion: "reduce" });
        await page.evaluate(() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve))));
        await my.fits(`${name} ${theme} ${width}`);
        if (world.shots) await page.screenshot({ path: join(world.shots, `walk-${name}-${width}-${theme}.png`), fullPage: true });
        count += 1;
      }
    }
    await page.setViewportSize({ width: 1280, height: 900 });
  };
  const loaded = () => page.waitForFunction(() => document.querySelector("main h1") && !document.querySelector(".skeleton, .async.pending"));
  const visit = async (path) => {
    await page.goto(`${base}/console${path}`);
    await loaded();
  };

  await page.goto(`${base}/console/sign-in`);
  await my.heading("Sign in").waitFor();
  await take("sign-in");
  await page.goto(`${base}/console/register`);
  await my.heading("Create an account").waitFor();
  await my.button("Create account").click();
  await take("register-invalid");

  // Pages without data.
  await my.registered("Northwind Maps");
  const pages = { home: "", usage: "/usage", audit: "/audit", plans: "/plans", keys: "/api-keys", tokens: "/service-tokens", webhooks: "/webhooks", alerts: "/alerts", billing: "/billing", settings: "/settings" };
  for (const [name, path] of Object.entries(pages)) {
    await visit(path);
    await take(`empty-${name}`);
  }

  // Pages with data.
  const plans = [];
  for (const plan of [
    { name: "Free", default_rpm: 60, burst: 10, daily_quota: 20 },
    { name: "Starter", default_rpm: 600, burst: 50, monthly_quota: 1_000_000 },
    { name: "Business with a long name that wraps", default_rpm: 60_000, burst: 4000, monthly_quota: 20_000_000, strict: true, billing: "paid" },
    { name: "Trial", default_rpm: 600, daily_quota: 10 },
  ]) {
    plans.push((await my.api("POST", "/admin/plans", plan)).id);
  }
  const keys = [];
  for (const [name, plan, more] of [
    ["Press office", 0, { expires_at: "2199-03-01T00:00:00Z" }],
    ["Internal dashboard", 2, {}],
    ["Partner: Contoso International Holdings", 1, { rpm_override: 12_000 }],
    ["Mobile app", 0, { external_id: "crm-4711", metadata: { region: "eu", tier: "trial" } }],
    ["Nightly import", 3, {}],
  ]) {
    keys.push(await my.api("POST", "/admin/api-keys", { name, plan_id: plans[plan], ...more }));
  }
  await my.api("PATCH", `/admin/api-keys/${keys[0].api_key.id}`, { is_active: false });
  await my.api("POST", "/admin/service-tokens", { name: "Edge gateway" });
  for (let at = 0; at < 30; at += 1) await fetch(`${base}/v1/echo`, { headers: { "x-api-key": keys[3].key } });
  for (let at = 0; at < 10; at += 1) await fetch(`${base}/v1/echo`, { headers: { "x-api-key": keys[4].key } });
  for (let at = 0; at < 12; at += 1) await fetch(`${base}/v1/echo`, { headers: { "x-api-key": keys[2].key } });
  while (!(await my.api("GET", "/admin/usage")).total.allowed) await page.waitForTimeout(200);
  const hook = (await my.api("POST", "/admin/webhooks", { name: "Pager", url: "http://127.0.0.1:9/quota" })).webhook.id;
  await my.api("POST", `/admin/webhooks/${hook}/test`);
  while ((await my.api("GET", "/admin/alerts")).total < 3) await page.waitForTimeout(200);
  while (!(await my.api("GET", `/admin/webhooks/${hook}/deliveries`)).items.every((it) => it.error)) await page.waitForTimeout(200);
  const key = `/api-keys/${keys[3].api_key.id}`;
  const webhook = `/webhooks/${hook}`;
  for (const [name, path] of Object.entries({ ...pages, key, webhook, "usage-table": "/usage?range=7d&view=table", "usage-key": `/usage?key_id=${keys[3].api_key.id}`, "not-found": "/nowhere" })) {
    await visit(path);
    await take(name);
  }

  // Forms and dialogs.
  const dialog = page.locator("dialog[open]");
  const form = async (name, path, open) => {
    await visit(path);
    await open();
    await dialog.waitFor();
    await take(name);
  };
  await form("plan-new", "/plans", () => my.button("Create plan").click());
  await form("plan-invalid", "/plans", async () => {
    await my.button("Create plan").click();
    await dialog.waitFor();
    await my.button("Create plan").click();
  });
  await form("plan-edit", "/plans", async () => {
    await my.button("Edit Business with a long name that wraps").click();
  });
  await form("plan-in-use", "/plans", () => my.choose("Free", "Delete"));
  await form("key-new", "/api-keys", () => my.button("Create key").click());
  await form("key-edit", key, () => my.button("Edit").click());
  await form("key-rotate", key, () => my.button("Rotate").click());
  await form("key-deactivate", key, () => my.button("Deactivate").click());
  await form("key-delete", key, () => my.button("Delete").click());
  await form("keys-bulk", "/api-keys", async () => {
    await my.field("Select all on this page").check();
    await my.button("Delete").click();
  });
  await form("keys-move", "/api-keys", async () => {
    await my.field("Select all on this page").check();
    await my.button("Move").click();
  });
  await form("token-new", "/service-tokens", () => my.button("Create token").click());
  await form("token-delete", "/service-tokens", () => my.choose("Edge gateway", "Delete"));
  await form("webhook-new", "/webhooks", () => my.button("Create webhook").click());
  await form("webhook-edit", webhook, () => my.button("Edit").click());
  await form("webhook-rotate", webhook, () => my.button("Rotate secret").click());
  await form("webhook-disable", webhook, () => my.button("Disable").click());
  await form("webhook-delete", webhook, () => my.button("Delete").click());
  await form("delivery", webhook, () => page.locator("table.deliveries button").first().click());
  await form("alerts-email", "/alerts", () => my.button("Edit email notifications").click());
  await form("live-tail", "/usage?live=1", async () => {});
  await form("palette", "", () => page.getByRole("button", { name: "Search or jump to…" }).click());
  await form("shortcuts", "", async () => page.keyboard.press("?"));
  await visit("/api-keys?new=1");
  await dialog.waitFor();
  await my.field("Name").fill("Route planner");
  await page.locator("#key_plan").selectOption({ label: "Free (60/min)" });
  await my.button("Create key").click();
  await my.button("Send until 429").click();
  await my.status(429);
  await take("secret");
  await page.keyboard.press("Escape");
  await take("secret-unsaved");
  await my.button("Close without saving").click();

  // Billing in every state.
  let response;
  await page.route(isBilling, (route) => route.fulfill({ json: response }));
  for (const [name, [state]] of Object.entries(states)) {
    response = state;
    await visit("/billing");
    await take(`billing-${name}`);
  }
  response = states.free[0];
  await page.goto(`${base}/console/billing?checkout=success`);
  await my.heading("Confirming payment…").waitFor();
  await take("billing-confirming");
  await page.unroute(isBilling);

  // A slow network: takes screenshots of the pages while they are loading.
  const calls = (url) => /^\/(admin|billing|auth\/(me|sessions))/.test(url.pathname);
  const [two, one] = [[390, 1280], ["light"]];
  for (const [name, path] of Object.entries({ ...pages, key, webhook })) {
    await visit("/nowhere");
    await page.route(calls, () => {});
    await page.evaluate((path) => {
      history.pushState(null, "", `/console${path}`);
      dispatchEvent(new PopStateEvent("popstate"));
    }, path);
    await page.waitForTimeout(500);
    await take(`slow-${name}`, two, one);
    await page.unroute(calls);
  }

  // A failing server, and an unreachable server.
  world.expected = /status of 500/;
  const fail = (route) =>
    route.fulfill({
      status: 500,
      contentType: "application/problem+json",
      body: JSON.stringify({ type: `${base}/problems/internal`, title: "Internal error", status: 500, detail: "Something went wrong. Quote the request ID when reporting it.", request_id: "019ab4e1-7c00-7000-8000-00000000abcd" }),
    });
  for (const [how, handle] of [["failing", fail], ["offline", (route) => route.abort()]]) {
    for (const [name, path] of Object.entries({ ...pages, key, webhook })) {
      await visit("/nowhere");
      await page.route(calls, handle);
      await page.evaluate((path) => {
        history.pushState(null, "", `/console${path}`);
        dispatchEvent(new PopStateEvent("popstate"));
      }, path);
      await page.waitForTimeout(500);
      await take(`${how}-${name}`, two, one);
      await page.unroute(calls);
    }
    await visit("/plans");
    await page.route(calls, handle);
    await my.button("Create plan").click();
    await dialog.locator("#name").fill("Gold");
    await my.button("Create plan").click();
    await page.waitForTimeout(500);
    await take(`${how}-form`, two, themes);
    await page.unroute(calls);
  }
  world.expected = undefined;
  console.log(`${count} screenshots`);
  await my.context.close();
}
