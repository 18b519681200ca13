// Tests the billing page in every state, with responses that the test provides. Also tests pages that are not part of
// the first download, and a subscription with a fake Stripe.

import assert from "node:assert/strict";

const hours = (count) => new Date(Date.now() + count * 3_600_000).toISOString();

/** Returns the state of a tenant with a subscription in good standing. */
export const active = () => ({
  enabled: true,
  access: "active",
  paid_plans_work: true,
  access_ends_at: null,
  trial_ends_at: null,
  cancels_at: null,
  period_start: hours(-240),
  period_end: hours(480),
  has_customer: true,
  refreshed_at: hours(-0.1),
  price: { name: "Pro", currency: "usd", monthly: "2900", per_request: "0.05" },
  usage: {
    used: 1_240_000,
    projected: 3_720_000,
    charge: 62_000,
    projected_total: 188_900,
    reported_until: hours(-1),
    not_charged: 0,
    last_error: null,
  },
  limits: {
    plans: { used: 3, maximum: 1000 },
    api_keys: { used: 12, maximum: 100_000 },
    requests: { used: 1_260_400, maximum: null },
    requests_reset_at: hours(120),
    free_plan_rpm: 60,
    free_plan_quota: 10_000,
  },
  paid_plans: 1,
  paid_keys: 4,
});

/** Returns whether a URL is that of the billing API, and not of the billing page. */
export const isBilling = (url) => url.pathname === "/billing";

const none = { paid_plans_work: false, period_start: null, period_end: null, usage: null };

/** The states of the page, each with a text that it must show. */
export const states = {
  active: [active(), "Renews"],
  free: [
    {
      ...active(),
      ...none,
      access: "free",
      has_customer: false,
      refreshed_at: null,
      limits: { ...active().limits, plans: { used: 3, maximum: 3 }, api_keys: { used: 8, maximum: 10 }, requests: { used: 52_000, maximum: 100_000 } },
    },
    "Until you subscribe, requests that use one of your 4 keys on paid plans are rejected (402).",
  ],
  trial: [{ ...active(), access: "trialing", trial_ends_at: hours(200) }, "First payment"],
  "past-due": [{ ...active(), access: "past_due", access_ends_at: hours(100) }, "Your last payment failed. Update your card by"],
  unpaid: [{ ...active(), access: "unpaid", paid_plans_work: false }, "Until you pay the open invoice in Stripe, requests that use one of your 4 keys on paid plans are rejected (402)."],
  canceling: [{ ...active(), cancels_at: hours(480), access_ends_at: hours(480) }, "Your subscription ends on"],
  canceled: [{ ...active(), ...none, access: "canceled", cancels_at: hours(-24) }, "Your subscription has ended"],
  paused: [{ ...active(), access: "paused", paid_plans_work: false }, "Your subscription is paused"],
  stale: [{ ...active(), refreshed_at: hours(-3) }, "Can't reach Stripe. Last updated 3 hours ago"],
  off: [
    { ...active(), ...none, enabled: false, access: "free", paid_plans_work: true, has_customer: false, price: null, refreshed_at: null },
    "Billing is off on this server",
  ],
};

