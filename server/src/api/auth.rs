//! `/auth`.

use poem::{Request, Result, http::HeaderValue};
use poem_openapi::{
    OpenApi,
    param::{Path, Query},
};
use quota_common::{
    Page, ProblemCode, SessionId, TenantId, UserId,
    audit::{AuditAction, AuditTarget},
    auth::{
        ChangePassword, Login, Me, Refresh, Register, Role, Session, SignedIn, Tenant, Tokens,
        UpdateMe, User,
    },
};
use serde_json::json;

use super::{
    Tag,
    admitted::SignedInTenant,
    browser::{self, SessionCookie, WithCookies},
    change::Edit,
    json::{Created, Json, NoContent},
    page::{self, PageSize},
    problem::{ApiError, OrNotFound},
    request_context::origin,
};
use crate::{
    auth::{
        AuthError,
        account::{self, Credentials},
        token::LIFETIME,
    },
    db::DbError,
    limiter::Zone,
    repo::{
        account::{self as rows, TenantChange, TenantRow, UserRow},
        audit::{self, NewAuditEvent},
        invalidation::Target,
        session::SessionRow,
    },
    state::AppState,
};

pub struct AuthApi {
    pub state: AppState,
}

fn user(row: UserRow) -> User {
    User {
        id: UserId(row.id),
        email: row.email,
        name: row.name,
        created_at: row.created_at.into(),
    }
}

fn tenant(row: TenantRow, role: Role) -> Tenant {
    Tenant {
        id: TenantId(row.id),
        name: row.name,
        role,
        time_zone: row.time_zone,
    }
}

/// Returns whether the request asks for tokens in cookies. Rejects such a request if it does not come from this
/// server's own pages.
fn cookies_wanted(state: &AppState, request: &Request) -> Result<bool, ApiError> {
    let wanted = browser::wants_cookies(request.headers());
    if wanted {
        browser::same_origin(state, request.headers())?;
    }
    Ok(wanted)
}

/// Returns the tokens either in the body or in cookies.
fn signed_in(
    state: &AppState,
    request: &Request,
    cookies: bool,
    it: account::SignedIn,
) -> (SignedIn, Vec<HeaderValue>) {
    let set = if cookies {
        let mut set = browser::keep(state, request, &it.tokens);
        set.extend(browser::keep_device(state, request, &it.device));
        set
    } else {
        Vec::new()
    };
    let body = SignedIn {
        access_token: (!cookies).then_some(it.tokens.access),
        refresh_token: (!cookies).then_some(it.tokens.refresh),
        device_token: (!cookies).then_some(it.device),
        expires_in: LIFETIME,
        user: user(it.user),
        tenant: tenant(it.tenant, Role::of(&it.role).unwrap_or(Role::Viewer)),
    };
    (body, set)
}

fn refresh_token_missing() -> ApiError {
    ApiError::unauthorized(
        false,
        "Send a refresh token, or the session's cookies with X-Quota-Session: cookie.",
    )
}

/// Returns the device token from the cookie or the body.
fn device<'a>(
    state: &AppState,
    request: &'a Request,
    cookies: bool,
    sent: Option<&'a str>,
) -> Option<&'a str> {
    if cookies {
        browser::cookie(state, request, SessionCookie::Device)
    } else {
        sent
    }
}

/// Returns a function that reports a rejected new password as an error in `field`.
fn under(field: &'static str) -> impl Fn(AuthError) -> ApiError {
    move |error| match error {
        AuthError::WeakPassword(message) => ApiError::invalid(field, message),
        error => error.into(),
    }
}

#[OpenApi(prefix_path = "/auth", tag = "Tag::Auth")]
impl AuthApi {
    /// Register
    ///
    /// Creates a user, a tenant that the user owns, and a session. If the request has `X-Quota-Session: cookie`, the
    /// tokens are set as cookies instead of being returned in the body. Such a request must come from this server's own
    /// pages. Returns 403 if the operator has closed registration.
    #[oai(path = "/register", method = "post", operation_id = "register")]
    async fn register(
        &self,
        request: &Request,
        body: Json<Register>,
    ) -> Result<WithCookies<Created<SignedIn>>, ApiError> {
        let in_cookies = cookies_wanted(&self.state, request)?;
        let Register {
            email,
            password,
            tenant_name,
        } = body.0;
        if !self.state.config.registration.is_open() {
            return Err(ApiError::new(
                ProblemCode::RegistrationClosed,
                "Registration is closed on this server. Ask its operator for an account.",
            ));
        }
        let origin = origin(request);
        let device = device(&self.state, request, in_cookies, None);
        let account = self.state.accounts.register(
            &email,
            &password,
            tenant_name.as_deref(),
            device,
            &origin,
        );
        let account = account.await.map_err(under("password"))?;
        let (body, cookies) = signed_in(&self.state, request, in_cookies, account);
        Ok(WithCookies {
            answer: Created(body),
            cookies,
        })
    }

