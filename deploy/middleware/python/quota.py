"""Checks the rate limits of API keys with Quota, in FastAPI, Starlette and other ASGI applications.

Copy this file into your project, and `pip install httpx`. Then:

    token = os.environ["QUOTA_SERVICE_TOKEN"]
    app.add_middleware(QuotaMiddleware, url="https://quota.example.com", service_token=token)

A request that Quota allows reaches the application with the decision in `request.state.quota`, and its response gets
the rate-limit headers. Any other request gets a response with problem details (RFC 9457): 401 if it has no valid API
key, 402 if the key's tenant has to subscribe, 429 if a limit is reached, and 503 if Quota cannot be reached in time
(unless `allow_if_unavailable` is set).

WebSocket connections are not checked. If you use CORSMiddleware, add it after this middleware. CORSMiddleware then
responds to preflight requests, which have no API key, before they are checked.
"""

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Callable
from typing import Any

import httpx

Scope = dict[str, Any]

log = logging.getLogger("quota")

PROBLEMS = "https://iana.org/assignments/http-problem-types#"
CANNOT_CHECK = "Rate limits can't be checked right now. Try again in a few seconds."
MAX_COST = 1_000_000
# Quota accepts only request IDs of this form.
REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Unavailable(Exception):
    """There is no decision. If `is_final`, the request must not be passed on, even with allow_if_unavailable."""

    def __init__(self, reason: str, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


def header(scope: Scope, name: str) -> list[str]:
    """Returns all values of a header."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name.encode()]


def api_key(scope: Scope) -> str | None:
    """Returns the API key from `X-API-Key` or `Authorization: Bearer qk_…`. Returns None if there are different keys or
    several values of either header, because the application could read a key that was not checked."""
    keys, credentials = header(scope, "x-api-key"), header(scope, "authorization")
    if len(keys) > 1 or len(credentials) > 1:
        return None
    for credential in credentials:
        scheme, _, key = credential.partition(" ")
        if scheme.lower() == "bearer" and key.strip().startswith("qk_"):
            keys.append(key.strip())
    return keys[0] if keys and keys[0] == keys[-1] else None


def route(scope: Scope) -> str | None:
    """Returns the method and the route of a request, such as `GET /orders/{id}`. Returns None if there is no route."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    for candidate in getattr(scope.get("app"), "routes", []):
        # FastAPI keeps an included router as a single entry, which contains the router's routes.
        contexts = getattr(candidate, "effective_route_contexts", None)
        included = [candidate] if contexts is None else [it.starlette_route or it for it in contexts()]
        for it in included:
            regex, methods = getattr(it, "path_regex", None), getattr(it, "methods", None)
            if regex is not None and regex.match(path) and (not methods or scope["method"] in methods):
                return f"{scope['method']} {it.path_format}"
    return None


class QuotaMiddleware:
    """`allow_if_unavailable=True` passes requests on if Quota cannot be reached in time. Then neither the limits nor
    the API key have been checked: any key is accepted. `request.state.quota` is None, and the response has the header
    `X-Quota-Degraded: unchecked`.

    `timeout` is the time that a check may take, in seconds. `key`, `cost` and `endpoint` are functions of a request's
    ASGI scope. `key` returns the request's API key. `cost` returns the request's cost, 1 to 1,000,000: Quota counts a
    request with a cost of 5 as five requests. `endpoint` returns the name under which the request is recorded in usage.
    Return names from a small set, not paths with IDs.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        *,
        url: str,
        service_token: str,
        timeout: float = 1.0,
        allow_if_unavailable: bool = False,
        key: Callable[[Scope], str | None] = api_key,
        cost: Callable[[Scope], int] = lambda scope: 1,
        endpoint: Callable[[Scope], str | None] = route,
    ) -> None:
        if not re.fullmatch("[!-~]+", service_token):
            raise ValueError("service_token must consist of visible ASCII characters, without a line break")
        self.app = app
        self.url = url.rstrip("/") + "/v1/check"
        self.timeout = timeout
        self.allow_if_unavailable = allow_if_unavailable
        self.key, self.cost, self.endpoint = key, cost, endpoint
        self.last_warning = -math.inf
        # Keeps idle connections for less time than Quota does (75 s), so that no check is sent on a connection that
        # Quota is closing. A failed check cannot be repeated, because it may have consumed tokens.
        self.client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {service_token}"},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=30),
            timeout=timeout,
        )

    async def __call__(self, scope: Scope, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan":
            try:
                await self.app(scope, receive, send)
            finally:
                await self.client.aclose()
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        key = self.key(scope)
        if key is None:
            challenge = {"WWW-Authenticate": 'Bearer realm="quota"'}
            await respond(send, 401, "Unauthorized", "Send an API key.", challenge)
            return
        if not (1 <= len(key) <= 256 and key.isascii() and key.isprintable() and " " not in key):
            # Quota would reject the check, because this string cannot be a key.
            challenge = {"WWW-Authenticate": 'Bearer realm="quota", error="invalid_token"'}
            await deny(send, {"code": "unknown_key", "headers": challenge}, None, 1)
            return
        cost = max(self.cost(scope), 1)
        if cost > MAX_COST:
            await deny(send, {"code": "quota_exceeded", "headers": {}}, None, cost)
            return

        try:
            decision, request_id = await self.check(scope, key, cost)
        except Unavailable as error:
            if time.monotonic() - self.last_warning > 10:
                self.last_warning = time.monotonic()
                log.warning("cannot check rate limits: %s", error)
            if error.is_final or not self.allow_if_unavailable:
                await respond(send, 503, "Service Unavailable", CANNOT_CHECK, {"Retry-After": "1"})
                return
            decision, headers = None, {"X-Quota-Degraded": "unchecked"}
        else:
            if not decision["allowed"]:
                await deny(send, decision, request_id, cost)
                return
            headers = decision["headers"]

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower().encode(): value.encode() for name, value in headers.items()}
                kept = [(name, value) for name, value in message["headers"] if name.lower() not in own]
                message = {**message, "headers": kept + list(own.items())}
            await send(message)

        scope.setdefault("state", {})["quota"] = decision
        await self.app(scope, receive, send_with_headers)

    async def check(self, scope: Scope, key: str, cost: int) -> tuple[dict[str, Any], str | None]:
        """Returns Quota's decision, and the ID under which Quota logs the decision."""
        check: dict[str, Any] = {"key": key, "cost": cost}
        endpoint = "".join(it for it in self.endpoint(scope) or "" if it.isprintable())[:128]
        if endpoint:
            check["endpoint"] = endpoint
        ids = header(scope, "x-request-id")
        headers = {"X-Request-Id": ids[0]} if len(ids) == 1 and REQUEST_ID.fullmatch(ids[0]) else {}
        try:
            async with asyncio.timeout(self.timeout):
                response = await self.client.post(self.url, json=check, headers=headers)
        except (httpx.HTTPError, TimeoutError) as error:
            # The error's message may contain a header, and therefore the service token.
            raise Unavailable(type(error).__name__) from error
        if response.status_code != 200:
            # The consumer may have caused these 4xx statuses, and could otherwise use them to bypass the limits. A 503
            # with `X-Quota-Degraded` results from the plan's fallback setting.
            is_final = response.status_code in (400, 413, 415, 422, 431) or (
                response.status_code == 503 and "X-Quota-Degraded" in response.headers
            )
            raise Unavailable(f"status {response.status_code}", is_final)
        try:
            decision = response.json()
            if decision["allowed"] is not (decision["code"] == "allowed"):
                raise ValueError("the response contradicts itself")
            for name, value in decision["headers"].items():
                (name + value).encode("ascii")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unavailable(f"the response is not a decision: {error!r}") from error
        return decision, response.headers.get("X-Request-Id")


async def deny(send: Callable[..., Any], decision: dict[str, Any], request_id: str | None, cost: int) -> None:
    """Responds to a request that was denied."""
    code, headers, wait = decision["code"], decision["headers"], decision.get("retry_after")
    more: dict[str, Any] = {} if request_id is None else {"request_id": request_id}
    if code in ("unknown_key", "inactive_key", "expired_key"):
        await respond(send, 401, "Unauthorized", "This API key is invalid, inactive or expired.", headers, more)
    elif code == "payment_required":
        await respond(send, 402, "Payment Required", "This API key requires a valid subscription.", headers, more)
    elif code == "reduced_capacity":
        more["type"] = PROBLEMS + "temporary-reduced-capacity"
        await respond(send, 429, "Temporarily reduced capacity", CANNOT_CHECK, headers, more)
    else:
        more["type"] = PROBLEMS + "quota-exceeded"
        violated = [limit["policy"] for limit in decision.get("limits", []) if limit["remaining"] < cost]
        if violated:
            more["violated-policies"] = violated
        if wait is None:
            detail = "A limit of this API key is lower than the cost of this request."
        else:
            unit = "second" if wait == 1 else "seconds"
            detail = f"A limit of this API key has been reached. Retry in {wait} {unit}."
        await respond(send, 429, "Rate limit or quota exceeded", detail, headers, more)


async def respond(
    send: Callable[..., Any],
    status: int,
    title: str,
    detail: str,
    headers: dict[str, str],
    more: dict[str, Any] | None = None,
) -> None:
    """Sends problem details (RFC 9457)."""
    problem = {"type": "about:blank", "title": title, "status": status, "detail": detail, **(more or {})}
    body = json.dumps(problem).encode()
    headers = {
        **headers,
        "Content-Type": "application/problem+json",
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
    }
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
