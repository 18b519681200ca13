//! Tests of the settings as a whole.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct SettingsOnly {
    #[command(flatten)]
    settings: Settings,
}

fn settings(flags: &[&str]) -> Settings {
    let flags = std::iter::once("quota").chain(flags.iter().copied());
    SettingsOnly::try_parse_from(flags)
        .expect("every flag takes text")
        .settings
}

#[test]
fn defaults_are_as_documented() {
    let config = Config::read(&settings(&[])).expect("the defaults are valid");
    assert_eq!(config.listen, "127.0.0.1:8080".parse().unwrap());
    assert_eq!(
        config.metrics_listen,
        Some("127.0.0.1:9090".parse().unwrap())
    );
    assert_eq!(config.grpc_listen, None);
    assert_eq!(config.public_url, "http://127.0.0.1:8080");
    assert_eq!(config.body_limit, 64 * 1024);
    assert!(config.database_url.is_none());
    assert_eq!((config.auth_rpm, config.admin_rpm), (60, 300));
    assert!(config.redis.is_none());
    assert_eq!(config.database, DatabaseSettings::default());
    assert_eq!(config.lease_ttl, Duration::from_millis(100));
    assert_eq!(config.on_redis_failure, OnRedisFailure::Share);
}

#[test]
fn redis_settings_are_parsed() {
    let config = Config::read(&settings(&[
        "--redis-url=redis://a:7000",
        "--redis-timeout=45ms",
        "--redis-connections=3",
        "--redis-prefix=two",
        "--lease-ttl=0",
        "--on-redis-failure=closed",
    ]))
    .unwrap();
    let redis = config.redis.expect("REDIS_URL is set");
    assert_eq!(redis.servers.to_string(), "a:7000");
    assert_eq!(redis.timeout, Duration::from_millis(45));
    assert_eq!(redis.connect_timeout, Duration::from_millis(250));
    assert_eq!((redis.connections, redis.prefix.as_str()), (3, "two"));
    assert_eq!(config.lease_ttl, Duration::ZERO);
    assert_eq!(config.on_redis_failure, OnRedisFailure::Closed);
}

#[test]
fn assigned_port_is_part_of_the_public_url_unless_that_is_set() {
    let chosen = "127.0.0.1:4711".parse().unwrap();
    let mut config = Config::read(&settings(&["--listen=127.0.0.1:0"])).unwrap();
    config.listens_on(chosen, None, None);
    assert_eq!((config.listen, config.metrics_listen), (chosen, None));
    assert_eq!(config.public_url, "http://127.0.0.1:4711");

    let set = ["--listen=127.0.0.1:0", "--public-url=https://quota.example"];
    let mut config = Config::read(&settings(&set)).unwrap();
    config.listens_on(chosen, None, None);
    assert_eq!(config.public_url, "https://quota.example");
}

#[test]
fn all_errors_are_reported_and_name_their_variable() {
    let errors = Config::read(&settings(&[
        "--listen=8080",
        "--database-url=mysql://root:hunter2@host/db",
        "--redis-url=http://:hunter2@host",
        "--trusted-proxies=10.0.0.0/99",
        "--auth-rpm=-1",
        "--header-timeout=soon",
        "--secret=short",
        "--allowed-origins=https://a.example/path",
        "--log-format=xml",
    ]))
    .unwrap_err()
    .0;
    let variables = errors
        .iter()
        .map(|error| error.split(':').next().unwrap())
        .collect::<Vec<_>>();
    assert_eq!(
        variables,
        [
            "QUOTA_LISTEN",
            "DATABASE_URL",
            "REDIS_URL",
            "QUOTA_SECRET",
            "ALLOWED_ORIGINS",
            "QUOTA_TRUSTED_PROXIES",
            "QUOTA_AUTH_RPM",
            "QUOTA_HEADER_TIMEOUT",
            "QUOTA_LOG_FORMAT",
        ]
    );
    assert!(
        !errors.concat().contains("hunter2"),
        "an error must not repeat a password"
    );
}