    /// Sign in
    ///
    /// Creates a session and returns its tokens. Failed sign-ins are limited per account and network. Send the
    /// `device_token` of an earlier sign-in to identify a known device. Attempts from a known device are counted
    /// separately, so they are not delayed by failed sign-ins from unknown devices. If the request has
    /// `X-Quota-Session: cookie`, all tokens are set as cookies instead of being returned in the body. Such a request
    /// must come from this server's own pages.
    #[oai(path = "/login", method = "post", operation_id = "login")]
    async fn login(
        &self,
        request: &Request,
        body: Json<Login>,
    ) -> Result<WithCookies<Json<SignedIn>>, ApiError> {
        let in_cookies = cookies_wanted(&self.state, request)?;
        let origin = origin(request);
        let sent = body.0.device_token.as_deref();
        let credentials = Credentials {
            email: &body.0.email,
            password: &body.0.password,
            device: device(&self.state, request, in_cookies, sent),
        };
        let account = self.state.accounts.login(credentials, &origin);
        let (body, cookies) = signed_in(&self.state, request, in_cookies, account.await?);
        Ok(WithCookies {
            answer: Json(body),
            cookies,
        })
    }

    /// Refresh an access token
    ///
    /// Exchanges a refresh token for a new pair of tokens. Each refresh token works once. If the client loses the
    /// response, it can send the same token again within ten seconds to get the same new refresh token. Any other reuse
    /// revokes the session. With `X-Quota-Session: cookie`, the token is read from its cookie; send `{}` as the body.
    /// `X-Quota-CSRF` must then contain the value of the `quota_csrf` cookie (`__Host-quota_csrf` over HTTPS).
    #[oai(path = "/refresh", method = "post", operation_id = "refresh")]
    async fn refresh(
        &self,
        request: &Request,
        body: Json<Refresh>,
    ) -> Result<WithCookies<Json<Tokens>>, ApiError> {
        let sessions = &self.state.sessions;
        let origin = origin(request);
        if !browser::wants_cookies(request.headers()) {
            let token = body.0.refresh_token.ok_or_else(refresh_token_missing)?;
            let tokens = sessions.refresh(&token, &origin).await?;
            let answer = Json(Tokens {
                access_token: Some(tokens.access),
                refresh_token: Some(tokens.refresh),
                expires_in: LIFETIME,
            });
            return Ok(WithCookies {
                answer,
                cookies: Vec::new(),
            });
        }
        let (token, session) = browser::refresh_token(&self.state, request)?.ok_or_else(|| {
            ApiError::unauthorized(false, "No session cookie was sent. Sign in again.")
        })?;
        if !sessions.is_of(token, session).await? {
            return Err(AuthError::Unauthorized.into());
        }
        let tokens = sessions.refresh(token, &origin).await?;
        Ok(WithCookies {
            cookies: browser::keep(&self.state, request, &tokens),
            answer: Json(Tokens {
                access_token: None,
                refresh_token: None,
                expires_in: LIFETIME,
            }),
        })
    }

    /// Sign out
    ///
    /// Revokes the session of the refresh token. The session's access tokens stop working on all replicas within one
    /// second. With `X-Quota-Session: cookie`, the refresh token is read from its cookie, as in `POST /auth/refresh`,
    /// and the session's cookies are deleted.
    #[oai(path = "/logout", method = "post", operation_id = "logout")]
    async fn logout(
        &self,
        request: &Request,
        body: Json<Refresh>,
    ) -> Result<WithCookies<NoContent>, ApiError> {
        let sessions = &self.state.sessions;
        let origin = origin(request);
        let mut cookies = Vec::new();
        if browser::wants_cookies(request.headers()) {
            if let Some((token, session)) = browser::refresh_token(&self.state, request)?
                && sessions.is_of(token, session).await?
            {
                sessions.end_by_refresh_token(token, &origin).await?;
            }
            cookies = browser::forget(&self.state, request);
        } else {
            let token = body.0.refresh_token.ok_or_else(refresh_token_missing)?;
            sessions.end_by_refresh_token(&token, &origin).await?;
        }
        Ok(WithCookies {
            answer: NoContent,
            cookies,
        })
    }

    /// Get the current user
    ///
    /// Returns the user, the session's tenant, and the session's ID.
    #[oai(path = "/me", method = "get", operation_id = "get_me")]
    async fn me(&self, caller: SignedInTenant) -> Result<Json<Me>, ApiError> {
        Ok(Json(self.load_me(&caller).await?))
    }

