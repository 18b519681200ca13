//! What the operations do, one file for each noun: acting through HTTP, asserting on HTTP, then on the database.

mod api_key;
mod audit;
mod auth;
mod browser_session;
mod limit;
mod plan;
mod rotation;
mod service_token;
