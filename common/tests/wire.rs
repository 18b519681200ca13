//! Checks the API's types against golden JSON and, with the `openapi` feature, checks that the OpenAPI document
//! describes the same JSON. serde and poem-openapi read separate attributes, which can drift apart silently.

use quota_common::{
    ApiKeyId, FieldError, Page, PlanId, Problem, ProblemCode, ServiceTokenId, SessionId, TenantId,
    Timestamp, UserId, alert, api_key, audit, auth, billing, decision, field::Metadata, health,
    limit, plan, service_token, usage, webhook,
};
use serde_json::{Value, json};

fn at() -> Timestamp {
    "2026-08-03T06:26:00Z".parse().expect("a time")
}

const ID: &str = "019ab4e1-7c00-7000-8000-0000000000a1";

fn id<T: From<uuid::Uuid>>() -> T {
    T::from(ID.parse().expect("an id"))
}

/// Checks a value against its golden JSON in both directions, and against poem-openapi's serializer.
macro_rules! golden {
    ($value:expr, $json:expr) => {{
        fn check<T>(value: &T, golden: &Value)
        where
            T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + Wire,
        {
            let text = serde_json::to_value(value).expect("serializes");
            assert_eq!(&text, golden);
            assert_eq!(
                value.document_json(),
                *golden,
                "the document's serializer differs"
            );
            let back: T = serde_json::from_value(text).expect("reads its own JSON");
            assert!(back == *value, "does not survive a round trip: {golden}");
        }
        check(&$value, &$json);
    }};
}

/// Like `golden`, and also checks that the console can parse the response.
macro_rules! golden_response {
    ($value:expr, $json:expr) => {{
        let (value, golden) = ($value, $json);
        let read = quota_common::json::read(&golden.to_string());
        assert!(
            read.as_ref() == Ok(&value),
            "the console cannot read {golden}"
        );
        golden!(value, golden);
    }};
}

trait Wire {
    fn document_json(&self) -> Value;
}

#[cfg(feature = "openapi")]
impl<T: poem_openapi::types::ToJSON> Wire for T {
    fn document_json(&self) -> Value {
        self.to_json().expect("an object")
    }
}

#[cfg(not(feature = "openapi"))]
impl<T: serde::Serialize> Wire for T {
    fn document_json(&self) -> Value {
        serde_json::to_value(self).expect("serializes")
    }
}

fn api_key() -> api_key::ApiKey {
    api_key::ApiKey {
        id: id::<ApiKeyId>(),
        name: "Mobile".into(),
        plan_id: id::<PlanId>(),
        prefix: "qk_abcd1234".into(),
        is_active: true,
        expires_at: Some(at()),
        rpm_override: None,
        external_id: Some("crm-7".into()),
        metadata: metadata(),
        last_used_at: None,
        previous_expires_at: None,
        created_at: at(),
        updated_at: at(),
    }
}

fn metadata() -> Metadata {
    [("region".into(), "eu".into())].into_iter().collect()
}

fn api_key_json() -> Value {
    json!({
        "id": ID, "name": "Mobile", "plan_id": ID, "prefix": "qk_abcd1234", "is_active": true,
        "expires_at": "2026-08-03T06:26:00.000Z", "rpm_override": null, "external_id": "crm-7",
        "metadata": {"region": "eu"}, "last_used_at": null, "previous_expires_at": null, "created_at": "2026-08-03T06:26:00.000Z",
        "updated_at": "2026-08-03T06:26:00.000Z",
    })
}

