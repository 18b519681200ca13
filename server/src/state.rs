//! The state of a server: everything that requests and jobs need, created at startup.

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;
use uuid::Uuid;

use crate::{
    alerts::Alerts,
    auth::{
        AuthError,
        account::Accounts,
        attempts::Attempts,
        device::Devices,
        password::PasswordPool,
        secret::{Seals, SecretPair},
        session::Sessions,
        token::Signer,
    },
    billing::Billing,
    cache::{Freshness, Owner},
    client_guard::ClientRateLimiter,
    clock::Clock,
    config::Config,
    db::{Db, DbError, Lane},
    error_chain,
    invalidations::{Publisher, Recent},
    keys::{
        KeyStore,
        last_used::LastUsed,
        ledger::PostgresLedger,
        lookups::Lookups,
        shared::{SharedKeys, SharedKeysContext},
        tenant_ledger::TenantLedger,
    },
    limiter::{
        self, DistributedSettings, DistributedStore, KeyTableSettings, LedgerConnections,
        LimitStore, Limiter, LocalStore, Membership, RedisCounters, ReplicaSlot, TenantQuotas,
    },
    mail::Mailer,
    metering::Metering,
    readiness::ReadinessProbe,
    redis::Redis,
    repo::{
        self, invalidation::Invalidation, quota_standing::TenantQuota, replica::Seen,
        sweep::Expired,
    },
    telemetry::{log::Log, metrics::Metrics, traces::Traces},
    tenant_queue::TenantQueues,
    tenant_rate::TenantRate,
    webhooks::{Lookup, SystemLookup, Webhooks},
};

/// The maximum number of client networks that each rate limiter tracks. Each network takes about 100 bytes.
const GUARDED: usize = 200_000;

/// How many Stripe pages a tenant may request per minute. Each page requires several requests to Stripe, whose rate
/// limit is shared by all tenants.
const STRIPE_PAGES: NonZeroU32 = NonZeroU32::new(20).unwrap();

/// How many test events and redeliveries a tenant may request per minute.
const WEBHOOK_REQUESTS: NonZeroU32 = NonZeroU32::new(30).unwrap();

/// The state of a replica. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct AppState(Arc<Services>);

#[derive(Debug)]
pub struct Services {
    pub config: Config,
    pub clock: Arc<dyn Clock>,
    pub db: Db,
    pub readiness: ReadinessProbe,
    pub metrics: Arc<Metrics>,
    pub log: Log,
    /// `None` if requests are not traced.
    pub traces: Option<Traces>,
    pub limiter: Limiter,
    /// The number of replicas, and this replica's slot.
    pub membership: Arc<Membership>,
    pub replica_id: Uuid,
    pub keys: KeyStore,
    pub last_used: LastUsed,
    pub metering: Metering,
    pub sessions: Sessions,
    pub accounts: Accounts,
    pub freshness: Arc<Freshness>,
    /// `None` means a single replica.
    pub redis: Option<Redis>,
    pub publisher: Publisher,
    pub recent: Arc<Recent>,
    pub auth_guard: ClientRateLimiter,
    pub admin_guard: ClientRateLimiter,
    pub login_attempts: Arc<Attempts>,
    pub registrations: Arc<Attempts>,
    /// `None` if billing is off.
    pub billing: Option<Billing>,
    /// Notified when a Stripe webhook has been stored.
    pub billing_event: Notify,
    pub webhooks: Webhooks,
    pub alerts: Alerts,
    pub mailer: Mailer,
    /// The queues in which each tenant's changes wait.
    pub changes: TenantQueues,
    /// The queues in which each tenant's requests for Stripe pages wait. These queues are separate from `changes`,
    /// because revoking a key must not wait for Stripe.
    pub checkouts: TenantQueues,
    /// Limits how often a tenant may request a Stripe page.
    pub stripe_pages: TenantRate,
    /// Limits how often a tenant may request a test event or a redelivery.
    pub webhook_requests: TenantRate,
    /// The queues in which each tenant's large reads wait.
    pub reads: TenantQueues,
    draining: AtomicBool,
}