export async function billing(world) {
  const my = await world.visitor();
  const { page, base } = my;
  await my.registered("Billing");
  let response = active();
  await page.route(isBilling, (route) => route.fulfill({ json: response }));
  const open = async (query = "") => {
    await page.goto(`${base}/console/billing${query}`);
    await my.heading("Billing").waitFor();
  };
  for (const [name, [state, text]] of Object.entries(states)) {
    response = state;
    await open();
    await page.locator("main").getByText(text).first().waitFor();
    // The page shows a renewal date only if the subscription is active.
    const renews = await page.locator("dt", { hasText: /^Renews$/ }).count();
    assert.equal(renews, name === "active" || name === "stale" ? 1 : 0, name);
    await my.inspect(`billing-${name}`);
  }
  // The buttons depend on the state.
  const buttons = async () => page.locator("main .actions button").allTextContents();
  for (const [name, labels] of [
    ["free", ["Upgrade"]],
    ["active", ["Manage in Stripe"]],
    ["past-due", ["Update card"]],
    ["unpaid", ["Pay invoice"]],
    ["canceled", ["Subscribe again", "Manage in Stripe"]],
    ["off", []],
  ]) {
    response = states[name][0];
    await open();
    await page.locator("main").getByText(states[name][1]).first().waitFor();
    assert.deepEqual(await buttons(), labels, name);
  }

  // Stripe is unreachable when the user opens Checkout.
  world.expected = /status of 503/;
  response = states.free[0];
  await open();
  const id = "019ab4e1-7c00-7000-8000-00000000abcd";
  await page.route("**/billing/checkout", (route) =>
    route.fulfill({
      status: 503,
      contentType: "application/problem+json",
      body: JSON.stringify({ type: `${base}/problems/unavailable`, title: "Unavailable", status: 503, detail: "Temporarily unavailable.", request_id: id }),
    }));
  await my.button("Upgrade").click();
  await page.getByRole("alert").getByText("Couldn't open Stripe. Nothing was charged.").waitFor();
  await page.getByRole("alert").getByText(id).waitFor();
  await my.inspect("billing-unreachable");
  await page.unroute("**/billing/checkout");
  world.expected = undefined;

  // After Checkout, the page waits until the subscription exists, and never shows the previous state.
  let shown = "";
  await page.exposeFunction("shows", (text) => (shown += text));
  await page.addInitScript(() => {
    addEventListener("DOMContentLoaded", () => new MutationObserver(() => window.shows(document.body.innerText)).observe(document.body, { childList: true, subtree: true }));
  });
  await open("?checkout=success");
  await my.heading("Confirming payment…").waitFor();
  await my.inspect("billing-confirming");
  await page.waitForTimeout(2500);
  await my.heading("Confirming payment…").waitFor();
  response = active();
  await page.locator(".toast").getByText("Subscription active").waitFor();
  await page.getByText("Renews").waitFor();
  assert.equal(new URL(page.url()).search, "");
  assert.match(shown, /Confirming payment/);
  assert.doesNotMatch(shown, /No subscription|\bFree\b/, "the previous state was shown");

  // The user returns without paying.
  response = states.free[0];
  await open("?checkout=canceled");
  await page.locator(".toast").getByText("Checkout canceled. You weren't charged.").waitFor();
  await my.button("Upgrade").waitFor();

  // The plans page says what happens to keys on paid plans, and a plan's form says what will happen to the plan's keys.
  const plan = await my.api("POST", "/admin/plans", { name: "Gold", default_rpm: 60 });
  await my.api("POST", "/admin/api-keys", { name: "App", plan_id: plan.id });
  await my.navigate("Plans").click();
  await page.getByText("Until your organization subscribes, requests that use one of your 4 keys on paid plans are rejected (402).").waitFor();
  await my.button("Edit Gold").click();
  await page.getByText("Advanced").click();
  await page.getByLabel("Paid: if billing is on, keys work only while your organization has a subscription").check();
  await page.locator("dialog[open]").getByText("Until your organization subscribes, requests that use the key on this plan will be rejected (402).").waitFor();
  await my.inspect("plan-paid");
  await my.button("Save changes").click();
  await page.getByRole("row", { name: /Gold.*Paid/ }).waitFor();
  assert.equal((await my.api("GET", `/admin/plans/${plan.id}`)).billing, "paid");

  // If the user's role does not give access to billing, the page says so and sends no request.
  let requested = false;
  await page.route(isBilling, (route) => {
    requested = true;
    return route.fulfill({ json: response });
  });
  await page.route("**/auth/me", async (route) => {
    const me = await (await route.fetch()).json();
    me.tenant.role = "viewer";
    await route.fulfill({ json: me });
  });
  await page.goto(`${base}/console/billing`);
  await my.heading("You don't have access to billing").waitFor();
  assert.ok(!requested);
  assert.equal(await my.navigate("Billing").count(), 0, "no link to it");
  await my.inspect("billing-no-access");
  await page.unroute("**/auth/me");
  await chunks(my);
  await my.context.close();
}

