//! Tests that the documents, alert rules and dashboard for operators match the metrics of a running server.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::support::app::TestApp;

const TABLE: &str = include_str!("../../../docs/METRICS.md");
const RUNBOOK: &str = include_str!("../../../docs/RUNBOOK.md");
const RULES: &str = include_str!("../../../deploy/monitoring/alerts.yml");
const RULE_TESTS: &str = include_str!("../../../deploy/monitoring/alerts_test.yml");
const BOARD: &str = include_str!("../../../deploy/monitoring/grafana.json");

/// A metric, as it appears in a scrape or in the table of metrics.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Family {
    kind: String,
    labels: BTreeSet<String>,
    meaning: String,
}

type Families = BTreeMap<String, Family>;

/// Returns the metrics of a server that has responded to a request.
async fn families() -> Families {
    let app = TestApp::start().await;
    assert_eq!(app.get("/v1/echo").send().await.status, 401);
    let url = format!("http://{}/metrics", app.metrics_addr);
    let scrape = app.http.get(url).send().await.expect("the server responds");
    parse(&scrape.text().await.expect("text"))
}

fn parse(scrape: &str) -> Families {
    let mut families = Families::new();
    let mut current = String::new();
    for line in scrape.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (keyword, name) = (words.next(), words.next().unwrap_or_default());
            let text = words.next().unwrap_or_default();
            let family = match keyword {
                Some("HELP" | "TYPE") => families.entry(name.to_owned()).or_default(),
                _ => continue,
            };
            if keyword == Some("TYPE") {
                text.clone_into(&mut family.kind);
            } else {
                text.trim_end_matches('.').clone_into(&mut family.meaning);
            }
            name.clone_into(&mut current);
        } else {
            let family = families
                .get_mut(&current)
                .expect("HELP and TYPE come first");
            assert!(
                line.starts_with(&current),
                "{line} is not a series of {current}"
            );
            let labels = line.split_once('{').and_then(|(_, it)| it.split_once('}'));
            let labels = labels.map_or("", |(labels, _)| labels).split(',');
            let names = labels.filter_map(|it| it.split_once('=').map(|(name, _)| name));
            // The label `le` follows from the type, so the table does not list it.
            let names = names.filter(|it| *it != "le").map(str::to_owned);
            family.labels.extend(names);
        }
    }
    families
}

/// Returns the rows of the table of metrics, and the alerts that each row links to.
fn table() -> (Families, BTreeMap<String, BTreeSet<String>>) {
    let (mut families, mut alerts) = (Families::new(), BTreeMap::new());
    for row in TABLE.lines().filter(|line| line.starts_with("| `quota_")) {
        let cells = row
            .trim_matches('|')
            .split('|')
            .map(str::trim)
            .collect::<Vec<_>>();
        let [name, kind, labels, meaning, worry] = cells[..] else {
            panic!("{} cells: {row}", cells.len());
        };
        let name = name.trim_matches('`').to_owned();
        let labels = labels.split(", ").filter(|it| !it.is_empty());
        let family = Family {
            kind: kind.to_owned(),
            labels: labels.map(|it| it.trim_matches('`').to_owned()).collect(),
            meaning: meaning.to_owned(),
        };
        let links = worry.split("](RUNBOOK.md#").skip(1);
        let links = links.filter_map(|it| Some(it.split_once(')')?.0.to_owned()));
        alerts.insert(name.clone(), links.collect());
        assert!(
            families.insert(name.clone(), family).is_none(),
            "two rows for {name}"
        );
    }
    (families, alerts)
}

/// An alert rule. Each field of a rule is on one line.
#[derive(Debug, Default)]
struct Rule {
    name: String,
    expression: String,
    runbook: String,
}

fn rules() -> Vec<Rule> {
    let mut rules = Vec::<Rule>::new();
    for line in RULES.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("- alert: ") {
            rules.push(Rule {
                name: name.to_owned(),
                ..Rule::default()
            });
        } else if let (Some(rule), Some((field, value))) = (rules.last_mut(), line.split_once(": "))
        {
            match field {
                "expr" => value.clone_into(&mut rule.expression),
                "runbook_url" => value.clone_into(&mut rule.runbook),
                _ => {}
            }
        }
    }
    rules
}

/// Returns the metric that a series in a query belongs to.
fn family_of<'a>(series: &str, families: &'a Families) -> Option<(&'a str, &'a Family)> {
    families
        .iter()
        .find(|(name, family)| {
            series
                .strip_prefix(name.as_str())
                .is_some_and(|suffix| match family.kind.as_str() {
                    "counter" => suffix == "_total",
                    "info" => suffix == "_info",
                    "histogram" => ["_bucket", "_count", "_sum"].contains(&suffix),
                    _ => suffix.is_empty(),
                })
        })
        .map(|(name, family)| (name.as_str(), family))
}

