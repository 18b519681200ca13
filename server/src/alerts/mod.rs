//! Quota alerts: detects when the usage of a quota reaches a threshold, and stores an alert with its deliveries.
//!
//! Checks run in the background, based on the quota ledger and the usage rollups. With metering, a tenant is checked
//! when its usage log has grown. Without metering, each round checks all tenants with quotas. Only one replica at a
//! time checks a tenant. Each step checks a limited number of keys, and commits the alerts, their deliveries, and the
//! tenant's progress together, so a crash neither loses nor repeats an alert. The database stores at most one alert for
//! each quota, window, and threshold, and windows that overlap after a change to the time zone count as one window.
//! Therefore, an alert is not created again after a restart, by another replica, or after a change to the plan or time
//! zone.
//!
//! **Used amounts.** The rollups contain the exact cost of allowed requests. The ledger counts the tokens that replicas
//! have taken, which can exceed the cost: usually by at most 1% of the quota, but by more after a crash. Therefore, the
//! ledger is used to select the quotas to check, and the rollups are used to determine how much of each quota has been
//! used. A quota also counts as used up if all of its tokens are taken and it has denied a request. Without metering,
//! there are no rollups, and only the ledger is used.

pub mod email;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;
use quota_common::{
    ApiKeyId, QuotaAlertId, TenantId,
    alert::{QuotaAlert, THRESHOLDS},
    limit::PolicyName,
};
use tokio::time::{Duration, Instant};
use uuid::Uuid;

use crate::{
    db::{Db, DbError, SystemTx},
    repo::{
        alert::{self, AlertRow, NewAlert},
        alert_progress::{self, Keys, Progress},
        quota_standing::{self, Lateness, QuotaStanding, TenantQuota},
        webhook,
        webhook_delivery::{self, NewDelivery},
    },
    webhooks::event::Event,
};

/// With metering, the maximum number of tenants to check per round.
const TENANTS: i64 = 200;
/// If a tenant has more unchecked records than this, all of its keys are checked instead of only the keys in these
/// records.
const RECORDS_MAX: i64 = 200_000;
/// The maximum number of log records in a part of a check. A part can take several steps of up to [`KEYS_MAX`] keys
/// each, and every step reads the records of the part again.
const PART_MAX: i64 = 20_000;
/// The maximum number of keys to check per transaction.
const KEYS_MAX: i64 = 250;
/// The maximum number of alerts per statement.
const ALERTS_MAX: usize = 500;
/// The maximum duration of a step. A step reads usage at most twice, and each read takes at most
/// [`USAGE_TIMEOUT`](quota_standing::USAGE_TIMEOUT).
const STEP_MAX: Duration = Duration::from_secs(30);
/// The time after which a round ends, even if tenants remain. The next round checks them, together with tenants that
/// have new usage.
const ROUND_MAX: Duration = Duration::from_secs(20);

/// Checks tenants' quota usage and stores alerts. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Alerts {
    db: Db,
    is_metered: bool,
    tenant_quota: Option<TenantQuota>,
    /// The tenant whose email was claimed last.
    last_mailed: Arc<Mutex<Uuid>>,
}

/// The result of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Round {
    pub alerts: u64,
    pub deliveries: u64,
    /// Tenants that could not be checked. The next round tries again.
    pub errors: u64,
    /// Whether there may be more unchecked usage.
    pub has_more: bool,
}

/// Converts an alert to the form that the API and webhooks use.
pub fn described(row: AlertRow) -> QuotaAlert {
    let count = |number: i64| u64::try_from(number).unwrap_or(0);
    QuotaAlert {
        id: QuotaAlertId(row.id),
        threshold: u32::try_from(row.threshold).unwrap_or(0),
        policy: policy_name(&row.policy),
        key_id: (!row.key_id.is_nil()).then_some(ApiKeyId(row.key_id)),
        key_name: row.key_name,
        limit: count(row.quota),
        used: count(row.used),
        starts_at: row.window_start.into(),
        resets_at: row.window_end.into(),
        created_at: row.created_at.into(),
    }
}

/// Parses a policy's name. The database allows only valid names.
fn policy_name(name: &str) -> PolicyName {
    PolicyName::of(name).unwrap_or(PolicyName::Monthly)
}

/// Returns the amount of a quota that counts as used.
fn used(standing: &QuotaStanding, is_metered: bool) -> i64 {
    if !is_metered {
        standing.taken.min(standing.quota)
    } else if standing.taken >= standing.quota && standing.has_denials {
        standing.quota
    } else {
        standing.spent
    }
}

