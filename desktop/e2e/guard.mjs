// Who is let in, and what becomes of a session: signed out, run out, ended elsewhere, used in two windows at once.

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

  // Whoever is signed out comes to the page that was asked for, with all of its address.
  for (const [asked, heading] of [
    ["/console/api-keys?search=a%20%26%20b&sort=-name", "API keys"],
    [`/console/api-keys/${key.id}`, "App"],
    ["/console/audit", "Audit"],
  ]) {
    await page.goto(`${base}${asked}`);
    await my.heading("Sign in").waitFor();
    assert.equal(await page.getByRole("navigation").count(), 0, "nothing is shown to who is signed out");
    await my.signIn();
    await my.heading(heading).waitFor();
    assert.equal(path(), asked);
    await my.button("Sign out").click();
    await my.heading("Sign in").waitFor();
  }
  // But to no other place.
  await page.goto(`${base}/console/sign-in?next=${encodeURIComponent("https://example.com/console/")}`);
  await my.heading("Sign in").waitFor();
  await my.signIn();
  await my.heading("Home").waitFor();
  assert.equal(path(), "/console");

  // A session whose access token has run out is renewed and nobody notices: gone, as browsers have it, or refused.
  const access = async () => (await context.cookies()).find((it) => /quota_access$/.test(it.name));
  const runOut = async () => context.clearCookies({ name: (await access()).name });
  const spoil = async () => context.addCookies([{ ...(await access()), value: "eyJhbGciOiJFZERTQSJ9.e30.AAAA" }]);
  let refreshes = 0;
  page.on("request", (request) => {
    if (new URL(request.url()).pathname === "/auth/refresh") refreshes += 1;
  });
  for (const [how, go] of [
    [runOut, () => my.place("API keys").click()],
    [spoil, () => my.place("Plans").click()],
    [runOut, () => page.reload()],
  ]) {
    await how();
    refreshes = 0;
    await go();
    await page.getByRole("row").nth(1).waitFor();
    assert.equal(refreshes, 1, "however many calls find it so, one refresh is sent");
  }

  // Two windows that find so at the same time both stay signed in, again and again.
  const second = await world.window(context);
  await second.goto(`${base}/console/plans`);
  await second.getByRole("row").nth(1).waitFor();
  for (let turn = 0; turn < 5; turn += 1) {
    await (turn % 2 ? spoil() : runOut());
    const place = turn % 2 ? "plans" : "api-keys";
    const show = async (page) => {
      const answer = page.waitForResponse((it) => new URL(it.url()).pathname === "/admin/plans" && it.ok());
      await page.evaluate((place) => document.querySelector(`nav a[href$="${place}"]`).click(), place);
      await answer;
    };
    await Promise.all([show(page), show(second)]);
    for (const it of [page, second]) {
      await it.getByRole("row").nth(1).waitFor();
      assert.equal(await it.getByRole("heading", { name: "Sign in" }).count(), 0);
    }
  }
  // What each holds now is good for a next time.
  for (const it of [page, second]) {
    await runOut();
    await it.reload();
    await it.getByRole("row").nth(1).waitFor();
  }
  world.latest = page;

  // A session that was ended elsewhere is over, and says so by the way back in.
  await my.place("Audit").click();
  await my.heading("Audit").waitFor();
  const sessions = await my.api("GET", "/auth/sessions?limit=100");
  for (const it of sessions.items.filter((it) => !it.current)) await my.api("DELETE", `/auth/sessions/${it.id}`);
  await my.place("Plans").click();
  await my.heading("Sign in").waitFor();
  assert.match(page.url(), /next=%2Fconsole%2Fplans$/);
  await my.signIn();
  await my.heading("Plans").waitFor();

  // While the server is away nobody is signed out: it is said, and can be tried again.
  const away = /\/(admin|auth)\//;
  await context.route(away, (route) => route.abort());
  await my.place("API keys").click();
  await my.heading("This could not be loaded").waitFor();
  await my.look("list-failed");
  await context.unroute(away);
  await my.button("Try again").click();
  await page.getByRole("row").nth(1).waitFor();
  await context.route(away, (route) => route.abort());
  await page.reload();
  await my.heading("The server does not answer").waitFor();
  await my.look("server-away");
  await context.unroute(away);
  await my.button("Try again").click();
  await page.getByRole("row").nth(1).waitFor();
  assert.equal(path(), "/console/api-keys");
  await context.close();
}
