/**
 * Checks the rate limits of API keys with Quota, in Express. Copy this file into your project. Requires Node.js 20 or
 * later, and no packages other than Express.
 *
 *     app.use(quota({ url: "https://quota.example.com", serviceToken: process.env.QUOTA_SERVICE_TOKEN! }));
 *
 * A request that Quota allows reaches your handlers with the decision in `response.locals.quota`, and its response gets
 * the rate-limit headers. Any other request gets a response with problem details (RFC 9457): 401 if it has no valid API
 * key, 402 if the key's tenant has to subscribe, 429 if a limit is reached, and 503 if Quota cannot be reached in time
 * (unless `allowIfUnavailable` is set).
 *
 * To record usage by route, pass the middleware to each route, as in `app.get("/orders/:id", limited, handler)`,
 * instead of to `app.use`.
 */

import type { Request, RequestHandler, Response } from "express";

export interface QuotaOptions {
  url: string;
  serviceToken: string;
  /** The time that a check may take, in milliseconds. Default: 1000. */
  timeout?: number;
  /**
   * Passes requests on if Quota cannot be reached in time. Then neither the limits nor the API key have been checked:
   * any key is accepted. `response.locals.quota` is null, and the response has the header
   * `X-Quota-Degraded: unchecked`. Default: false.
   */
  allowIfUnavailable?: boolean;
  /** The API key of a request. Default: `X-API-Key` or `Authorization: Bearer qk_…`. */
  key?: (request: Request) => string | undefined;
  /** The cost of a request, 1 to 1,000,000. Quota counts a request with a cost of 5 as five requests. Default: 1. */
  cost?: (request: Request) => number;
  /**
   * The endpoint under which a request is recorded in usage. Return names from a small set, not paths with IDs.
   * Default: the request's method and route.
   */
  endpoint?: (request: Request) => string | undefined;
}

/** Quota's decision. */
export interface Decision {
  allowed: boolean;
  code: string;
  key_id: string | null;
  plan: string | null;
  limits: { policy: string; limit: number; remaining: number; reset_at: string }[];
  retry_after: number | null;
  headers: Record<string, string>;
}

const PROBLEMS = "https://iana.org/assignments/http-problem-types#";
const CANNOT_CHECK = "Rate limits can't be checked right now. Try again in a few seconds.";
const MAX_COST = 1_000_000;

/** There is no decision. If `isFinal`, the request must not be passed on, even with `allowIfUnavailable`. */
class Unavailable extends Error {
  constructor(
    reason: string,
    readonly isFinal = false,
  ) {
    super(reason);
  }
}

/**
 * Returns the API key from `X-API-Key` or `Authorization: Bearer qk_…`. Returns undefined if there are different keys
 * or several values of either header, because the application could read a key that was not checked.
 */
export function apiKey(request: Request): string | undefined {
  const keys = [...(request.headersDistinct["x-api-key"] ?? [])];
  const credentials = request.headersDistinct["authorization"] ?? [];
  if (keys.length > 1 || credentials.length > 1) return undefined;
  const bearer = /^bearer +(qk_.*)$/i.exec(credentials[0]?.trim() ?? "")?.[1];
  if (bearer !== undefined) keys.push(bearer);
  return keys[0] === keys.at(-1) ? keys[0] : undefined;
}

/** Returns the method and the route of a request, such as `GET /orders/:id`, if Express has matched the route. */
export function route(request: Request): string | undefined {
  const path: unknown = request.route?.path;
  return typeof path === "string" ? `${request.method} ${request.baseUrl}${path}` : undefined;
}

