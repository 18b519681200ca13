//! Session families: a sign-in and all refresh tokens issued for it.

use std::{sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::DateTime;
use ipnet::IpNet;
use quota_common::{
    SessionId, TenantId, UserId,
    audit::{AuditAction, AuditTarget},
    auth::Role,
};
use uuid::Uuid;

use super::{AuthError, secret::SecretPair, token::Signer};
use crate::{
    cache::{Cached, CachedRow, Changes, Freshness, Owner, Unconfirmed},
    clock::{Clock, UnixNanos},
    db::{self, Db, SystemTx},
    invalidations::Publisher,
    repo::{
        Rows, Slice, account,
        audit::{self, NewAuditEvent},
        invalidation::{self, Invalidation, Target},
        session::{self, NewSession, Rotation, SessionRow},
    },
    secret_text::{Kind, SecretText},
    telemetry::metrics::Metrics,
};

/// The origin of a request, as stored with sessions and audit events.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    pub ip: Option<std::net::IpAddr>,
    pub user_agent: Option<String>,
}

impl Origin {
    pub fn network(&self) -> Option<IpNet> {
        self.ip.map(IpNet::from)
    }
}

pub struct Tokens {
    pub access: String,
    pub refresh: String,
    pub session: SessionId,
}

/// The data of an active session that requests need.
#[derive(Debug, Clone)]
pub struct LiveSession {
    pub id: SessionId,
    pub user: UserId,
    pub tenant: TenantId,
    pub role: Role,
    pub expires_at: UnixNanos,
}

impl CachedRow for LiveSession {
    fn has_changed(&self, changes: &Changes, loaded_in: u64) -> bool {
        changes.has_changed_after(loaded_in, Owner::Tenant(self.tenant.0))
            || changes.has_changed_after(loaded_in, Owner::Session(self.id.0))
    }
}

/// Creates, refreshes, finds, and revokes sessions. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Sessions {
    db: Db,
    clock: Arc<dyn Clock>,
    secrets: Arc<SecretPair>,
    signer: Arc<Signer>,
    live: Cached<SessionId, LiveSession>,
    freshness: Arc<Freshness>,
    publisher: Publisher,
    days: u32,
    /// Whether sessions created by earlier versions, which did not record the secret, can be refreshed.
    accepts_unmarked: bool,
}

impl Sessions {
    pub fn new(
        db: Db,
        clock: Arc<dyn Clock>,
        (secrets, signer, accepts_unmarked): (Arc<SecretPair>, Arc<Signer>, bool),
        (days, grace): (u32, Duration),
        publisher: Publisher,
        freshness: &Arc<Freshness>,
        metrics: &Arc<Metrics>,
    ) -> Self {
        // This capacity is enough, because only people use sessions; API traffic does not.
        let live = Cached::new(10_000, grace, freshness.clone(), metrics.clone());
        Self {
            db,
            clock,
            secrets,
            signer,
            live,
            freshness: freshness.clone(),
            publisher,
            days,
            accepts_unmarked,
        }
    }

    fn idle_days(&self) -> i32 {
        i32::try_from(self.days).unwrap_or(i32::MAX)
    }

    /// Creates a session in the caller's transaction.
    pub async fn begin(
        &self,
        tx: &mut SystemTx,
        (user, tenant): (UserId, TenantId),
        origin: &Origin,
    ) -> Result<Tokens, AuthError> {
        let id = SessionId(Uuid::now_v7());
        let refresh = SecretText::generate(Kind::Refresh)?;
        let now = self.clock.now();
        let end = now.secs() + u64::from(self.days) * 86_400;
        let new = NewSession {
            id: id.0,
            user_id: user.0,
            tenant_id: tenant.0,
            user_agent: origin.user_agent.as_deref(),
            ip: origin.network(),
            secret_id: &self.secrets.current.id,
            expires_at: DateTime::from_timestamp(i64::try_from(end).unwrap_or(0), 0)
                .unwrap_or_default(),
        };
        session::begin(tx, &new, &refresh.hash()).await?;
        let access = self.signer.sign(user, tenant, id, now)?;
        Ok(Tokens {
            access,
            refresh: refresh.reveal(),
            session: id,
        })
    }

