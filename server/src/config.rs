//! Settings, from environment variables and command-line flags.
//!
//! [`Settings`] contains each setting as text, and [`Config`] contains the parsed values. All settings are parsed at
//! startup. If any setting is invalid, the server does not start, and reports one error per line, with the name of the
//! variable. No other part of the server reads the environment.

mod environment;
mod example;
mod mail;
mod read;
mod reader;
pub mod redis;
mod settings;
#[cfg(test)]
mod tests;
mod traces;

use std::{net::SocketAddr, num::NonZeroU64, path::PathBuf, time::Duration};

use ipnet::IpNet;
use lettre::message::Mailbox;
use quota_common::plan::OnRedisFailure;
use secrecy::{ExposeSecret, SecretString};

pub use self::{
    environment::unknown_variables,
    example::{env_example, variables},
    redis::{RedisServers, RedisSettings},
    settings::Settings,
};

/// The parsed settings. [`Settings`] documents them.
#[derive(Clone)]
pub struct Config {
    pub listen: SocketAddr,
    pub metrics_listen: Option<SocketAddr>,
    pub grpc_listen: Option<SocketAddr>,
    /// The URL at which clients reach the server, without a trailing slash.
    pub public_url: String,
    pub data_dir: PathBuf,
    /// `None` means that the server runs its private PostgreSQL.
    pub database_url: Option<SecretString>,
    pub database: DatabaseSettings,
    /// `None` means a single replica, with its counters in memory.
    pub redis: Option<RedisSettings>,
    pub lease_ttl: Duration,
    pub on_redis_failure: OnRedisFailure,
    pub metering: bool,
    pub durability: Durability,
    /// The maximum size of the backlog, in bytes.
    pub usage_backlog_max: u64,
    pub usage_ship_every: Duration,
    pub replicas: usize,
    pub migrate: bool,
    pub secret: Option<SecretString>,
    pub secret_previous: Option<SecretString>,
    pub registration: Registration,
    pub landing: Landing,
    pub allowances: Allowances,
    pub free_tier: FreeTier,
    pub allowed_origins: Vec<String>,
    pub trusted_proxies: Vec<IpNet>,
    pub auth_rpm: u32,
    pub admin_rpm: u32,
    pub login_free_failures: u32,
    pub registrations_per_day: u32,
    pub alert_emails_per_hour: u32,
    pub body_limit: usize,
    pub header_timeout: Duration,
    pub request_timeout: Duration,
    pub idle_timeout: Duration,
    pub write_timeout: Duration,
    /// Whether plain check requests get direct responses.
    pub direct_responses: bool,
    pub connections: usize,
    /// The maximum number of connections per address. 0 means no limit.
    pub connections_per_address: usize,
    /// The maximum number of connections per IPv4 /24 or IPv6 /56. An IPv6 /48 may have twice as many. 0 means no
    /// limit.
    pub connections_per_network: usize,
    pub key_lookups: usize,
    pub drain_timeout: Duration,
    pub drain_delay: Duration,
    pub stale_grace: Duration,
    pub key_cache: usize,
    pub session_days: u32,
    /// How long the usage log is kept, in whole days.
    pub usage_retention: Duration,
    /// How long the usage rollups are kept, in whole days.
    pub usage_rollup_retention: Duration,
    /// `None` if billing is off.
    pub stripe: Option<StripeSettings>,
    pub mail: MailSettings,
    /// Non-public networks to which webhooks may be sent.
    pub webhook_private_networks: Vec<IpNet>,
    pub log_format: LogFormat,
    pub log: String,
    /// `None` if requests are not traced.
    pub traces: Option<TraceSettings>,
    /// Cannot be configured. Tests use a lower cost.
    pub password_cost: PasswordCost,
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Only the fields listed here are printed, so that a new field with a secret is not printed by accident.
        f.debug_struct("Config")
            .field("listen", &self.listen)
            .field("metrics_listen", &self.metrics_listen)
            .field("grpc_listen", &self.grpc_listen)
            .field("public_url", &self.public_url)
            .field("data_dir", &self.data_dir)
            .field("embedded", &self.database_url.is_none())
            .field("database", &self.database)
            .field("redis", &self.redis)
            .field("trusted_proxies", &self.trusted_proxies)
            .finish_non_exhaustive()
    }
}

