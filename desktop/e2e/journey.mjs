// Tests the console in Chromium against a real server with its private PostgreSQL.
//
// node journey.mjs CHROMIUM ADDRESS [FOLDER-FOR-SCREENSHOTS [PART…]]
//
// SECOND_REPLICA is the address of another replica, for the part `recount`.

import assert from "node:assert/strict";
import { join } from "node:path";
import { actions } from "./actions.mjs";
import { billing, subscription } from "./billing.mjs";
import { errors } from "./errors.mjs";
import { guard } from "./guard.mjs";
import { keyboard } from "./keyboard.mjs";
import { lists } from "./lists.mjs";
import { many } from "./many.mjs";
import { names } from "./names.mjs";
import { once } from "./once.mjs";
import { pages } from "./pages.mjs";
import { pictures } from "./pictures.mjs";
import { roles } from "./roles.mjs";
import { site } from "./site.mjs";
import { tour } from "./tour.mjs";
import { trouble } from "./trouble.mjs";
import { recount, usage } from "./usage.mjs";
import { walk } from "./walk.mjs";
import { webhooks } from "./webhooks.mjs";
import { widths } from "./widths.mjs";
import { World } from "./world.mjs";

const [executablePath, base, shots, ...selected] = process.argv.slice(2);
const parts = { site, tour, keyboard, once, many, actions, usage, lists, names, guard, pages, errors, trouble, roles, billing, subscription, webhooks, widths, recount, pictures, walk };
// These parts run only when selected: they require a special setup, change files in the repository, or save screenshots
// for review.
const onRequest = ["recount", "pictures", "walk"];

let repetition = "";

/**
 * Runs a part, and repeats it in a new browser if it failed because the browser stopped drawing its page. Repeats only
 * one part, because the console itself would be a more likely cause of several such failures.
 */
async function runPart(world, name, part) {
  try {
    await part(world);
  } catch (error) {
    if (repetition || error.name !== "TimeoutError" || !(await world.hasStoppedDrawing())) throw error;
    console.log(`${name}: repeating this part, because the browser stopped drawing the page: ${error.message}`);
    repetition = `; ${name} passed only on the second attempt`;
    await world.browser.close();
    world.expected = undefined;
    await world.launch();
    await part(world);
  }
}

const world = await World.start(executablePath, base, shots);
world.second = process.env.SECOND_REPLICA;
try {
  for (const [name, part] of Object.entries(parts)) {
    if (selected.length ? !selected.includes(name) : onRequest.includes(name)) continue;
    await runPart(world, name, part);
    assert.deepEqual([...world.violations, ...world.pageErrors], [], name);
    console.log(`${name}: passed`);
  }
  console.log(`all parts passed; ${world.inspected} views without axe violations${repetition}`);
} catch (error) {
  const page = world.latest;
  if (world.shots) await page?.screenshot({ path: join(world.shots, "failed.png") }).catch(() => {});
  for (const it of [...world.violations, ...world.pageErrors]) console.error(it);
  console.error(await page?.locator("body").innerText().catch(() => ""));
  throw error;
} finally {
  await world.browser.close();
}
