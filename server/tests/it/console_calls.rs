//! Checks every call of the console against the OpenAPI document: the operation exists, accepts the parameters and the
//! body, and returns what the console reads.

use std::{collections::BTreeSet, mem::discriminant};

use quota_common::{
    ApiKeyId, PlanId, ServiceTokenId, SessionId, Timestamp, WebhookDeliveryId, WebhookId,
    alert::UpdateAlertSettings,
    api_key::{ApiKeyStatus, CreateApiKey, RotateApiKey, UpdateApiKey},
    audit::{AuditAction, AuditTarget},
    auth::{ChangePassword, Login, Register, Role, UpdateMe},
    call::{AuditFilter, Call, DecisionFilter, KeyFilter, PageOf, Sent, UsageFilter},
    decision::DecisionOutcome,
    field::Metadata,
    limit::PolicyName,
    page::{ApiKeyOrder, PlanOrder},
    plan::{Billing, CreatePlan, OnRedisFailure, UpdatePlan},
    service_token::CreateServiceToken,
    usage::{UsageBucketSize, UsageGroupBy},
    webhook::{CreateWebhook, RotateWebhookSecret, UpdateWebhook, WebhookDeliveryStatus},
};
use serde_json::{Value, json};

use crate::support::app::{DOCUMENT, faults};

/// Returns the number of kinds of calls. If a new kind of call is added, this function does not compile until the kind
/// is counted. The test then fails until [`samples`] contains the kind.
const fn kinds(call: &Call) -> usize {
    match call {
        Call::Register(_)
        | Call::Login(_)
        | Call::Refresh
        | Call::Logout
        | Call::Me
        | Call::UpdateMe(_)
        | Call::ChangePassword(_)
        | Call::ListSessions(_)
        | Call::EndSession(_)
        | Call::ListPlans(..)
        | Call::CreatePlan(_)
        | Call::UpdatePlan(..)
        | Call::DeletePlan(_)
        | Call::ListApiKeys(..)
        | Call::GetApiKey(_)
        | Call::CreateApiKey(_)
        | Call::UpdateApiKey(..)
        | Call::RotateApiKey(..)
        | Call::DeleteApiKey(_)
        | Call::ListServiceTokens(_)
        | Call::CreateServiceToken(_)
        | Call::DeleteServiceToken(_)
        | Call::ListWebhooks(_)
        | Call::GetWebhook(_)
        | Call::CreateWebhook(_)
        | Call::UpdateWebhook(..)
        | Call::RotateWebhookSecret(..)
        | Call::TestWebhook(_)
        | Call::DeleteWebhook(_)
        | Call::ListDeliveries(..)
        | Call::Redeliver(_)
        | Call::ListAlerts(_)
        | Call::AlertSettings
        | Call::UpdateAlertSettings(_)
        | Call::ListAudit(..)
        | Call::Stats
        | Call::Usage(_)
        | Call::ListDecisions(..)
        | Call::KeyLimits(_)
        | Call::BurnDown(..)
        | Call::Billing
        | Call::StartCheckout
        | Call::OpenBillingPortal
        | Call::Echo => 44,
    }
}

fn id<T: From<uuid::Uuid>>() -> T {
    T::from(uuid::Uuid::from_u128(7))
}

