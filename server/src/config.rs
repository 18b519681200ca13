//! Settings: from the environment and from flags of the same names, read once, whole.
//!
//! A wrong value stops the start with one line for each fault, naming the variable; all faults are listed at
//! once. [`Settings`] is what can be said, as text; [`Config`] is what was meant, typed. Nothing else in the
//! server reads the environment.

mod environment;
mod reader;
pub mod redis;
mod settings;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;
use quota_common::plan::OnRedisFailure;
use secrecy::{ExposeSecret, SecretString};

use self::reader::{
    Reader, Sourced, address, boolean, database_url, list, network, origin, prefix, public_url,
};
pub use self::{
    environment::unknown_variables,
    redis::{RedisServers, RedisSettings},
    settings::{Settings, env_example},
};

/// What the settings mean.
#[derive(Clone)]
pub struct Config {
    pub listen: SocketAddr,
    pub metrics_listen: Option<SocketAddr>,
    /// Without a slash at its end.
    pub public_url: String,
    pub data_dir: PathBuf,
    /// `None`: the embedded default.
    pub database_url: Option<SecretString>,
    pub database: DatabaseSettings,
    /// `None`: one replica, with its counters in the process.
    pub redis: Option<RedisSettings>,
    pub lease_ttl: Duration,
    pub on_redis_failure: OnRedisFailure,
    /// Whether decisions are recorded.
    pub metering: bool,
    pub durability: Durability,
    /// Bytes of recorded usage that is not in PostgreSQL yet, at most.
    pub usage_backlog_max: u64,
    pub usage_ship_every: Duration,
    /// How many replicas the operator runs.
    pub replicas: usize,
    pub migrate: bool,
    pub secret: Option<SecretString>,
    pub secret_previous: Option<SecretString>,
    pub registration: Registration,
    pub landing: Landing,
    pub allowances: Allowances,
    pub allowed_origins: Vec<String>,
    pub trusted_proxies: Vec<IpNet>,
    pub auth_rpm: u32,
    pub admin_rpm: u32,
    pub login_rpm: u32,
    pub body_limit: usize,
    pub header_timeout: Duration,
    pub request_timeout: Duration,
    pub idle_timeout: Duration,
    pub write_timeout: Duration,
    /// Open client connections at most.
    pub connections: usize,
    /// Of one address, or one IPv6 /64; 0: no limit.
    pub connections_per_address: usize,
    /// Of one IPv4 /24 or IPv6 /56, and half of what one IPv6 /48 may have; 0: no limit.
    pub connections_per_network: usize,
    /// Look-ups under way at most, of keys and tokens that are not in memory.
    pub key_lookups: usize,
    pub drain_timeout: Duration,
    pub drain_delay: Duration,
    pub stale_grace: Duration,
    pub key_cache: usize,
    pub session_days: u32,
    /// How long the log of decisions is kept: whole days.
    pub usage_retention: Duration,
    /// How long rollups of it are kept: whole days.
    pub usage_rollup_retention: Duration,
    pub log_format: LogFormat,
    pub log: String,
    /// What argon2id costs; tests lower it.
    pub password_cost: PasswordCost,
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Only what cannot hold a secret: fields are shown because they are named here.
        f.debug_struct("Config")
            .field("listen", &self.listen)
            .field("metrics_listen", &self.metrics_listen)
            .field("public_url", &self.public_url)
            .field("data_dir", &self.data_dir)
            .field("embedded", &self.database_url.is_none())
            .field("database", &self.database)
            .field("redis", &self.redis)
            .field("trusted_proxies", &self.trusted_proxies)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Json,
    Text,
}

/// What recorded usage survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The end of the process.
    Process,
    /// Also the failure of the machine.
    Machine,
}

/// Who may create an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registration {
    Open,
    /// Only the operator.
    Closed,
}

/// The page at `/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Landing {
    /// About Quota, for those who consider running it.
    Full,
    /// For the operator's own customers: signing in and the API docs, under the operator's name.
    Door { operator: String },
}

impl Registration {
    pub const fn is_open(self) -> bool {
        matches!(self, Self::Open)
    }
}

/// How much one tenant may create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowances {
    pub plans: u64,
    pub api_keys: u64,
    pub service_tokens: u64,
}

/// Connections to PostgreSQL, and how long anything may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatabaseSettings {
    /// Connections of one replica at most.
    pub pool: usize,
    /// For one of these.
    pub wait: Duration,
    pub connect_timeout: Duration,
    pub statement_timeout: Duration,
    pub lock_timeout: Duration,
}

