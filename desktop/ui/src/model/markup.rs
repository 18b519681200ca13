//! HTML and SVG as text, for charts, large tables, and other parts of a page that are not interactive. Such code adds
//! only a tenth as much to the download as Leptos views would, and it can be tested without a browser.
//!
//! This module escapes all text and attribute values. Tags and attribute names are literals.

use std::fmt::{self, Write as _};

/// HTML in which all text and attribute values are escaped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Markup(String);

impl fmt::Display for Markup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Markup {
    pub fn text(text: &str) -> Self {
        let mut out = String::new();
        escape(text, &mut out);
        Self(out)
    }

    pub fn push(&mut self, part: Self) {
        if self.0.is_empty() {
            self.0 = part.0;
        } else {
            self.0.push_str(&part.0);
        }
    }
}

impl FromIterator<Markup> for Markup {
    fn from_iter<I: IntoIterator<Item = Self>>(parts: I) -> Self {
        let mut all = Self::default();
        for part in parts {
            all.push(part);
        }
        all
    }
}

fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
}

/// Returns an element. Omits attributes with an empty value.
pub fn element(
    tag: &'static str,
    attributes: &[(&'static str, &str)],
    content: &[Markup],
) -> Markup {
    let mut out = format!("<{tag}");
    for (name, value) in attributes {
        if !value.is_empty() {
            let _ = write!(out, " {name}=\"");
            escape(value, &mut out);
            out.push('"');
        }
    }
    out.push('>');
    for part in content {
        out.push_str(&part.0);
    }
    let _ = write!(out, "</{tag}>");
    Markup(out)
}

pub fn with_text(tag: &'static str, attributes: &[(&'static str, &str)], text: &str) -> Markup {
    element(tag, attributes, &[Markup::text(text)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_attributes_are_escaped() {
        let link = with_text(
            "a",
            &[("href", "/x?a=1&b=\"2\""), ("class", ""), ("title", "<>")],
            "<script>1 & 2</script>",
        );
        assert_eq!(
            link.to_string(),
            "<a href=\"/x?a=1&amp;b=&quot;2&quot;\" title=\"&lt;&gt;\">&lt;script&gt;1 &amp; 2&lt;/script&gt;</a>"
        );
    }

    #[test]
    fn elements_nest() {
        let rows = ["a", "b"].map(|text| with_text("td", &[], text));
        let row = element("tr", &[], &rows);
        assert_eq!(row.to_string(), "<tr><td>a</td><td>b</td></tr>");
    }
}
