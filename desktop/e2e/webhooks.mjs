// Tests webhooks with the keyboard, from creation to deletion. The test starts the endpoint that receives the events.
// Also tests quota alerts.
//
// The server must allow webhooks to this machine: QUOTA_WEBHOOK_PRIVATE_NETWORKS=127.0.0.0/8.

import assert from "node:assert/strict";
import { createHmac } from "node:crypto";
import { once } from "node:events";
import { createServer } from "node:http";
import { quoted } from "./world.mjs";

/** An endpoint that remembers what it receives. */
class Receiver {
  received = [];
  status = 200;

  static async start() {
    const receiver = new Receiver();
    receiver.server = createServer(async (request, response) => {
      let body = "";
      for await (const part of request) body += part;
      receiver.received.push({ headers: request.headers, body });
      response.writeHead(receiver.status).end();
    });
    receiver.server.listen(0, "127.0.0.1");
    await once(receiver.server, "listening");
    receiver.url = `http://127.0.0.1:${receiver.server.address().port}/quota`;
    return receiver;
  }

  /** Returns the request's signature for each secret, computed as the documentation describes. */
  static signatures({ headers, body }, secrets) {
    return secrets.map((secret) => {
      const key = Buffer.from(secret.replace("whsec_", ""), "base64");
      const signed = `${headers["webhook-id"]}.${headers["webhook-timestamp"]}.${body}`;
      return `v1,${createHmac("sha256", key).update(signed).digest("base64")}`;
    });
  }

  last = () => this.received.at(-1);
}

export async function webhooks(world) {
  const receiver = await Receiver.start();
  try {
    const my = await world.visitor();
    await my.registered("Hooks");
    const secret = await creates(my, receiver);
    await tests(my, receiver, secret);
    await fails(my, receiver);
    await rotates(my, receiver, secret);
    await reportsErrors(my);
    await stops(my, receiver);
    await isReadOnly(my);
    await ends(my);
    await my.context.close();
    await alerts(world, receiver);
  } finally {
    receiver.server.close();
  }
}

/** Presses Tab, or another key, until an element with this name has the focus. The focus must be visible. */
async function to(my, name, key = "Tab") {
  const passed = [];
  for (let presses = 0; presses < 60; presses += 1) {
    const it = await my.page.evaluate(() => {
      const it = document.activeElement;
      const style = getComputedStyle(it);
      const label = it.getAttribute("aria-label") ?? it.labels?.[0]?.textContent ?? it.textContent;
      const visible = style.outlineStyle !== "none" && Number.parseFloat(style.outlineWidth) >= 2;
      return { name: label.trim(), visible: visible || ["BODY", "DIALOG"].includes(it.tagName) || it.id === "content" };
    });
    if (passed.length) assert.ok(it.visible, `the focus is not visible: ${it.name}`);
    if (it.name === name) return;
    passed.push(it.name.slice(0, 40));
    await my.page.keyboard.press(key);
  }
  assert.fail(`cannot reach ${name} with ${key}: ${passed.join(" · ")}`);
}

const press = async (my, name, key) => {
  await to(my, name, key);
  await my.page.keyboard.press("Enter");
};
const dialog = (my) => my.page.locator("dialog[open]");
const hasFocus = (my, name) =>
  my.page.waitForFunction((name) => {
    const it = document.activeElement;
    return (it.getAttribute("aria-label") ?? it.labels?.[0]?.textContent ?? it.textContent).trim() === name;
  }, name);
const rows = (my) => my.page.locator("table.deliveries tbody tr");
const counts = (my, count) =>
  my.page.waitForFunction((count) => document.querySelectorAll("table.deliveries tbody tr").length === count, count);
const result = (my, text) => my.page.locator(".test-result").getByText(text).waitFor();
const status = (my, text) => my.page.locator(".details .badge").getByText(text, { exact: true }).waitFor();

