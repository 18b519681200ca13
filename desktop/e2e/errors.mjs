// Tests invalid input, failing calls, and choices that the console must leave to the user.

import assert from "node:assert/strict";
import { password, quoted } from "./world.mjs";

export async function errors(world) {
  await closedRegistration(world);
  const my = await world.visitor();
  const { page, base } = my;
  await my.registered("Errors");
  const dialog = page.locator("dialog[open]");

  // Until there is a plan, no key can be created, and the page says why.
  await my.navigate("API keys").click();
  await page.getByText("Create a plan first.").waitFor();
  assert.ok(await my.button("Create key").isDisabled());
  await my.button("Create key").click({ force: true });
  assert.equal(await dialog.count(), 0);
  await my.inspect("keys-without-plan");

  // Errors appear when the user leaves a field or submits the form, and disappear when the user types.
  await page.getByRole("link", { name: "Create a plan first" }).click();
  await my.heading("Create plan").waitFor();
  await my.button("Create plan").click();
  await page.locator(".field.invalid").getByText("Required").waitFor();
  await page.waitForFunction(() => document.activeElement.id === "name");
  await my.field("Name").fill("Starter");
  await page.locator(".field.invalid").waitFor({ state: "detached" });
  await my.field("Burst").fill("many");
  await my.field("Daily quota").focus();
  await page.locator(".field.invalid").getByText("Enter a whole number").waitFor();
  await my.inspect("plan-invalid");
  await my.field("Burst").fill("70,000,000");
  await page.locator(".field.invalid").waitFor({ state: "detached" });
  // If the user leaves a field by clicking the submit button, the field's error does not move the button during the
  // click, so the click reaches the button.
  await my.field("Burst").focus();
  await my.button("Create plan").scrollIntoViewIfNeeded();
  const button = await my.button("Create plan").boundingBox();
  await page.mouse.move(button.x + button.width / 2, button.y + button.height - 2);
  await page.mouse.down();
  await page.evaluate(() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve))));
  assert.deepEqual(await my.button("Create plan").boundingBox(), button, "the button does not move while it is pressed");
  await page.mouse.up();
  await page.locator(".field.invalid").getByText("Must be at most 60,000,000").waitFor();
  await page.waitForFunction(() => document.activeElement.id === "burst", undefined, { timeout: 5000 });
  // The error also appears if the user leaves the field without focusing another field.
  await my.field("Burst").fill("80,000,000");
  await page.locator(".field.invalid").waitFor({ state: "detached" });
  await my.heading("Create plan").click();
  await page.locator(".field.invalid").getByText("Must be at most 60,000,000").waitFor();
  await my.field("Burst").fill("10");
  await my.button("Create plan").click();
  await page.getByText(`Plan ${quoted("Starter")} created`).waitFor();

  // If there are several plans, none is preselected unless the list is filtered by a plan.
  const pro = await my.api("POST", "/admin/plans", { name: "Pro", default_rpm: 6000, daily_quota: 50_000 });
  await page.goto(`${base}/console/api-keys?new=1`);
  await my.field("Name").fill("App");
  assert.equal(await page.locator("#key_plan").inputValue(), "");
  await my.button("Create key").click();
  await page.locator(".field.invalid").getByText("Required").waitFor();
  await my.inspect("key-without-plan");
  await page.keyboard.press("Escape");
  await page.goto(`${base}/console/api-keys?plan_id=${pro.id}&new=1`);
  await my.field("Name").fill("App");
  assert.equal(await page.locator("#key_plan").inputValue(), pro.id);
  await my.button("Create key").click();
  await my.heading(`Save your key for ${quoted("App")}`).waitFor();
  await my.button("Send 1").click();
  await my.status(200);
  await page.getByLabel("I've saved this key").check();
  await my.button("Done").click();

  // The list shows when the key was last used, without a reload of the page.
  await page.getByRole("row", { name: /App .*just now/ }).waitFor();

  // The key's page shows the key's limits, and says whether they come from the plan.
  await page.getByRole("link", { name: "App" }).click();
  await my.heading("App").waitFor();
  const limit = (name) => page.locator(".limits div").filter({ hasText: name }).locator("dd");
  await limit("Rate limit").getByText("6,000/min").waitFor();
  await limit("Rate limit").getByText("From the plan").waitFor();
  await limit("Burst").getByText("6,000").waitFor();
  await limit("Daily quota").getByText("50,000").waitFor();
  await limit("Daily quota").getByText("Resets at midnight (UTC)").waitFor();
  await limit("Monthly quota").getByText("Unlimited").waitFor();
  await my.button("Edit").click();
  await my.field("Rate override (optional)").fill("120");
  await my.button("Save changes").click();
  await limit("Rate limit").getByText("120/min").waitFor();
  await limit("Rate limit").getByText("Override (plan: 6,000/min)").waitFor();
  await my.inspect("key-limits");

  // The dialog to delete a key says when the key was last used, and offers to deactivate the key instead.
  await my.button("Delete").click();
  await dialog.getByText(/Last used (just now|\d+ minutes? ago)\./).waitFor();
  await my.inspect("key-delete");
  await my.button("Deactivate instead").click();
  await dialog.waitFor({ state: "detached" });
  await page.locator(".page-header .badge").getByText("Inactive").waitFor();
  assert.equal((await my.api("GET", "/admin/api-keys")).items[0].is_active, false);

  // If an internal error occurs, dialogs, toasts and pages show the request ID.
  const id = "019ab4e1-7c00-7000-8000-00000000abcd";
  const fail = (route) =>
    route.fulfill({
      status: 500,
      contentType: "application/problem+json",
      body: JSON.stringify({ type: `${base}/problems/internal`, title: "Internal error", status: 500, detail: "Something went wrong.", request_id: id }),
    });
  world.expected = /status of 500/;
  const calls = "**/admin/**";
  await page.route(calls, fail);
  await my.button("Activate").click();
  await page.locator(".toast").getByText(id).waitFor();
  await my.button("Edit").click();
  await my.field("Name").fill("Renamed");
  await my.button("Save changes").click();
  await dialog.locator(".alert").getByText(id).waitFor();
  await my.inspect("key-internal-error");
  await dialog.locator(".alert").getByRole("button", { name: "Copy request ID" }).click();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), id);
  await page.keyboard.press("Escape");
  await my.navigate("Plans").click();
  await my.heading("Couldn't load plans").waitFor();
  assert.equal(await page.locator(".toast").count(), 0, "the message of another page is gone");
  await page.locator(".empty").getByText(id).waitFor();
  await my.inspect("page-internal-error");
  await page.unroute(calls);
  await my.button("Retry").click();
  await page.getByRole("row", { name: /Starter/ }).waitFor();

  // If a key can't be loaded, the page shows a single error. If only parts of the page can't be loaded, each part shows
  // its own error.
  const key = (await my.api("GET", "/admin/api-keys")).items[0];
  const failures = page.getByRole("alert").filter({ hasText: "Couldn't load" });
  await page.route(calls, fail);
  await page.goto(`${base}/console/api-keys/${key.id}`);
  await my.heading("Couldn't load this API key").waitFor();
  await page.locator(".skeleton").waitFor({ state: "detached" });
  assert.equal(await failures.count(), 1);
  await page.locator(".empty").getByText(id).waitFor();
  await my.inspect("key-failed");
  await page.unroute(calls);
  const parts = /\/limits$|\/admin\/(usage|decisions)/;
  await page.route(parts, fail);
  await my.button("Retry").click();
  await page.getByText("Couldn't load limits.").waitFor();
  await my.heading("Couldn't load requests").waitFor();
  assert.equal(await failures.count(), 2);
  await my.inspect("key-part-failed");
  await page.unroute(parts);
  await my.button("Retry").first().click();
  await page.locator(".meter").first().waitFor();
  await my.button("Retry").click();
  await page.locator(".chart").waitFor();
  const billing = (url) => url.pathname === "/billing";
  await page.route(billing, fail);
  await my.navigate("Billing").click();
  await my.heading("Couldn't load billing").waitFor();
  await page.locator(".empty").getByText(id).waitFor();
  await page.unroute(billing);
  await my.button("Retry").click();
  await my.heading("Limits").waitFor();
  world.expected = undefined;
  await my.context.close();
}

/** While registration is closed, the form shows the server's message and keeps the input. */
async function closedRegistration(world) {
  const my = await world.visitor();
  const { page, base } = my;
  const detail = "Registration is closed here. Ask for an account.";
  world.expected = /status of 403/;
  await page.route("**/auth/register", (route) =>
    route.fulfill({
      status: 403,
      contentType: "application/problem+json",
      body: JSON.stringify({ type: `${base}/problems/registration-closed`, title: "Registration is closed", status: 403, detail, request_id: "019ab4e1-7c00-7000-8000-00000000abcd" }),
    }));
  await page.goto(`${base}/console/register`);
  await my.field("Email").fill(my.email);
  await my.field("Password").fill(password);
  await my.button("Create account").click();
  await page.getByRole("alert").getByText(detail).waitFor();
  assert.equal(await my.button("Copy request ID").count(), 0, "nothing to report");
  assert.equal(await my.field("Email").inputValue(), my.email);
  assert.notEqual(await my.button("Create account").getAttribute("aria-disabled"), "true");
  await my.inspect("register-closed");
  world.expected = undefined;
  await my.context.close();
}
