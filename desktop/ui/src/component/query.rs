use leptos::prelude::*;

use crate::{reactive::effect, route::route};

/// If the URL contains the `new` query parameter, opens a dialog and removes the parameter. If `is_allowed` is false,
/// only removes the parameter.
pub fn open_from_query(open: RwSignal<bool>, is_allowed: bool) {
    let route = route();
    let own_path = route.path.get_untracked();
    effect(move || {
        // During navigation to another page, this effect can already see that page's query.
        if route.path.with_untracked(|path| *path == own_path)
            && route.query.with(|query| query.get("new")).is_some()
        {
            open.set(is_allowed);
            let query = route.query.get_untracked().with("new", "");
            route.replace(&format!("{}{query}", route.path.get_untracked()));
        }
    });
}