/// Returns the metrics that a query reads, and the query's mistakes: unknown metrics and labels.
fn check(query: &str, families: &Families) -> (BTreeSet<String>, Vec<String>) {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (mut read, mut mistakes) = (BTreeSet::new(), Vec::new());
    // Prometheus adds these labels to every series.
    let mut known = BTreeSet::from(["instance", "job"].map(str::to_owned));
    for (at, _) in query.match_indices("quota_") {
        if query[..at].ends_with(is_word) {
            continue;
        }
        let rest = &query[at..];
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let (series, rest) = rest.split_at(end);
        let Some((name, family)) = family_of(series, families) else {
            mistakes.push(format!("no metric {series}"));
            continue;
        };
        read.insert(name.to_owned());
        let mut labels = family.labels.clone();
        labels.extend(["instance", "job"].map(str::to_owned));
        if series.ends_with("_bucket") {
            labels.insert("le".into());
        }
        let selector = rest.strip_prefix('{').and_then(|it| it.split_once('}'));
        let matchers = selector.map_or("", |(it, _)| it).split(',');
        for matcher in matchers.filter(|it| !it.is_empty()) {
            let label = matcher.split(['=', '!']).next().unwrap_or_default();
            if !labels.contains(label) {
                mistakes.push(format!("{series} has no label {label}"));
            }
        }
        known.extend(labels);
    }
    for label in grouped_by(query) {
        if !known.contains(&label) {
            mistakes.push(format!("no label {label}"));
        }
    }
    (read, mistakes)
}

