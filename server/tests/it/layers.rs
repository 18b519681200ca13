//! Checks that modules import only modules of a lower rank or in the same folder. In `limiter/`, also checks that no
//! files import each other in a cycle.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// Every module of the server, lowest rank first. `commands`, `lib` and `main` are above all others.
const RANKS: &[&[&str]] = &[
    &[
        "clock",
        "config",
        "connection_marks",
        "deadline",
        "encryption",
        "error_chain",
        "file_limit",
        "health_check",
        "heap",
        "json_text",
        "schema",
        "seal",
        "secret_text",
        "spans",
        "subscription",
        "tenant_places",
        "tenant_queue",
    ],
    &[
        "db",
        "mail",
        "plain_request",
        "redis",
        "stripe",
        "telemetry",
    ],
    &[
        "cache",
        "client_guard",
        "limiter",
        "readiness",
        "repo",
        "tenant_rate",
    ],
    &["invalidations"],
    &["auth", "keys"],
    &["billing", "metering", "webhooks"],
    &["alerts"],
    &["state"],
    &["api", "demo", "jobs"],
    &["doctor", "openapi", "serve", "usage_report"],
    &["router"],
    &["commands", "lib", "main"],
];

/// Folders whose modules have ranks among themselves, lowest first.
const INNER_RANKS: &[(&str, &[&[&str]])] = &[(
    "limiter",
    &[
        &["error", "membership", "policy"],
        &["decision", "quota", "rate"],
        &["limits"],
        &["denial_cache"],
        &["key"],
        &["store"],
        &["distributed", "local"],
        &["tenant"],
        &["mod"],
    ],
)];

/// Crates and modules that a folder must not use, regardless of its rank.
const FORBIDDEN: &[(&str, &[&str])] = &[
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
    (
        "billing",
        &[
            "poem",
            "poem_openapi",
            "http",
            "hyper",
            "diesel",
            "diesel_async",
        ],
    ),
    (
        "webhooks",
        &["poem", "poem_openapi", "diesel", "diesel_async"],
    ),
    (
        "alerts",
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

fn rank_in(ranks: &[&[&str]], module: &str) -> Option<usize> {
    ranks.iter().position(|modules| modules.contains(&module))
}

fn rank(module: &str) -> Option<usize> {
    rank_in(RANKS, module)
}

/// Returns the first part of a path: `api` for `api/plan.rs`.
fn module_of(path: &str) -> &str {
    path.split('/')
        .next()
        .unwrap_or_default()
        .trim_end_matches(".rs")
}

/// Returns the code without line comments, because comments also mention modules. A `//` in a string cuts its line
/// short, which does not hide imports.
fn code(source: &str) -> String {
    let lines = source
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// Returns the code before an inline test module.
fn without_tests(code: &str) -> &str {
    code.split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or_default()
}

fn is_name(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

fn name_at(text: &str) -> &str {
    let end = text.find(|c: char| !is_name(c));
    &text[..end.unwrap_or(text.len())]
}

/// Adds the paths of a tree such as `a::{b, c::d}` under `prefix`. Returns the text after the tree.
fn expand<'a>(
    mut text: &'a str,
    mut prefix: Vec<&'a str>,
    paths: &mut Vec<Vec<&'a str>>,
) -> &'a str {
    loop {
        text = text.trim_start();
        if let Some(group) = text.strip_prefix('{') {
            text = group;
            loop {
                text = text.trim_start();
                if let Some(rest) = text.strip_prefix('}') {
                    return rest;
                }
                let rest = expand(text, prefix.clone(), paths);
                let end = rest.find([',', '}']).unwrap_or(rest.len());
                if end == rest.len() {
                    return "";
                }
                text = &rest[end..];
                text = text.strip_prefix(',').unwrap_or(text);
            }
        }
        let name = name_at(text);
        text = &text[name.len()..];
        if name.is_empty() {
            paths.push(prefix);
            return text;
        }
        prefix.push(name);
        match text.strip_prefix("::") {
            Some(rest) => text = rest,
            None => {
                paths.push(prefix);
                return text;
            }
        }
    }
}

/// Returns every path in the code that begins with `root`, including those of each import in a group.
fn paths<'a>(code: &'a str, root: &str) -> Vec<Vec<&'a str>> {
    let mut paths = Vec::new();
    for (at, _) in code.match_indices(&format!("{root}::")) {
        let before = &code[..at];
        // `pub(in crate::limiter)` is not an import.
        let is_path = !before.ends_with(is_name) && !before.ends_with("::");
        if is_path && !before.ends_with("(in ") {
            expand(&code[at..], Vec::new(), &mut paths);
        }
    }
    paths
}