async function creates(my, receiver) {
  const { page } = my;
  await my.navigate("Webhooks").click();
  await my.heading("No webhooks yet").waitFor();
  await my.inspect("webhooks-none");
  await page.keyboard.press("n");
  await page.keyboard.press("w");
  await my.heading("Create webhook").waitFor();
  await hasFocus(my, "Name");
  await page.keyboard.type("Alerts");
  await page.keyboard.press("Tab");
  await page.keyboard.type("hooks.example.com");
  await page.keyboard.press("Tab");
  await dialog(my).locator(".field.invalid").getByText("Must start with https://").waitFor();
  await my.inspect("webhook-invalid");
  // The server checks the host.
  await my.page.locator("#webhook_url").fill("https://10.0.0.1/quota");
  await page.keyboard.press("Enter");
  await dialog(my).locator(".field.invalid").getByText("Must have a public address").waitFor();
  await hasFocus(my, "URL");
  await page.keyboard.press("Control+a");
  await page.keyboard.type(receiver.url);
  await page.keyboard.press("Enter");

  await my.heading(`Save the signing secret for ${quoted("Alerts")}`).waitFor();
  const secret = await page.locator("#secret").textContent();
  assert.match(secret, /^whsec_[0-9A-Za-z+/]{43}=$/);
  await page.keyboard.press("Escape");
  await page.getByText("You haven't saved this secret. Copy it before you close.").waitFor();
  await my.inspect("webhook-secret");
  await press(my, "Node.js");
  await dialog(my).getByText("npm install standardwebhooks").waitFor();
  await press(my, "Copy secret", "Shift+Tab");
  await page.getByText("Copied").first().waitFor();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), secret);
  await press(my, "Done");
  // After the user has saved the secret, the console opens the webhook's page.
  await my.heading("Alerts").waitFor();
  await my.heading("No deliveries yet").waitFor();
  assert.equal(await page.evaluate(() => document.body.innerText.includes("whsec_")), false);
  await my.inspect("webhook-new");
  return secret;
}

/** Sends a test event and returns what was received. */
async function sendTest(my, receiver) {
  const before = receiver.received.length;
  await press(my, "Send test event");
  while (receiver.received.length === before) await my.page.waitForTimeout(50);
  return receiver.last();
}

