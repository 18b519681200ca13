// Many API keys: their order, what is done to a choice of them, and a change of when one expires.

import assert from "node:assert/strict";
import { named } from "./world.mjs";

export async function many(world) {
  const my = await world.visitor();
  const { page, base } = my;
  await my.registered("Many");
  const plan = await my.api("POST", "/admin/plans", { name: "Starter", default_rpm: 600 });
  const made = [];
  for (const name of ["Web shop", "app, iOS", "Batch jobs", "Partner"]) {
    made.push(await my.api("POST", "/admin/api-keys", { name, plan_id: plan.id }));
  }
  const used = await fetch(`${base}/v1/echo`, { headers: { "x-api-key": made[2].key } });
  assert.equal(used.status, 200);
  // When a key was used is written down soon after.
  while (!(await my.api("GET", `/admin/api-keys/${made[2].api_key.id}`)).last_used_at) {
    await new Promise((done) => setTimeout(done, 100));
  }
  const shown = () => page.locator("tbody th a").allInnerTexts();
  const wait = (names) => page.waitForFunction(
    (names) => [...document.querySelectorAll("tbody th a")].map((it) => it.textContent).join() === names.join(),
    names,
  );

  await my.place("API keys").click();
  await wait(["Partner", "Batch jobs", "app, iOS", "Web shop"]);
  const head = (name) => page.getByRole("columnheader", { name });
  await head("Name").getByRole("link").click();
  await wait(["app, iOS", "Batch jobs", "Partner", "Web shop"]);
  assert.equal(await head("Name").getAttribute("aria-sort"), "ascending");
  assert.match(page.url(), /sort=name$/);
  await head("Name").getByRole("link").click();
  await wait(["Web shop", "Partner", "Batch jobs", "app, iOS"]);
  assert.equal(await head("Name").getAttribute("aria-sort"), "descending");
  await my.field("Sort").selectOption({ label: "Last used first" });
  await page.waitForFunction(() => document.querySelector("tbody th a")?.textContent === "Batch jobs");
  assert.equal(await head("Last used").getAttribute("aria-sort"), "descending");
  // It is in the address, and so there after a reload, and before going back.
  await page.reload();
  await page.waitForFunction(() => document.querySelector("tbody th a")?.textContent === "Batch jobs");
  assert.equal(await my.field("Sort").inputValue(), "-last_used_at");
  await my.field("Sort").selectOption({ label: "Name" });
  await wait(["app, iOS", "Batch jobs", "Partner", "Web shop"]);

  // What the filters show is what is in force, also when something else than they changed it.
  const unused = await my.api("POST", "/admin/plans", { name: "Unused", default_rpm: 60 });
  await page.reload();
  await wait(["app, iOS", "Batch jobs", "Partner", "Web shop"]);
  await my.field("Plan").selectOption({ label: "Unused" });
  await my.heading("No key is like that").waitFor();
  assert.match(page.url(), new RegExp(`plan_id=${unused.id}`));
  await my.field("State").selectOption({ label: "Inactive" });
  await page.getByRole("link", { name: "Show all keys" }).click();
  await wait(["Partner", "Batch jobs", "app, iOS", "Web shop"]);
  for (const name of ["Plan", "State", "Sort"]) assert.equal(await my.field(name).inputValue(), "", name);
  await page.goBack();
  await my.heading("No key is like that").waitFor();
  assert.equal(await my.field("Plan").inputValue(), unused.id);
  assert.equal(await my.field("State").inputValue(), "false");
  assert.equal(await my.field("Sort").inputValue(), "name");
  await page.getByRole("link", { name: "Show all keys" }).click();
  await my.field("Sort").selectOption({ label: "Name" });
  await wait(["app, iOS", "Batch jobs", "Partner", "Web shop"]);

  // What is done to many has to be typed, and says what it breaks.
  await my.field("Select Batch jobs").check();
  await my.field("Select Partner").check();
  await page.getByText("2 of 4 selected").waitFor();
  await my.look("keys-chosen");
  await my.button("Deactivate").click();
  await my.heading("Deactivate 2 keys?").waitFor();
  const dialog = page.locator("dialog[open]");
  const text = await dialog.innerText();
  assert.match(text, /every request with them is refused with 401/);
  assert.match(text, /1 of them had requests in the last day/);
  assert.ok(text.includes(`${named("Batch jobs")} and ${named("Partner")}`), text);
  const go = dialog.getByRole("button", { name: "Deactivate" });
  assert.ok(await go.isDisabled());
  const phrase = my.field("Type “deactivate 2 keys” to confirm");
  await phrase.fill("deactivate 3 keys");
  assert.ok(await go.isDisabled());
  await phrase.press("Enter");
  assert.equal(await dialog.count(), 1, "not even by Enter");
  await my.look("keys-confirm");
  await phrase.fill("Deactivate 2 keys ");
  await phrase.press("Enter");
  await page.getByText("2 keys are deactivated.").waitFor();
  await page.waitForFunction(() => [...document.querySelectorAll("tbody .badge")].filter((it) => it.textContent === "inactive").length === 2);
  const refused = await fetch(`${base}/v1/echo`, { headers: { "x-api-key": made[2].key } });
  assert.equal(refused.status, 401);
  await page.locator(".bulk").getByText("4 keys").waitFor();

  await my.field("Select all on this page").check();
  await my.button("Activate").click();
  await page.locator("dialog[open]").getByRole("button", { name: "Activate" }).click();
  await page.getByText("4 keys are activated.").waitFor();
  await page.waitForFunction(() => document.querySelectorAll("tbody .badge.on").length === 4);

  // One of the chosen is gone already: it is told.
  await my.field("Select Partner").check();
  await my.field("Select Web shop").check();
  await my.api("DELETE", `/admin/api-keys/${made[3].api_key.id}`);
  world.expected = /status of 404/;
  await my.button("Delete").click();
  await my.field("Type “delete 2 keys” to confirm").fill("delete 2 keys");
  await page.locator("dialog[open]").getByRole("button", { name: "Delete" }).click();
  await page.getByText("1 key is deleted. 1 could not be: ").waitFor();
  await wait(["app, iOS", "Batch jobs"]);
  await page.locator(".bulk").getByText(/selected/).waitFor({ state: "detached" });
  // What went wrong stays until it is read.
  await page.waitForTimeout(6500);
  await my.look("keys-failed");
  await my.button("Dismiss").click();
  await page.getByText("1 could not be: ").waitFor({ state: "detached" });
  world.expected = undefined;

  // When a key expires can be changed, and be taken back.
  await page.getByRole("link", { name: "app, iOS" }).click();
  await my.heading("app, iOS").waitFor();
  await my.button("Edit").click();
  await my.field("Expires (optional)").fill("2001-02-03T04:05");
  await my.button("Save").click();
  await page.locator(".field.invalid").getByText("must be in the future").waitFor();
  const year = new Date().getFullYear() + 2;
  await my.field("Expires (optional)").fill(`${year}-02-03T04:05`);
  await my.look("key-edit");
  await my.button("Save").click();
  await page.getByText("The key is changed.").waitFor();
  const path = `/admin/api-keys/${made[1].api_key.id}`;
  const key = await my.api("GET", path);
  assert.equal(new Date(key.expires_at).getTime(), new Date(`${year}-02-03T04:05`).getTime());
  await page.locator("dd time").filter({ hasText: "days" }).waitFor();
  await my.button("Edit").click();
  assert.equal(await my.field("Expires (optional)").inputValue(), `${year}-02-03T04:05`);
  await my.field("Name").fill("App");
  await my.button("Save").click();
  await my.heading("App").waitFor();
  assert.equal((await my.api("GET", path)).expires_at, key.expires_at, "what was not touched stays to the millisecond");
  await my.button("Edit").click();
  await my.field("Expires (optional)").fill("");
  await my.button("Save").click();
  await page.locator("dd").getByText("never").waitFor();
  assert.equal((await my.api("GET", path)).expires_at, null);

  await my.place("Home").click();
  await page.getByText("Last request").waitFor();
  await my.look("home-running");
  await my.place("Plans").click();
  await page.getByRole("row", { name: /Starter/ }).waitFor();
  await my.context.close();
}
