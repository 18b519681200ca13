//! Which module may import which: only from a lower rank, or from its own folder.

use std::{fs, path::Path};

/// Every module of the server, lowest rank first. `main` and `lib` are above all.
const RANKS: &[&[&str]] = &[
    &[
        "authenticated",
        "clock",
        "config",
        "deadline",
        "error_chain",
        "file_limit",
        "health_check",
        "schema",
        "seal",
        "secret_text",
        "tenant_queue",
    ],
    &["db", "redis", "telemetry"],
    &["cache", "limiter", "readiness", "repo"],
    &["invalidations"],
    &["auth", "keys"],
    &["metering"],
    &["state"],
    &["api", "demo", "jobs"],
    &["doctor", "openapi", "serve", "usage_report"],
    &["router"],
    &["commands", "lib", "main"],
];

/// Crates and modules that the modules of a folder must not name, regardless of rank.
const FOREIGN: &[(&str, &[&str])] = &[
    (
        "limiter",
        &[
            "poem",
            "poem_openapi",
            "http",
            "hyper",
            "db",
            "schema",
            "diesel",
            "diesel_async",
            "tokio_postgres",
        ],
    ),
    ("repo", &["poem", "poem_openapi", "http", "hyper"]),
    ("auth", &["poem", "poem_openapi", "http", "hyper"]),
    ("keys", &["poem", "poem_openapi", "http", "hyper"]),
    (
        "metering",
        &[
            "poem",
            "poem_openapi",
            "http",
            "hyper",
            "diesel",
            "diesel_async",
        ],
    ),
    ("jobs", &["poem", "poem_openapi", "http", "hyper"]),
    ("api", &["diesel", "diesel_async", "tokio_postgres"]),
];

fn rank(module: &str) -> Option<usize> {
    RANKS.iter().position(|modules| modules.contains(&module))
}

/// `api/plan.rs` belongs to the module `api`.
fn module_of(path: &str) -> &str {
    path.split('/')
        .next()
        .unwrap_or_default()
        .trim_end_matches(".rs")
}

/// Removes line comments, which name modules too. A `//` in a string cuts off nothing that matters here.
fn code(source: &str) -> String {
    let lines = source
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

fn name_at(text: &str) -> &str {
    let end = text.find(|c: char| c != '_' && !c.is_ascii_alphanumeric());
    &text[..end.unwrap_or(text.len())]
}

/// Returns the first segment of every path after `crate::`, including those in groups.
fn imports(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(|c: char| c == '_' || c.is_ascii_alphanumeric()) {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.push(name_at(rest));
            continue;
        };
        let (mut depth, mut expected) = (1, true);
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => expected = true,
                c if expected && !c.is_whitespace() => {
                    found.push(name_at(&group[at..]));
                    expected = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

/// Returns whether the code names a crate, in a path or in a `use`.
fn names(code: &str, krate: &str) -> bool {
    code.match_indices(krate).any(|(at, _)| {
        let before = code[..at].trim_end_matches(' ');
        let rest = &code[at + krate.len()..];
        !code[..at].ends_with(|c: char| c == '_' || c.is_ascii_alphanumeric())
            && !before.ends_with('"')
            && (rest.starts_with("::") || (before.ends_with("use") && name_at(rest).is_empty()))
    })
}

fn faults(path: &str, source: &str) -> Vec<String> {
    let (code, own) = (code(source), module_of(path));
    let Some(own_rank) = rank(own) else {
        return vec![format!("{path}: {own} has no rank: give it one here")];
    };
    let mut faults = Vec::new();
    for module in imports(&code) {
        match rank(module) {
            _ if module == own => {}
            Some(rank) if rank < own_rank => {}
            Some(rank) => faults.push(format!(
                "{path}: {own} (rank {own_rank}) imports {module} (rank {rank})"
            )),
            None => faults.push(format!("{path}: imports {module}, which has no rank")),
        }
    }
    let foreign = FOREIGN.iter().filter(|(folder, _)| *folder == own);
    for krate in foreign.flat_map(|(_, crates)| *crates) {
        if names(&code, krate) || imports(&code).contains(krate) {
            faults.push(format!("{path}: {own} must not know {krate}"));
        }
    }
    faults
}

fn walk(dir: &Path, root: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(dir).expect("the sources are there") {
        let path = entry.expect("it is readable").path();
        if path.is_dir() {
            walk(&path, root, found);
        } else if path.extension().is_some_and(|it| it == "rs") {
            let name = path
                .strip_prefix(root)
                .expect("it is in there")
                .display()
                .to_string();
            found.push((name, fs::read_to_string(&path).expect("it is readable")));
        }
    }
}

#[test]
fn module_imports_only_from_lower_ranks_or_its_own_folder() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &root, &mut files);
    let imported: usize = files
        .iter()
        .map(|(_, source)| imports(&code(source)).len())
        .sum();
    assert!(
        files.len() > 40 && imported > 100,
        "{} files, {imported} imports",
        files.len()
    );
    let found = files
        .iter()
        .flat_map(|(path, source)| faults(path, source))
        .collect::<Vec<_>>();
    assert!(found.is_empty(), "{found:#?}");

    // A leftover rank would be wrong if the name were used again for something else.
    for module in RANKS.iter().copied().flatten() {
        assert!(
            files.iter().any(|(path, _)| module_of(path) == *module),
            "{module} is gone"
        );
    }
}

#[test]
fn planted_violation_is_found() {
    let one = |path: &str, source: &str| {
        let found = faults(path, source);
        assert_eq!(found.len(), 1, "{path}: {source}: {found:?}");
    };
    one("repo/plan.rs", "use crate::api::problem::ApiError;");
    one(
        "repo/plan.rs",
        "use crate::{\n    db::{self, TenantTx},\n    state::AppState,\n};",
    );
    one("db/mod.rs", "fn f() { crate::repo::plan::find(); }");
    one("state.rs", "use crate::{state::Services, router};");
    one("limiter/store.rs", "use http::StatusCode;");
    one("limiter/store.rs", "use crate::{clock::Clock, db};");
    one("api/plan.rs", "use diesel::prelude::*;");
    one("auth/token.rs", "fn f(r: &poem::Request) {}");
    one("auth/token.rs", "use poem;");
    one("helpers.rs", "");

    for (path, source) in [
        (
            "api/plan.rs",
            "use crate::{repo::plan::{self, PlanRow}, api::page, state::AppState};",
        ),
        (
            "repo/plan.rs",
            "//! Not crate::api.\nuse crate::db::TenantTx; // crate::state",
        ),
        (
            "repo/plan.rs",
            "const A: &str = \"http://a\"; use quota_crate::api;",
        ),
    ] {
        assert_eq!(faults(path, source), Vec::<String>::new(), "{source}");
    }
}
