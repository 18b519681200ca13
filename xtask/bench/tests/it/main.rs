//! Runs the benchmarks at a small scale, with the real `quota`, PostgreSQL, Redis and Caddy.

mod replicas;
mod restarts;
