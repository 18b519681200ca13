//! Line icons in a 24 by 24 box.

use leptos::prelude::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Home,
    Plans,
    Key,
    Token,
    Audit,
    Billing,
    Settings,
    Check,
    Copy,
    Close,
    Menu,
    Search,
    More,
    Usage,
    Alerts,
    Webhook,
}

impl Shape {
    const fn path(self) -> &'static str {
        match self {
            Self::Home => "M4 11l8-7 8 7M6 9.5V20h12V9.5M10 20v-6h4v6",
            Self::Plans => "M4 7h10M18 7h2M4 17h2M10 17h10M14 4.5v5M6 14.5v5",
            Self::Key => "M14.5 4a5.5 5.5 0 1 1-4.2 9.05L4 19.4V21h3v-2h2v-2h2l1.2-1.2M16 8h.01",
            Self::Token => "M12 3l8 3v6c0 4.5-3.2 7.7-8 9-4.8-1.3-8-4.5-8-9V6zM9 12l2 2 4-4",
            Self::Audit => "M6 3h9l4 4v14H6zM14 3v5h5M9 12h7M9 16h7",
            Self::Billing => "M3 6h18v12H3zM3 10h18M7 14h4",
            Self::Settings => {
                "M12 9a3 3 0 1 0 0 6 3 3 0 0 0 0-6zM12 3v3M12 18v3M3 12h3M18 12h3M5.6 5.6l2.2 2.2M16.2 16.2l2.2 2.2M5.6 18.4l2.2-2.2M16.2 7.8l2.2-2.2"
            }
            Self::Check => "M5 12.5l4.5 4.5L19 7.5",
            Self::Copy => "M9 9h11v11H9zM5 15H4V4h11v1",
            Self::Close => "M6 6l12 12M18 6L6 18",
            Self::Menu => "M4 7h16M4 12h16M4 17h16",
            Self::Usage => "M4 20h16M7 16v-5M12 16V6M17 16v-8",
            Self::More => "M5 12h.01M12 12h.01M19 12h.01",
            Self::Alerts => "M6 17h12l-1.5-2.5V10a4.5 4.5 0 0 0-9 0v4.5zM10 20h4M12 3.5v2",
            Self::Webhook => "M20.5 3.5L3 10.5l7.5 3 3 7.5zM20.5 3.5l-10 10",
            Self::Search => "M11 5a6 6 0 1 0 0 12 6 6 0 0 0 0-12zM15.5 15.5L20 20",
        }
    }
}

#[component]
pub fn Icon(shape: Shape) -> impl IntoView {
    view! {
        <svg class="icon" viewBox="0 0 24 24" aria-hidden="true">
            <path d=shape.path()/>
        </svg>
    }
}

/// A bucket, three quarters full.
#[component]
pub fn Logo() -> impl IntoView {
    view! {
        <svg class="logo" viewBox="0 0 32 32" aria-hidden="true">
            <rect class="logo-background" width="32" height="32" rx="8"/>
            <path class="logo-line" d="M8 8.5l2.2 14.2a2 2 0 0 0 2 1.8h7.6a2 2 0 0 0 2-1.8L24 8.5"/>
            <path class="logo-fill" d="M9.6 13h12.8l-1.4 9a1.2 1.2 0 0 1-1.2 1h-7.6a1.2 1.2 0 0 1-1.2-1z"/>
        </svg>
    }
}