/// Settings for billing through Stripe.
#[derive(Clone)]
pub struct StripeSettings {
    pub secret_key: SecretString,
    /// The accepted webhook secrets. There are several during a rotation, and if Stripe also sends events to an event
    /// destination.
    pub webhook_secrets: Vec<SecretString>,
    /// The base URL of the Stripe API, without a trailing slash. `None` means Stripe's own API.
    pub api_base: Option<String>,
    /// How long a past-due subscription keeps its access.
    pub grace: Duration,
}

impl StripeSettings {
    /// Returns whether the secret key is for live mode, in which real money is charged.
    pub fn is_live(&self) -> bool {
        self.secret_key.expose_secret().contains("_live_")
    }
}

/// Settings for outgoing email.
#[derive(Clone)]
pub struct MailSettings {
    /// `None` means that emails are written to files.
    pub smtp: Option<SmtpSettings>,
    pub from: Mailbox,
}

/// Settings for OpenTelemetry traces.
#[derive(Clone)]
pub struct TraceSettings {
    /// The collector's base URL, without a trailing slash.
    pub endpoint: String,
    /// Additional request headers, which may contain credentials.
    pub headers: Vec<(String, SecretString)>,
    pub service_name: String,
    /// The fraction of requests that are traced, from 0 to 1.
    pub ratio: f64,
}

/// The server to which emails are sent.
#[derive(Clone)]
pub struct SmtpSettings {
    pub host: String,
    pub port: u16,
    pub tls: SmtpTls,
    /// The user and the password.
    pub credentials: Option<(String, SecretString)>,
}

/// How the connection to the mail server is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SmtpTls {
    /// The connection is encrypted from the start.
    Implicit,
    /// The connection is encrypted after the `STARTTLS` command. If that fails, nothing is sent.
    StartTls,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Json,
    Text,
}

/// The failures that recorded usage survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Recorded usage survives crashes of the process.
    Process,
    /// Recorded usage also survives failures of the machine.
    Machine,
}

/// Who may create accounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registration {
    Open,
    /// Only the operator may create accounts.
    Closed,
}

/// The page at `/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Landing {
    /// A page about Quota, for potential operators.
    Full,
    /// A page for the operator's customers: the operator's name, and links to sign in and to the API docs.
    Door { operator: String },
}

impl Registration {
    pub const fn is_open(self) -> bool {
        matches!(self, Self::Open)
    }
}

/// The maximum number of resources of each kind per tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowances {
    pub plans: u64,
    pub api_keys: u64,
    pub service_tokens: u64,
    pub webhooks: u64,
}

/// Limits for tenants without a subscription, and for free plans. `None` means that there is no separate limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FreeTier {
    pub plans: Option<u64>,
    pub api_keys: Option<u64>,
    /// Requests per calendar month (UTC) across all keys. Also the maximum daily quota and the maximum monthly quota of
    /// a free plan.
    pub requests_per_month: Option<NonZeroU64>,
    /// The maximum rate and burst of a free plan.
    pub rpm: Option<u32>,
}

/// The number of PostgreSQL connections per replica, and timeouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatabaseSettings {
    /// The maximum number of connections.
    pub pool: usize,
    /// How long to wait for a free connection.
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

/// The cost of one argon2id hash. The default is the OWASP recommendation for a single pass.
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

/// Why the settings are invalid. Each error is one line that starts with the variable's name.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigErrors(pub Vec<String>);

impl Config {
    /// Sets the addresses that the server listens on. They differ from the settings if a configured port is 0. Updates
    /// the public URL too if it is the default, `http://` followed by the configured address.
    pub fn listens_on(
        &mut self,
        listen: SocketAddr,
        metrics_listen: Option<SocketAddr>,
        grpc_listen: Option<SocketAddr>,
    ) {
        if self.public_url == format!("http://{}", self.listen) {
            self.public_url = format!("http://{listen}");
        }
        self.listen = listen;
        self.metrics_listen = metrics_listen;
        self.grpc_listen = grpc_listen;
    }

    pub fn secret_bytes(secret: &SecretString) -> &[u8] {
        secret.expose_secret().as_bytes()
    }
}
