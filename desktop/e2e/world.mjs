// Code that all parts of the journey share: a browser, error collection, and accessibility checks.

import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { setTimeout } from "node:timers/promises";
import { chromium } from "playwright-core";

const axeSource = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
export const forms = [
  { theme: "light", width: 1280, height: 800 },
  { theme: "dark", width: 1280, height: 800 },
  { theme: "light", width: 390, height: 844 },
  { theme: "dark", width: 390, height: 844 },
];
export const password = "violet-harbour-quilt-93";
/** Returns a name as it appears in a sentence: quoted, and isolated from the surrounding text direction. */
export const quoted = (name) => `"\u2068${name}\u2069"`;

export class World {
  violations = [];
  pageErrors = [];
  inspected = 0;

  static async start(executablePath, base, shots) {
    const world = new World();
    Object.assign(world, { executablePath, base, shots });
    if (shots) mkdirSync(shots, { recursive: true });
    await world.launch();
    return world;
  }

  async launch() {
    this.browser = await chromium.launch({
      executablePath: this.executablePath,
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
  }

  /** Returns a new visitor, with separate cookies and storage. */
  async visitor() {
    const context = await this.browser.newContext({ viewport: { width: 1280, height: 800 } });
    await context.grantPermissions(["clipboard-read", "clipboard-write"], { origin: this.base });
    return new Visitor(this, context, await this.window(context));
  }

  /**
   * Returns whether the browser has stopped drawing the latest page, while timers still run in it. Then every click
   * times out, because Playwright waits until an element keeps its position for two frames.
   */
  async hasStoppedDrawing() {
    const check = async () => {
      const session = await this.latest.context().newCDPSession(this.latest);
      const { frameTree } = await session.send("Page.getFrameTree");
      // The page's own timers and `requestAnimationFrame` may be fake ones.
      const frameId = frameTree.frame.id;
      const { executionContextId: contextId } = await session.send("Page.createIsolatedWorld", { frameId });
      const expression = `new Promise((resolve) => {
        let ticks = 0;
        setInterval(() => ++ticks === 30 && resolve(true), 100);
        requestAnimationFrame(() => requestAnimationFrame(() => resolve(false)));
      })`;
      const { result } = await session.send("Runtime.evaluate", { expression, contextId, awaitPromise: true });
      return result.value;
    };
    // A busy page does not respond, and a closed page causes an error. In both cases, the browser is not at fault.
    return await Promise.race([check(), setTimeout(15_000, false)]).catch(() => false);
  }

  /** Returns a page whose errors are collected. */
  async window(context) {
    const page = await context.newPage();
    page.setDefaultTimeout(60_000);
    page.on("pageerror", (error) => this.pageErrors.push(`error: ${error.message}`));
    page.on("console", (message) => {
      // Browsers log the rejected requests and failed connections that the journey provokes on purpose. They also log
      // aborted downloads: when the user leaves a page, the code for other pages may still be loading.
      const expected = /status of (401|422|429)|ERR_FAILED|Failed to fetch\s+at .*\/loader-|Response body loading was aborted/;
      const text = message.text();
      if (message.type() === "error" && !expected.test(text) && !this.expected?.test(text)) this.pageErrors.push(text);
    });
    this.latest = page;
    return page;
  }
}

export class Visitor {
  constructor(world, context, page) {
    Object.assign(this, { world, context, page, base: world.base });
    this.email = `e2e-${Date.now()}-${Math.random().toString(36).slice(2, 8)}@example.com`;
  }

  // Searches only the dialog if one is open, because a button that opens a form has the same name as the form's submit
  // button.
  button = (name) =>
    this.page.locator("dialog[open], body:not(:has(dialog[open]))").getByRole("button", { name, exact: true });
  heading = (name) => this.page.getByRole("heading", { name, exact: true }).first();
  navigate = (name) =>
    this.page.getByRole("navigation", { name: "Console" }).getByRole("link", { name, exact: true });
  field = (name) => this.page.getByLabel(name);
  status = (code) => this.page.locator(`.status[data-status='${code}']`).waitFor();

  /** Chooses an action from the menu of a row. */
  async choose(row, action) {
    await this.button(`More actions for ${row}`).click();
    await this.page.getByRole("menuitem", { name: action, exact: true }).click();
  }

  /** Calls the API directly, with a bearer token instead of cookies. */
  async api(method, path, body) {
    const headers = { "content-type": "application/json" };
    if (this.token) headers.authorization = `Bearer ${this.token}`;
    const response = await fetch(`${this.base}${path}`, { method, headers, body: body && JSON.stringify(body) });
    const text = await response.text();
    if (!response.ok) throw new Error(`${method} ${path}: ${response.status} ${text}`);
    return text && JSON.parse(text);
  }

  /** Registers through the API, and signs in with the browser. */
  async registered(tenant_name) {
    const account = await this.api("POST", "/auth/register", { email: this.email, password, tenant_name });
    this.token = account.access_token;
    await this.page.goto(`${this.base}/console/sign-in`);
    await this.signIn();
    await this.heading("Home").waitFor();
  }

  async signIn() {
    await this.field("Email").fill(this.email);
    await this.field("Password").fill(password);
    await this.button("Sign in").click();
  }

  /**
   * Runs axe, and checks that all content fits, at two widths in light and dark mode. At 320 pixels, checks only that
   * all content fits. Takes screenshots if `shots` is set.
   */
  async inspect(name) {
    const { page, world } = this;
    // Content that is dimmed because it is about to be replaced has less contrast on purpose.
    await page.waitForFunction(() => !document.querySelector(".async.pending"));
    for (const { theme, width, height } of forms) {
      await page.setViewportSize({ width, height });
      await page.emulateMedia({ colorScheme: theme, reducedMotion: "reduce" });
      // Unlike `evaluate`, this times out if the browser does not draw the page.
      await page.waitForFunction(
        () => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => resolve(true)))),
      );
      const form = `${name} ${theme} ${width}`;
      await page.evaluate(axeSource);
      const found = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
      for (const it of found.violations) {
        const where = it.nodes.map((node) => `${node.html}\n      ${node.failureSummary}`).join("\n    ");
        world.violations.push(`${form}: ${it.id}: ${it.help}\n    ${where}`);
      }
      await this.fits(form);
      if (world.shots) await page.screenshot({ path: join(world.shots, `${name}-${theme}-${width}.png`) });
      world.inspected += 1;
    }
    await page.setViewportSize({ width: 320, height: 740 });
    await this.fits(`${name} 320`);
    await page.setViewportSize({ width: 1280, height: 800 });
  }

  /** Reports a violation if the content of an element is wider than the element. */
  async fits(form) {
    const excess = await this.page.evaluate(() => {
      const beyond = (element) => element.scrollWidth - element.clientWidth;
      const parts = [...document.querySelectorAll("dialog[open], .side, .card, main")];
      // Text can also overflow its table row without causing any scrolling.
      const right = (element) => element.getBoundingClientRect().right;
      const scrolls = (element) => element.closest(".chart-table, .tail-list, .visually-hidden, pre, svg, [hidden]");
      const leaves = [...document.querySelectorAll("main .table tbody tr *")].filter((it) => !it.children.length && !scrolls(it));
      const out = leaves.map((it) => Math.floor(right(it) - right(it.closest("tr"))));
      return Math.max(document.documentElement.scrollWidth - window.innerWidth, ...parts.map(beyond), ...out);
    });
    if (excess > 0) this.world.violations.push(`${form}: ${excess} px too wide`);
  }
}
