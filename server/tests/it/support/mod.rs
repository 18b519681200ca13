//! Test support.

pub(crate) mod app;
pub(crate) mod authority;
pub(crate) mod caddy;
pub(crate) mod collector;
pub(crate) mod grpc;
pub(crate) mod hooks;
pub(crate) mod http2;
pub(crate) mod postgres;
pub(crate) mod quota;
pub(crate) mod stripe;
