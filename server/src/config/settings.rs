//! What can be set, as text, and the example of it.

use clap::{Args, CommandFactory};

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

    /// Where the embedded database and its log are kept, and usage that was not written to PostgreSQL yet. Replicas may
    /// share it.
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

    /// A file that holds DATABASE_URL, such as a mounted secret, instead of the variable itself.
    #[arg(
        long,
        env = "DATABASE_URL_FILE",
        default_value = "",
        value_name = "PATH"
    )]
    pub database_url_file: String,

    /// The maximum number of PostgreSQL connections per replica: 6 to 1000. They are divided into five pools that
    /// never wait for each other: invalidations and readiness, the quota ledger, key look-ups (a quarter), usage (one
    /// connection), and everything else.
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

    /// A file that holds REDIS_URL, instead of the variable itself.
    #[arg(long, env = "REDIS_URL_FILE", default_value = "", value_name = "PATH")]
    pub redis_url_file: String,

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
    /// admits its share of the limit), open (each admits all of it) or closed (all are answered 503).
    #[arg(
        long,
        env = "QUOTA_ON_REDIS_FAILURE",
        default_value = "share",
        value_name = "MODE"
    )]
    pub on_redis_failure: String,

    /// Record the usage of API keys: on or off. Each decision is recorded on this machine, in `usage` below
    /// QUOTA_DATA_DIR, before the response is sent, and written to PostgreSQL soon after.
    #[arg(
        long,
        env = "QUOTA_METERING",
        default_value = "on",
        value_name = "MODE"
    )]
    pub metering: String,

    /// What recorded usage survives: process (`kill -9` and crashes of the server) or machine (also power failures).
    /// With machine, each response waits for the disk (fdatasync), together with others.
    #[arg(
        long,
        env = "QUOTA_DURABILITY",
        default_value = "process",
        value_name = "MODE"
    )]
    pub durability: String,

    /// How much disk space recorded usage may take while PostgreSQL is unreachable, in bytes: 1048576 to
    /// 1000000000000. The log warns at half of it. When it is used up, decisions are answered 503. 1 GiB is enough for
    /// about 6,000,000 requests.
    #[arg(
        long,
        env = "QUOTA_USAGE_BACKLOG_MAX",
        default_value = "4294967296",
        value_name = "BYTES"
    )]
    pub usage_backlog_max: String,

    /// How often recorded usage is written to PostgreSQL: 10ms to 60s.
    #[arg(
        long,
        env = "QUOTA_USAGE_SHIP_EVERY",
        default_value = "250ms",
        value_name = "DURATION"
    )]
    pub usage_ship_every: String,

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

    /// Signs access tokens, browser sessions and known devices, and seals what replicas share in Redis: at least 32
    /// random characters, the same on every replica. Unset: generated once and kept in the database. To rotate it
    /// without signing anyone out: (1) set the new secret as QUOTA_SECRET_PREVIOUS on every replica, (2) swap the two,
    /// (3) remove QUOTA_SECRET_PREVIOUS after QUOTA_SESSION_DAYS.
    #[arg(
        long,
        env = "QUOTA_SECRET",
        default_value = "",
        value_name = "SECRET",
        hide_env_values = true
    )]
    pub secret: String,

    /// A file that holds QUOTA_SECRET, instead of the variable itself.
    #[arg(
        long,
        env = "QUOTA_SECRET_FILE",
        default_value = "",
        value_name = "PATH"
    )]
    pub secret_file: String,

    /// A second secret, which is accepted but not used for anything new: the QUOTA_SECRET from before the last rotation,
    /// or the one to come.
    #[arg(
        long,
        env = "QUOTA_SECRET_PREVIOUS",
        default_value = "",
        value_name = "SECRET",
        hide_env_values = true
    )]
    pub secret_previous: String,

    /// A file that holds QUOTA_SECRET_PREVIOUS, instead of the variable itself.
    #[arg(
        long,
        env = "QUOTA_SECRET_PREVIOUS_FILE",
        default_value = "",
        value_name = "PATH"
    )]
    pub secret_previous_file: String,

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

    /// Who may create an account: open (anyone) or closed (only the operator, with `quota user create`).
    #[arg(
        long,
        env = "QUOTA_REGISTRATION",
        default_value = "open",
        value_name = "MODE"
    )]
    pub registration: String,

    /// The page at /: full (about Quota) or door (only signing in and the API docs, for your own customers).
    #[arg(
        long,
        env = "QUOTA_LANDING",
        default_value = "full",
        value_name = "PAGE"
    )]
    pub landing: String,

    /// Your name, at most 100 characters: the title of the page at / with QUOTA_LANDING=door. Default: Quota.
    #[arg(
        long,
        env = "QUOTA_OPERATOR_NAME",
        default_value = "",
        value_name = "NAME"
    )]
    pub operator_name: String,

    /// How many plans one tenant may have: 1 to 1000000.
    #[arg(
        long,
        env = "QUOTA_MAX_PLANS",
        default_value = "1000",
        value_name = "N"
    )]
    pub max_plans: String,

    /// How many API keys one tenant may have: 1 to 10000000.
    #[arg(
        long,
        env = "QUOTA_MAX_API_KEYS",
        default_value = "100000",
        value_name = "N"
    )]
    pub max_api_keys: String,

    /// How many service tokens one tenant may have: 1 to 1000000.
    #[arg(
        long,
        env = "QUOTA_MAX_SERVICE_TOKENS",
        default_value = "1000",
        value_name = "N"
    )]
    pub max_service_tokens: String,

    /// Requests a minute from one client address to /auth; 0 for no limit.
    #[arg(long, env = "QUOTA_AUTH_RPM", default_value = "60", value_name = "N")]
    pub auth_rpm: String,

    /// Requests a minute from one client address to /admin; 0 for no limit.
    #[arg(long, env = "QUOTA_ADMIN_RPM", default_value = "300", value_name = "N")]
    pub admin_rpm: String,

    /// Failed sign-ins to one account from one network, after which each further try has to wait longer; wider
    /// networks and networks that try many accounts have more. Known devices are counted separately. 0 for no limit.
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

    /// How long the header fields of a request may take to arrive, and then its body, such as 5s. For the first
    /// request, measured from the moment the connection was accepted.
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

    /// How long a client connection may be idle between two requests, such as 75s. Set it longer than proxies keep
    /// idle connections to Quota.
    #[arg(
        long,
        env = "QUOTA_IDLE_TIMEOUT",
        default_value = "75s",
        value_name = "DURATION"
    )]
    pub idle_timeout: String,

    /// How long a client may go without reading any of a response that is being sent, such as 30s. On HTTP/2, less
    /// than 1 KiB counts as nothing.
    #[arg(
        long,
        env = "QUOTA_WRITE_TIMEOUT",
        default_value = "30s",
        value_name = "DURATION"
    )]
    pub write_timeout: String,

    /// The maximum number of open client connections: 16 to 1000000. The limit of open files may allow fewer. When
    /// it is reached, connections that have not sent a request are closed first, then idle ones, then those whose
    /// client does not read its response.
    #[arg(
        long,
        env = "QUOTA_CONNECTIONS",
        default_value = "10000",
        value_name = "N"
    )]
    pub connections: String,

    /// The maximum number of open connections from one client address (IPv6: one /64); 0 for no limit. Connections
    /// on which a valid API key or service token was sent don't count, nor do those of QUOTA_TRUSTED_PROXIES.
    #[arg(
        long,
        env = "QUOTA_CONNECTIONS_PER_ADDRESS",
        default_value = "1000",
        value_name = "N"
    )]
    pub connections_per_address: String,

    /// The maximum number of open connections from one network (IPv4: one /24, IPv6: one /56; an IPv6 /48 may have
    /// twice as many); 0 for no limit. Counted like QUOTA_CONNECTIONS_PER_ADDRESS.
    #[arg(
        long,
        env = "QUOTA_CONNECTIONS_PER_NETWORK",
        default_value = "2500",
        value_name = "N"
    )]
    pub connections_per_network: String,

    /// The maximum number of concurrent look-ups of API keys that are not in memory, and as many of service tokens: 1
    /// to 100000. Once it is reached, each client still gets an equal share of it, and further look-ups are answered
    /// 503; keys in memory are not affected.
    #[arg(
        long,
        env = "QUOTA_KEY_LOOKUPS",
        default_value = "1000",
        value_name = "N"
    )]
    pub key_lookups: String,

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

    /// How many days the log of decisions is kept: 2 to 3650. A day of 10 million requests takes about 4 GB.
    #[arg(
        long,
        env = "QUOTA_USAGE_RETENTION",
        default_value = "90",
        value_name = "DAYS"
    )]
    pub usage_retention: String,

    /// How many days usage is kept as totals for each quarter of an hour and each day: 2 to 3650.
    #[arg(
        long,
        env = "QUOTA_USAGE_ROLLUP_RETENTION",
        default_value = "400",
        value_name = "DAYS"
    )]
    pub usage_rollup_retention: String,

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

#[derive(clap::Parser)]
struct Only {
    #[command(flatten)]
    _settings: Settings,
}

/// The name of every variable.
pub(super) fn variables() -> Vec<String> {
    let command = Only::command();
    let names = command
        .get_arguments()
        .filter_map(|arg| arg.get_env()?.to_str());
    names.map(str::to_owned).collect()
}

/// `.env.example`: every variable, with its default and meaning.
pub fn env_example() -> String {
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
