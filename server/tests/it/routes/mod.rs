//! The behavior of each operation, one file per kind of resource. Tests send HTTP requests, and check the responses and
//! then the database.

mod api_key;
mod audit;
mod auth;
mod browser_session;
mod limit;
mod plan;
mod rotation;
mod service_token;
mod webhook;