/// Returns the labels in the `by` clauses of a query.
fn grouped_by(query: &str) -> BTreeSet<String> {
    query
        .split(" by (")
        .skip(1)
        .filter_map(|it| Some(it.split_once(')')?.0))
        .flat_map(|it| it.split(','))
        .map(|it| it.trim().to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_describes_exactly_the_metrics_of_a_server() {
    let families = families().await;
    assert!(families.len() > 100, "{}", families.len());
    let (table, _) = table();
    for (name, family) in &families {
        assert_eq!(
            table.get(name),
            Some(family),
            "{name} in docs/METRICS.md (left) and on a server"
        );
    }
    let unknown = table.keys().filter(|name| !families.contains_key(*name));
    assert_eq!(unknown.collect::<Vec<_>>(), Vec::<&String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_alert_reads_existing_metrics_and_has_a_section_in_the_runbook() {
    let families = families().await;
    let rules = rules();
    assert!(rules.len() >= 40, "{}", rules.len());
    let mut linked = BTreeMap::<String, BTreeSet<String>>::new();
    for rule in &rules {
        let (read, mistakes) = check(&rule.expression, &families);
        assert_eq!(mistakes, Vec::<String>::new(), "{rule:?}");
        // `up` is a metric of Prometheus itself.
        assert!(
            !read.is_empty() || rule.expression.starts_with("up{"),
            "{rule:?}"
        );
        let anchor = rule.name.to_lowercase();
        let address = format!("/blob/main/docs/RUNBOOK.md#{anchor}");
        assert!(rule.runbook.ends_with(&address), "{rule:?}");
        for name in read {
            linked.entry(name).or_default().insert(anchor.clone());
        }
        // The alert is tested both on a healthy server and on a server that has the problem.
        let line = format!("alertname: {}", rule.name);
        let tested = RULE_TESTS
            .match_indices(&line)
            .filter(|(at, found)| RULE_TESTS[at + found.len()..].starts_with([',', '\n']));
        assert_eq!(tested.count(), 2, "{} in alerts_test.yml", rule.name);
    }
    let names = rules.iter().map(|it| it.name.as_str());
    let (_, sections) = RUNBOOK.split_once("\n## Alerts\n").expect("a chapter");
    let sections = sections
        .lines()
        .take_while(|line| !line.starts_with("## "))
        .filter_map(|line| line.strip_prefix("#### "));
    assert_eq!(sections.collect::<Vec<_>>(), names.collect::<Vec<_>>());

    let (_, mut links) = table();
    links.retain(|_, alerts| !alerts.is_empty());
    assert_eq!(links, linked, "links of docs/METRICS.md, and the alerts");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_panel_of_the_dashboard_reads_existing_metrics() {
    let families = families().await;
    let board: Value = serde_json::from_str(BOARD).expect("JSON");
    let panels = board["panels"].as_array().expect("panels");
    let mut ids = BTreeSet::new();
    let mut on_board = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().expect("a title");
        assert!(
            ids.insert(panel["id"].as_u64()),
            "another panel has the same ID: {title}"
        );
        if panel["type"] == "row" {
            continue;
        }
        assert_ne!(panel["description"].as_str().unwrap_or(""), "", "{title}");
        let targets = panel["targets"].as_array().expect("targets");
        assert!(!targets.is_empty(), "{title}");
        for target in targets {
            let query = target["expr"].as_str().expect("a query");
            let (read, mistakes) = check(query, &families);
            assert_eq!(mistakes, Vec::<String>::new(), "{title}: {query}");
            assert!(!read.is_empty() || query.starts_with("sum(up{"), "{title}");
            on_board.extend(read);
            // A legend shows only labels that the query keeps.
            let legend = target["legendFormat"].as_str().unwrap_or_default();
            let shown = legend.split("{{").skip(1);
            let shown = shown.filter_map(|it| Some(it.split_once("}}")?.0.to_owned()));
            let shown = shown.collect::<BTreeSet<_>>();
            assert!(shown.is_subset(&grouped_by(query)), "{title}: {legend}");
        }
    }
    for variable in board["templating"]["list"].as_array().expect("variables") {
        let query = variable["definition"].as_str().unwrap_or_default();
        assert_eq!(check(query, &families).1, Vec::<String>::new(), "{query}");
    }
    // The dashboard shows every metric that an alert reads.
    let alerted = rules()
        .iter()
        .flat_map(|rule| check(&rule.expression, &families).0)
        .collect::<BTreeSet<_>>();
    let hidden = alerted.difference(&on_board).collect::<Vec<_>>();
    assert_eq!(hidden, Vec::<&String>::new());
}

#[tokio::test(flavor = "multi_thread")]
#[should_panic(expected = "there is no value of quota_http_responses_total{status=\"418\"}")]
async fn reading_a_value_that_does_not_exist_fails() {
    let app = TestApp::start().await;
    app.metric("quota_http_responses_total{status=\"418\"}")
        .await;
}

#[test]
fn unknown_metrics_and_labels_are_found() {
    let families = parse(
        "# HELP quota_a Tokens.\n# TYPE quota_a counter\nquota_a_total{kind=\"x\"} 1\n\
         # HELP quota_b_seconds Time.\n# TYPE quota_b_seconds histogram\n\
         quota_b_seconds_bucket{le=\"1\"} 1\nquota_b_seconds_count 1\n\
         # HELP quota_c Size.\n# TYPE quota_c gauge\nquota_c 1\n# EOF\n",
    );
    assert_eq!(families["quota_a"].meaning, "Tokens");
    let mistakes = |query: &str| check(query, &families).1;
    for right in [
        "sum by (kind, instance) (rate(quota_a_total{kind=\"x\",job=~\"$job\"}[5m]))",
        "histogram_quantile(0.9, sum by (le) (rate(quota_b_seconds_bucket[5m])))",
        "max(quota_c) > 0",
    ] {
        assert_eq!(mistakes(right), Vec::<String>::new(), "{right}");
    }
    assert_eq!(
        check("quota_c + sum(quota_a_total)", &families).0,
        BTreeSet::from(["quota_a", "quota_c"].map(str::to_owned))
    );
    for (wrong, found) in [
        ("rate(quota_a[5m])", "no metric quota_a"),
        ("quota_c_total", "no metric quota_c_total"),
        ("quota_b_seconds", "no metric quota_b_seconds"),
        ("quota_a_total{knd=\"x\"}", "quota_a_total has no label knd"),
        ("quota_c{kind!=\"x\"}", "quota_c has no label kind"),
        ("sum by (kind) (quota_c)", "no label kind"),
    ] {
        assert_eq!(mistakes(wrong), [found], "{wrong}");
    }
}

/// Finds Prometheus's `promtool`.
fn promtool() -> Option<PathBuf> {
    #[expect(clippy::disallowed_methods, reason = "tests have no `Config`")]
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join("promtool"))
        .find(|it| it.exists())
}

/// `cargo xtask test` installs `promtool` if it can, and otherwise reports that this test is skipped.
#[test]
fn prometheus_accepts_the_configuration_and_each_alert_fires_only_for_its_problem() {
    let Some(promtool) = promtool() else {
        eprintln!("skipped: promtool is not installed (Debian's package `prometheus`)");
        return;
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/monitoring");
    let run = |folder: &Path, arguments: &[&str]| {
        let mut command = Command::new(&promtool);
        let output = command.current_dir(folder).args(arguments).output();
        let output = output.expect("promtool runs");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        (output.status.success(), text)
    };
    for arguments in [
        &["check", "config", "prometheus.yml"][..],
        &["test", "rules", "alerts_test.yml"],
    ] {
        let (passed, text) = run(&folder, arguments);
        assert!(passed, "{arguments:?}: {text}");
    }
    // The tests of the alert rules detect an alert that always fires, and an alert that never fires.
    let copy = tempfile::tempdir().expect("a directory");
    std::fs::write(copy.path().join("alerts_test.yml"), RULE_TESTS).expect("written");
    for (right, wrong) in [
        (
            "quota_panics_total[1h])) > 0",
            "quota_panics_total[1h])) >= 0",
        ),
        (
            "quota_panics_total[1h])) > 0",
            "quota_panics_total[1h])) > 1e9",
        ),
    ] {
        assert_eq!(RULES.matches(right).count(), 1, "{right}");
        let changed = RULES.replace(right, wrong);
        std::fs::write(copy.path().join("alerts.yml"), changed).expect("written");
        let (passed, text) = run(copy.path(), &["test", "rules", "alerts_test.yml"]);
        assert!(!passed && text.contains("QuotaPanics"), "{wrong}: {text}");
    }
}
