// Tests accounts in several windows, the audit log, trying a key, relative times, themes, and failures to start.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { password } from "./world.mjs";

export async function pages(world) {
  await windows(world);
  await changes(world);
  await running(world);
  await time(world);
  await system(world);
  await startFailures(world);
}

/** Windows share cookies: a page that shows one account never acts for another account. */
async function windows(world) {
  const ada = await world.visitor();
  const { page, base, context } = ada;
  await ada.registered("Ada's");
  const grace = await world.visitor();
  await grace.registered("Grace's");
  const nameOf = async (my) => (await my.api("GET", "/auth/me")).user.name;
  const before = await nameOf(grace);

  const second = await world.window(context);
  await second.goto(`${base}/console/settings`);
  await second.getByLabel("Your name").fill("Ada King");
  world.latest = page;
  await ada.button("Sign out").click();
  await ada.heading("Sign in").waitFor();
  const { email } = ada;
  ada.email = grace.email;
  await ada.signIn();
  await ada.heading("Home").waitFor();
  world.latest = second;
  await second.locator("form", { has: second.getByLabel("Your name") }).getByRole("button", { name: "Save changes" }).click();
  await second.getByText("This browser is now signed in to a different account.").waitFor();
  await second.getByRole("heading", { name: "Home", exact: true }).waitFor();
  assert.equal(new URL(second.url()).pathname, "/console");
  await second.locator(".account").getByText(grace.email).waitFor();
  assert.equal(await nameOf(grace), before, "the new account was not changed");

  // After the user signs in to the same account again, every window works.
  await second.goto(`${base}/console/settings`);
  await second.getByLabel("Your name").fill("Grace Hopper");
  world.latest = page;
  await ada.button("Sign out").click();
  await ada.heading("Sign in").waitFor();
  await ada.signIn();
  await ada.heading("Home").waitFor();
  world.latest = second;
  await second.locator("form", { has: second.getByLabel("Your name") }).getByRole("button", { name: "Save changes" }).click();
  await second.getByText("Changes saved").waitFor();
  assert.equal(await nameOf(grace), "Grace Hopper");
  // *Sign out* in a window that still shows the previous account does not sign out the current account.
  world.latest = page;
  await ada.button("Sign out").click();
  await ada.heading("Sign in").waitFor();
  ada.email = email;
  await ada.signIn();
  await ada.heading("Home").waitFor();
  world.latest = second;
  await second.getByRole("button", { name: "Sign out", exact: true }).click();
  await second.locator(".account").getByText(email).waitFor();
  world.latest = page;
  await ada.navigate("Settings").click();
  await ada.heading("Active sessions").waitFor();
  await context.close();
  await grace.context.close();
}

