// The console in Chromium, against the real server on its embedded default: what a new tenant does from signing
// up to watching a key run dry. Every page is held against axe, light and dark, wide and narrow.
//
// node journey.mjs CHROMIUM ADDRESS [FOLDER-FOR-SCREENSHOTS]

import assert from "node:assert/strict";
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [executablePath, base, shots] = process.argv.slice(2);
const axeSource = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const forms = [
  { theme: "light", width: 1280, height: 800 },
  { theme: "dark", width: 1280, height: 800 },
  { theme: "light", width: 390, height: 844 },
  { theme: "dark", width: 390, height: 844 },
];
if (shots) mkdirSync(shots, { recursive: true });

const browser = await chromium.launch({
  executablePath,
  args: [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
const context = await browser.newContext({ viewport: { width: 1280, height: 800 } });
await context.grantPermissions(["clipboard-read", "clipboard-write"], { origin: base });
const page = await context.newPage();
page.setDefaultTimeout(15_000);
const complaints = [];
page.on("pageerror", (error) => complaints.push(`error: ${error.message}`));
page.on("console", (message) => {
  // Refusals are what the journey is about, and browsers log each.
  if (message.type() === "error" && !/status of (401|422|429)/.test(message.text())) complaints.push(message.text());
});

let looked = 0;
const violations = [];
/** Shows what is there in its four forms, and holds each against axe. */
async function look(name) {
  for (const { theme, width, height } of forms) {
    await page.setViewportSize({ width, height });
    await page.emulateMedia({ colorScheme: theme, reducedMotion: "reduce" });
    await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
    const form = `${name} ${theme} ${width}`;
    await page.evaluate(axeSource);
    const found = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
    for (const it of found.violations) {
      violations.push(`${form}: ${it.id}: ${it.help}\n    ${it.nodes.map((node) => node.html).join("\n    ")}`);
    }
    const overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    if (overflow > 0) violations.push(`${form}: wider than the window by ${overflow} px`);
    if (shots) await page.screenshot({ path: join(shots, `${name}-${theme}-${width}.png`) });
    looked += 1;
  }
  await page.setViewportSize({ width: 1280, height: 800 });
}

const button = (name) => page.getByRole("button", { name, exact: true });
/** A name as sentences hold it, kept from reaching out of itself. */
const named = (name) => `\u2068${name}\u2069`;
const heading = (name) => page.getByRole("heading", { name, exact: true }).first();
const place = (name) => page.getByRole("navigation", { name: "Console" }).getByRole("link", { name, exact: true });
const password = "violet-harbour-quilt-93";
const email = `e2e-${Date.now()}@example.com`;
const awkward = `<b>Mobile</b> \u202eתוכנית 🚀 ${"long ".repeat(30)}`.trim();

try {
  // Whoever is not signed in is sent to sign in, and comes back.
  await page.goto(`${base}/console/plans`);
  await heading("Sign in").waitFor();
  assert.match(page.url(), /\/console\/sign-in\?next=%2Fconsole%2Fplans$/);
  await look("sign-in");
  await page.getByRole("link", { name: "Create an account" }).click();
  await heading("Create an account").waitFor();
  await page.getByLabel("Email").fill(email);
  await page.getByLabel("Password").fill("password1234");
  await button("Create account").click();
  await page.locator(".field.invalid").waitFor();
  await look("register");
  await page.getByLabel("Password").fill(password);
  await button("Create account").click();
  await heading("Plans").waitFor();
  assert.equal(new URL(page.url()).pathname, "/console/plans");
  await heading("No plans yet").waitFor();
  await look("plans-empty");

  // No token is where a script could read it.
  const readable = await page.evaluate(() => JSON.stringify([document.cookie, { ...localStorage }, { ...sessionStorage }]));
  assert.ok(!/eyJ|qr_/.test(readable), readable);
  const cookies = await context.cookies();
  assert.equal(cookies.filter((it) => it.httpOnly && it.sameSite === "Lax").length, 2);

  await place("Home").click();
  await heading("First steps").waitFor();
  await look("home-first");

  await page.getByRole("link", { name: "New plan" }).click();
  await heading("New plan").waitFor();
  await page.getByLabel("Name").fill("Starter");
  await page.getByLabel("Requests a minute").fill("30");
  await page.getByLabel("Burst").fill("5");
  await look("plan-new");
  await button("Make plan").click();
  await page.getByRole("row", { name: /Starter/ }).waitFor();
  await button("New plan").click();
  await page.getByLabel("Name").fill(awkward);
  await button("Make plan").click();
  await page.getByRole("row", { name: /Mobile/ }).waitFor();
  assert.equal(await page.locator("table b").count(), 0);
  await button("Edit Starter").click();
  await page.getByLabel("A day").fill("1 000");
  await look("plans");
  await button("Save").click();
  await page.getByRole("cell", { name: /1.000/ }).waitFor();

  await place("API keys").click();
  await heading("No keys yet").waitFor();
  await button("New key").click();
  await page.getByLabel("Name").fill("Mobile app");
  await page.locator("#key_plan").selectOption({ label: "Starter, 30 a minute" });
  await look("key-new");
  await button("Make key").click();
  await heading(`The key of ${named("Mobile app")}`).waitFor();
  const text = await page.locator("#key-text").textContent();
  assert.match(text, /^qk_[0-9A-Za-z]{38}$/);
  await button("Copy the key").click();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), text);
  // Neither Escape nor an unticked box closes it.
  await page.keyboard.press("Escape");
  assert.ok(await button("Done").isDisabled());
  await button("Send until 429").click();
  await page.locator(".status[data-status='429']").waitFor();
  await page.locator(".countdown").waitFor();
  assert.match(await page.locator(".outcome").textContent(), /[5-9] requests admitted, 1 limited/);
  await look("key-text");
  await page.getByLabel("I stored it").check();
  await button("Done").click();
  await page.getByRole("link", { name: "Mobile app" }).waitFor();
  await look("keys");

  // Filters are in the address.
  await page.getByRole("searchbox", { name: "Search" }).fill("nothing like it");
  await heading("No key is like that").waitFor();
  assert.match(page.url(), /search=nothing/);
  await page.getByRole("link", { name: "Show all keys" }).click();
  await page.getByRole("link", { name: "Mobile app" }).click();
  await heading("Mobile app").waitFor();

  await button("Deactivate").click();
  await heading(`Deactivate ${named("Mobile app")}?`).waitFor();
  await button("Deactivate key").click();
  await button("Activate").waitFor();
  await page.waitForTimeout(1000);
  await button("Send 1").click();
  await page.locator(".status[data-status='401']").waitFor();
  await button("Activate").click();
  await button("Deactivate").waitFor();
  await page.waitForTimeout(3000);
  await button("Send 1").click();
  await page.locator(".status[data-status='200']").waitFor();
  await look("key");

  await button("Rotate").click();
  await button("Rotate key").click();
  await heading(`The key of ${named("Mobile app")}`).waitFor();
  assert.notEqual(await page.locator("#key-text").textContent(), text);
  await page.getByLabel("I stored it").check();
  await button("Done").click();
  await page.getByText("Text before the rotation").waitFor();

  // A plan with keys is not deleted, and says why.
  await place("Plans").click();
  await button("Delete Starter").click();
  await heading("This plan is in use").waitFor();
  await look("plan-in-use");
  await page.getByRole("link", { name: "Show its keys" }).click();
  await page.getByRole("link", { name: "Mobile app" }).click();
  await button("Delete").click();
  await button("Delete key").click();
  await heading("No keys yet").waitFor();
  await place("Plans").click();
  await button("Delete Starter").click();
  await heading(`Delete the plan ${named("Starter")}?`).waitFor();
  await look("plan-delete");
  await button("Delete plan").click();
  await page.getByRole("row", { name: /Starter/ }).waitFor({ state: "detached" });

  await place("Service tokens").click();
  await heading("No service tokens yet").waitFor();
  await button("New token").click();
  await page.getByLabel("Name").fill("Edge gateway");
  await button("Make token").click();
  await heading(`The token of ${named("Edge gateway")}`).waitFor();
  const token = await page.locator("#token-text").textContent();
  assert.match(await page.locator("dialog[open] .code").last().textContent(), new RegExp(token));
  await look("token-text");
  await page.getByLabel("I stored it").check();
  await button("Done").click();
  await page.getByRole("row", { name: /Edge gateway/ }).waitFor();
  await look("tokens");

  await place("Audit").click();
  await page.getByRole("rowheader", { name: "api key rotate" }).waitFor();
  await look("audit");

  await place("Settings").click();
  await heading("Where you are signed in").waitFor();
  await page.getByText("this one").waitFor();
  await look("settings");
  await page.getByLabel("Time zone of quotas").fill("Europe/Berlin");
  await button("Save").click();
  await page.getByText("The profile is saved.").waitFor();
  await page.getByLabel("Dark").check();
  assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), "dark");
  await page.getByLabel("Like the system").check();

  await place("Home").click();
  await page.getByText("First steps").waitFor();
  await look("home");
  await page.goto(`${base}/console/nowhere`);
  await heading("There is no such page").waitFor();
  await look("not-found");

  // An access token that is gone is renewed unnoticed, in two windows at once.
  const second = await context.newPage();
  await context.clearCookies({ name: /quota_access$/ });
  await Promise.all([page.goto(`${base}/console/plans`), second.goto(`${base}/console/audit`)]);
  await heading("Plans").waitFor();
  await second.getByRole("heading", { name: "Audit" }).first().waitFor();
  await second.close();

  // By keyboard alone: to the end of the session and back.
  await place("Home").focus();
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  await heading("Plans").waitFor();
  await button("Sign out").focus();
  await page.keyboard.press("Enter");
  await heading("Sign in").waitFor();
  await page.getByLabel("Email").focus();
  await page.keyboard.type(email);
  await page.keyboard.press("Tab");
  await page.keyboard.type(password);
  await page.keyboard.press("Enter");
  await heading("Plans").waitFor();

  assert.deepEqual(violations, []);
  assert.deepEqual(complaints, []);
  console.log(`the journey went well; ${looked} views held against axe, with no violation`);
} catch (error) {
  if (shots) await page.screenshot({ path: join(shots, "failed.png") });
  if (violations.length) console.error(violations.join("\n"));
  if (complaints.length) console.error(complaints.join("\n"));
  console.error(await page.locator("body").innerText().catch(() => ""));
  throw error;
} finally {
  await browser.close();
}
