//! Pages that are not part of the first download. Each group of pages is a WebAssembly module. A module is loaded when
//! the user opens one of its pages, or in the background shortly after sign-in.
//!
//! If code is called only by the `wasm_split` functions below, `cargo xtask console` moves the code into the modules.

#![cfg_attr(
    target_arch = "wasm32",
    expect(
        clippy::unnecessary_wraps,
        reason = "the macro turns these functions into loaders, which can fail"
    )
)]

use std::time::Duration;

use leptos::{
    prelude::*,
    task::spawn_local,
    wasm_split::{SplitLoaderError, wasm_split},
};

use super::{
    alerts::Alerts, audit_log::AuditLog, billing::Billing, settings::Settings, usage::UsagePage,
    webhooks::Webhooks,
};
use crate::{
    api::{CallError, PendingCall},
    component::{Async, PageHeader, load},
};

type View = fn() -> AnyView;

/// The pages of one module.
#[derive(Clone, Copy)]
pub struct Pages {
    first: View,
    second: View,
}

#[wasm_split(observe, wasm_split_path = leptos::wasm_split, fallible)]
fn observe() -> Result<Pages, SplitLoaderError> {
    Ok(Pages {
        first: || view! { <UsagePage/> }.into_any(),
        second: || view! { <AuditLog/> }.into_any(),
    })
}

#[wasm_split(account, wasm_split_path = leptos::wasm_split, fallible)]
fn account() -> Result<Pages, SplitLoaderError> {
    Ok(Pages {
        first: || view! { <Billing/> }.into_any(),
        second: || view! { <Settings/> }.into_any(),
    })
}

#[wasm_split(events, wasm_split_path = leptos::wasm_split, fallible)]
fn events() -> Result<Pages, SplitLoaderError> {
    Ok(Pages {
        first: || view! { <Alerts/> }.into_any(),
        second: || view! { <Webhooks/> }.into_any(),
    })
}

/// A page that is in a separate module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    Usage,
    Audit,
    Billing,
    Settings,
    Alerts,
    Webhooks,
}

impl Chunk {
    const fn title(self) -> &'static str {
        match self {
            Self::Usage => "Usage",
            Self::Audit => "Audit log",
            Self::Billing => "Billing",
            Self::Settings => "Settings",
            Self::Alerts => "Alerts",
            Self::Webhooks => "Webhooks",
        }
    }

    fn load(self) -> PendingCall<Pages> {
        Box::pin(async move {
            let pages = match self {
                Self::Usage | Self::Audit => observe().await,
                Self::Billing | Self::Settings => account().await,
                Self::Alerts | Self::Webhooks => events().await,
            };
            pages.map_err(|_| CallError::NoCode)
        })
    }
}

/// Shows a page as soon as its module is loaded.
#[component]
pub fn LazyPage(page: Chunk) -> impl IntoView {
    let loader = load(move || page.load());
    let show = move |pages: Pages| match page {
        Chunk::Usage | Chunk::Billing | Chunk::Alerts => (pages.first)(),
        Chunk::Audit | Chunk::Settings | Chunk::Webhooks => (pages.second)(),
    };
    // Shows a header until the page shows its own header.
    let is_missing = move || loader.with(|_| ()).is_none();
    view! {
        {move || is_missing().then(|| view! { <PageHeader title=page.title()/> })}
        <Async loader show/>
    }
}

/// Loads the modules in the background, so that their pages open immediately.
pub fn preload_chunks() {
    set_timeout(
        || {
            spawn_local(async {
                let _ = Chunk::Usage.load().await;
                let _ = Chunk::Billing.load().await;
                let _ = Chunk::Alerts.load().await;
            });
        },
        Duration::from_secs(1),
    );
}