/** The audit log shows what was changed, and its filters are part of the URL. */
async function changes(world) {
  const my = await world.visitor();
  const { page } = my;
  await my.registered("Changes");
  const plan = await my.api("POST", "/admin/plans", { name: "Starter", default_rpm: 60 });
  const create = async (name) => (await my.api("POST", "/admin/api-keys", { name, plan_id: plan.id })).api_key;
  const [kept, deleted] = [await create("Mobile app"), await create("Partner")];
  await my.api("PATCH", `/admin/api-keys/${kept.id}`, { is_active: false });
  await my.api("PATCH", `/admin/api-keys/${deleted.id}`, { is_active: false });
  await my.api("DELETE", `/admin/api-keys/${deleted.id}`);
  await my.navigate("Audit log").click();
  const row = (action, resource) => page.getByRole("row").filter({ hasText: action }).filter({ hasText: resource });
  await row("API key updated", "Mobile app").waitFor();
  await row("API key updated", "Partner").waitFor();
  await row("API key deleted", "Partner").waitFor();
  await row("API key updated", "Partner").getByText("Deactivated").waitFor();
  // A deleted key has no page, so its name links to the key's history.
  const history = row("API key deleted", "Partner").getByRole("link", { name: "Partner" });
  assert.match(await history.getAttribute("href"), /^\/console\/audit\?target_id=/);
  // The exact time is visible without hovering.
  assert.match(await row("API key deleted", "Partner").innerText(), new RegExp(`${new Date().getFullYear()}`));
  await my.button("Details: API key deleted, Partner").click();
  await page.locator(".detail-row:not([hidden])").getByText("Starter").waitFor();
  assert.equal(await page.locator(".detail-row:not([hidden]) del").count(), 0, "a deletion shows no old values");
  await my.inspect("audit-named");
  const resource = page.locator("#target_type");
  const action = page.locator("#action");
  const events = (count) =>
    page.waitForFunction((count) => document.querySelectorAll("tbody tr:not(.detail-row)").length === count, count);
  await resource.selectOption({ label: "Plans" });
  await events(1);
  await row("Plan created", "Starter").waitFor();
  assert.match(page.url(), /\?target_type=plan$/);
  await resource.selectOption({ label: "API keys" });
  await action.selectOption({ label: "API key rotated" });
  await my.heading("No matching events").waitFor();
  await action.selectOption({ label: "API key updated" });
  await events(2);
  await page.reload();
  await events(2);
  assert.equal(await action.inputValue(), "api_key.update");
  // The events can be filtered by name, actor and dates.
  await my.field("Resource name").fill("partner");
  await events(1);
  await my.field("Resource name").fill("");
  await events(2);
  await my.field("Actor").fill("somebody-else");
  await my.heading("No matching events").waitFor();
  await my.field("Actor").fill(my.email.slice(0, 12));
  await events(2);
  const today = new Date().toISOString().slice(0, 10);
  await my.field("From (UTC)").fill(today);
  await my.field("To (UTC)").fill(today);
  await page.waitForFunction(() => location.search.includes("to="));
  await events(2);
  await my.field("To (UTC)").fill("2020-01-01");
  await my.field("From (UTC)").fill("2019-01-01");
  await my.heading("No matching events").waitFor();
  await page.getByRole("link", { name: "Clear filters" }).click();
  await row("API key deleted", "Partner").getByRole("link", { name: "Partner" }).click();
  await events(3);
  await page.getByText("Events about").waitFor();
  await my.button("Show all events").click();
  await row("Plan created", "Starter").getByText("60/min").waitFor();
  // The export contains all matching events, with names instead of IDs.
  await page.locator("#target_type").selectOption({ label: "API keys" });
  await events(5);
  const download = page.waitForEvent("download");
  await my.button("Export CSV").click();
  const saved = await download;
  assert.equal(saved.suggestedFilename(), "audit-log.csv");
  const lines = readFileSync(await saved.path(), "utf8").trim().split("\r\n");
  assert.equal(lines.length, 6);
  assert.match(lines[0], /^time,action,summary,/);
  assert.match(lines[5], /,api_key\.create,Plan Starter,api_key,Mobile app,/);
  await page.getByRole("link", { name: "Mobile app" }).first().click();
  await my.heading("Mobile app").waitFor();
  await my.context.close();
}

/** A test of a key shows which limits the requests count against and why the test ended. The user can stop it. */
async function running(world) {
  const my = await world.visitor();
  const { page } = my;
  await my.registered("Running");
  const openKey = async (name, plan) => {
    const { id } = await my.api("POST", "/admin/plans", { name, ...plan });
    const created = await my.api("POST", "/admin/api-keys", { name, plan_id: id });
    await page.goto(`${my.base}/console/api-keys/${created.api_key.id}`);
    await my.heading(name).waitFor();
    await page.locator("#pasted_key").fill(created.key);
  };
  await openKey("Wide", { default_rpm: 60_000 });
  await page.getByText("count against this key's rate limit and quotas").waitFor();
  await my.button("Send until 429").click();
  await page.getByText("300 requests sent, none rejected.").waitFor({ timeout: 60_000 });
  await my.status(200);
  let delay = true;
  await page.route(/\/v1\/echo/, async (route) => {
    if (delay) await new Promise((resolve) => setTimeout(resolve, 100));
    await route.continue();
  });
  await my.button("Send until 429").click();
  await my.button("Stop").click();
  await my.button("Stop").waitFor({ state: "detached" });
  delay = false;
  const sent = async () => (await page.locator(".outcome").textContent()).match(/(\d+) requests? allowed/)[1];
  assert.ok((await sent()) < 400, await sent());
  assert.equal(await page.getByText("none rejected").count(), 0);

  await openKey("Daily", { default_rpm: 60_000, daily_quota: 3 });
  await my.button("Send until 429").click();
  await my.status(429);
  await page.locator(".outcome").getByText("Daily quota used up").waitFor();
  assert.equal(await page.getByText("Rate limited").count(), 0);
  const denied = page.locator(".meter.denied");
  await denied.getByText("3 of 3 used").waitFor();
  assert.match(await denied.innerText(), /Daily quota[\s\S]*Denied this request/);
  assert.equal(await denied.getByRole("meter").getAttribute("aria-valuenow"), "100");
  // The wait until midnight is shown in hours and minutes, except in the last two hours.
  assert.match(await page.locator(".countdown strong").textContent(), /^\d+ (h \d+ min|min \d+ s|s)$/);
  await my.inspect("key-daily");

  // Every quota is shown after each request, although responses report only the rate limit and the policy closest to
  // exhaustion. The rate limit's meter refills.
  await openKey("Both", { default_rpm: 60, burst: 4, daily_quota: 100, monthly_quota: 1000 });
  const meter = (name) => page.locator(".try .meter").filter({ hasText: name });
  await my.button("Send 1").click();
  await my.status(200);
  await meter("Daily quota").getByText("1 of 100 used").waitFor();
  await meter("Monthly quota").getByText("1 of 1,000 used").waitFor();
  await my.button("Send until 429").click();
  await my.status(429);
  await page.locator(".outcome").getByText("Rate limited").waitFor();
  const allowed = Number(await sent());
  await meter("Daily quota").getByText(`${allowed} of 100 used`).waitFor();
  await meter("Monthly quota").getByText(`${allowed} of 1,000 used`).waitFor();
  await meter("Rate limit").getByText("Denied this request").waitFor();
  await meter("Rate limit").getByText(/^[0-3] of 4 used$/).waitFor();
  // The meters at the top of the page are updated too.
  await page.locator(".meters.wide .meter").filter({ hasText: "Burst" }).getByText("0 of 4 used").waitFor();
  await page.locator(".meters.wide .meter").filter({ hasText: "Daily quota" }).getByText(`${allowed} of 100 used`).waitFor();
  // After the key is removed from the field, the results of requests with the key are no longer shown.
  await page.locator("#pasted_key").fill("");
  await page.locator(".outcome").waitFor({ state: "detached" });

  // Once any key has been used, the first steps are collapsed, even if there are many unused keys.
  const { id } = await my.api("POST", "/admin/plans", { name: "More", default_rpm: 60 });
  for (let n = 0; n < 101; n += 1) await my.api("POST", "/admin/api-keys", { name: `Unused ${n}`, plan_id: id });
  await my.navigate("Home").click();
  await my.heading("Top keys, last 24 hours").waitFor();
  assert.equal(await my.button("3 of 4 done").getAttribute("aria-expanded"), "false");
  assert.ok(!(await page.getByText("Put Quota in front of your API").isVisible()));
  await my.button("3 of 4 done").click();
  await page.getByText("Put Quota in front of your API").waitFor();
  await my.context.close();
}

