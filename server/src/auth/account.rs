//! Accounts: registration, sign-in, and password changes.
//!
//! Passwords are verified outside of transactions, because hashing is slow and may have to wait. The transaction that
//! then creates a session or changes the password locks the user's row and checks that the verified password is still
//! current. Therefore, an old password cannot create a session after a password change.

use std::sync::Arc;

use quota_common::{
    SessionId, TenantId, UserId,
    audit::{AuditAction, AuditTarget},
};
use serde_json::json;
use uuid::Uuid;

use super::{
    AuthError,
    attempts::{Attempt, Attempts, Judgment, Wait, account_number, network_number},
    device::{Device, Devices},
    password::{CallerClass, Password, PasswordPool, Place, Turn},
    session::{Origin, Sessions, Tokens},
};
use crate::{
    clock::Clock,
    db::{Db, DbError},
    repo::{
        account::{self, LoginRow, MemberRow, TenantRow, UserRow},
        audit::{self, NewAuditEvent},
        invalidation::{self, Target},
        session,
    },
    telemetry::metrics::Metrics,
};

/// An account with a new session.
pub struct SignedIn {
    pub tokens: Tokens,
    /// Identifies the device at its next sign-in.
    pub device: String,
    pub user: UserRow,
    pub tenant: TenantRow,
    pub role: String,
}

/// Handles registration, sign-in, and password changes. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Accounts {
    pub(crate) db: Db,
    pub(crate) passwords: PasswordPool,
    pub(crate) sessions: Sessions,
    pub(crate) attempts: Arc<Attempts>,
    /// Counts registrations per network.
    pub(crate) registrations: Arc<Attempts>,
    pub(crate) devices: Devices,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) metrics: Arc<Metrics>,
}

#[derive(Clone, Copy)]
pub struct Credentials<'a> {
    pub email: &'a str,
    pub password: &'a str,
    /// The device tokens from earlier sign-ins, as the device has stored them.
    pub device: Option<&'a str>,
}

fn refused(Wait(wait): Wait) -> AuthError {
    AuthError::TooManyTries(wait)
}

fn known_turn(email: &str) -> Turn {
    Turn {
        class: CallerClass::Known,
        party: account_number(email),
    }
}

impl Accounts {
    /// Registers a user with their own tenant. The registration counts toward the limit for the caller's network if an
    /// account may have been created, or if the email is already in use.
    pub async fn register(
        &self,
        email: &str,
        password: &str,
        tenant_name: Option<&str>,
        device: Option<&str>,
        origin: &Origin,
    ) -> Result<SignedIn, AuthError> {
        let attempt = self.registrations.of_registration(origin.ip).await;
        let mut attempt = attempt.map_err(|Wait(wait)| AuthError::TooManyRegistrations(wait))?;
        let registered = self
            .register_unlimited((email, password), tenant_name, device, origin, || {
                attempt.set_judgment(Judgment::Wrong);
            })
            .await;
        if matches!(registered, Err(AuthError::EmailTaken)) {
            attempt.set_judgment(Judgment::Wrong);
        }
        registered
    }

    /// Registers a user without counting the registration. Calls `before_commit` just before committing the transaction
    /// that creates the account. If the response from PostgreSQL is lost or the client disconnects after that call, it
    /// is unknown whether the account was created.
    async fn register_unlimited(
        &self,
        (email, password): (&str, &str),
        tenant_name: Option<&str>,
        device: Option<&str>,
        origin: &Origin,
        before_commit: impl FnOnce(),
    ) -> Result<SignedIn, AuthError> {
        let email = email.trim().to_lowercase();
        let password = Password::new(password);
        password.check_length()?;
        let turn = Turn {
            class: CallerClass::Suspect,
            party: network_number(origin.ip),
        };
        let place = self.passwords.enter(turn).await?;
        let hash = self.passwords.hash(password, &email, &place).await?;
        drop(place);
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
        let action = AuditAction::UserRegister;
        let event = NewAuditEvent {
            after: Some(json!({"tenant_name": tenant.name})),
            ..NewAuditEvent::new(tenant_id, action, AuditTarget::User, &user_id)
                .by(user_id, origin.network())
        };
        audit::insert_system(&mut tx, &event).await?;
        before_commit();
        tx.commit().await?;
        tracing::info!(action = "user.register", tenant = %tenant_id, user = %user_id, "user registered");
        let role = "owner".into();
        let member = MemberRow { user, tenant, role };
        self.signed_in(tokens, member, (&email, &hash), device)
    }