#[test]
fn billing_matches_its_golden_json() {
    golden_response!(
        billing::BillingState {
            enabled: true,
            access: billing::BillingAccess::PastDue,
            paid_plans_work: true,
            access_ends_at: Some(at()),
            trial_ends_at: None,
            cancels_at: Some(at()),
            period_start: Some(at()),
            period_end: Some(at()),
            has_customer: true,
            refreshed_at: Some(at()),
            price: Some(billing::BillingPrice {
                name: None,
                currency: "usd".into(),
                monthly: Some("2900".into()),
                per_request: Some("0.05".into()),
            }),
            usage: Some(billing::BillingUsage {
                used: 40_000,
                projected: 62_000,
                charge: Some(2000),
                projected_total: Some(6000),
                reported_until: Some(at()),
                not_charged: 7,
                last_error: Some(billing::BillingUsageError {
                    code: "meter_event_customer_not_found".into(),
                    at: at(),
                }),
            }),
            limits: billing::BillingLimits {
                plans: billing::BillingLimit {
                    used: 3,
                    maximum: Some(5),
                },
                api_keys: billing::BillingLimit {
                    used: 12,
                    maximum: Some(20),
                },
                requests: billing::BillingLimit {
                    used: 9,
                    maximum: None,
                },
                requests_reset_at: at(),
                free_plan_rpm: Some(60),
                free_plan_quota: None,
            },
            paid_plans: 1,
            paid_keys: 4,
        },
        json!({
            "enabled": true, "access": "past_due", "paid_plans_work": true,
            "access_ends_at": "2026-08-03T06:26:00.000Z", "trial_ends_at": null,
            "cancels_at": "2026-08-03T06:26:00.000Z",
            "period_start": "2026-08-03T06:26:00.000Z", "period_end": "2026-08-03T06:26:00.000Z",
            "has_customer": true, "refreshed_at": "2026-08-03T06:26:00.000Z",
            "price": {"name": null, "currency": "usd", "monthly": "2900", "per_request": "0.05"},
            "usage": {
                "used": 40_000, "projected": 62_000, "charge": 2000, "projected_total": 6000,
                "reported_until": "2026-08-03T06:26:00.000Z", "not_charged": 7,
                "last_error": {"code": "meter_event_customer_not_found", "at": "2026-08-03T06:26:00.000Z"},
            },
            "limits": {
                "plans": {"used": 3, "maximum": 5}, "api_keys": {"used": 12, "maximum": 20},
                "requests": {"used": 9, "maximum": null}, "requests_reset_at": "2026-08-03T06:26:00.000Z",
                "free_plan_rpm": 60, "free_plan_quota": null,
            },
            "paid_plans": 1, "paid_keys": 4,
        })
    );
    golden_response!(
        billing::CheckoutPage {
            url: "https://checkout.stripe.com/c/pay/cs_1".into(),
            expires_at: at(),
        },
        json!({"url": "https://checkout.stripe.com/c/pay/cs_1", "expires_at": "2026-08-03T06:26:00.000Z"})
    );
    golden_response!(
        billing::PortalPage {
            url: "https://billing.stripe.com/p/session/1".into(),
        },
        json!({"url": "https://billing.stripe.com/p/session/1"})
    );
}

fn webhook() -> webhook::Webhook {
    webhook::Webhook {
        id: id(),
        name: "Alerts".into(),
        url: "https://hooks.example.com/quota".into(),
        is_active: false,
        disabled_reason: Some("Gone".into()),
        failing_since: Some(at()),
        previous_secret_expires_at: None,
        created_at: at(),
        updated_at: at(),
    }
}

fn webhook_json() -> Value {
    json!({
        "id": ID, "name": "Alerts", "url": "https://hooks.example.com/quota", "is_active": false,
        "disabled_reason": "Gone", "failing_since": "2026-08-03T06:26:00.000Z",
        "previous_secret_expires_at": null, "created_at": "2026-08-03T06:26:00.000Z",
        "updated_at": "2026-08-03T06:26:00.000Z",
    })
}