/** Relative times stay current while a page is open. */
async function time(world) {
  const my = await world.visitor();
  const { page, context } = my;
  await my.registered("Time");
  await page.clock.install();
  await page.goto(`${my.base}/console/audit`);
  await page.locator("time").getByText("just now", { exact: true }).first().waitFor();
  await page.clock.fastForward("10:00");
  await page.locator("time").getByText("10 minutes ago", { exact: true }).first().waitFor();
  assert.equal(await page.locator("time").getByText("just now", { exact: true }).count(), 0);
  await context.close();
}

/** The desktop app can override the color scheme that the browser engine reports. */
async function system(world) {
  const my = await world.visitor();
  const { page, base } = my;
  await page.emulateMedia({ colorScheme: "light" });
  await page.goto(`${base}/console/sign-in`);
  await my.heading("Sign in").waitFor();
  const scheme = (theme, dark) => page.evaluate(([theme, dark]) => {
    const root = document.documentElement;
    root.dataset.theme = theme;
    root.toggleAttribute("data-system-dark", dark);
    return getComputedStyle(root).colorScheme;
  }, [theme, dark]);
  assert.deepEqual(
    [await scheme("system", false), await scheme("system", true), await scheme("light", true)],
    ["light", "dark", "light"],
  );
  await my.context.close();
}

/** If files are missing or cookies are blocked, an error message says so. */
async function startFailures(world) {
  const my = await world.visitor();
  const { page, base, context } = my;
  const glue = /\/console\/(?!boot|theme)[^/]*\.js$/;
  world.expected = /dynamically imported module|status of 404/;
  await context.route(glue, (route) => route.fulfill({ status: 404, body: "" }));
  await page.goto(`${base}/console/sign-in`);
  await my.heading("Couldn't load the console").waitFor();
  await my.inspect("load-failed");
  await context.unroute(glue);
  await my.button("Reload").click();
  await my.heading("Sign in").waitFor();
  world.expected = undefined;

  await my.api("POST", "/auth/register", { email: my.email, password });
  const me = /\/auth\/me$/;
  await context.route(me, async (route) => {
    await context.clearCookies();
    await route.continue();
  });
  await page.goto(`${base}/console/sign-in`);
  await my.signIn();
  await page.getByText("Cookies are blocked.").waitFor();
  await my.inspect("sign-in-without-cookies");
  await context.unroute(me);
  await my.signIn();
  await my.heading("Home").waitFor();
  await context.close();
}
