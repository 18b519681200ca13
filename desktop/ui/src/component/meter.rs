//! A bar that shows how much of a limit is used.

use leptos::prelude::*;

/// How close a limit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Normal,
    /// At least 80 % used.
    Near,
    /// Used up.
    Full,
}

impl Level {
    /// `share` is the used part in thousandths.
    pub const fn of(share: u64) -> Self {
        match share {
            0..800 => Self::Normal,
            800..1000 => Self::Near,
            _ => Self::Full,
        }
    }

    const fn class(self) -> &'static str {
        match self {
            Self::Normal => "meter",
            Self::Near => "meter near",
            Self::Full => "meter full",
        }
    }
}

#[component]
pub fn Meter(
    #[prop(into)] label: String,
    /// The used part in thousandths.
    #[prop(into)]
    share: Signal<u64>,
    /// What the bar says in words, such as `388 of 500 used`.
    #[prop(into)]
    text: Signal<String>,
    /// When the limit resets, or why it denies.
    #[prop(optional, into)]
    note: MaybeProp<String>,
    /// Overrides the level that follows from the share.
    #[prop(optional, into)]
    denied: Signal<bool>,
) -> impl IntoView {
    let class = move || {
        if denied.get() {
            "meter full denied"
        } else {
            Level::of(share.get()).class()
        }
    };
    let name = label.clone();
    view! {
        <div class=class>
            <p class="meter-head">
                <span>{label}</span>
                {move || denied.get().then(|| view! { <span class="badge off">"Denied the request"</span> })}
                <strong>{text}</strong>
            </p>
            <div
                class="meter-bar"
                role="meter"
                aria-label=name
                aria-valuemin="0"
                aria-valuemax="100"
                aria-valuenow=move || (share.get().min(1000) / 10).to_string()
                aria-valuetext=text
            >
                // A little is visible as soon as anything is used.
                <span style:width=move || {
                    let share = share.get().min(1000);
                    format!("{}%", if share > 0 { (share / 10).max(1) } else { 0 })
                }></span>
            </div>
            {move || note.get().map(|note| view! { <p class="muted small-text">{note}</p> })}
        </div>
    }
}