#[test]
fn webhooks_match_their_golden_json() {
    golden_response!(webhook(), webhook_json());
    golden!(
        webhook::CreateWebhook {
            name: "Alerts".into(),
            url: "https://hooks.example.com/quota".into(),
        },
        json!({"name": "Alerts", "url": "https://hooks.example.com/quota"})
    );
    golden!(
        webhook::UpdateWebhook {
            is_active: Some(true),
            ..Default::default()
        },
        json!({"is_active": true})
    );
    golden!(
        webhook::RotateWebhookSecret {
            grace_seconds: Some(60.into()),
        },
        json!({"grace_seconds": 60})
    );
    golden_response!(
        webhook::CreatedWebhook {
            secret: Some("whsec_AAAA".into()),
            webhook: webhook(),
        },
        json!({"secret": "whsec_AAAA", "webhook": webhook_json()})
    );
    golden_response!(
        webhook::CreatedWebhook {
            secret: None,
            webhook: webhook(),
        },
        json!({"webhook": webhook_json()})
    );
    golden_response!(
        webhook::WebhookDelivery {
            id: id(),
            webhook_id: id(),
            event_id: "msg_1".into(),
            event_type: "webhook.test".into(),
            status: webhook::WebhookDeliveryStatus::Failed,
            attempts: 10,
            response_status: Some(503),
            error: Some("Status 503.".into()),
            last_attempt_at: Some(at()),
            next_attempt_at: None,
            payload: json!({"type": "webhook.test"}),
            created_at: at(),
        },
        json!({
            "id": ID, "webhook_id": ID, "event_id": "msg_1", "event_type": "webhook.test", "status": "failed",
            "attempts": 10, "response_status": 503, "error": "Status 503.",
            "last_attempt_at": "2026-08-03T06:26:00.000Z", "next_attempt_at": null,
            "payload": {"type": "webhook.test"}, "created_at": "2026-08-03T06:26:00.000Z",
        })
    );
}

#[test]
fn alerts_match_their_golden_json() {
    golden_response!(
        alert::QuotaAlert {
            id: id(),
            threshold: 80,
            policy: limit::PolicyName::Daily,
            key_id: Some(id()),
            key_name: Some("Mobile".into()),
            limit: 100,
            used: 81,
            starts_at: at(),
            resets_at: at(),
            created_at: at(),
        },
        json!({
            "id": ID, "threshold": 80, "policy": "daily", "key_id": ID, "key_name": "Mobile", "limit": 100,
            "used": 81, "starts_at": "2026-08-03T06:26:00.000Z", "resets_at": "2026-08-03T06:26:00.000Z",
            "created_at": "2026-08-03T06:26:00.000Z",
        })
    );
    golden_response!(
        alert::AlertSettings {
            email: true,
            email_roles: vec![auth::Role::Owner, auth::Role::Admin],
            can_email: true,
        },
        json!({"email": true, "email_roles": ["owner", "admin"], "can_email": true})
    );
    golden!(
        alert::UpdateAlertSettings {
            email: Some(false),
            email_roles: Some(vec![]),
        },
        json!({"email": false, "email_roles": []})
    );
}

#[test]
fn plans_match_their_golden_json() {
    golden_response!(
        plan::Plan {
            id: id(),
            name: "Starter".into(),
            default_rpm: 600,
            burst: 60,
            daily_quota: Some(50_000),
            monthly_quota: None,
            strict: false,
            on_redis_failure: Some(plan::OnRedisFailure::Closed),
            billing: plan::Billing::Paid,
            key_count: 2,
            created_at: at(),
            updated_at: at(),
        },
        json!({
            "id": ID, "name": "Starter", "default_rpm": 600, "burst": 60, "daily_quota": 50_000,
            "monthly_quota": null, "strict": false, "on_redis_failure": "closed", "billing": "paid",
            "key_count": 2,
            "created_at": "2026-08-03T06:26:00.000Z", "updated_at": "2026-08-03T06:26:00.000Z",
        })
    );
    golden!(
        plan::CreatePlan {
            name: "Starter".into(),
            default_rpm: 600.into(),
            burst: None,
            daily_quota: Some(1.into()),
            monthly_quota: None,
            strict: Some(true),
            on_redis_failure: Some(plan::OnRedisFailure::Open),
            billing: Some(plan::Billing::Free),
        },
        json!({
            "name": "Starter", "default_rpm": 600, "daily_quota": 1, "strict": true,
            "on_redis_failure": "open", "billing": "free",
        })
    );
    golden!(plan::UpdatePlan::default(), json!({}));
    golden!(
        plan::UpdatePlan {
            burst: Some(5.into()),
            daily_quota: Some(Some(9.into())),
            on_redis_failure: Some(Some(plan::OnRedisFailure::Share)),
            ..Default::default()
        },
        json!({"burst": 5, "daily_quota": 9, "on_redis_failure": "share"})
    );
}

