//! Sorts and counts decisions before they are appended.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use chrono::{DateTime, Utc};
use uuid::Uuid;

/// A decision on a known key. The decision also counts as a use of the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRecord {
    pub event_id: Uuid,
    pub tenant_id: Uuid,
    pub key_id: Uuid,
    pub plan_id: Uuid,
    pub at: DateTime<Utc>,
    /// `free` or `paid`.
    pub billing: &'static str,
    /// Empty if the caller did not send an endpoint.
    pub endpoint: String,
    pub was_rejected: bool,
    /// The policy that denied the request. `None` if the request was allowed, or was denied because limits could not be
    /// checked.
    pub policy: Option<&'static str>,
    /// Seconds until a retry can succeed. Set only for denied requests.
    pub retry_after_seconds: Option<i32>,
    /// At least 1.
    pub cost: i64,
    pub request_id: String,
}

impl UsageRecord {
    /// Returns the policy under which rollups count the decision.
    fn counted_policy(&self) -> &'static str {
        match (self.was_rejected, self.policy) {
            (false, _) => "",
            (true, Some(policy)) => policy,
            (true, None) => "reduced_capacity",
        }
    }

    /// Returns the start of the quarter hour in which the decision was made, in seconds since 1970.
    fn quarter(&self) -> i64 {
        let at = self.at.timestamp();
        at - at.rem_euclid(QUARTER)
    }

    /// Returns whether rollups count both decisions in the same row.
    fn counts_in_row_of(&self, other: &Self) -> bool {
        self.key_id == other.key_id
            && self.plan_id == other.plan_id
            && self.tenant_id == other.tenant_id
            && self.was_rejected == other.was_rejected
            && self.policy == other.policy
            && self.endpoint == other.endpoint
            && self.quarter() == other.quarter()
    }
}

/// The endpoint of rows that cover all endpoints.
const ALL_ENDPOINTS: &str = "\u{1}";
/// The endpoint of rows that cover all endpoints beyond the limit.
const FURTHER_ENDPOINTS: &str = "\u{2}";
/// The length of an interval in the 15-minute rollup, in seconds.
const QUARTER: i64 = 15 * 60;
const HOUR: i64 = 60 * 60;
const DAY: i64 = 24 * 60 * 60;

/// The rank of an endpoint's name among the batch's endpoints. Comparing ranks is equivalent to comparing names.
pub(super) type Rank = usize;

/// The primary key of a rollup row, in column order. The nil UUID stands for all keys or all plans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct RowKey {
    pub tenant: Uuid,
    pub endpoint: Rank,
    pub key: Uuid,
    pub plan: Uuid,
    /// The start of the interval, in seconds since the Unix epoch.
    pub start: i64,
    pub policy: &'static str,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Sums {
    pub requests: i64,
    pub cost: i64,
    pub first_at: DateTime<Utc>,
    pub last_at: DateTime<Utc>,
}

impl Sums {
    fn of(record: &UsageRecord) -> Self {
        Self {
            requests: 1,
            cost: record.cost,
            first_at: record.at,
            last_at: record.at,
        }
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.cost += other.cost;
        self.first_at = self.first_at.min(other.first_at);
        self.last_at = self.last_at.max(other.last_at);
    }
}

/// The counts of each row in a rollup.
#[derive(Debug, Default)]
struct Rollup(HashMap<RowKey, Sums>);

impl Rollup {
    fn add(&mut self, key: RowKey, sums: &Sums) {
        self.0
            .entry(key)
            .and_modify(|it| it.add(sums))
            .or_insert(*sums);
    }

    /// Returns the rows in primary-key order.
    fn sorted(self) -> Vec<(RowKey, Sums)> {
        let mut rows = self.0.into_iter().collect::<Vec<_>>();
        rows.sort_unstable_by_key(|(key, _)| *key);
        rows
    }
}

/// An endpoint of a key or, if `key` is the nil UUID, of the tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct EndpointOf {
    pub tenant: Uuid,
    pub key: Uuid,
    pub endpoint: Rank,
}

/// The rows of both rollups, in primary-key order.
#[derive(Debug)]
pub(super) struct Rollups {
    pub quarters: Vec<(RowKey, Sums)>,
    pub days: Vec<(RowKey, Sums)>,
    /// The number of requests counted under their key's [`FURTHER_ENDPOINTS`].
    pub folded: i64,
}

/// The cost of a tenant's requests that were allowed on paid plans in one hour.
#[derive(Debug)]
pub(super) struct Charged {
    pub tenant: Uuid,
    /// The start of the interval, in seconds since the Unix epoch.
    pub start: i64,
    pub cost: i64,
}

fn charged(records: &[UsageRecord]) -> Vec<Charged> {
    let mut sums = BTreeMap::<(Uuid, i64), i64>::new();
    for record in records {
        if record.billing == "paid" && !record.was_rejected {
            let at = record.at.timestamp();
            let start = at - at.rem_euclid(HOUR);
            *sums.entry((record.tenant_id, start)).or_default() += record.cost;
        }
    }
    sums.into_iter()
        .map(|((tenant, start), cost)| Charged {
            tenant,
            start,
            cost,
        })
        .collect()
}

