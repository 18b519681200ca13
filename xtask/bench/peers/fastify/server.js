// Fastify with rate-limiter-flexible: `/ample` has a limit that is never reached, and `/limited` allows LIMIT requests
// per minute. Both count per API key, in memory or in the Redis at REDIS_URL.

import Fastify from "fastify";
import { Redis } from "ioredis";
import { RateLimiterMemory, RateLimiterRedis } from "rate-limiter-flexible";

const MOST = 60_000_000;
const { LIMIT, PORT, REDIS_URL } = process.env;

const redis = REDIS_URL && new Redis(REDIS_URL, { enableOfflineQueue: false });
redis?.on("error", () => {});

const limiter = (keyPrefix, points) => {
  const options = { keyPrefix, points, duration: 60 };
  return redis
    ? // Requests with keys that are over the limit are rejected without a call to Redis.
      new RateLimiterRedis({ ...options, storeClient: redis, inMemoryBlockOnConsumed: points })
    : new RateLimiterMemory(options);
};

const limited = (limiter) => async (request, reply) => {
  try {
    await limiter.consume(request.headers["x-api-key"]);
  } catch (refused) {
    if (refused instanceof Error) {
      throw refused;
    }
    reply.header("Retry-After", Math.round(refused.msBeforeNext / 1000) || 1);
    return reply.code(429).send({ error: "Too Many Requests" });
  }
};

const app = Fastify();
const answer = async () => ({
  key_id: "019ab4e1-7c00-7000-8000-0000000000a1",
  plan: "ample",
  time: "2026-08-03T09:46:00Z",
});
app.get("/ample", { onRequest: limited(limiter("ample", MOST)) }, answer);
app.get("/limited", { onRequest: limited(limiter("limited", Number(LIMIT))) }, answer);
await app.listen({ port: Number(PORT), host: "127.0.0.1" });
