//! Detects new quota alerts while the console is open. The navigation shows the number of new alerts, and a toast
//! announces them. In the desktop app, the operating system also shows the toast's text.

use leptos::{prelude::*, task::spawn_local};
use quota_common::{QuotaAlertId, call::PageOf};

use crate::{
    api,
    clock::track_ticks,
    component::Toasts,
    host,
    model::alert::{announcement, newer, unannounced},
    preferences,
    reactive::effect,
    route::{Route, route},
    session::{Session, session},
};

/// How often to check for alerts, in clock ticks. Two ticks are one minute.
const EVERY: u32 = 2;
/// The maximum number of new alerts to count.
const MAX_COUNT: u32 = 20;

/// Alerts that the user has not seen in this browser.
#[derive(Clone, Copy)]
pub struct NewAlerts {
    count: RwSignal<usize>,
    /// The newest alert at the last check. `None` before the first check.
    announced: StoredValue<Option<QuotaAlertId>>,
    session: Session,
    toasts: Toasts,
    route: Route,
}

impl NewAlerts {
    /// Checks for alerts until the calling component is removed.
    pub fn watch(toasts: Toasts) -> Self {
        let alerts = Self {
            count: RwSignal::new(0),
            announced: StoredValue::new(None),
            session: session(),
            toasts,
            route: route(),
        };
        provide_context(alerts);
        let ticks = StoredValue::new(0_u32);
        effect(move || {
            track_ticks();
            let tick = ticks.get_value();
            ticks.set_value(tick.wrapping_add(1));
            // Notifications of the operating system are also useful while the window is minimized.
            let is_useful = host::NOTIFIES || !document().hidden();
            if tick.is_multiple_of(EVERY) && is_useful && !host::is_offline() {
                spawn_local(alerts.look());
            }
        });
        alerts
    }

    async fn look(self) {
        let page = PageOf {
            limit: Some(MAX_COUNT),
            cursor: None,
        };
        // Errors are ignored: pages that need the response report errors themselves.
        let Ok(page) = api::list_alerts(page).await else {
            return;
        };
        let newest = page.items.first().map_or(QuotaAlertId::NIL, |it| it.id);
        let seen = self.seen().unwrap_or_else(|| {
            // Alerts created before the console was first opened in this browser do not count as new.
            self.store(newest);
            newest
        });
        let _ = self.count.try_set(newer(&page.items, seen).count());
        // The user may have signed out.
        let Some(announced) = self.announced.try_get_value() else {
            return;
        };
        let new = unannounced(&page.items, announced, seen);
        self.announced.set_value(announced.max(Some(newest)));
        if let Some(text) = announcement(&new) {
            let route = self.route;
            let open = move || route.go("/console/alerts");
            self.toasts.announce(text.clone(), "View alerts", open);
            api::notify(&text).await;
        }
    }

    /// Returns the newest alert that the user has seen. `None` before the first check in this browser.
    pub fn seen(self) -> Option<QuotaAlertId> {
        preferences::seen_alert(&self.tenant()?)?.parse().ok()
    }

    /// Marks `newest` and all older alerts as seen.
    pub fn mark_seen(self, newest: QuotaAlertId) {
        if self.seen().is_none_or(|seen| seen < newest) {
            self.store(newest);
        }
        self.count.set(0);
    }

    fn store(self, newest: QuotaAlertId) {
        if let Some(tenant) = self.tenant() {
            preferences::set_seen_alert(&tenant, &newest.to_string());
        }
    }

    fn tenant(self) -> Option<String> {
        let me = self.session.me.get_untracked()?;
        Some(me.tenant.id.to_string())
    }

    /// Returns the number of new alerts, such as `3 new`. `None` if there are none.
    pub fn label(self) -> Option<String> {
        match self.count.get() {
            0 => None,
            n if n >= MAX_COUNT as usize => Some(format!("{n}+ new")),
            n => Some(format!("{n} new")),
        }
    }
}