/// Returns the modules that the code imports: the first name after each `crate::`.
fn imports(code: &str) -> Vec<&str> {
    let paths = paths(code, "crate");
    paths
        .iter()
        .filter_map(|path| path.get(1).copied())
        .collect()
}

/// Returns whether the code uses a crate: in a path, or by `use` of the crate itself.
fn uses(code: &str, krate: &str) -> bool {
    code.match_indices(krate).any(|(at, _)| {
        let before = code[..at].trim_end_matches(' ');
        let rest = &code[at + krate.len()..];
        !code[..at].ends_with(is_name)
            && !before.ends_with('"')
            && (rest.starts_with("::") || (before.ends_with("use") && name_at(rest).is_empty()))
    })
}

fn violations(path: &str, source: &str) -> Vec<String> {
    let (code, own) = (code(source), module_of(path));
    let Some(own_rank) = rank(own) else {
        return vec![format!("{path}: {own} has no rank; add it to RANKS")];
    };
    let mut found = BTreeSet::new();
    for module in imports(&code) {
        match rank(module) {
            _ if module == own => {}
            Some(rank) if rank < own_rank => {}
            Some(rank) => {
                found.insert(format!(
                    "{path}: {own} (rank {own_rank}) imports {module} (rank {rank})"
                ));
            }
            None => {
                found.insert(format!("{path}: imports {module}, which has no rank"));
            }
        }
    }
    let forbidden = FORBIDDEN.iter().filter(|(folder, _)| *folder == own);
    for krate in forbidden.flat_map(|(_, crates)| *crates) {
        if uses(&code, krate) || imports(&code).contains(krate) {
            found.insert(format!("{path}: {own} must not use {krate}"));
        }
    }
    found.into_iter().collect()
}

/// Returns the module path of a file: `[limiter, key]` for `limiter/key/mod.rs`.
fn segments(path: &str) -> Vec<&str> {
    let mut segments = path.trim_end_matches(".rs").split('/').collect::<Vec<_>>();
    if segments.last() == Some(&"mod") {
        segments.pop();
    }
    segments
}

/// Returns the files that each file imports from, by absolute and relative paths. A name that a module re-exports
/// counts as imported from that module.
fn graph(files: &[(String, String)]) -> BTreeMap<&str, BTreeSet<&str>> {
    let modules = files
        .iter()
        .map(|(path, _)| (segments(path), path.as_str()))
        .collect::<BTreeMap<_, _>>();
    let mut graph = BTreeMap::new();
    for (path, source) in files {
        if path.ends_with("tests.rs") {
            continue;
        }
        let own = segments(path);
        let code = code(source);
        let code = without_tests(&code);
        let mut targets = BTreeSet::new();
        for root in ["crate", "super", "self"] {
            for import in paths(code, root) {
                let mut target = match root {
                    "crate" => Vec::new(),
                    _ => own.clone(),
                };
                for name in import {
                    match name {
                        "crate" | "self" => {}
                        "super" => {
                            target.pop();
                        }
                        name => target.push(name),
                    }
                }
                while !target.is_empty() && !modules.contains_key(&target) {
                    target.pop();
                }
                if let Some(target) = modules.get(&target)
                    && *target != path
                {
                    targets.insert(*target);
                }
            }
        }
        graph.insert(path.as_str(), targets);
    }
    graph
}

/// Returns the files of a folder that are in an import cycle, or that import from files in a cycle.
fn cyclic_files(graph: &BTreeMap<&str, BTreeSet<&str>>, folder: &str) -> Vec<String> {
    let mut rest = graph.clone();
    rest.retain(|path, _| path.starts_with(folder));
    loop {
        let known = rest.keys().copied().collect::<BTreeSet<_>>();
        let before = rest.len();
        rest.retain(|_, targets| targets.iter().any(|target| known.contains(target)));
        if rest.len() == before {
            break;
        }
    }
    rest.iter()
        .map(|(path, targets)| {
            let targets = targets.iter().filter(|target| rest.contains_key(*target));
            format!("{path}: {targets:?}", targets = targets.collect::<Vec<_>>())
        })
        .collect()
}

/// Returns the imports within folders that violate [`INNER_RANKS`].
fn inner_violations(graph: &BTreeMap<&str, BTreeSet<&str>>) -> Vec<String> {
    let mut found = Vec::new();
    for (folder, ranks) in INNER_RANKS {
        let inner = |path: &str| {
            let path = path.strip_prefix(folder)?.strip_prefix('/')?;
            Some(module_of(path).to_owned())
        };
        for (path, targets) in graph {
            let Some(own) = inner(path) else {
                continue;
            };
            let Some(own_rank) = rank_in(ranks, &own) else {
                found.push(format!(
                    "{path}: {own} has no rank in {folder}; add it to INNER_RANKS"
                ));
                continue;
            };
            for target in targets {
                if let Some(module) = inner(target)
                    && module != own
                    && rank_in(ranks, &module).is_none_or(|rank| rank >= own_rank)
                {
                    found.push(format!("{path}: {own} (rank {own_rank}) imports {module}"));
                }
            }
        }
    }
    found
}

