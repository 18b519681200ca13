//! Runs the benchmarks at a small scale, with the real `quota`, PostgreSQL and Redis.

mod replicas;