async function tests(my, receiver, secret) {
  const { page } = my;
  const request = await sendTest(my, receiver);
  await result(my, "The endpoint responded with status 200.");
  assert.equal(request.headers["webhook-signature"], Receiver.signatures(request, [secret])[0]);
  await hasFocus(my, "Send test event");
  await counts(my, 1);
  await rows(my).getByText("Delivered").waitFor();
  assert.match(await rows(my).innerText(), /Test event\s+webhook\.test[\s\S]*200/);
  await my.inspect("webhook");
  // Uses the delivery log with the keyboard.
  const details = await rows(my).getByRole("button").getAttribute("aria-label");
  await press(my, details);
  await my.heading("Test event").waitFor();
  const shown = await dialog(my).locator(".code code").textContent();
  assert.deepEqual(JSON.parse(shown), JSON.parse(request.body));
  assert.match(shown, /^\{\n {2}"type": "webhook\.test",\n {2}"timestamp"/);
  await dialog(my).getByText(request.headers["webhook-id"]).waitFor();
  await my.inspect("delivery");
  await page.keyboard.press("Escape");
  await hasFocus(my, details);
}

async function fails(my, receiver) {
  const { page } = my;
  receiver.status = 500;
  const request = await sendTest(my, receiver);
  await result(my, "The endpoint responded with status 500. Next attempt");
  await status(my, "Failing");
  await page.getByText("Deliveries started failing").waitFor();
  await counts(my, 2);
  await my.inspect("webhook-failing");
  await my.navigate("Webhooks").click();
  await page.getByRole("row", { name: /Alerts.*Failing\s*Started failing/ }).waitFor();
  await my.inspect("webhooks");
  await page.locator("main").getByRole("link", { name: "Alerts", exact: true }).click();
  await counts(my, 2);

  // The filter is part of the URL.
  const filter = page.locator("#status");
  await filter.selectOption({ label: "Failed" });
  await my.heading("No matching deliveries").waitFor();
  await my.button("Show all deliveries").click();
  await counts(my, 2);
  await filter.selectOption({ label: "Delivered" });
  await counts(my, 1);
  await filter.selectOption({ label: "Pending" });
  await rows(my).getByText("500").waitFor();
  await page.reload();
  await rows(my).getByText("500").waitFor();
  assert.equal(await filter.inputValue(), "pending");
  assert.equal(await rows(my).count(), 1);

  // Redelivering sends the same event.
  receiver.status = 200;
  const before = receiver.received.length;
  await page.locator("main h1").focus().catch(() => {});
  await press(my, await rows(my).getByRole("button").getAttribute("aria-label"));
  await dialog(my).getByText("The endpoint responded with status 500.").waitFor();
  await press(my, "Redeliver");
  await page.locator(".toast").getByText("Redelivery started").waitFor();
  while (receiver.received.length === before) await page.waitForTimeout(50);
  assert.equal(receiver.last().headers["webhook-id"], request.headers["webhook-id"]);
  assert.equal(receiver.last().body, request.body);
  await page.keyboard.press("Escape");
  await my.heading("No matching deliveries").waitFor();
  await my.button("Show all deliveries").click();
  await counts(my, 2);
  assert.equal(await rows(my).getByText("Delivered").count(), 2);
  await status(my, "Enabled");
}

async function rotates(my, receiver, first) {
  const { page } = my;
  const rotate = async (choice) => {
    await press(my, "Rotate secret");
    await my.heading(`Rotate the signing secret for ${quoted("Alerts")}`).waitFor();
    if (choice) await page.locator("#grace").selectOption({ label: choice });
    await press(my, "Rotate secret");
    await my.heading(`Save the signing secret for ${quoted("Alerts")}`).waitFor();
    const secret = await page.locator("#secret").textContent();
    await to(my, "I've saved this secret");
    await page.keyboard.press("Space");
    await press(my, "Done");
    await dialog(my).waitFor({ state: "detached" });
    return secret;
  };
  await press(my, "Rotate secret");
  await my.heading(`Rotate the signing secret for ${quoted("Alerts")}`).waitFor();
  await my.inspect("webhook-rotate");
  await page.keyboard.press("Escape");
  await hasFocus(my, "Rotate secret");
  const second = await rotate();
  assert.notEqual(second, first);
  await page.getByText("Previous secret").waitFor();
  const overlap = await sendTest(my, receiver);
  assert.deepEqual(overlap.headers["webhook-signature"].split(" "), Receiver.signatures(overlap, [second, first]));
  await result(my, "The endpoint responded with status 200.");

  // Another rotation revokes the previous secret, and the dialog says so.
  await press(my, "Rotate secret");
  await dialog(my).getByText("This secret was rotated recently.").waitFor();
  await my.inspect("webhook-rotate-again");
  await page.keyboard.press("Escape");
  const third = await rotate("Revoke now");
  await page.getByText("Previous secret").waitFor({ state: "detached" });
  const later = await sendTest(my, receiver);
  assert.deepEqual(later.headers["webhook-signature"].split(" "), Receiver.signatures(later, [third]));
  await result(my, "The endpoint responded with status 200.");
}

/** Tests what the page shows after too many test events, and while the server fails. */
async function reportsErrors(my) {
  const { page, base, world } = my;
  const problem = (slug, status, detail) => (route) =>
    route.fulfill({
      status,
      contentType: "application/problem+json",
      headers: { "retry-after": "37" },
      body: JSON.stringify({ type: `${base}/problems/${slug}`, title: "Problem", status, detail, request_id: "019ab4e1-7c00-7000-8000-00000000abcd" }),
    });
  await page.route("**/test", problem("too-many-requests", 429, "Your organization sends too many test events. Try again in 37 seconds."));
  await my.button("Send test event").click();
  await page.getByRole("alert").getByText("Try again in 37 seconds.").waitFor();
  assert.equal(await my.button("Copy request ID").count(), 0, "there is nothing to report");
  await my.inspect("webhook-too-many");
  await page.unroute("**/test");
  world.expected = /status of 500/;
  const fail = problem("internal", 500, "Something went wrong.");
  await page.route("**/redeliver", fail);
  await rows(my).first().getByRole("button").click();
  await my.button("Redeliver").click();
  await dialog(my).locator(".alert").getByText("019ab4e1-7c00-7000-8000-00000000abcd").waitFor();
  await page.keyboard.press("Escape");
  await page.unroute("**/redeliver");
  const calls = /\/admin\/(webhooks|alert)/;
  await page.route(calls, fail);
  for (const name of ["Alerts", "Webhooks"]) {
    await my.navigate(name).click();
    await my.heading(`Couldn't load ${name.toLowerCase()}`).waitFor();
    await page.locator(".empty").getByText("019ab4e1-7c00-7000-8000-00000000abcd").first().waitFor();
    await my.inspect(`${name.toLowerCase()}-failed`);
  }
  await page.unroute(calls);
  world.expected = undefined;
  await my.button("Retry").click();
  await page.locator("main").getByRole("link", { name: "Alerts", exact: true }).click();
  await counts(my, 4);
}

/** Tests editing and disabling a webhook, and a webhook that the server disables. */
async function stops(my, receiver) {
  const { page } = my;
  await press(my, "Edit");
  await hasFocus(my, "Name");
  await page.keyboard.press("Control+a");
  await page.keyboard.type("Pager");
  await my.inspect("webhook-edit");
  await page.keyboard.press("Enter");
  await my.heading("Pager").waitFor();
  await page.locator(".toast").getByText(`Webhook ${quoted("Pager")} updated`).waitFor();
  await hasFocus(my, "Edit");

  await press(my, "Disable", "Shift+Tab");
  await my.heading(`Disable webhook ${quoted("Pager")}?`).waitFor();
  await hasFocus(my, "Cancel");
  await my.inspect("webhook-disable");
  await press(my, "Disable webhook");
  await hasFocus(my, "Enable");
  await status(my, "Disabled");
  // A disabled webhook still receives test events.
  const request = await sendTest(my, receiver);
  assert.equal(JSON.parse(request.body).type, "webhook.test");
  await result(my, "The endpoint responded with status 200.");
  await press(my, "Enable");
  await status(my, "Enabled");

  // An endpoint can stop further events by responding with 410.
  receiver.status = 410;
  await sendTest(my, receiver);
  await status(my, "Disabled by Quota");
  await page.getByText("Quota disabled this webhook. The endpoint responded with status 410 (Gone).").waitFor();
  await my.inspect("webhook-disabled-by-quota");
  receiver.status = 200;
  await press(my, "Enable");
  await status(my, "Enabled");

  // The audit log has a link to the webhook.
  await my.navigate("Audit log").click();
  await page.locator("#target_type").selectOption({ label: "Webhooks" });
  for (const action of ["Webhook created", "Webhook secret rotated", "Webhook disabled", "Webhook updated"]) {
    await page.getByRole("rowheader", { name: action }).first().waitFor();
  }
  await page.getByText("Previous secret works until").first().waitFor();
  await page.getByRole("link", { name: "Pager" }).first().click();
  await my.heading("Pager").waitFor();
}

/** Tests what members see if their role has no right to manage webhooks. */
async function isReadOnly(my) {
  const { page, base } = my;
  const webhook = page.url();
  let role;
  await page.route("**/auth/me", async (route) => {
    const me = await (await route.fetch()).json();
    me.tenant.role = role;
    await route.fulfill({ json: me });
  });
  role = "viewer";
  await page.goto(webhook);
  await rows(my).first().getByRole("button").click();
  await dialog(my).getByText("webhook.test").first().waitFor();
  assert.equal(await my.button("Redeliver").count(), 0);
  await my.inspect("delivery-viewer");
  await page.keyboard.press("Escape");
  for (const name of ["Send test event", "Edit", "Disable", "Rotate secret", "Delete"]) {
    assert.equal(await my.button(name).count(), 0, name);
  }
  await my.inspect("webhook-viewer");
  await my.navigate("Webhooks").click();
  await page.getByRole("row", { name: /Pager/ }).waitFor();
  assert.equal(await my.button("Create webhook").count(), 0);
  await my.navigate("Alerts").click();
  await page.getByText("Owners and admins").waitFor();
  assert.equal(await my.button("Edit email notifications").count(), 0);

  role = "billing";
  let requested = false;
  await page.route(/\/admin\/(webhooks|alert-settings)/, (route) => {
    requested = true;
    return route.continue();
  });
  await page.goto(`${base}/console/webhooks`);
  await my.heading("You don't have access to webhooks").waitFor();
  assert.equal(await my.navigate("Webhooks").count(), 0, "there is no link to it");
  await my.inspect("webhooks-no-access");
  await my.navigate("Alerts").click();
  await my.heading("No alerts yet").waitFor();
  assert.ok(!requested);
  await page.unroute(/\/admin\/(webhooks|alert-settings)/);
  await page.unroute("**/auth/me");
  await page.goto(webhook);
  await my.heading("Pager").waitFor();
}

async function ends(my) {
  const { page } = my;
  await rows(my).first().waitFor();
  await press(my, "Delete");
  await my.heading(`Delete webhook ${quoted("Pager")}?`).waitFor();
  await hasFocus(my, "Cancel");
  await my.inspect("webhook-delete");
  await press(my, "Delete webhook");
  await my.heading("No webhooks yet").waitFor();
  await page.locator(".toast").getByText(`Webhook ${quoted("Pager")} deleted`).waitFor();
  assert.equal((await my.api("GET", "/admin/webhooks")).total, 0);
}

async function alerts(world, receiver) {
  const my = await world.visitor();
  const { page, base } = my;
  await page.clock.install();
  const looked = page.waitForResponse((it) => new URL(it.url()).pathname === "/admin/alerts");
  await my.registered("Alerts");
  await looked;
  await my.navigate("Alerts").click();
  await my.heading("No alerts yet").waitFor();
  await page.getByText("Owners and admins").waitFor();
  await page.getByText("Emails aren't sent because no mail server is configured.").waitFor();
  await my.inspect("alerts-none");

  // Tests the settings that determine who receives emails.
  await press(my, "Edit email notifications");
  await my.heading("Email notifications").waitFor();
  for (const name of ["Owners", "Admins"]) {
    await to(my, name);
    await page.keyboard.press("Space");
  }
  await press(my, "Save changes");
  await dialog(my).getByText("Select at least one role, or turn off email alerts.").waitFor();
  await my.inspect("alerts-email");
  await to(my, "Billing members", "Shift+Tab");
  await page.keyboard.press("Space");
  await press(my, "Save changes");
  await my.heading("Email notifications").waitFor({ state: "hidden" });
  await page.locator("main").getByText("Billing members").waitFor();
  assert.deepEqual(await my.api("GET", "/admin/alert-settings"), { email: true, email_roles: ["billing"], can_email: false });
  await hasFocus(my, "Edit email notifications");
  await page.keyboard.press("Enter");
  await to(my, "Send alerts by email");
  await page.keyboard.press("Space");
  await press(my, "Save changes");
  await page.locator("main").getByText("Off", { exact: true }).waitFor();

  // An alert is announced, counted in the navigation, and sent to webhooks.
  await my.api("POST", "/admin/webhooks", { name: "Pager", url: receiver.url });
  const plan = await my.api("POST", "/admin/plans", { name: "Free", default_rpm: 6000, daily_quota: 10 });
  const app = await my.api("POST", "/admin/api-keys", { name: "Mobile app", plan_id: plan.id });
  await my.navigate("Plans").click();
  await page.getByRole("row", { name: /Free/ }).waitFor();
  for (let n = 0; n < 10; n += 1) await fetch(`${base}/v1/echo`, { headers: { "x-api-key": app.key } });
  const end = Date.now() + 60_000;
  while ((await my.api("GET", "/admin/alerts")).total < 3) {
    assert.ok(Date.now() < end, "alerts are created");
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
  const link = page.getByRole("navigation", { name: "Console" }).getByRole("link", { name: /^Alerts/ });
  assert.equal(await link.innerText(), "Alerts");
  await page.clock.fastForward("00:31");
  await page.clock.fastForward("00:31");
  await page.locator(".toast").getByText(`${quoted("Mobile app")} has used 100% of its daily quota`).waitFor();
  await link.getByText("3 new").waitFor();
  await my.inspect("alerts-announced");
  await my.button("View alerts").click();
  const table = page.locator("main table");
  await table.getByText("New").nth(2).waitFor();
  assert.match(await table.innerText(), /Mobile app[\s\S]*Daily quota[\s\S]*100%[\s\S]*10 of 10/);
  await page.getByText("1 enabled").waitFor();
  await link.getByText("3 new").waitFor({ state: "detached" });
  await my.inspect("alerts");
  while (receiver.received.filter((it) => it.body.includes("quota.threshold_reached")).length < 3) {
    assert.ok(Date.now() < end, "the webhook gets the alerts");
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  await page.reload();
  await table.getByText("80%").waitFor();
  assert.equal(await table.getByText("New", { exact: true }).count(), 0, "they are no longer new");

  // An alert is not announced if it appears while the user is viewing the page.
  const partner = await my.api("POST", "/admin/api-keys", { name: "Partner", plan_id: plan.id });
  for (let n = 0; n < 10; n += 1) await fetch(`${base}/v1/echo`, { headers: { "x-api-key": partner.key } });
  while ((await my.api("GET", "/admin/alerts")).total < 6) {
    assert.ok(Date.now() < end, "alerts are created");
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
  await page.clock.fastForward("00:31");
  await table.getByText("Partner").first().waitFor();
  const checked = page.waitForResponse((it) => new URL(it.url()).search === "?limit=20");
  await page.clock.fastForward("00:31");
  await checked;
  await new Promise((resolve) => setTimeout(resolve, 500));
  assert.equal(await page.locator(".toast").count(), 0, "it is not announced");
  assert.equal(await link.innerText(), "Alerts");
  await table.getByRole("link", { name: "Mobile app" }).first().click();
  await my.heading("Mobile app").waitFor();
  await my.context.close();
}
