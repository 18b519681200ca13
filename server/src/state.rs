//! Everything that a request or worker needs, built once. Cheap to clone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{
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
    cache::Freshness,
    clock::Clock,
    config::Config,
    db::{Db, DbError, Lane},
    keys::{
        KeyStore, ledger::PostgresLedger, lookups::Lookups, shared::SharedKeys, usage::LastUsed,
    },
    limiter::{
        CellSettings, Guard, LimitStore, Limiter, MemoryStore, RedisCounters, Roster,
        SharedSettings, SharedStore,
    },
    metering::Metering,
    readiness::ReadinessProbe,
    redis::Redis,
    repo::{self, revocation::Revocation},
    revocations::{Announcer, Recent},
    telemetry::{log::Log, metrics::Metrics},
    tenant_queue::TenantQueues,
};

/// How many client addresses each guard remembers. One takes about 100 bytes.
const GUARDED: usize = 200_000;

/// See the module.
#[derive(Debug, Clone)]
pub struct AppState(Arc<Parts>);

#[derive(Debug)]
pub struct Parts {
    pub config: Config,
    pub clock: Arc<dyn Clock>,
    pub db: Db,
    pub readiness: ReadinessProbe,
    pub metrics: Arc<Metrics>,
    pub log: Log,
    pub limiter: Limiter,
    /// How many replicas share its counters.
    pub roster: Arc<Roster>,
    pub keys: KeyStore,
    pub last_used: LastUsed,
    pub metering: Metering,
    pub sessions: Sessions,
    pub accounts: Accounts,
    pub freshness: Arc<Freshness>,
    /// `None`: one replica.
    pub redis: Option<Redis>,
    pub announcer: Announcer,
    pub recent: Arc<Recent>,
    pub auth_guard: Guard,
    pub admin_guard: Guard,
    pub login_attempts: Arc<Attempts>,
    /// Where changes of one tenant wait for each other.
    pub changes: TenantQueues,
    draining: AtomicBool,
}

impl std::ops::Deref for AppState {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl AppState {
    /// Builds everything on a migrated database.
    pub async fn new(
        config: Config,
        db: Db,
        clock: Arc<dyn Clock>,
        log: Log,
    ) -> Result<Self, AuthError> {
        let mut metrics = Metrics::default();
        metrics.log_lines_dropped = log.dropped().clone();
        let metrics = Arc::new(metrics);
        let freshness = Arc::new(Freshness::new(clock.clone()));
        let redis = config.redis.clone().map(Redis::connect_lazy);
        let recent = Arc::new(Recent::default());

        // It also tells this installation from others that use the same QUOTA_SECRET.
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
        } = Seals::new(&current, previous, &installation);
        let announcer = Announcer::new(redis.clone(), invalidations, metrics.clone());

        let ledger = Arc::new(PostgresLedger::new(db.on(Lane::Ledger), metrics.clone()));
        // Ten times the cache: a key that fell out of the cache keeps its bucket until that is full again.
        let settings = CellSettings {
            max_cells: config.key_cache.saturating_mul(10),
            ledger_calls: db.lanes().ledger,
            ..CellSettings::default()
        };
        let roster = Arc::new(Roster::default());
        let store: Arc<dyn LimitStore> = match &redis {
            None => MemoryStore::new(clock.clone(), ledger, settings),
            Some(redis) => {
                let counters = RedisCounters::new(redis.clone());
                begin_counters(&db, redis, &counters).await?;
                let settings = SharedSettings {
                    lease_ttl: config.lease_ttl,
                    deadline: redis.settings().timeout,
                    on_failure: config.on_redis_failure,
                    cells: settings,
                };
                SharedStore::new(
                    clock.clone(),
                    ledger,
                    Arc::new(counters),
                    roster.clone(),
                    metrics.clone(),
                    settings,
                )
            }
        };
        let limiter = Limiter::new(store, clock.clone());
        let shared = redis.clone().map(|redis| {
            SharedKeys::new(
                redis,
                records,
                clock.clone(),
                recent.clone(),
                freshness.clone(),
                metrics.clone(),
            )
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
            announcer.clone(),
            &freshness,
            &metrics,
        );
        let login_attempts = Arc::new(Attempts::new(
            config.login_rpm,
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
        let passwords = PasswordPool::start(config.password_cost)?;
        let accounts = Accounts::new(
            db.clone(),
            passwords,
            sessions.clone(),
            login_attempts.clone(),
            Devices::new(secrets),
            clock.clone(),
            metrics.clone(),
        );
        Ok(Self(Arc::new(Parts {
            auth_guard: Guard::new(config.auth_rpm, GUARDED, clock.clone()),
            admin_guard: Guard::new(config.admin_rpm, GUARDED, clock.clone()),
            config,
            clock,
            readiness: ReadinessProbe::new(&db, metrics.clone()),
            db,
            metrics,
            log,
            limiter,
            roster,
            keys,
            last_used: LastUsed::default(),
            metering,
            sessions,
            accounts,
            freshness,
            redis,
            announcer,
            recent,
            login_attempts,
            changes: TenantQueues::default(),
            draining: AtomicBool::new(false),
        })))
    }

    /// Forgets what changes have made untrue, on this replica.
    pub fn forget(&self, revocations: &[Revocation]) {
        let gone = revocations.iter().collect();
        self.keys.revoke(&gone);
        self.sessions.revoke(&gone);
    }

    /// Forgets everything that is cached: nothing tells which of it is still true.
    pub fn forget_all(&self) {
        self.keys.forget_all();
        self.sessions.forget_all();
    }

    /// The same as [`Self::forget`] for a change that was made here and committed, and tells the others.
    pub fn revoked(&self, revocation: &Revocation) {
        self.recent.announced(revocation);
        self.forget(std::slice::from_ref(revocation));
        self.announcer.tell(revocation);
    }

    /// From now on the server says that it is not ready.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}

/// How long a start waits for Redis to tell whether it is a new one.
const REDIS_PATIENCE: Duration = Duration::from_secs(3);

/// Full buckets for a deployment that has never shared counters. If Redis is away they begin empty, as after a
/// loss, and the next start tries again.
async fn begin_counters(db: &Db, redis: &Redis, counters: &RedisCounters) -> Result<(), DbError> {
    let mut tx = db.system().await?;
    let begun = repo::replica::counters_have_begun(&mut tx).await?;
    tx.commit().await?;
    if begun {
        return Ok(());
    }
    // Before the row is held, which others that start wait for.
    redis.connected(REDIS_PATIENCE).await;
    let mut tx = db.system().await?;
    if !repo::replica::begin_counters(&mut tx).await? {
        return tx.commit().await;
    }
    match counters.begin().await {
        Ok(()) => tx.commit().await,
        Err(error) => {
            tracing::warn!(error = %error, "Redis cannot be reached; its counters will begin empty");
            Ok(())
        }
    }
}

/// Sessions of earlier versions do not state which secret they belong to. It is the one that was in use when the first
/// replica of this version started.
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
