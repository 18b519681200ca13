//! Who changed what.

use leptos::prelude::*;
use quota_common::{
    audit::{AuditAction, AuditEvent, AuditTarget},
    call::AuditFilter,
};

use crate::{
    api,
    component::{Empty, Head, Pager, Shape, Shown, When, load_page},
    model::address::Query,
    route::route,
};

/// `api_key.rotate` as people say it.
fn action(text: &str) -> String {
    match text {
        "session.begin" => "Signed in",
        "session.end" => "Signed out",
        "session.reuse_detected" => "Session ended: its token was used twice",
        "user.register" => "Account created",
        "user.update" => "Profile changed",
        "user.change_password" => "Password changed",
        "user.reset_password" => "Password reset",
        "tenant.update" => "Organisation changed",
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

const fn kind(target: AuditTarget) -> &'static str {
    match target {
        AuditTarget::Plan => "Plans",
        AuditTarget::ApiKey => "API keys",
        AuditTarget::ServiceToken => "Service tokens",
        AuditTarget::User => "Accounts",
        AuditTarget::Session => "Sessions",
        AuditTarget::Tenant => "Organisation",
    }
}

fn kinds(_: &Query) -> Vec<(&'static str, String)> {
    let all = AuditTarget::ALL.iter();
    all.map(|it| (it.as_str(), kind(*it).to_owned())).collect()
}

/// Those that there are of the kind that is chosen.
fn actions(query: &Query) -> Vec<(&'static str, String)> {
    let noun = query.get("target_type").unwrap_or_default();
    AuditAction::ALL
        .iter()
        .map(|it| it.as_str())
        .filter(|it| it.starts_with(&noun))
        .map(|it| (it, action(it)))
        .collect()
}

/// Chooses by address among these values.
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

/// The fields that changed, in words.
fn change(event: &AuditEvent) -> Vec<(String, String, String)> {
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
pub fn Audit() -> impl IntoView {
    let query = route().query;
    let part = move |name: &str| query.with(|query| query.get(name));
    let loader = load_page(move |page| {
        let filter = AuditFilter {
            action: part("action").and_then(|it| AuditAction::of(&it)),
            target_type: part("target_type").and_then(|it| AuditTarget::of(&it)),
        };
        api::list_audit(filter, page)
    });
    view! {
        <Head title="Audit" about="Every change: what, who, when, and from where."/>
        <search class="filters two">
            <Filter name="target_type" label="Kind" all="Everything" options=kinds/>
            <Filter name="action" label="Change" all="Any change" options=actions/>
        </search>
        <Shown
            loader
            show=move |page| {
                if page.items.is_empty() && (part("target_type").is_some() || part("action").is_some()) {
                    return view! {
                        <Empty shape=Shape::Search title="No matching changes" about="Nothing like this has been changed yet.">
                            <a class="button" href="/console/audit">"Show all changes"</a>
                        </Empty>
                    }
                        .into_any();
                }
                if page.items.is_empty() {
                    return view! {
                        <Empty shape=Shape::Audit title="No changes yet" about="Changes to plans, keys, tokens and sessions will be listed here."/>
                    }
                        .into_any();
                }
                let shown = page.items.len();
                let gone = page
                    .items
                    .iter()
                    .filter(|it| it.action == "api_key.delete")
                    .map(|it| it.target_id.clone())
                    .collect::<Vec<_>>();
                view! {
                    <table class="table">
                        <caption class="unseen">"Changes, newest first"</caption>
                        <thead>
                            <tr><th scope="col">"Change"</th><th scope="col">"Target"</th><th scope="col">"Who"</th><th scope="col">"From"</th><th scope="col">"When"</th><th scope="col">"Details"</th></tr>
                        </thead>
                        <tbody>
                            {page
                                .items
                                .into_iter()
                                .map(|event| {
                                    let changes = change(&event);
                                    let leads = event.target_type == "api_key" && !gone.contains(&event.target_id);
                                    let id = event.target_id.clone().filter(|_| leads);
                                    let href = id.map(|id| format!("/console/api-keys/{id}"));
                                    // Whose account or session it is stands beside.
                                    let name = event.target_name.clone().unwrap_or_else(|| "–".to_owned());
                                    view! {
                                        <tr>
                                            <th scope="row">{action(&event.action)}</th>
                                            // Without an address it is none: what is gone leads nowhere.
                                            <td data-label="Target" class="of"><a class="clamp" dir="auto" href=href>{name}</a></td>
                                            <td class="who-did" data-label="Who" dir="auto">{event.user_email.clone().unwrap_or_else(|| "the server".to_owned())}</td>
                                            <td data-label="From"><code>{event.ip.clone().unwrap_or_else(|| "–".to_owned())}</code></td>
                                            <td data-label="When"><div><When at=event.at spelled=true/></div></td>
                                            <td data-label="Details">
                                                {if changes.is_empty() {
                                                    view! { <span class="quiet">"–"</span> }.into_any()
                                                } else {
                                                    view! {
                                                        <details>
                                                            <summary>{crate::model::text::count(changes.len() as u64, "field", "fields")}</summary>
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
