//! The rows of the usage rollups, counted before they are added.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use uuid::Uuid;

/// The endpoint of rows that cover all endpoints.
pub(super) const ALL_ENDPOINTS: &str = "\u{1}";
/// The endpoint of rows that cover all endpoints that are not counted separately.
pub(super) const FURTHER_ENDPOINTS: &str = "\u{2}";
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
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.cost += other.cost;
        self.first_at = self.first_at.min(other.first_at);
        self.last_at = self.last_at.max(other.last_at);
    }
}

/// The counts of each row in a rollup.
#[derive(Debug, Default)]
pub(super) struct Rollup(HashMap<RowKey, Sums>);

impl Rollup {
    pub fn add(&mut self, key: RowKey, sums: &Sums) {
        self.0
            .entry(key)
            .and_modify(|it| it.add(sums))
            .or_insert(*sums);
    }

    /// Returns the rows in primary-key order.
    pub fn sorted(self) -> Vec<(RowKey, Sums)> {
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
    /// The number of requests counted in their key's rows for [`FURTHER_ENDPOINTS`].
    pub folded: i64,
}

impl Rollups {
    /// Returns the rollup rows for these counts, assuming that the `folded` endpoints do not have rows of their own.
    /// `endpoints` contains the names of endpoints, sorted.
    pub fn new(
        counts: &[(RowKey, Sums)],
        endpoints: &[String],
        folded: &HashSet<EndpointOf>,
    ) -> Self {
        let rank = |endpoint: &str| -> Rank {
            endpoints
                .binary_search_by(|it| it.as_str().cmp(endpoint))
                .unwrap_or_default()
        };
        let (all, further) = (rank(ALL_ENDPOINTS), rank(FURTHER_ENDPOINTS));
        let (mut quarters, mut requests) = (Rollup::default(), 0);
        for (row, sums) in counts {
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
            // Each row of a key is for one plan: no row combines a key's requests on all plans.
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
        Self {
            quarters: quarters.sorted(),
            days: days.sorted(),
            folded: requests,
        }
    }
}
