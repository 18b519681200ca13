//! Every setting, as text. `--help` and `.env.example` show the doc comments.

use clap::Args;

/// Defines [`Settings`]: each field with its description, its variable, its default and the name of its value.
macro_rules! settings {
    ($(
        $(#[$description:meta])+
        $field:ident: $variable:literal, $default:literal, $value:literal
        $(, $option:ident = $on:literal)?;
    )+) => {
        /// Every setting. Each field is an environment variable and a flag.
        #[derive(Args, Clone, Default)]
        #[command(next_help_heading = "Settings (each can also be an environment variable)")]
        pub struct Settings {
            $(
                $(#[$description])+
                #[arg(
                    long,
                    env = $variable,
                    default_value = $default,
                    value_name = $value
                    $(, $option = $on)?
                )]
                pub $field: String,
            )+
        }
    };
}

settings! {
    /// The address that the API listens on.
    listen: "QUOTA_LISTEN", "127.0.0.1:8080", "ADDR";

    /// The address at which /metrics (OpenMetrics text, for Prometheus) is served, or `off`. Do not expose this address
    /// publicly.
    metrics_listen: "QUOTA_METRICS_LISTEN", "127.0.0.1:9090", "ADDR";

    /// The address that Envoy's rate limit service (gRPC) listens on, or `off`. The service does not use TLS, so use an
    /// address in a private network.
    grpc_listen: "QUOTA_GRPC_LISTEN", "off", "ADDR";

    /// The URL at which clients reach the server. Error responses link to pages under this URL. Default: http://
    /// followed by QUOTA_LISTEN.
    public_url: "QUOTA_PUBLIC_URL", "", "URL";

    /// The directory for the private PostgreSQL and its log, and for usage that has not been written to PostgreSQL yet.
    /// Replicas may share one directory.
    data_dir: "QUOTA_DATA_DIR", "./.quota", "DIR";

    /// The PostgreSQL database, as postgres://user:password@host/database. Percent-encode special characters in the
    /// user name and the password. Unset: the server runs a private PostgreSQL in QUOTA_DATA_DIR, with the PostgreSQL
    /// programs installed on the machine.
    database_url: "DATABASE_URL", "", "URL", hide_env_values = true;

    /// A file that contains the value of DATABASE_URL, such as a mounted secret. Set either this variable or
    /// DATABASE_URL.
    database_url_file: "DATABASE_URL_FILE", "", "PATH";

    /// The maximum number of PostgreSQL connections per replica: 6 to 1000. The connections are divided into five pools
    /// that never wait for each other: invalidations and readiness, the quota ledger, key lookups (a quarter), usage
    /// (one connection), and everything else.
    database_pool: "QUOTA_DATABASE_POOL", "16", "N";

    /// How long a request waits for a free PostgreSQL connection before it gets 503: 10ms to 10s.
    database_wait: "QUOTA_DATABASE_WAIT", "500ms", "DURATION";

    /// How long connecting to PostgreSQL may take: 100ms to 30s.
    database_connect_timeout: "QUOTA_DATABASE_CONNECT_TIMEOUT", "2s", "DURATION";

    /// How long PostgreSQL may run one statement (statement_timeout): 100ms to 60s.
    database_statement_timeout: "QUOTA_DATABASE_STATEMENT_TIMEOUT", "2s", "DURATION";

    /// How long a statement may wait for a lock (lock_timeout): 100ms to 60s.
    database_lock_timeout: "QUOTA_DATABASE_LOCK_TIMEOUT", "1s", "DURATION";

    /// The Redis server through which replicas share their counters: redis://user:password@host:port/db; with Sentinel,
    /// redis+sentinel://user:password@host:port,host:port/group/db; with Redis Cluster, redis://host:port,host:port.
    /// With rediss instead of redis, connections use TLS; valkey is a synonym for redis. Percent-encode special
    /// characters in the user name and the password. Unset: counters are kept in memory, for a single replica.
    redis_url: "REDIS_URL", "", "URL", hide_env_values = true;

    /// A file that contains the value of REDIS_URL. Set either this variable or REDIS_URL.
    redis_url_file: "REDIS_URL_FILE", "", "PATH";

    /// The prefix of every key and channel in Redis: 1 to 64 letters, digits, `_`, `-`, `.` or `:`. Use the same prefix
    /// on every replica. If several installations share a Redis server, each needs a different prefix.
    redis_prefix: "QUOTA_REDIS_PREFIX", "quota", "TEXT";

    /// The number of Redis connections per replica, not counting the one for messages: 1 to 64. Each connection can
    /// carry many concurrent calls.
    redis_connections: "QUOTA_REDIS_CONNECTIONS", "2", "N";

    /// How long a call to Redis may take before it counts as failed: 1ms to 5s. A decision waits for at most twice this
    /// time before QUOTA_ON_REDIS_FAILURE applies.
    redis_timeout: "QUOTA_REDIS_TIMEOUT", "30ms", "DURATION";

    /// How long connecting to Redis may take: 10ms to 10s.
    redis_connect_timeout: "QUOTA_REDIS_CONNECT_TIMEOUT", "250ms", "DURATION";

    /// How long a replica may spend tokens that it has taken from Redis: 0ms to 1s. With 0ms, replicas take no tokens
    /// in advance, as with a strict plan.
    lease_ttl: "QUOTA_LEASE_TTL", "100ms", "DURATION";

    /// What happens to requests while Redis is unreachable, for plans without their own setting: share (each replica
    /// enforces its share of the limit), open (each replica enforces the full limit) or closed (check requests get
    /// 503).
    on_redis_failure: "QUOTA_ON_REDIS_FAILURE", "share", "MODE";

    /// Whether to record the usage of API keys: on or off. Decisions are recorded on this machine, in the `usage`
    /// directory in QUOTA_DATA_DIR, before the responses are sent, and are written to PostgreSQL soon after.
    metering: "QUOTA_METERING", "on", "MODE";

    /// The failures that recorded usage survives: process (`kill -9` and crashes of the server) or machine (power
    /// failures too). With machine, each response waits for the disk (fdatasync); waiting requests share one call.
    durability: "QUOTA_DURABILITY", "process", "MODE";

    /// The maximum disk space for recorded usage while PostgreSQL is unreachable, in bytes: 1048576 to 1000000000000.
    /// When half of this space is used, the server logs a warning, and records only a limited number of each tenant's
    /// denials. When all of it is used, check requests get 503. 1 GiB is enough for about 6,000,000 requests.
    usage_backlog_max: "QUOTA_USAGE_BACKLOG_MAX", "4294967296", "BYTES";

    /// How often recorded usage is written to PostgreSQL: 10ms to 60s.
    usage_ship_every: "QUOTA_USAGE_SHIP_EVERY", "250ms", "DURATION";

    /// The number of replicas: 1 to 1000. `quota doctor` checks that PostgreSQL allows enough connections for all of
    /// them.
    replicas: "QUOTA_REPLICAS", "1", "N";

    /// Whether to apply pending migrations at startup: true or false. One replica applies the migrations while the
    /// others wait.
    migrate: "QUOTA_MIGRATE", "true", "BOOL";

    /// The secret that signs access tokens, browser sessions and known devices, authenticates data that replicas share
    /// in Redis, and encrypts webhook signing secrets: at least 32 random characters, the same on every replica. Unset:
    /// the server generates a secret once and keeps it in the database. To rotate the secret without signing anyone
    /// out, (1) set the new secret as QUOTA_SECRET_PREVIOUS on every replica, (2) swap the two secrets, and (3) remove
    /// QUOTA_SECRET_PREVIOUS once QUOTA_SESSION_DAYS days have passed.
    secret: "QUOTA_SECRET", "", "SECRET", hide_env_values = true;

    /// A file that contains the value of QUOTA_SECRET. Set either this variable or QUOTA_SECRET.
    secret_file: "QUOTA_SECRET_FILE", "", "PATH";

    /// A second secret that is accepted but not used for new signatures or encryption: the QUOTA_SECRET before or after
    /// the rotation in progress.
    secret_previous: "QUOTA_SECRET_PREVIOUS", "", "SECRET", hide_env_values = true;

    /// A file that contains the value of QUOTA_SECRET_PREVIOUS. Set either this variable or QUOTA_SECRET_PREVIOUS.
    secret_previous_file: "QUOTA_SECRET_PREVIOUS_FILE", "", "PATH";

    /// Origins whose web pages may call the API (CORS), separated by commas, such as `https://app.example.com`. `*`
    /// means all origins. These pages may read the rate-limit headers, but their requests cannot use cookies.
    allowed_origins: "ALLOWED_ORIGINS", "", "ORIGINS";

    /// Networks of proxies whose X-Forwarded-For and traceparent headers are trusted, separated by commas, such as
    /// 10.0.0.0/8.
    trusted_proxies: "QUOTA_TRUSTED_PROXIES", "", "CIDRS";

    /// Who may create an account: open (anyone) or closed (only the operator, with `quota user create`).
    registration: "QUOTA_REGISTRATION", "open", "MODE";

    /// The page at /: full (about Quota) or door (a short page for your own customers, with links to sign in and to the
    /// API docs).
    landing: "QUOTA_LANDING", "full", "PAGE";

    /// Your name, at most 100 characters. With QUOTA_LANDING=door, it is the title of the page at /. Default: Quota.
    operator_name: "QUOTA_OPERATOR_NAME", "", "NAME";

    /// The maximum number of plans per tenant: 1 to 1000000.
    max_plans: "QUOTA_MAX_PLANS", "1000", "N";

    /// The maximum number of API keys per tenant: 1 to 10000000.
    max_api_keys: "QUOTA_MAX_API_KEYS", "100000", "N";

    /// The maximum number of service tokens per tenant: 1 to 1000000.
    max_service_tokens: "QUOTA_MAX_SERVICE_TOKENS", "1000", "N";

    /// The maximum number of webhooks per tenant: 1 to 100.
    max_webhooks: "QUOTA_MAX_WEBHOOKS", "10", "N";

    /// The maximum number of plans for a tenant without a subscription: 1 to 1000000. Unset: QUOTA_MAX_PLANS. If
    /// billing is off, this limit and the other QUOTA_FREE_* limits apply to every tenant.
    free_plans: "QUOTA_FREE_PLANS", "", "N";

    /// The maximum number of API keys for a tenant without a subscription: 1 to 10000000. Unset: QUOTA_MAX_API_KEYS.
    free_keys: "QUOTA_FREE_KEYS", "", "N";

    /// The maximum number of requests per calendar month (UTC) for a tenant without a subscription, across all its API
    /// keys: 1 to 1000000000000. Further requests are denied by the tenant_monthly policy. Unset: no limit. Plans with
    /// a higher daily or monthly quota must be marked `paid`.
    free_requests_per_month: "QUOTA_FREE_REQUESTS_PER_MONTH", "", "N";

    /// The maximum rate (requests per minute) and burst of plans that are not marked `paid`: 1 to 60000000. Unset: no
    /// limit.
    free_rpm: "QUOTA_FREE_RPM", "", "N";

    /// The maximum number of requests per minute from one client address to /auth; 0 for no limit.
    auth_rpm: "QUOTA_AUTH_RPM", "60", "N";

    /// The maximum number of requests per minute from one client address to /admin and /billing combined, not counting
    /// webhooks from Stripe; 0 for no limit.
    admin_rpm: "QUOTA_ADMIN_RPM", "300", "N";

    /// The number of failed sign-ins to one account that are allowed from one network. After that, each further attempt
    /// has to wait longer. Wider networks have higher limits. A network's attempts are also limited across all
    /// accounts. Attempts from known devices are counted separately. 0 for no limit.
    login_free_failures: "QUOTA_LOGIN_FREE_FAILURES", "10", "N";

    /// The number of accounts that one network can create in a burst, and on average per day. A network is an IPv4
    /// address or an IPv6 /64; wider networks have higher limits. 0 for no limit.
    registrations_per_day: "QUOTA_REGISTRATIONS_PER_DAY", "20", "N";

    /// The maximum size of a request body, in bytes: 1024 to 16777216.
    body_limit: "QUOTA_BODY_LIMIT", "65536", "BYTES";

    /// How long the headers of a request may take to arrive, and how long its body may then take. For the first request
    /// on a connection, the time starts when the connection is accepted.
    header_timeout: "QUOTA_HEADER_TIMEOUT", "5s", "DURATION";

    /// How long a request may take from the end of its headers to its response.
    request_timeout: "QUOTA_REQUEST_TIMEOUT", "10s", "DURATION";

    /// How long a client connection may be idle between two requests. Must be longer than the idle timeout of proxies
    /// in front of Quota.
    idle_timeout: "QUOTA_IDLE_TIMEOUT", "75s", "DURATION";

    /// How long a client may go without reading any part of a response that is being sent. If the client reads less
    /// than 32 KiB, the server may not notice. On HTTP/2, the server ignores reads of less than 1 KiB.
    write_timeout: "QUOTA_WRITE_TIMEOUT", "30s", "DURATION";

    /// Whether to respond to simple check requests directly, without the general HTTP server: on or off. The responses
    /// are the same, but take less CPU time.
    direct_responses: "QUOTA_DIRECT_RESPONSES", "on", "MODE";

    /// The maximum number of open client connections: 16 to 1000000. The open-file limit may allow fewer. When the
    /// maximum is reached, connections that have not sent a request are closed first, then idle connections, and then
    /// connections whose clients do not read their responses.
    connections: "QUOTA_CONNECTIONS", "10000", "N";

    /// The maximum number of open connections from one client address (IPv6: one /64); 0 for no limit. The limit does
    /// not apply to connections on which a valid API key or service token was sent, or to connections from
    /// QUOTA_TRUSTED_PROXIES.
    connections_per_address: "QUOTA_CONNECTIONS_PER_ADDRESS", "1000", "N";

    /// The maximum number of open connections from one network (IPv4: one /24, IPv6: one /56); 0 for no limit. An IPv6
    /// /48 may have twice as many connections. The limit does not apply to the connections that are exempt from
    /// QUOTA_CONNECTIONS_PER_ADDRESS.
    connections_per_network: "QUOTA_CONNECTIONS_PER_NETWORK", "2500", "N";

    /// The number of concurrent lookups of API keys that are not in memory, from which each client is limited to an
    /// equal share: 1 to 100000. At most twice this number are in progress in total. Further lookups get 503. Service
    /// tokens have a separate limit of the same size. Requests with cached keys are not affected.
    key_lookups: "QUOTA_KEY_LOOKUPS", "1000", "N";

    /// How long the server waits for requests in flight when it stops: at most 25s, and at most 28s together with
    /// QUOTA_DRAIN_DELAY.
    drain_timeout: "QUOTA_DRAIN_TIMEOUT", "20s", "DURATION";

    /// How long the server continues to accept requests after SIGTERM, although it already reports that it is not
    /// ready: at most 20s. This delay gives load balancers time to stop sending requests.
    drain_delay: "QUOTA_DRAIN_DELAY", "0s", "DURATION";

    /// How long cached keys keep working while PostgreSQL is unreachable.
    stale_grace: "QUOTA_STALE_GRACE", "60s", "DURATION";

    /// The number of API keys cached in memory: 1000 to 10000000. Each cached key takes about 450 bytes, or 800 bytes
    /// if it has a daily and a monthly quota.
    key_cache: "QUOTA_KEY_CACHE", "100000", "N";

    /// How many days until an unused session expires: 1 to 365.
    session_days: "QUOTA_SESSION_DAYS", "14", "DAYS";

    /// How many days the usage log is kept: 2 to 3650. 10 million requests take about 4 GB.
    usage_retention: "QUOTA_USAGE_RETENTION", "90", "DAYS";

    /// How many days usage rollups (totals per 15 minutes and per day) are kept: 2 to 3650.
    usage_rollup_retention: "QUOTA_USAGE_ROLLUP_RETENTION", "400", "DAYS";

    /// Your Stripe secret key, which starts with `sk_` or `rk_`. If the key is set, plans marked `paid` require a
    /// subscription. `quota billing setup` creates the required objects in Stripe. Unset: billing is off, and plans
    /// marked `paid` work like other plans.
    stripe_secret_key: "STRIPE_SECRET_KEY", "", "SECRET", hide_env_values = true;

    /// A file that contains the value of STRIPE_SECRET_KEY. Set either this variable or STRIPE_SECRET_KEY.
    stripe_secret_key_file: "STRIPE_SECRET_KEY_FILE", "", "PATH";

    /// The Stripe webhook endpoint's signing secret, which starts with `whsec_`. Separate several secrets, for example
    /// during a rotation, with commas. If STRIPE_SECRET_KEY is set, `quota serve` requires this setting.
    stripe_webhook_secret: "STRIPE_WEBHOOK_SECRET", "", "SECRET", hide_env_values = true;

    /// A file that contains the value of STRIPE_WEBHOOK_SECRET. Set either this variable or STRIPE_WEBHOOK_SECRET.
    stripe_webhook_secret_file: "STRIPE_WEBHOOK_SECRET_FILE", "", "PATH";

    /// The base URL of the Stripe API. Only tests need to change it. Default: `https://api.stripe.com`.
    stripe_api_base: "STRIPE_API_BASE", "", "URL";

    /// How many days plans marked `paid` keep working after a payment has failed, while Stripe retries the payment: 0
    /// to 90.
    billing_grace: "QUOTA_BILLING_GRACE", "7", "DAYS";

    /// The mail server that sends emails: smtps://user:password@host (TLS, port 465) or smtp://user:password@host
    /// (STARTTLS, port 587), optionally with :port. Percent-encode special characters in the user name and the
    /// password. With smtp:// and a loopback address, the connection is not encrypted. Unset: emails are written to
    /// files in the `mail` directory in QUOTA_DATA_DIR.
    smtp_url: "SMTP_URL", "", "URL", hide_env_values = true;

    /// A file that contains the value of SMTP_URL. Set either this variable or SMTP_URL.
    smtp_url_file: "SMTP_URL_FILE", "", "PATH";

    /// The sender of emails, such as Quota <quota@example.com>. Required with SMTP_URL.
    mail_from: "QUOTA_MAIL_FROM", "", "ADDRESS";

    /// The number of alert emails within an hour, to all tenants together, after which further alerts wait. These
    /// alerts are combined in later emails. 0 for no limit.
    alert_emails_per_hour: "QUOTA_ALERT_EMAILS_PER_HOUR", "1000", "N";

    /// Private networks to which tenants may send webhooks, separated by commas, such as 10.1.0.0/16. URLs that start
    /// with http:// are allowed only in these networks. Tenants choose the URLs, so list only networks whose services
    /// tenants may reach.
    webhook_private_networks: "QUOTA_WEBHOOK_PRIVATE_NETWORKS", "", "CIDRS";

    /// The format of logs: json or text.
    log_format: "QUOTA_LOG_FORMAT", "json", "FORMAT";

    /// The log filter, as tracing directives such as info,quota_server=debug.
    log: "RUST_LOG", "info", "DIRECTIVES";

    /// The OpenTelemetry collector to which traces are sent (OTLP over HTTP, as protobuf), such as
    /// http://collector:4318. The server appends /v1/traces. Unset: requests are not traced.
    otel_exporter_otlp_endpoint: "OTEL_EXPORTER_OTLP_ENDPOINT", "", "URL";

    /// Headers of requests to the collector, separated by commas, such as api-key=secret. Percent-encode special
    /// characters in values.
    otel_exporter_otlp_headers: "OTEL_EXPORTER_OTLP_HEADERS", "", "HEADERS", hide_env_values = true;

    /// A file that contains the value of OTEL_EXPORTER_OTLP_HEADERS. Set either this variable or
    /// OTEL_EXPORTER_OTLP_HEADERS.
    otel_exporter_otlp_headers_file: "OTEL_EXPORTER_OTLP_HEADERS_FILE", "", "PATH";

    /// The name of the service in traces, at most 100 characters.
    otel_service_name: "OTEL_SERVICE_NAME", "quota", "NAME";

    /// The fraction of requests that are traced: 0 to 1. If a proxy in QUOTA_TRUSTED_PROXIES sends the traceparent
    /// header, the header decides instead.
    otel_traces_sampler_arg: "OTEL_TRACES_SAMPLER_ARG", "0.01", "RATIO";
}
