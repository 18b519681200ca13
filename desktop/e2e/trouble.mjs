// Tests a server that fails, is slow or does not respond, sessions that end, and resources that no longer exist.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { setTimeout as pause } from "node:timers/promises";

const ID = "019ab4e1-7c00-7000-8000-00000000abcd";

export async function trouble(world) {
  const my = await world.visitor();
  const { page, base } = my;
  await my.registered("Trouble");
  const plan = await my.api("POST", "/admin/plans", { name: "Starter", default_rpm: 600 });
  const created = await my.api("POST", "/admin/api-keys", { name: "Mobile app", plan_id: plan.id });
  const fail = (route) =>
    route.fulfill({
      status: 500,
      contentType: "application/problem+json",
      body: JSON.stringify({ type: `${base}/problems/internal`, title: "Internal error", status: 500, detail: `Something went wrong. Quote request ID ${ID} when reporting it.`, request_id: ID }),
    });
  world.expected = /status of (500|404)/;

  await liveTail(my, fail);
  await leavesWhileSending(my, created);
  await nothingResponds(my);
  await responseIsIncomplete(my);

  // If the whole console cannot be loaded, the page also shows the request ID.
  await page.route("**/auth/me", fail);
  await page.reload();
  await my.heading("Couldn't load the console").waitFor();
  await page.getByText(ID).waitFor();
  await my.inspect("console-failed");
  await page.unroute("**/auth/me");
  await my.button("Retry").click();
  await my.heading("Plans").waitFor();

  // The key no longer exists, so the page does not offer to try again.
  await my.api("DELETE", `/admin/api-keys/${created.api_key.id}`);
  await page.goto(`${base}/console/api-keys/${created.api_key.id}`);
  await my.heading("Not found").waitFor();
  await page.getByText("This API key doesn't exist or was deleted.").waitFor();
  assert.equal(await my.button("Retry").count(), 0);
  await my.inspect("key-not-found");

  // Without data, there is nothing to export.
  await page.goto(`${base}/console/usage?range=custom`);
  await my.heading("Choose a first and last day").waitFor();
  assert.ok(await my.button("Export CSV").isDisabled());
  await page.goto(`${base}/console/usage`);
  await page.getByRole("row", { name: /Web shop/ }).waitFor();
  assert.ok(!(await my.button("Export CSV").isDisabled()));

  await partOfTheAuditLog(my);

  // A name can be changed, but not removed.
  await my.api("PATCH", "/auth/me", { name: "Ada" });
  await page.goto(`${base}/console/settings`);
  await my.field("Your name").fill("");
  await my.button("Save changes").click();
  await page.locator(".field.invalid").getByText("Required").waitFor();
  await my.field("Your name").fill("Grace");
  await my.button("Save changes").click();
  await page.locator(".toast").getByText("Changes saved").waitFor();
  assert.equal((await my.api("GET", "/auth/me")).user.name, "Grace");

  await expiredSession(my);
  world.expected = undefined;
  await my.context.close();
}

/** Sets the timeout for responses to its usual length times `factor`, until the page is reloaded. */
function scaleTimeout(page, factor) {
  return page.evaluate((factor) => {
    window.originalTimeout ??= AbortSignal.timeout;
    AbortSignal.timeout = (ms) => window.originalTimeout.call(AbortSignal, ms * factor);
  }, factor);
}

/** While the live list is filtered or cannot be loaded, it does not claim that there are no decisions. */
async function liveTail(my, fail) {
  const { page, base } = my;
  await page.route("**/admin/decisions*", fail);
  await page.goto(`${base}/console/usage?live=1`);
  const dialog = page.locator("dialog[open]");
  await dialog.getByText("Reconnecting…").waitFor();
  await dialog.locator(".alert").getByText(ID).waitFor();
  assert.equal(await dialog.getByText("No decisions yet").count(), 0);
  await my.inspect("live-tail-failed");
  await page.unroute("**/admin/decisions*");
  await dialog.getByText("No decisions yet").waitFor();
  await dialog.locator(".alert").waitFor({ state: "detached" });
  await dialog.getByLabel("Outcome").selectOption({ label: "Rejected" });
  await dialog.getByText("No matching decisions").waitFor();
  await my.inspect("live-tail-no-match");
}

/** Closing the dialog or leaving the page stops the requests, and causes no error. */
async function leavesWhileSending(my, { api_key, key }) {
  const { page, base } = my;
  await page.route("**/v1/echo", async (route) => {
    await pause(300);
    await route.continue().catch(() => {});
  });
  await page.goto(`${base}/console/api-keys?new=1`);
  await my.field("Name").fill("Web shop");
  await my.button("Create key").click();
  await my.button("Send until 429").click();
  await my.status(200);
  await page.getByLabel("I've saved this key").check();
  await my.button("Done").click();
  await page.waitForTimeout(500);
  await page.getByRole("row", { name: /Web shop/ }).waitFor();
  await page.goto(`${base}/console/api-keys/${api_key.id}`);
  await page.locator("#pasted_key").fill(key);
  await my.button("Send 10").click();
  await my.status(200);
  // Removing the key from the field also stops the requests.
  await page.locator("#pasted_key").fill("");
  await my.button("Stop").waitFor({ state: "detached" });
  assert.equal(await page.locator(".status").count(), 0);
  await page.locator("#pasted_key").fill(key);
  await my.button("Send 10").click();
  await my.status(200);
  await my.navigate("Plans").click();
  await page.waitForTimeout(500);
  await page.getByRole("row", { name: /Starter/ }).waitFor();
  await page.unroute("**/v1/echo");
}

