//! The audit log.

use leptos::prelude::*;
use quota_common::{
    audit::{AuditAction, AuditEvent, AuditTarget},
    call::AuditFilter,
};

use crate::{
    api,
    component::{Async, EmptyState, PageHeader, Pager, RelativeTime, Shape, load_page},
    model::{address::Query, text::count},
    route::route,
};

/// The label of an action such as `api_key.rotate`.
fn action_label(text: &str) -> String {
    match text {
        "session.begin" => "Signed in",
        "session.end" => "Signed out",
        "session.reuse_detected" => "Session revoked: refresh token reused",
        "user.register" => "Account created",
        "user.update" => "Profile updated",
        "user.change_password" => "Password changed",
        "user.reset_password" => "Password reset",
        "tenant.update" => "Organization updated",
        _ => {
            let (noun, verb) = text.split_once('.').unwrap_or((text, ""));
            let noun = match noun {
                "plan" => "Plan",
                "api_key" => "API key",
                "service_token" => "Service token",
                other => other,
            };
            return format!("{noun} {verb}d");
        }
    }
    .to_owned()
}

const fn resource_label(target: AuditTarget) -> &'static str {
    match target {
        AuditTarget::Plan => "Plans",
        AuditTarget::ApiKey => "API keys",
        AuditTarget::ServiceToken => "Service tokens",
        AuditTarget::User => "Accounts",
        AuditTarget::Session => "Sessions",
        AuditTarget::Tenant => "Organization",
    }
}

fn resources(_: &Query) -> Vec<(&'static str, String)> {
    let all = AuditTarget::ALL.iter();
    all.map(|it| (it.as_str(), resource_label(*it).to_owned()))
        .collect()
}

/// The actions on the selected resource.
fn actions(query: &Query) -> Vec<(&'static str, String)> {
    let noun = query.get("target_type").unwrap_or_default();
    AuditAction::ALL
        .iter()
        .map(|it| it.as_str())
        .filter(|it| it.starts_with(&noun))
        .map(|it| (it, action_label(it)))
        .collect()
}