impl std::ops::Deref for AppState {
    type Target = Services;

    fn deref(&self) -> &Services {
        &self.0
    }
}

impl AppState {
    /// Creates the state. The database must be migrated.
    pub async fn new(
        config: Config,
        db: Db,
        clock: Arc<dyn Clock>,
        log: Log,
    ) -> Result<Self, AuthError> {
        let mut metrics = Metrics::default();
        metrics.log_lines_dropped = log.dropped().clone();
        // Prometheus would not see an increase if a counter first appeared with a value above 0.
        for kind in Expired::ALL {
            metrics.swept(kind.name(), 0);
        }
        let metrics = Arc::new(metrics);
        let freshness = Arc::new(Freshness::new(clock.clone()));
        let redis = config.redis.clone().map(Redis::connect_lazy);
        let recent = Arc::new(Recent::default());

        // This secret also distinguishes the installation from other installations with the same QUOTA_SECRET.
        let installation = stored_secret(&db).await?;
        let current = match &config.secret {
            Some(secret) => Config::secret_bytes(secret).to_vec(),
            None => installation.clone(),
        };
        let previous = config.secret_previous.as_ref().map(Config::secret_bytes);
        let secrets = Arc::new(SecretPair::new(&current, previous));
        let signer = Arc::new(Signer::new(&secrets)?);
        let accepts_unmarked = accepts_unmarked_sessions(&db, &secrets).await?;
        let Seals {
            records,
            invalidations,
            attempts,
            stored,
        } = Seals::new(&current, previous, &installation);
        let publisher = Publisher::new(redis.clone(), invalidations, metrics.clone());

        let ledger = Arc::new(PostgresLedger::new(db.on(Lane::Ledger), metrics.clone()));
        // The key table is ten times the size of the cache, because an evicted key keeps its bucket until the bucket is
        // full again.
        let settings = KeyTableSettings {
            max_keys: config.key_cache.saturating_mul(10),
            connections: LedgerConnections::new(db.lanes().ledger),
            ..KeyTableSettings::default()
        };
        let tenant_settings = settings.clone();
        let membership = Arc::new(Membership::default());
        let replica_id = Uuid::now_v7();
        let store: Arc<dyn LimitStore> = match &redis {
            None => LocalStore::new(clock.clone(), ledger, settings),
            Some(redis) => {
                let counters = RedisCounters::new(redis.clone());
                initialize_counters(&db, redis, &counters).await?;
                // The first call to Redis must already report whether other replicas may have decided requests without
                // Redis.
                Box::pin(count_replicas(&db, replica_id, &*clock, &membership)).await?;
                let settings = DistributedSettings {
                    lease_ttl: config.lease_ttl,
                    deadline: redis.settings().timeout,
                    on_failure: config.on_redis_failure,
                    keys: settings,
                };
                DistributedStore::new(
                    clock.clone(),
                    ledger,
                    Arc::new(counters),
                    membership.clone(),
                    metrics.clone(),
                    settings,
                )
            }
        };
        let mut limiter = Limiter::new(store, clock.clone());
        if let Some(limit) = config.free_tier.requests_per_month {
            limiter = limiter.with_tenant_quotas(TenantQuotas::new(
                clock.clone(),
                Arc::new(TenantLedger::new(db.on(Lane::Ledger), metrics.clone())),
                tenant_settings,
                membership.clone(),
                limit,
            ));
        }
        let shared = redis.clone().map(|redis| {
            SharedKeys::new(SharedKeysContext {
                redis,
                seal: records,
                clock: clock.clone(),
                recent: recent.clone(),
                freshness: freshness.clone(),
                metrics: metrics.clone(),
            })
        });
        let lookups = Lookups::new(&db, &config, &freshness, &metrics);
        let keys = KeyStore::new(
            lookups,
            limiter.clone(),
            shared,
            config.key_cache,
            config.stale_grace,
            &freshness,
            &metrics,
        );
        let sessions = Sessions::new(
            db.clone(),
            clock.clone(),
            (secrets.clone(), signer, accepts_unmarked),
            (config.session_days, config.stale_grace),
            publisher.clone(),
            &freshness,
            &metrics,
        );
        let login_attempts = Arc::new(Attempts::new(
            config.login_free_failures,
            &attempts,
            redis.clone(),
            clock.clone(),
            metrics.clone(),
        ));
        let registrations = Arc::new(Attempts::new(
            config.registrations_per_day,
            &attempts,
            redis.clone(),
            clock.clone(),
            metrics.clone(),
        ));
        let metering = Metering::new(&config, &db, clock.clone(), metrics.clone())
            .map_err(|error| AuthError::Internal(error.to_string()))?;
        if metering.is_on() {
            metering.measure_time(&db).await?;
        }
        let billing = config
            .stripe
            .as_ref()
            .map(|settings| Billing::new(settings, db.clone()))
            .transpose()
            .map_err(|error| AuthError::Internal(error.to_string()))?;
        let private = &config.webhook_private_networks;
        let lookup: Arc<dyn Lookup> = Arc::new(SystemLookup);
        let webhooks = Webhooks::new(db.clone(), stored, private, &config.public_url, &lookup)
            .map_err(|error| AuthError::Internal(error.to_string()))?;
        let tenant_quota = config
            .free_tier
            .requests_per_month
            .map(|quota| TenantQuota {
                quota: i64::try_from(quota.get()).unwrap_or(i64::MAX),
                is_lifted_by_access: config.stripe.is_some(),
            });
        let alerts = Alerts::new(db.clone(), metering.is_on(), tenant_quota);
        let mailer =
            Mailer::new(&config).map_err(|error| AuthError::Internal(error.to_string()))?;
        let accounts = Accounts {
            db: db.clone(),
            passwords: PasswordPool::start(
                config.password_cost,
                metrics.password_queue_full.clone(),
            )?,
            sessions: sessions.clone(),
            attempts: login_attempts.clone(),
            registrations: registrations.clone(),
            devices: Devices::new(secrets),
            clock: clock.clone(),
            metrics: metrics.clone(),
        };
        let traces = config
            .traces
            .as_ref()
            .map(|settings| Traces::start(settings, replica_id, &metrics))
            .transpose()
            .map_err(|error| AuthError::Internal(error_chain::chain(&error)))?;
        let stripe_pages = TenantRate::new(STRIPE_PAGES, clock.clone());
        let webhook_requests = TenantRate::new(WEBHOOK_REQUESTS, clock.clone());
        Ok(Self(Arc::new(Services {
            auth_guard: ClientRateLimiter::new(config.auth_rpm, GUARDED, clock.clone()),
            admin_guard: ClientRateLimiter::new(config.admin_rpm, GUARDED, clock.clone()),
            config,
            clock,
            readiness: ReadinessProbe::new(&db, metrics.clone()),
            db,
            metrics,
            log,
            traces,
            limiter,
            membership,
            replica_id,
            keys,
            last_used: LastUsed::default(),
            metering,
            sessions,
            accounts,
            freshness,
            redis,
            publisher,
            recent,
            login_attempts,
            registrations,
            billing,
            billing_event: Notify::new(),
            webhooks,
            alerts,
            mailer,
            changes: TenantQueues::of_changes(),
            checkouts: TenantQueues::of_changes(),
            stripe_pages,
            webhook_requests,
            reads: TenantQueues::of_reads(),
            draining: AtomicBool::new(false),
        })))
    }

