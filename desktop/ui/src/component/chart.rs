//! A chart of requests over time, and the same data as a table.

use std::sync::Arc;

use leptos::{ev::KeyboardEvent, html, prelude::*};

use crate::model::{
    chart::{Bar, Visible, bar_chart, bar_table},
    text::number,
};

/// The visible parts of a chart. A page can store them in its URL.
#[derive(Clone, Copy)]
pub struct ChartState {
    pub table: RwSignal<bool>,
    pub allowed: RwSignal<bool>,
    pub rejected: RwSignal<bool>,
}

impl ChartState {
    pub fn new() -> Self {
        Self {
            table: RwSignal::new(false),
            allowed: RwSignal::new(true),
            rejected: RwSignal::new(true),
        }
    }
}

#[component]
pub fn Chart(
    bars: Vec<Bar>,
    /// The title, for example `Requests per hour, CET`.
    title: String,
    state: ChartState,
    /// Called when the user opens a bar for more detail.
    #[prop(optional)]
    on_zoom: Option<Callback<usize>>,
) -> impl IntoView {
    let ChartState {
        table,
        allowed,
        rejected,
    } = state;
    let count = bars.len();
    let sum = |of: fn(&Bar) -> u64| number(bars.iter().map(of).sum::<u64>());
    let (allowed_total, rejected_total) = (sum(|bar| bar.allowed), sum(|bar| bar.rejected));
    let summary = format!("{title}: {allowed_total} allowed, {rejected_total} rejected.");
    let bars: Arc<[Bar]> = bars.into();
    let selected = RwSignal::new(None::<usize>);
    let plot = NodeRef::<html::Div>::new();
    let on_move = move |ev: web_sys::MouseEvent| {
        let width = plot.get_untracked().map_or(0, |plot| plot.client_width());
        let at =
            i64::from(ev.offset_x()) * i64::try_from(count).unwrap_or(0) / i64::from(width.max(1));
        let at = usize::try_from(at.max(0))
            .ok()
            .map(|at| at.min(count.saturating_sub(1)));
        if selected.get_untracked() != at && count > 0 {
            selected.set(at);
        }
    };
    let zoom = move || {
        if let (Some(at), Some(on_zoom)) = (selected.get_untracked(), on_zoom) {
            on_zoom.run(at);
        }
    };
    let on_key = move |ev: KeyboardEvent| {
        let last = count.saturating_sub(1);
        let at = selected.get_untracked();
        let next = match &*ev.key() {
            "ArrowRight" | "ArrowUp" => at.map_or(0, |at| (at + 1).min(last)),
            "ArrowLeft" | "ArrowDown" => at.map_or(last, |at| at.saturating_sub(1)),
            "Home" => 0,
            "End" => last,
            "Enter" => {
                ev.prevent_default();
                return zoom();
            }
            _ => return,
        };
        ev.prevent_default();
        selected.set(Some(next));
    };
    let legend = |shown: RwSignal<bool>, class: &'static str, name: &'static str, total: String| {
        view! {
            <button
                type="button"
                class=class
                data-focus-key=class
                aria-pressed=move || shown.get().to_string()
                on:click=move |_| shown.update(|shown| *shown = !*shown)
            >
                <i></i>
                {name}
                " "
                <strong>{total}</strong>
            </button>
        }
        .into_any()
    };
    let body = {
        let summary = summary.clone();
        move || {
            if table.get() {
                let markup = bar_table(&title, &bars).to_string();
                return view! { <div class="chart-table" tabindex="0" role="region" aria-label=title.clone() inner_html=markup></div> }.into_any();
            }
            let visible = move |selected| Visible {
                allowed: allowed.get(),
                rejected: rejected.get(),
                selected,
            };
            let readout = {
                let bars = bars.clone();
                move || selected.get().and_then(|at| bars.get(at).map(Bar::text))
            };
            let (shown, spoken) = (readout.clone(), readout);
            let (plotted, measured) = (bars.clone(), bars.clone());
            let (title, summary) = (title.clone(), summary.clone());
            let label = if on_zoom.is_some() {
                "Selected day. Use the arrow keys to select another day. Press Enter to show its hours."
            } else {
                "Selected bar. Use the arrow keys to select another bar."
            };
            view! {
                <p class="readout" aria-hidden="true">
                    {move || shown().unwrap_or_else(|| title.clone())}
                    {move || {
                        (on_zoom.is_some() && selected.get().is_some())
                            .then(|| view! { <button type="button" class="link" tabindex="-1" on:click=move |_| zoom()>"Show hours"</button> })
                    }}
                </p>
                <div class="chart-body">
                    <div class="chart-axis" aria-hidden="true" inner_html=move || bar_chart(&measured, visible(None)).1.to_string()></div>
                    <div
                        class="chart-plot"
                        node_ref=plot
                        tabindex="0"
                        data-focus-key="plot"
                        role="slider"
                        aria-label=label
                        aria-valuemin="0"
                        aria-valuemax=count.saturating_sub(1).to_string()
                        aria-valuenow=move || selected.get().unwrap_or_default().to_string()
                        aria-valuetext=move || spoken().unwrap_or_else(|| summary.clone())
                        on:mousemove=on_move
                        on:click=on_move
                        on:mouseleave=move |_| selected.set(None)
                        on:keydown=on_key
                        inner_html=move || bar_chart(&plotted, visible(selected.get())).0.to_string()
                    ></div>
                </div>
            }
            .into_any()
        }
    };
    view! {
        <figure class="chart" aria-label=summary>
            <div class="chart-head">
                {legend(allowed, "legend allowed", "Allowed", allowed_total)}
                {legend(rejected, "legend rejected", "Rejected", rejected_total)}
                <button type="button" class="button small" data-focus-key="table" aria-pressed=move || table.get().to_string() on:click=move |_| table.update(|it| *it = !*it)>
                    "Table"
                </button>
            </div>
            {body}
        </figure>
    }
}