/// Records that are ready to be appended.
#[derive(Debug)]
pub struct UsageBatch {
    /// The records, in log order.
    pub(super) records: Vec<UsageRecord>,
    /// The number of records per tenant, in order of tenant ID.
    pub(super) tenants: Vec<(Uuid, i64)>,
    /// The names of endpoints, sorted.
    pub(super) endpoints: Vec<String>,
    /// Counts by quarter hour, key, plan, endpoint, and policy.
    pub(super) counts: Vec<(RowKey, Sums)>,
    /// The endpoints of keys and tenants, each with the time of its first request.
    pub(super) named: Vec<(EndpointOf, DateTime<Utc>)>,
    /// The rollup rows, assuming that every endpoint has rows of its own.
    pub(super) rollups: Rollups,
    /// The usage to charge, sorted by tenant, then by hour.
    pub(super) charged: Vec<Charged>,
}

impl UsageBatch {
    /// Sorts and counts records. Takes about a microsecond per record.
    pub fn new(mut records: Vec<UsageRecord>) -> Self {
        records.sort_by_key(|it| (it.tenant_id, it.at, it.event_id));
        let mut tenants = Vec::<(Uuid, i64)>::new();
        for record in &records {
            match tenants.last_mut() {
                Some((tenant, count)) if *tenant == record.tenant_id => *count += 1,
                _ => tenants.push((record.tenant_id, 1)),
            }
        }
        // Consecutive records often belong to the same row, so hash only where something changes.
        let endpoints = records
            .chunk_by(|one, next| one.endpoint == next.endpoint)
            .filter_map(|run| run.first())
            .map(|it| it.endpoint.as_str())
            .collect::<HashSet<_>>()
            .into_iter()
            .chain([ALL_ENDPOINTS, FURTHER_ENDPOINTS])
            .collect::<BTreeSet<_>>()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>();
        let ranks = endpoints
            .iter()
            .enumerate()
            .map(|(rank, name)| (name.as_str(), rank))
            .collect::<HashMap<_, _>>();
        let mut counted = Rollup::default();
        let mut named = HashMap::<EndpointOf, DateTime<Utc>>::new();
        for run in records.chunk_by(UsageRecord::counts_in_row_of) {
            let Some((record, others)) = run.split_first() else {
                continue;
            };
            let mut sums = Sums::of(record);
            for other in others {
                sums.add(&Sums::of(other));
            }
            let key = RowKey {
                tenant: record.tenant_id,
                endpoint: ranks[record.endpoint.as_str()],
                key: record.key_id,
                plan: record.plan_id,
                start: record.quarter(),
                policy: record.counted_policy(),
            };
            counted.add(key, &sums);
        }
        let counts = counted.sorted();
        for (row, sums) in &counts {
            for key in [row.key, Uuid::nil()] {
                let of = EndpointOf {
                    tenant: row.tenant,
                    key,
                    endpoint: row.endpoint,
                };
                let first = named.entry(of).or_insert(sums.first_at);
                *first = sums.first_at.min(*first);
            }
        }
        let mut named = named.into_iter().collect::<Vec<_>>();
        named.sort_unstable();
        let mut batch = Self {
            charged: charged(&records),
            records,
            tenants,
            endpoints,
            counts,
            named,
            rollups: Rollups {
                quarters: Vec::new(),
                days: Vec::new(),
                folded: 0,
            },
        };
        batch.rollups = batch.rollups_without(&HashSet::new());
        batch
    }

    pub fn len(&self) -> usize {
        self.records.len()
    }

    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    pub fn oldest(&self) -> Option<DateTime<Utc>> {
        self.records.iter().map(|it| it.at).min()
    }

    fn rank(&self, endpoint: &str) -> Rank {
        self.endpoints
            .binary_search_by(|it| it.as_str().cmp(endpoint))
            .unwrap_or_default()
    }

    /// Returns the rollup rows, assuming that the `folded` endpoints do not have rows of their own.
    pub(super) fn rollups_without(&self, folded: &HashSet<EndpointOf>) -> Rollups {
        let (all, further) = (self.rank(ALL_ENDPOINTS), self.rank(FURTHER_ENDPOINTS));
        let (mut quarters, mut requests) = (Rollup::default(), 0);
        for (row, sums) in &self.counts {
            let own = |key| {
                let of = EndpointOf {
                    tenant: row.tenant,
                    key,
                    endpoint: row.endpoint,
                };
                if folded.contains(&of) {
                    further
                } else {
                    row.endpoint
                }
            };
            let (of_key, of_tenant) = (own(row.key), own(Uuid::nil()));
            if of_key == further {
                requests += sums.requests;
            }
            // Each row of a key has one plan: a key has no rows for all plans together.
            for (endpoint, key, plan) in [
                (all, Uuid::nil(), Uuid::nil()),
                (all, Uuid::nil(), row.plan),
                (all, row.key, row.plan),
                (of_tenant, Uuid::nil(), Uuid::nil()),
                (of_tenant, Uuid::nil(), row.plan),
                (of_key, row.key, row.plan),
            ] {
                let row = RowKey {
                    endpoint,
                    key,
                    plan,
                    ..*row
                };
                quarters.add(row, sums);
            }
        }
        let mut days = Rollup::default();
        for (row, sums) in &quarters.0 {
            let row = RowKey {
                start: row.start - row.start.rem_euclid(DAY),
                ..*row
            };
            days.add(row, sums);
        }
        Rollups {
            quarters: quarters.sorted(),
            days: days.sorted(),
            folded: requests,
        }
    }
}