    /// Applies invalidations to all caches of this replica.
    pub fn forget(&self, invalidations: &[Invalidation]) {
        self.freshness
            .changed(invalidations.iter().map(Owner::from));
    }

    /// Clears the caches of this replica.
    pub fn forget_all(&self) {
        self.keys.forget_all();
        self.sessions.forget_all();
    }

    /// Applies an invalidation to this replica's caches, and publishes it to other replicas. This replica must have
    /// committed the invalidation.
    pub fn invalidate(&self, invalidation: &Invalidation) {
        self.recent.announced(invalidation);
        self.forget(std::slice::from_ref(invalidation));
        self.publisher.publish(invalidation);
    }

    /// Refreshes this replica's heartbeat and counts the replicas, including this replica.
    pub async fn count_replicas(&self) -> Result<NonZeroU64, DbError> {
        count_replicas(&self.db, self.replica_id, &*self.clock, &self.membership).await
    }

    /// Starts draining: readiness and serving checks fail, streams of decisions end, and HTTP/1 connections are closed
    /// after their next response.
    pub fn begin_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}

async fn count_replicas(
    db: &Db,
    id: Uuid,
    clock: &dyn Clock,
    membership: &Membership,
) -> Result<NonZeroU64, DbError> {
    let db = db.on(Lane::Health);
    let began = clock.monotonic();
    let seen = async {
        let mut tx = db.system().await?;
        let (forgotten, remembered) = (limiter::FORGOTTEN, limiter::REMEMBERED);
        let seen = repo::replica::seen(&mut tx, id, forgotten, remembered).await?;
        tx.commit().await?;
        Ok(seen)
    };
    let Seen {
        rank,
        count,
        oldest_other,
    } = db.within_limit(seen).await?;
    membership.note_oldest_other(oldest_other, began);
    membership.confirm_count(ReplicaSlot { rank, of: count }, began, clock.monotonic());
    Ok(count)
}

