// What a new tenant does from signing up to watching a key run dry, with a mouse. Every page is looked at.

import assert from "node:assert/strict";
import { named, password } from "./world.mjs";

const awkward = `<b>Mobile</b> \u202eתוכנית 🚀 ${"long ".repeat(30)}`.trim();

export async function tour(world) {
  const my = await world.visitor();
  const { page, base } = my;

  // Whoever is not signed in is sent to sign in, and comes back.
  await page.goto(`${base}/console/plans`);
  await my.heading("Sign in").waitFor();
  assert.match(page.url(), /\/console\/sign-in\?next=%2Fconsole%2Fplans$/);
  // All that a first visit loads, as it travels, and when something can be done with it.
  const first = await page.evaluate(() => {
    const loaded = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")];
    return { bytes: loaded.reduce((sum, it) => sum + it.transferSize, 0), files: loaded.length, ms: performance.now() };
  });
  console.log(`a first visit loads ${first.bytes} bytes in ${first.files} files and can be used after ${Math.round(first.ms)} ms`);
  assert.ok(first.bytes > 100_000 && first.bytes <= 300_000, `${first.bytes} bytes`);
  await my.look("sign-in");
  await page.getByRole("link", { name: "Create an account" }).click();
  await my.heading("Create an account").waitFor();
  await page.getByLabel("Email").fill(my.email);
  await page.getByLabel("Password").fill("password1234");
  await my.button("Create account").click();
  await page.locator(".field.invalid").waitFor();
  await my.look("register");
  await page.getByLabel("Password").fill(password);
  await my.button("Create account").click();
  await my.heading("Plans").waitFor();
  assert.equal(new URL(page.url()).pathname, "/console/plans");
  await my.heading("No plans yet").waitFor();
  await my.look("plans-empty");

  // No token is where a script could read it.
  const readable = await page.evaluate(() => JSON.stringify([document.cookie, { ...localStorage }, { ...sessionStorage }]));
  assert.ok(!/eyJ|qr_/.test(readable), readable);
  const cookies = await my.context.cookies();
  assert.equal(cookies.filter((it) => it.httpOnly && it.sameSite === "Lax").length, 2);

  await my.place("Home").click();
  await my.heading("First steps").waitFor();
  await my.look("home-first");

  await page.getByRole("link", { name: "New plan" }).click();
  await my.heading("New plan").waitFor();
  await page.getByLabel("Name").fill("Starter");
  await page.getByLabel("Requests a minute").fill("30");
  await page.getByLabel("Burst").fill("5");
  await my.look("plan-new");
  await my.button("Make plan").click();
  await page.getByRole("row", { name: /Starter/ }).waitFor();
  await my.button("New plan").click();
  await page.getByLabel("Name").fill(awkward);
  await my.button("Make plan").click();
  await page.getByRole("row", { name: /Mobile/ }).waitFor();
  assert.equal(await page.locator("table b").count(), 0);
  await my.button("Edit Starter").click();
  await page.getByLabel("A day").fill("1 000");
  const uncounted = page.getByLabel("When requests cannot be counted");
  assert.ok(!(await uncounted.isVisible()));
  await page.getByText("Advanced").click();
  await uncounted.selectOption("closed");
  await my.look("plans");
  await my.button("Save").click();
  await page.getByRole("cell", { name: /1.000/ }).waitFor();
  await my.button("Edit Starter").click();
  assert.ok(await uncounted.isVisible(), "what is not as usual is not hidden");
  assert.equal(await uncounted.inputValue(), "closed");
  await my.button("Cancel").click();

  await my.place("API keys").click();
  await my.heading("No keys yet").waitFor();
  await my.button("New key").click();
  await page.getByLabel("Name").fill("Mobile app");
  await page.locator("#key_plan").selectOption({ label: "Starter, 30 a minute" });
  await my.look("key-new");
  await my.button("Make key").click();
  await my.heading(`The key of ${named("Mobile app")}`).waitFor();
  const text = await page.locator("#key-text").textContent();
  assert.match(text, /^qk_[0-9A-Za-z]{38}$/);
  await my.button("Copy the key").click();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), text);
  // Neither Escape nor an unticked box closes it.
  for (const _ of [1, 2, 3]) await page.keyboard.press("Escape");
  assert.ok(await my.button("Done").isDisabled());
  await my.button("Send until 429").click();
  await page.locator(".status[data-status='429']").waitFor();
  await page.locator(".countdown").waitFor();
  assert.match(await page.locator(".outcome").textContent(), /[5-9] requests admitted, 1 limited/);
  await my.look("key-text");
  await page.getByLabel("I stored it").check();
  await my.button("Done").click();
  await page.getByRole("link", { name: "Mobile app" }).waitFor();
  await my.look("keys");

  // Filters are in the address.
  await page.getByRole("searchbox", { name: "Search" }).fill("nothing like it");
  await my.heading("No key is like that").waitFor();
  assert.match(page.url(), /search=nothing/);
  await page.getByRole("link", { name: "Show all keys" }).click();
  await page.getByRole("link", { name: "Mobile app" }).click();
  await my.heading("Mobile app").waitFor();

  await my.button("Deactivate").click();
  await my.heading(`Deactivate ${named("Mobile app")}?`).waitFor();
  await my.button("Deactivate key").click();
  await my.button("Activate").waitFor();
  await page.waitForTimeout(1000);
  await my.button("Send 1").click();
  await page.locator(".status[data-status='401']").waitFor();
  await my.button("Activate").click();
  await my.button("Deactivate").waitFor();
  await page.waitForTimeout(3000);
  await my.button("Send 1").click();
  await page.locator(".status[data-status='200']").waitFor();
  await my.look("key");

  await my.button("Rotate").click();
  await my.button("Rotate key").click();
  await my.heading(`The key of ${named("Mobile app")}`).waitFor();
  assert.notEqual(await page.locator("#key-text").textContent(), text);
  await page.getByLabel("I stored it").check();
  await my.button("Done").click();
  await page.getByText("Text before the rotation").waitFor();

  // A plan with keys is not deleted, and says why.
  await my.place("Plans").click();
  await my.button("Delete Starter").click();
  await my.heading("This plan is in use").waitFor();
  await my.look("plan-in-use");
  await page.getByRole("link", { name: "Show its keys" }).click();
  await page.getByRole("link", { name: "Mobile app" }).click();
  await my.button("Delete").click();
  await my.button("Delete key").click();
  await my.heading("No keys yet").waitFor();
  await my.place("Plans").click();
  await my.button("Delete Starter").click();
  await my.heading(`Delete the plan ${named("Starter")}?`).waitFor();
  await my.look("plan-delete");
  await my.button("Delete plan").click();
  await page.getByRole("row", { name: /Starter/ }).waitFor({ state: "detached" });

  await my.place("Service tokens").click();
  await my.heading("No service tokens yet").waitFor();
  await my.button("New token").click();
  await page.getByLabel("Name").fill("Edge gateway");
  await my.button("Make token").click();
  await my.heading(`The token of ${named("Edge gateway")}`).waitFor();
  const token = await page.locator("#token-text").textContent();
  assert.match(await page.locator("dialog[open] .code").last().textContent(), new RegExp(token));
  await my.look("token-text");
  await page.getByLabel("I stored it").check();
  await my.button("Done").click();
  await page.getByRole("row", { name: /Edge gateway/ }).waitFor();
  await my.look("tokens");

  await my.place("Audit").click();
  await page.getByRole("rowheader", { name: "API key rotated" }).waitFor();
  await my.look("audit");

  await my.place("Settings").click();
  await my.heading("Where you are signed in").waitFor();
  await page.getByText("this device").waitFor();
  await my.look("settings");
  await page.getByLabel("Time zone for quotas").fill("Europe/Berlin");
  await my.button("Save").click();
  await page.getByText("Profile saved.").waitFor();
  await page.getByLabel("Dark").check();
  assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), "dark");
  await page.getByLabel("System", { exact: true }).check();

  await my.place("Home").click();
  await page.getByText("First steps").waitFor();
  await my.look("home");
  await page.getByRole("button", { name: "Jump to" }).click();
  await my.field("Command, or the name of an API key").fill("plan");
  await page.getByRole("option", { name: "Search API keys for" }).waitFor();
  await my.look("palette");
  await my.field("Command, or the name of an API key").fill("shortcuts");
  await page.getByRole("option", { name: "Show keyboard shortcuts" }).click();
  await my.heading("Keyboard shortcuts").waitFor();
  await my.look("shortcuts");
  await my.button("Close").click();
  await page.goto(`${base}/console/nowhere`);
  await my.heading("There is no such page").waitFor();
  await my.look("not-found");
  await my.context.close();
}