/// poem-openapi serializes absent and cleared fields in the same way. This does not matter, because only the console
/// serializes PATCH bodies, and it uses serde.
#[test]
fn patch_field_distinguishes_null_from_absent() {
    let cleared: plan::UpdatePlan = serde_json::from_value(json!({"daily_quota": null})).unwrap();
    assert_eq!(cleared.daily_quota, Some(None));
    assert_eq!(cleared.monthly_quota, None);
    let as_set: plan::UpdatePlan =
        serde_json::from_value(json!({"on_redis_failure": null})).unwrap();
    assert_eq!(as_set.on_redis_failure, Some(None));
    assert_eq!(
        serde_json::to_value(&cleared).unwrap(),
        json!({"daily_quota": null})
    );
}

#[test]
fn api_keys_match_their_golden_json() {
    golden_response!(api_key(), api_key_json());
    golden!(
        api_key::CreateApiKey {
            name: "Mobile".into(),
            plan_id: id(),
            expires_at: Some(at()),
            rpm_override: Some(7.into()),
            external_id: Some("crm-7".into()),
            metadata: Some(metadata()),
        },
        json!({
            "name": "Mobile", "plan_id": ID, "expires_at": "2026-08-03T06:26:00.000Z", "rpm_override": 7,
            "external_id": "crm-7", "metadata": {"region": "eu"},
        })
    );
    golden!(
        api_key::UpdateApiKey {
            is_active: Some(false),
            ..Default::default()
        },
        json!({"is_active": false})
    );
    golden!(
        api_key::RotateApiKey {
            grace_seconds: Some(60.into()),
            replace_previous: None,
        },
        json!({"grace_seconds": 60})
    );
    golden!(
        api_key::RotateApiKey {
            grace_seconds: None,
            replace_previous: Some(true),
        },
        json!({"replace_previous": true})
    );
    golden_response!(
        api_key::CreatedApiKey {
            key: Some("qk_x".into()),
            api_key: api_key()
        },
        json!({"key": "qk_x", "api_key": api_key_json()})
    );
    golden_response!(
        api_key::CreatedApiKey {
            key: None,
            api_key: api_key()
        },
        json!({"api_key": api_key_json()})
    );
}

#[test]
fn service_tokens_match_their_golden_json() {
    let token = service_token::ServiceToken {
        id: id::<ServiceTokenId>(),
        name: "Edge".into(),
        prefix: "qs_abcd1234".into(),
        last_used_at: Some(at()),
        created_at: at(),
    };
    let token_json = json!({
        "id": ID, "name": "Edge", "prefix": "qs_abcd1234", "last_used_at": "2026-08-03T06:26:00.000Z",
        "created_at": "2026-08-03T06:26:00.000Z",
    });
    golden_response!(token.clone(), token_json.clone());
    golden!(
        service_token::CreateServiceToken {
            name: "Edge".into()
        },
        json!({"name": "Edge"})
    );
    golden_response!(
        service_token::CreatedServiceToken {
            token: Some("qs_x".into()),
            service_token: token
        },
        json!({"token": "qs_x", "service_token": token_json})
    );
}

