// Tests lists of several API keys: sorting, filters, bulk actions, and changes to the expiration time.

import assert from "node:assert/strict";
import { quoted } from "./world.mjs";

export async function many(world) {
  const my = await world.visitor();
  const { page, base } = my;
  await my.registered("Many");
  const plan = await my.api("POST", "/admin/plans", { name: "Starter", default_rpm: 600 });
  const created = [];
  for (const name of ["Web shop", "app, iOS", "Batch jobs", "Partner"]) {
    created.push(await my.api("POST", "/admin/api-keys", { name, plan_id: plan.id }));
  }
  const used = await fetch(`${base}/v1/echo`, { headers: { "x-api-key": created[2].key } });
  assert.equal(used.status, 200);
  // The time of last use is recorded with a delay.
  while (!(await my.api("GET", `/admin/api-keys/${created[2].api_key.id}`)).last_used_at) {
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  const waitForRows = (names) => page.waitForFunction(
    (names) => [...document.querySelectorAll("tbody th a")].map((it) => it.textContent).join() === names.join(),
    names,
  );

  await my.navigate("API keys").click();
  await waitForRows(["Partner", "Batch jobs", "app, iOS", "Web shop"]);
  const header = (name) => page.getByRole("columnheader", { name });
  await header("Name").getByRole("link").click();
  await waitForRows(["app, iOS", "Batch jobs", "Partner", "Web shop"]);
  assert.equal(await header("Name").getAttribute("aria-sort"), "ascending");
  assert.match(page.url(), /sort=name$/);
  await header("Name").getByRole("link").click();
  await waitForRows(["Web shop", "Partner", "Batch jobs", "app, iOS"]);
  assert.equal(await header("Name").getAttribute("aria-sort"), "descending");
  await my.field("Sort").selectOption({ label: "Recently used" });
  await page.waitForFunction(() => document.querySelector("tbody th a")?.textContent === "Batch jobs");
  assert.equal(await header("Last used").getAttribute("aria-sort"), "descending");
  // The sort order is part of the URL and is kept after a reload.
  await page.reload();
  await page.waitForFunction(() => document.querySelector("tbody th a")?.textContent === "Batch jobs");
  assert.equal(await my.field("Sort").inputValue(), "-last_used_at");
  await my.field("Sort").selectOption({ label: "Name, A to Z" });
  await waitForRows(["app, iOS", "Batch jobs", "Partner", "Web shop"]);

  // The filters match the URL, even after navigating.
  const unused = await my.api("POST", "/admin/plans", { name: "Unused", default_rpm: 60 });
  await page.reload();
  await waitForRows(["app, iOS", "Batch jobs", "Partner", "Web shop"]);
  await page.locator("#plan_filter").selectOption({ label: "Unused" });
  await my.heading("No matching keys").waitFor();
  assert.match(page.url(), new RegExp(`plan_id=${unused.id}`));
  await my.field("Status").selectOption({ label: "Inactive" });
  await page.getByRole("link", { name: "Clear filters" }).click();
  await waitForRows(["Partner", "Batch jobs", "app, iOS", "Web shop"]);
  for (const id of ["plan_filter", "status_filter", "sort"]) assert.equal(await page.locator(`#${id}`).inputValue(), "", id);
  await page.goBack();
  await my.heading("No matching keys").waitFor();
  assert.equal(await page.locator("#plan_filter").inputValue(), unused.id);
  assert.equal(await my.field("Status").inputValue(), "inactive");
  assert.equal(await my.field("Sort").inputValue(), "name");
  await page.getByRole("link", { name: "Clear filters" }).click();
  await my.field("Sort").selectOption({ label: "Name, A to Z" });
  await waitForRows(["app, iOS", "Batch jobs", "Partner", "Web shop"]);

  // The dialog for a disruptive bulk action states the consequences and requires typed confirmation.
  await my.field("Select Batch jobs").check();
  await my.field("Select Partner").check();
  await page.getByText("2 of 4 selected").waitFor();
  await my.inspect("keys-selected");
  await my.button("Deactivate").click();
  await my.heading("Deactivate 2 keys?").waitFor();
  const dialog = page.locator("dialog[open]");
  const text = await dialog.innerText();
  assert.match(text, /requests with these keys will be rejected \(401\)/);
  assert.match(text, /1 of the keys was used in the last 24 hours/);
  assert.ok(text.includes(`${quoted("Batch jobs")} and ${quoted("Partner")}`), text);
  const confirm = dialog.getByRole("button", { name: "Deactivate" });
  assert.ok(await confirm.isDisabled());
  const phrase = my.field('Type "deactivate 2 keys" to confirm');
  await phrase.fill("deactivate 3 keys");
  assert.ok(await confirm.isDisabled());
  await phrase.press("Enter");
  assert.equal(await dialog.count(), 1, "Enter does not submit it either");
  await my.inspect("keys-confirm");
  await phrase.fill("Deactivate 2 keys ");
  await phrase.press("Enter");
  await page.getByText("2 keys deactivated").waitFor();
  await page.waitForFunction(() => [...document.querySelectorAll("tbody .badge")].filter((it) => it.textContent === "Inactive").length === 2);
  const rejected = await fetch(`${base}/v1/echo`, { headers: { "x-api-key": created[2].key } });
  assert.equal(rejected.status, 401);
  await page.locator(".bulk").getByText("4 keys").waitFor();

  await my.field("Select all on this page").check();
  await my.button("Activate").click();
  await page.locator("dialog[open]").getByRole("button", { name: "Activate" }).click();
  await page.getByText("4 keys activated").waitFor();
  await page.waitForFunction(() => document.querySelectorAll("tbody .badge.on").length === 4);

  // If one of the keys was already deleted, the result says that one failed.
  await my.field("Select Partner").check();
  await my.field("Select Web shop").check();
  await my.api("DELETE", `/admin/api-keys/${created[3].api_key.id}`);
  world.expected = /status of 404/;
  await my.button("Delete").click();
  await my.field('Type "delete 2 keys" to confirm').fill("delete 2 keys");
  await page.locator("dialog[open]").getByRole("button", { name: "Delete" }).click();
  await page.getByText("1 key deleted, 1 failed: ").waitFor();
  await waitForRows(["app, iOS", "Batch jobs"]);
  await page.locator(".bulk").getByText(/selected/).waitFor({ state: "detached" });
  // Errors remain until the user dismisses them.
  await page.waitForTimeout(6500);
  await my.inspect("keys-failed");
  await my.button("Dismiss").click();
  await page.getByText("1 failed: ").waitFor({ state: "detached" });
  world.expected = undefined;

  // The expiration time can be changed and removed.
  await page.getByRole("link", { name: "app, iOS" }).click();
  await my.heading("app, iOS").waitFor();
  await my.button("Edit").click();
  const hint = await page.locator(".field", { has: my.field("Expires (optional)") }).locator(".note").textContent();
  await my.field("Expires (optional)").fill("2001-02-03T04:05");
  await my.button("Save changes").click();
  // The server rejects an expiration time in the past, and the server's message replaces the hint.
  const note = page.locator(".field.invalid", { has: my.field("Expires (optional)") }).locator(".note");
  await note.waitFor();
  assert.match(await note.textContent(), /^[A-Z].*\w/);
  assert.notEqual(await note.textContent(), hint);
  const year = new Date().getFullYear() + 2;
  await my.field("Expires (optional)").fill(`${year}-02-03T04:05`);
  await my.inspect("key-edit");
  await my.button("Save changes").click();
  await page.getByText(/^Key .* updated$/).waitFor();
  const path = `/admin/api-keys/${created[1].api_key.id}`;
  const key = await my.api("GET", path);
  assert.equal(new Date(key.expires_at).getTime(), new Date(`${year}-02-03T04:05`).getTime());
  await page.locator("dd time").filter({ hasText: "days" }).waitFor();
  await my.button("Edit").click();
  assert.equal(await my.field("Expires (optional)").inputValue(), `${year}-02-03T04:05`);
  await my.field("Name").fill("App");
  await my.button("Save changes").click();
  await my.heading("App").waitFor();
  assert.equal((await my.api("GET", path)).expires_at, key.expires_at, "an unchanged expiry keeps its exact time");
  await my.button("Edit").click();
  await my.field("Expires (optional)").fill("");
  await my.button("Save changes").click();
  await page.locator("dd").getByText("Never", { exact: true }).waitFor();
  assert.equal((await my.api("GET", path)).expires_at, null);

  await my.navigate("Home").click();
  await page.getByText("Requests today").waitFor();
  await my.inspect("home-running");
  await my.navigate("Plans").click();
  await page.getByRole("row", { name: /Starter/ }).waitFor();
  await my.context.close();
}
