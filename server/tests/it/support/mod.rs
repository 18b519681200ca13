//! What tests stand on.

pub(crate) mod app;
pub(crate) mod postgres;
pub(crate) mod proxy;
pub(crate) mod quota;
pub(crate) mod redis;
