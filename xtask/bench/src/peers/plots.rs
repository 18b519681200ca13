//! Bar charts in SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

const LABELS: i32 = 300;
const BARS: i32 = 460;
/// The space for values to the right of the longest bar.
const VALUES: i32 = 110;
const TOP: i32 = 76;
const BAR: i32 = 15;
const GAP: i32 = 12;
const INK: RGBColor = RGBColor(31, 41, 55);
const COLORS: [RGBColor; 2] = [RGBColor(37, 99, 235), RGBColor(217, 119, 6)];

pub(crate) struct Chart<'a> {
    pub(crate) title: &'a str,
    /// What the bars show, and in which unit.
    pub(crate) subtitle: &'a str,
    /// The names of the bars of each row, at most two.
    pub(crate) series: &'a [&'a str],
    /// Each row has a value for each series, or `None` where nothing was measured.
    pub(crate) rows: Vec<(String, Vec<Option<f64>>)>,
    /// The number of decimal places of the values.
    pub(crate) decimals: usize,
    pub(crate) is_logarithmic: bool,
    /// A vertical line, such as a limit, and its name.
    pub(crate) line: Option<(f64, &'a str)>,
}

impl Chart<'_> {
    pub(crate) fn write(&self, file: &Path) -> Result<()> {
        let mut svg = String::new();
        self.draw(&mut svg).map_err(|error| anyhow!("{error}"))?;
        std::fs::write(file, svg + "\n")?;
        Ok(())
    }

    fn draw(&self, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
        let rows = i32::try_from(self.rows.len())?;
        let series = i32::try_from(self.series.len())?;
        let row_height = BAR * series + GAP;
        let height = TOP + rows * row_height + 24;
        let size = (
            u32::try_from(LABELS + BARS + VALUES)?,
            u32::try_from(height)?,
        );
        let root = SVGBackend::with_string(svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        let font = |size: i32| ("sans-serif", size).into_font().color(&INK);
        root.draw(&Text::new(self.title, (16, 14), font(18)))?;
        root.draw(&Text::new(self.subtitle, (16, 38), font(13)))?;
        let mut x = LABELS;
        for (name, color) in self.series.iter().zip(COLORS) {
            root.draw(&Rectangle::new([(x, 58), (x + 12, 70)], color.filled()))?;
            root.draw(&Text::new(*name, (x + 18, 57), font(13)))?;
            x += 40 + i32::try_from(name.len())? * 8;
        }
        let longest = self.longest();
        if let Some((value, name)) = self.line {
            let x = LABELS + self.length(value, longest);
            let line = [(x, TOP), (x, height - 18)];
            root.draw(&PathElement::new(line, INK.stroke_width(1)))?;
            root.draw(&Text::new(name, (x + 4, height - 20), font(12)))?;
        }
        for (index, (label, values)) in self.rows.iter().enumerate() {
            let top = TOP + i32::try_from(index)? * row_height + GAP / 2;
            let middle = top + BAR * series / 2 - 8;
            root.draw(&Text::new(label.as_str(), (16, middle), font(13)))?;
            for (n, value) in values.iter().enumerate() {
                let Some(value) = value else { continue };
                let top = top + i32::try_from(n)? * BAR;
                let end = LABELS + self.length(*value, longest).max(1);
                let bar = [(LABELS, top), (end, top + BAR - 2)];
                root.draw(&Rectangle::new(bar, COLORS[n % 2].filled()))?;
                let text = format!("{value:.*}", self.decimals);
                root.draw(&Text::new(text, (end + 6, top - 1), font(12)))?;
            }
        }
        root.present()?;
        Ok(())
    }

    fn longest(&self) -> f64 {
        let values = self.rows.iter().flat_map(|it| &it.1).flatten().copied();
        let line = self.line.iter().map(|it| it.0);
        values.chain(line).fold(0.0, f64::max)
    }

    /// Returns the length of a bar in pixels. On a logarithmic scale, bars start at 0.5.
    fn length(&self, value: f64, longest: f64) -> i32 {
        let part = if self.is_logarithmic {
            (value * 2.0).max(1.0).ln() / (longest * 2.0).max(2.0).ln()
        } else {
            value / longest.max(f64::MIN_POSITIVE)
        };
        #[expect(clippy::cast_possible_truncation, reason = "at most the width")]
        let length = (part * f64::from(BARS)).round() as i32;
        length
    }
}

#[cfg(test)]
mod tests {
    use super::{BARS, Chart};

    fn chart(is_logarithmic: bool) -> Chart<'static> {
        Chart {
            title: "CPU",
            subtitle: "compared with a bare handler",
            series: &["allowed", "denied"],
            rows: vec![
                ("one <&> two".to_owned(), vec![Some(1.0), Some(8.0)]),
                ("three".to_owned(), vec![None, Some(4.0)]),
            ],
            decimals: 2,
            is_logarithmic,
            line: Some((1.0, "limit")),
        }
    }

    #[test]
    fn a_chart_has_all_values_and_escapes_its_labels() {
        let mut svg = String::new();
        chart(false).draw(&mut svg).unwrap();
        for text in ["1.00", "8.00", "4.00", "one &lt;&amp;&gt; two", "limit"] {
            assert!(svg.contains(text), "{text} is missing from {svg}");
        }
        assert!(svg.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn the_longest_bar_fills_the_width() {
        assert_eq!(chart(false).length(8.0, 8.0), BARS);
        assert_eq!(chart(false).length(2.0, 8.0), BARS / 4);
        assert_eq!(chart(true).length(8.0, 8.0), BARS);
        assert_eq!(chart(true).length(2.0, 8.0), BARS / 2);
    }
}