    /// Update the current user
    ///
    /// Updates the user's display name, the tenant's name or the tenant's time zone. Only owners and admins can update
    /// the tenant.
    #[oai(path = "/me", method = "patch", operation_id = "update_me")]
    async fn update_me(
        &self,
        caller: SignedInTenant,
        body: Json<UpdateMe>,
    ) -> Result<Json<Me>, ApiError> {
        let body = body.0;
        if body.tenant_name.is_some() || body.time_zone.is_some() {
            caller.require_administration()?;
        }
        if body
            .time_zone
            .as_deref()
            .is_some_and(|zone| Zone::named(zone).is_err())
        {
            return Err(ApiError::invalid(
                "time_zone",
                "must be an IANA time zone, such as Europe/Berlin",
            ));
        }
        if body.tenant_name.is_some() || body.time_zone.is_some() {
            // Begin this edit before changing the user's name, because the edit waits for the tenant's other changes
            // and may be rejected.
            let mut edit = Edit::begin(&self.state, &caller).await?;
            let before = rows::lock_tenant(&mut edit).await.or_not_found()?;
            let now = i64::try_from(self.state.clock.now().0).unwrap_or(i64::MAX);
            let change = TenantChange {
                name: body.tenant_name.as_deref().map(str::trim),
                time_zone: body.time_zone.as_deref(),
                updated_at: chrono::DateTime::from_timestamp_nanos(now),
            };
            let after = rows::update_tenant(&mut edit, &change).await?;
            let (before, after) = (tenant(before, caller.role()), tenant(after, caller.role()));
            // Invalidate the cached records of the tenant's keys, because a new time zone changes when their quotas
            // reset.
            let action = AuditAction::TenantUpdate;
            edit.updated(action, &before, &after, Target::Tenant)
                .await?;
        }
        if let Some(name) = &body.name {
            let name = name.trim();
            let mut tx = self.state.db.system().await?;
            let member = rows::member(&mut tx, caller.user().0, caller.tenant().0).await?;
            let before = member
                .ok_or_else(|| ApiError::from(AuthError::Unauthorized))?
                .user;
            rows::set_user_name(&mut tx, caller.user().0, name).await?;
            let (tenant, user) = (caller.tenant(), caller.user());
            let action = AuditAction::UserUpdate;
            let event = NewAuditEvent {
                before: Some(json!({"name": before.name})),
                after: Some(json!({"name": name})),
                ..NewAuditEvent::new(tenant.0, action, AuditTarget::User, &user)
                    .by(user.0, caller.origin.network())
            };
            audit::insert_system(&mut tx, &event).await?;
            tx.commit().await?;
            tracing::info!(action = "user.update", tenant = %caller.tenant(), user = %caller.user(), "user updated");
        }
        Ok(Json(self.load_me(&caller).await?))
    }

    /// Change the password
    ///
    /// Changes the user's password and revokes all of their other sessions.
    #[oai(path = "/password", method = "post", operation_id = "change_password")]
    async fn password(
        &self,
        caller: SignedInTenant,
        body: Json<ChangePassword>,
    ) -> Result<NoContent, ApiError> {
        let who = (caller.user(), caller.tenant(), caller.session_id());
        let passwords = (&*body.0.current_password, &*body.0.new_password);
        let changed = self
            .state
            .accounts
            .change_password(who, passwords, &caller.origin)
            .await;
        changed.map_err(|error| match error {
            // The caller is signed in and does not need to sign in again, so report a wrong password as an invalid
            // field.
            AuthError::WrongCredentials => ApiError::invalid("current_password", "is incorrect"),
            error => under("new_password")(error),
        })?;
        Ok(NoContent)
    }

    /// List your sessions
    ///
    /// Returns your active sessions, newest first.
    #[oai(path = "/sessions", method = "get", operation_id = "list_sessions")]
    async fn sessions(
        &self,
        caller: SignedInTenant,
        /// Page size, 1–100. Default: 20.
        limit: Query<Option<PageSize>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<Session>>, ApiError> {
        let slice = page::slice(limit.0, cursor.0.as_deref())?;
        let rows = self.state.sessions.of_user(caller.user(), slice).await?;
        let show = |row: SessionRow| Session {
            id: SessionId(row.id),
            current: row.id == caller.session_id().0,
            user_agent: row.user_agent,
            ip: row.ip.map(|ip| ip.addr().to_string()),
            created_at: row.created_at.into(),
            last_used_at: row.last_used_at.into(),
            expires_at: row.expires_at.into(),
        };
        Ok(Json(page::page(rows, |row| row.id, show)))
    }

    /// Revoke a session
    ///
    /// The session's tokens stop working on all replicas within one second.
    #[oai(
        path = "/sessions/:session_id",
        method = "delete",
        operation_id = "end_session"
    )]
    async fn end_session(
        &self,
        caller: SignedInTenant,
        session_id: Path<SessionId>,
    ) -> Result<NoContent, ApiError> {
        let ended = self
            .state
            .sessions
            .end(caller.user(), session_id.0, &caller.origin)
            .await?;
        if ended {
            Ok(NoContent)
        } else {
            Err(ApiError::not_found())
        }
    }
}

impl AuthApi {
    async fn load_me(&self, caller: &SignedInTenant) -> Result<Me, ApiError> {
        let mut tx = self.state.db.system().await?;
        let member = rows::member(&mut tx, caller.user().0, caller.tenant().0).await?;
        tx.commit().await?;
        let member = member.ok_or_else(|| ApiError::from(AuthError::Unauthorized))?;
        let role = Role::of(&member.role)
            .ok_or_else(|| ApiError::from(DbError::Constraint("memberships_role_known".into())))?;
        Ok(Me {
            user: user(member.user),
            tenant: tenant(member.tenant, role),
            session_id: caller.session_id(),
        })
    }
}
