//! CSV files (RFC 4180) that are safe to open in a spreadsheet.

/// Returns the file's content. The first row is the header.
pub fn csv(rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut file = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().map(|text| cell(text)).collect();
        file.push_str(&cells.join(","));
        file.push_str("\r\n");
    }
    file
}

/// Quotes a cell if necessary. If a spreadsheet would evaluate the text as a formula, prefixes the text with an
/// apostrophe (OWASP, "CSV Injection"). Leaves plain numbers unchanged.
fn cell(text: &str) -> String {
    let is_number = text.parse::<i64>().is_ok();
    let is_formula = !is_number && text.starts_with(['=', '+', '-', '@', '\t', '\r']);
    let text = if is_formula {
        format!("'{text}")
    } else {
        text.to_owned()
    };
    if text.contains(['"', ',', '\n', '\r']) || is_formula {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[&str]) -> String {
        csv([cells.iter().map(|it| (*it).to_owned()).collect()])
    }

    #[test]
    fn cells_are_quoted_when_needed() {
        assert_eq!(row(&["a", "b c", "1"]), "a,b c,1\r\n");
        assert_eq!(
            row(&["a,b", "say \"hi\"", "x\ny"]),
            "\"a,b\",\"say \"\"hi\"\"\",\"x\ny\"\r\n"
        );
        assert_eq!(row(&["", "–"]), ",–\r\n");
    }

    #[test]
    fn formulas_are_not_evaluated() {
        for text in ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1"] {
            assert_eq!(row(&[text]), format!("\"'{text}\"\r\n"));
        }
        assert_eq!(row(&["-5", "5"]), "-5,5\r\n");
    }
}
