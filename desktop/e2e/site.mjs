// Tests the pages outside the console: the landing page and the API docs.

import assert from "node:assert/strict";

export async function site(world) {
  const my = await world.visitor();
  const { page, base } = my;
  await page.goto(`${base}/`);
  await my.heading("Self-hosted API keys, rate limits, quotas and billing.").waitFor();
  // No *Copy* button covers the text that it copies.
  for (const width of [320, 390, 768, 1024, 1280, 1920]) {
    await page.setViewportSize({ width, height: 800 });
    for (const tab of ["Caddy", "nginx", "HAProxy", "Traefik", "Envoy", "curl"]) {
      await page.locator(".tabs label", { hasText: tab }).first().click();
      const covered = await page.evaluate(() =>
        [...document.querySelectorAll(".copy")]
          .filter((it) => it.checkVisibility())
          .map((it) => [it.querySelector("pre").getBoundingClientRect(), it.querySelector("button").getBoundingClientRect()])
          .filter(([text, button]) => button.left < text.right && button.right > text.left && button.top < text.bottom && button.bottom > text.top).length);
      assert.equal(covered, 0, `${tab} at ${width}`);
    }
    await my.fits(`landing page at ${width}`);
  }
  await page.setViewportSize({ width: 1280, height: 800 });
  await my.inspect("landing");
  await page.locator(".hero").getByRole("button", { name: "Copy" }).click();
  await page.locator(".hero").getByText("Copied").waitFor();
  assert.match(await page.evaluate(() => navigator.clipboard.readText()), /^git clone https:.*\ncargo xtask run$/);

  // The rate-limiting operations are listed first, and forward-auth is listed once.
  await page.goto(`${base}/docs`);
  await page.getByText("Quick start").click();
  await page.getByText("Send a limited request:").waitFor();
  const tags = page.locator(".opblock-tag-section h3 .nostyle");
  await tags.first().waitFor();
  assert.match(await tags.first().innerText(), /^Rate limiting/);
  assert.equal(await page.locator(".opblock-summary-path", { hasText: "forward-auth" }).count(), 1);
  await my.context.close();
}
