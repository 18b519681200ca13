//! Settings: from the environment and from flags of the same names, read once, whole.
//!
//! A wrong value stops the start with one line for each fault, naming the variable; all faults are listed at
//! once. [`Settings`] is what can be said, as text; [`Config`] is what was meant, typed. Nothing else in the
//! server reads the environment.

pub mod redis;

use std::{net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use clap::{Args, CommandFactory};
use ipnet::IpNet;
use quota_common::plan::OnRedisFailure;
use secrecy::{ExposeSecret, SecretString};
use url::Url;

pub use self::redis::{RedisServers, RedisSettings};

/// Everything that can be set. Every field is one variable of the environment and one flag.
#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Settings (each can also be an environment variable)")]
pub struct Settings {
    /// Where the API listens.
    #[arg(
        long,
        env = "QUOTA_LISTEN",
        default_value = "127.0.0.1:8080",
        value_name = "ADDR"
    )]
    pub listen: String,

    /// Where the metrics (Prometheus text at /metrics) listen; `off` for nowhere. Keep it away from the public.
    #[arg(
        long,
        env = "QUOTA_METRICS_LISTEN",
        default_value = "127.0.0.1:9090",
        value_name = "ADDR"
    )]
    pub metrics_listen: String,

    /// The address by which clients know the server. Problems lead to pages below it. Default: http:// and
    /// QUOTA_LISTEN.
    #[arg(long, env = "QUOTA_PUBLIC_URL", default_value = "", value_name = "URL")]
    pub public_url: String,

    /// Where the embedded database and its log are kept.
    #[arg(
        long,
        env = "QUOTA_DATA_DIR",
        default_value = "./.quota",
        value_name = "DIR"
    )]
    pub data_dir: String,

    /// The PostgreSQL to work on, as postgres://user:password@host/database. Unset: a private PostgreSQL is
    /// started from the programs installed on the machine, in QUOTA_DATA_DIR.
    #[arg(
        long,
        env = "DATABASE_URL",
        default_value = "",
        value_name = "URL",
        hide_env_values = true
    )]
    pub database_url: String,

    /// How many connections to PostgreSQL one replica holds at most: 2 to 1000.
    #[arg(
        long,
        env = "QUOTA_DATABASE_POOL",
        default_value = "16",
        value_name = "N"
    )]
    pub database_pool: String,

    /// How long a request waits for one of these when all are busy, before it is answered 503: 10ms to 10s.
    #[arg(
        long,
        env = "QUOTA_DATABASE_WAIT",
        default_value = "500ms",
        value_name = "DURATION"
    )]
    pub database_wait: String,

    /// How long it may take to connect to PostgreSQL: 100ms to 30s.
    #[arg(
        long,
        env = "QUOTA_DATABASE_CONNECT_TIMEOUT",
        default_value = "2s",
        value_name = "DURATION"
    )]
    pub database_connect_timeout: String,

    /// How long PostgreSQL works on one statement before it gives up (statement_timeout): 100ms to 60s.
    #[arg(
        long,
        env = "QUOTA_DATABASE_STATEMENT_TIMEOUT",
        default_value = "2s",
        value_name = "DURATION"
    )]
    pub database_statement_timeout: String,

    /// How long a statement waits for another's lock (lock_timeout): 100ms to 60s.
    #[arg(
        long,
        env = "QUOTA_DATABASE_LOCK_TIMEOUT",
        default_value = "1s",
        value_name = "DURATION"
    )]
    pub database_lock_timeout: String,

    /// The Redis that replicas share their counters by: redis://user:password@host:port/db; by Sentinel
    /// redis+sentinel://user:password@host:port,host:port/group/db; of a cluster redis://host:port,host:port.
    /// rediss is TLS; valkey means the same as redis. Unset: counters are in this process, for one replica.
    #[arg(
        long,
        env = "REDIS_URL",
        default_value = "",
        value_name = "URL",
        hide_env_values = true
    )]
    pub redis_url: String,

    /// What every key and channel in Redis begins with: 1 to 64 letters, digits, `_`, `-`, `.` or `:`. The same on
    /// every replica; another one for another Quota on the same Redis.
    #[arg(
        long,
        env = "QUOTA_REDIS_PREFIX",
        default_value = "quota",
        value_name = "TEXT"
    )]
    pub redis_prefix: String,

    /// How many connections to Redis one replica holds for decisions: 1 to 64. Each carries many calls at once.
    #[arg(
        long,
        env = "QUOTA_REDIS_CONNECTIONS",
        default_value = "2",
        value_name = "N"
    )]
    pub redis_connections: String,

    /// How long a decision waits for Redis before QUOTA_ON_REDIS_FAILURE applies: 1ms to 5s.
    #[arg(
        long,
        env = "QUOTA_REDIS_TIMEOUT",
        default_value = "30ms",
        value_name = "DURATION"
    )]
    pub redis_timeout: String,

    /// How long it may take to connect to Redis: 10ms to 10s.
    #[arg(
        long,
        env = "QUOTA_REDIS_CONNECT_TIMEOUT",
        default_value = "250ms",
        value_name = "DURATION"
    )]
    pub redis_connect_timeout: String,

    /// For how long a replica spends by itself what it has taken from Redis: 0ms to 1s. 0ms: every request is
    /// decided in Redis, as those of strict plans always are.
    #[arg(
        long,
        env = "QUOTA_LEASE_TTL",
        default_value = "100ms",
        value_name = "DURATION"
    )]
    pub lease_ttl: String,

    /// What happens to requests while Redis is away, where their plan does not say otherwise: share (each replica
    /// admits its share of the limit), open (all are admitted) or closed (all are answered 503).
    #[arg(
        long,
        env = "QUOTA_ON_REDIS_FAILURE",
        default_value = "share",
        value_name = "MODE"
    )]
    pub on_redis_failure: String,

    /// How many replicas the operator runs: 1 to 1000. `quota doctor` checks that their connections fit PostgreSQL's
    /// limit.
    #[arg(long, env = "QUOTA_REPLICAS", default_value = "1", value_name = "N")]
    pub replicas: String,

    /// Apply pending migrations at the start: true or false. One replica applies them, the others wait.
    #[arg(
        long,
        env = "QUOTA_MIGRATE",
        default_value = "true",
        value_name = "BOOL"
    )]
    pub migrate: String,

    /// What access tokens are signed with, at least 32 characters of chance, the same on every replica. Unset:
    /// made once and kept in the database.
    #[arg(
        long,
        env = "QUOTA_SECRET",
        default_value = "",
        value_name = "SECRET",
        hide_env_values = true
    )]
    pub secret: String,

    /// The QUOTA_SECRET from before the last change; access tokens signed with it are still believed.
    #[arg(
        long,
        env = "QUOTA_SECRET_PREVIOUS",
        default_value = "",
        value_name = "SECRET",
        hide_env_values = true
    )]
    pub secret_previous: String,

    /// Origins of web pages that may call the API, separated by commas, such as https://app.example.com; `*`
    /// for all. They may read the rate-limit fields; cookies are never sent along.
    #[arg(
        long,
        env = "ALLOWED_ORIGINS",
        default_value = "",
        value_name = "ORIGINS"
    )]
    pub allowed_origins: String,

    /// Networks of the proxies whose X-Forwarded-For is believed, separated by commas, such as 10.0.0.0/8.
    #[arg(
        long,
        env = "QUOTA_TRUSTED_PROXIES",
        default_value = "",
        value_name = "CIDRS"
    )]
    pub trusted_proxies: String,

    /// Requests a minute from one client address to /auth; 0 for no limit.
    #[arg(long, env = "QUOTA_AUTH_RPM", default_value = "60", value_name = "N")]
    pub auth_rpm: String,

    /// Requests a minute from one client address to /admin; 0 for no limit.
    #[arg(long, env = "QUOTA_ADMIN_RPM", default_value = "300", value_name = "N")]
    pub admin_rpm: String,

    /// Tries to sign in a minute to one account, from wherever; 0 for no limit.
    #[arg(long, env = "QUOTA_LOGIN_RPM", default_value = "10", value_name = "N")]
    pub login_rpm: String,

    /// The largest body of a request, in bytes: 1024 to 16777216.
    #[arg(
        long,
        env = "QUOTA_BODY_LIMIT",
        default_value = "65536",
        value_name = "BYTES"
    )]
    pub body_limit: String,

    /// How long a request's header fields may take to arrive, and then its body, such as 5s.
    #[arg(
        long,
        env = "QUOTA_HEADER_TIMEOUT",
        default_value = "5s",
        value_name = "DURATION"
    )]
    pub header_timeout: String,

    /// How long a request may take from its last header field to its answer, such as 10s.
    #[arg(
        long,
        env = "QUOTA_REQUEST_TIMEOUT",
        default_value = "10s",
        value_name = "DURATION"
    )]
    pub request_timeout: String,

    /// How long a stopping server waits for requests in flight, such as 20s; at most 25s.
    #[arg(
        long,
        env = "QUOTA_DRAIN_TIMEOUT",
        default_value = "20s",
        value_name = "DURATION"
    )]
    pub drain_timeout: String,

    /// How long a stopping server still takes requests after it says that it is not ready, so that a load
    /// balancer learns of it, such as 5s.
    #[arg(
        long,
        env = "QUOTA_DRAIN_DELAY",
        default_value = "0s",
        value_name = "DURATION"
    )]
    pub drain_delay: String,

    /// For how long a key is still served that cannot be confirmed because PostgreSQL is away, such as 60s.
    #[arg(
        long,
        env = "QUOTA_STALE_GRACE",
        default_value = "60s",
        value_name = "DURATION"
    )]
    pub stale_grace: String,

    /// How many API keys are remembered: 1000 to 10000000. One takes about 1 kB.
    #[arg(
        long,
        env = "QUOTA_KEY_CACHE",
        default_value = "100000",
        value_name = "N"
    )]
    pub key_cache: String,

    /// How long a sign-in lasts without use, in days: 1 to 365.
    #[arg(
        long,
        env = "QUOTA_SESSION_DAYS",
        default_value = "14",
        value_name = "DAYS"
    )]
    pub session_days: String,

    /// How logs are written: json or text.
    #[arg(
        long,
        env = "QUOTA_LOG_FORMAT",
        default_value = "json",
        value_name = "FORMAT"
    )]
    pub log_format: String,

    /// What is logged, as directives of the tracing crate, such as info,quota_server=debug.
    #[arg(
        long,
        env = "RUST_LOG",
        default_value = "info",
        value_name = "DIRECTIVES"
    )]
    pub log: String,
}

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
    /// How many replicas the operator runs.
    pub replicas: usize,
    pub migrate: bool,
    pub secret: Option<SecretString>,
    pub secret_previous: Option<SecretString>,
    pub allowed_origins: Vec<String>,
    pub trusted_proxies: Vec<IpNet>,
    pub auth_rpm: u32,
    pub admin_rpm: u32,
    pub login_rpm: u32,
    pub body_limit: usize,
    pub header_timeout: Duration,
    pub request_timeout: Duration,
    pub drain_timeout: Duration,
    pub drain_delay: Duration,
    pub stale_grace: Duration,
    pub key_cache: usize,
    pub session_days: u32,
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

