//! A bar chart of allowed and rejected requests, as SVG.
//!
//! Horizontal positions are percentages and vertical positions are pixels, so that the chart fills any width without
//! distortion.

use super::{
    markup::{Markup, element, with_text},
    text::number,
};

/// The height of the plot and the labels below it, in pixels.
const HEIGHT: u64 = 240;
const TOP: u64 = 10;
/// The vertical position of the bars' lower edge.
const BASE: u64 = 214;
const GRIDLINES: u64 = 4;
const MAX_LABELS: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completeness {
    Complete,
    /// The bar can still grow.
    SoFar,
    /// There is no data yet. This is different from zero requests.
    Missing,
}

/// One hour or day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bar {
    pub label: String,
    /// The full time range.
    pub time: String,
    pub allowed: u64,
    pub rejected: u64,
    pub completeness: Completeness,
}

impl Bar {
    /// Returns a description of the bar, such as `14:00–15:00 CET · 1,204 allowed · 38 rejected (3.1%)`.
    pub fn text(&self) -> String {
        let Self {
            time,
            allowed,
            rejected,
            ..
        } = self;
        let counts = format!(
            "{} allowed · {} rejected",
            number(*allowed),
            number(*rejected)
        );
        let rate = match percent(*rejected, allowed + rejected) {
            Some(rate) if *rejected > 0 => format!(" ({rate})"),
            _ => String::new(),
        };
        match self.completeness {
            Completeness::Complete => format!("{time} · {counts}{rate}"),
            Completeness::SoFar => format!("{time} · {counts}{rate} so far"),
            Completeness::Missing => format!("{time} · no data yet"),
        }
    }
}

/// Formats a percentage with one decimal place. Returns `None` if `whole` is zero.
pub fn percent(part: u64, whole: u64) -> Option<String> {
    let tenths = u128::from(part) * 1000 + u128::from(whole) / 2;
    let tenths = u64::try_from(tenths.checked_div(u128::from(whole))?).ok()?;
    Some(format!("{}.{}%", number(tenths / 10), tenths % 10))
}

/// Returns the distance between gridlines: 1, 2, or 5 times a power of ten.
fn grid_step(max: u64) -> u64 {
    let mut power = 1_u64;
    loop {
        for factor in [1, 2, 5] {
            let step = power.saturating_mul(factor);
            if step.saturating_mul(GRIDLINES) >= max {
                return step;
            }
        }
        power = power.saturating_mul(10);
    }
}

/// Abbreviates a round number: `1.5k`, `20M`.
pub fn short(n: u64) -> String {
    for (unit, suffix) in [(1_000_000_000, "G"), (1_000_000, "M"), (1000, "k")] {
        if n >= unit {
            let tenths = n / (unit / 10);
            return if tenths.is_multiple_of(10) {
                format!("{}{suffix}", tenths / 10)
            } else {
                format!("{}.{}{suffix}", tenths / 10, tenths % 10)
            };
        }
    }
    n.to_string()
}

