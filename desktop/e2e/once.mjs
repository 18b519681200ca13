// A text that is shown once is not lost: neither while its request is under way, nor by going elsewhere.

import assert from "node:assert/strict";
import { named } from "./world.mjs";

export async function once(world) {
  const my = await world.visitor();
  const { page, base } = my;
  await my.registered("Once");
  await my.api("POST", "/admin/plans", { name: "Starter", default_rpm: 60 });
  const path = () => new URL(page.url()).pathname;
  const copied = () => page.evaluate(() => navigator.clipboard.readText());
  // What a slip of the hand does: browsers ask before they reload, and here are told to stay.
  let asked = 0;
  page.on("dialog", (dialog) => {
    asked += 1;
    return dialog.dismiss();
  });
  /** Tries every way out of a dialog that stays. */
  const leave = async (id) => {
    const [here, length] = [page.url(), await page.evaluate(() => history.length)];
    const before = asked;
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
    assert.equal(page.url(), here, `${id}: it stays where it is`);
    assert.ok((await page.evaluate(() => history.length)) >= length);
    await page.evaluate(() => location.reload());
    await page.waitForTimeout(200);
    assert.equal(asked, before + 1, `${id}: the browser asks before it reloads`);
  };
  /** Holds the answer to what the button sends, tries to leave, and lets it come. */
  const held = async (address, button) => {
    let release;
    const released = new Promise((done) => {
      release = done;
    });
    await page.route(address, async (route) => {
      if (route.request().method() === "POST") await released;
      await route.continue();
    });
    const sent = page.waitForRequest((it) => it.method() === "POST");
    await my.button(button).click();
    await sent;
    assert.equal(await my.button("Cancel").getAttribute("aria-disabled"), "true");
    await leave(button);
    const answered = page.waitForResponse((it) => it.request().method() === "POST");
    release();
    await answered;
    await page.unroute(address);
  };
  const store = async () => {
    await page.getByLabel("I stored it").check();
    await my.button("Done").click();
    await page.locator("dialog[open]").waitFor({ state: "detached" });
  };

  await my.place("API keys").click();
  await my.button("New key").click();
  await my.field("Name").fill("App");
  await held("**/admin/api-keys", "Make key");
  await my.heading(`The key of ${named("App")}`).waitFor();
  const text = await page.locator("#key-text").textContent();
  assert.match(text, /^qk_[0-9A-Za-z]{38}$/);
  await leave("the text of a key");
  assert.equal(await page.locator("#key-text").textContent(), text);
  // That copying is refused is said where it is seen and heard.
  await page.evaluate(() => {
    navigator.clipboard.writeText = () => Promise.reject(new Error("refused"));
    document.execCommand = () => false;
  });
  await my.button("Copy the key").click();
  await page.locator("dialog[open]").getByText("Copying was not allowed.").waitFor();
  await my.look("key-copy-refused");
  await store();
  assert.equal((await my.api("GET", "/admin/api-keys")).total, 1);

  // As long as the window knows it, it can be copied again.
  await page.getByRole("link", { name: "App" }).click();
  await my.heading("App").waitFor();
  await page.evaluate(() => {
    delete navigator.clipboard.writeText;
    delete document.execCommand;
  });
  await my.button("Copy the key").click();
  await page.getByText("Copied").first().waitFor();
  assert.equal(await copied(), text);
  await my.look("key-known");
  await my.button("Rotate").click();
  await my.heading(`Rotate ${named("App")}`).waitFor();
  assert.equal(await page.getByText("It was rotated before").count(), 0);
  await held("**/rotate", "Rotate key");
  await my.heading(`The key of ${named("App")}`).waitFor();
  const second = await page.locator("#key-text").textContent();
  assert.notEqual(second, text);
  await leave("the text of a rotation");
  assert.equal(await page.locator("#key-text").textContent(), second);
  await store();
  await page.getByText("Text before the rotation").waitFor();
  // Whoever rotates again ends the text that is in its grace.
  await my.button("Rotate").click();
  await page.getByText("It was rotated before: the text from before that, which would end in 23 hours, ends now.").waitFor();
  await my.look("key-rotate-again");
  await my.button("Cancel").click();
  await page.reload();
  assert.equal(path().split("/").length, 4, "where nothing is held a reload is one");
  await page.getByText("Its text is not stored here.").waitFor();

  await my.place("Service tokens").click();
  await my.button("New token").click();
  await my.field("Name").fill("Gateway");
  await held("**/admin/service-tokens", "Make token");
  await my.heading(`The token of ${named("Gateway")}`).waitFor();
  const token = await page.locator("#token-text").textContent();
  assert.match(token, /^qs_[0-9A-Za-z]{38}$/);
  await leave("the text of a token");
  assert.equal(await page.locator("#token-text").textContent(), token);
  await store();
  await my.place("Plans").click();
  await my.heading("Plans").waitFor();
  await my.context.close();
}
