//! The page that is shown instead of a page that the user's role cannot use.

use leptos::prelude::*;

use crate::{
    component::{EmptyState, PageHeader, Shape},
    model::role::no_access,
    session::session,
};

#[component]
pub fn NoAccess(
    /// What the user's role has no access to, such as `plans`.
    what: &'static str,
) -> impl IntoView {
    let session = session();
    let role = session
        .me
        .with_untracked(|me| me.as_ref().map(|me| me.tenant.role));
    let about = role.map(|role| no_access(role, what)).unwrap_or_default();
    let title = format!("You don't have access to {what}");
    view! {
        <PageHeader title="No access"/>
        <EmptyState shape=Shape::Close title about>
            <a class="button" href="/console">"Go to Home"</a>
        </EmptyState>
    }
}
