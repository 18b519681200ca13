//! Who changed what.

use leptos::prelude::*;
use quota_common::audit::AuditEvent;

use crate::{
    api,
    component::{Empty, Head, Pager, Shape, Shown, When, load_page},
};

/// `api_key.rotate` as people say it.
fn action(text: &str) -> String {
    text.replace(['.', '_'], " ")
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
    let loader = load_page(api::list_audit);
    view! {
        <Head title="Audit" about="Every change: who made it, when, and from where."/>
        <Shown
            loader
            show=move |page| {
                if page.items.is_empty() {
                    return view! {
                        <Empty shape=Shape::Audit title="Nothing has changed yet" about="Every change to plans, keys, tokens and sessions is written down here."/>
                    }
                        .into_any();
                }
                let shown = page.items.len();
                view! {
                    <table class="table">
                        <caption class="unseen">"Changes, newest first"</caption>
                        <thead>
                            <tr><th scope="col">"What"</th><th scope="col">"Who"</th><th scope="col">"From"</th><th scope="col">"When"</th><th scope="col">"Details"</th></tr>
                        </thead>
                        <tbody>
                            {page
                                .items
                                .into_iter()
                                .map(|event| {
                                    let changes = change(&event);
                                    view! {
                                        <tr>
                                            <th scope="row">{action(&event.action)}</th>
                                            <td class="who-did" data-label="Who" dir="auto">{event.user_email.clone().unwrap_or_else(|| "the server".to_owned())}</td>
                                            <td data-label="From"><code>{event.ip.clone().unwrap_or_else(|| "–".to_owned())}</code></td>
                                            <td data-label="When"><When at=event.at/></td>
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