    /// Returns the result of a sign-in, with the device token to send at the next sign-in.
    fn signed_in(
        &self,
        tokens: Tokens,
        member: MemberRow,
        account: (&str, &str),
        device: Option<&str>,
    ) -> Result<SignedIn, AuthError> {
        Ok(SignedIn {
            tokens,
            device: self.devices.remember(account, device, self.clock.now())?,
            user: member.user,
            tenant: member.tenant,
            role: member.role,
        })
    }

    /// Creates a user with their own tenant on behalf of the operator, even if registration is closed.
    pub async fn create(
        &self,
        email: &str,
        password: &str,
        tenant_name: Option<&str>,
    ) -> Result<(UserId, TenantId), AuthError> {
        let made = self
            .register_unlimited(
                (email, password),
                tenant_name,
                None,
                &Origin::default(),
                || (),
            )
            .await?;
        Ok((UserId(made.user.id), TenantId(made.tenant.id)))
    }

    /// Sets a password on behalf of the operator. Does not require the old password. Revokes all of the user's
    /// sessions.
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
        password.check_length()?;
        let place = self.passwords.enter(known_turn(&email)).await?;
        let hash = self.passwords.hash(password, &email, &place).await?;
        drop(place);
        let mut tx = self.db.system().await?;
        // Must come first: this statement waits for sign-ins that have verified the old password, so that their
        // sessions are also revoked.
        account::set_password(&mut tx, user.id, &hash).await?;
        // No session has the nil ID, so this revokes all sessions.
        let ended = session::end_others(&mut tx, user.id, Uuid::nil()).await?;
        let action = AuditAction::UserResetPassword;
        let event = NewAuditEvent {
            after: Some(json!({"sessions_ended": ended.len()})),
            ..NewAuditEvent::new(tenant, action, AuditTarget::User, &user.id)
        };
        audit::insert_system(&mut tx, &event).await?;
        let mut invalidations = Vec::new();
        for id in ended {
            let target = Target::Session(id);
            invalidations.push(invalidation::insert_system(&mut tx, tenant, target).await?);
        }
        tx.commit().await?;
        self.sessions.ended(&invalidations);
        Ok(())
    }

    /// Returns, for every membership, the user's email address, the tenant's name, and the role.
    pub async fn list(&self) -> Result<Vec<(String, String, String)>, AuthError> {
        let mut tx = self.db.system().await?;
        let all = account::list(&mut tx).await?;
        tx.commit().await?;
        Ok(all)
    }

    /// Signs in. Other people cannot exhaust the attempts of a known device; see [`super::attempts`].
    pub async fn login(
        &self,
        credentials: Credentials<'_>,
        origin: &Origin,
    ) -> Result<SignedIn, AuthError> {
        let Credentials {
            email,
            password,
            device,
        } = credentials;
        let email = email.trim().to_lowercase();
        let known = device.and_then(|value| self.devices.find(&email, value, self.clock.now()));
        let (mut attempt, known) = self.attempt(&email, known, origin).await?;
        let turn = match known {
            Some(_) => known_turn(&email),
            None => Turn {
                class: if attempt.is_suspect {
                    CallerClass::Suspect
                } else {
                    CallerClass::Ordinary
                },
                party: network_number(origin.ip),
            },
        };
        let place = self.passwords.enter(turn).await?;
        let mut tx = self.db.system().await?;
        let found = account::for_login(&mut tx, &email).await?;
        tx.commit().await?;
        let (user, hash, tenant) = match found {
            Some(found) => (Some(found.user), Some(found.password_hash), found.tenant_id),
            None => (None, None, Uuid::nil()),
        };
        let is_current = |device| {
            let hash = hash.as_deref();
            hash.is_some_and(|hash| self.devices.is_of_password(device, hash))
        };
        if known.as_ref().is_some_and(|device| !is_current(device)) {
            // The password has changed since the device last signed in, so the attempt counts as a failed attempt from
            // the device, and the device is treated like an unknown one.
            attempt.set_judgment(Judgment::Wrong);
            let network = self.attempts.of_network(&email, origin.ip).await;
            attempt = network.map_err(refused)?;
        }
        let verified = self
            .verify(&mut attempt, password, hash.clone(), &place)
            .await?;
        drop(place);
        let (Some(user), Some(hash), true) = (user, hash, verified) else {
            self.metrics.logins_failed.inc();
            return Err(AuthError::WrongCredentials);
        };
        let mut tx = self.db.system().await?;
        if !account::hold_password(&mut tx, user.id, &hash).await? {
            attempt.set_judgment(Judgment::Wrong);
            self.metrics.logins_failed.inc();
            return Err(AuthError::WrongCredentials);
        }
        let member = account::member(&mut tx, user.id, tenant).await?;
        let member = member.ok_or(AuthError::WrongCredentials)?;
        let (user, tenant) = (UserId(member.user.id), TenantId(member.tenant.id));
        let begun = self.sessions.begin(&mut tx, (user, tenant), origin);
        let tokens = begun.await?;
        let (action, target) = (AuditAction::SessionBegin, AuditTarget::Session);
        let event = NewAuditEvent::new(tenant.0, action, target, &tokens.session)
            .by(user.0, origin.network());
        audit::insert_system(&mut tx, &event).await?;
        tx.commit().await?;
        attempt.succeeded().await;
        self.signed_in(tokens, member, (&email, &hash), device)
    }

    /// Counts a sign-in attempt. Returns the attempt, and the device if the attempt was counted as one from a known
    /// device. If a known device has no attempts left, it is treated like an unknown device. If such a device were
    /// rejected instead, anyone who has obtained the account's device tokens could lock the owner of the account out.
    async fn attempt(
        &self,
        email: &str,
        known: Option<Device>,
        origin: &Origin,
    ) -> Result<(Attempt, Option<Device>), AuthError> {
        if let Some(device) = known
            && let Ok(attempt) = self.attempts.of_device(email, &device.id).await
        {
            return Ok((attempt, Some(device)));
        }
        let attempt = self.attempts.of_network(email, origin.ip).await;
        Ok((attempt.map_err(refused)?, None))
    }

    /// Returns whether the password is correct. While the password is being verified, the attempt counts as failed, so
    /// disconnecting early has no advantage. The attempt stops counting as failed if the password is correct or was not
    /// verified after all.
    async fn verify(
        &self,
        attempt: &mut Attempt,
        password: &str,
        hash: Option<String>,
        place: &Place,
    ) -> Result<bool, AuthError> {
        attempt.set_judgment(Judgment::Wrong);
        let password = Password::new(password);
        let verified = self.passwords.verify(password, hash, place).await;
        attempt.set_judgment(match verified {
            Ok(true) => Judgment::Correct,
            Ok(false) => Judgment::Wrong,
            Err(_) => Judgment::Missing,
        });
        verified
    }

    /// Changes the user's password, and revokes all of the user's other sessions.
    pub async fn change_password(
        &self,
        (user, tenant, session): (UserId, TenantId, SessionId),
        (current, new): (&str, &str),
        origin: &Origin,
    ) -> Result<(), AuthError> {
        let new = Password::new(new);
        new.check_length()?;
        let attempt = self.attempts.of_user(user.0.as_bytes()).await;
        let mut attempt = attempt.map_err(refused)?;
        let turn = known_turn(&user.to_string());
        let place = self.passwords.enter(turn).await?;
        let mut tx = self.db.system().await?;
        let old = account::password_hash(&mut tx, user.0).await?;
        let member = account::member(&mut tx, user.0, tenant.0).await?;
        tx.commit().await?;
        let (Some(MemberRow { user: row, .. }), Some(old)) = (member, old) else {
            return Err(AuthError::Unauthorized);
        };
        let verified = self
            .verify(&mut attempt, current, Some(old.clone()), &place)
            .await?;
        if !verified {
            return Err(AuthError::WrongCredentials);
        }
        attempt.succeeded().await;
        let hash = self.passwords.hash(new, &row.email, &place).await?;
        drop(place);

        let mut tx = self.db.system().await?;
        // Must come first: this statement waits for sign-ins that have verified the old password, so that their
        // sessions are also revoked.
        if !account::replace_password(&mut tx, user.0, &old, &hash).await? {
            return Err(AuthError::WrongCredentials);
        }
        // The session may have been revoked while this request was waiting. If so, the request must not change the
        // password.
        if session::find_live(&mut tx, session.0).await?.is_none() {
            return Err(AuthError::Unauthorized);
        }
        let ended = session::end_others(&mut tx, user.0, session.0).await?;
        let action = AuditAction::UserChangePassword;
        let event = NewAuditEvent {
            after: Some(json!({"sessions_ended": ended.len()})),
            ..NewAuditEvent::new(tenant.0, action, AuditTarget::User, &user)
                .by(user.0, origin.network())
        };
        audit::insert_system(&mut tx, &event).await?;
        let mut invalidations = Vec::new();
        for id in ended {
            let target = Target::Session(id);
            invalidations.push(invalidation::insert_system(&mut tx, tenant.0, target).await?);
        }
        tx.commit().await?;
        self.sessions.ended(&invalidations);
        tracing::info!(action = "user.change_password", tenant = %tenant, user = %user, "password changed");
        Ok(())
    }
}
