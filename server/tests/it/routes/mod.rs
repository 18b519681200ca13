//! What each operation does, one file per noun. Tests act through HTTP, then assert on HTTP and on the database.

mod api_key;
mod audit;
mod auth;
mod browser_session;
mod limit;
mod plan;
mod rotation;
mod service_token;
