/**
 * An API whose requests are checked with Quota.
 *
 *     npm install && npx tsc
 *     QUOTA_URL=https://quota.example.com QUOTA_SERVICE_TOKEN=qs_… node dist/example.js
 */

import express from "express";
import { quota, type Decision } from "./quota.js";

function setting(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set`);
  return value;
}

const app = express();
const limited = quota({
  url: setting("QUOTA_URL"),
  serviceToken: setting("QUOTA_SERVICE_TOKEN"),
  allowIfUnavailable: process.env.QUOTA_ALLOW_IF_UNAVAILABLE === "true",
});

app.get("/orders/:id", limited, (request, response) => {
  const decision: Decision | null = response.locals.quota;
  response.json({ order: request.params.id, plan: decision && decision.plan });
});

app.listen(Number(process.env.PORT ?? 3000), "127.0.0.1");
