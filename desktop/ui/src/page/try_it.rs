//! Sends requests with a key, and shows how the key's token bucket drains and refills.

use std::time::Duration;

use leptos::{prelude::*, task::spawn_local};

use quota_common::{
    ApiKeyId,
    api_key::{ApiKey, ApiKeyStatus},
    limit::LimitState,
};

use crate::{
    api::{self, CallError, TestResponse},
    clock::now,
    component::{Alert, busy_attr},
    model::{
        bucket::{Bucket, History},
        markup::Markup,
        meter::Meter,
        policy::{LimitHeaders, PolicyState, complete, denial, policy_label, policy_states},
        text::{count, countdown, number},
    },
    reactive::{effect, text_memo},
    session::session,
};

/// How often the chart is updated.
const FRAME: Duration = Duration::from_millis(200);
/// The maximum number of requests that *Send until 429* sends.
const MAX_REQUESTS: u32 = 300;
/// The width of the chart in SVG units. The line's values range from 0 to 1000.
const WIDTH: i64 = 6000;

#[derive(Clone, Default)]
struct Results {
    allowed: u64,
    rejected: u64,
    last: Option<TestResponse>,
    failure: Option<CallError>,
    /// Whether *Send until 429* sent all of its requests without getting a 429 response.
    never_rejected: bool,
    /// The key's limits, and the value of `allowed` when the limits were loaded. Responses report only the rate limit
    /// and the policy that is closest to exhaustion.
    limits: Option<(Vec<LimitState>, u64)>,
}

impl Results {
    /// Returns the state of each policy after the last response.
    fn policies(&self) -> Vec<PolicyState> {
        let Some(last) = &self.last else {
            return Vec::new();
        };
        let header = |name| last.header(name).unwrap_or_default();
        let headers = LimitHeaders {
            burst: header("X-RateLimit-Limit"),
            remaining: header("X-RateLimit-Remaining"),
            policies: header("RateLimit-Policy"),
            nearest: header("RateLimit"),
        };
        let violated = last.problem.as_ref().map(|it| &it.violated_policies[..]);
        let mut states = policy_states(headers, violated.unwrap_or_default());
        if let Some((limits, allowed)) = &self.limits {
            complete(&mut states, limits, self.allowed.saturating_sub(*allowed));
        }
        states
    }
}

/// Explains why the last request was not allowed.
fn reason(
    last: &TestResponse,
    policies: &[PolicyState],
    key: Option<&ApiKey>,
    sent: &str,
) -> String {
    let detail = || last.problem.as_ref().map(|it| it.detail.clone());
    match last.status {
        200 => String::new(),
        429 => {
            let denying: Vec<_> = policies
                .iter()
                .filter(|it| it.denied)
                .map(|it| policy_label(&it.policy).to_owned())
                .collect();
            match &denying[..] {
                [] => detail().unwrap_or_default(),
                // The outcome already names the policy.
                [_] => String::new(),
                names => format!("Denied by: {}.", names.join(", ").to_ascii_lowercase()),
            }
        }
        401 => match key.map(|key| (key, key.status(now()))) {
            Some((key, _)) if !sent.starts_with(&*key.prefix) => other_key(key),
            Some((_, ApiKeyStatus::Inactive)) => "This key is inactive.".to_owned(),
            Some((_, ApiKeyStatus::Expired)) => "This key has expired.".to_owned(),
            _ => detail().unwrap_or_default(),
        },
        _ => detail().unwrap_or_default(),
    }
}

/// Returns a warning that the user has entered a key other than the page's key.
pub fn other_key(key: &ApiKey) -> String {
    format!(
        "This is a different key. The key on this page starts with {}.",
        key.prefix
    )
}