/// Collects faults while reading on, so that all are told at once.
struct Reader(Vec<String>);

impl Reader {
    fn read<T>(
        &mut self,
        variable: &str,
        text: &str,
        fallback: T,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> T {
        match parse(text.trim()) {
            Ok(value) => value,
            Err(message) => {
                self.0.push(format!("{variable}: {message}, is {text:?}"));
                fallback
            }
        }
    }

    fn number(&mut self, variable: &str, text: &str, range: std::ops::RangeInclusive<u64>) -> u64 {
        self.read(variable, text, *range.start(), |text| {
            text.parse()
                .ok()
                .filter(|n| range.contains(n))
                .ok_or_else(|| {
                    format!(
                        "must be a whole number from {} to {}",
                        range.start(),
                        range.end()
                    )
                })
        })
    }

    fn per_minute(&mut self, variable: &str, text: &str) -> u32 {
        u32::try_from(self.number(variable, text, 0..=1_000_000)).unwrap_or_default()
    }

    /// In seconds.
    fn duration(&mut self, variable: &str, text: &str, range: RangeInclusive<u64>) -> Duration {
        let range = Duration::from_secs(*range.start())..=Duration::from_secs(*range.end());
        self.duration_within(variable, text, range)
    }

    fn duration_within(
        &mut self,
        variable: &str,
        text: &str,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        self.read(variable, text, *range.start(), |text| {
            duration(text)
                .filter(|it| range.contains(it))
                .ok_or_else(|| {
                    format!(
                        "must be a duration such as 5s or 500ms, from {:?} to {:?}",
                        range.start(),
                        range.end()
                    )
                })
        })
    }

    fn secret(&mut self, variable: &str, text: &str) -> Option<SecretString> {
        if text.is_empty() {
            return None;
        }
        if text.len() < 32 {
            // Its value is not shown: it may be most of the real one.
            self.0.push(format!(
                "{variable}: must be at least 32 characters long, has {}",
                text.len()
            ));
        }
        Some(SecretString::from(text))
    }
}

fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = if let Some(number) = text.strip_suffix("ms") {
        (number, 1)
    } else if let Some(number) = text.strip_suffix('s') {
        (number, 1000)
    } else {
        (text.strip_suffix('m')?, 60_000)
    };
    let millis = number.trim().parse::<u64>().ok()?.checked_mul(unit)?;
    Some(Duration::from_millis(millis))
}

