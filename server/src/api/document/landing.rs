//! The page at `/`, and its pictures.

use poem::Response;

use super::html::{CSP, HOUR, META, escape, marked};
use crate::{api::static_file::respond, config::Landing};

const LANDING: &str = include_str!("landing.html");
const DOOR: &str = include_str!("door.html");
const WEBP: &str = "image/webp";
const PERFORMANCE: &str = include_str!("../../../../docs/PERFORMANCE.md");

/// Returns a gateway configuration as HTML, without its leading comment.
fn configuration(file: &str) -> String {
    let text = match file.split_once("\n\n") {
        Some((_, body)) if file.starts_with('#') => body,
        _ => file,
    };
    escape(text.trim_end())
}

/// The landing page's screenshots, taken by `cargo xtask pictures`.
const PICTURES: [(&str, &[u8]); 4] = [
    (
        "usage-light",
        include_bytes!("../../../../desktop/pictures/usage-light.webp"),
    ),
    (
        "usage-dark",
        include_bytes!("../../../../desktop/pictures/usage-dark.webp"),
    ),
    (
        "try-it-light",
        include_bytes!("../../../../desktop/pictures/try-it-light.webp"),
    ),
    (
        "try-it-dark",
        include_bytes!("../../../../desktop/pictures/try-it-dark.webp"),
    ),
];

/// Returns the section with the screenshots. Browsers show the light or dark version, depending on their color scheme.
fn pictures() -> String {
    let figure = |name: &str, height: u32, caption: &str| {
        format!(
            "<figure><picture><source media=\"(prefers-color-scheme: dark)\" srcset=\"/pictures/{name}-dark.webp\">\
             <img src=\"/pictures/{name}-light.webp\" width=\"1180\" height=\"{height}\" loading=\"lazy\" alt=\"{caption}\">\
             </picture><figcaption>{caption}</figcaption></figure>"
        )
    };
    format!(
        "<section id=\"pictures\">\n<h2>The console</h2>\n<div class=\"pictures\">\n{}\n{}\n</div>\n</section>",
        figure(
            "usage",
            770,
            "Allowed and denied requests by hour, key, endpoint and policy"
        ),
        figure(
            "try-it",
            800,
            "A new key, shown once, and its bucket while the key is tested"
        )
    )
}

/// Returns a picture by its file name.
pub(super) fn picture(file: &str) -> Option<Response> {
    let name = file.strip_suffix(".webp")?;
    let (_, bytes) = PICTURES.iter().find(|(it, _)| *it == name)?;
    Some(respond(*bytes, WEBP, HOUR, CSP))
}

