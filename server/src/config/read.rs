//! Parses all settings.

use std::{net::SocketAddr, num::NonZeroU64, path::PathBuf, time::Duration};

use quota_common::plan::OnRedisFailure;
use secrecy::{ExposeSecret, SecretString};

use super::{
    Allowances, Config, ConfigErrors, DatabaseSettings, Durability, FreeTier, Landing, LogFormat,
    PasswordCost, RedisSettings, Registration, Settings, StripeSettings, mail,
    reader::{
        Reader, Sourced, address, boolean, database_url, list, network, optional_address, origin,
        prefix, public_url,
    },
    redis, traces,
};

impl Config {
    /// Parses all settings, or returns all errors.
    pub fn read(settings: &Settings) -> Result<Self, ConfigErrors> {
        let mut reader = Reader(Vec::new());
        let unspecified = SocketAddr::from(([127, 0, 0, 1], 0));
        let r = &mut reader;
        let s = settings;
        let listen = r.read("QUOTA_LISTEN", &s.listen, unspecified, address);
        let config = Self {
            listen,
            metrics_listen: r.read(
                "QUOTA_METRICS_LISTEN",
                &s.metrics_listen,
                None,
                optional_address,
            ),
            grpc_listen: r.read("QUOTA_GRPC_LISTEN", &s.grpc_listen, None, optional_address),
            public_url: if s.public_url.is_empty() {
                format!("http://{listen}")
            } else {
                r.read("QUOTA_PUBLIC_URL", &s.public_url, String::new(), public_url)
            },
            data_dir: r.read("QUOTA_DATA_DIR", &s.data_dir, PathBuf::new(), |text| {
                if text.is_empty() {
                    Err("must name a directory".into())
                } else {
                    Ok(PathBuf::from(text))
                }
            }),
            database_url: {
                let Sourced { variable, value } =
                    r.or_file("DATABASE_URL", &s.database_url, &s.database_url_file);
                if let Some(url) = &value
                    && let Err(message) = database_url(url.expose_secret())
                {
                    r.0.push(format!("{variable}: {message}"));
                }
                value
            },
            database: {
                let millis = Duration::from_millis;
                let minute = Duration::from_secs(60);
                DatabaseSettings {
                    pool: usize::try_from(r.number(
                        "QUOTA_DATABASE_POOL",
                        &s.database_pool,
                        6..=1000,
                    ))
                    .unwrap_or(6),
                    wait: r.duration_within(
                        "QUOTA_DATABASE_WAIT",
                        &s.database_wait,
                        millis(10)..=millis(10_000),
                    ),
                    connect_timeout: r.duration_within(
                        "QUOTA_DATABASE_CONNECT_TIMEOUT",
                        &s.database_connect_timeout,
                        millis(100)..=millis(30_000),
                    ),
                    statement_timeout: r.duration_within(
                        "QUOTA_DATABASE_STATEMENT_TIMEOUT",
                        &s.database_statement_timeout,
                        millis(100)..=minute,
                    ),
                    lock_timeout: r.duration_within(
                        "QUOTA_DATABASE_LOCK_TIMEOUT",
                        &s.database_lock_timeout,
                        millis(100)..=minute,
                    ),
                }
            },
            redis: {
                // All Redis settings are parsed even without REDIS_URL, so that errors are reported.
                let prefix = r.read("QUOTA_REDIS_PREFIX", &s.redis_prefix, String::new(), prefix);
                let connections = r.number("QUOTA_REDIS_CONNECTIONS", &s.redis_connections, 1..=64);
                let timeout = r.duration_within(
                    "QUOTA_REDIS_TIMEOUT",
                    &s.redis_timeout,
                    Duration::from_millis(1)..=Duration::from_secs(5),
                );
                let connect_timeout = r.duration_within(
                    "QUOTA_REDIS_CONNECT_TIMEOUT",
                    &s.redis_connect_timeout,
                    Duration::from_millis(10)..=Duration::from_secs(10),
                );
                let Sourced { variable, value } =
                    r.or_file("REDIS_URL", &s.redis_url, &s.redis_url_file);
                let servers = value.and_then(|url| match redis::servers(url.expose_secret()) {
                    Ok(servers) => Some(servers),
                    Err(message) => {
                        r.0.push(format!("{variable}: {message}"));
                        None
                    }
                });
                servers.map(|servers| RedisSettings {
                    servers,
                    prefix,
                    connections: usize::try_from(connections).unwrap_or(1),
                    timeout,
                    connect_timeout,
                })
            },
            lease_ttl: r.duration_within(
                "QUOTA_LEASE_TTL",
                // Zero does not need a unit.
                if s.lease_ttl.trim() == "0" {
                    "0ms"
                } else {
                    &s.lease_ttl
                },
                Duration::ZERO..=Duration::from_secs(1),
            ),
            on_redis_failure: r.read(
                "QUOTA_ON_REDIS_FAILURE",
                &s.on_redis_failure,
                OnRedisFailure::default(),
                |text| OnRedisFailure::of(text).ok_or("must be share, open or closed".into()),
            ),
            metering: r.choice(
                "QUOTA_METERING",
                &s.metering,
                &[("on", true), ("off", false)],
            ),
            durability: r.choice(
                "QUOTA_DURABILITY",
                &s.durability,
                &[
                    ("process", Durability::Process),
                    ("machine", Durability::Machine),
                ],
            ),
            usage_backlog_max: r.number(
                "QUOTA_USAGE_BACKLOG_MAX",
                &s.usage_backlog_max,
                1_048_576..=1_000_000_000_000,
            ),
            usage_ship_every: r.duration_within(
                "QUOTA_USAGE_SHIP_EVERY",
                &s.usage_ship_every,
                Duration::from_millis(10)..=Duration::from_secs(60),
            ),
            replicas: usize::try_from(r.number("QUOTA_REPLICAS", &s.replicas, 1..=1000))
                .unwrap_or(1),
            migrate: r.read("QUOTA_MIGRATE", &s.migrate, true, boolean),
            secret: r.secret("QUOTA_SECRET", &s.secret, &s.secret_file),
            secret_previous: r.secret(
                "QUOTA_SECRET_PREVIOUS",
                &s.secret_previous,
                &s.secret_previous_file,
            ),
            registration: r.choice(
                "QUOTA_REGISTRATION",
                &s.registration,
                &[
                    ("open", Registration::Open),
                    ("closed", Registration::Closed),
                ],
            ),
            landing: landing(r, s),
            allowances: Allowances {
                plans: r.number("QUOTA_MAX_PLANS", &s.max_plans, 1..=1_000_000),
                api_keys: r.number("QUOTA_MAX_API_KEYS", &s.max_api_keys, 1..=10_000_000),
                service_tokens: r.number(
                    "QUOTA_MAX_SERVICE_TOKENS",
                    &s.max_service_tokens,
                    1..=1_000_000,
                ),
                webhooks: r.number("QUOTA_MAX_WEBHOOKS", &s.max_webhooks, 1..=100),
            },
            free_tier: FreeTier {
                plans: r.optional_number("QUOTA_FREE_PLANS", &s.free_plans, 1..=1_000_000),
                api_keys: r.optional_number("QUOTA_FREE_KEYS", &s.free_keys, 1..=10_000_000),
                requests_per_month: r
                    .optional_number(
                        "QUOTA_FREE_REQUESTS_PER_MONTH",
                        &s.free_requests_per_month,
                        1..=1_000_000_000_000,
                    )
                    .and_then(NonZeroU64::new),
                rpm: r
                    .optional_number("QUOTA_FREE_RPM", &s.free_rpm, 1..=60_000_000)
                    .and_then(|rpm| u32::try_from(rpm).ok()),
            },
            allowed_origins: r.read("ALLOWED_ORIGINS", &s.allowed_origins, vec![], |text| {
                list(text, origin)
            }),
            trusted_proxies: r.read(
                "QUOTA_TRUSTED_PROXIES",
                &s.trusted_proxies,
                vec![],
                |text| list(text, network),
            ),
            auth_rpm: r.per_minute("QUOTA_AUTH_RPM", &s.auth_rpm),
            admin_rpm: r.per_minute("QUOTA_ADMIN_RPM", &s.admin_rpm),
            alert_emails_per_hour: r
                .per_minute("QUOTA_ALERT_EMAILS_PER_HOUR", &s.alert_emails_per_hour),
            registrations_per_day: r
                .per_minute("QUOTA_REGISTRATIONS_PER_DAY", &s.registrations_per_day),
            login_free_failures: r.per_minute("QUOTA_LOGIN_FREE_FAILURES", &s.login_free_failures),
            body_limit: r.count("QUOTA_BODY_LIMIT", &s.body_limit, 1024..=16_777_216),
            header_timeout: r.duration("QUOTA_HEADER_TIMEOUT", &s.header_timeout, 1..=60),
            request_timeout: r.duration("QUOTA_REQUEST_TIMEOUT", &s.request_timeout, 1..=300),
            idle_timeout: r.duration("QUOTA_IDLE_TIMEOUT", &s.idle_timeout, 1..=3600),
            write_timeout: r.duration("QUOTA_WRITE_TIMEOUT", &s.write_timeout, 1..=600),
            direct_responses: r.choice(
                "QUOTA_DIRECT_RESPONSES",
                &s.direct_responses,
                &[("on", true), ("off", false)],
            ),
            connections: r.count("QUOTA_CONNECTIONS", &s.connections, 16..=1_000_000),
            connections_per_address: r.count(
                "QUOTA_CONNECTIONS_PER_ADDRESS",
                &s.connections_per_address,
                0..=1_000_000,
            ),
            connections_per_network: r.count(
                "QUOTA_CONNECTIONS_PER_NETWORK",
                &s.connections_per_network,
                0..=1_000_000,
            ),
            key_lookups: r.count("QUOTA_KEY_LOOKUPS", &s.key_lookups, 1..=100_000),
            drain_timeout: r.duration("QUOTA_DRAIN_TIMEOUT", &s.drain_timeout, 0..=25),
            drain_delay: r.duration("QUOTA_DRAIN_DELAY", &s.drain_delay, 0..=20),
            stale_grace: r.duration("QUOTA_STALE_GRACE", &s.stale_grace, 0..=3600),
            key_cache: r.count("QUOTA_KEY_CACHE", &s.key_cache, 1000..=10_000_000),
            session_days: u32::try_from(r.number("QUOTA_SESSION_DAYS", &s.session_days, 1..=365))
                .unwrap_or(14),
            usage_retention: r.days("QUOTA_USAGE_RETENTION", &s.usage_retention, 2..=3650),
            usage_rollup_retention: r.days(
                "QUOTA_USAGE_ROLLUP_RETENTION",
                &s.usage_rollup_retention,
                2..=3650,
            ),
            stripe: stripe(r, s),
            mail: mail::read(r, s),
            webhook_private_networks: r.read(
                "QUOTA_WEBHOOK_PRIVATE_NETWORKS",
                &s.webhook_private_networks,
                vec![],
                |text| list(text, network),
            ),
            log_format: r.choice(
                "QUOTA_LOG_FORMAT",
                &s.log_format,
                &[("json", LogFormat::Json), ("text", LogFormat::Text)],
            ),
            log: r.read("RUST_LOG", &s.log, String::new(), |text| {
                tracing_subscriber::EnvFilter::try_new(text)
                    .map(|_| text.to_owned())
                    .map_err(|_| "must be tracing directives such as info".into())
            }),
            traces: traces::read(r, s),
            password_cost: PasswordCost::default(),
        };
        if config.drain_delay + config.drain_timeout > Duration::from_secs(28) {
            reader.0.push(
                "QUOTA_DRAIN_DELAY: must be at most 28s together with QUOTA_DRAIN_TIMEOUT, so that the server can stop \
                 within 30s"
                    .to_owned(),
            );
        }
        let no_secret = s.secret.is_empty() && s.secret_file.trim().is_empty();
        if config.secret_previous.is_some() && no_secret {
            reader
                .0
                .push("QUOTA_SECRET_PREVIOUS: requires QUOTA_SECRET".to_owned());
        }
        if reader.0.is_empty() {
            Ok(config)
        } else {
            Err(ConfigErrors(reader.0))
        }
    }
}

