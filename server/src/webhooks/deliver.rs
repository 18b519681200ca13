//! Sends deliveries that are due, and decides when to retry failed deliveries.
//!
//! An attempt is counted before it is made. Unless the attempt's result is recorded, the delivery becomes due again
//! after [`LEASE`]. Therefore, a delivery is not lost if this process exits.

use std::time::Duration;

use quota_common::audit::{AuditAction, AuditTarget};
use uuid::Uuid;

use super::{
    Webhooks, context,
    send::{Attempt, Sent},
    signature::sign,
};
use crate::{
    db::{self, DbError, SystemTx},
    repo::{
        audit::{self, NewAuditEvent},
        webhook,
        webhook_delivery::{self, AttemptResult, Claim, DueDelivery},
    },
};

/// Seconds until another replica may repeat an attempt. Longer than any attempt takes, including the recording of its
/// result.
const LEASE: i32 = 60;
/// The pauses between attempts, in seconds. Their sum is about a day.
const PAUSES: [i64; 9] = [5, 60, 300, 1800, 3600, 7200, 14_400, 21_600, 37_000];
/// The longest pause that an endpoint can request, in seconds.
const PAUSE_MAX: i64 = 12 * 3600;
/// If an endpoint has been failing for at least this many seconds when a delivery is abandoned, the webhook is
/// disabled.
const FAILING_MAX: i64 = 3 * 24 * 3600;
/// The maximum number of concurrent attempts per tenant on one replica.
const PER_TENANT: i64 = 8;
/// The maximum number of concurrent attempts per webhook on one replica.
const PER_WEBHOOK: i64 = 4;
/// The maximum number of attempts per delivery.
const ATTEMPTS_MAX: i32 = 10;

const GONE: u16 = 410;

/// The outcome of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Delivered,
    /// The delivery will be retried.
    Postponed,
    /// The delivery will not be retried.
    Failed,
}

/// Returns the number of seconds until the next attempt. Returns `None` if the last attempt has been made. `attempts`
/// is the number of attempts made, and `random` is in `0..1`.
fn pause(attempts: i32, retry_after: Option<u64>, random: f64) -> Option<i64> {
    let index = usize::try_from(attempts - 1).unwrap_or(0);
    let pause = *PAUSES.get(index)?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "a day has few seconds"
    )]
    let jitter = (pause as f64 * 0.2 * random) as i64;
    let requested = retry_after.map_or(0, |it| i64::try_from(it).unwrap_or(PAUSE_MAX));
    Some((pause + jitter).max(requested.min(PAUSE_MAX)))
}

impl Webhooks {
    /// Claims up to `limit` deliveries that are due. `running` contains the tenant and webhook of each attempt in
    /// progress. These attempts count toward the limits per tenant and per webhook.
    pub async fn claim(
        &self,
        limit: usize,
        running: &[(Uuid, Uuid)],
    ) -> Result<Vec<DueDelivery>, DbError> {
        let (running_tenants, running_webhooks): (Vec<_>, Vec<_>) = running.iter().copied().unzip();
        let after_tenant = *self.0.last_tenant.lock();
        let claim = Claim {
            limit: i64::try_from(limit).unwrap_or(i64::MAX),
            per_tenant: PER_TENANT,
            per_webhook: PER_WEBHOOK,
            running_tenants: &running_tenants,
            running_webhooks: &running_webhooks,
            after_tenant,
            attempts_max: ATTEMPTS_MAX,
            lease_seconds: LEASE,
        };
        let due = self
            .0
            .db
            .in_system(async |tx| webhook_delivery::claim(tx, &claim).await)
            .await?;
        // The next claim starts with the tenant after the last tenant in this claim.
        let tenants = due.iter().map(|it| it.tenant_id);
        if let Some(last) = tenants.max_by_key(|it| (*it <= after_tenant, *it)) {
            *self.0.last_tenant.lock() = last;
        }
        Ok(due)
    }

    /// Sends a delivery and records the result.
    pub async fn deliver(&self, due: &DueDelivery) -> Result<Outcome, DbError> {
        let sent = self.attempt(due).await;
        let (outcome, is_disabled) = self
            .0
            .db
            .in_system(async |tx| record(tx, due, &sent).await)
            .await?;
        if is_disabled {
            // The other deliveries are canceled in a separate transaction, so that the result is recorded even if
            // canceling fails. In that case, the deliveries stay pending until another attempt fails in the same way.
            if let Err(error) = self.cancel(due).await {
                let error = db::chain(&error);
                tracing::warn!(webhook = %due.webhook_id, error, "cannot cancel deliveries");
            }
        }
        Ok(outcome)
    }

    /// Cancels the other deliveries of a disabled webhook.
    async fn cancel(&self, due: &DueDelivery) -> Result<(), DbError> {
        let (tenant, id) = (due.tenant_id, due.webhook_id);
        let cancel = async |tx: &mut SystemTx| {
            // The webhook may have been enabled again.
            if webhook::lock_disabled(tx, tenant, id).await? {
                webhook_delivery::cancel_system(tx, tenant, id, "The webhook was disabled.")
                    .await?;
            }
            Ok(())
        };
        self.0.db.in_system(cancel).await
    }