#[component]
pub fn TryIt(
    secret: Signal<String>,
    /// The key that `secret` should belong to.
    #[prop(optional, into)]
    key: MaybeProp<ApiKey>,
    /// Called after requests have been sent.
    #[prop(optional)]
    on_sent: Option<Callback<()>>,
) -> impl IntoView {
    let results = RwSignal::new(Results::default());
    let bucket = RwSignal::new(None::<Bucket>);
    let history = RwSignal::new(History::default());
    let clock = RwSignal::new(now());
    let busy = RwSignal::new(false);
    let stopped = RwSignal::new(false);
    // When the next request will be allowed, in milliseconds since the Unix epoch.
    let retry_at = RwSignal::new(None::<i64>);
    // Clears the results when the user enters a different key.
    let sent_with = text_memo(move || secret.get().trim().to_owned());
    effect(move || {
        // `track()` is not enough, because it does not compute the memo.
        sent_with.with(|_| ());
        results.set(Results::default());
        bucket.set(None);
        history.set(History::default());
        retry_at.set(None);
    });
    let known_keys = session().known_keys;
    let key_id = move || {
        let secret = sent_with.get_untracked();
        let of_page = key.with_untracked(|key| {
            let key = key.as_ref().filter(|key| secret.starts_with(&*key.prefix));
            key.map(|key| key.id)
        });
        of_page.or_else(|| {
            known_keys.with_untracked(|keys| {
                let found = keys.iter().find(|(_, it)| *it == secret);
                found.map(|(id, _)| *id)
            })
        })
    };

    let timer = set_interval_with_handle(
        move || {
            let now = now();
            if let Some(bucket) = bucket.get_untracked() {
                history.update(|history| history.add(now, bucket.share(now)));
            }
            clock.set(now);
            if retry_at.get_untracked().is_some_and(|at| at <= now) {
                retry_at.set(None);
            }
        },
        FRAME,
    );
    on_cleanup(move || {
        if let Ok(timer) = timer {
            timer.clear();
        }
    });

    // Sends one request. Returns whether the request was allowed, or `None` if the result no longer matters.
    let send = move || async move {
        let key = sent_with.get_untracked();
        let response = api::try_key(&key).await;
        // The user may have left the page or the dialog, or entered another key.
        if sent_with.try_with_untracked(|it| *it == key) != Some(true) {
            return None;
        }
        let allowed = match response {
            Ok(response) => {
                let now = now();
                let header = |name| response.header(name).unwrap_or_default();
                let read = Bucket::read(
                    header("X-RateLimit-Limit"),
                    header("X-RateLimit-Remaining"),
                    header("RateLimit-Policy"),
                    now,
                );
                match read {
                    Some(read) => history.update(|history| history.add(now, read.share(now))),
                    // Without limits in the response, the bucket's state is unknown.
                    None => history.set(History::default()),
                }
                bucket.set(read);
                let retry_after = header("Retry-After").parse::<i64>().ok();
                retry_at.set(retry_after.map(|secs| now + secs * 1000));
                let allowed = response.status == 200;
                results.update(|results| {
                    results.failure = None;
                    if allowed {
                        results.allowed += 1;
                    } else if response.status == 429 {
                        results.rejected += 1;
                    }
                    results.last = Some(response);
                });
                allowed
            }
            Err(error) => {
                results.update(|results| results.failure = Some(error));
                false
            }
        };
        Some(allowed)
    };
    let run = move |requests: u32, until_limited: bool| {
        busy.set(true);
        stopped.set(false);
        results.update(|results| results.never_rejected = false);
        spawn_local(async move {
            let mut never_rejected = until_limited;
            for _ in 0..requests {
                let Some(allowed) = send().await else {
                    let _ = busy.try_set(false);
                    return;
                };
                // Stops if the user has stopped the test or, with *Send until 429*, if a request was not allowed.
                if stopped.get_untracked() || (!allowed && until_limited) {
                    never_rejected = false;
                    break;
                }
            }
            results.update(|results| results.never_rejected = never_rejected);
            load_limits(key_id(), results).await;
            let _ = busy.try_set(false);
            if let Some(on_sent) = on_sent {
                let _ = on_sent.try_run(());
            }
        });
    };
    let is_missing = move || secret.get().trim().is_empty();
    view! {
        <section class="try" aria-label="Send requests">
            <div class="actions">
                <button type="button" class="button small" disabled=is_missing aria-disabled=busy_attr(busy) on:click=move |_| run(1, false)>"Send 1"</button>
                <button type="button" class="button small" disabled=is_missing aria-disabled=busy_attr(busy) on:click=move |_| run(10, false)>"Send 10"</button>
                <button type="button" class="button small" disabled=is_missing aria-disabled=busy_attr(busy) on:click=move |_| run(MAX_REQUESTS, true)>"Send until 429"</button>
                {move || {
                    busy.get()
                        .then(|| view! { <button type="button" class="button small" on:click=move |_| stopped.set(true)>"Stop"</button> })
                }}
            </div>
            <p class="muted small-text">"Sends real requests to GET /v1/echo. They count against this key's rate limit and quotas."</p>
            <Alert error=Signal::derive(move || results.get().failure)/>
            <ResponseSummary results secret key/>
            <Policies results bucket clock/>
            {move || {
                retry_at
                    .get()
                    .map(|at| {
                        let secs = ((at - clock.get()).max(0) + 999) / 1000;
                        view! { <p class="countdown">"Next request allowed in " <strong>{countdown(secs.unsigned_abs())}</strong></p> }
                    })
            }}
            {move || bucket.get().map(|bucket| view! { <BucketChart bucket history clock/> })}
            <ResponseHeaders results/>
        </section>
    }
}