#[test]
fn error_does_not_contain_the_password_of_a_url() {
    let misplaced = "postgres://quota:hunter2@db/quota";
    for (flag, variable) in [
        (
            "--database-url=postgres://u:p@hunter2@db/quota",
            "DATABASE_URL",
        ),
        (
            "--database-url=postgres://u:p@1/hunter2@db/quota",
            "DATABASE_URL",
        ),
        (
            "--database-url=postgres://u:hunter2@db:x/quota",
            "DATABASE_URL",
        ),
        (
            "--database-url=postgres://u:p@db/quota?hunter2=1",
            "DATABASE_URL",
        ),
        (
            "--database-url=host=db password=correct hunter2",
            "DATABASE_URL",
        ),
        (
            "--redis-url=redis+sentinel://user?hunter2@host/main",
            "REDIS_URL",
        ),
        ("--smtp-url=smtps://u:hunter2@host/?x", "SMTP_URL"),
        (
            "--database-url-file=postgres://u:hunter2@db/quota",
            "DATABASE_URL_FILE",
        ),
        // The list is split at the comma in the password.
        (
            "--allowed-origins=https://u:hunter2,3@host/x",
            "ALLOWED_ORIGINS",
        ),
        ("--public-url=https:u:hunter2@host/?x", "QUOTA_PUBLIC_URL"),
        ("--public-url=https://u:hunter2@host/?x", "QUOTA_PUBLIC_URL"),
        (
            "--allowed-origins=https://a.example,https://u:hunter2@host/x",
            "ALLOWED_ORIGINS",
        ),
        (
            "--otel-exporter-otlp-endpoint=https://u:hunter2@host/#x",
            "OTEL_EXPORTER_OTLP_ENDPOINT",
        ),
        (
            "--stripe-api-base=https://u:hunter2@host/?x",
            "STRIPE_API_BASE",
        ),
        (&format!("--listen={misplaced}"), "QUOTA_LISTEN"),
        (
            &format!("--trusted-proxies={misplaced}"),
            "QUOTA_TRUSTED_PROXIES",
        ),
    ] {
        let errors = Config::read(&settings(&[flag])).expect_err(flag).0;
        assert!(
            errors
                .iter()
                .any(|it| it.starts_with(&format!("{variable}: "))),
            "{flag}: {errors:?}"
        );
        assert!(!errors.concat().contains("hunter2"), "{errors:?}");
    }
}

#[test]
fn error_does_not_contain_a_secret_that_was_given_instead_of_a_path() {
    let secret = "hunter2".repeat(50);
    for (flag, variable) in [
        ("secret", "QUOTA_SECRET"),
        ("stripe-secret-key", "STRIPE_SECRET_KEY"),
        ("redis-url", "REDIS_URL"),
    ] {
        // The longer text is too long for a file name.
        for text in [&secret[..35], &secret] {
            let flag = format!("--{flag}-file={text}");
            let errors = Config::read(&settings(&[&flag])).expect_err(&flag).0;
            let start = format!("{variable}_FILE: cannot read the file: ");
            assert!(
                errors.iter().any(|it| it.starts_with(&start)),
                "{flag}: {errors:?}"
            );
            assert!(!errors.concat().contains("hunter2"), "{errors:?}");
        }
    }
}

#[test]
fn error_shows_a_value_without_credentials() {
    let flags = [
        "--public-url=https://host/?x",
        "--trusted-proxies=10.0.0.0/99",
    ];
    let errors = Config::read(&settings(&flags)).unwrap_err().0;
    assert!(errors[0].ends_with("got \"https://host/?x\""), "{errors:?}");
    assert!(
        errors[1].contains("\"10.0.0.0/99\" is not a network"),
        "{errors:?}"
    );
}

#[test]
fn database_names_and_options_may_contain_an_at_sign() {
    for url in [
        "postgres://u:p@db/a%40b",
        "postgres://u:p%40q@db/quota?application_name=a@b",
        "host=db dbname=a@b",
    ] {
        assert!(
            Config::read(&settings(&[&format!("--database-url={url}")])).is_ok(),
            "{url}"
        );
    }
}

#[test]
fn debug_output_has_no_secret() {
    let secret = "correct-horse-battery-staple-0123456789";
    let config = Config::read(&settings(&[
        &format!("--secret={secret}"),
        "--database-url=postgres://quota:hunter2@db/quota",
        "--redis-url=redis+sentinel://quota:hunter2@a/main?sentinel_password=hunter2",
    ]))
    .unwrap();
    let shown = format!("{config:?}");
    assert!(
        !shown.contains("hunter2") && !shown.contains("correct-horse"),
        "{shown}"
    );
}
