// Tests the main journey using only the keyboard. The focus must always be visible, and must not be lost when a dialog
// closes.

import assert from "node:assert/strict";
import { password, quoted } from "./world.mjs";

export async function keyboard(world) {
  const my = await world.visitor();
  const { page, base } = my;
  const press = (key) => page.keyboard.press(key);
  const type = (text) => page.keyboard.type(text);
  const keys = async (text) => {
    for (const key of text) await press(key);
  };

  /** Returns the focused element: its accessible name, and whether its focus is visible. */
  const focus = () =>
    page.evaluate(() => {
      const it = document.activeElement;
      const style = getComputedStyle(it);
      const outline = style.outlineStyle !== "none" && Number.parseFloat(style.outlineWidth) >= 2;
      const label = it.getAttribute("aria-label") ?? it.labels?.[0]?.textContent ?? it.textContent;
      // The page's content, which has the focus after navigation, needs no outline.
      return { tag: it.tagName, id: it.id, name: label.trim(), visible: outline || it.id === "content" || it.tagName === "DIALOG" };
    });
  /** Presses Tab, or another key, until an element with this name has the focus. */
  const to = async (name, key = "Tab") => {
    const passed = [];
    for (let presses = 0; presses < 60; presses += 1) {
      const it = await focus();
      if (passed.length && it.tag !== "BODY") assert.ok(it.visible, `the focus is not visible: ${JSON.stringify(it)}`);
      if (it.name === name) return;
      passed.push(it.name.slice(0, 40));
      await press(key);
    }
    assert.fail(`cannot reach ${name} with ${key}: ${passed.join(" · ")}`);
  };
  const hasFocus = async (name) => {
    await page.waitForFunction((name) => {
      const it = document.activeElement;
      return (it.getAttribute("aria-label") ?? it.labels?.[0]?.textContent ?? it.textContent).trim() === name;
    }, name);
  };
  const isNotLost = async () => assert.notEqual((await focus()).tag, "BODY", "the focus is lost");
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

  // The first tab stop is a link that skips the navigation.
  await page.reload();
  await page.getByRole("link", { name: "Create plan" }).waitFor();
  await to("Skip to content");
  await press("Enter");
  await to("Create plan");
  assert.equal(await page.evaluate(() => document.activeElement.closest("main")?.id), "content");

  // A dialog lists the shortcuts. Single-key shortcuts can be turned off.
  await press("?");
  await my.heading("Keyboard shortcuts").waitFor();
  await keys("gp");
  assert.equal(path(), "/console", "shortcuts are off in dialogs");
  await to("Single-key shortcuts", "Shift+Tab");
  await press("Space");
  await press("Escape");
  await hasFocus("Create plan");
  await keys("gp?");
  await page.waitForTimeout(300);
  assert.equal(path(), "/console");
  assert.equal(await page.locator("dialog[open]").count(), 0);
  await press("Control+k");
  await type("shortcuts");
  await press("Enter");
  await my.heading("Keyboard shortcuts").waitFor();
  await to("Single-key shortcuts", "Shift+Tab");
  await press("Space");
  await press("Escape");

  await keys("gp");
  await my.heading("No plans yet").waitFor();
  await isNotLost();
  await keys("np");
  await my.heading("Create plan").waitFor();
  await hasFocus("Name");
  // While the user types in a field, single-key shortcuts are off.
  await type("gk n? Keyboard");
  await press("Tab");
  await press("Control+a");
  await type("30");
  await press("Tab");
  await type("5");
  await press("Enter");
  await page.getByRole("row", { name: /gk n\? Keyboard/ }).waitFor();
  assert.equal(path(), "/console/plans");
  await isNotLost();
  await to("Edit gk n? Keyboard");
  await press("Enter");
  await hasFocus("Name");
  await press("Control+a");
  await type("By hand");
  await press("Enter");
  await hasFocus("Edit By hand");

  await press("Control+k");
  await hasFocus("Type a command or the name of an API key or plan");
  await type("api key create");
  await press("Enter");
  await my.heading("Create API key").waitFor();
  await hasFocus("Name");
  await type("Keyboard key");
  await to("Create key");
  await press("Enter");
  await my.heading(`Save your key for ${quoted("Keyboard key")}`).waitFor();
  await to("Send until 429");
  await press("Enter");
  await my.status(429);
  await to("I've saved this key");
  await press("Space");
  await press("Tab");
  await hasFocus("Done");
  await press("Enter");
  await page.getByRole("link", { name: "Keyboard key" }).waitFor();
  await isNotLost();

  // The palette finds the key by name; arrow keys select an option.
  await press("Control+k");
  await type("keyboard");
  await page.getByRole("option", { name: "Keyboard key" }).waitFor();
  await press("ArrowDown");
  assert.equal(await page.locator("[role=option][aria-selected=true]").count(), 1);
  await press("Enter");
  await my.heading("Keyboard key").waitFor();

  await to("Deactivate");
  await press("Enter");
  await hasFocus("Cancel");
  await press("Enter");
  await hasFocus("Deactivate");
  await press("Enter");
  await hasFocus("Cancel");
  await press("Tab");
  await press("Enter");
  await hasFocus("Activate");
  await page.waitForTimeout(1000);
  await to("Send 1");
  await press("Enter");
  await my.status(401);
  await hasFocus("Send 1");
  await to("Activate", "Shift+Tab");
  await press("Enter");
  await hasFocus("Deactivate");
  await page.waitForTimeout(3000);
  await to("Send 1");
  await press("Enter");
  await my.status(200);

  // In the search field, shortcut keys are typed as text.
  await press("/");
  await hasFocus("Search");
  await type("gp/?");
  await page.waitForFunction(() => location.search.includes("search=gp"));
  await my.heading("No matching keys").waitFor();
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
  await hasFocus("Cancel");
  await press("Escape");
  await hasFocus("Delete");
  await press("Enter");
  await hasFocus("Cancel");
  await to("Delete key");
  await press("Enter");
  await my.heading("No keys yet").waitFor();
  await isNotLost();

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