/// Returns the thresholds that have been reached, in ascending order.
fn reached(used: i64, quota: i64) -> impl Iterator<Item = i32> {
    let thresholds = THRESHOLDS.into_iter().map(i64::from);
    thresholds
        .filter(move |it| i128::from(used) * 100 >= i128::from(quota) * i128::from(*it))
        .filter_map(|it| i32::try_from(it).ok())
}

impl Alerts {
    /// Creates the service. `tenant_quota` is an additional quota that applies to each tenant as a whole.
    pub fn new(db: Db, is_metered: bool, tenant_quota: Option<TenantQuota>) -> Self {
        Self {
            db,
            is_metered,
            tenant_quota,
            last_mailed: Arc::default(),
        }
    }

    /// Checks tenants with unchecked usage. Without metering, checks all tenants with quotas. Tenants take turns, so
    /// that a tenant with many keys does not delay the others. If a tenant's check fails, the round continues as long
    /// as PostgreSQL responds.
    pub async fn check(&self) -> Result<Round, DbError> {
        let began = Instant::now();
        let tenants = async |tx: &mut SystemTx| {
            if self.is_metered {
                alert_progress::unchecked_tenants(tx, TENANTS).await
            } else {
                alert_progress::tenants_with_quotas(tx).await
            }
        };
        let tenants = self.db.in_system(tenants).await?;
        let mut round = Round {
            has_more: self.is_metered && i64::try_from(tenants.len()).unwrap_or(0) == TENANTS,
            ..Round::default()
        };
        let mut tenants: VecDeque<_> = tenants.into_iter().map(TenantId).collect();
        while let Some(tenant) = tenants.pop_front() {
            match self.db.within(STEP_MAX, self.check_tenant(tenant)).await {
                Ok(step) => {
                    round.alerts += step.alerts;
                    round.deliveries += step.deliveries;
                    if step.has_more {
                        tenants.push_back(tenant);
                    }
                }
                Err(error) => {
                    round.errors += 1;
                    tracing::warn!(%tenant, error = %crate::db::chain(&error), "cannot check quotas");
                    self.db.probe().await?;
                }
            }
            if began.elapsed() >= ROUND_MAX {
                round.has_more |= !tenants.is_empty();
                break;
            }
        }
        Ok(round)
    }

    /// Checks the quotas of up to [`KEYS_MAX`] keys of a tenant in one transaction.
    pub async fn check_tenant(&self, tenant: TenantId) -> Result<Round, DbError> {
        let mut round = Round::default();
        let mut tx = self.db.system().await?;
        let Some(progress) = alert_progress::lock(&mut tx, tenant).await? else {
            return Ok(round);
        };
        let Progress { seq, last_seq, .. } = progress;
        if self.is_metered && progress.part.is_none() && seq == last_seq {
            return Ok(round);
        }
        let (until, after_key) = progress.part.unwrap_or_else(|| {
            let is_counted = seq >= 0 && (0..=RECORDS_MAX).contains(&(last_seq - seq));
            let until = if is_counted {
                last_seq.min(seq + PART_MAX)
            } else {
                last_seq
            };
            (until, Uuid::nil())
        });
        let is_part = seq >= 0 && (0..=PART_MAX).contains(&(until - seq));
        let keys = if self.is_metered && is_part {
            Keys::Used { after: seq, until }
        } else {
            Keys::All
        };
        let lateness = match keys {
            Keys::Used { after, until } => {
                Lateness::of_records(&mut tx, tenant, (after, until)).await?
            }
            Keys::All if self.is_metered && seq >= 0 => Lateness::unknown(),
            Keys::All => Lateness::default(),
        };
        let keys = alert_progress::keys(&mut tx, tenant, keys, after_key, KEYS_MAX).await?;
        let lowest = THRESHOLDS.into_iter().min().unwrap_or(0);
        let lowest = i32::try_from(lowest).unwrap_or(0);
        let mut standings =
            quota_standing::of_keys(&mut tx, tenant, &keys, lowest, &lateness).await?;
        if let Some(quota) = self.tenant_quota
            && after_key.is_nil()
        {
            standings.extend(
                quota_standing::of_tenant(&mut tx, tenant, quota, lowest, &lateness).await?,
            );
        }
        (round.alerts, round.deliveries) = self.store(&mut tx, tenant, &standings).await?;
        let is_last = i64::try_from(keys.len()).unwrap_or(0) < KEYS_MAX;
        match keys.last() {
            Some(last) if !is_last => {
                round.has_more = true;
                alert_progress::set(&mut tx, tenant, seq, Some((until, *last))).await?;
            }
            _ => {
                round.has_more = self.is_metered && until < last_seq;
                let seq = if self.is_metered { until } else { seq };
                alert_progress::set(&mut tx, tenant, seq, None).await?;
            }
        }
        tx.commit().await?;
        Ok(round)
    }

