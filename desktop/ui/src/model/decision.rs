//! Decisions as a table, and the state of a live list of decisions.

use std::collections::VecDeque;

use quota_common::decision::{Decision, DecisionOutcome};

use super::{
    markup::{Markup, element, with_text},
    policy::policy_label,
    text::countdown,
};

/// The newest decisions, in two lists of at most [`Live::MAX`] decisions each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Live {
    pub rows: VecDeque<Decision>,
    /// Decisions that arrived while the list was paused, newest first.
    pub waiting: VecDeque<Decision>,
    /// The number of complete updates until the last gap is forgotten. 0 if there is no gap.
    gap_updates: u8,
}

impl Live {
    pub const MAX: usize = 500;
    /// The number of complete updates after which a gap is forgotten: enough for users to read that there is a gap.
    const GAP_UPDATES: u8 = 4;

    /// Returns whether decisions arrive too fast, or did until recently, so that the list skips some of them.
    pub const fn has_gap(&self) -> bool {
        self.gap_updates > 0
    }

    fn newest(&self) -> Option<&Decision> {
        self.waiting.front().or_else(|| self.rows.front())
    }

    /// Returns the number of new decisions in `page`, which must be sorted newest first. Returns `None` if all of these
    /// decisions are new.
    pub fn count_new(&self, page: &[Decision]) -> Option<usize> {
        let newest = self.newest()?;
        page.iter().position(|it| it.id == newest.id)
    }

    /// Adds the new decisions of an update. `new` must be sorted newest first. `has_gap` means that decisions are missing
    /// between the new and the known ones.
    pub fn add(&mut self, new: Vec<Decision>, has_gap: bool, paused: bool) {
        self.gap_updates = if has_gap {
            Self::GAP_UPDATES
        } else {
            self.gap_updates.saturating_sub(1)
        };
        let rows = if paused {
            &mut self.waiting
        } else {
            &mut self.rows
        };
        for decision in new.into_iter().rev() {
            rows.push_front(decision);
        }
        self.waiting.truncate(Self::MAX);
        self.rows.truncate(Self::MAX);
        if !paused {
            self.resume();
        }
    }

    pub fn resume(&mut self) {
        while let Some(decision) = self.waiting.pop_back() {
            self.rows.push_front(decision);
        }
        self.rows.truncate(Self::MAX);
    }
}

/// Returns the decisions as a table. `clock` formats a time. `with_key` adds a column with the key's name.
pub fn decision_table(
    decisions: &[&Decision],
    caption: &str,
    with_key: bool,
    clock: &dyn Fn(i64) -> String,
) -> Markup {
    let mut columns = vec![
        "Time",
        "Key",
        "Endpoint",
        "Outcome",
        "Denied by",
        "Retry after",
        "Request ID",
    ];
    if !with_key {
        columns.remove(1);
    }
    let head: Vec<Markup> = columns
        .iter()
        .map(|name| with_text("th", &[("scope", "col")], name))
        .collect();
    let rows: Markup = decisions
        .iter()
        .map(|it| {
            let at = it.at.inner().timestamp_millis();
            let cell = |label: &str, content: Markup| {
                element("td", &[("data-label", label), ("dir", "auto")], &[content])
            };
            let text = |label: &str, text: &str| cell(label, Markup::text(text));
            let (class, outcome) = match it.outcome {
                DecisionOutcome::Allowed => ("badge", "Allowed"),
                DecisionOutcome::Rejected => ("badge off", "Rejected"),
            };
            let name = it.key_name.as_deref().unwrap_or("(deleted)");
            let href = format!("/console/api-keys/{}", it.key_id);
            let key = match it.key_name {
                Some(_) => with_text("a", &[("href", &href), ("class", "clamp")], name),
                None => Markup::text(name),
            };
            let endpoint = if it.endpoint.is_empty() {
                "–"
            } else {
                &it.endpoint
            };
            let policy = it.policy.as_deref().map_or("–", policy_label);
            let retry = it
                .retry_after
                .map_or_else(|| "–".to_owned(), |secs| countdown(secs.into()));
            let time = it.at.to_string();
            let time = with_text("time", &[("datetime", &time)], &clock(at));
            let mut cells = vec![element("th", &[("scope", "row")], &[time])];
            if with_key {
                cells.push(cell("Key", key));
            }
            cells.push(cell(
                "Endpoint",
                with_text("span", &[("class", "clamp")], endpoint),
            ));
            cells.push(cell(
                "Outcome",
                with_text("span", &[("class", class)], outcome),
            ));
            cells.push(text("Denied by", policy));
            cells.push(text("Retry after", &retry));
            cells.push(cell("Request ID", with_text("code", &[], &it.request_id)));
            element("tr", &[], &cells)
        })
        .collect();
    let parts = [
        with_text("caption", &[("class", "visually-hidden")], caption),
        element("thead", &[], &[element("tr", &[], &head)]),
        element("tbody", &[], &[rows]),
    ];
    element("table", &[("class", "table data decisions")], &parts)
}

