"""An API whose requests are checked with Quota.

    pip install -r requirements.txt
    QUOTA_URL=https://quota.example.com QUOTA_SERVICE_TOKEN=qs_… uvicorn example:app
"""

import os

from fastapi import APIRouter, FastAPI, Request

from quota import QuotaMiddleware

app = FastAPI()
app.add_middleware(
    QuotaMiddleware,
    url=os.environ["QUOTA_URL"],
    service_token=os.environ["QUOTA_SERVICE_TOKEN"],
    allow_if_unavailable=os.environ.get("QUOTA_ALLOW_IF_UNAVAILABLE") == "true",
)


orders = APIRouter(prefix="/orders")


@orders.get("/{order_id}")
async def order(order_id: str, request: Request) -> dict[str, str | None]:
    decision = request.state.quota
    return {"order": order_id, "plan": decision and decision["plan"]}


app.include_router(orders)
