//! The server, as pages see it: one function for each call, typed. How a call travels is [`browser`]'s.

mod browser;

use quota_common::{
    ApiKeyId, Page, PlanId, Problem, ProblemCode, ServiceTokenId, SessionId,
    api_key::{ApiKey, CreateApiKey, CreatedApiKey, RotateApiKey, UpdateApiKey},
    audit::AuditEvent,
    auth::{ChangePassword, Login, Me, Register, Session, SignedIn, UpdateMe},
    call::{Call, KeyFilter, PageOf},
    plan::{CreatePlan, Plan, UpdatePlan},
    service_token::{CreateServiceToken, CreatedServiceToken, ServiceToken},
};
use serde::de::DeserializeOwned;

pub use browser::{Tried, is_reachable_securely, origin, try_key};

/// Why a call came to nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Failure {
    /// The server said no.
    Problem(Box<Problem>),
    /// It could not be asked.
    Unreachable,
    /// It answered something else than what was asked for.
    Unreadable,
}

impl Failure {
    pub fn is(&self, code: ProblemCode) -> bool {
        matches!(self, Self::Problem(problem) if problem.kind.ends_with(&format!("/{}", code.slug())))
    }

    /// What is said of it when no field is to blame.
    pub fn text(&self) -> String {
        match self {
            Self::Problem(problem) => problem.detail.clone(),
            Self::Unreachable => {
                "The server cannot be reached. Check the connection and try again.".to_owned()
            }
            Self::Unreadable => {
                "The server answered in a way that this page does not understand. Reload it."
                    .to_owned()
            }
        }
    }

    /// What is said of one field.
    pub fn of_field(&self, field: &str) -> Option<String> {
        let Self::Problem(problem) = self else {
            return None;
        };
        problem
            .errors
            .iter()
            .find(|error| error.field == field)
            .map(|error| error.message.clone())
    }

    pub fn names_fields(&self) -> bool {
        matches!(self, Self::Problem(problem) if !problem.errors.is_empty())
    }
}

pub type Answer<T> = Result<T, Failure>;

async fn read<T: DeserializeOwned>(call: Call) -> Answer<T> {
    let body = browser::send(&call).await?;
    serde_json::from_str(&body).map_err(|_| Failure::Unreadable)
}

async fn done(call: Call) -> Answer<()> {
    browser::send(&call).await.map(drop)
}

pub async fn register(body: Register) -> Answer<SignedIn> {
    read(Call::Register(body)).await
}

pub async fn login(body: Login) -> Answer<SignedIn> {
    read(Call::Login(body)).await
}

pub async fn logout() -> Answer<()> {
    done(Call::Logout).await
}

pub async fn me() -> Answer<Me> {
    read(Call::Me).await
}

pub async fn update_me(body: UpdateMe) -> Answer<Me> {
    read(Call::UpdateMe(body)).await
}

pub async fn change_password(body: ChangePassword) -> Answer<()> {
    done(Call::ChangePassword(body)).await
}

pub async fn list_sessions(page: PageOf) -> Answer<Page<Session>> {
    read(Call::ListSessions(page)).await
}

pub async fn end_session(id: SessionId) -> Answer<()> {
    done(Call::EndSession(id)).await
}

pub async fn list_plans(page: PageOf) -> Answer<Page<Plan>> {
    read(Call::ListPlans(page)).await
}

pub async fn create_plan(body: CreatePlan) -> Answer<Plan> {
    read(Call::CreatePlan(body)).await
}

pub async fn update_plan(id: PlanId, body: UpdatePlan) -> Answer<Plan> {
    read(Call::UpdatePlan(id, body)).await
}

pub async fn delete_plan(id: PlanId) -> Answer<()> {
    done(Call::DeletePlan(id)).await
}

pub async fn list_api_keys(filter: KeyFilter, page: PageOf) -> Answer<Page<ApiKey>> {
    read(Call::ListApiKeys(filter, page)).await
}

pub async fn get_api_key(id: ApiKeyId) -> Answer<ApiKey> {
    read(Call::GetApiKey(id)).await
}

pub async fn create_api_key(body: CreateApiKey) -> Answer<CreatedApiKey> {
    read(Call::CreateApiKey(body)).await
}

pub async fn update_api_key(id: ApiKeyId, body: UpdateApiKey) -> Answer<ApiKey> {
    read(Call::UpdateApiKey(id, body)).await
}

pub async fn rotate_api_key(id: ApiKeyId, body: RotateApiKey) -> Answer<CreatedApiKey> {
    read(Call::RotateApiKey(id, body)).await
}

pub async fn delete_api_key(id: ApiKeyId) -> Answer<()> {
    done(Call::DeleteApiKey(id)).await
}

pub async fn list_service_tokens(page: PageOf) -> Answer<Page<ServiceToken>> {
    read(Call::ListServiceTokens(page)).await
}

pub async fn create_service_token(body: CreateServiceToken) -> Answer<CreatedServiceToken> {
    read(Call::CreateServiceToken(body)).await
}

pub async fn delete_service_token(id: ServiceTokenId) -> Answer<()> {
    done(Call::DeleteServiceToken(id)).await
}

pub async fn list_audit(page: PageOf) -> Answer<Page<AuditEvent>> {
    read(Call::ListAudit(page)).await
}
