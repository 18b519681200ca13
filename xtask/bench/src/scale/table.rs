//! A table with a column for each number of keys, and with the growth of each value.

/// The values of one row: `None` for each number of keys that was not measured.
struct Row {
    name: &'static str,
    values: Vec<Option<f64>>,
}

pub(super) struct Table {
    keys: Vec<u32>,
    rows: Vec<Row>,
    /// Measurements that failed.
    pub(super) notes: Vec<String>,
}

/// How a value grows with the number of keys.
#[derive(Debug, PartialEq)]
struct Slope {
    /// The last value divided by the first.
    ratio: f64,
    /// The exponent `e`: between the last two values, the value grows like the number of keys to the power of `e`. 0
    /// means that the value is constant, and 1 that it is proportional to the number of keys.
    exponent: f64,
}

impl Slope {
    /// Returns `None` if there are fewer than two values, or if a value that is compared is not positive.
    fn of(keys: &[u32], values: &[Option<f64>]) -> Option<Self> {
        let mut measured = keys
            .iter()
            .zip(values)
            .filter_map(|(keys, value)| value.map(|value| (f64::from(*keys), value)));
        let first = measured.next()?;
        let last = measured.next_back()?;
        let before = measured.next_back().unwrap_or(first);
        if [first, before, last].iter().any(|it| it.1 <= 0.0) {
            return None;
        }
        Some(Self {
            ratio: last.1 / first.1,
            exponent: (last.1 / before.1).ln() / (last.0 / before.0).ln(),
        })
    }
}

/// Formats a number with up to three decimal places. Larger numbers have fewer decimal places.
fn short(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

impl Table {
    pub(super) fn new(keys: Vec<u32>) -> Self {
        Self {
            keys,
            rows: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Sets the value of a row for a number of keys. Rows are in the order in which they are first set.
    pub(super) fn set(&mut self, name: &'static str, keys: u32, value: f64) {
        eprintln!("{keys} keys: {name}: {}", short(value));
        let Some(column) = self.keys.iter().position(|it| *it == keys) else {
            return;
        };
        let row = match self.rows.iter().position(|row| row.name == name) {
            Some(row) => row,
            None => {
                self.rows.push(Row {
                    name,
                    values: vec![None; self.keys.len()],
                });
                self.rows.len() - 1
            }
        };
        self.rows[row].values[column] = Some(value);
    }

    pub(super) fn markdown(&self) -> String {
        let mut lines = vec![
            format!(
                "| | {} | ratio | exponent |",
                join(self.keys.iter().map(u32::to_string))
            ),
            format!("|---|{}", "---:|".repeat(self.keys.len() + 2)),
        ];
        for row in &self.rows {
            let values = row
                .values
                .iter()
                .map(|it| it.map_or_else(String::new, short));
            let (ratio, exponent) = Slope::of(&self.keys, &row.values).map_or_else(
                || (String::new(), String::new()),
                |it| (short(it.ratio), format!("{:.2}", it.exponent)),
            );
            lines.push(format!(
                "| {} | {} | {ratio} | {exponent} |",
                row.name,
                join(values)
            ));
        }
        lines.join("\n")
    }
}

fn join(cells: impl Iterator<Item = String>) -> String {
    cells.collect::<Vec<_>>().join(" | ")
}

#[cfg(test)]
mod tests {
    use super::{Slope, Table, short};

    fn slope(values: &[Option<f64>]) -> Option<(String, String)> {
        let slope = Slope::of(&[1, 1_000, 1_000_000], values)?;
        Some((
            format!("{:.2}", slope.ratio),
            format!("{:.2}", slope.exponent),
        ))
    }

    #[test]
    fn the_slope_is_the_ratio_to_the_first_value_and_the_exponent_since_the_one_before() {
        let expected = |ratio: &str, exponent: &str| Some((ratio.to_owned(), exponent.to_owned()));
        let constant = [Some(2.0), Some(2.0), Some(2.0)];
        assert_eq!(slope(&constant), expected("1.00", "0.00"));
        let linear_in_the_end = [Some(2.0), Some(2.0), Some(2_000.0)];
        assert_eq!(slope(&linear_in_the_end), expected("1000.00", "1.00"));
        let linear = [Some(0.5), None, Some(500_000.0)];
        assert_eq!(slope(&linear), expected("1000000.00", "1.00"));
        let root_of_later_values = [None, Some(1.0), Some(31.622_776_6)];
        assert_eq!(slope(&root_of_later_values), expected("31.62", "0.50"));
        let shrinking = [Some(4.0), None, Some(1.0)];
        assert_eq!(slope(&shrinking), expected("0.25", "-0.10"));
    }

    #[test]
    fn one_value_or_a_zero_has_no_slope() {
        assert_eq!(slope(&[None, None, None]), None);
        assert_eq!(slope(&[None, Some(1.0), None]), None);
        assert_eq!(slope(&[Some(0.0), None, Some(1.0)]), None);
        assert_eq!(slope(&[Some(1.0), Some(0.0), Some(1.0)]), None);
    }

    #[test]
    fn numbers_keep_three_digits() {
        assert_eq!(short(12_345.6), "12346");
        assert_eq!(short(99.96), "100.0");
        assert_eq!(short(12.34), "12.3");
        assert_eq!(short(1.234), "1.23");
        assert_eq!(short(0.0123), "0.012");
    }

    #[test]
    fn values_are_in_the_column_of_their_number_of_keys() {
        let mut table = Table::new(vec![1, 1_000]);
        table.set("start, ms", 1, 20.0);
        table.set("lookup, µs", 1_000, 150.0);
        table.set("start, ms", 1_000, 40.0);
        assert_eq!(
            table.markdown(),
            "| | 1 | 1000 | ratio | exponent |\n|---|---:|---:|---:|---:|\n\
             | start, ms | 20.0 | 40.0 | 2.00 | 0.10 |\n| lookup, µs |  | 150 |  |  |"
        );
    }
}