#[component]
fn ResponseSummary(
    results: RwSignal<Results>,
    secret: Signal<String>,
    key: MaybeProp<ApiKey>,
) -> impl IntoView {
    move || {
        let it = results.get();
        let policies = it.policies();
        let last = it.last?;
        let (class, outcome) = match last.status {
            200 => ("badge on", "Allowed"),
            429 => ("badge limited", denial(&policies)),
            503 => ("badge off", "Unavailable"),
            500.. => ("badge off", "Server error"),
            _ => ("badge off", "Rejected"),
        };
        let sent = secret.get_untracked();
        let reason = key.with_untracked(|key| reason(&last, &policies, key.as_ref(), sent.trim()));
        Some(view! {
            <p class="outcome" role="status">
                <strong class="status" data-status=last.status.to_string()>{last.status}</strong>
                <span class=class>{outcome}</span>
                <span class="muted">
                    {format!("{} allowed, {} rejected", count(it.allowed, "request", "requests"), number(it.rejected))}
                </span>
                <span class="reason">{reason}</span>
                {it.never_rejected.then(|| format!("{MAX_REQUESTS} requests sent, none rejected."))}
            </p>
        })
    }
}

/// Loads the limits that responses do not report. If the limits cannot be loaded, only the reported limits are shown.
async fn load_limits(key: Option<ApiKeyId>, results: RwSignal<Results>) {
    let Some(key) = key else { return };
    let allowed = results.try_with_untracked(|results| results.allowed);
    if let (Some(allowed), Ok(limits)) = (allowed, api::key_limits(key).await) {
        let _ = results.try_update(|results| results.limits = Some((limits.limits, allowed)));
    }
}

/// Shows a meter for each quota, as of the last response. The rate has its own chart, so a meter for the rate is shown
/// only if the rate limit denied the request.
#[component]
fn Policies(
    results: RwSignal<Results>,
    bucket: RwSignal<Option<Bucket>>,
    clock: RwSignal<i64>,
) -> impl IntoView {
    let meters = text_memo(move || {
        let policies = results.with(Results::policies);
        let shown = policies.iter().filter(|it| it.policy != "rpm" || it.denied);
        let meters: Markup = shown
            .filter_map(|it| {
                let remaining = match bucket.get() {
                    // The burst refills between responses, as in the chart.
                    Some(bucket) if it.policy == "rpm" => bucket.level(clock.get()) / 1000,
                    _ => it.remaining?,
                };
                let meter = Meter {
                    label: policy_label(&it.policy),
                    used: it.limit.saturating_sub(remaining),
                    limit: it.limit,
                    denied: it.denied,
                    ..Meter::default()
                };
                Some(meter.markup())
            })
            .collect();
        meters.to_string()
    });
    view! { <div class="meters" inner_html=move || meters.get()></div> }
}

#[component]
fn BucketChart(bucket: Bucket, history: RwSignal<History>, clock: RwSignal<i64>) -> impl IntoView {
    let level = move || bucket.level(clock.get()) / 1000;
    view! {
        <figure class="plot">
            <span class="plot-max">{number(bucket.limit)}</span>
            <span class="plot-zero">"0"</span>
            // Slightly taller than the line's range, so that the line of a full or empty bucket is not cut off.
            <svg
                viewBox="0 -60 6000 1120"
                preserveAspectRatio="none"
                role="img"
                aria-label="Available burst over the last 30 seconds"
            >
                <path class="plot-grid" d="M0 0h6000M0 500h6000M0 1000h6000"/>
                <polyline class="plot-line" points=move || history.with(|history| history.line(clock.get(), WIDTH))/>
            </svg>
            <p class="plot-time"><span>"30 s ago"</span><span>"now"</span></p>
            <figcaption>
                <span>"Burst: " <strong>{move || number(level())}</strong> {format!(" of {} available", number(bucket.limit))}</span>
                <span class="muted">{format!("Refills at {} per second", bucket.pace())}</span>
            </figcaption>
        </figure>
    }
}

#[component]
fn ResponseHeaders(results: RwSignal<Results>) -> impl IntoView {
    move || {
        let last = results.get().last.filter(|last| !last.headers.is_empty())?;
        let rows = last
            .headers
            .into_iter()
            .map(|(name, value)| view! { <tr><th scope="row"><code>{name}</code></th><td><code>{value}</code></td></tr> })
            .collect_view();
        Some(view! {
            <details>
                <summary>"Headers of the last response"</summary>
                <table class="headers">
                    <caption class="visually-hidden">"Response headers"</caption>
                    <tbody>{rows}</tbody>
                </table>
            </details>
        })
    }
}
