//! Tests that `.env.example` lists all settings, and that an invalid setting prevents startup.

use std::{
    collections::BTreeSet,
    fs,
    net::TcpListener,
    path::Path,
    process::{Command, Output},
};

use quota_server::config;

/// Runs the binary with only the given environment variables.
fn quota(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quota"));
    command
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied());
    command.output().expect("the binary starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Returns each variable of the example with its comment and value.
fn variables(example: &str) -> Vec<(String, String, String)> {
    let (mut all, mut comment) = (Vec::new(), Vec::new());
    for line in example.lines() {
        if let Some(text) = line.strip_prefix("# ") {
            comment.push(text);
        } else if let Some((name, value)) = line.trim_start_matches('#').split_once('=') {
            all.push((name.to_owned(), comment.join(" "), value.to_owned()));
            comment.clear();
        } else {
            comment.clear();
        }
    }
    all
}

/// Returns the lines that name a variable, from the error output of a server that did not start.
fn faults(output: &Output) -> Vec<String> {
    let stderr = text(&output.stderr);
    let lines = stderr.lines().filter(|line| !line.starts_with("quota: "));
    lines.map(str::to_owned).collect()
}

#[test]
fn committed_example_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.env.example");
    let committed = fs::read_to_string(path).expect(".env.example is committed");
    assert_eq!(
        committed,
        config::env_example(),
        "write it with `quota env-example`"
    );
    assert_eq!(text(&quota(&["env-example"], &[]).stdout), committed);
}

#[test]
fn every_variable_is_described_and_known_to_the_binary() {
    let variables = variables(&config::env_example());
    assert!(variables.len() >= 24, "{}", variables.len());
    let help = text(&quota(&["serve", "--help"], &[]).stdout);
    let mut names = BTreeSet::new();
    for (name, comment, _) in &variables {
        assert!(comment.len() > 20, "{name}: {comment:?}");
        assert!(
            help.contains(&format!("[env: {name}")),
            "{name} is not in the help"
        );
        assert!(names.insert(name), "{name} is listed twice");
    }
    // Every variable that the server reads is in the example: only settings, which the help lists, are read from the
    // environment.
    let listed = help.matches("[env: ").count();
    assert_eq!(listed, variables.len());
}

/// Users copy the example into their environment.
#[test]
fn example_is_a_valid_environment() {
    let example = variables(&config::env_example());
    let given = example
        .iter()
        .map(|(name, _, value)| (name.as_str(), value.as_str()));
    let mut given = given.collect::<Vec<_>>();
    // An occupied address prevents startup after the settings have been accepted.
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("the socket is bound").to_string();
    for (name, value) in &mut given {
        if *name == "QUOTA_LISTEN" {
            *value = &addr;
        }
    }
    let output = quota(&["serve"], &given);
    let stderr = text(&output.stderr);
    assert!(!output.status.success());
    assert!(
        stderr.contains("QUOTA_LISTEN: cannot listen on"),
        "{stderr}"
    );
    assert!(!stderr.contains("invalid settings"), "{stderr}");
}

