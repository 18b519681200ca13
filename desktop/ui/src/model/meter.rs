//! Bars that show how much of a limit is used.

use super::{
    markup::{Markup, element, with_text},
    text::number,
};

#[derive(Debug, Clone, Default)]
pub struct Meter<'a> {
    pub label: &'a str,
    pub used: u64,
    pub limit: u64,
    /// A note below the bar, such as when the limit resets.
    pub note: &'a str,
    pub denied: bool,
}

impl Meter<'_> {
    pub fn text(&self) -> String {
        format!("{} of {} used", number(self.used), number(self.limit))
    }

    /// Returns the used part in percent. If anything is used, the result is at least 1, so that the bar is visible.
    fn percent(&self) -> u64 {
        let percent = u128::from(self.used) * 100 / u128::from(self.limit.max(1));
        u64::try_from(percent)
            .unwrap_or(100)
            .min(100)
            .max(u64::from(self.used > 0))
    }

    pub fn markup(&self) -> Markup {
        let (percent, text) = (self.percent(), self.text());
        let class = match percent {
            _ if self.denied => "meter full denied",
            0..80 => "meter",
            80..100 => "meter near",
            _ => "meter full",
        };
        let badge = if self.denied {
            with_text("span", &[("class", "badge off")], "Denied this request")
        } else {
            Markup::default()
        };
        let head = element(
            "p",
            &[("class", "meter-head")],
            &[
                with_text("span", &[], self.label),
                badge,
                with_text("strong", &[], &text),
            ],
        );
        let (now, width) = (percent.to_string(), format!("{percent}%"));
        let bar = element(
            "svg",
            &[("width", "100%"), ("height", "8"), ("aria-hidden", "true")],
            &[element(
                "rect",
                &[("width", &width), ("height", "8"), ("rx", "4")],
                &[],
            )],
        );
        let bar = element(
            "div",
            &[
                ("class", "meter-bar"),
                ("role", "meter"),
                ("aria-label", self.label),
                ("aria-valuemin", "0"),
                ("aria-valuemax", "100"),
                ("aria-valuenow", &now),
                ("aria-valuetext", &text),
            ],
            &[bar],
        );
        let note = if self.note.is_empty() {
            Markup::default()
        } else {
            with_text("p", &[("class", "muted small-text")], self.note)
        };
        element("div", &[("class", class)], &[head, bar, note])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(used: u64, limit: u64, denied: bool) -> String {
        let meter = Meter {
            label: "Daily quota",
            used,
            limit,
            denied,
            ..Meter::default()
        };
        let markup = meter.markup().to_string();
        markup.split('"').nth(1).unwrap_or_default().to_owned()
    }

    #[test]
    fn level_follows_from_what_is_used() {
        assert_eq!(class(0, 1000, false), "meter");
        assert_eq!(class(799, 1000, false), "meter");
        assert_eq!(class(800, 1000, false), "meter near");
        assert_eq!(class(999, 1000, false), "meter near");
        assert_eq!(class(1000, 1000, false), "meter full");
        assert_eq!(class(1, 1000, true), "meter full denied");
        assert_eq!(class(u64::MAX, 1, false), "meter full");
    }

    #[test]
    fn label_and_bar_both_show_what_is_used() {
        let meter = |used, limit| {
            let meter = Meter {
                label: "Daily quota",
                used,
                limit,
                ..Meter::default()
            };
            meter.markup().to_string()
        };
        for (used, limit, text, width) in [
            (0, 20, "0 of 20 used", "0%"),
            (5, 20, "5 of 20 used", "25%"),
            (4500, 5000, "4,500 of 5,000 used", "90%"),
            (20, 20, "20 of 20 used", "100%"),
        ] {
            let markup = meter(used, limit);
            assert!(
                markup.contains(&format!("<strong>{text}</strong>")),
                "{markup}"
            );
            assert!(
                markup.contains(&format!("aria-valuetext=\"{text}\"")),
                "{markup}"
            );
            assert!(
                markup.contains(&format!("<rect width=\"{width}\"")),
                "{markup}"
            );
        }
    }

    #[test]
    fn a_little_is_visible() {
        let meter = Meter {
            used: 1,
            limit: 1_000_000,
            ..Meter::default()
        };
        assert!(meter.markup().to_string().contains("width=\"1%\""));
        let none = Meter {
            limit: 10,
            ..Meter::default()
        };
        assert!(none.markup().to_string().contains("width=\"0%\""));
    }
}