/// Explains why a key has no decisions to show. `requests` is the number of requests with the key in the last day,
/// according to the usage statistics.
pub const fn no_decisions(requests: u64, was_used: bool) -> &'static str {
    match (requests, was_used) {
        (1.., _) => "The decision log has no entries for the last 24 hours.",
        (0, true) => "No recent requests.",
        (0, false) => "No requests yet.",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn no_text_denies_the_traffic_in_the_chart() {
        assert_eq!(no_decisions(0, false), "No requests yet.");
        assert_eq!(no_decisions(0, true), "No recent requests.");
        for was_used in [false, true] {
            assert!(!no_decisions(7, was_used).contains("No requests"));
        }
    }

    fn decision(n: u32) -> Decision {
        serde_json::from_value(json!({
            "id": format!("019ab4e1-7c00-7000-8000-{n:012}"), "at": "2026-11-26T04:00:00.000Z",
            "key_id": "019ab4e1-7c00-7000-8000-0000000000b1", "key_name": "<i>App</i>",
            "plan_id": "019ab4e1-7c00-7000-8000-0000000000b1", "endpoint": "GET /orders", "outcome": "rejected",
            "policy": "daily", "retry_after": 90, "cost": 1, "request_id": "r-1",
        }))
        .expect("a decision")
    }

    fn numbers(live: &Live) -> Vec<String> {
        live.rows
            .iter()
            .map(|it| it.id.to_string()[34..].to_owned())
            .collect()
    }

    #[test]
    fn new_decisions_come_first_and_once() {
        let mut live = Live::default();
        assert_eq!(live.count_new(&[decision(2), decision(1)]), None);
        live.add(vec![decision(2), decision(1)], false, false);
        let page = [decision(4), decision(3), decision(2), decision(1)];
        assert_eq!(live.count_new(&page), Some(2));
        live.add(page[..2].to_vec(), false, false);
        assert_eq!(numbers(&live), ["04", "03", "02", "01"]);
        assert_eq!(live.count_new(&page), Some(0));
        assert_eq!(live.count_new(&[decision(9), decision(8)]), None, "a gap");
    }

    #[test]
    fn paused_list_stands_still_until_it_is_resumed() {
        let mut live = Live::default();
        live.add(vec![decision(1)], false, false);
        live.add(vec![decision(3), decision(2)], false, true);
        assert_eq!(numbers(&live), ["01"]);
        assert_eq!(live.waiting.len(), 2);
        assert_eq!(live.count_new(&[decision(4), decision(3)]), Some(1));
        live.resume();
        assert_eq!(numbers(&live), ["03", "02", "01"]);
    }

    #[test]
    fn gap_is_forgotten_after_several_complete_updates() {
        let mut live = Live::default();
        live.add(vec![decision(1)], false, false);
        assert!(!live.has_gap());
        live.add(vec![decision(3)], true, false);
        for n in 4..7 {
            live.add(vec![decision(n)], false, n == 5);
            assert!(live.has_gap(), "{n}");
        }
        // An update without new decisions is complete too.
        live.add(Vec::new(), false, false);
        assert!(!live.has_gap());
        live.add(vec![decision(8)], true, false);
        assert!(live.has_gap());
    }

    #[test]
    fn list_is_bounded() {
        let mut live = Live::default();
        let many: Vec<Decision> = (0..600).rev().map(decision).collect();
        live.add(many.clone(), false, true);
        assert_eq!((live.rows.len(), live.waiting.len()), (0, Live::MAX));
        live.add(many, false, false);
        assert_eq!(live.rows.len(), Live::MAX);
        assert!(live.waiting.is_empty());
    }

    #[test]
    fn table_says_why_a_request_was_rejected() {
        let decision = decision(1);
        let table =
            decision_table(&[&decision], "Decisions", true, &|_| "04:00:00".to_owned()).to_string();
        assert!(
            table.contains("Daily quota") && table.contains("90 s") && table.contains("r-1"),
            "{table}"
        );
        assert!(
            table.contains("&lt;i&gt;App") && !table.contains("<i>"),
            "{table}"
        );
        let table =
            decision_table(&[&decision], "Decisions", false, &|_| String::new()).to_string();
        assert!(!table.contains("App"), "{table}");
    }
}
