//! The building blocks of pages.

mod alert;
mod async_view;
mod busy;
mod copy;
mod empty_state;
mod field;
mod focus;
mod form_state;
mod icon;
mod modal;
mod page_header;
mod pager;
mod palette;
mod query;
mod secret_dialog;
mod sort;
mod time;
mod toast;

pub use alert::{Alert, request_id};
pub use async_view::{Async, LoadState, Loader, load, load_page};
pub use busy::{busy_attr, ignore_clicks_on_busy_buttons};
pub use copy::{CodeBlock, CopyButton};
pub use empty_state::EmptyState;
pub use field::{Field, SelectField};
pub use focus::focus_soon;
pub use form_state::FormState;
pub use icon::{Icon, Logo, Shape};
pub use modal::{Confirm, Modal};
pub use page_header::PageHeader;
pub use pager::Pager;
pub use palette::{Commands, CommandsView, PaletteButton};
pub use query::open_from_query;
pub use secret_dialog::{NewSecret, SecretDialog};
pub use sort::{SortHead, SortSelect};
pub use time::RelativeTime;
pub use toast::{Toasts, ToastsView};
