// Tests that members see only the pages and commands that their role allows.

import assert from "node:assert/strict";

export async function roles(world) {
  const my = await world.visitor();
  const { page, base } = my;
  await my.registered("Roles");
  const plan = await my.api("POST", "/admin/plans", { name: "Starter", default_rpm: 60, daily_quota: 10 });
  const { api_key: key, key: secret } = await my.api("POST", "/admin/api-keys", { name: "Mobile app", plan_id: plan.id });
  for (let n = 0; n < 9; n += 1) await fetch(`${base}/v1/echo`, { headers: { "x-api-key": secret } });
  while (!(await my.api("GET", "/admin/stats")).closest_to_limit) await page.waitForTimeout(200);

  // Leave the page: it would keep loading data as an owner.
  await page.goto("about:blank");
  let role;
  const denied = [];
  await page.route("**/auth/me", async (route) => {
    const me = await (await route.fetch()).json();
    me.tenant.role = role;
    await route.fulfill({ json: me });
  });
  // The session belongs to an owner, so the server accepts every call. This route detects calls that the server would
  // reject for the billing role.
  await page.route(/\/admin\/(plans|api-keys|service-tokens|webhooks|audit|alert-settings)/, (route) => {
    if (role === "billing") denied.push(route.request().url());
    return route.continue();
  });
  // The first line is the name. A number of new alerts can follow it.
  const firstLines = async (items) => (await items.allInnerTexts()).map((it) => it.split("\n")[0].trim());
  const links = () => firstLines(page.getByRole("navigation", { name: "Console" }).getByRole("link"));
  const commands = async (typed) => {
    await page.getByRole("button", { name: "Search or jump to…" }).click();
    await my.field("Type a command or the name of an API key or plan").fill(typed);
    const all = await firstLines(page.getByRole("option"));
    await page.keyboard.press("Escape");
    return all;
  };

  role = "billing";
  await page.goto(`${base}/console`);
  await page.getByText("Requests today", { exact: true }).waitFor();
  await my.heading("Last 24 hours").waitFor();
  assert.deepEqual(await links(), ["Home", "Usage", "Alerts", "Billing", "Settings"]);
  assert.equal(await page.locator("main a[href^='/console/api-keys']").count(), 0, "no link leads to a page without access");
  assert.equal(await my.heading("Get started").count(), 0);
  assert.deepEqual(await commands("go to"), ["Go to Home", "Go to Usage", "Go to Alerts", "Go to Billing", "Go to Settings"]);
  assert.ok(!(await commands("create")).some((it) => it.startsWith("Create")));
  await my.inspect("home-billing-member");
  for (const [path, what] of [
    ["plans", "plans"],
    ["api-keys", "API keys"],
    [`api-keys/${key.id}`, "API keys"],
    ["service-tokens?new=1", "service tokens"],
    ["webhooks", "webhooks"],
    ["audit", "the audit log"],
  ]) {
    await page.goto(`${base}/console/${path}`);
    await my.heading(`You don't have access to ${what}`).waitFor();
    assert.equal(await page.locator("dialog[open]").count(), 0);
  }
  await my.inspect("no-access");
  assert.deepEqual(denied, []);

  role = "viewer";
  await page.goto(`${base}/console/plans?new=1`);
  await page.getByRole("row", { name: /Starter/ }).waitFor();
  assert.equal(new URL(page.url()).search, "");
  assert.equal(await page.locator("dialog[open]").count(), 0, "a viewer can't create plans");
  await page.goto(`${base}/console/api-keys/${key.id}?open=delete`);
  await my.heading("Mobile app").waitFor();
  await page.waitForFunction(() => location.search === "");
  assert.equal(await page.locator("dialog[open]").count(), 0, "or delete keys");
  assert.ok(!(await links()).includes("Billing"));
  assert.ok((await links()).includes("Audit log"));
  assert.ok(!(await commands("create")).some((it) => it.startsWith("Create")));
  // Shortcuts do not open forms either.
  await page.keyboard.press("n");
  await page.keyboard.press("k");
  await page.keyboard.press("?");
  await my.heading("Keyboard shortcuts").waitFor();
  assert.equal(await page.getByRole("row", { name: /^Create/ }).count(), 0);
  await page.keyboard.press("Escape");

  role = "developer";
  await page.goto(`${base}/console/plans?new=1`);
  await my.heading("Create plan").waitFor();
  await page.keyboard.press("Escape");
  assert.ok((await commands("create")).includes("Create plan"));
  await my.context.close();
}
