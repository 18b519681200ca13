// The whole journey by keyboard alone: nothing here points at anything. Wherever the focus comes to rest, it is
// seen; after each dialog it is back where it was, or at least not lost.

import assert from "node:assert/strict";
import { named, password } from "./world.mjs";

export async function keyboard(world) {
  const my = await world.visitor();
  const { page, base } = my;
  const press = (key) => page.keyboard.press(key);
  const type = (text) => page.keyboard.type(text);
  const keys = async (text) => {
    for (const key of text) await press(key);
  };

  /** What has the focus, as tests and people know it, and whether it is seen to have it. */
  const focus = () =>
    page.evaluate(() => {
      const it = document.activeElement;
      const style = getComputedStyle(it);
      const outline = style.outlineStyle !== "none" && Number.parseFloat(style.outlineWidth) >= 2;
      const label = it.getAttribute("aria-label") ?? it.labels?.[0]?.textContent ?? it.textContent;
      // The content of a page takes the focus with the page: all of it is where one is.
      return { tag: it.tagName, id: it.id, name: label.trim(), seen: outline || it.id === "content" || it.tagName === "DIALOG" };
    });
  /** Presses Tab until something of this name has the focus; `Shift+Tab` goes back. */
  const to = async (name, key = "Tab") => {
    const passed = [];
    for (let presses = 0; presses < 60; presses += 1) {
      const it = await focus();
      if (passed.length && it.tag !== "BODY") assert.ok(it.seen, `the focus is not seen: ${JSON.stringify(it)}`);
      if (it.name === name) return;
      passed.push(it.name.slice(0, 40));
      await press(key);
    }
    assert.fail(`no way to ${name} by ${key}: ${passed.join(" · ")}`);
  };
  const has = async (name) => {
    await page.waitForFunction((name) => {
      const it = document.activeElement;
      return (it.getAttribute("aria-label") ?? it.labels?.[0]?.textContent ?? it.textContent).trim() === name;
    }, name);
  };
  const isSomewhere = async () => assert.notEqual((await focus()).tag, "BODY", "the focus is lost");
  const path = () => new URL(page.url()).pathname;

  await page.goto(`${base}/console`);
  await my.heading("Sign in").waitFor();
  await to("Create an account");
  await press("Enter");
  await my.heading("Create an account").waitFor();
  await to("Email");
  await type(my.email);
  await press("Tab");
  await type(password);
  await to("Create account");
  await press("Enter");
  await my.heading("Home").waitFor();

  // The first stop leads past the navigation.
  await page.reload();
  await my.heading("Home").waitFor();
  await to("Skip to content");
  await press("Enter");
  await to("New plan");
  assert.equal(await page.evaluate(() => document.activeElement.closest("main")?.id), "content");

  // Shortcuts are told of, and can be switched off.
  await press("?");
  await my.heading("Keyboard shortcuts").waitFor();
  await keys("gp");
  assert.equal(path(), "/console", "no shortcut acts within a dialog");
  await to("Shortcuts of single characters", "Shift+Tab");
  await press("Space");
  await press("Escape");
  await has("New plan");
  await keys("gp?");
  await page.waitForTimeout(300);
  assert.equal(path(), "/console");
  assert.equal(await page.locator("dialog[open]").count(), 0);
  await press("Control+k");
  await type("shortcuts");
  await press("Enter");
  await my.heading("Keyboard shortcuts").waitFor();
  await to("Shortcuts of single characters", "Shift+Tab");
  await press("Space");
  await press("Escape");

  await keys("gp");
  await my.heading("No plans yet").waitFor();
  await isSomewhere();
  await keys("np");
  await my.heading("New plan").waitFor();
  await has("Name");
  // What is typed is text, and no shortcut.
  await type("gk n? Keyboard");
  await press("Tab");
  await press("Control+a");
  await type("30");
  await press("Tab");
  await type("5");
  await press("Enter");
  await page.getByRole("row", { name: /gk n\? Keyboard/ }).waitFor();
  assert.equal(path(), "/console/plans");
  await isSomewhere();
  await to("Edit gk n? Keyboard");
  await press("Enter");
  await has("Name");
  await press("Control+a");
  await type("By hand");
  await press("Enter");
  await has("Edit By hand");

  await press("Control+k");
  await has("Command, or the name of an API key");
  await type("api key make");
  await press("Enter");
  await my.heading("New API key").waitFor();
  await has("Name");
  await type("Keyboard key");
  await to("Make key");
  await press("Enter");
  await my.heading(`The key of ${named("Keyboard key")}`).waitFor();
  await to("Send until 429");
  await press("Enter");
  await my.status(429);
  await to("I stored it");
  await press("Space");
  await press("Tab");
  await has("Done");
  await press("Enter");
  await page.getByRole("link", { name: "Keyboard key" }).waitFor();
  await isSomewhere();

  // The palette finds it by its name, and arrows choose.
  await press("Control+k");
  await type("keyboard");
  await page.getByRole("option", { name: "Keyboard key" }).waitFor();
  await press("ArrowDown");
  assert.equal(await page.locator("[role=option][aria-selected=true]").count(), 1);
  await press("Enter");
  await my.heading("Keyboard key").waitFor();

  await to("Deactivate");
  await press("Enter");
  await has("Cancel");
  await press("Enter");
  await has("Deactivate");
  await press("Enter");
  await has("Cancel");
  await press("Tab");
  await press("Enter");
  await has("Activate");
  await page.waitForTimeout(1000);
  await to("Send 1");
  await press("Enter");
  await my.status(401);
  await has("Send 1");
  await to("Activate", "Shift+Tab");
  await press("Enter");
  await has("Deactivate");
  await page.waitForTimeout(3000);
  await to("Send 1");
  await press("Enter");
  await my.status(200);

  // Typed into a field, what would be a shortcut is text.
  await press("/");
  await has("Search");
  await type("gp/?");
  await page.waitForFunction(() => location.search.includes("search=gp"));
  await my.heading("No key is like that").waitFor();
  assert.equal(await page.getByRole("searchbox").inputValue(), "gp/?");
  assert.equal(await page.locator("dialog[open]").count(), 0);
  await press("Control+a");
  await press("Delete");
  await page.getByRole("link", { name: "Keyboard key" }).waitFor();
  await to("Keyboard key");
  await press("Enter");
  await my.heading("Keyboard key").waitFor();
  await to("Delete");
  await press("Enter");
  await has("Cancel");
  await press("Escape");
  await has("Delete");
  await press("Enter");
  await has("Cancel");
  await press("Tab");
  await press("Enter");
  await my.heading("No keys yet").waitFor();
  await isSomewhere();

  await press("Control+k");
  await type("sign out");
  await press("Enter");
  await my.heading("Sign in").waitFor();
  await to("Email");
  await type(my.email);
  await press("Tab");
  await type(password);
  await press("Enter");
  await my.heading("API keys").waitFor();
  await my.context.close();
}