/// How to reach a database as `postgres://…` or in the keywords of libpq.
fn database_url(text: &str) -> Result<(), String> {
    text.parse::<tokio_postgres::Config>()
        .map(drop)
        .map_err(|error| {
            // Neither the value nor the parser's quote of it: both can hold the password.
            let _ = error;
            "must be a PostgreSQL address such as postgres://user:password@host/database".to_owned()
        })
}

fn public_url(text: &str) -> Result<String, String> {
    let url = Url::parse(text)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let url = url.ok_or("must be an http or https address")?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err("must have no query and no fragment".into());
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

fn origin(text: &str) -> Result<String, String> {
    if text == "*" {
        return Ok(text.to_owned());
    }
    let url = Url::parse(text)
        .map_err(|_| format!("{text:?} is no origin such as https://app.example.com"))?;
    let origin = url.origin();
    if !origin.is_tuple() || url.path() != "/" || url.query().is_some() {
        return Err(format!(
            "{text:?} is no origin such as https://app.example.com"
        ));
    }
    Ok(origin.ascii_serialization())
}

fn list<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    text.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .map(parse)
        .collect()
}

fn prefix(text: &str) -> Result<String, String> {
    // No braces: what stands in them decides where a cluster keeps a key.
    let fits = |c: char| c.is_ascii_alphanumeric() || "_-.:".contains(c);
    if (1..=64).contains(&text.len()) && text.chars().all(fits) {
        Ok(text.to_owned())
    } else {
        Err("must be 1 to 64 letters, digits, _, -, . or :".into())
    }
}

