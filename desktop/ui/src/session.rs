//! The signed-in account, shared by all pages.

use leptos::{prelude::*, task::spawn_local};
use quota_common::{ApiKeyId, ProblemCode, auth::Me};

use crate::{
    api::{self, CallError},
    component::Toasts,
    model::role::Right,
    route::Route,
};

#[derive(Debug, Clone, PartialEq)]
pub enum AuthState {
    Unknown,
    SignedIn,
    SignedOut,
    Failed(CallError),
}

#[derive(Clone, Copy)]
pub struct Session {
    pub auth: RwSignal<AuthState>,
    pub me: RwSignal<Option<Me>>,
    /// Whether the session ended without a sign-out by the user. If so, the sign-in page says that the session has
    /// expired.
    pub has_expired: RwSignal<bool>,
    /// The full keys that were created or rotated in this window. They are discarded when the page is closed or
    /// reloaded, or when the session ends.
    pub known_keys: RwSignal<Vec<(ApiKeyId, String)>>,
    toasts: Toasts,
}

impl Session {
    pub fn provide(route: Route, toasts: Toasts) -> Self {
        let session = Self {
            auth: RwSignal::new(AuthState::Unknown),
            me: RwSignal::new(None),
            has_expired: RwSignal::new(false),
            known_keys: RwSignal::new(Vec::new()),
            toasts,
        };
        provide_context(session);
        api::on_session_end(move |error| {
            let was_signed_in = session.auth.get_untracked() == AuthState::SignedIn;
            session.end();
            if was_signed_in {
                session.has_expired.set(*error != CallError::AccountChanged);
            }
            if *error == CallError::AccountChanged {
                // Start over with the account that is now signed in.
                session.auth.set(AuthState::Unknown);
                route.replace("/console");
                toasts.fail(error);
                session.load();
            }
        });
        session
    }

    /// Loads the current user.
    pub fn load(self) {
        spawn_local(async move {
            match api::me().await {
                Ok(me) => self.begin(me),
                // `on_session_end` handles ended sessions for every call.
                Err(error) if error.is(ProblemCode::Unauthorized) => {}
                Err(error) => {
                    if self.auth.get_untracked() != AuthState::SignedIn {
                        self.auth.set(AuthState::Failed(error));
                    }
                }
            }
        });
    }

    pub fn begin(self, me: Me) {
        self.has_expired.set(false);
        self.me.set(Some(me));
        self.auth.set(AuthState::SignedIn);
    }

    pub fn end(self) {
        self.me.set(None);
        self.known_keys.set(Vec::new());
        self.toasts.clear();
        self.auth.set(AuthState::SignedOut);
    }

    /// Returns whether the user's role has a right.
    pub fn has(self, right: Right) -> bool {
        self.me
            .with(|me| me.as_ref().is_some_and(|me| right.is_of(me.tenant.role)))
    }

    /// Returns whether the user's role can create, change, and delete plans, keys, tokens, and webhooks.
    pub fn can_manage(self) -> bool {
        self.has(Right::Manage)
    }

    /// Returns whether the user's role can view plans, keys, tokens, webhooks, and the audit log.
    pub fn can_read(self) -> bool {
        self.has(Right::Read)
    }

    /// Returns whether the user's role can change the organization and its alert settings.
    pub fn can_administer(self) -> bool {
        self.me.with(|me| {
            me.as_ref()
                .is_some_and(|me| me.tenant.role.may_administer())
        })
    }

    /// Returns whether the user's role can view and change the subscription.
    pub fn can_bill(self) -> bool {
        self.has(Right::Bill)
    }

    /// Returns the time zone that determines when quotas reset.
    pub fn time_zone(self) -> String {
        self.me
            .with(|me| me.as_ref().map(|me| me.tenant.time_zone.clone()))
            .unwrap_or_default()
    }
}

pub fn session() -> Session {
    expect_context()
}
