// Tests actions such as undo, duplicate and move. Also tests menus, messages in dialogs, keys pasted by mistake, and
// slow responses.

import assert from "node:assert/strict";
import { quoted } from "./world.mjs";

export async function actions(world) {
  const my = await world.visitor();
  const { page, base } = my;
  // Messages stay longer than usual, so that they do not disappear while they are inspected.
  await page.addInitScript(() => {
    const { setTimeout } = window;
    window.setTimeout = (run, ms, ...rest) => setTimeout(run, [6000, 12_000].includes(ms) ? ms * 10 : ms, ...rest);
  });
  await my.registered("Actions");
  const dialog = page.locator("dialog[open]");
  const toast = page.locator(".toast");
  const starter = await my.api("POST", "/admin/plans", { name: "Starter", default_rpm: 60, burst: 7, daily_quota: 900 });
  const pro = await my.api("POST", "/admin/plans", { name: "Pro", default_rpm: 6000 });
  const created = [];
  for (const name of ["One", "Two", "Three"]) {
    created.push(await my.api("POST", "/admin/api-keys", { name, plan_id: starter.id }));
  }
  const key = async (at) => my.api("GET", `/admin/api-keys/${created[at].api_key.id}`);

  // Deactivating a key can be undone, even after leaving its page.
  await page.goto(`${base}/console/api-keys/${created[0].api_key.id}`);
  await my.heading("One").waitFor();
  await my.button("Deactivate").click();
  await my.button("Deactivate key").click();
  await toast.getByText(`Key ${quoted("One")} deactivated`).waitFor();
  assert.equal((await key(0)).is_active, false);
  await my.inspect("toast-undo");
  await my.navigate("Plans").click();
  await my.heading("Plans").waitFor();
  await my.button("Undo").click();
  await toast.getByText(`Key ${quoted("One")} activated`).waitFor();
  assert.equal((await key(0)).is_active, true);
  assert.equal(await toast.count(), 1, "one message at a time");
  await my.button("Dismiss").click();
  await toast.waitFor({ state: "detached" });

  // A row's menu works with the keyboard and restores the focus.
  const more = my.button("More actions for Starter");
  await more.focus();
  await page.keyboard.press("ArrowDown");
  const focused = () => page.evaluate(() => document.activeElement.textContent || document.activeElement.ariaLabel);
  await page.getByRole("menu").waitFor();
  await page.waitForFunction(() => document.activeElement.textContent === "View keys");
  await my.inspect("menu");
  await page.keyboard.press("ArrowUp");
  assert.equal(await focused(), "Delete");
  await page.keyboard.press("ArrowUp");
  assert.equal(await focused(), "Copy ID");
  await page.keyboard.press("Enter");
  await toast.getByText("Plan ID copied").waitFor();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), starter.id);
  await page.keyboard.press("ArrowDown");
  await page.waitForFunction(() => document.activeElement.textContent === "View keys");
  await page.keyboard.press("Escape");
  await page.getByRole("menu").waitFor({ state: "detached" });
  assert.equal(await focused(), "More actions for Starter");
  await more.click();
  await page.getByRole("heading", { name: "Plans" }).click();
  await page.getByRole("menu").waitFor({ state: "detached" });

  // A duplicate starts with the settings of the original.
  await my.choose("Starter", "Duplicate");
  await my.heading("Create plan").waitFor();
  const value = (id) => dialog.locator(`#${id}`).inputValue();
  assert.deepEqual(
    [await value("name"), await value("default_rpm"), await value("burst"), await value("daily_quota")],
    ["Starter (copy)", "60", "7", "900"],
  );
  await my.inspect("plan-duplicate");
  // While a dialog is open, messages appear inside the dialog and can be dismissed there.
  await page.evaluate(() => {
    Object.defineProperty(navigator.clipboard, "writeText", { configurable: true, value: () => Promise.reject(new Error("no")) });
  });
  await my.button("Create plan").click();
  await toast.getByText(`Plan ${quoted("Starter (copy)")} created`).waitFor();
  await my.button("Create plan").click();
  await my.heading("Create plan").waitFor();
  assert.equal(await dialog.locator("#name").inputValue(), "", "a new plan does not start with the last duplicate");
  assert.equal(await dialog.locator(".toast").count(), 1, "the message is in the dialog, not behind it");
  // The message does not cover the dialog's buttons at these window sizes.
  for (const [width, height] of [[320, 568], [390, 844], [768, 600], [1280, 800]]) {
    await page.setViewportSize({ width, height });
    const box = await toast.boundingBox();
    for (const name of ["Cancel", "Create plan"]) {
      const button = await my.button(name).boundingBox();
      const isApart = box.y + box.height <= button.y || button.y + button.height <= box.y || box.x + box.width <= button.x || button.x + button.width <= box.x;
      assert.ok(isApart, `${name} at ${width} × ${height}: ${JSON.stringify([box, button])}`);
    }
  }
  await page.setViewportSize({ width: 1280, height: 800 });
  await my.button("Dismiss").click();
  await toast.waitFor({ state: "detached" });
  await my.button("Cancel").click();

  // A key's menu leads to the dialogs on the key's page, and to the key's usage.
  await page.goto(`${base}/console/api-keys`);
  for (const [action, title] of [
    ["Edit", "Edit key"],
    ["Rotate", `Rotate key ${quoted("Two")}`],
    ["Deactivate", `Deactivate key ${quoted("Two")}?`],
    ["Delete", `Delete key ${quoted("Two")}?`],
  ]) {
    await my.choose("Two", action);
    await my.heading(title).waitFor();
    assert.equal(new URL(page.url()).search, "", "the dialog opens once");
    await my.button("Cancel").click();
    await my.navigate("API keys").click();
  }
  await my.choose("Two", "View usage");
  await my.heading("Usage").waitFor();
  assert.match(page.url(), new RegExp(`key_id=${created[1].api_key.id}`));
  await my.api("PATCH", `/admin/api-keys/${created[1].api_key.id}`, { is_active: false });
  await my.navigate("API keys").click();
  await my.choose("Two", "Activate");
  await toast.getByText(`Key ${quoted("Two")} activated`).waitFor();
  assert.equal((await key(1)).is_active, true);
  await my.inspect("keys-menu");

  // Several keys are moved to another plan.
  await page.goto(`${base}/console/api-keys`);
  await my.field("Select One").check();
  await my.field("Select Three").check();
  assert.deepEqual(await page.locator(".bulk button").allTextContents(), ["Move", "Activate", "Deactivate", "Delete"]);
  await my.button("Move").click();
  await my.heading("Move 2 keys to another plan").waitFor();
  await dialog.getByRole("button", { name: "Move keys" }).click();
  await dialog.locator(".field.invalid").getByText("Required").waitFor();
  await dialog.locator("#move_plan").selectOption({ label: "Pro" });
  await my.inspect("keys-move");
  await dialog.getByRole("button", { name: "Move keys" }).click();
  await toast.getByText(`2 keys moved to ${quoted("Pro")}`).waitFor();
  assert.deepEqual([(await key(0)).plan_id, (await key(1)).plan_id, (await key(2)).plan_id], [pro.id, starter.id, pro.id]);

  // Deactivating several keys can be undone; a key that was already inactive remains inactive.
  await my.api("PATCH", `/admin/api-keys/${created[1].api_key.id}`, { is_active: false });
  await page.reload();
  await my.field("Select all on this page").check();
  await my.button("Deactivate").click();
  await my.field('Type "deactivate 3 keys" to confirm').fill("deactivate 3 keys");
  await dialog.getByRole("button", { name: "Deactivate" }).click();
  await toast.getByText("3 keys deactivated").waitFor();
  await my.button("Undo").click();
  await toast.getByText("2 keys activated").waitFor();
  assert.deepEqual([(await key(0)).is_active, (await key(1)).is_active, (await key(2)).is_active], [true, false, true]);

  // If the user pastes a key other than the page's key, the page says so before the key is used.
  await page.goto(`${base}/console/api-keys/${created[0].api_key.id}`);
  await my.heading("One").waitFor();
  await page.locator("#pasted_key").fill(created[2].key);
  await page.getByText(`This is a different key. The key on this page starts with ${created[0].api_key.prefix}.`).waitFor();
  await my.inspect("key-other");
  await page.locator("#pasted_key").fill(created[0].key);
  await page.getByText("This is a different key.").waitFor({ state: "detached" });
  await my.button("Copy key ID").click().catch(() => {});

  // While a response is slow to arrive, the old rows are dimmed.
  let release;
  const released = new Promise((resolve) => (release = resolve));
  await my.navigate("API keys").click();
  await page.getByRole("row").nth(3).waitFor();
  await page.route(/\/admin\/api-keys\?/, async (route) => {
    await released;
    await route.continue();
  });
  await page.getByRole("searchbox", { name: "Search" }).fill("Two");
  await page.locator(".async.pending[aria-busy=true]").waitFor({ state: "attached" });
  await page.waitForTimeout(600);
  assert.ok(Number(await page.locator("table.table").evaluate((it) => getComputedStyle(it).opacity)) < 1);
  release();
  await page.getByRole("row").nth(2).waitFor({ state: "detached" });
  await page.locator(".async.pending").waitFor({ state: "detached" });
  await page.unroute(/\/admin\/api-keys\?/);

  // The palette finds plans.
  await page.keyboard.press("Escape");
  await page.getByRole("button", { name: "Search or jump to…" }).click();
  await my.field("Type a command or the name of an API key or plan").fill("pro");
  await page.getByRole("option", { name: "Pro Plan" }).click();
  await page.waitForFunction((id) => location.search === `?plan_id=${id}`, pro.id);
  await page.getByRole("row").nth(2).waitFor();

  // The ID of a token can be copied.
  const { service_token: token } = await my.api("POST", "/admin/service-tokens", { name: "Edge gateway" });
  await page.goto(`${base}/console/service-tokens`);
  await my.choose("Edge gateway", "Copy ID");
  await toast.getByText("Token ID copied").waitFor();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), token.id);

  // A message does not cover any row's buttons, even if the rows fill the window.
  for (let at = 1; at <= 16; at += 1) await my.api("POST", "/admin/plans", { name: `Plan ${at}`, default_rpm: 60 });
  await page.goto(`${base}/console/plans`);
  await my.choose("Pro", "Copy ID");
  await toast.getByText("Plan ID copied").waitFor();
  for (const width of [900, 1024, 1280, 1920]) {
    await page.setViewportSize({ width, height: 800 });
    const covered = await page.evaluate(() => {
      const box = document.querySelector(".toast").getBoundingClientRect();
      const isCovered = ({ left, right, top, bottom }) => left < box.right && box.left < right && top < box.bottom && box.top < bottom;
      const buttons = [...document.querySelectorAll(".row-actions button")];
      return buttons.filter((it) => isCovered(it.getBoundingClientRect())).map((it) => it.ariaLabel);
    });
    assert.deepEqual(covered, [], `at ${width}`);
  }
  await my.context.close();
}