/// Returns an invalid value for a variable.
fn wrong(name: &str) -> &'static str {
    match name {
        "QUOTA_LISTEN" | "QUOTA_METRICS_LISTEN" | "QUOTA_GRPC_LISTEN" => "8080",
        "QUOTA_PUBLIC_URL" | "STRIPE_API_BASE" | "OTEL_EXPORTER_OTLP_ENDPOINT" => {
            "ftp://example.com"
        }
        "QUOTA_DATA_DIR" => " ",
        "DATABASE_URL" => "mysql://root:hunter2@host/db",
        "QUOTA_DATABASE_POOL" => "5",
        "QUOTA_DURABILITY" => "disk",
        "QUOTA_USAGE_BACKLOG_MAX" => "4 GiB",
        "QUOTA_USAGE_SHIP_EVERY" => "5ms",
        "QUOTA_CONNECTIONS" => "15",
        "QUOTA_DATABASE_WAIT" => "9ms",
        "QUOTA_DATABASE_CONNECT_TIMEOUT" => "31s",
        "QUOTA_DATABASE_STATEMENT_TIMEOUT" => "2h",
        "QUOTA_DATABASE_LOCK_TIMEOUT" => "-1s",
        "REDIS_URL" | "SMTP_URL" => "http://:hunter2@host",
        "QUOTA_MAIL_FROM" => "Quota",
        "QUOTA_REDIS_PREFIX" => "{quota}",
        "QUOTA_REDIS_CONNECTIONS"
        | "QUOTA_REPLICAS"
        | "QUOTA_SESSION_DAYS"
        | "QUOTA_USAGE_RETENTION"
        | "QUOTA_USAGE_ROLLUP_RETENTION"
        | "QUOTA_KEY_LOOKUPS"
        | "QUOTA_MAX_PLANS"
        | "QUOTA_MAX_API_KEYS"
        | "QUOTA_MAX_SERVICE_TOKENS"
        | "QUOTA_MAX_WEBHOOKS"
        | "QUOTA_FREE_PLANS"
        | "QUOTA_FREE_KEYS"
        | "QUOTA_FREE_REQUESTS_PER_MONTH"
        | "QUOTA_FREE_RPM" => "0",
        "QUOTA_REDIS_TIMEOUT" => "0ms",
        "QUOTA_REDIS_CONNECT_TIMEOUT" => "250",
        "QUOTA_LEASE_TTL" => "1001ms",
        "QUOTA_ON_REDIS_FAILURE" => "fail",
        "QUOTA_METERING" | "QUOTA_MIGRATE" | "QUOTA_DIRECT_RESPONSES" => "yes",
        "QUOTA_SECRET"
        | "QUOTA_SECRET_PREVIOUS"
        | "STRIPE_SECRET_KEY"
        | "STRIPE_WEBHOOK_SECRET"
        | "OTEL_EXPORTER_OTLP_HEADERS" => "hunter2",
        "DATABASE_URL_FILE"
        | "REDIS_URL_FILE"
        | "QUOTA_SECRET_FILE"
        | "QUOTA_SECRET_PREVIOUS_FILE"
        | "SMTP_URL_FILE"
        | "OTEL_EXPORTER_OTLP_HEADERS_FILE"
        | "STRIPE_SECRET_KEY_FILE"
        | "STRIPE_WEBHOOK_SECRET_FILE" => "/nonexistent/secret",
        "QUOTA_REGISTRATION" => "maybe",
        "QUOTA_LANDING" => "none",
        "QUOTA_OPERATOR_NAME" | "OTEL_SERVICE_NAME" => "Acme\tInc",
        "OTEL_TRACES_SAMPLER_ARG" => "1.1",
        "ALLOWED_ORIGINS" => "example.com",
        "QUOTA_TRUSTED_PROXIES" | "QUOTA_WEBHOOK_PRIVATE_NETWORKS" => "10.0.0.0/33",
        "QUOTA_AUTH_RPM"
        | "QUOTA_ADMIN_RPM"
        | "QUOTA_LOGIN_FREE_FAILURES"
        | "QUOTA_REGISTRATIONS_PER_DAY"
        | "QUOTA_ALERT_EMAILS_PER_HOUR"
        | "QUOTA_CONNECTIONS_PER_ADDRESS"
        | "QUOTA_CONNECTIONS_PER_NETWORK" => "-1",
        "QUOTA_BODY_LIMIT" => "64k",
        "QUOTA_DRAIN_TIMEOUT" => "26s",
        "QUOTA_DRAIN_DELAY" => "21s",
        "QUOTA_HEADER_TIMEOUT"
        | "QUOTA_REQUEST_TIMEOUT"
        | "QUOTA_IDLE_TIMEOUT"
        | "QUOTA_WRITE_TIMEOUT" => "0s",
        "QUOTA_STALE_GRACE" => "1h",
        "QUOTA_KEY_CACHE" => "999",
        "QUOTA_LOG_FORMAT" => "xml",
        "QUOTA_BILLING_GRACE" => "91",
        "RUST_LOG" => "info,,=,=",
        name => panic!("add an invalid value for {name}"),
    }
}

#[test]
fn invalid_value_prevents_startup_with_one_line_that_names_the_variable() {
    let dir = tempfile::tempdir().expect("a directory");
    let data = dir.path().join("data");
    let data = data.to_str().expect("a UTF-8 path");
    let all = variables(&config::env_example());
    for (name, _, _) in &all {
        let wrong = wrong(name);
        let mut given = vec![("QUOTA_DATA_DIR", data), (name.as_str(), wrong)];
        if name == "QUOTA_SECRET_PREVIOUS" {
            given.push(("QUOTA_SECRET", "0123456789abcdef0123456789abcdef"));
        }
        let output = quota(&["serve"], &given);
        let found = faults(&output);
        assert_eq!(output.status.code(), Some(1), "{name}={wrong}");
        assert_eq!(found.len(), 1, "{name}={wrong}: {found:?}");
        assert!(found[0].starts_with(&format!("{name}: ")), "{found:?}");
        assert!(
            !found[0].contains("hunter2"),
            "a password is repeated: {found:?}"
        );
        assert_eq!(text(&output.stdout), "", "{name}");
    }
    assert!(!Path::new(data).exists(), "the data directory was created");
}

