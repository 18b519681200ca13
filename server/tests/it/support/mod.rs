//! What tests stand on.

pub(crate) mod postgres;
pub(crate) mod proxy;
pub(crate) mod redis;
