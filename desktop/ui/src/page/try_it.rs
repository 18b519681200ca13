//! Sending requests with a key, and watching its bucket drain and fill.

use leptos::{prelude::*, task::spawn_local};

use crate::{
    api::{self, Tried},
    component::{Alert, held, now},
    model::{
        bucket::{Bucket, History},
        text::{count, number, wait},
    },
};

/// How often the plot moves, in milliseconds.
const FRAME_MS: u64 = 200;
/// How many requests "until 429" sends at most.
const MOST: u32 = 300;
/// Of the plot; its height is 1000.
const WIDTH: i64 = 6000;

/// What has come of the requests so far.
#[derive(Clone, Default)]
struct Tally {
    admitted: u64,
    denied: u64,
    last: Option<Tried>,
    failure: Option<String>,
    /// All of `MOST` were sent, and none was denied.
    never_denied: bool,
}

/// The policy that an answer's `RateLimit` names, in words: of a denial, the one that denied it.
fn policy(limit: &str) -> Option<&'static str> {
    let name = limit.split('"').nth(1)?;
    Some(match name {
        "rpm" => "Limited by the rate per minute.",
        "daily" => "Limited by the daily quota.",
        "monthly" => "Limited by the monthly quota.",
        _ => return None,
    })
}

#[component]
pub fn TryIt(
    /// The key's text.
    text: Signal<String>,
) -> impl IntoView {
    let tally = RwSignal::new(Tally::default());
    let bucket = RwSignal::new(None::<Bucket>);
    let history = RwSignal::new(History::default());
    let clock = RwSignal::new(now());
    let busy = RwSignal::new(false);
    let stopped = RwSignal::new(false);
    // When the next request would be admitted, in milliseconds since 1970.
    let again_at = RwSignal::new(None::<i64>);

    let timer = set_interval_with_handle(
        move || {
            let now = now();
            if let Some(bucket) = bucket.get_untracked() {
                history.update(|history| history.add(now, bucket.share(now)));
            }
            clock.set(now);
            if again_at.get_untracked().is_some_and(|at| at <= now) {
                again_at.set(None);
            }
        },
        std::time::Duration::from_millis(FRAME_MS),
    );
    on_cleanup(move || {
        if let Ok(timer) = timer {
            timer.clear();
        }
    });

    // Sends one request; whether it was admitted.
    let send = move || async move {
        match api::try_key(text.get_untracked().trim()).await {
            Ok(tried) => {
                let now = now();
                let header = |name| tried.header(name).unwrap_or_default();
                if let Some(read) = Bucket::read(
                    header("X-RateLimit-Limit"),
                    header("X-RateLimit-Remaining"),
                    header("RateLimit-Policy"),
                    now,
                ) {
                    history.update(|history| history.add(now, read.share(now)));
                    bucket.set(Some(read));
                }
                let wait = header("Retry-After").parse::<i64>().ok();
                again_at.set(wait.map(|secs| now + secs * 1000));
                let admitted = tried.status == 200;
                tally.update(|tally| {
                    tally.failure = None;
                    if admitted {
                        tally.admitted += 1;
                    } else if tried.status == 429 {
                        tally.denied += 1;
                    }
                    tally.last = Some(tried);
                });
                admitted
            }
            Err(failure) => {
                tally.update(|tally| tally.failure = Some(failure.text()));
                false
            }
        }
    };
    // All of `most`, or as long as they are admitted.
    let run = move |most: u32, until_denied: bool| {
        busy.set(true);
        stopped.set(false);
        tally.update(|tally| tally.never_denied = false);
        spawn_local(async move {
            let mut never_denied = until_denied;
            for _ in 0..most {
                let admitted = send().await;
                // Nobody waits any more, whether the page was left or they said so.
                if stopped.try_get_untracked().unwrap_or(true) || (!admitted && until_denied) {
                    never_denied = false;
                    break;
                }
            }
            let _ = tally.try_update(|tally| tally.never_denied = never_denied);
            let _ = busy.try_set(false);
        });
    };
    let missing = move || text.get().trim().is_empty();
    view! {
        <section class="try" aria-label="Try the key">
            <div class="actions">
                <button type="button" class="button small" disabled=missing aria-disabled=held(busy) on:click=move |_| run(1, false)>"Send 1"</button>
                <button type="button" class="button small" disabled=missing aria-disabled=held(busy) on:click=move |_| run(10, false)>"Send 10"</button>
                <button type="button" class="button small" disabled=missing aria-disabled=held(busy) on:click=move |_| run(MOST, true)>"Send until 429"</button>
                {move || {
                    busy.get()
                        .then(|| view! { <button type="button" class="button small" on:click=move |_| stopped.set(true)>"Stop"</button> })
                }}
            </div>
            <p class="quiet small-text">"Sends real requests to GET /v1/echo. Each one counts against this key's limits and quotas."</p>
            <Alert text=Signal::derive(move || tally.get().failure)/>
            {move || {
                tally
                    .get()
                    .last
                    .map(|last| {
                        let (class, word) = match last.status {
                            200 => ("badge on", "admitted"),
                            429 => ("badge limited", "limited"),
                            _ => ("badge off", "refused"),
                        };
                        let by = (last.status == 429)
                            .then(|| policy(last.header("RateLimit")?))
                            .flatten();
                        let it = tally.get();
                        view! {
                            <p class="outcome" role="status">
                                <strong class="status" data-status=last.status.to_string()>{last.status}</strong>
                                <span class=class>{word}</span>
                                <span class="quiet">
                                    {format!("{} admitted, {} limited", count(it.admitted, "request", "requests"), number(it.denied))}
                                </span>
                                {by}
                                {it.never_denied.then(|| format!("{MOST} requests sent, none was limited."))}
                            </p>
                        }
                    })
            }}
            {move || {
                again_at
                    .get()
                    .map(|at| {
                        let secs = ((at - clock.get()).max(0) + 999) / 1000;
                        view! { <p class="countdown">"The next request is admitted in " <strong>{wait(secs.unsigned_abs())}</strong></p> }
                    })
            }}
            {move || {
                bucket
                    .get()
                    .map(|it| {
                        let level = move || it.level(clock.get()) / 1000;
                        view! {
                            <figure class="plot">
                                <span class="plot-most">{number(it.limit)}</span>
                                <span class="plot-none">"0"</span>
                                // A little more than the line's box, so that it is whole also where it is full or empty.
                                <svg
                                    viewBox="0 -60 6000 1120"
                                    preserveAspectRatio="none"
                                    role="img"
                                    aria-label="The bucket's level over the last 30 seconds"
                                >
                                    <path class="plot-grid" d="M0 0h6000M0 500h6000M0 1000h6000"/>
                                    <polyline class="plot-line" points=move || history.with(|history| history.line(clock.get(), WIDTH))/>
                                </svg>
                                <p class="plot-time"><span>"30 s ago"</span><span>"now"</span></p>
                                <figcaption>
                                    <span>"Bucket: " <strong>{move || number(level())}</strong> {format!(" of {}", number(it.limit))}</span>
                                    <span class="quiet">{format!("refills {} per second", it.pace())}</span>
                                </figcaption>
                            </figure>
                        }
                    })
            }}
            {move || {
                tally
                    .get()
                    .last
                    .filter(|last| !last.headers.is_empty())
                    .map(|last| {
                        view! {
                            <details>
                                <summary>"Headers of the last response"</summary>
                                <table class="headers">
                                    <caption class="unseen">"Response headers"</caption>
                                    <tbody>
                                        {last
                                            .headers
                                            .into_iter()
                                            .map(|(name, value)| view! { <tr><th scope="row"><code>{name}</code></th><td><code>{value}</code></td></tr> })
                                            .collect_view()}
                                    </tbody>
                                </table>
                            </details>
                        }
                    })
            }}
        </section>
    }
}
