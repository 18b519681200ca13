// Tests that users cannot accidentally leave a page while it creates or shows a secret. Secrets are shown only once.

import assert from "node:assert/strict";
import { quoted } from "./world.mjs";

export async function once(world) {
  const my = await world.visitor();
  const { page, base } = my;
  await my.registered("Once");
  await my.api("POST", "/admin/plans", { name: "Starter", default_rpm: 60 });
  const path = () => new URL(page.url()).pathname;
  const copied = () => page.evaluate(() => navigator.clipboard.readText());
  // Before a reload, the browser asks for confirmation; the test chooses to stay.
  let prompts = 0;
  page.on("dialog", (dialog) => {
    prompts += 1;
    return dialog.dismiss();
  });
  /** Tries every way to leave a locked dialog. */
  const tryToLeave = async (what) => {
    const [here, length] = [page.url(), await page.evaluate(() => history.length)];
    const before = prompts;
    await page.keyboard.press("Escape");
    await page.keyboard.press("Escape");
    await page.evaluate(() => document.querySelector("dialog[open] .actions.end .button").click());
    await page.evaluate(() => history.back());
    await page.waitForTimeout(200);
    await page.evaluate(() => {
      history.pushState(null, "", "/console/plans");
      dispatchEvent(new PopStateEvent("popstate"));
      document.querySelector("nav a[href$='audit']").click();
    });
    await page.keyboard.press("g");
    await page.keyboard.press("p");
    await page.waitForTimeout(200);
    assert.equal(page.url(), here, `${what}: the page has not changed`);
    assert.ok((await page.evaluate(() => history.length)) >= length);
    await page.evaluate(() => location.reload());
    const deadline = Date.now() + 15_000;
    while (prompts === before && Date.now() < deadline) await page.waitForTimeout(50);
    // A second prompt would soon follow the first.
    await page.waitForTimeout(200);
    assert.equal(prompts, before + 1, `${what}: the browser asks before reloading`);
  };
  /** Clicks a button, delays the response to the request that it sends, and tries to leave the page in the meantime. */
  const submitSlowly = async (address, button) => {
    let release;
    const released = new Promise((resolve) => {
      release = resolve;
    });
    await page.route(address, async (route) => {
      if (route.request().method() === "POST") await released;
      await route.continue();
    });
    const sent = page.waitForRequest((it) => it.method() === "POST");
    await my.button(button).click();
    await sent;
    assert.equal(await my.button("Cancel").getAttribute("aria-disabled"), "true");
    await tryToLeave(button);
    const response = page.waitForResponse((it) => it.request().method() === "POST");
    release();
    await response;
    await page.unroute(address);
  };
  const save = async () => {
    await page.getByLabel(/^I've saved this/).check();
    await my.button("Done").click();
    await page.locator("dialog[open]").waitFor({ state: "detached" });
  };

  await my.navigate("API keys").click();
  await my.button("Create key").click();
  await my.field("Name").fill("App");
  await submitSlowly("**/admin/api-keys", "Create key");
  await my.heading(`Save your key for ${quoted("App")}`).waitFor();
  const key = await page.locator("#secret").textContent();
  assert.match(key, /^qk_[0-9A-Za-z]{38}$/);
  await tryToLeave("a new key");
  assert.equal(await page.locator("#secret").textContent(), key);
  // If copying fails, the dialog says so.
  await page.evaluate(() => {
    navigator.clipboard.writeText = () => Promise.reject(new Error("denied"));
    document.execCommand = () => false;
  });
  await my.button("Copy key").click();
  await page.locator("dialog[open]").getByText("Couldn't copy.").waitFor();
  await my.inspect("key-copy-failed");
  await save();
  assert.equal((await my.api("GET", "/admin/api-keys")).total, 1);

  // The key can be copied again until the page is closed or reloaded.
  await page.getByRole("link", { name: "App" }).click();
  await my.heading("App").waitFor();
  await page.evaluate(() => {
    delete navigator.clipboard.writeText;
    delete document.execCommand;
  });
  await my.button("Copy key").click();
  await page.getByText("Copied").first().waitFor();
  assert.equal(await copied(), key);
  await my.inspect("key-known");
  await my.button("Rotate").click();
  await my.heading(`Rotate key ${quoted("App")}`).waitFor();
  assert.equal(await page.getByText("This key was rotated recently").count(), 0);
  await submitSlowly("**/rotate", "Rotate key");
  await my.heading(`Save your key for ${quoted("App")}`).waitFor();
  const second = await page.locator("#secret").textContent();
  assert.notEqual(second, key);
  await tryToLeave("a rotated key");
  assert.equal(await page.locator("#secret").textContent(), second);
  await save();
  await page.getByText("Previous secret").waitFor();
  // Rotating again revokes the previous secret.
  await my.button("Rotate").click();
  await page.getByText("This key was rotated recently. If you rotate it again, the previous secret is revoked immediately instead of expiring in 23 hours.").waitFor();
  await my.inspect("key-rotate-again");
  await my.button("Rotate key").click();
  await my.heading(`Save your key for ${quoted("App")}`).waitFor();
  await save();

  // If the key has been rotated since the page was loaded, the warning appears before any secret is revoked.
  const { items: [app] } = await my.api("GET", "/admin/api-keys");
  await my.api("POST", `/admin/api-keys/${app.id}/rotate`, { grace_seconds: 0, replace_previous: true });
  await page.reload();
  await my.heading("App").waitFor();
  await my.button("Rotate").click();
  assert.equal(await page.getByText("This key was rotated recently").count(), 0);
  await my.api("POST", `/admin/api-keys/${app.id}/rotate`, { grace_seconds: 3600 });
  world.expected = /status of 409/;
  await my.button("Rotate key").click();
  await page.getByRole("alert").getByText("This key was rotated recently.").waitFor();
  world.expected = undefined;
  assert.equal((await my.api("GET", "/admin/audit?action=api_key.rotate")).total, 4, "nothing was rotated");
  await my.button("Rotate key").click();
  await my.heading(`Save your key for ${quoted("App")}`).waitFor();
  await save();
  await page.reload();
  assert.equal(path().split("/").length, 4, "without a locked dialog the page reloads");
  await page.getByText("Quota doesn't store the full key.").waitFor();

  await my.navigate("Service tokens").click();
  await my.button("Create token").click();
  await my.field("Name").fill("Gateway");
  await submitSlowly("**/admin/service-tokens", "Create token");
  await my.heading(`Save your token for ${quoted("Gateway")}`).waitFor();
  const token = await page.locator("#secret").textContent();
  assert.match(token, /^qs_[0-9A-Za-z]{38}$/);
  await tryToLeave("a new token");
  assert.equal(await page.locator("#secret").textContent(), token);
  await save();
  await my.navigate("Plans").click();
  await my.heading("Plans").waitFor();
  await my.context.close();
}
