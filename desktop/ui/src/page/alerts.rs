//! Quota alerts, and the settings that determine where they are sent.

use leptos::prelude::*;
use quota_common::{
    Page,
    alert::{AlertSettings, QuotaAlert, UpdateAlertSettings},
    auth::Role,
    call::PageOf,
    page::MAX_LIMIT,
    webhook::Webhook,
};

use super::new_alerts::NewAlerts;
use crate::{
    api::{self, CallResult, PendingCall},
    clock::now,
    component::{
        Async, Card, DialogForm, EmptyState, FormState, Loader, Modal, PageHeader, Pager, Shape,
        StaleNote, Toasts, load, load_page, refresh_regularly,
    },
    model::{
        alert::{alert_table, email_warning, recipients, role_members},
        form::changed,
        text::capitalized,
        webhook::webhook_counts,
    },
    reactive::effect,
    route::route,
    session::session,
};

#[component]
pub fn Alerts() -> impl IntoView {
    let session = session();
    let query = route().query;
    let new_alerts = expect_context::<NewAlerts>();
    // Alerts remain marked as new until the user leaves the page.
    let seen = new_alerts.seen();
    let loader = load_page(api::list_alerts);
    refresh_regularly(loader);
    let mark_seen = move || {
        let newest = loader.with(|page| page.items.first().map(|it| it.id));
        let is_first_page = query.with(|query| query.get("cursor").is_none());
        // Alerts that appear while the user is looking at another window remain marked as new until the user returns.
        let has_focus = document().has_focus().unwrap_or(true);
        if let Some(newest) = newest.flatten()
            && is_first_page
            && has_focus
        {
            new_alerts.mark_seen(newest);
        }
    };
    effect(mark_seen);
    let listener = window_event_listener_untyped("focus", move |_| mark_seen());
    on_cleanup(move || listener.remove());
    let show = move |page: Page<QuotaAlert>| {
        if page.items.is_empty() {
            return view! {
                <EmptyState shape=Shape::Alerts title="No alerts yet" about="Quota creates an alert when 50, 80 or 100% of a daily or monthly quota has been used. Set quotas in your plans.">
                    {untrack(move || session.can_read()).then(|| view! { <a class="button" href="/console/plans">"View plans"</a> })}
                </EmptyState>
            }
                .into_any();
        }
        let shown = page.items.len();
        let table = alert_table(&page.items, seen, now()).to_string();
        view! {
            <div inner_html=table></div>
            <Pager total=page.total shown next=page.next_cursor/>
        }
        .into_any()
    };
    view! {
        <PageHeader title="Alerts" about="You get an alert when 50, 80 or 100% of a daily or monthly quota has been used."/>
        {move || session.can_read().then(|| view! { <Notifications/> })}
        <StaleNote loader/>
        <Async loader what="alerts" show/>
    }
}

#[derive(Clone)]
struct Destinations {
    settings: AlertSettings,
    webhooks: Vec<Webhook>,
}

async fn load_destinations() -> CallResult<Destinations> {
    let all = PageOf {
        limit: Some(MAX_LIMIT),
        cursor: None,
    };
    Ok(Destinations {
        settings: api::alert_settings().await?,
        webhooks: api::list_webhooks(all).await?.items,
    })
}

#[component]
fn Notifications() -> impl IntoView {
    let loader = load(|| Box::pin(load_destinations()) as PendingCall<_>);
    let editing = RwSignal::new(false);
    let can_administer = session().can_administer();
    let show = move |it: Destinations| {
        let webhooks = webhook_counts(&it.webhooks);
        view! {
            {email_warning(&it.settings).map(|text| view! { <p class="alert warn">{text}</p> })}
            <ul class="sessions">
                <li>
                    <div>
                        <strong>"Email"</strong>
                        <p class="muted">{recipients(&it.settings)}</p>
                    </div>
                    {can_administer
                        .then(|| view! { <button class="button small" data-focus-key="edit-email" aria-label="Edit email notifications" on:click=move |_| editing.set(true)>"Edit"</button> })}
                </li>
                <li>
                    <div>
                        <strong>"Webhooks"</strong>
                        <p class="muted">{webhooks}</p>
                    </div>
                    <a class="button small" href="/console/webhooks">"View webhooks"</a>
                </li>
            </ul>
        }
    };
    view! {
        <Card id="notifications" title="Notifications">
            <Async loader what="the settings" inside=true show/>
        </Card>
        <Modal open=editing panel=true title="Email notifications">
            {untrack(move || loader.with(|it| it.settings.clone()))
                .map(|settings| view! { <EmailForm settings open=editing loader/> })}
        </Modal>
    }
}

#[component]
fn EmailForm(
    settings: AlertSettings,
    open: RwSignal<bool>,
    loader: Loader<Destinations>,
) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let form = FormState::new();
    let email = RwSignal::new(settings.email);
    let roles = RwSignal::new(settings.email_roles.clone());
    let has_no_role = move || email.get() && roles.with(Vec::is_empty);
    let is_submitted = RwSignal::new(false);
    let submit = move || {
        is_submitted.set(true);
        if untrack(has_no_role) {
            form.busy.set(false);
            return;
        }
        let selected: Vec<Role> = roles.with_untracked(|roles| {
            let all = Role::ALL.iter().copied();
            all.filter(|it| roles.contains(it)).collect()
        });
        let body = UpdateAlertSettings {
            email: changed(&settings.email, email.get_untracked()),
            email_roles: changed(&settings.email_roles, selected),
        };
        if body == UpdateAlertSettings::default() {
            form.busy.set(false);
            return open.set(false);
        }
        form.send(api::update_alert_settings(body), move |_| {
            let _ = open.try_set(false);
            toasts.succeed("Changes saved");
            loader.reload();
        });
    };
    let choice = move |role: Role| {
        let select = move |ev| {
            roles.update(|roles| {
                roles.retain(|it| *it != role);
                if event_target_checked(&ev) {
                    roles.push(role);
                }
            });
        };
        view! {
            <label class="check">
                <input type="checkbox" name=role.as_str() prop:checked=move || roles.with(|roles| roles.contains(&role)) on:change=select/>
                <span>{capitalized(role_members(role))}</span>
            </label>
        }
    };
    view! {
        <DialogForm form open action="Save changes" submit>
            <label class="check">
                <input type="checkbox" name="email" autofocus bind:checked=email/>
                <span>"Send alerts by email"</span>
            </label>
            <fieldset class="radios" disabled=move || !email.get()>
                <legend>"Recipients"</legend>
                {Role::ALL.iter().map(|role| choice(*role)).collect_view()}
            </fieldset>
            <div role="alert">
                {move || (is_submitted.get() && has_no_role()).then(|| view! { <p class="alert">"Select at least one role, or turn off email alerts."</p> })}
            </div>
        </DialogForm>
    }
}