/// Returns a position as a percentage of `whole`, for use in an attribute.
fn position(part: u64, whole: u64) -> String {
    let thousandths = part * 100_000 / whole.max(1);
    format!("{}.{:03}%", thousandths / 1000, thousandths % 1000)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visible {
    pub allowed: bool,
    pub rejected: bool,
    /// The index of the bar that is selected with the pointer or the keyboard.
    pub selected: Option<usize>,
}

/// Returns the plot, and the gridline labels for the column to its left.
pub fn bar_chart(bars: &[Bar], visible: Visible) -> (Markup, Markup) {
    let shown = |bar: &Bar| {
        let allowed = if visible.allowed { bar.allowed } else { 0 };
        let rejected = if visible.rejected { bar.rejected } else { 0 };
        (allowed, rejected)
    };
    let highest = bars.iter().map(|bar| {
        let (allowed, rejected) = shown(bar);
        allowed + rejected
    });
    let step = grid_step(highest.max().unwrap_or(0));
    let top = step * GRIDLINES;
    // Bars are at least one pixel high, unless their value is zero.
    let height = |n: u64| {
        let pixels = u128::from(n) * u128::from(BASE - TOP) / u128::from(top);
        u64::try_from(pixels)
            .unwrap_or(BASE - TOP)
            .max(u64::from(n > 0))
    };
    let (mut plot, mut axis) = (Markup::default(), Markup::default());
    plot.push(hatch());
    for line in 0..=GRIDLINES {
        let y = (BASE - height(step * line)).to_string();
        let y_text = (BASE - height(step * line) + 4).to_string();
        plot.push(element(
            "line",
            &[("class", "grid"), ("x2", "100%"), ("y1", &y), ("y2", &y)],
            &[],
        ));
        axis.push(with_text(
            "text",
            &[("x", "34"), ("y", &y_text)],
            &short(step * line),
        ));
    }
    // Each bar takes ten units, including one unit of space on either side.
    let units = bars.len() as u64 * 10;
    for (at, bar) in bars.iter().enumerate() {
        let left = at as u64 * 10;
        if visible.selected == Some(at) {
            let (x, width) = (position(left, units), position(10, units));
            plot.push(element(
                "rect",
                &[
                    ("class", "band"),
                    ("x", &x),
                    ("y", "0"),
                    ("width", &width),
                    ("height", &BASE.to_string()),
                ],
                &[],
            ));
        }
        if bar.completeness == Completeness::Missing {
            continue;
        }
        let paler = if bar.completeness == Completeness::SoFar {
            " so-far"
        } else {
            ""
        };
        let (x, width) = (position(left + 1, units), position(8, units));
        let (allowed, rejected) = shown(bar);
        let mut rect = |class: &str, y: u64, height: u64| {
            let class = format!("{class}{paler}");
            let (y, height) = (y.to_string(), height.to_string());
            plot.push(element(
                "rect",
                &[
                    ("class", &class),
                    ("x", &x),
                    ("y", &y),
                    ("width", &width),
                    ("height", &height),
                ],
                &[],
            ));
        };
        let allowed_height = height(allowed);
        if allowed > 0 {
            rect("allowed", BASE - allowed_height, allowed_height);
        }
        if rejected > 0 {
            // Leave one pixel between the two series.
            let gap = u64::from(allowed > 0);
            let rejected_height = height(rejected).saturating_sub(gap).max(1);
            rect(
                "rejected",
                (BASE - allowed_height).saturating_sub(rejected_height + gap),
                rejected_height,
            );
        }
    }
    for at in label_positions(bars.len()) {
        let x = position(at as u64 * 10 + 5, units);
        let anchor = match at {
            0 => "start",
            at if at + 1 == bars.len() => "end",
            _ => "middle",
        };
        let x = match anchor {
            "start" => position(1, units),
            "end" => position(units - 1, units),
            _ => x,
        };
        plot.push(with_text(
            "text",
            &[
                ("class", "label"),
                ("x", &x),
                ("y", "234"),
                ("text-anchor", anchor),
            ],
            &bars[at].label,
        ));
    }
    let height = HEIGHT.to_string();
    let plot = element(
        "svg",
        &[
            ("width", "100%"),
            ("height", &height),
            ("aria-hidden", "true"),
        ],
        &[plot],
    );
    let axis = element(
        "svg",
        &[
            ("width", "40"),
            ("height", &height),
            ("aria-hidden", "true"),
        ],
        &[axis],
    );
    (plot, axis)
}

/// Returns the pattern that distinguishes rejected requests without color.
fn hatch() -> Markup {
    let parts = [
        element(
            "rect",
            &[("class", "hatch-ground"), ("width", "6"), ("height", "6")],
            &[],
        ),
        element("path", &[("class", "hatch-line"), ("d", "M0 0v6")], &[]),
    ];
    let pattern = element(
        "pattern",
        &[
            ("id", "hatch"),
            ("width", "6"),
            ("height", "6"),
            ("patternUnits", "userSpaceOnUse"),
            ("patternTransform", "rotate(45)"),
        ],
        &parts,
    );
    element("defs", &[], &[pattern])
}

/// Returns the indexes of the bars that have a label. The indexes are evenly spaced and start at 0.
fn label_positions(bars: usize) -> impl Iterator<Item = usize> {
    let step = bars.div_ceil(MAX_LABELS).max(1);
    (0..bars).step_by(step)
}

pub fn bar_table(caption: &str, bars: &[Bar]) -> Markup {
    let head = ["Time", "Allowed", "Rejected", "Rejection rate"];
    let head = head.map(|name| {
        let class = if name == "Time" { "" } else { "num" };
        with_text("th", &[("scope", "col"), ("class", class)], name)
    });
    let rows: Markup = bars
        .iter()
        .map(|bar| {
            let cell = |label: &str, text: &str| {
                with_text("td", &[("class", "num"), ("data-label", label)], text)
            };
            let total = bar.allowed + bar.rejected;
            let time = match bar.completeness {
                Completeness::SoFar => format!("{} (so far)", bar.time),
                _ => bar.time.clone(),
            };
            let is_missing = bar.completeness == Completeness::Missing;
            let count = |n: u64| {
                if is_missing {
                    "–".to_owned()
                } else {
                    number(n)
                }
            };
            let cells = [
                with_text("th", &[("scope", "row")], &time),
                cell("Allowed", &count(bar.allowed)),
                cell("Rejected", &count(bar.rejected)),
                cell(
                    "Rejection rate",
                    &percent(bar.rejected, total).unwrap_or_else(|| "–".to_owned()),
                ),
            ];
            element("tr", &[], &cells)
        })
        .collect();
    let parts = [
        with_text("caption", &[], caption),
        element("thead", &[], &[element("tr", &[], &head)]),
        element("tbody", &[], &[rows]),
    ];
    element("table", &[("class", "table data")], &parts)
}

/// Returns a sparkline: a row of small bars without axes.
pub fn sparkline(values: &[u64]) -> Markup {
    let highest = values.iter().copied().max().unwrap_or(0).max(1);
    let units = values.len() as u64 * 10;
    let bars: Markup = values
        .iter()
        .enumerate()
        .map(|(at, value)| {
            let height = (value.saturating_mul(28) / highest).max(u64::from(*value > 0));
            let (x, width) = (position(at as u64 * 10 + 1, units), position(8, units));
            let (y, height) = ((28 - height).to_string(), height.to_string());
            element(
                "rect",
                &[
                    ("class", "allowed"),
                    ("x", &x),
                    ("y", &y),
                    ("width", &width),
                    ("height", &height),
                ],
                &[],
            )
        })
        .collect();
    element(
        "svg",
        &[("width", "100%"), ("height", "28"), ("aria-hidden", "true")],
        &[bars],
    )
}

#[cfg(test)]
mod tests;