/**
 * If loading takes a long time, the page says so, and loading fails after a timeout. If a change times out, an error
 * says that the change may still take effect.
 */
async function nothingResponds(my) {
  const { page, base } = my;
  await page.goto(`${base}/console/settings`);
  await my.heading("Profile").waitFor();
  const calls = /\/admin\/(plans|api-keys)/;
  // The response arrives only after the note about slow loading has been inspected. The longer timeout leaves enough
  // time for this.
  let release;
  const released = new Promise((resolve) => (release = resolve));
  await page.route(calls, async (route) => {
    await released;
    await route.continue().catch(() => {});
  });
  await scaleTimeout(page, 10);
  await my.navigate("Plans").click();
  await page.locator(".skeleton").getByText("Still loading…").waitFor();
  await my.inspect("slow");
  release();
  await page.getByRole("row", { name: /Starter/ }).waitFor();
  await page.unroute(calls);

  await page.reload();
  await page.getByRole("row", { name: /Starter/ }).waitFor();
  // While no response arrives, the timeout is short, so that the test does not take half a minute each time.
  await scaleTimeout(page, 1 / 20);
  await page.route(calls, () => {});
  await my.navigate("API keys").click();
  await my.heading("Couldn't load API keys").waitFor();
  await page.getByText("Can't reach the server.").first().waitFor();
  await page.unroute(calls);
  await scaleTimeout(page, 1);
  await my.navigate("Plans").click();
  await page.getByRole("row", { name: /Starter/ }).waitFor();
  await scaleTimeout(page, 1 / 20);
  await page.route(calls, () => {});
  await my.button("Edit Starter").click();
  await my.field("Name").fill("Basic");
  await my.button("Save changes").click();
  const dialog = page.locator("dialog[open]");
  await dialog.getByText("The server's response didn't arrive. The change may still take effect, so reload the page before you try again.").waitFor();
  assert.equal(await my.field("Name").inputValue(), "Basic", "the input is kept");
  await my.inspect("no-response");
  await page.unroute(calls);
  await scaleTimeout(page, 1);
  await my.button("Cancel").click();
}

/** If the body of a response does not arrive completely, the message does not claim that the server is unreachable. */
async function responseIsIncomplete(my) {
  const { page, base } = my;
  const server = createServer((_, response) => {
    response.writeHead(200, { "content-type": "application/json", "content-length": "100" });
    response.write("{");
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const calls = /\/admin\/api-keys/;
  await page.goto(`${base}/console/plans`);
  await page.getByRole("row", { name: /Starter/ }).waitFor();
  // Even on a busy machine, the start of the response arrives within this timeout.
  await scaleTimeout(page, 1 / 3);
  await page.route(calls, (route) => route.continue({ url: `http://127.0.0.1:${server.address().port}/` }));
  await my.navigate("API keys").click();
  await my.heading("Couldn't load API keys").waitFor();
  await page.getByText("The server's response didn't arrive completely.").first().waitFor();
  await page.unroute(calls);
  await scaleTimeout(page, 1);
  await my.button("Retry").click();
  await page.getByRole("row", { name: /Web shop/ }).waitFor();
  await my.navigate("Plans").click();
  await page.getByRole("row", { name: /Starter/ }).waitFor();
  server.closeAllConnections();
  server.close();
}

/** If an export is not complete, a message says so. */
async function partOfTheAuditLog(my) {
  const { page, base } = my;
  const one = (await my.api("GET", "/admin/audit?limit=1")).items[0];
  await page.goto(`${base}/console/audit`);
  await page.getByRole("row").nth(1).waitFor();
  const download = () => Promise.all([page.waitForEvent("download"), my.button("Export CSV").click()]);
  await download();
  assert.equal(await page.locator(".toast").count(), 0);
  await page.route("**/admin/audit?*", (route) =>
    route.fulfill({ json: { items: Array.from({ length: 100 }, () => one), next_cursor: "more", total: 10_000 } }));
  await download();
  await page.locator(".toast").getByText("Only the newest 10,000 events were exported.").waitFor();
  await my.inspect("audit-export-incomplete");
  await page.unroute("**/admin/audit?*");
}

/** The sign-in page says why users have to sign in again, and then sends them to the page that they requested. */
async function expiredSession(my) {
  const { page, base } = my;
  const note = page.getByText("Your session has expired. Sign in again to continue.");
  await my.navigate("Plans").click();
  await page.getByRole("row", { name: /Starter|Basic/ }).waitFor();
  const sessions = await my.api("GET", "/auth/sessions?limit=100");
  for (const it of sessions.items.filter((it) => !it.current)) await my.api("DELETE", `/auth/sessions/${it.id}`);
  await my.navigate("API keys").click();
  await my.heading("Sign in").waitFor();
  await note.waitFor();
  await my.inspect("session-expired");
  await my.signIn();
  await my.heading("API keys").waitFor();
  await my.button("Sign out").click();
  await my.heading("Sign in").waitFor();
  assert.equal(await note.count(), 0, "they signed out themselves");
  await page.goto(`${base}/console/plans`);
  await my.heading("Sign in").waitFor();
  assert.equal(await note.count(), 0, "they have not signed in yet");
}
