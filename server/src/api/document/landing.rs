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

/// Returns the part of `docs/PERFORMANCE.md` before the comparison with other rate limiters as HTML, without the page's
/// title.
///
/// Converts only the Markdown that this part uses. A library would be a dependency of the server for a single page.
fn performance() -> String {
    let text = PERFORMANCE
        .strip_prefix("# Performance\n\n")
        .unwrap_or_default();
    let (text, _) = text.split_once("\n\n## Comparison ").unwrap_or_default();
    let html = |block: &str| match block.strip_prefix("## ") {
        Some(title) => format!("<h3>{}</h3>\n", with_links(&marked(title))),
        None if block.starts_with('|') => table(block),
        None => format!("<p>{}</p>\n", with_links(&marked(block))),
    };
    text.split("\n\n").map(html).collect()
}

/// Returns a Markdown table as HTML. A table with right-aligned columns gets the class `figures`, other tables `facts`.
fn table(block: &str) -> String {
    let (head, rest) = block.split_once('\n').unwrap_or_default();
    let (alignment, body) = rest.split_once('\n').unwrap_or_default();
    let class = if alignment.contains("-:") {
        "figures"
    } else {
        "facts"
    };
    let cells = |line: &str, first: &str, other: &str| {
        let cells = line.trim_matches('|').split('|').enumerate();
        let cells = cells.map(|(column, cell)| {
            let open = if column == 0 { first } else { other };
            let close = &open[..2];
            format!("<{open}>{}</{close}>", with_links(&marked(cell.trim())))
        });
        cells.collect::<String>()
    };
    let head = cells(head, r#"th scope="col""#, r#"th scope="col""#);
    let row = |line| format!("<tr>{}</tr>\n", cells(line, r#"th scope="row""#, "td"));
    let body = body.lines().map(row).collect::<String>();
    format!(
        "<table class=\"{class}\">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"
    )
}

/// Converts Markdown links in `docs/PERFORMANCE.md` to HTML links to files in the repository.
fn with_links(html: &str) -> String {
    let (mut result, mut rest) = (String::new(), html);
    while let Some((before, after)) = rest.split_once('[')
        && let Some((label, after)) = after.split_once("](")
        && let Some((target, after)) = after.split_once(')')
    {
        let path = match (target.strip_prefix("../"), target.strip_prefix('#')) {
            (Some(path), _) => path,
            (_, Some(_)) => &format!("docs/PERFORMANCE.md{target}"),
            _ => &format!("docs/{target}"),
        };
        let url = format!("{}/blob/main/{path}", env!("CARGO_PKG_REPOSITORY"));
        result += &[before, "<a href=\"", &url, "\">", label, "</a>"].concat();
        rest = after;
    }
    result + rest
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
    fn links_lead_to_the_repository() {
        let url = |path: &str| format!("{}/blob/main/{path}", env!("CARGO_PKG_REPOSITORY"));
        for (target, path) in [
            ("../SECURITY.md#a", "SECURITY.md#a"),
            ("#b", "docs/PERFORMANCE.md#b"),
            ("bench/PEERS.md", "docs/bench/PEERS.md"),
        ] {
            assert_eq!(
                with_links(&format!("1 [two]({target}), [3]")),
                format!("1 <a href=\"{}\">two</a>, [3]", url(path))
            );
        }
    }

    #[test]
    fn performance_section_has_two_tables_with_headings() {
        let html = performance();
        let count = |part: &str| html.matches(part).count();
        assert_eq!(count("<h3>"), 2, "{html}");
        assert_eq!(count("<table class=\"figures\">"), 1, "{html}");
        assert_eq!(count("<table class=\"facts\">"), 1, "{html}");
        assert_eq!(count("<th scope=\"col\">"), 6, "{html}");
        assert_eq!(count("<td>"), 2 * count("<th scope=\"row\">"), "{html}");
        assert!(count("<td>") > 20, "{html}");
        for markdown in ["|", "](", "##", "---", "\n- "] {
            assert!(!html.contains(markdown), "{markdown}: {html}");
        }
    }

    #[test]
    fn front_page_fills_every_placeholder_and_escapes_values() {
        let full = front_page(&Landing::Full, "https://quota.example.com");
        assert!(!full.contains("{{"), "{full}");
        assert!(!full.contains("style="), "the CSP forbids inline styles");
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
            "<h2>Numbers</h2>\n<p>",
            "<h3>CPU time of a request</h3>\n<p><code>cargo xtask bench</code> ",
            "<tr><th scope=\"row\"><code>/v1/echo</code></th><td>",
        ] {
            assert!(full.contains(text), "{text}");
        }
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
        let page = front_page(&Landing::Full, "https://quota.example.com");
        let paths: Vec<_> = page
            .split(concat!("href=\"", env!("CARGO_PKG_REPOSITORY"), "/"))
            .skip(1)
            .filter_map(|rest| rest.split(['"', '#']).next()?.split_once("/main/"))
            .map(|(_, path)| path)
            .collect();
        assert!(paths.len() > 10, "{paths:?}");
        assert!(paths.contains(&"SECURITY.md"), "{paths:?}");
        assert!(paths.contains(&"docs/PERFORMANCE.md"), "{paths:?}");
        for path in paths {
            assert!(root.join(path).exists(), "{path}");
        }
    }
}