fn boolean(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "must be true or false".to_owned())
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "must be an address and a port such as 127.0.0.1:8080".to_owned())
}

fn network(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from))
        .map_err(|_| format!("{text:?} is no network such as 10.0.0.0/8"))
}

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
            database_url: match s.database_url.as_str() {
                "" => None,
                text => {
                    if let Err(message) = database_url(text) {
                        r.0.push(format!("DATABASE_URL: {message}"));
                    }
                    Some(SecretString::from(text))
                }
            },
            database: {
                let millis = Duration::from_millis;
                let minute = Duration::from_secs(60);
                DatabaseSettings {
                    pool: usize::try_from(r.number(
                        "QUOTA_DATABASE_POOL",
                        &s.database_pool,
                        2..=1000,
                    ))
                    .unwrap_or(2),
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
                let servers = match s.redis_url.trim() {
                    "" => None,
                    text => match redis::servers(text) {
                        Ok(servers) => Some(servers),
                        Err(message) => {
                            r.0.push(format!("REDIS_URL: {message}"));
                            None
                        }
                    },
                };
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
            replicas: usize::try_from(r.number("QUOTA_REPLICAS", &s.replicas, 1..=1000))
                .unwrap_or(1),
            migrate: r.read("QUOTA_MIGRATE", &s.migrate, true, boolean),
            secret: r.secret("QUOTA_SECRET", &s.secret),
            secret_previous: r.secret("QUOTA_SECRET_PREVIOUS", &s.secret_previous),
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
        if config.secret_previous.is_some() && config.secret.is_none() {
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

/// `.env.example`: every variable, with its default and meaning.
pub fn env_example() -> String {
    #[derive(clap::Parser)]
    struct Only {
        #[command(flatten)]
        _settings: Settings,
    }

    let mut text = String::from(
        "# Every setting of Quota, with its default. Written by `quota env-example`; the server reads the\n\
         # environment, not this file. Each variable is also a flag: QUOTA_LISTEN is --listen.\n",
    );
    for arg in Only::command().get_arguments() {
        let Some(variable) = arg.get_env().and_then(|name| name.to_str()) else {
            continue;
        };
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        text.push('\n');
        for line in wrap(&help, 98) {
            text.push_str("# ");
            text.push_str(&line);
            text.push('\n');
        }
        let default = arg
            .get_default_values()
            .first()
            .and_then(|value| value.to_str())
            .unwrap_or_default();
        if default.is_empty() {
            text.push('#');
        }
        text.push_str(variable);
        text.push('=');
        text.push_str(default);
        text.push('\n');
    }
    text
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always a line");
        if line.is_empty() {
            line.push_str(word);
        } else if line.len() + 1 + word.len() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
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
