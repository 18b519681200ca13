//! Dialogs opened by the query string of the URL.

use leptos::prelude::*;

use crate::{reactive::effect, route::route};

/// Opens a dialog when the address has `new` in its query, and removes that from the address. If the user may not use
/// the dialog, it is not opened.
pub fn open_from_query(open: RwSignal<bool>, is_allowed: bool) {
    let route = route();
    let own_path = route.path.get_untracked();
    effect(move || {
        // While the user navigates to another page, this page already sees that page's query.
        if route.path.with_untracked(|path| *path == own_path)
            && route.query.with(|query| query.get("new")).is_some()
        {
            open.set(is_allowed);
            let query = route.query.get_untracked().with("new", "");
            route.replace(&format!("{}{query}", route.path.get_untracked()));
        }
    });
}
