use leptos::prelude::*;
use quota_common::{ApiKeyId, limit::PolicyName, usage::BurnDown};

use crate::{
    api::{self, CallResult, PendingCall},
    clock::now,
    component::{Async, Card, load, local_time, refresh_regularly},
    model::{
        burn_down::{burn_down_chart, name, projection},
        markup::{Markup, element, with_text},
        meter::Meter,
    },
};

/// Loads the burn-down of each quota of the key.
async fn load_burn_downs(id: ApiKeyId) -> CallResult<Vec<BurnDown>> {
    let limits = api::key_limits(id).await?.limits;
    let mut all = Vec::new();
    for limit in limits
        .iter()
        .filter(|limit| limit.policy != PolicyName::Rpm)
    {
        all.push(api::burn_down(id, limit.policy).await?);
    }
    Ok(all)
}

#[component]
pub fn BurnDowns(id: ApiKeyId, #[prop(into)] zone: Signal<String>) -> impl IntoView {
    let loader = load(move || Box::pin(load_burn_downs(id)) as PendingCall<_>);
    refresh_regularly(loader);
    let show = move |all: Vec<BurnDown>| {
        (!all.is_empty()).then(|| {
            let rows: Markup = all.iter().map(|burn| one(burn, &zone.get())).collect();
            view! {
                <Card id="burn-down" title="Quota burn-down">
                    <div class="burn-downs" inner_html=rows.to_string()></div>
                </Card>
            }
        })
    };
    view! { <Async loader what="the quota burn-down" show/> }
}

fn one(burn: &BurnDown, zone: &str) -> Markup {
    let clock = |at: i64| local_time(at, zone).map_or_else(String::new, |it| it.in_full());
    let note = projection(burn, now(), &clock);
    let label = name(burn.policy);
    let meter = Meter {
        label,
        used: burn.used,
        limit: burn.limit,
        ..Meter::default()
    };
    let keys = [
        ("key-remaining", "Remaining"),
        ("key-ideal", "Even pace"),
        ("key-projection", "At this pace"),
    ]
    .map(|(class, name)| with_text("span", &[("class", class)], name));
    let parts = [
        meter.markup(),
        element("div", &[("class", "burn-chart")], &[burn_down_chart(burn)]),
        element("p", &[("class", "chart-key small-text muted")], &keys),
        with_text("figcaption", &[], &note),
    ];
    let summary = format!("{label}: {}. {note}", meter.text());
    element(
        "figure",
        &[("class", "burn-down"), ("aria-label", &summary)],
        &parts,
    )
}