fn walk(dir: &Path, root: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(dir).expect("the directory exists") {
        let path = entry.expect("the entry is readable").path();
        if path.is_dir() {
            walk(&path, root, found);
        } else if path.extension().is_some_and(|it| it == "rs") {
            let name = path
                .strip_prefix(root)
                .expect("the file is below the root")
                .display()
                .to_string();
            found.push((
                name,
                fs::read_to_string(&path).expect("the file is readable"),
            ));
        }
    }
}

fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &root, &mut files);
    files
}

#[test]
fn modules_import_only_from_lower_ranks_or_their_own_folder() {
    let files = sources();
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
        .flat_map(|(path, source)| violations(path, source))
        .collect::<Vec<_>>();
    assert!(found.is_empty(), "{found:#?}");

    // A module that does not exist must not have a rank, which would apply to a new module with the same name.
    for module in RANKS.iter().copied().flatten() {
        assert!(
            files.iter().any(|(path, _)| module_of(path) == *module),
            "{module} does not exist"
        );
    }
}

#[test]
fn limiter_modules_import_only_from_lower_ranks_and_never_in_a_cycle() {
    let files = sources();
    let graph = graph(&files);
    let found = inner_violations(&graph);
    assert!(found.is_empty(), "{found:#?}");
    let found = cyclic_files(&graph, "limiter/");
    assert!(found.is_empty(), "{found:#?}");
    for (folder, ranks) in INNER_RANKS {
        for module in ranks.iter().copied().flatten() {
            let prefix = format!("{folder}/{module}");
            assert!(
                files.iter().any(|(path, _)| path.starts_with(&prefix)),
                "{prefix} does not exist"
            );
        }
    }
}

#[test]
fn planted_cycles_and_inner_violations_are_found() {
    let files = |sources: &[(&str, &str)]| {
        let own = |text: &&str| (*text).to_owned();
        sources
            .iter()
            .map(|(path, source)| (own(path), own(source)))
            .collect::<Vec<_>>()
    };
    let clean = [
        (
            "limiter/mod.rs",
            "pub use self::key::{state::KeyState, table::KeyTable};",
        ),
        ("limiter/key/mod.rs", "pub mod state; pub mod table;"),
        (
            "limiter/key/state.rs",
            "use crate::limiter::{policy::Policy, rate::gcra};",
        ),
        (
            "limiter/key/table.rs",
            "use super::{state::{self, KeyState}};",
        ),
        (
            "limiter/policy.rs",
            "#[cfg(test)]\nmod tests {\n use crate::limiter::key; }",
        ),
        ("limiter/rate/gcra.rs", "use crate::limiter::policy::*;"),
    ];
    let clean_files = files(&clean);
    let clean_graph = graph(&clean_files);
    assert_eq!(clean_graph["limiter/key/table.rs"].len(), 1);
    assert_eq!(inner_violations(&clean_graph), Vec::<String>::new());
    assert_eq!(cyclic_files(&clean_graph, "limiter/"), Vec::<String>::new());

    for (path, planted, cyclic, inner) in [
        ("limiter/key/state.rs", "use super::table::KeyTable;", 2, 0),
        (
            "limiter/key/state.rs",
            "fn f() { super::super::KeyTable::new() }",
            3,
            1,
        ),
        ("limiter/policy.rs", "use super::{key::state};", 2, 1),
        (
            "limiter/policy.rs",
            "use crate::{limiter::{rate::{gcra::Gcra}}};",
            2,
            1,
        ),
        ("limiter/other.rs", "", 0, 1),
    ] {
        let mut all = clean.to_vec();
        all.retain(|(known, _)| *known != path);
        all.push((path, planted));
        let files = files(&all);
        let graph = graph(&files);
        assert!(
            cyclic_files(&graph, "limiter/").len() >= cyclic,
            "{planted}"
        );
        assert_eq!(
            cyclic_files(&graph, "limiter/").is_empty(),
            cyclic == 0,
            "{planted}"
        );
        assert_eq!(inner_violations(&graph).len(), inner, "{planted}");
    }
}

#[test]
fn planted_violations_are_found() {
    let one = |path: &str, source: &str| {
        let found = violations(path, source);
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
        assert_eq!(violations(path, source), Vec::<String>::new(), "{source}");
    }
}