/// Returns the paragraphs and the table of the first section of `docs/PERFORMANCE.md` as HTML.
fn performance() -> String {
    let mut paragraphs = String::new();
    let mut rows = Vec::new();
    let first_section = PERFORMANCE
        .lines()
        .take_while(|line| !line.starts_with("## "));
    for line in first_section {
        let line = without_links(line);
        match line.strip_prefix("| ").and_then(|it| it.strip_suffix(" |")) {
            Some(row) => rows.push(row.split(" | ").map(marked).collect::<Vec<_>>()),
            None if line.is_empty() || line.starts_with(['#', '|']) => {}
            None => paragraphs.push_str(&["<p>", &marked(&line), "</p>\n"].concat()),
        }
    }
    let row = |(number, cells): (usize, &Vec<String>)| {
        let cells = cells
            .iter()
            .enumerate()
            .map(|(column, cell)| match (number, column) {
                (0, _) => format!("<th scope=\"col\">{cell}</th>"),
                (_, 0) => format!("<th scope=\"row\">{cell}</th>"),
                _ => format!("<td>{cell}</td>"),
            });
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    let mut rows = rows.iter().enumerate().map(row);
    let head = rows.next().unwrap_or_default();
    let body: String = rows.collect();
    format!(
        "{paragraphs}<table class=\"facts\">\n<thead>{head}</thead>\n<tbody>\n{body}</tbody>\n</table>"
    )
}

/// Replaces Markdown links with their text, because the links lead to other files of the repository.
fn without_links(line: &str) -> String {
    let (mut text, mut rest) = (String::new(), line);
    while let Some((before, after)) = rest.split_once('[') {
        text.push_str(before);
        let link = after.split_once("](").and_then(|(label, target)| {
            let (_, after) = target.split_once(')')?;
            Some((label, after))
        });
        rest = match link {
            Some((label, after)) => {
                text.push_str(label);
                after
            }
            None => {
                text.push('[');
                after
            }
        };
    }
    text + rest
}

/// Returns the page at `/`: the page about Quota, or a short page with links to the operator's console and API docs.
pub(super) fn front_page(landing: &Landing, base: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    match landing {
        Landing::Door { operator } => DOOR
            .replace("{{meta}}", META)
            .replace("{{version}}", version)
            .replace("{{operator}}", &escape(operator)),
        Landing::Full => {
            let values = [
                ("{{meta}}", META.to_owned()),
                ("{{version}}", version.to_owned()),
                ("{{base}}", escape(base)),
                ("{{source}}", env!("CARGO_PKG_REPOSITORY").to_owned()),
                ("{{pictures}}", pictures()),
                ("{{performance}}", performance()),
                (
                    "{{caddy}}",
                    configuration(include_str!("../../../../deploy/gateways/Caddyfile")),
                ),
                (
                    "{{nginx}}",
                    configuration(include_str!("../../../../deploy/gateways/nginx.conf")),
                ),
                (
                    "{{haproxy}}",
                    configuration(include_str!("../../../../deploy/gateways/haproxy.cfg")),
                ),
                (
                    "{{traefik}}",
                    configuration(include_str!("../../../../deploy/gateways/traefik.yml")),
                ),
                (
                    "{{envoy}}",
                    configuration(include_str!("../../../../deploy/gateways/envoy.yaml")),
                ),
            ];
            values
                .iter()
                .fold(LANDING.to_owned(), |page, (name, value)| {
                    page.replace(name, value)
                })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_become_their_texts() {
        assert_eq!(without_links("a [b](c.md) d [e](f#g)."), "a b d e.");
        assert_eq!(without_links("[a], [b] (c)"), "[a], [b] (c)");
    }

    #[test]
    fn front_page_fills_every_placeholder_and_escapes_values() {
        let full = front_page(&Landing::Full, "https://quota.example.com");
        assert!(!full.contains("{{"), "{full}");
        assert!(!full.contains("]("), "a link in Markdown");
        let facts = performance();
        let cells = |tag: &str| facts.matches(tag).count();
        assert_eq!(cells("<th scope=\"col\">"), 3);
        assert_eq!(cells("<td>"), 2 * cells("<th scope=\"row\">"));
        assert!(
            full.contains("git clone https://"),
            "the address of the source"
        );
        assert!(full.contains("X-Service-Token qs_YOUR_SERVICE_TOKEN"));
        for (name, _) in PICTURES {
            assert!(full.contains(&format!("/pictures/{name}.webp")), "{name}");
            assert!(picture(&format!("{name}.webp")).is_some());
        }
        assert!(picture("keys.webp").is_none() && picture("usage-light").is_none());
        for text in [
            "<th scope=\"col\">Command</th>",
            "<td><code>cargo xtask bench metering</code></td>",
            "<p>These figures are",
        ] {
            assert!(full.contains(text), "{text}");
        }
        assert!(
            !full.contains("---"),
            "the line below a table's head is left out"
        );
        assert!(
            !full.contains("Caddy 2.6 or later"),
            "opening comments are left out"
        );
        let operator = "<b>Northwind</b> & Sons".to_owned();
        let door = front_page(&Landing::Door { operator }, "https://quota.example.com");
        assert!(!door.contains("{{") && !door.contains("<b>"), "{door}");
        assert!(door.contains("&lt;b&gt;Northwind&lt;/b&gt; &amp; Sons"));
        assert!(door.contains("href=\"/console\"") && door.contains("href=\"/docs\""));
    }

    #[test]
    fn files_that_the_landing_page_links_to_exist() {
        let root = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let paths: Vec<_> = LANDING
            .split("{{source}}/")
            .skip(1)
            .filter_map(|rest| rest.split('"').next()?.split_once("/main/"))
            .map(|(_, path)| path)
            .collect();
        assert!(paths.len() > 8, "{paths:?}");
        for path in paths {
            assert!(root.join(path).exists(), "{path}");
        }
    }
}
