"""FastAPI with slowapi: `/ample` has a limit that is never reached, `/limited` allows LIMIT requests per minute. Both
count per API key, in memory or in the Redis at REDIS_URL."""

import os

from fastapi import FastAPI, Request
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded

MOST = "60000000/minute"

limiter = Limiter(
    key_func=lambda request: request.headers.get("x-api-key", ""),
    storage_uri=os.environ.get("REDIS_URL", "memory://"),
    strategy=os.environ.get("STRATEGY", "fixed-window"),
)
app = FastAPI()
app.state.limiter = limiter
app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)

ANSWER = {
    "key_id": "019ab4e1-7c00-7000-8000-0000000000a1",
    "plan": "ample",
    "time": "2026-08-03T09:46:00Z",
}


@app.get("/ample")
@limiter.limit(MOST)
async def ample(request: Request):
    return ANSWER


@app.get("/limited")
@limiter.limit(os.environ.get("LIMIT", "1") + "/minute")
async def limited(request: Request):
    return ANSWER