    /// Stores new alerts with their deliveries. Returns the numbers of new alerts and deliveries.
    async fn store(
        &self,
        tx: &mut SystemTx,
        tenant: TenantId,
        standings: &[QuotaStanding],
    ) -> Result<(u64, u64), DbError> {
        let candidates: Vec<_> = standings
            .iter()
            .flat_map(|standing| {
                let used = used(standing, self.is_metered);
                reached(used, standing.quota).map(move |threshold| NewAlert {
                    id: Uuid::now_v7(),
                    standing,
                    threshold,
                    used,
                })
            })
            .collect();
        let mut new = Vec::new();
        for part in candidates.chunks(ALERTS_MAX) {
            new.extend(alert::insert_new(tx, tenant, part).await?);
        }
        if new.is_empty() {
            return Ok((0, 0));
        }
        alert::mark_for_email(tx, tenant, &highest(&new)).await?;
        let events: Vec<Event> = new
            .into_iter()
            .map(|row| Event::threshold_reached(&described(row)))
            .collect();
        let webhooks = webhook::lock_active(tx, tenant).await?;
        let deliveries: Vec<_> = events
            .iter()
            .flat_map(|event| {
                webhooks.iter().map(move |webhook_id| NewDelivery {
                    tenant_id: tenant.0,
                    id: Uuid::now_v7(),
                    webhook_id: *webhook_id,
                    event_id: &event.id,
                    event_type: event.kind,
                    payload: &event.payload,
                })
            })
            .collect();
        webhook_delivery::insert_all(tx, tenant.0, &webhooks, &deliveries).await?;
        Ok((events.len() as u64, deliveries.len() as u64))
    }
}

/// Returns the ID of the alert with the highest threshold for each quota and window.
fn highest(alerts: &[AlertRow]) -> Vec<Uuid> {
    let mut highest = HashMap::new();
    for alert in alerts {
        let quota = (alert.key_id, &alert.policy, alert.window_start);
        let entry = highest.entry(quota).or_insert(alert);
        if alert.threshold > entry.threshold {
            *entry = alert;
        }
    }
    highest.into_values().map(|it| it.id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(quota: i64, taken: i64, spent: i64, has_denials: bool) -> QuotaStanding {
        QuotaStanding {
            key_id: Uuid::nil(),
            key_name: None,
            policy: "daily".into(),
            quota,
            taken,
            spent,
            has_denials,
            window_start: chrono::DateTime::UNIX_EPOCH,
            window_end: chrono::DateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn a_threshold_is_reached_exactly_at_its_percentage() {
        let all = |used, quota| reached(used, quota).collect::<Vec<_>>();
        assert!(all(49, 100).is_empty());
        assert_eq!(all(50, 100), [50]);
        assert_eq!(all(79, 100), [50]);
        assert_eq!(all(80, 100), [50, 80]);
        assert_eq!(all(99, 100), [50, 80]);
        assert_eq!(all(100, 100), [50, 80, 100]);
        assert_eq!(all(150, 100), [50, 80, 100]);
        assert!(all(0, 1).is_empty());
        assert_eq!(all(1, 1), [50, 80, 100]);
        assert!(all(1, 3).is_empty());
        assert_eq!(all(2, 3), [50]);
        let most = 999_999_999_999_999;
        assert_eq!(all(most - 1, most), [50, 80]);
        assert_eq!(all(most, most), [50, 80, 100]);
    }

    #[test]
    fn tokens_that_replicas_only_hold_do_not_count_as_used() {
        assert_eq!(used(&standing(100, 51, 49, false), true), 49);
        assert_eq!(used(&standing(100, 100, 99, false), true), 99);
    }

    #[test]
    fn quota_with_lost_tokens_is_used_up_when_requests_are_denied() {
        assert_eq!(used(&standing(100, 100, 99, true), true), 100);
        // The denied request cost more than the remaining quota.
        assert_eq!(used(&standing(100, 98, 98, true), true), 98);
    }

    #[test]
    fn without_metering_the_ledger_decides() {
        assert_eq!(used(&standing(100, 80, 0, false), false), 80);
        assert_eq!(used(&standing(100, 120, 0, false), false), 100);
    }
}