    async fn attempt(&self, due: &DueDelivery) -> Sent {
        // The URL is checked again: `QUOTA_WEBHOOK_PRIVATE_NETWORKS` may have changed since the webhook was saved.
        let (url, scheme) = match self.0.targets.parse(&due.url) {
            Ok(parsed) => parsed,
            Err(message) => return Sent::failed(format!("The URL {message}.")),
        };
        let context = context(due.tenant_id, due.webhook_id);
        let decrypt = |secret: &Vec<u8>| Some(self.0.encryption.decrypt(&context, secret)?.secret);
        let Some(secret) = decrypt(&due.secret) else {
            return Sent::failed("The signing secret cannot be read. Rotate it.");
        };
        let mut secrets = vec![secret];
        // Receivers with the current secret ignore the signature made with the previous secret.
        secrets.extend(due.previous_secret.as_ref().and_then(decrypt));
        let attempt = Attempt {
            event_id: &due.event_id,
            at: due.at,
            signature: &sign(&secrets, &due.event_id, due.at, &due.payload),
            payload: &due.payload,
        };
        self.0.sender.send(url, scheme, &attempt).await
    }

    /// Returns how many seconds ago the oldest due delivery became due, or 0 if none is due.
    pub async fn overdue_seconds(&self) -> Result<i64, DbError> {
        let seconds = self
            .0
            .db
            .in_system(async |tx| webhook_delivery::overdue_seconds(tx).await)
            .await?;
        Ok(seconds)
    }
}

/// Records the result of an attempt. Returns the outcome, and whether the webhook was disabled as a result.
async fn record(
    tx: &mut SystemTx,
    due: &DueDelivery,
    sent: &Sent,
) -> Result<(Outcome, bool), DbError> {
    let (tenant, id) = (due.tenant_id, due.webhook_id);
    let mut result = AttemptResult {
        response_status: sent.status.map(i32::from),
        error: sent.error.as_deref(),
        retry_after: None,
    };
    // Webhooks are always locked before their deliveries.
    if sent.error.is_none() {
        webhook::succeeded(tx, tenant, id, &due.url).await?;
        webhook_delivery::finish(tx, due, &result).await?;
        return Ok((Outcome::Delivered, false));
    }
    let Some(failing) = webhook::failed(tx, tenant, id, &due.url).await? else {
        // The webhook was deleted.
        return Ok((Outcome::Failed, false));
    };
    // A response from a different URL says nothing about the current URL.
    if sent.status == Some(GONE) && failing.is_current {
        webhook_delivery::finish(tx, due, &result).await?;
        disable(tx, due, "The endpoint responded with status 410 (Gone).").await?;
        return Ok((Outcome::Failed, true));
    }
    result.retry_after = pause(due.attempts, sent.retry_after, random());
    webhook_delivery::finish(tx, due, &result).await?;
    if result.retry_after.is_some() {
        return Ok((Outcome::Postponed, false));
    }
    let is_disabled = failing.is_current && failing.seconds >= FAILING_MAX;
    if is_disabled {
        disable(tx, due, "All deliveries failed for more than 3 days.").await?;
    }
    Ok((Outcome::Failed, is_disabled))
}

/// Disables a webhook. Does nothing if the webhook is already disabled.
async fn disable(tx: &mut SystemTx, due: &DueDelivery, reason: &str) -> Result<(), DbError> {
    let (tenant, id) = (due.tenant_id, due.webhook_id);
    let Some(name) = webhook::disable(tx, tenant, id, reason).await? else {
        return Ok(());
    };
    let event = NewAuditEvent {
        target_name: Some(&name),
        after: Some(serde_json::json!({"is_active": false, "disabled_reason": reason})),
        ..NewAuditEvent::new(
            tenant,
            AuditAction::WebhookDisable,
            AuditTarget::Webhook,
            &id,
        )
    };
    audit::insert_system(tx, &event).await?;
    tracing::info!(%tenant, webhook = %id, reason, "webhook disabled");
    Ok(())
}

/// Returns a random number in `0..1`. If random bytes are not available, there is no jitter.
fn random() -> f64 {
    getrandom::u32().map_or(0.0, |it| f64::from(it) / (f64::from(u32::MAX) + 1.0))
}

/// How long a stopping server waits for attempts in progress. Deliveries whose attempts are still in progress after
/// that are retried later.
pub const FINISH: Duration = Duration::from_secs(3);

#[cfg(test)]
mod schedule_tests {
    use super::*;

    #[test]
    fn retries_take_a_day_and_then_end() {
        let total = |random| {
            (1..=9)
                .map(|n| pause(n, None, random).unwrap())
                .sum::<i64>()
        };
        let hours = |seconds: i64| seconds / 3600;
        assert_eq!((hours(total(0.0)), hours(total(0.999))), (23, 28));
        assert_eq!(pause(1, None, 0.0), Some(5));
        assert_eq!(usize::try_from(ATTEMPTS_MAX), Ok(PAUSES.len() + 1));
        assert_eq!(pause(10, None, 0.5), None);
        assert_eq!(pause(10, Some(60), 0.5), None);
    }

    #[test]
    fn endpoint_can_request_a_longer_pause_but_not_a_shorter_one() {
        assert_eq!(pause(1, Some(600), 0.0), Some(600));
        assert_eq!(pause(4, Some(600), 0.0), Some(1800));
        assert_eq!(pause(1, Some(u64::MAX), 0.0), Some(12 * 3600));
    }
}