export function quota(options: QuotaOptions): RequestHandler {
  const { timeout = 1000, allowIfUnavailable = false, key = apiKey, cost = () => 1, endpoint = route } = options;
  if (!/^[!-~]+$/.test(options.serviceToken)) {
    throw new TypeError("serviceToken must consist of visible ASCII characters, without a line break");
  }
  const url = `${options.url.replace(/\/+$/, "")}/v1/check`;
  let lastWarning = -Infinity;

  /** Returns Quota's decision, and the ID under which Quota logs the decision. */
  async function check(request: Request, apiKey: string, cost: number): Promise<[Decision, string | null]> {
    const headers = new Headers({
      "Authorization": `Bearer ${options.serviceToken}`,
      "Content-Type": "application/json",
    });
    const id = request.headers["x-request-id"];
    // Quota accepts only request IDs of this form.
    if (typeof id === "string" && /^[A-Za-z0-9_.:-]{1,128}$/.test(id)) headers.set("X-Request-Id", id);
    const name = [...(endpoint(request) ?? "").replace(/\p{Cc}/gu, "")].slice(0, 128).join("");
    const body = JSON.stringify({ key: apiKey, cost, endpoint: name || undefined });
    let response, text;
    try {
      // A check is not repeated, because it may have consumed tokens. A redirected check would send the secrets to
      // another server.
      const signal = AbortSignal.timeout(timeout);
      response = await fetch(url, { method: "POST", headers, body, signal, redirect: "manual" });
      text = await response.text();
    } catch (error) {
      throw new Unavailable(String(error instanceof Error && error.cause ? error.cause : error));
    }
    if (response.status !== 200) {
      // The consumer may have caused these 4xx statuses, and could otherwise use them to bypass the limits. A 503 with
      // `X-Quota-Degraded` results from the plan's fallback setting.
      const isFinal =
        [400, 413, 415, 422, 431].includes(response.status) ||
        (response.status === 503 && response.headers.has("X-Quota-Degraded"));
      throw new Unavailable(`status ${response.status}`, isFinal);
    }
    try {
      const decision = JSON.parse(text) as Decision;
      if (typeof decision.code !== "string" || decision.allowed !== (decision.code === "allowed")) {
        throw new Error("the response contradicts itself");
      }
      new Headers(Object.entries(decision.headers));
      return [decision, response.headers.get("X-Request-Id")];
    } catch (error) {
      throw new Unavailable(`the response is not a decision: ${String(error)}`);
    }
  }

  return async (request, response, next) => {
    const sent = key(request);
    if (sent === undefined) {
      return respond(response, 401, "Unauthorized", "Send an API key.", { "WWW-Authenticate": 'Bearer realm="quota"' });
    }
    if (!/^[!-~]{1,256}$/.test(sent)) {
      // Quota would reject the check, because this string cannot be a key.
      const challenge = { "WWW-Authenticate": 'Bearer realm="quota", error="invalid_token"' };
      return deny(response, { code: "unknown_key", headers: challenge }, null, 1);
    }
    const tokens = Math.max(cost(request), 1);
    if (tokens > MAX_COST) {
      return deny(response, { code: "quota_exceeded", headers: {} }, null, tokens);
    }
    let decision, id;
    try {
      [decision, id] = await check(request, sent, tokens);
    } catch (error) {
      if (!(error instanceof Unavailable)) throw error;
      if (performance.now() - lastWarning > 10_000) {
        lastWarning = performance.now();
        console.warn(`cannot check rate limits: ${error.message}`);
      }
      if (error.isFinal || !allowIfUnavailable) {
        return respond(response, 503, "Service Unavailable", CANNOT_CHECK, { "Retry-After": "1" });
      }
      response.locals.quota = null;
      response.setHeader("X-Quota-Degraded", "unchecked");
      return next();
    }
    if (!decision.allowed) return deny(response, decision, id, tokens);
    for (const [name, value] of Object.entries(decision.headers)) response.setHeader(name, value);
    response.locals.quota = decision;
    next();
  };
}

/** Responds to a request that was denied. */
function deny(
  response: Response,
  decision: Pick<Decision, "code" | "headers"> & Partial<Decision>,
  id: string | null,
  cost: number,
): void {
  const { code, headers, limits = [], retry_after: wait } = decision;
  const more: Record<string, unknown> = id === null ? {} : { request_id: id };
  switch (code) {
    case "unknown_key":
    case "inactive_key":
    case "expired_key":
      return respond(response, 401, "Unauthorized", "This API key is invalid, inactive or expired.", headers, more);
    case "payment_required":
      return respond(response, 402, "Payment Required", "This API key requires a valid subscription.", headers, more);
    case "reduced_capacity":
      more.type = `${PROBLEMS}temporary-reduced-capacity`;
      return respond(response, 429, "Temporarily reduced capacity", CANNOT_CHECK, headers, more);
    default: {
      more.type = `${PROBLEMS}quota-exceeded`;
      const violated = limits.filter((limit) => limit.remaining < cost).map((limit) => limit.policy);
      if (violated.length > 0) more["violated-policies"] = violated;
      const detail =
        wait == null
          ? "A limit of this API key is lower than the cost of this request."
          : `A limit of this API key has been reached. Retry in ${wait} ${wait === 1 ? "second" : "seconds"}.`;
      return respond(response, 429, "Rate limit or quota exceeded", detail, headers, more);
    }
  }
}

/** Sends problem details (RFC 9457). */
function respond(
  response: Response,
  status: number,
  title: string,
  detail: string,
  headers: Record<string, string>,
  more: Record<string, unknown> = {},
): void {
  for (const [name, value] of Object.entries(headers)) response.setHeader(name, value);
  response.setHeader("Content-Type", "application/problem+json");
  response.setHeader("Cache-Control", "no-store");
  response.statusCode = status;
  response.end(JSON.stringify({ type: "about:blank", title, status, detail, ...more }));
}
