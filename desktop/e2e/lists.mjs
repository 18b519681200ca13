// Tests paging, more plans than fit on a page, and edit forms that send only changed fields.

import assert from "node:assert/strict";

export async function lists(world) {
  const my = await world.visitor();
  const { page, base } = my;
  await my.registered("Lists");
  const dialog = page.locator("dialog[open]");
  const rows = (count) =>
    page.waitForFunction((count) => document.querySelectorAll("tbody tr").length === count, count);
  const search = () => new URL(page.url()).search;

  const plans = [];
  for (let at = 0; at <= 100; at += 1) {
    const name = `Plan ${String(at).padStart(3, "0")}`;
    plans.push(await my.api("POST", "/admin/plans", { name, default_rpm: 60 }));
  }
  const last = plans[100];
  const keys = [];
  for (let at = 0; at <= 40; at += 1) {
    const name = `Key ${String(at).padStart(2, "0")}`;
    keys.push((await my.api("POST", "/admin/api-keys", { name, plan_id: last.id })).api_key);
  }

  // All plans are listed, even if the server returns them on several pages.
  await my.navigate("API keys").click();
  await rows(20);
  await page.getByRole("row", { name: /Key 40 .*Plan 100/ }).waitFor();
  await page.locator("#plan_filter").selectOption({ label: "Plan 099" });
  await my.heading("No matching keys").waitFor();
  await page.getByRole("link", { name: "Clear filters" }).click();
  await rows(20);

  // If the list is filtered by a deleted plan, the filter says so.
  await my.api("DELETE", `/admin/plans/${plans[0].id}`);
  await page.goto(`${base}/console/api-keys?plan_id=${plans[0].id}`);
  await my.heading("No matching keys").waitFor();
  const selected = page.locator("#plan_filter option:checked");
  await selected.getByText("Deleted plan").waitFor({ state: "attached" });
  await page.getByRole("link", { name: "Clear filters" }).click();
  await rows(20);
  assert.equal(await selected.textContent(), "All plans");

  // Paging works in both directions.
  await page.getByRole("link", { name: "Next page" }).click();
  await page.getByRole("link", { name: "Key 20" }).waitFor();
  const second = search();
  await page.getByRole("link", { name: "Next page" }).click();
  await page.getByRole("link", { name: "Key 00" }).waitFor();
  await rows(1);
  await page.getByRole("link", { name: "Previous page" }).click();
  await page.getByRole("link", { name: "Key 20" }).waitFor();
  assert.equal(search(), second);
  await my.inspect("keys-between");
  await page.getByRole("link", { name: "Previous page" }).click();
  await page.getByRole("link", { name: "Key 40" }).waitFor();
  assert.equal(search(), "");
  assert.equal(await page.getByRole("link", { name: "Previous page" }).count(), 0);

  // After the only item on a page is deleted, the first page of the list is shown.
  await page.getByRole("link", { name: "Next page" }).click();
  await page.getByRole("link", { name: "Key 20" }).waitFor();
  await page.getByRole("link", { name: "Next page" }).click();
  await rows(1);
  await my.field("Select Key 00").check();
  await my.button("Delete").click();
  await my.field('Type "delete 1 key" to confirm').fill("delete 1 key");
  await dialog.getByRole("button", { name: "Delete" }).click();
  await page.getByRole("link", { name: "Key 40" }).waitFor();
  await rows(20);
  assert.equal(search(), "");

  // A failure to load plans is shown, and can be retried.
  const plansCall = "**/admin/plans?*";
  await page.route(plansCall, (route) => route.abort());
  await page.reload();
  await page.getByText("Couldn't load plans.").waitFor();
  await my.inspect("keys-without-plans");
  await page.unroute(plansCall);
  await my.button("Retry").click();
  await page.getByRole("row", { name: /Key 40 .*Plan 100/ }).waitFor();
  assert.equal(await page.getByText("Couldn't load plans.").count(), 0);

  // A form sends only changed fields, so that concurrent changes by other users are kept.
  await page.getByRole("link", { name: "Key 40" }).click();
  await my.heading("Key 40").waitFor();
  await page.locator("dd").getByText("Plan 100").waitFor();
  await my.button("Edit").click();
  assert.equal(await page.locator("#edit_plan").inputValue(), last.id);
  await my.field("Name").fill("Discarded");
  await my.button("Cancel").click();
  await my.button("Edit").click();
  assert.equal(await my.field("Name").inputValue(), "Key 40", "canceled changes are discarded");
  const key = `/admin/api-keys/${keys[40].id}`;
  await my.api("PATCH", key, { name: "Renamed", rpm_override: 7 });
  await page.locator("#edit_plan").selectOption({ label: "Plan 050" });
  await my.field("External ID (optional)").fill("crm-<40>");
  await my.field("Metadata (optional)").fill("region");
  await my.button("Save changes").click();
  await page.getByText("Enter one name=value pair per line").waitFor();
  await page.locator("dialog[open] .field.invalid textarea:focus").waitFor();
  await my.field("Metadata (optional)").fill("region=eu & us\ntier = 2");
  await my.inspect("edit-key");
  await my.button("Save changes").click();
  await my.heading("Renamed").waitFor();
  await page.locator("dd").getByText("eu & us").waitFor();
  await page.getByText("0 of 7 used").waitFor();
  await my.inspect("key-metadata");
  const { name, rpm_override, plan_id, external_id, metadata } = await my.api("GET", key);
  assert.deepEqual([name, rpm_override, plan_id], ["Renamed", 7, plans[50].id]);
  assert.deepEqual([external_id, metadata], ["crm-<40>", { region: "eu & us", tier: "2" }]);
  await page.goto(`${base}/console/api-keys?search=crm-%3C`);
  await page.getByRole("row", { name: /Renamed/ }).waitFor();
  assert.equal(await page.getByRole("row").count(), 2, "the header and one key");

  await page.goto(`${base}/console/plans?sort=-name`);
  await my.button("Edit Plan 100").click();
  assert.equal(await my.field("Burst").inputValue(), "", "a burst that equals the rate is shown as blank");
  const duplicates = await page.evaluate(() => {
    const ids = [...document.querySelectorAll("[id]")].map((it) => it.id);
    return ids.filter((id, at) => ids.indexOf(id) !== at);
  });
  assert.deepEqual(duplicates, [], "element IDs are unique");
  const plan = `/admin/plans/${last.id}`;
  await my.api("PATCH", plan, { daily_quota: 500, billing: "paid" });
  await my.field("Requests per minute").fill("90");
  await my.button("Save changes").click();
  await page.getByRole("row", { name: /Plan 100.*90.*90.*500/ }).waitFor();
  await my.api("PATCH", plan, { default_rpm: 120 });
  const now = await my.api("GET", plan);
  assert.deepEqual([now.default_rpm, now.burst, now.daily_quota, now.billing], [120, 120, 500, "paid"]);

  // Closing a dialog and leaving the page before the response arrives causes no error.
  const leaveBeforeResponse = async (method, address, act, go) => {
    let release;
    const released = new Promise((resolve) => {
      release = resolve;
    });
    await page.route(address, async (route) => {
      if (route.request().method() === method) await released;
      await route.continue();
    });
    await act();
    await page.keyboard.press("Escape");
    await dialog.waitFor({ state: "detached" });
    await go.click();
    await my.heading("Audit log").waitFor();
    const response = page.waitForResponse((it) => it.request().method() === method);
    release();
    await response;
    await page.unroute(address);
    await page.getByRole("row").nth(1).waitFor();
  };
  const send = async (method, press) => {
    const sent = page.waitForRequest((it) => it.method() === method);
    await press();
    await sent;
  };
  await my.button("Create plan").click();
  await my.field("Name").fill("Plan 102");
  await leaveBeforeResponse("POST", "**/admin/plans", () => send("POST", () => my.button("Create plan").click()), my.navigate("Audit log"));
  await my.navigate("Plans").click();
  await my.choose("Plan 102", "Delete");
  await leaveBeforeResponse("DELETE", "**/admin/plans/*", () => send("DELETE", () => my.button("Delete plan").click()), my.navigate("Audit log"));
  await my.navigate("API keys").click();
  await page.getByRole("link", { name: "Key 39" }).click();
  await my.button("Delete").click();
  await leaveBeforeResponse("DELETE", "**/admin/api-keys/*", () => send("DELETE", () => my.button("Delete key").click()), my.navigate("Audit log"));
  await page.getByText(/^Key .* deleted$/).waitFor();
  assert.equal(new URL(page.url()).pathname, "/console/audit");
  await my.context.close();
}