    /// Exchanges a refresh token for the next pair of tokens. For a token that was used a few seconds ago, returns the
    /// same refresh token again, unless that one has also been used. Reusing any other token revokes the session. Also
    /// revokes the session if it belongs to a secret that is no longer accepted: anyone who knows that secret can
    /// compute the session's next tokens.
    pub async fn refresh(&self, token: &str, origin: &Origin) -> Result<Tokens, AuthError> {
        let token =
            SecretText::parse(Kind::Refresh, token.as_bytes()).ok_or(AuthError::Unauthorized)?;
        let hash = token.hash();
        // The first successor is derived from the current secret. If the token was used just before `QUOTA_SECRET` was
        // rotated, its successor was derived from the previous secret.
        let text = token.reveal();
        let successors = self.secrets.accepted().map(|secrets| {
            SecretText::from_bytes(Kind::Refresh, &secrets.successor(text.as_bytes()))
        });
        let successors = successors.collect::<Vec<_>>();
        let hashes = successors.iter().map(SecretText::hash).collect::<Vec<_>>();
        let mut tx = self.db.system().await?;
        let ids = self.secrets.accepted().map(|secrets| secrets.id);
        let ids = ids.collect::<Vec<_>>();
        let secrets = session::Accepted {
            ids: &ids,
            with_unmarked: self.accepts_unmarked,
        };
        let rotation = session::rotate(
            &mut tx,
            &hash,
            (&hashes, secrets),
            self.idle_days(),
            origin.network(),
        )
        .await?;
        let (row, next) = match rotation {
            Rotation::Unknown => return Err(AuthError::Unauthorized),
            Rotation::Reused(row) => {
                session::end(&mut tx, row.user_id, row.id).await?;
                audit_reuse(&mut tx, &row, origin).await?;
                let ended =
                    invalidation::insert_system(&mut tx, row.tenant_id, Target::Session(row.id))
                        .await?;
                tx.commit().await?;
                self.ended(&[ended]);
                tracing::warn!(session = %row.id, tenant = %row.tenant_id, "session revoked: a refresh token was reused");
                return Err(AuthError::Unauthorized);
            }
            Rotation::Foreign(row) => {
                self.end_in(tx, &row, origin).await?;
                tracing::warn!(session = %row.id, tenant = %row.tenant_id, "session revoked: it was last used with a different QUOTA_SECRET");
                return Err(AuthError::Unauthorized);
            }
            Rotation::Rotated(row) => (row, 0),
            Rotation::Repeated(row, next) => (row, next),
        };
        tx.commit().await?;
        let id = SessionId(row.id);
        let access = self.signer.sign(
            UserId(row.user_id),
            TenantId(row.tenant_id),
            id,
            self.clock.now(),
        )?;
        // The session now expires later than its cached copy says.
        self.forget(id);
        Ok(Tokens {
            access,
            refresh: successors[next].reveal(),
            session: id,
        })
    }

    /// Returns the session's CSRF token. The token contains the session's ID, and proof that the server
    /// issued the token.
    pub fn csrf_token(&self, session: SessionId) -> String {
        let tag = self.secrets.current.csrf(session.0.as_bytes());
        let bytes = [session.0.as_bytes(), &tag[..]].concat();
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Returns the session of a [CSRF token](Self::csrf_token).
    pub fn of_csrf_token(&self, text: &str) -> Option<SessionId> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (id, tag) = bytes.split_at_checked(16)?;
        let id = Uuid::from_slice(id).ok()?;
        self.secrets
            .accepted()
            .any(|secrets| secrets.is_csrf(id.as_bytes(), tag))
            .then_some(SessionId(id))
    }

    /// Returns whether a refresh token belongs to this session.
    pub async fn is_of(&self, token: &str, id: SessionId) -> Result<bool, AuthError> {
        let token =
            SecretText::parse(Kind::Refresh, token.as_bytes()).ok_or(AuthError::Unauthorized)?;
        let mut tx = self.db.system().await?;
        let row = session::of_token(&mut tx, &token.hash()).await?;
        tx.commit().await?;
        Ok(row.is_some_and(|row| row.id == id.0))
    }

    /// Returns an access token's session if the session is active.
    pub async fn of_access_token(&self, token: &str) -> Result<Arc<LiveSession>, AuthError> {
        let now = self.clock.now();
        let claims = self.signer.verify(token, now)?;
        let db = self.db.clone();
        let id = claims.sid;
        let live = self
            .live
            .get(id, move || {
                let db = db.clone();
                async move {
                    // Without a time limit, a lookup that never completes would block all requests for this session.
                    db.within_limit(load(&db, id))
                        .await
                        .map_err(|error| Unconfirmed::Failed(db::chain(&error).into()))
                }
            })
            .await
            .map_err(|error| db::DbError::Unavailable(Box::new(error)))?
            .ok_or(AuthError::Unauthorized)?;
        if live.user != claims.sub || live.tenant != claims.tid || live.expires_at <= now {
            return Err(AuthError::Unauthorized);
        }
        Ok(live)
    }