/// Reads the Stripe settings. All of them are parsed even without STRIPE_SECRET_KEY, so that errors are reported.
fn stripe(r: &mut Reader, s: &Settings) -> Option<StripeSettings> {
    let key = r.or_file(
        "STRIPE_SECRET_KEY",
        &s.stripe_secret_key,
        &s.stripe_secret_key_file,
    );
    let is_key = |key: &SecretString| {
        let key = key.expose_secret();
        ["sk_", "rk_"].iter().any(|it| key.starts_with(it))
            && key.chars().all(|c| c.is_ascii_graphic())
    };
    if key.value.as_ref().is_some_and(|it| !is_key(it)) {
        // The value is not shown, because it is a secret even if it is invalid.
        let variable = &key.variable;
        r.0.push(format!(
            "{variable}: must be a Stripe secret key, which starts with sk_ or rk_"
        ));
    }
    let webhook = r.or_file(
        "STRIPE_WEBHOOK_SECRET",
        &s.stripe_webhook_secret,
        &s.stripe_webhook_secret_file,
    );
    let secrets = webhook.value.as_ref().map_or("", |it| it.expose_secret());
    let secrets: Vec<&str> = secrets
        .split(',')
        .map(str::trim)
        .filter(|it| !it.is_empty())
        .collect();
    if secrets.iter().any(|it| !it.starts_with("whsec_")) {
        let variable = &webhook.variable;
        r.0.push(format!(
            "{variable}: must be a Stripe webhook secret, which starts with whsec_"
        ));
    }
    let api_base = r.read("STRIPE_API_BASE", &s.stripe_api_base, None, |text| {
        if text.is_empty() {
            Ok(None)
        } else {
            public_url(text).map(Some)
        }
    });
    let grace = r.days("QUOTA_BILLING_GRACE", &s.billing_grace, 0..=90);
    Some(StripeSettings {
        secret_key: key.value?,
        webhook_secrets: secrets.into_iter().map(SecretString::from).collect(),
        api_base,
        grace,
    })
}

fn landing(r: &mut Reader, s: &Settings) -> Landing {
    let operator = r.read(
        "QUOTA_OPERATOR_NAME",
        &s.operator_name,
        "Quota".to_owned(),
        |text| {
            let fits = text.chars().count() <= 100 && !text.chars().any(char::is_control);
            fits.then(|| text.trim().to_owned())
                .ok_or("must be at most 100 characters, without control characters".into())
        },
    );
    r.read(
        "QUOTA_LANDING",
        &s.landing,
        Landing::Full,
        |text| match text {
            "full" => Ok(Landing::Full),
            "door" => Ok(Landing::Door {
                operator: operator.clone(),
            }),
            _ => Err("must be full or door".into()),
        },
    )
}