#[test]
fn accounts_match_their_golden_json() {
    let user = || auth::User {
        id: id::<UserId>(),
        email: "a@b.c".into(),
        name: "Ada".into(),
        created_at: at(),
    };
    let tenant = || auth::Tenant {
        id: id::<TenantId>(),
        name: "Engines".into(),
        role: auth::Role::Owner,
        time_zone: "UTC".into(),
    };
    let user_json = json!({"id": ID, "email": "a@b.c", "name": "Ada", "created_at": "2026-08-03T06:26:00.000Z"});
    let tenant_json = json!({"id": ID, "name": "Engines", "role": "owner", "time_zone": "UTC"});

    golden!(
        auth::Register {
            email: "a@b.c".into(),
            password: "p".into(),
            tenant_name: Some("Engines".into()),
        },
        json!({"email": "a@b.c", "password": "p", "tenant_name": "Engines"})
    );
    golden!(
        auth::Login {
            email: "a@b.c".into(),
            password: "p".into(),
            device_token: Some("d".into()),
        },
        json!({"email": "a@b.c", "password": "p", "device_token": "d"})
    );
    golden!(
        auth::Refresh {
            refresh_token: Some("qr_x".into())
        },
        json!({"refresh_token": "qr_x"})
    );
    golden_response!(
        auth::Tokens {
            access_token: Some("a".into()),
            refresh_token: Some("r".into()),
            expires_in: 900
        },
        json!({"access_token": "a", "refresh_token": "r", "expires_in": 900})
    );
    golden_response!(
        auth::SignedIn {
            access_token: Some("a".into()),
            refresh_token: Some("r".into()),
            device_token: Some("d".into()),
            expires_in: 900,
            user: user(),
            tenant: tenant(),
        },
        json!({
            "access_token": "a", "refresh_token": "r", "device_token": "d", "expires_in": 900, "user": user_json,
            "tenant": tenant_json,
        })
    );
    golden!(
        auth::Refresh {
            refresh_token: None
        },
        json!({})
    );
    golden_response!(
        auth::Tokens {
            access_token: None,
            refresh_token: None,
            expires_in: 900
        },
        json!({"expires_in": 900})
    );
    golden_response!(
        auth::Me {
            user: user(),
            tenant: tenant(),
            session_id: id::<SessionId>()
        },
        json!({"user": user_json, "tenant": tenant_json, "session_id": ID})
    );
    golden!(
        auth::UpdateMe {
            time_zone: Some("Europe/Berlin".into()),
            ..Default::default()
        },
        json!({"time_zone": "Europe/Berlin"})
    );
    golden!(
        auth::ChangePassword {
            current_password: "p".into(),
            new_password: "q".into()
        },
        json!({"current_password": "p", "new_password": "q"})
    );
    golden_response!(
        auth::Session {
            id: id(),
            current: true,
            user_agent: None,
            ip: Some("192.0.2.1".into()),
            created_at: at(),
            last_used_at: at(),
            expires_at: at(),
        },
        json!({
            "id": ID, "current": true, "user_agent": null, "ip": "192.0.2.1",
            "created_at": "2026-08-03T06:26:00.000Z", "last_used_at": "2026-08-03T06:26:00.000Z",
            "expires_at": "2026-08-03T06:26:00.000Z",
        })
    );
}

#[test]
fn checks_match_their_golden_json() {
    golden!(
        limit::Check {
            key: "qk_x".into(),
            cost: Some(2.into()),
            endpoint: Some("GET /o".into())
        },
        json!({"key": "qk_x", "cost": 2, "endpoint": "GET /o"})
    );
    golden_response!(
        limit::CheckResult {
            allowed: false,
            code: limit::CheckCode::QuotaExceeded,
            key_id: Some(id()),
            plan: Some("Starter".into()),
            limits: vec![limit::LimitState {
                policy: limit::PolicyName::Rpm,
                limit: 600,
                remaining: 0,
                reset_at: at(),
            }],
            retry_after: Some(3),
            headers: [("Retry-After".to_owned(), "3".to_owned())].into(),
        },
        json!({
            "allowed": false, "code": "quota_exceeded", "key_id": ID, "plan": "Starter",
            "limits": [
                {"policy": "rpm", "limit": 600, "remaining": 0, "reset_at": "2026-08-03T06:26:00.000Z"},
            ],
            "retry_after": 3, "headers": {"Retry-After": "3"},
        })
    );
    golden_response!(
        limit::Echo {
            key_id: id(),
            plan: "Starter".into(),
            time: at()
        },
        json!({"key_id": ID, "plan": "Starter", "time": "2026-08-03T06:26:00.000Z"})
    );
}

