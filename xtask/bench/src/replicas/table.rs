//! Results, as a table for people and as data for programs.

use std::fmt::Write as _;

use serde_json::{Map, Value};

pub(crate) struct Table {
    pub(crate) title: &'static str,
    columns: &'static [&'static str],
    rows: Vec<Vec<String>>,
    /// Explanations of the figures.
    pub(crate) notes: Vec<String>,
    /// Violations of the limits and requirements that the table checks.
    pub(crate) faults: Vec<String>,
}

impl Table {
    pub(crate) fn new(title: &'static str, columns: &'static [&'static str]) -> Self {
        Self {
            title,
            columns,
            rows: Vec::new(),
            notes: Vec::new(),
            faults: Vec::new(),
        }
    }

    /// Adds a row with one cell per column.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.columns.len(), "{cells:?}");
        eprintln!("  {}", cells.join(" | "));
        self.rows.push(cells);
    }

    pub(crate) fn markdown(&self) -> String {
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
        };
        let mut text = format!("## {}\n\n", self.title);
        text += &line(&mut self.columns.iter().copied());
        text += &line(&mut self.columns.iter().map(|_| "---"));
        for row in &self.rows {
            text += &line(&mut row.iter().map(String::as_str));
        }
        for note in &self.notes {
            let _ = writeln!(text, "\n{note}");
        }
        for fault in &self.faults {
            let _ = writeln!(text, "\n**Broken:** {fault}");
        }
        text
    }

    /// Returns the table as JSON. Rows are objects with a string per column.
    pub(crate) fn json(&self) -> Value {
        let row = |cells: &Vec<String>| {
            let cells = self.columns.iter().zip(cells);
            cells
                .map(|(column, cell)| ((*column).to_owned(), Value::from(cell.as_str())))
                .collect::<Map<_, _>>()
        };
        let rows: Vec<Value> = self.rows.iter().map(|it| row(it).into()).collect();
        serde_json::json!({"title": self.title, "rows": rows, "faults": self.faults})
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn a_table_is_markdown_and_data() {
        let mut table = Table::new("Sums", &["a", "b"]);
        table.row(vec!["1".into(), "2".into()]);
        table.notes.push("Added by hand.".into());
        assert_eq!(
            table.markdown(),
            "## Sums\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nAdded by hand.\n"
        );
        assert_eq!(table.json()["rows"][0]["b"], "2");
    }
}