#[test]
fn all_invalid_values_are_reported_together_by_every_command() {
    let all = variables(&config::env_example());
    let given = all.iter().map(|(name, _, _)| (name.as_str(), wrong(name)));
    let given = given.collect::<Vec<_>>();
    for command in [&["serve"][..], &["migrate"], &["doctor"], &["user", "list"]] {
        let output = quota(command, &given);
        assert_eq!(output.status.code(), Some(1), "{command:?}");
        let found = faults(&output);
        for (name, _) in &given {
            let lines = found
                .iter()
                .filter(|line| line.starts_with(&format!("{name}: ")))
                .count();
            assert!(lines >= 1, "{command:?}: {name} is not named: {found:#?}");
        }
    }
}

#[test]
fn commands_without_settings_ignore_invalid_ones() {
    for command in ["openapi", "env-example"] {
        let output = quota(&[command], &[("QUOTA_LISTEN", "nonsense")]);
        assert!(output.status.success(), "{command}");
    }
}

/// Starts the server with the given variables, which it must reject. Returns the lines of the error that name a
/// variable.
fn refused(given: &[(&str, &str)]) -> Vec<String> {
    let output = quota(&["serve"], given);
    assert_eq!(output.status.code(), Some(1), "{given:?}");
    assert_eq!(text(&output.stdout), "", "{given:?}");
    faults(&output)
}

#[test]
fn misspelled_setting_prevents_startup_and_a_kubernetes_link_does_not() {
    let lines = refused(&[
        ("QUOTA_DATABASE_URL", "postgres://root:hunter2@host/db"),
        ("QUOTA_LISTEN_FILE", "/run/secrets/listen"),
        ("QUOTA_LOG_FORMAT", "xml"),
    ]);
    assert_eq!(lines.len(), 3, "{lines:#?}");
    let starting = |start: &str| lines.iter().any(|line| line.starts_with(start));
    assert!(
        starting("QUOTA_DATABASE_URL: unknown setting; did you mean DATABASE_URL?"),
        "{lines:#?}"
    );
    assert!(starting("QUOTA_LISTEN_FILE: "), "{lines:#?}");
    assert!(starting("QUOTA_LOG_FORMAT: "), "{lines:#?}");
    assert!(!lines.join("").contains("hunter2"), "{lines:#?}");

    // Variables that Kubernetes sets for a service named `quota` are ignored: only the invalid setting is reported.
    let lines = refused(&[
        ("QUOTA_SERVICE_HOST", "10.0.0.1"),
        ("QUOTA_PORT", "tcp://10.0.0.1:8080"),
        ("QUOTA_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
        ("QUOTA_LOG_FORMAT", "xml"),
    ]);
    assert_eq!(lines.len(), 1, "{lines:#?}");
}

/// Docker and Kubernetes mount secrets as files.
#[test]
fn secret_is_read_from_its_file_and_an_invalid_file_prevents_startup() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).expect("the file is written");
        path.to_str().expect("a UTF-8 path").to_owned()
    };
    // The host does not exist, so the command fails only when it connects to the database named in the file.
    let database = file(
        "database",
        b"postgres://quota:hunter2@database.invalid/quota\n",
    );
    let secret = file("secret", b"0123456789abcdef0123456789abcdef\n");
    let output = quota(
        &["doctor"],
        &[
            ("DATABASE_URL_FILE", &database),
            ("QUOTA_SECRET_FILE", &secret),
            ("QUOTA_LISTEN", "127.0.0.1:0"),
            ("QUOTA_METRICS_LISTEN", "off"),
        ],
    );
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(said.contains("settings"), "{said}");
    assert!(!said.contains("invalid settings"), "{said}");
    assert!(!said.contains("hunter2"), "{said}");

    let missing = dir.path().join("missing");
    let missing = missing.to_str().expect("a UTF-8 path");
    let directory = dir.path().to_str().expect("a UTF-8 path");
    let empty = file("empty", b" \n");
    let binary = file("binary", b"\xff\xfe");
    let large = file("large", &vec![b'x'; 70_000]);
    let short = file("short", b"hunter2");
    for name in ["DATABASE_URL", "REDIS_URL", "QUOTA_SECRET"] {
        let variable = format!("{name}_FILE");
        for path in [missing, directory, &empty, &binary, &large] {
            let lines = refused(&[(&variable, path)]);
            assert_eq!(lines.len(), 1, "{variable}={path}: {lines:?}");
            assert!(lines[0].starts_with(&format!("{variable}: ")), "{lines:?}");
        }
        let lines = refused(&[
            (&variable, &secret),
            (name, "0123456789abcdef0123456789abcdef"),
        ]);
        assert!(
            lines
                .iter()
                .any(|line| line.starts_with(&format!("{variable}: {name} is also set"))),
            "{lines:?}"
        );
    }
    let lines = refused(&[("QUOTA_SECRET_FILE", &short)]);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(
        lines[0].starts_with("QUOTA_SECRET_FILE: must be at least 32"),
        "{lines:?}"
    );
    assert!(!lines[0].contains("hunter2"), "{lines:?}");
}