impl Default for DatabaseSettings {
    fn default() -> Self {
        Self {
            pool: 16,
            wait: Duration::from_millis(500),
            connect_timeout: Duration::from_secs(2),
            statement_timeout: Duration::from_secs(2),
            lock_timeout: Duration::from_secs(1),
        }
    }
}

/// The cost of one password hash. The default is what OWASP ASVS lists for argon2id with one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PasswordCost {
    pub memory_kib: u32,
    pub passes: u32,
}

impl Default for PasswordCost {
    fn default() -> Self {
        Self {
            memory_kib: 47_104,
            passes: 1,
        }
    }
}

/// Every fault of the settings.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct Faults(pub Vec<String>);

impl Config {
    /// Where it listens in fact: port 0 asks for any that is free.
    pub fn listens_on(&mut self, listen: SocketAddr, metrics_listen: Option<SocketAddr>) {
        if self.public_url == format!("http://{}", self.listen) {
            self.public_url = format!("http://{listen}");
        }
        self.listen = listen;
        self.metrics_listen = metrics_listen;
    }

    pub fn read(settings: &Settings) -> Result<Self, Faults> {
        let mut reader = Reader(Vec::new());
        let unspecified = SocketAddr::from(([127, 0, 0, 1], 0));
        let r = &mut reader;
        let s = settings;
        let listen = r.read("QUOTA_LISTEN", &s.listen, unspecified, address);
        let config = Self {
            listen,
            metrics_listen: r.read("QUOTA_METRICS_LISTEN", &s.metrics_listen, None, |text| {
                match text {
                    "off" | "" => Ok(None),
                    text => address(text).map(Some),
                }
            }),
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
                // All are read, so that a fault in one is told also where the address is not set.
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
                // Nothing is as long in any unit.
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
                |text| OnRedisFailure::named(text).ok_or("must be share, open or closed".into()),
            ),
            metering: r.read("QUOTA_METERING", &s.metering, true, |text| match text {
                "on" => Ok(true),
                "off" => Ok(false),
                _ => Err("must be on or off".into()),
            }),
            durability: r.read(
                "QUOTA_DURABILITY",
                &s.durability,
                Durability::Process,
                |text| match text {
                    "process" => Ok(Durability::Process),
                    "machine" => Ok(Durability::Machine),
                    _ => Err("must be process or machine".into()),
                },
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
            registration: r.read(
                "QUOTA_REGISTRATION",
                &s.registration,
                Registration::Open,
                |text| match text {
                    "open" => Ok(Registration::Open),
                    "closed" => Ok(Registration::Closed),
                    _ => Err("must be open or closed".into()),
                },
            ),
            landing: {
                let operator = r.read(
                    "QUOTA_OPERATOR_NAME",
                    &s.operator_name,
                    "Quota".to_owned(),
                    |text| {
                        let fits =
                            text.chars().count() <= 100 && !text.chars().any(char::is_control);
                        fits.then(|| text.trim().to_owned()).ok_or(
                            "must be at most 100 characters, without control characters".into(),
                        )
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
            },
            allowances: Allowances {
                plans: r.number("QUOTA_MAX_PLANS", &s.max_plans, 1..=1_000_000),
                api_keys: r.number("QUOTA_MAX_API_KEYS", &s.max_api_keys, 1..=10_000_000),
                service_tokens: r.number(
                    "QUOTA_MAX_SERVICE_TOKENS",
                    &s.max_service_tokens,
                    1..=1_000_000,
                ),
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
            login_rpm: r.per_minute("QUOTA_LOGIN_RPM", &s.login_rpm),
            body_limit: usize::try_from(r.number(
                "QUOTA_BODY_LIMIT",
                &s.body_limit,
                1024..=16_777_216,
            ))
            .unwrap_or(65_536),
            header_timeout: r.duration("QUOTA_HEADER_TIMEOUT", &s.header_timeout, 1..=60),
            request_timeout: r.duration("QUOTA_REQUEST_TIMEOUT", &s.request_timeout, 1..=300),
            idle_timeout: r.duration("QUOTA_IDLE_TIMEOUT", &s.idle_timeout, 1..=3600),
            write_timeout: r.duration("QUOTA_WRITE_TIMEOUT", &s.write_timeout, 1..=600),
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
            key_cache: usize::try_from(r.number(
                "QUOTA_KEY_CACHE",
                &s.key_cache,
                1000..=10_000_000,
            ))
            .unwrap_or(100_000),
            session_days: u32::try_from(r.number("QUOTA_SESSION_DAYS", &s.session_days, 1..=365))
                .unwrap_or(14),
            usage_retention: r.days("QUOTA_USAGE_RETENTION", &s.usage_retention, 2..=3650),
            usage_rollup_retention: r.days(
                "QUOTA_USAGE_ROLLUP_RETENTION",
                &s.usage_rollup_retention,
                2..=3650,
            ),
            log_format: r.read(
                "QUOTA_LOG_FORMAT",
                &s.log_format,
                LogFormat::Json,
                |text| match text {
                    "json" => Ok(LogFormat::Json),
                    "text" => Ok(LogFormat::Text),
                    _ => Err("must be json or text".into()),
                },
            ),
            log: r.read("RUST_LOG", &s.log, String::new(), |text| {
                tracing_subscriber::EnvFilter::try_new(text)
                    .map(|_| text.to_owned())
                    .map_err(|_| "must be directives of the tracing crate such as info".into())
            }),
            password_cost: PasswordCost::default(),
        };
        if config.drain_delay + config.drain_timeout > Duration::from_secs(28) {
            reader.0.push(
                "QUOTA_DRAIN_DELAY: together with QUOTA_DRAIN_TIMEOUT it must leave the server time to stop in 30s"
                    .to_owned(),
            );
        }
        let no_secret = s.secret.is_empty() && s.secret_file.trim().is_empty();
        if config.secret_previous.is_some() && no_secret {
            reader
                .0
                .push("QUOTA_SECRET_PREVIOUS: is set without QUOTA_SECRET".to_owned());
        }
        if reader.0.is_empty() {
            Ok(config)
        } else {
            Err(Faults(reader.0))
        }
    }

    pub fn secret_bytes(secret: &SecretString) -> &[u8] {
        secret.expose_secret().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        settings: Settings,
    }

    fn settings(flags: &[&str]) -> Settings {
        let flags = std::iter::once("quota").chain(flags.iter().copied());
        Only::try_parse_from(flags)
            .expect("flags are text")
            .settings
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let config = Config::read(&settings(&[])).expect("the defaults are valid");
        assert_eq!(config.listen, "127.0.0.1:8080".parse().unwrap());
        assert_eq!(
            config.metrics_listen,
            Some("127.0.0.1:9090".parse().unwrap())
        );
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
    fn redis_is_what_its_settings_say() {
        let config = Config::read(&settings(&[
            "--redis-url=redis://a:7000",
            "--redis-timeout=45ms",
            "--redis-connections=3",
            "--redis-prefix=two",
            "--lease-ttl=0",
            "--on-redis-failure=closed",
        ]))
        .unwrap();
        let redis = config.redis.expect("it is set");
        assert_eq!(redis.servers.to_string(), "a:7000");
        assert_eq!(redis.timeout, Duration::from_millis(45));
        assert_eq!(redis.connect_timeout, Duration::from_millis(250));
        assert_eq!((redis.connections, redis.prefix.as_str()), (3, "two"));
        assert_eq!(config.lease_ttl, Duration::ZERO);
        assert_eq!(config.on_redis_failure, OnRedisFailure::Closed);
    }

    #[test]
    fn a_port_that_was_chosen_is_in_the_public_address_unless_that_was_set() {
        let chosen = "127.0.0.1:4711".parse().unwrap();
        let mut config = Config::read(&settings(&["--listen=127.0.0.1:0"])).unwrap();
        config.listens_on(chosen, None);
        assert_eq!((config.listen, config.metrics_listen), (chosen, None));
        assert_eq!(config.public_url, "http://127.0.0.1:4711");

        let set = ["--listen=127.0.0.1:0", "--public-url=https://quota.example"];
        let mut config = Config::read(&settings(&set)).unwrap();
        config.listens_on(chosen, None);
        assert_eq!(config.public_url, "https://quota.example");
    }

    #[test]
    fn every_fault_is_told_at_once_and_names_its_variable() {
        let faults = Config::read(&settings(&[
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
        let variables = faults
            .iter()
            .map(|fault| fault.split(':').next().unwrap())
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
            !faults.concat().contains("hunter2"),
            "a fault must not repeat a password"
        );
    }

    #[test]
    fn what_is_shown_of_a_configuration_holds_no_secret() {
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
}