/// Returns one call of each kind, with all fields set.
fn samples() -> Vec<Call> {
    let page = || PageOf {
        limit: Some(20),
        cursor: Some("AZ".into()),
    };
    let at: Timestamp = "2027-01-01T00:00:00Z".parse().expect("a time");
    let (plan, key, webhook) = (id::<PlanId>(), id::<ApiKeyId>(), id::<WebhookId>());
    vec![
        Call::Register(Register {
            email: "a@b.c".into(),
            password: "violet-harbour-quilt-93".into(),
            tenant_name: Some("A".into()),
        }),
        Call::Login(Login {
            email: "a@b.c".into(),
            password: "p".into(),
            device_token: Some("d".into()),
        }),
        Call::Refresh,
        Call::Logout,
        Call::Me,
        Call::UpdateMe(UpdateMe {
            name: Some("A".into()),
            tenant_name: Some("A".into()),
            time_zone: Some("Europe/Berlin".into()),
        }),
        Call::ChangePassword(ChangePassword {
            current_password: "p".into(),
            new_password: "seven orchards under frost".into(),
        }),
        Call::ListSessions(page()),
        Call::EndSession(id::<SessionId>()),
        Call::ListPlans(Some(PlanOrder::Name), page()),
        Call::CreatePlan(CreatePlan {
            name: "A".into(),
            default_rpm: 60.into(),
            burst: Some(10.into()),
            daily_quota: Some(1.into()),
            monthly_quota: Some(1.into()),
            strict: Some(true),
            on_redis_failure: Some(OnRedisFailure::Closed),
            billing: Some(Billing::Paid),
        }),
        Call::UpdatePlan(
            plan,
            UpdatePlan {
                name: Some("A".into()),
                default_rpm: Some(1.into()),
                burst: Some(1.into()),
                daily_quota: Some(None),
                monthly_quota: Some(Some(1.into())),
                strict: Some(false),
                on_redis_failure: Some(None),
                billing: Some(Billing::Free),
            },
        ),
        Call::DeletePlan(plan),
        Call::ListApiKeys(
            KeyFilter {
                plan_id: Some(plan),
                status: Some(ApiKeyStatus::Expired),
                search: Some("mobile & <web>".into()),
                sort: Some(ApiKeyOrder::LastUsed),
            },
            page(),
        ),
        Call::GetApiKey(key),
        Call::CreateApiKey(CreateApiKey {
            name: "A".into(),
            plan_id: plan,
            expires_at: Some(at),
            rpm_override: Some(1.into()),
            external_id: Some("A".into()),
            metadata: Some(Metadata::default()),
        }),
        Call::UpdateApiKey(
            key,
            UpdateApiKey {
                name: Some("A".into()),
                plan_id: Some(plan),
                is_active: Some(true),
                expires_at: Some(None),
                rpm_override: Some(None),
                external_id: Some(None),
                metadata: Some(Metadata::default()),
            },
        ),
        Call::RotateApiKey(
            key,
            RotateApiKey {
                grace_seconds: Some(60.into()),
                replace_previous: Some(true),
            },
        ),
        Call::DeleteApiKey(key),
        Call::ListServiceTokens(page()),
        Call::CreateServiceToken(CreateServiceToken { name: "A".into() }),
        Call::DeleteServiceToken(id::<ServiceTokenId>()),
        Call::ListWebhooks(page()),
        Call::GetWebhook(webhook),
        Call::CreateWebhook(CreateWebhook {
            name: "A".into(),
            url: "https://hooks.example.com/quota".into(),
        }),
        Call::UpdateWebhook(
            webhook,
            UpdateWebhook {
                name: Some("A".into()),
                url: Some("https://hooks.example.com/quota".into()),
                is_active: Some(true),
            },
        ),
        Call::RotateWebhookSecret(
            webhook,
            RotateWebhookSecret {
                grace_seconds: Some(60.into()),
            },
        ),
        Call::TestWebhook(webhook),
        Call::DeleteWebhook(webhook),
        Call::ListDeliveries(webhook, Some(WebhookDeliveryStatus::Failed), page()),
        Call::Redeliver(id::<WebhookDeliveryId>()),
        Call::ListAlerts(page()),
        Call::AlertSettings,
        Call::UpdateAlertSettings(UpdateAlertSettings {
            email: Some(true),
            email_roles: Some(vec![Role::Owner]),
        }),
        Call::ListAudit(
            AuditFilter {
                action: Some(AuditAction::PlanUpdate),
                target_type: Some(AuditTarget::Plan),
                target_id: Some(plan.to_string()),
                actor: Some("ada@".into()),
                search: Some("50% off".into()),
                from: Some(at),
                to: Some(at),
            },
            page(),
        ),
        Call::Stats,
        Call::Usage(UsageFilter {
            from: Some(at),
            to: Some(at),
            bucket: Some(UsageBucketSize::Day),
            tz: Some("Europe/Berlin".into()),
            key_id: Some(key),
            endpoint: Some("GET /orders?a=b".into()),
            group_by: Some(UsageGroupBy::Policy),
        }),
        Call::ListDecisions(
            DecisionFilter {
                key_id: Some(key),
                endpoint: Some("GET /orders".into()),
                outcome: Some(DecisionOutcome::Rejected),
                request_id: Some("r-1".into()),
            },
            page(),
        ),
        Call::KeyLimits(key),
        Call::BurnDown(key, PolicyName::Monthly),
        Call::Billing,
        Call::StartCheckout,
        Call::OpenBillingPortal,
        Call::Echo,
    ]
}

/// Finds the operation of a request in the document. In the document's paths, each parameter is written as `{…}`.
fn operation(sent: &Sent) -> &'static Value {
    let fits = |template: &str| {
        let (a, b): (Vec<&str>, Vec<&str>) = (
            template.split('/').collect(),
            sent.path.split('/').collect(),
        );
        a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| a.starts_with('{') || a == b)
    };
    let (_, operations) = DOCUMENT["paths"]
        .as_object()
        .expect("paths")
        .iter()
        .find(|(template, _)| fits(template))
        .unwrap_or_else(|| panic!("the document has no {}", sent.path));
    let operation = &operations[sent.method.to_lowercase()];
    assert!(
        operation.is_object(),
        "{} has no {}",
        sent.path,
        sent.method
    );
    operation
}

