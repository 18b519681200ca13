//! The pages, one file each.

mod api_key;
mod api_keys;
mod audit;
mod bulk;
mod home;
mod new_api_key;
mod plans;
mod service_tokens;
mod settings;
mod sign_in;
mod try_it;

use leptos::prelude::*;

pub use api_key::ApiKeyPage;
pub use api_keys::ApiKeys;
pub use audit::Audit;
pub use home::Home;
pub use plans::Plans;
pub use service_tokens::ServiceTokens;
pub use settings::Settings;
pub use sign_in::{Register, SignIn};

use crate::component::{Empty, Head, Shape};

#[component]
pub fn NotFound() -> impl IntoView {
    view! {
        <Head title="Not found"/>
        <Empty shape=Shape::Search title="There is no such page" about="The address may be mistyped, or the page may have moved.">
            <a class="button first" href="/console">"Home"</a>
        </Empty>
    }
}