#[test]
fn other_types_match_their_golden_json() {
    golden_response!(
        audit::AuditEvent {
            id: id(),
            at: at(),
            user_id: None,
            user_email: None,
            action: "plan.create".into(),
            target_type: "plan".into(),
            target_id: Some(ID.into()),
            target_name: Some("Starter".into()),
            ip: None,
            before: None,
            after: Some(json!({"name": "Starter"})),
        },
        json!({
            "id": ID, "at": "2026-08-03T06:26:00.000Z", "user_id": null, "user_email": null,
            "action": "plan.create", "target_type": "plan", "target_id": ID, "target_name": "Starter", "ip": null,
            "before": null, "after": {"name": "Starter"},
        })
    );
    golden_response!(
        health::Health {
            status: "ok".into(),
            version: "0.1.0".into()
        },
        json!({"status": "ok", "version": "0.1.0"})
    );
    golden_response!(
        Page {
            items: vec![api_key()],
            next_cursor: Some("c".into()),
            total: 1
        },
        json!({"items": [api_key_json()], "next_cursor": "c", "total": 1})
    );
    golden_response!(
        Problem {
            kind: ProblemCode::Invalid.type_uri("https://q.example/").into(),
            title: "t".into(),
            status: 422,
            detail: "d".into(),
            request_id: ID.into(),
            errors: vec![FieldError {
                field: "name".into(),
                message: "m".into()
            }],
            violated_policies: vec![limit::PolicyName::Daily],
        },
        json!({
            "type": "https://q.example/problems/invalid", "title": "t", "status": 422, "detail": "d",
            "request_id": ID, "errors": [{"field": "name", "message": "m"}],
            "violated-policies": ["daily"],
        })
    );
}

const AT: &str = "2026-08-03T06:26:00.000Z";

#[test]
fn usage_matches_its_golden_json() {
    let (allowed, rejected, allowed_cost, rejected_cost) = (7, 2, 14, 4);
    golden_response!(
        usage::Usage {
            from: at(),
            to: at(),
            bucket: usage::UsageBucketSize::Day,
            time_zone: "Asia/Kolkata".into(),
            group_by: Some(usage::UsageGroupBy::Endpoint),
            complete_until: at(),
            total: usage::UsageCounts {
                allowed,
                rejected,
                allowed_cost,
                rejected_cost,
            },
            buckets: vec![usage::UsageBucket {
                start: at(),
                key_id: None,
                endpoint: Some("GET /".into()),
                policy: None,
                plan_id: None,
                other: false,
                allowed,
                rejected,
                allowed_cost,
                rejected_cost,
            }],
            groups: vec![usage::UsageGroup {
                key_id: Some(id()),
                endpoint: None,
                policy: Some("rpm".into()),
                plan_id: Some(id()),
                name: Some("Mobile".into()),
                other: true,
                allowed,
                rejected,
                allowed_cost,
                rejected_cost,
                last_seen_at: Some(at()),
            }],
        },
        json!({
            "from": AT, "to": AT, "bucket": "day", "time_zone": "Asia/Kolkata", "group_by": "endpoint",
            "complete_until": AT,
            "total": {"allowed": 7, "rejected": 2, "allowed_cost": 14, "rejected_cost": 4},
            "buckets": [{
                "start": AT, "key_id": null, "endpoint": "GET /", "policy": null, "plan_id": null, "other": false,
                "allowed": 7, "rejected": 2, "allowed_cost": 14, "rejected_cost": 4,
            }],
            "groups": [{
                "key_id": ID, "endpoint": null, "policy": "rpm", "plan_id": ID, "name": "Mobile", "other": true,
                "allowed": 7, "rejected": 2, "allowed_cost": 14, "rejected_cost": 4, "last_seen_at": AT,
            }],
        })
    );
}

#[test]
fn stats_match_their_golden_json() {
    golden_response!(
        usage::Stats {
            total_keys: 1,
            active_keys: 2,
            unused_keys: 3,
            total_plans: 4,
            requests_today: 5,
            rejected_today: 6,
            requests_yesterday: 7,
            rejected_yesterday: 8,
            today: at(),
            time_zone: "UTC".into(),
            complete_until: at(),
            closest_to_limit: Some(usage::QuotaStatus {
                key_id: id(),
                key_name: "Mobile".into(),
                policy: limit::PolicyName::Monthly,
                used: 9,
                limit: 10,
                reset_at: at(),
            }),
            attention: vec![usage::Attention {
                kind: usage::AttentionKind::GraceEnding,
                key_id: id(),
                key_name: "Mobile".into(),
                at: at(),
                policy: None,
                used: None,
                limit: None,
            }],
        },
        json!({
            "total_keys": 1, "active_keys": 2, "unused_keys": 3, "total_plans": 4, "requests_today": 5,
            "rejected_today": 6, "requests_yesterday": 7, "rejected_yesterday": 8, "today": AT, "time_zone": "UTC",
            "complete_until": AT,
            "closest_to_limit": {
                "key_id": ID, "key_name": "Mobile", "policy": "monthly", "used": 9, "limit": 10, "reset_at": AT,
            },
            "attention": [{
                "kind": "grace_ending", "key_id": ID, "key_name": "Mobile", "at": AT, "policy": null, "used": null,
                "limit": null,
            }],
        })
    );
}