    /// Revokes a refresh token's session. Does nothing if the token is unknown or the session has already ended.
    pub async fn end_by_refresh_token(
        &self,
        token: &str,
        origin: &Origin,
    ) -> Result<(), AuthError> {
        let token =
            SecretText::parse(Kind::Refresh, token.as_bytes()).ok_or(AuthError::Unauthorized)?;
        let mut tx = self.db.system().await?;
        let Some(row) = session::of_token(&mut tx, &token.hash()).await? else {
            return Ok(());
        };
        self.end_in(tx, &row, origin).await?;
        Ok(())
    }

    /// Revokes one of the user's sessions. Returns `false` if the user has no such active session.
    pub async fn end(
        &self,
        user: UserId,
        id: SessionId,
        origin: &Origin,
    ) -> Result<bool, AuthError> {
        let mut tx = self.db.system().await?;
        match session::find_live(&mut tx, id.0).await? {
            Some(row) if row.user_id == user.0 => self.end_in(tx, &row, origin).await,
            _ => Ok(false),
        }
    }

    /// Revokes a session and commits the transaction. Returns `false` if another request has already revoked the
    /// session.
    async fn end_in(
        &self,
        mut tx: SystemTx,
        row: &SessionRow,
        origin: &Origin,
    ) -> Result<bool, AuthError> {
        let mut ended = Vec::new();
        if session::end(&mut tx, row.user_id, row.id).await? {
            audit::insert_system(&mut tx, &event(row, AuditAction::SessionEnd, origin)).await?;
            let target = Target::Session(row.id);
            ended.push(invalidation::insert_system(&mut tx, row.tenant_id, target).await?);
        }
        tx.commit().await?;
        self.forget(SessionId(row.id));
        self.ended(&ended);
        Ok(!ended.is_empty())
    }

    pub async fn of_user(&self, user: UserId, slice: Slice) -> Result<Rows<SessionRow>, AuthError> {
        let mut tx = self.db.system().await?;
        let sessions = session::of_user(&mut tx, user.0, slice).await?;
        tx.commit().await?;
        Ok(sessions)
    }

    /// Removes a session from the cache.
    pub fn forget(&self, id: SessionId) {
        self.live.forget(id);
    }

    /// Removes all sessions from the cache.
    pub fn forget_all(&self) {
        self.live.forget_all();
    }

    /// Removes revoked sessions from the cache, and notifies other replicas. Call after committing the transaction that
    /// revoked the sessions.
    pub fn ended(&self, invalidations: &[Invalidation]) {
        self.freshness
            .changed(invalidations.iter().map(Owner::from));
        for invalidation in invalidations {
            self.publisher.publish(invalidation);
        }
    }
}

async fn load(db: &Db, id: SessionId) -> Result<Option<LiveSession>, db::DbError> {
    let mut tx = db.system().await?;
    let Some(row) = session::find_live(&mut tx, id.0).await? else {
        return Ok(None);
    };
    let member = account::member(&mut tx, row.user_id, row.tenant_id).await?;
    tx.commit().await?;
    Ok(member.and_then(|member| {
        Some(LiveSession {
            id,
            user: UserId(row.user_id),
            tenant: TenantId(row.tenant_id),
            // A session whose role this version does not recognize is not accepted.
            role: Role::of(&member.role)?,
            expires_at: UnixNanos(
                row.expires_at
                    .timestamp_nanos_opt()
                    .and_then(|n| u64::try_from(n).ok())?,
            ),
        })
    }))
}

fn event(row: &SessionRow, action: AuditAction, origin: &Origin) -> NewAuditEvent<'static> {
    NewAuditEvent::new(row.tenant_id, action, AuditTarget::Session, &row.id)
        .by(row.user_id, origin.network())
}

async fn audit_reuse(
    tx: &mut SystemTx,
    row: &SessionRow,
    origin: &Origin,
) -> Result<(), AuthError> {
    let event = event(row, AuditAction::SessionReuseDetected, origin);
    Ok(audit::insert_system(tx, &event).await?)
}
