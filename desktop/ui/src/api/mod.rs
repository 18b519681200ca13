//! The server, as pages see it: one function for each call, typed. How a call travels is for the way in between to
//! know: of a browser, or of the desktop app. A build has one of them, so that a browser does not load the other.

#[cfg(not(feature = "desktop"))]
#[path = "browser.rs"]
mod way;
#[cfg(feature = "desktop")]
#[path = "tauri.rs"]
mod way;

use std::{cell::RefCell, pin::Pin};

use quota_common::{
    ApiKeyId, Page, PlanId, Problem, ProblemCode, ServiceTokenId, SessionId,
    api_key::{ApiKey, CreateApiKey, CreatedApiKey, RotateApiKey, UpdateApiKey},
    audit::AuditEvent,
    auth::{ChangePassword, Login, Me, Register, Session, SignedIn, UpdateMe},
    call::{AuditFilter, Call, KeyFilter, PageOf},
    page::PlanOrder,
    plan::{CreatePlan, Plan, UpdatePlan},
    service_token::{CreateServiceToken, CreatedServiceToken, ServiceToken},
};
use serde::de::DeserializeOwned;

#[cfg(feature = "desktop")]
pub use way::{add_server, forget_server, ready, standing, use_server};
pub use way::{copy, is_reachable_securely, origin, try_key};

/// Why a call came to nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Failure {
    /// The server said no.
    Problem(Box<Problem>),
    /// It could not be asked.
    Unreachable,
    /// It answered something else than what was asked for.
    Unreadable,
    /// Another window signed in as somebody else: nothing was sent in their name.
    Elsewhere,
    /// It let one in, and the browser kept no cookie of it.
    NotKept,
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
            Self::Elsewhere => {
                "Another account has signed in in this browser. Nothing was changed.".to_owned()
            }
            Self::NotKept => {
                "Your browser did not keep the session. Allow cookies for this site, then sign in again."
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

/// What a try of a key came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Tried {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
}

impl Tried {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(it, _)| *it == name)
            .map(|(_, value)| value.as_str())
    }
}

/// An answer to come. Boxed, so that pages do not each carry a call's whole way within them.
pub type Pending<T> = Pin<Box<dyn Future<Output = Answer<T>>>>;

type Told = Box<dyn Fn(&Failure)>;

thread_local! {
    static OVER: RefCell<Option<Told>> = const { RefCell::new(None) };
}

/// What is done when a call finds that the session is over: it was ended elsewhere, has run out, or is another's.
pub fn when_over(then: impl Fn(&Failure) + 'static) {
    OVER.set(Some(Box::new(then)));
}

fn send(call: Call) -> Pending<String> {
    Box::pin(async move {
        let answer = way::send(&call).await;
        if let Err(failure) = &answer
            && (*failure == Failure::Elsewhere
                || (call.is_of_session() && failure.is(ProblemCode::Unauthorized)))
        {
            OVER.with_borrow(|then| then.as_ref().map(|then| then(failure)));
        }
        answer
    })
}

fn read<T: DeserializeOwned>(call: Call) -> Pending<T> {
    let body = send(call);
    Box::pin(async move { serde_json::from_str(&body.await?).map_err(|_| Failure::Unreadable) })
}

fn done(call: Call) -> Pending<()> {
    let body = send(call);
    Box::pin(async move { body.await.map(drop) })
}

pub fn register(body: Register) -> Pending<SignedIn> {
    read(Call::Register(body))
}

pub fn login(body: Login) -> Pending<SignedIn> {
    read(Call::Login(body))
}

pub fn logout() -> Pending<()> {
    done(Call::Logout)
}

pub fn me() -> Pending<Me> {
    read(Call::Me)
}

pub fn update_me(body: UpdateMe) -> Pending<Me> {
    read(Call::UpdateMe(body))
}

pub fn change_password(body: ChangePassword) -> Pending<()> {
    done(Call::ChangePassword(body))
}

pub fn list_sessions(page: PageOf) -> Pending<Page<Session>> {
    read(Call::ListSessions(page))
}

pub fn end_session(id: SessionId) -> Pending<()> {
    done(Call::EndSession(id))
}

pub fn list_plans(sort: Option<PlanOrder>, page: PageOf) -> Pending<Page<Plan>> {
    read(Call::ListPlans(sort, page))
}

pub fn create_plan(body: CreatePlan) -> Pending<Plan> {
    read(Call::CreatePlan(body))
}

pub fn update_plan(id: PlanId, body: UpdatePlan) -> Pending<Plan> {
    read(Call::UpdatePlan(id, body))
}

pub fn delete_plan(id: PlanId) -> Pending<()> {
    done(Call::DeletePlan(id))
}

pub fn list_api_keys(filter: KeyFilter, page: PageOf) -> Pending<Page<ApiKey>> {
    read(Call::ListApiKeys(filter, page))
}

pub fn get_api_key(id: ApiKeyId) -> Pending<ApiKey> {
    read(Call::GetApiKey(id))
}

pub fn create_api_key(body: CreateApiKey) -> Pending<CreatedApiKey> {
    read(Call::CreateApiKey(body))
}

pub fn update_api_key(id: ApiKeyId, body: UpdateApiKey) -> Pending<ApiKey> {
    read(Call::UpdateApiKey(id, body))
}

pub fn rotate_api_key(id: ApiKeyId, body: RotateApiKey) -> Pending<CreatedApiKey> {
    read(Call::RotateApiKey(id, body))
}

pub fn delete_api_key(id: ApiKeyId) -> Pending<()> {
    done(Call::DeleteApiKey(id))
}

pub fn list_service_tokens(page: PageOf) -> Pending<Page<ServiceToken>> {
    read(Call::ListServiceTokens(page))
}

pub fn create_service_token(body: CreateServiceToken) -> Pending<CreatedServiceToken> {
    read(Call::CreateServiceToken(body))
}

pub fn delete_service_token(id: ServiceTokenId) -> Pending<()> {
    done(Call::DeleteServiceToken(id))
}

pub fn list_audit(filter: AuditFilter, page: PageOf) -> Pending<Page<AuditEvent>> {
    read(Call::ListAudit(filter, page))
}