/// A filter that is part of the address.
#[component]
fn Filter(
    name: &'static str,
    label: &'static str,
    all: &'static str,
    options: fn(&Query) -> Vec<(&'static str, String)>,
) -> impl IntoView {
    let route = route();
    let change = move |ev| {
        let mut query = route.query.get_untracked().with("cursor", "");
        if name == "target_type" {
            query = query.with("action", "");
        }
        let query = query.with(name, &event_target_value(&ev));
        route.replace(&format!("/console/audit{query}"));
    };
    view! {
        <div class="field">
            <label for=name>{label}</label>
            <select id=name on:change=change>
                {move || {
                    route
                        .query
                        .with(|query| {
                            let current = query.get(name).unwrap_or_default();
                            let mut all = vec![("", all.to_owned())];
                            all.append(&mut options(query));
                            all.into_iter()
                                .map(|(value, text)| view! { <option value=value selected=value == current>{text}</option> })
                                .collect_view()
                        })
                }}
            </select>
        </div>
    }
}

/// The changed fields with their values before and after.
fn changed_fields(event: &AuditEvent) -> Vec<(String, String, String)> {
    let fields = |value: &Option<serde_json::Value>| {
        value
            .as_ref()
            .and_then(|it| it.as_object().cloned())
            .unwrap_or_default()
    };
    let (before, after) = (fields(&event.before), fields(&event.after));
    let text = |value: Option<&serde_json::Value>| match value {
        None => String::new(),
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(serde_json::Value::Null) => "none".to_owned(),
        Some(other) => serde_json::to_string(other).unwrap_or_default(),
    };
    let added = after.keys().filter(|name| !before.contains_key(*name));
    before
        .keys()
        .chain(added)
        .map(|name| {
            (
                name.replace('_', " "),
                text(before.get(name)),
                text(after.get(name)),
            )
        })
        .collect()
}

#[component]
pub fn AuditLog() -> impl IntoView {
    let query = route().query;
    let parameter = move |name: &str| query.with(|query| query.get(name));
    let loader = load_page(move |page| {
        let filter = AuditFilter {
            action: parameter("action").and_then(|it| AuditAction::of(&it)),
            target_type: parameter("target_type").and_then(|it| AuditTarget::of(&it)),
        };
        api::list_audit(filter, page)
    });
    view! {
        <PageHeader title="Audit log" about="Every change: what was changed, by whom, when, and from where."/>
        <search class="filters two">
            <Filter name="target_type" label="Resource" all="All resources" options=resources/>
            <Filter name="action" label="Action" all="All actions" options=actions/>
        </search>
        <Async
            loader
            show=move |page| {
                if page.items.is_empty() && (parameter("target_type").is_some() || parameter("action").is_some()) {
                    return view! {
                        <EmptyState shape=Shape::Search title="No matching events" about="Try other filters.">
                            <a class="button" href="/console/audit">"Clear filters"</a>
                        </EmptyState>
                    }
                        .into_any();
                }
                if page.items.is_empty() {
                    return view! {
                        <EmptyState shape=Shape::Audit title="No events yet" about="Changes to plans, keys, tokens and sessions appear here."/>
                    }
                        .into_any();
                }
                let shown = page.items.len();
                let deleted_keys = page
                    .items
                    .iter()
                    .filter(|it| it.action == "api_key.delete")
                    .map(|it| it.target_id.clone())
                    .collect::<Vec<_>>();
                view! {
                    <table class="table">
                        <caption class="visually-hidden">"Events, newest first"</caption>
                        <thead>
                            <tr>
                                <th scope="col">"Action"</th>
                                <th scope="col">"Resource"</th>
                                <th scope="col">"Actor"</th>
                                <th scope="col">"IP address"</th>
                                <th scope="col">"Time"</th>
                                <th scope="col">"Details"</th>
                            </tr>
                        </thead>
                        <tbody>
                            {page
                                .items
                                .into_iter()
                                .map(|event| {
                                    let changes = changed_fields(&event);
                                    let has_page = event.target_type == "api_key" && !deleted_keys.contains(&event.target_id);
                                    let id = event.target_id.clone().filter(|_| has_page);
                                    let href = id.map(|id| format!("/console/api-keys/{id}"));
                                    // Accounts and sessions have no name of their own; the actor identifies them.
                                    let name = event.target_name.clone().unwrap_or_else(|| "–".to_owned());
                                    view! {
                                        <tr>
                                            <th scope="row">{action_label(&event.action)}</th>
                                            // Without an `href`, as for deleted keys, this is plain text.
                                            <td data-label="Resource" class="name-cell"><a class="clamp" dir="auto" href=href>{name}</a></td>
                                            <td class="actor" data-label="Actor" dir="auto">{event.user_email.clone().unwrap_or_else(|| "System".to_owned())}</td>
                                            <td data-label="IP address"><code>{event.ip.clone().unwrap_or_else(|| "–".to_owned())}</code></td>
                                            <td data-label="Time"><div><RelativeTime at=event.at with_exact=true/></div></td>
                                            <td data-label="Details">
                                                {if changes.is_empty() {
                                                    view! { <span class="muted">"–"</span> }.into_any()
                                                } else {
                                                    view! {
                                                        <details>
                                                            <summary>{count(changes.len() as u64, "field", "fields")}</summary>
                                                            <dl class="changes">
                                                                {changes
                                                                    .into_iter()
                                                                    .map(|(name, before, after)| view! {
                                                                        <div>
                                                                            <dt>{name}</dt>
                                                                            <dd dir="auto">
                                                                                {(!before.is_empty()).then(|| view! { <del>{before}</del> " " })}
                                                                                {(!after.is_empty()).then(|| view! { <ins>{after}</ins> })}
                                                                            </dd>
                                                                        </div>
                                                                    })
                                                                    .collect_view()}
                                                            </dl>
                                                        </details>
                                                    }
                                                        .into_any()
                                                }}
                                            </td>
                                        </tr>
                                    }
                                })
                                .collect_view()}
                        </tbody>
                    </table>
                    <Pager total=page.total shown next=page.next_cursor/>
                }
                    .into_any()
            }
        />
    }
}
