//! The part of a key's record that is the same for many keys: the plan, with its limits, and the tenant's access to
//! paid plans.
//!
//! Keys on the same plan share one [`PlanRecord`], as long as they were loaded with the same values. Keys with a rate
//! of their own share a record with the other keys on the plan that have the same rate.

use std::{
    any::Any,
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::{Arc, OnceLock, Weak},
};

use parking_lot::Mutex;
use quota_common::{PlanId, TenantId, plan::Billing};

use crate::{
    limiter::{Policies, TenantQuota},
    repo::paid_access::PaidAccess,
};

/// A plan as it applies to keys. See the module documentation.
#[derive(Debug)]
pub struct PlanRecord {
    pub tenant: TenantId,
    pub id: PlanId,
    pub name: String,
    pub billing: Billing,
    /// The tenant's access to paid plans.
    pub paid_access: PaidAccess,
    /// The limits. Their version is that of the first key that used this record.
    pub policies: Policies,
    /// The quota that all keys of the tenant share while the tenant may not use paid plans. `None` if there is no such
    /// quota.
    pub tenant_quota: Option<TenantQuota>,
    /// Response headers that are the same for all requests with keys that use this record. Cached for the API layer.
    pub headers: Attachment,
}

/// A value that a higher layer computes once per record. All callers must use the same type.
#[derive(Debug, Default)]
pub struct Attachment(OnceLock<Box<dyn Any + Send + Sync>>);

impl Attachment {
    pub fn get_or_init<T: Any + Send + Sync>(&self, init: impl FnOnce() -> T) -> &T {
        let value = self.0.get_or_init(|| Box::new(init()));
        value.downcast_ref().expect("all callers use the same type")
    }
}

impl PlanRecord {
    /// Returns whether keys can use the two records interchangeably.
    fn is_like(&self, other: &Self) -> bool {
        let facts = |it: &Self| (it.tenant, it.id, it.billing, it.paid_access);
        facts(self) == facts(other)
            && self.name == other.name
            && self.policies.has_same_limits(&other.policies)
            && self.tenant_quota.is_some() == other.tenant_quota.is_some()
    }
}

/// The plan records that keys use.
#[derive(Debug, Default)]
pub struct PlanRecords {
    records: Mutex<Records>,
    hasher: RandomState,
}

#[derive(Debug, Default)]
struct Records {
    /// The records, by the hash of the plan's ID and of the rate.
    all: HashMap<u64, Weak<PlanRecord>>,
    /// The number of records after the last search for unused ones.
    used: usize,
}

/// [`Records::used`] is treated as at least this number, so that a small map is not searched often.
const FEW: usize = 64;

impl PlanRecords {
    /// Returns a record like `new`: one that other keys use, or `new` itself.
    pub fn share(&self, new: PlanRecord) -> Arc<PlanRecord> {
        let hash = self.hasher.hash_one((new.id, new.policies.rate()));
        let mut records = self.records.lock();
        let known = records.all.get(&hash).and_then(Weak::upgrade);
        if let Some(known) = known.filter(|known| known.is_like(&new)) {
            return known;
        }
        let new = Arc::new(new);
        // If this replaces a record, the old record is no longer shared: only keys that were loaded before an edit use
        // it.
        records.all.insert(hash, Arc::downgrade(&new));
        if records.all.len() > 2 * records.used.max(FEW) {
            records.all.retain(|_, record| record.strong_count() > 0);
            records.used = records.all.len();
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use uuid::Uuid;

    use super::*;
    use crate::limiter::{RatePolicy, Zone};

    fn record(plan: u32, name: &str, rpm: u32, version: u64) -> PlanRecord {
        let rpm = NonZeroU32::new(rpm).unwrap();
        let rate = RatePolicy { rpm, burst: rpm };
        PlanRecord {
            tenant: TenantId(Uuid::nil()),
            id: PlanId(Uuid::from_u128(plan.into())),
            name: name.to_owned(),
            billing: Billing::Free,
            paid_access: PaidAccess::NONE,
            policies: Policies::new(rate, None, None, Zone::utc(), false).with_version(version),
            tenant_quota: None,
            headers: Attachment::default(),
        }
    }

    #[test]
    fn keys_on_the_same_plan_share_a_record_until_the_plan_is_edited() {
        let records = PlanRecords::default();
        let share = |plan, name, rpm, version| records.share(record(plan, name, rpm, version));
        let first = share(1, "Plan", 60, 1);
        assert!(Arc::ptr_eq(&first, &share(1, "Plan", 60, 2)));
        for (plan, name, rpm) in [(2, "Plan", 60), (1, "Renamed", 60), (1, "Plan", 61)] {
            let other = share(plan, name, rpm, 3);
            assert!(!Arc::ptr_eq(&first, &other));
            assert!(Arc::ptr_eq(&other, &share(plan, name, rpm, 4)));
            assert_eq!(
                (other.name.as_str(), other.policies.rate().rpm.get()),
                (name, rpm)
            );
        }
    }

    #[test]
    fn unused_records_are_forgotten() {
        let records = PlanRecords::default();
        let used = records.share(record(0, "Plan", 60, 1));
        for plan in 1..10_000 {
            records.share(record(plan, "Plan", 60, 1));
        }
        assert!(records.records.lock().all.len() <= 2 * FEW + 1);
        assert!(Arc::ptr_eq(&used, &records.share(record(0, "Plan", 60, 1))));
    }
}
