// Tests the main journey with a mouse, from registering to deleting a key and its plan. Inspects the pages on the way.

import assert from "node:assert/strict";
import { password, quoted } from "./world.mjs";

const awkward = `<b>Mobile</b> \u202eתוכנית 🚀 ${"long ".repeat(30)}`.trim();

export async function tour(world) {
  const my = await world.visitor();
  const { page, base } = my;

  // Visitors are redirected to the sign-in page, and back after they have created an account.
  await page.goto(`${base}/console/plans`);
  await my.heading("Sign in").waitFor();
  assert.match(page.url(), /\/console\/sign-in\?next=%2Fconsole%2Fplans$/);
  // Measures how many bytes a first visit transfers, and how long it takes until the page is usable.
  const first = await page.evaluate(() => {
    const loaded = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")];
    const named = loaded.filter((it) => new URL(it.name).pathname.startsWith("/console")).map((it) => [it.name, it]);
    // The icon may be requested twice.
    const files = [...new Map(named).values()];
    return { bytes: files.reduce((sum, it) => sum + it.transferSize, 0), files: files.length, ms: performance.now() };
  });
  console.log(`first visit: ${first.bytes} bytes in ${first.files} files, usable after ${Math.round(first.ms)} ms`);
  assert.ok(first.bytes > 100_000 && first.bytes <= 300_000, `${first.bytes} bytes`);
  await my.inspect("sign-in");
  await page.getByRole("link", { name: "Create an account" }).click();
  await my.heading("Create an account").waitFor();
  await page.getByLabel("Email").fill(my.email);
  await page.getByLabel("Password").fill("password1234");
  await my.button("Create account").click();
  await page.locator(".field.invalid").waitFor();
  await my.inspect("register");
  await page.getByLabel("Password").fill(password);
  await my.button("Create account").click();
  await my.heading("Plans").waitFor();
  assert.equal(new URL(page.url()).pathname, "/console/plans");
  await my.heading("No plans yet").waitFor();
  await my.inspect("plans-empty");

  // Scripts can read the CSRF token but not the session's tokens. The CSRF token is random, so by chance it may contain
  // the prefixes of the other tokens.
  const readable = await page.evaluate(() => JSON.stringify([document.cookie, { ...localStorage }, { ...sessionStorage }]));
  assert.ok(!/eyJ[\w-]+\.|qr_[0-9A-Za-z]{38}/.test(readable), readable);
  const cookies = await my.context.cookies();
  const hidden = cookies.filter((it) => it.httpOnly && it.sameSite === "Lax");
  assert.deepEqual(hidden.map((it) => it.name).sort(), ["quota_access", "quota_device", "quota_refresh"]);

  await my.navigate("Home").click();
  await my.heading("Get started").waitFor();
  await my.inspect("home-first");

  await page.getByRole("link", { name: "Create plan" }).click();
  await my.heading("Create plan").waitFor();
  await page.getByLabel("Name").fill("Starter");
  // At this rate, a rejected request can be repeated after at most 12 seconds.
  await page.getByLabel("Requests per minute").fill("5");
  await page.getByLabel("Burst").fill("5");
  await my.inspect("plan-new");
  await my.button("Create plan").click();
  await page.getByRole("row", { name: /Starter/ }).waitFor();
  await my.button("Create plan").click();
  await page.getByLabel("Name").fill(awkward);
  await my.button("Create plan").click();
  await page.getByRole("row", { name: /Mobile/ }).waitFor();
  assert.equal(await page.locator("table b").count(), 0);
  await my.button("Edit Starter").click();
  await page.getByLabel("Daily quota").fill("1,000");
  const onFailure = page.getByLabel("If Redis is unavailable");
  assert.ok(!(await onFailure.isVisible()));
  await page.getByText("Advanced").click();
  await onFailure.selectOption("closed");
  await my.inspect("plans");
  await my.button("Save changes").click();
  await page.getByRole("cell", { name: "1,000", exact: true }).waitFor();
  await my.button("Edit Starter").click();
  assert.ok(await onFailure.isVisible(), "settings other than the default are visible");
  assert.equal(await onFailure.inputValue(), "closed");
  await my.button("Cancel").click();

  await my.navigate("API keys").click();
  await my.heading("No keys yet").waitFor();
  await my.button("Create key").click();
  await page.getByLabel("Name").fill("Mobile app");
  await page.locator("#key_plan").selectOption({ label: "Starter (5/min)" });
  await my.inspect("key-new");
  await my.button("Create key").click();
  await my.heading(`Save your key for ${quoted("Mobile app")}`).waitFor();
  const key = await page.locator("#secret").textContent();
  assert.match(key, /^qk_[0-9A-Za-z]{38}$/);
  // Escape shows a warning but does not close the dialog. Until the user copies the key or confirms having saved it,
  // *Done* is disabled, and a note says why.
  assert.ok(await my.button("Done").isDisabled());
  await page.getByText("Copy the key, or confirm that you've saved it.").waitFor();
  for (const _ of [1, 2, 3]) await page.keyboard.press("Escape");
  await page.getByText("You haven't saved this key.").waitFor();
  await my.inspect("key-unsaved");
  await my.button("Copy key").click();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), key);
  await page.getByText("You haven't saved this key.").waitFor({ state: "detached" });
  assert.ok(await page.getByLabel("I've saved this key").isChecked());
  assert.ok(await my.button("Done").isEnabled());
  await my.button("Send until 429").click();
  await page.locator(".status[data-status='429']").waitFor();
  await page.locator(".countdown").waitFor();
  assert.match(await page.locator(".outcome").textContent(), /Rate limited[5-9] requests allowed, 1 rejected/);
  await my.inspect("key-secret");
  await my.button("Done").click();
  await page.getByRole("link", { name: "Mobile app" }).waitFor();
  await my.inspect("keys");

  // Filters are part of the URL.
  await page.getByRole("searchbox", { name: "Search" }).fill("nothing");
  await my.heading("No matching keys").waitFor();
  assert.match(page.url(), /search=nothing/);
  await page.getByRole("link", { name: "Clear filters" }).click();
  await page.getByRole("link", { name: "Mobile app" }).click();
  await my.heading("Mobile app").waitFor();

  /**
   * Sends requests until a response has this status. A change can take a second to take effect, and the burst takes
   * longer to refill.
   */
  const sendUntil = async (status) => {
    const deadline = Date.now() + 30_000;
    for (;;) {
      const [response] = await Promise.all([page.waitForResponse(/\/v1\/echo$/), my.button("Send 1").click()]);
      if (response.status() === status) return my.status(status);
      assert.ok(Date.now() < deadline, `${response.status()} instead of ${status}`);
      await page.waitForTimeout(500);
    }
  };
  await my.button("Deactivate").click();
  await my.heading(`Deactivate key ${quoted("Mobile app")}?`).waitFor();
  await my.button("Deactivate key").click();
  await my.button("Activate").waitFor();
  await sendUntil(401);
  await page.getByText("This key is inactive.").waitFor();
  await my.button("Activate").click();
  await my.button("Deactivate").waitFor();
  await sendUntil(200);
  await my.inspect("key");

  await my.button("Rotate").click();
  await my.button("Rotate key").click();
  await my.heading(`Save your key for ${quoted("Mobile app")}`).waitFor();
  assert.notEqual(await page.locator("#secret").textContent(), key);
  await page.getByLabel(/^I've saved this/).check();
  await my.button("Done").click();
  await page.getByText("Previous secret").waitFor();

  // A plan that is in use cannot be deleted; the dialog says why.
  await my.navigate("Plans").click();
  await my.choose("Starter", "Delete");
  await my.heading("This plan is in use").waitFor();
  await my.inspect("plan-in-use");
  await page.getByRole("link", { name: "View keys" }).click();
  await page.getByRole("link", { name: "Mobile app" }).click();
  await my.button("Delete").click();
  await my.button("Delete key").click();
  await my.heading("No keys yet").waitFor();
  await my.navigate("Plans").click();
  await my.choose("Starter", "Delete");
  await my.heading(`Delete plan ${quoted("Starter")}?`).waitFor();
  await my.inspect("plan-delete");
  await my.button("Delete plan").click();
  await page.getByRole("row", { name: /Starter/ }).waitFor({ state: "detached" });

  await my.navigate("Service tokens").click();
  await my.heading("No service tokens yet").waitFor();
  await my.button("Create token").click();
  await page.getByLabel("Name").fill("Edge gateway");
  await my.button("Create token").click();
  await my.heading(`Save your token for ${quoted("Edge gateway")}`).waitFor();
  const token = await page.locator("#secret").textContent();
  assert.match(await page.locator("dialog[open] .code").last().textContent(), new RegExp(token));
  await my.inspect("token-secret");
  await page.getByLabel(/^I've saved this/).check();
  await my.button("Done").click();
  await page.getByRole("row", { name: /Edge gateway/ }).waitFor();
  await my.inspect("tokens");

  await my.navigate("Audit log").click();
  await page.getByRole("rowheader", { name: "API key rotated" }).waitFor();
  await my.inspect("audit");

  await my.navigate("Settings").click();
  await my.heading("Active sessions").waitFor();
  await page.getByText("This device").waitFor();
  await my.inspect("settings");
  await page.getByLabel("Quota time zone").fill("Europe/Berlin");
  await my.button("Save changes").click();
  await page.getByText("Changes saved").waitFor();
  await page.getByLabel("Dark").check();
  assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), "dark");
  await page.getByLabel("System", { exact: true }).check();

  await my.navigate("Home").click();
  await page.getByText("Get started").waitFor();
  await my.inspect("home");
  await page.getByRole("button", { name: "Search or jump to…" }).click();
  await my.field("Type a command or the name of an API key or plan").fill("plan");
  await page.getByRole("option", { name: "Search API keys for" }).waitFor();
  await my.inspect("palette");
  await my.field("Type a command or the name of an API key or plan").fill("shortcuts");
  await page.getByRole("option", { name: "Show keyboard shortcuts" }).click();
  await my.heading("Keyboard shortcuts").waitFor();
  await my.inspect("shortcuts");
  await my.button("Close").click();
  await page.goto(`${base}/console/nowhere`);
  await my.heading("Page not found").waitFor();
  await my.inspect("not-found");
  await my.context.close();
}