#[test]
fn limits_and_burn_downs_match_their_golden_json() {
    golden_response!(
        usage::KeyLimits {
            key_id: id(),
            plan_id: id(),
            plan: "Starter".into(),
            rpm: 600,
            burst: 60,
            limits: vec![limit::LimitState {
                policy: limit::PolicyName::Rpm,
                limit: 60,
                remaining: 12,
                reset_at: at(),
            }],
            at: at(),
        },
        json!({
            "key_id": ID, "plan_id": ID, "plan": "Starter", "rpm": 600, "burst": 60,
            "limits": [{"policy": "rpm", "limit": 60, "remaining": 12, "reset_at": AT}], "at": AT,
        })
    );
    golden_response!(
        usage::BurnDown {
            key_id: id(),
            policy: limit::PolicyName::Daily,
            limit: 100,
            used: 40,
            remaining: 60,
            starts_at: at(),
            resets_at: at(),
            points: vec![usage::BurnDownPoint {
                at: at(),
                remaining: 60,
                ideal_remaining: 50,
            }],
            pace_per_hour: 2.5,
            used_up_at: None,
            projected_remaining: 0,
            complete_until: at(),
        },
        json!({
            "key_id": ID, "policy": "daily", "limit": 100, "used": 40, "remaining": 60, "starts_at": AT,
            "resets_at": AT, "points": [{"at": AT, "remaining": 60, "ideal_remaining": 50}], "pace_per_hour": 2.5,
            "used_up_at": null, "projected_remaining": 0, "complete_until": AT,
        })
    );
}

#[test]
fn decisions_match_their_golden_json() {
    golden_response!(
        decision::DecisionPage {
            items: vec![decision::Decision {
                id: ID.parse().expect("an id"),
                at: at(),
                key_id: id(),
                key_name: None,
                plan_id: id(),
                endpoint: String::new(),
                outcome: decision::DecisionOutcome::Rejected,
                policy: Some("rpm".into()),
                retry_after: Some(2),
                cost: 1,
                request_id: "r".into(),
            }],
            next_cursor: None,
            total: Some(1),
            last_event_id: "A".into(),
        },
        json!({
            "items": [{
                "id": ID, "at": AT, "key_id": ID, "key_name": null, "plan_id": ID, "endpoint": "",
                "outcome": "rejected", "policy": "rpm", "retry_after": 2, "cost": 1, "request_id": "r",
            }],
            "next_cursor": null, "total": 1, "last_event_id": "A",
        })
    );
    golden_response!(decision::DroppedDecisions { count: 7 }, json!({"count": 7}));
}

#[test]
fn unknown_field_is_rejected() {
    let unknown = json!({"name": "x", "default_rpm": 1, "tenant_id": ID});
    let error = serde_json::from_value::<plan::CreatePlan>(unknown).unwrap_err();
    assert!(
        error.to_string().contains("unknown field `tenant_id`"),
        "{error}"
    );
}

#[test]
fn problem_slugs_are_unique_and_round_trip() {
    for code in ProblemCode::ALL {
        assert_eq!(ProblemCode::from_slug(code.slug()), Some(*code));
        assert!(code.explanation().len() > 20);
    }
}

#[test]
fn timestamps_accept_any_offset_and_write_utc() {
    let at: Timestamp = "2026-08-03T08:26:00.123456+02:00".parse().unwrap();
    assert_eq!(at.to_string(), "2026-08-03T06:26:00.123Z");
    for wrong in [
        "",
        "yesterday",
        "2026-08-03",
        "1969-12-31T23:59:59Z",
        "9999-12-31T23:59:59-01:00",
    ] {
        assert!(wrong.parse::<Timestamp>().is_err(), "{wrong}");
    }
}
