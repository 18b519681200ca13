//! Callers with a permission in their tenant.
//!
//! A handler whose first argument is one of these types runs only for callers with the corresponding permission.
//! Signed-in callers without the permission get 403 before the body is read. [`SignedInTenant`] requires no permission;
//! it is for users' own accounts and sessions. [`Role`] defines the permissions of each role.

use std::ops::Deref;

use poem::{Request, RequestBody, Result};
use poem_openapi::{ApiExtractor, ApiExtractorType, ExtractParamOptions, registry::Registry};
use quota_common::{ProblemCode, auth::Role};

use super::{admitted::SignedInTenant, problem::ApiError};

/// Returns the error for a role without the required permission.
fn forbidden(role: Role) -> ApiError {
    let detail = format!("Your role ({}) does not allow this action.", role.as_str());
    ApiError::new(ProblemCode::Forbidden, detail)
}

impl SignedInTenant {
    /// Returns an error unless the caller may change the tenant itself. Used for `PATCH /auth/me`, where only some
    /// fields require the permission.
    pub fn require_administration(&self) -> Result<(), ApiError> {
        if self.role().may_administer() {
            Ok(())
        } else {
            Err(forbidden(self.role()))
        }
    }
}

// The types are concrete, because a generic extractor would lose its security scheme in the OpenAPI document.
macro_rules! callers_with_a_right {
    ($($(#[$doc:meta])* $name:ident requires $right:ident;)+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone)]
        pub struct $name(SignedInTenant);

        impl Deref for $name {
            type Target = SignedInTenant;

            fn deref(&self) -> &SignedInTenant {
                &self.0
            }
        }

        impl<'a> ApiExtractor<'a> for $name {
            const TYPES: &'static [ApiExtractorType] = SignedInTenant::TYPES;
            type ParamType = ();
            type ParamRawType = ();

            fn register(registry: &mut Registry) {
                SignedInTenant::register(registry);
            }

            fn security_schemes() -> Vec<&'static str> {
                SignedInTenant::security_schemes()
            }

            async fn from_request(
                request: &'a Request,
                body: &mut RequestBody,
                options: ExtractParamOptions<()>,
            ) -> Result<Self> {
                let caller = SignedInTenant::from_request(request, body, options).await?;
                if caller.role().$right() {
                    Ok(Self(caller))
                } else {
                    Err(forbidden(caller.role()).into())
                }
            }
        }
    )+};
}

callers_with_a_right! {
    /// A caller who may read plans, API keys, service tokens, webhooks, and the audit log.
    ReadingTenant requires may_read;
    /// A caller who may read usage.
    UsageTenant requires may_read_usage;
    /// A caller who may read the subscription, and may subscribe, pay, and cancel.
    BillingTenant requires may_bill;
    /// A caller who may create, update, and delete plans, API keys, service tokens, and webhooks.
    ManagingTenant requires may_manage;
    /// A caller who may change the tenant's settings.
    AdministeringTenant requires may_administer;
}