/// How long startup waits for Redis before initializing the counters.
const REDIS_WAIT: Duration = Duration::from_secs(3);

/// Starts the shared counters of a new deployment with full buckets. If Redis is unreachable, the buckets start empty,
/// as after a loss of data. The next startup does not try again: by then, requests may have been allowed, and Redis may
/// have lost its data.
async fn initialize_counters(
    db: &Db,
    redis: &Redis,
    counters: &RedisCounters,
) -> Result<(), DbError> {
    let mut tx = db.system().await?;
    let is_initialized = repo::replica::counters_have_begun(&mut tx).await?;
    tx.commit().await?;
    if is_initialized {
        return Ok(());
    }
    // The connection to Redis is awaited before the row is locked, because other replicas that are starting wait for
    // the lock.
    redis.connected(REDIS_WAIT).await;
    let mut tx = db.system().await?;
    if !repo::replica::begin_counters(&mut tx).await? {
        return tx.commit().await;
    }
    if let Err(error) = counters.begin().await {
        tracing::warn!(error = %error, "cannot reach Redis at startup; the counters will start empty");
    }
    tx.commit().await
}

/// Returns whether to accept sessions without a recorded secret, which earlier versions of Quota created. These
/// sessions are assumed to use the secret that was current when Quota started to record the secrets of sessions.
async fn accepts_unmarked_sessions(db: &Db, secrets: &SecretPair) -> Result<bool, DbError> {
    let mut tx = db.system().await?;
    let first = repo::secret::first_of_sessions(&mut tx, &secrets.current.id).await?;
    tx.commit().await?;
    Ok(secrets.accepted().any(|it| it.id[..] == first[..]))
}

async fn stored_secret(db: &Db) -> Result<Vec<u8>, AuthError> {
    let mut candidate = [0; 32];
    getrandom::fill(&mut candidate)?;
    let stored = async {
        let mut tx = db.system().await?;
        let secret = repo::secret::get_or_insert(&mut tx, &candidate).await?;
        tx.commit().await?;
        Ok::<_, DbError>(secret)
    };
    Ok(stored.await?)
}
