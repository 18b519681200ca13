// Tests authentication: signing in and out, expired and revoked sessions, and sessions that two windows share.

import assert from "node:assert/strict";

export async function guard(world) {
  const my = await world.visitor();
  const { page, base, context } = my;
  const path = () => new URL(page.url()).pathname + new URL(page.url()).search;
  await my.registered("Guard");
  const plan = await my.api("POST", "/admin/plans", { name: "Starter", default_rpm: 60 });
  const key = (await my.api("POST", "/admin/api-keys", { name: "App", plan_id: plan.id })).api_key;
  await my.button("Sign out").click();
  await my.heading("Sign in").waitFor();

  // After signing in, visitors get the page they requested, with its query.
  for (const [requested, heading] of [
    ["/console/api-keys?search=a%20%26%20b&sort=-name", "API keys"],
    [`/console/api-keys/${key.id}`, "App"],
    ["/console/audit", "Audit log"],
  ]) {
    await page.goto(`${base}${requested}`);
    await my.heading("Sign in").waitFor();
    assert.equal(await page.getByRole("navigation").count(), 0, "signed-out visitors see nothing of the console");
    await my.signIn();
    await my.heading(heading).waitFor();
    assert.equal(path(), requested);
    await my.button("Sign out").click();
    await my.heading("Sign in").waitFor();
  }
  // Visitors are never sent to a page on another site.
  await page.goto(`${base}/console/sign-in?next=${encodeURIComponent("https://example.com/console/")}`);
  await my.heading("Sign in").waitFor();
  await my.signIn();
  await my.heading("Get started").waitFor();
  await page.locator(".skeleton").waitFor({ state: "detached" });
  assert.equal(path(), "/console");

  // An expired access token, whether removed by the browser or rejected by the server, is refreshed without the user
  // noticing.
  const access = async () => (await context.cookies()).find((it) => /quota_access$/.test(it.name));
  // Removes only the access cookie. `clearCookies` with a name briefly removes all cookies, and calls made during that
  // time sign the user out.
  const expire = async () => {
    await context.addCookies([{ ...(await access()), expires: 1 }]);
    assert.equal(await access(), undefined);
  };
  const corrupt = async () => context.addCookies([{ ...(await access()), value: "eyJhbGciOiJFZERTQSJ9.e30.AAAA" }]);
  let refreshes = 0;
  page.on("request", (request) => {
    if (new URL(request.url()).pathname === "/auth/refresh") refreshes += 1;
  });
  for (const [invalidate, go] of [
    [expire, () => my.navigate("API keys").click()],
    [corrupt, () => my.navigate("Plans").click()],
    [expire, () => page.reload()],
  ]) {
    await invalidate();
    refreshes = 0;
    await go();
    await page.getByRole("row").nth(1).waitFor();
    assert.equal(refreshes, 1, "concurrent calls share one refresh");
  }

  // Two windows can refresh the session at the same time, and both stay signed in.
  const second = await world.window(context);
  await second.goto(`${base}/console/plans`);
  await second.getByRole("row").nth(1).waitFor();
  for (let round = 0; round < 5; round += 1) {
    await (round % 2 ? corrupt() : expire());
    const target = round % 2 ? "plans" : "api-keys";
    const open = async (page) => {
      const response = page.waitForResponse((it) => new URL(it.url()).pathname === "/admin/plans" && it.ok());
      await page.evaluate((target) => document.querySelector(`nav a[href$="${target}"]`).click(), target);
      await response;
    };
    await Promise.all([open(page), open(second)]);
    for (const it of [page, second]) {
      await it.getByRole("row").nth(1).waitFor();
      assert.equal(await it.getByRole("heading", { name: "Sign in" }).count(), 0);
    }
  }
  // Both windows can refresh the session again afterward.
  for (const it of [page, second]) {
    await expire();
    await it.reload();
    await it.getByRole("row").nth(1).waitFor();
  }
  world.latest = page;

  // Users whose session was revoked are sent to the sign-in page. After they have signed in, they get the page that
  // they requested.
  await my.navigate("Audit log").click();
  await my.heading("Audit log").waitFor();
  const sessions = await my.api("GET", "/auth/sessions?limit=100");
  for (const it of sessions.items.filter((it) => !it.current)) await my.api("DELETE", `/auth/sessions/${it.id}`);
  await my.navigate("Plans").click();
  await my.heading("Sign in").waitFor();
  assert.match(page.url(), /next=%2Fconsole%2Fplans$/);
  await my.signIn();
  await my.heading("Plans").waitFor();

  // While the server is unreachable, users stay signed in and can try again.
  const calls = /\/(admin|auth)\//;
  await context.route(calls, (route) => route.abort());
  await my.navigate("API keys").click();
  await my.heading("Couldn't load API keys").waitFor();
  await my.inspect("list-failed");
  await context.unroute(calls);
  await my.button("Retry").click();
  await page.getByRole("row").nth(1).waitFor();
  await context.route(calls, (route) => route.abort());
  await page.reload();
  await my.heading("Can't reach the server").waitFor();
  await my.inspect("server-unreachable");
  await context.unroute(calls);
  await my.button("Retry").click();
  await page.getByRole("row").nth(1).waitFor();
  assert.equal(path(), "/console/api-keys");
  await context.close();
}