#[test]
fn every_console_call_matches_the_document() {
    let samples = samples();
    let seen: Vec<_> = samples.iter().map(discriminant).collect();
    let distinct = seen
        .iter()
        .enumerate()
        .filter(|(at, it)| !seen[..*at].contains(it))
        .count();
    assert_eq!(distinct, kinds(&samples[0]), "a kind of call has no sample");
    for call in samples {
        let sent = call.sent();
        let what = format!("{} {}", sent.method, sent.path);
        let operation = operation(&sent);
        let offered: BTreeSet<&str> = operation["parameters"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|it| it["in"] == "query")
            .filter_map(|it| it["name"].as_str())
            .collect();
        for (name, _) in &sent.query {
            assert!(offered.contains(name), "{what} takes no {name}");
        }
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        match &sent.body {
            None => assert!(schema.is_null(), "{what} requires a body"),
            Some(body) => {
                assert!(schema.is_object(), "{what} takes no body");
                let body = serde_json::from_str(body).expect("JSON");
                let wrong = faults(schema, &body);
                assert_eq!(wrong, Vec::<String>::new(), "{what} with {body}");
            }
        }
        let good = operation["responses"]
            .as_object()
            .and_then(|answers| answers.iter().find(|(status, _)| status.starts_with('2')))
            .map(|(_, answer)| &answer["content"]["application/json"]["schema"]["$ref"])
            .expect("an operation can succeed");
        let read = answer(&call).map(|name| format!("#/components/schemas/{name}"));
        assert_eq!(good.as_str(), read.as_deref(), "{what}");
        assert_eq!(call.is_of_session(), session_needed(operation), "{what}");
        // The desktop app receives the call as JSON.
        let handed = serde_json::to_value(&call).and_then(serde_json::from_value::<Call>);
        assert_eq!(handed.expect("a call").sent(), sent, "{what}");
    }
}

/// Returns the name of the schema of the response, if the console reads the response.
const fn answer(call: &Call) -> Option<&'static str> {
    Some(match call {
        Call::Register(_) | Call::Login(_) => "SignedIn",
        Call::Refresh => "Tokens",
        Call::Me | Call::UpdateMe(_) => "Me",
        Call::ListSessions(_) => "Page_Session",
        Call::ListPlans(..) => "Page_Plan",
        Call::CreatePlan(_) | Call::UpdatePlan(..) => "Plan",
        Call::ListApiKeys(..) => "Page_ApiKey",
        Call::GetApiKey(_) | Call::UpdateApiKey(..) => "ApiKey",
        Call::CreateApiKey(_) | Call::RotateApiKey(..) => "CreatedApiKey",
        Call::ListServiceTokens(_) => "Page_ServiceToken",
        Call::CreateServiceToken(_) => "CreatedServiceToken",
        Call::ListWebhooks(_) => "Page_Webhook",
        Call::GetWebhook(_) | Call::UpdateWebhook(..) => "Webhook",
        Call::CreateWebhook(_) | Call::RotateWebhookSecret(..) => "CreatedWebhook",
        Call::ListDeliveries(..) => "Page_WebhookDelivery",
        Call::TestWebhook(_) | Call::Redeliver(_) => "WebhookDelivery",
        Call::ListAlerts(_) => "Page_QuotaAlert",
        Call::AlertSettings | Call::UpdateAlertSettings(_) => "AlertSettings",
        Call::ListAudit(..) => "Page_AuditEvent",
        Call::Stats => "Stats",
        Call::Usage(_) => "Usage",
        Call::ListDecisions(..) => "DecisionPage",
        Call::KeyLimits(_) => "KeyLimits",
        Call::BurnDown(..) => "BurnDown",
        Call::Billing => "BillingState",
        Call::StartCheckout => "CheckoutPage",
        Call::OpenBillingPortal => "PortalPage",
        Call::Echo => "Echo",
        Call::Logout
        | Call::ChangePassword(_)
        | Call::EndSession(_)
        | Call::DeletePlan(_)
        | Call::DeleteApiKey(_)
        | Call::DeleteServiceToken(_)
        | Call::DeleteWebhook(_) => return None,
    })
}

/// Returns whether the operation requires an access token.
fn session_needed(operation: &Value) -> bool {
    operation["security"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|it| *it == json!({"AccessToken": []}))
}
