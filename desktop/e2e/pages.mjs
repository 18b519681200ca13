// What pages say: of whose they are, of what was changed, while time passes, and when something is in the way.

import assert from "node:assert/strict";
import { password } from "./world.mjs";

export async function pages(world) {
  await windows(world);
  await changes(world);
  await running(world);
  await time(world);
  await system(world);
  await inTheWay(world);
}

/** Windows share their cookies: one that shows an account does nothing in another's name. */
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
  await second.locator("form", { has: second.getByLabel("Your name") }).getByRole("button", { name: "Save" }).click();
  await second.getByText("Another account has signed in in this browser.").waitFor();
  await second.getByRole("heading", { name: "Home", exact: true }).waitFor();
  assert.equal(new URL(second.url()).pathname, "/console");
  await second.locator(".who").getByText(grace.email).waitFor();
  assert.equal(await nameOf(grace), before, "nothing was changed for who signed in");

  // Who signs in anew goes on in every window; and one that signs out, in all.
  await second.goto(`${base}/console/settings`);
  await second.getByLabel("Your name").fill("Grace Hopper");
  world.latest = page;
  await ada.button("Sign out").click();
  await ada.heading("Sign in").waitFor();
  await ada.signIn();
  await ada.heading("Home").waitFor();
  world.latest = second;
  await second.locator("form", { has: second.getByLabel("Your name") }).getByRole("button", { name: "Save" }).click();
  await second.getByText("Profile saved.").waitFor();
  assert.equal(await nameOf(grace), "Grace Hopper");
  // And nobody is signed out by a window that shows another.
  world.latest = page;
  await ada.button("Sign out").click();
  await ada.heading("Sign in").waitFor();
  ada.email = email;
  await ada.signIn();
  await ada.heading("Home").waitFor();
  world.latest = second;
  await second.getByRole("button", { name: "Sign out", exact: true }).click();
  await second.locator(".who").getByText(email).waitFor();
  world.latest = page;
  await ada.place("Settings").click();
  await ada.heading("Where you are signed in").waitFor();
  await context.close();
  await grace.context.close();
}

/** The audit names what was changed, and is filtered by address. */
async function changes(world) {
  const my = await world.visitor();
  const { page } = my;
  await my.registered("Changes");
  const plan = await my.api("POST", "/admin/plans", { name: "Starter", default_rpm: 60 });
  const make = async (name) => (await my.api("POST", "/admin/api-keys", { name, plan_id: plan.id })).api_key;
  const [kept, gone] = [await make("Mobile app"), await make("Partner")];
  await my.api("PATCH", `/admin/api-keys/${kept.id}`, { is_active: false });
  await my.api("PATCH", `/admin/api-keys/${gone.id}`, { is_active: false });
  await my.api("DELETE", `/admin/api-keys/${gone.id}`);
  await my.place("Audit").click();
  const row = (change, target) => page.getByRole("row").filter({ hasText: change }).filter({ hasText: target });
  await row("API key updated", "Mobile app").waitFor();
  await row("API key updated", "Partner").waitFor();
  await row("API key deleted", "Partner").waitFor();
  assert.equal(await page.getByRole("link", { name: "Partner" }).count(), 0, "what is gone leads nowhere");
  // When that was can be read without pointing at it.
  assert.match(await row("API key deleted", "Partner").innerText(), new RegExp(`${new Date().getFullYear()}`));
  await my.look("audit-named");
  await my.field("Kind").selectOption({ label: "Plans" });
  await page.waitForFunction(() => document.querySelectorAll("tbody tr").length === 1);
  await row("Plan created", "Starter").waitFor();
  assert.match(page.url(), /\?target_type=plan$/);
  await my.field("Kind").selectOption({ label: "API keys" });
  await my.field("Change").selectOption({ label: "API key rotated" });
  await my.heading("No matching changes").waitFor();
  await my.field("Change").selectOption({ label: "API key updated" });
  await page.waitForFunction(() => document.querySelectorAll("tbody tr").length === 2);
  await page.reload();
  await page.waitForFunction(() => document.querySelectorAll("tbody tr").length === 2);
  assert.equal(await my.field("Change").inputValue(), "api_key.update");
  await page.getByRole("link", { name: "Mobile app" }).click();
  await my.heading("Mobile app").waitFor();
  await my.context.close();
}

/** Sending requests says what they cost, stops when asked to, and why it stopped. */
async function running(world) {
  const my = await world.visitor();
  const { page } = my;
  await my.registered("Running");
  const page_of = async (name, plan) => {
    const { id } = await my.api("POST", "/admin/plans", { name, ...plan });
    const made = await my.api("POST", "/admin/api-keys", { name, plan_id: id });
    await page.goto(`${my.base}/console/api-keys/${made.api_key.id}`);
    await my.heading(name).waitFor();
    await page.locator("#try_text").fill(made.key);
  };
  await page_of("Wide", { default_rpm: 60_000 });
  await page.getByText("counts against this key's limits").waitFor();
  await my.button("Send until 429").click();
  await page.getByText("300 requests sent, none was limited.").waitFor({ timeout: 60_000 });
  await my.status(200);
  let delay = true;
  await page.route(/\/v1\/echo/, async (route) => {
    if (delay) await new Promise((done) => setTimeout(done, 100));
    await route.continue();
  });
  await my.button("Send until 429").click();
  await my.button("Stop").click();
  await my.button("Stop").waitFor({ state: "detached" });
  delay = false;
  const sent = async () => (await page.locator(".outcome").textContent()).match(/(\d+) requests admitted/)[1];
  assert.ok((await sent()) < 400, await sent());
  assert.equal(await page.getByText("none was limited").count(), 0);

  await page_of("Daily", { default_rpm: 60_000, daily_quota: 3 });
  await my.button("Send until 429").click();
  await my.status(429);
  await page.getByText("Limited by the daily quota.").waitFor();
  // Until midnight there are hours, but for who looks within two of it.
  assert.match(await page.locator(".countdown strong").textContent(), /^\d+ (h \d+ min|min \d+ s|s)$/);
  await my.look("key-daily");

  // The first steps are over once any key was used, however many there are that were not.
  const { id } = await my.api("POST", "/admin/plans", { name: "More", default_rpm: 60 });
  for (let n = 0; n < 101; n += 1) await my.api("POST", "/admin/api-keys", { name: `Unused ${n}`, plan_id: id });
  await my.place("Home").click();
  await page.getByText("Last request").waitFor();
  assert.equal(await my.heading("First steps").count(), 0);
  await my.context.close();
}

/** What was "just now" is so no longer when it is looked at again. */
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

/** The desktop app says of the system that it is dark, where the page's own question is answered otherwise. */
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

/** Files that are not there, and cookies that are not kept. */
async function inTheWay(world) {
  const my = await world.visitor();
  const { page, base, context } = my;
  const glue = /\/console\/(?!boot|theme)[^/]*\.js$/;
  world.expected = /dynamically imported module|status of 404/;
  await context.route(glue, (route) => route.fulfill({ status: 404, body: "" }));
  await page.goto(`${base}/console/sign-in`);
  await my.heading("The console could not be started").waitFor();
  await my.look("not-started");
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
  await page.getByText("Your browser did not keep the session. Allow cookies").waitFor();
  await my.look("sign-in-without-cookies");
  await context.unroute(me);
  await my.signIn();
  await my.heading("Home").waitFor();
  await context.close();
}