/** If a part of the console cannot be loaded, the page reports an error, and the part can be loaded again. */
async function chunks(my) {
  const { page, base, world } = my;
  world.expected = /Failed to fetch|net::ERR|TypeError/;
  await page.route(/pages-.*\.wasm/, (route) => route.abort());
  await page.goto(`${base}/console/audit`);
  await my.heading("Couldn't load this page").waitFor();
  await page.getByText("Couldn't load part of the console.").waitFor();
  await my.inspect("page-missing");
  await page.unroute(/pages-.*\.wasm/);
  await my.button("Retry").click();
  await my.heading("Audit log").waitFor();
  world.expected = undefined;
  // Pages that are not part of the first download are loaded in the background, before the user opens them.
  const loaded = () => page.evaluate(() => performance.getEntriesByType("resource").filter((it) => /pages-.*wasm/.test(it.name)).length);
  await page.goto(`${base}/console`);
  await my.heading("Home").waitFor();
  await page.waitForFunction(() => performance.getEntriesByType("resource").filter((it) => /pages-.*wasm/.test(it.name)).length === 6);
  const before = await loaded();
  await my.navigate("Usage").click();
  await my.heading("Usage").waitFor();
  await my.navigate("Settings").click();
  await my.heading("Active sessions").waitFor();
  assert.equal(await loaded(), before);
}

/** Tests a subscription from Checkout to its end, with a fake Stripe. */
export async function subscription(world) {
  const my = await world.visitor();
  const { page, base } = my;
  // The fake Stripe's pages have no icon, so the browser reports status 404.
  world.expected = /status of 404/;
  await my.registered("Subscriber");
  const plan = await my.api("POST", "/admin/plans", { name: "Gold", default_rpm: 6000, billing: "paid" });
  const { key } = await my.api("POST", "/admin/api-keys", { name: "App", plan_id: plan.id });
  const send = async () => (await fetch(`${base}/v1/echo`, { headers: { "x-api-key": key } })).status;
  const becomes = async (status) => {
    const end = Date.now() + 15_000;
    while ((await send()) !== status) assert.ok(Date.now() < end, `the key gets ${status}`);
  };
  const stripe = async (label) => {
    await page.getByRole("button", { name: label, exact: true }).click();
  };
  await becomes(402);
  await my.navigate("Billing").click();
  await page.getByText("Until you subscribe, requests that use your key on a paid plan are rejected (402).").waitFor();
  await my.inspect("subscription-none");
  await my.button("Upgrade").click();
  await page.getByRole("heading", { name: "Checkout" }).waitFor();
  await stripe("Go back without paying");
  await page.locator(".toast").getByText("Checkout canceled. You weren't charged.").waitFor();
  await my.button("Upgrade").click();
  await stripe("Pay with a working card");
  await page.getByText("Renews").waitFor();
  await page.locator(".toast").getByText("Subscription active").waitFor();
  await becomes(200);
  await my.inspect("subscription-active");

  const portal = async (...labels) => {
    await page.locator("main .actions .button").first().click();
    await page.getByRole("heading", { name: "Customer portal" }).waitFor();
    for (const label of labels) await stripe(label);
    await stripe("Return");
    await my.heading("Billing").waitFor();
  };
  /** Reloads the page until it shows `text`. Until then, the server may not have read the change from Stripe. */
  const shows = async (text) => {
    const end = Date.now() + 20_000;
    for (;;) {
      await page.reload();
      const found = await page.getByText(text).first().waitFor({ timeout: 2000 }).then(() => true, () => false);
      if (found) return;
      assert.ok(Date.now() < end, text);
    }
  };
  await portal("Cancel at the end of the period");
  await shows("Your subscription ends on");
  await my.inspect("subscription-canceling");
  await portal("Don't cancel");
  await shows("Renews");
  await portal("Use a card that is declined", "Let a month pass");
  await shows("Your last payment failed.");
  await my.inspect("subscription-past-due");
  await portal("Use a working card, and pay open invoices");
  await shows("Renews");
  await becomes(200);
  await portal("Cancel now");
  await shows("Your subscription has ended");
  await becomes(402);
  await my.inspect("subscription-canceled");
  world.expected = undefined;
  await my.context.close();
}
