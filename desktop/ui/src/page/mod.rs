//! The pages, and their dialogs and components.

mod api_key;
mod api_keys;
mod audit_log;
mod billing;
mod bulk_actions;
mod burn_down;
mod chunks;
mod create_api_key;
mod create_button;
mod edit_api_key;
mod home;
mod key_status;
mod key_usage;
mod live_tail;
mod local_time;
mod not_found;
mod plan_form;
mod plan_list;
mod plans;
mod rotate_api_key;
mod service_tokens;
mod settings;
mod sign_in;
mod try_it;
mod usage;
mod usage_data;

pub use api_key::ApiKeyPage;
pub use api_keys::ApiKeys;
pub use chunks::{Chunk, LazyPage, preload_chunks};
pub use home::Home;
pub use not_found::NotFound;
pub use plans::Plans;
pub use service_tokens::ServiceTokens;
pub use sign_in::{Register, SignIn};
