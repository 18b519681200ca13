//! Limits how many streams or large responses may be open at the same time, for each tenant and in total. Callers never
//! wait: if no slot is free, they get none.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use quota_common::TenantId;

/// Slots of one kind. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct TenantPlaces {
    of_tenant: usize,
    total: usize,
    taken: Arc<Mutex<HashMap<TenantId, usize>>>,
}

/// A slot, which is released on drop.
#[derive(Debug)]
pub struct Place {
    places: TenantPlaces,
    tenant: TenantId,
}

/// A slot that a response holds until its body has been sent completely or abandoned. The listener takes this value
/// from the response's extensions.
#[derive(Debug, Clone)]
pub struct HeldUntilSent(#[expect(dead_code, reason = "held only to be dropped")] Arc<Place>);

impl From<Place> for HeldUntilSent {
    fn from(place: Place) -> Self {
        Self(Arc::new(place))
    }
}

impl TenantPlaces {
    pub fn new(of_tenant: usize, total: usize) -> Self {
        Self {
            of_tenant,
            total,
            taken: Arc::default(),
        }
    }

    /// Takes a slot. Returns `None` if the tenant, or all tenants together, already hold the maximum number of slots.
    pub fn take(&self, tenant: TenantId) -> Option<Place> {
        let mut taken = self.taken.lock();
        let own = taken.get(&tenant).copied().unwrap_or(0);
        if own >= self.of_tenant || taken.values().sum::<usize>() >= self.total {
            return None;
        }
        *taken.entry(tenant).or_default() += 1;
        drop(taken);
        Some(Place {
            places: self.clone(),
            tenant,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock();
        if let Some(count) = taken.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_tenant_leaves_places_for_others() {
        let all = TenantPlaces::new(20, 200);
        let tenant = |n| TenantId(uuid::Uuid::from_u128(n));
        let mut places = Vec::new();
        for _ in 0..20 {
            places.push(all.take(tenant(1)).expect("there is room"));
        }
        assert!(all.take(tenant(1)).is_none());
        for n in 0..180 {
            places.push(all.take(tenant(2 + n)).expect("there is room"));
        }
        assert!(all.take(tenant(9999)).is_none(), "more than 200");
        drop(places);
        assert!(all.taken.lock().is_empty(), "a slot was not released");
        assert!(all.take(tenant(1)).is_some());
    }
}
