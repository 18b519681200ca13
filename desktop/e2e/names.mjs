// Tests unusual names: they are displayed verbatim, are never executed, and do not break the layout.

import assert from "node:assert/strict";

const NAMES = [
  `<img src=x onerror="window.ran=1"><script>window.ran=1</script>`,
  `"><svg onload=window.ran=1> & {{7*7}} \${7*7} %s`,
  "שלום \u202eתוכנית\u202c مرحبا بالعالم",
  "👩‍👩‍👧‍👦🏳️‍🌈🇺🇳 Z͑͗a̶l̷g̸o҉ ﷽ naïve",
  "W".repeat(200),
  "long words ".repeat(18).trim(),
];

export async function names(world) {
  const my = await world.visitor();
  const { page, base } = my;
  await my.registered(NAMES[0]);
  await my.api("PATCH", "/auth/me", { name: NAMES[1] });
  const keys = [];
  for (const name of NAMES) {
    const plan = await my.api("POST", "/admin/plans", { name, default_rpm: 60, strict: true, billing: "free" });
    const key = await my.api("POST", "/admin/api-keys", { name, plan_id: plan.id });
    keys.push(key.api_key);
    await my.api("POST", "/admin/service-tokens", { name });
    await my.api("POST", "/admin/webhooks", { name, url: `https://hooks.example.com/${"a".repeat(900)}` });
  }
  const assertInert = async (where) => {
    const found = await page.evaluate(() => ({
      ran: window.ran,
      unexpected: [...document.body.querySelectorAll("img, script, main svg[onload], b")].map((it) => it.outerHTML),
    }));
    assert.deepEqual(found, { ran: undefined, unexpected: [] }, where);
  };
  const inspect = async (name) => {
    await my.inspect(name);
    await assertInert(name);
  };
  const rows = () => page.locator("tbody th .clamp").evaluateAll((them) => them.map((it) => it.textContent));

  for (const [path, title] of [["plans", "Plans"], ["api-keys", "API keys"], ["service-tokens", "Service tokens"], ["webhooks", "Webhooks"]]) {
    await page.goto(`${base}/console/${path}`);
    await page.getByRole("row").nth(NAMES.length).waitFor();
    await my.heading(title).waitFor();
    assert.deepEqual((await rows()).sort(), [...NAMES].sort(), "displayed verbatim");
    await inspect(`names-${path}`);
    // Only right-to-left names are displayed from right to left.
    const direction = await page
      .locator("tbody th")
      .evaluateAll((them) => them.map((it) => [/שלום/.test(it.textContent), getComputedStyle(it).direction]));
    assert.deepEqual(direction.filter(([isRtl, actual]) => isRtl !== (actual === "rtl")), []);
    // Long names are clamped to a few lines.
    const highest = await page.locator("tbody tr").evaluateAll((them) => Math.max(...them.map((it) => it.clientHeight)));
    assert.ok(highest < 140, `a row of ${path} is ${highest} px high`);
  }

  for (const [at, key] of keys.entries()) {
    await page.goto(`${base}/console/api-keys/${key.id}`);
    await page.locator("h1").getByText(NAMES[at].slice(0, 20)).waitFor();
    assert.equal(await page.locator("h1").textContent(), NAMES[at]);
    await assertInert(`the page of ${NAMES[at]}`);
    await my.button("Edit").click();
    assert.equal(await my.field("Name").inputValue(), NAMES[at]);
    await page.keyboard.press("Escape");
    await my.button("Delete").click();
    await my.button("Delete key").waitFor();
    await assertInert(`deleting ${NAMES[at]}`);
    const beyond = await page.evaluate(() => {
      const dialog = document.querySelector("dialog[open]");
      return [dialog.scrollWidth - dialog.clientWidth, document.documentElement.scrollWidth - window.innerWidth];
    });
    assert.ok(beyond.every((px) => px <= 0), `${NAMES[at]}: wider by ${beyond}`);
    if (at === 2 || at === 4) await inspect(`names-key-${at}`);
    await page.keyboard.press("Escape");
    await page.locator("dialog[open]").waitFor({ state: "detached" }).catch(() => {});
  }

  await my.navigate("Plans").click();
  await page.getByRole("row").nth(NAMES.length).waitFor();
  await page.locator("tbody tr").first().getByRole("button", { name: /^Edit/ }).click();
  await inspect("names-plan-edit");
  await page.keyboard.press("Escape");
  await my.navigate("API keys").click();
  await page.getByRole("row").nth(NAMES.length).waitFor();
  await my.field("Select all on this page").check();
  await my.button("Delete").click();
  await my.field('Type "delete 6 keys" to confirm').waitFor();
  await inspect("names-bulk");
  await page.keyboard.press("Escape");
  await page.keyboard.press("Control+k");
  await my.field("Type a command or the name of an API key or plan").fill("ww");
  await page.getByRole("listbox").getByRole("option", { name: "WWW" }).waitFor();
  await inspect("names-palette");
  await page.keyboard.press("Escape");
  await my.navigate("Audit log").click();
  await page.getByRole("row").nth(NAMES.length).waitFor();
  for (const it of await page.getByRole("button", { name: /^Details:/ }).all()) await it.click();
  await inspect("names-audit");
  await my.navigate("Settings").click();
  await page.getByText("This device").waitFor();
  assert.equal(await my.field("Organization").inputValue(), NAMES[0]);
  await inspect("names-settings");
  await my.context.close();
}
