//! Accounts: registering, signing in, changing a password.

use std::{hash::BuildHasher, sync::Arc};

use quota_common::{SessionId, TenantId, UserId};
use serde_json::json;
use uuid::Uuid;

use super::{
    AuthError,
    password::{Password, PasswordPool},
    session::{Origin, Sessions, Tokens},
};
use crate::{
    db::{Db, DbError},
    limiter::{Caller, Guard},
    repo::{
        account::{self, LoginRow, MemberRow, TenantRow, UserRow},
        audit,
        revocation::{self, Target},
        session,
    },
    telemetry::metrics::Metrics,
};

/// An account with a session that was just begun.
pub struct SignedIn {
    pub tokens: Tokens,
    pub user: UserRow,
    pub tenant: TenantRow,
    pub role: String,
}

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Accounts {
    db: Db,
    passwords: PasswordPool,
    sessions: Sessions,
    /// Tries to sign in to one account, from wherever.
    tries: Arc<Guard>,
    hasher: std::collections::hash_map::RandomState,
    metrics: Arc<Metrics>,
}

impl Accounts {
    pub fn new(
        db: Db,
        passwords: PasswordPool,
        sessions: Sessions,
        tries: Arc<Guard>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            db,
            passwords,
            sessions,
            tries,
            hasher: std::collections::hash_map::RandomState::new(),
            metrics,
        }
    }

    pub async fn register(
        &self,
        email: &str,
        password: &str,
        tenant_name: Option<&str>,
        origin: &Origin,
    ) -> Result<SignedIn, AuthError> {
        let email = email.trim().to_lowercase();
        let password = Password::new(password);
        password.judge(&email)?;
        let hash = self.passwords.hash(password).await?;
        let tenant_name =
            tenant_name.map_or_else(|| email.split('@').next().unwrap_or(&email), str::trim);

        let (user_id, tenant_id) = (Uuid::now_v7(), Uuid::now_v7());
        let mut tx = self.db.system().await?;
        let (user, tenant) =
            account::register(&mut tx, (user_id, tenant_id), &email, &hash, tenant_name)
                .await
                .map_err(|error| match error {
                    DbError::Constraint(name) if name == "users_email_key" => AuthError::EmailTaken,
                    error => error.into(),
                })?;
        let tokens = self
            .sessions
            .begin(&mut tx, (UserId(user_id), TenantId(tenant_id)), origin)
            .await?;
        let event = audit::NewAuditEvent {
            tenant_id,
            id: Uuid::now_v7(),
            user_id: Some(user_id),
            action: "user.register",
            target_type: "user",
            target_id: Some(user_id.to_string()),
            target_name: None,
            ip: origin.network(),
            before: None,
            after: Some(json!({"tenant_name": tenant.name})),
        };
        audit::insert_system(&mut tx, &event).await?;
        tx.commit().await?;
        tracing::info!(action = "user.register", tenant = %tenant_id, user = %user_id, "registered");
        Ok(SignedIn {
            tokens,
            user,
            tenant,
            role: "owner".into(),
        })
    }

    /// Makes a user and a tenant of their own, for the operator.
    pub async fn create(
        &self,
        email: &str,
        password: &str,
        tenant_name: Option<&str>,
    ) -> Result<(UserId, TenantId), AuthError> {
        let made = self
            .register(email, password, tenant_name, &Origin::default())
            .await?;
        Ok((UserId(made.user.id), TenantId(made.tenant.id)))
    }

    /// Sets a password without the old one, for the operator, and ends the user's sessions.
    pub async fn reset_password(&self, email: &str, password: &str) -> Result<(), AuthError> {
        let email = email.trim().to_lowercase();
        let mut tx = self.db.system().await?;
        let found = account::for_login(&mut tx, &email).await?;
        tx.commit().await?;
        let Some(LoginRow {
            user,
            tenant_id: tenant,
            ..
        }) = found
        else {
            return Err(AuthError::WrongCredentials);
        };
        let password = Password::new(password);
        password.judge(&email)?;
        let hash = self.passwords.hash(password).await?;
        let mut tx = self.db.system().await?;
        account::set_password(&mut tx, user.id, &hash).await?;
        // No session has the nil id: all end.
        let ended = session::end_others(&mut tx, user.id, Uuid::nil()).await?;
        let event = audit::NewAuditEvent {
            tenant_id: tenant,
            id: Uuid::now_v7(),
            user_id: None,
            action: "user.reset_password",
            target_type: "user",
            target_id: Some(user.id.to_string()),
            target_name: None,
            ip: None,
            before: None,
            after: Some(json!({"sessions_ended": ended.len()})),
        };
        audit::insert_system(&mut tx, &event).await?;
        let mut revocations = Vec::new();
        for id in ended {
            let target = Target::Session(id);
            revocations.push(revocation::insert_system(&mut tx, tenant, target).await?);
        }
        tx.commit().await?;
        self.sessions.ended(&revocations);
        Ok(())
    }

    /// Every user's email with tenant and role, for the operator.
    pub async fn list(&self) -> Result<Vec<(String, String, String)>, AuthError> {
        let mut tx = self.db.system().await?;
        let all = account::list(&mut tx).await?;
        tx.commit().await?;
        Ok(all)
    }

    pub async fn login(
        &self,
        email: &str,
        password: &str,
        origin: &Origin,
    ) -> Result<SignedIn, AuthError> {
        let email = email.trim().to_lowercase();
        let account = Caller::Account(self.hasher.hash_one(&email));
        if let Err(refused) = self.tries.admit(account) {
            self.metrics.guard_refusals.inc();
            return Err(AuthError::TooManyTries(refused.retry_after));
        }
        let mut tx = self.db.system().await?;
        let found = account::for_login(&mut tx, &email).await?;
        tx.commit().await?;
        let (user, hash, tenant) = match found {
            Some(found) => (
                Some((found.user, found.tenant_id)),
                Some(found.password_hash),
                found.tenant_id,
            ),
            None => (None, None, Uuid::nil()),
        };
        let right = self.passwords.verify(Password::new(password), hash).await?;
        let Some((user, _)) = user.filter(|_| right) else {
            self.metrics.logins_failed.inc();
            return Err(AuthError::WrongCredentials);
        };
        let mut tx = self.db.system().await?;
        let member = account::member(&mut tx, user.id, tenant).await?;
        let MemberRow { user, tenant, role } = member.ok_or(AuthError::WrongCredentials)?;
        let tokens = self
            .sessions
            .begin(&mut tx, (UserId(user.id), TenantId(tenant.id)), origin)
            .await?;
        let event = audit::NewAuditEvent {
            tenant_id: tenant.id,
            id: Uuid::now_v7(),
            user_id: Some(user.id),
            action: "session.begin",
            target_type: "session",
            target_id: Some(tokens.session.to_string()),
            target_name: None,
            ip: origin.network(),
            before: None,
            after: None,
        };
        audit::insert_system(&mut tx, &event).await?;
        tx.commit().await?;
        Ok(SignedIn {
            tokens,
            user,
            tenant,
            role,
        })
    }

    /// Changes the password and ends every other session of the user.
    pub async fn change_password(
        &self,
        (user, tenant, session): (UserId, TenantId, SessionId),
        (current, new): (&str, &str),
        origin: &Origin,
    ) -> Result<(), AuthError> {
        // As many tries as at the door: a stolen session must not be a way to guess the password.
        if let Err(refused) = self
            .tries
            .admit(Caller::Account(self.hasher.hash_one(user)))
        {
            self.metrics.guard_refusals.inc();
            return Err(AuthError::TooManyTries(refused.retry_after));
        }
        let mut tx = self.db.system().await?;
        let hash = account::password_hash(&mut tx, user.0).await?;
        let member = account::member(&mut tx, user.0, tenant.0).await?;
        tx.commit().await?;
        let Some(MemberRow { user: row, .. }) = member else {
            return Err(AuthError::Unauthorized);
        };
        if !self.passwords.verify(Password::new(current), hash).await? {
            return Err(AuthError::WrongCredentials);
        }
        let new = Password::new(new);
        new.judge(&row.email)?;
        let hash = self.passwords.hash(new).await?;

        let mut tx = self.db.system().await?;
        account::set_password(&mut tx, user.0, &hash).await?;
        let ended = session::end_others(&mut tx, user.0, session.0).await?;
        let event = audit::NewAuditEvent {
            tenant_id: tenant.0,
            id: Uuid::now_v7(),
            user_id: Some(user.0),
            action: "user.change_password",
            target_type: "user",
            target_id: Some(user.to_string()),
            target_name: None,
            ip: origin.network(),
            before: None,
            after: Some(json!({"sessions_ended": ended.len()})),
        };
        audit::insert_system(&mut tx, &event).await?;
        let mut revocations = Vec::new();
        for id in ended {
            let target = Target::Session(id);
            revocations.push(revocation::insert_system(&mut tx, tenant.0, target).await?);
        }
        tx.commit().await?;
        self.sessions.ended(&revocations);
        tracing::info!(action = "user.change_password", tenant = %tenant, user = %user, "changed a password");
        Ok(())
    }
}
