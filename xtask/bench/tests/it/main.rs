//! The measurement itself, as a program: small, with the real `quota`, PostgreSQL and Redis.

mod replicas;
