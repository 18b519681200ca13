// The console in Chromium, against the real server on its embedded default.
//
// node journey.mjs CHROMIUM ADDRESS [FOLDER-FOR-SCREENSHOTS [PART…]]

import assert from "node:assert/strict";
import { join } from "node:path";
import { guard } from "./guard.mjs";
import { keyboard } from "./keyboard.mjs";
import { lists } from "./lists.mjs";
import { many } from "./many.mjs";
import { names } from "./names.mjs";
import { once } from "./once.mjs";
import { pages } from "./pages.mjs";
import { pictures } from "./pictures.mjs";
import { tour } from "./tour.mjs";
import { World } from "./world.mjs";

const [executablePath, base, shots, ...picked] = process.argv.slice(2);
const parts = { tour, keyboard, once, many, lists, names, guard, pages, pictures };

const world = await World.start(executablePath, base, shots);
try {
  for (const [name, part] of Object.entries(parts)) {
    if (picked.length ? !picked.includes(name) : name === "pictures") continue;
    await part(world);
    assert.deepEqual([...world.violations, ...world.complaints], [], name);
    console.log(`${name}: went well`);
  }
  console.log(`the journey went well; ${world.looked} views held against axe, with no violation`);
} catch (error) {
  const page = world.latest;
  if (world.shots) await page?.screenshot({ path: join(world.shots, "failed.png") }).catch(() => {});
  for (const it of [...world.violations, ...world.complaints]) console.error(it);
  console.error(await page?.locator("body").innerText().catch(() => ""));
  throw error;
} finally {
  await world.browser.close();
}
