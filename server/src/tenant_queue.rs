//! Serializes the changes of each tenant.
//!
//! A change holds a database connection while it waits for a lock, and changes of the same tenant mostly wait for each
//! other, so a burst of them would take all connections of this replica. Here they wait without a connection, in a
//! bounded queue per tenant, so that other tenants are not delayed. Replicas have separate queues; between replicas,
//! the database's locks determine the order.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use quota_common::TenantId;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// The maximum number of waiting changes per tenant.
const WAITING: usize = 32;
/// How long a change waits for its turn.
const WAIT: Duration = Duration::from_secs(5);

/// Why a change cannot begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Busy {
    /// The tenant's queue is full.
    QueueFull,
    /// Earlier changes took too long.
    TimedOut,
}

/// The queues of tenants with changes in progress. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct TenantQueues(Arc<Mutex<HashMap<TenantId, Queue>>>);

#[derive(Debug)]
struct Queue {
    turn: Arc<Semaphore>,
    /// Changes in progress or waiting.
    places: usize,
}

/// A slot in a tenant's queue.
#[derive(Debug)]
struct Place {
    queues: TenantQueues,
    tenant: TenantId,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut queues = self.queues.0.lock();
        if let Some(queue) = queues.get_mut(&self.tenant) {
            queue.places -= 1;
            if queue.places == 0 {
                queues.remove(&self.tenant);
            }
        }
    }
}

/// Permission to make a change, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    // Dropped before the slot.
    _permit: OwnedSemaphorePermit,
    _place: Place,
}

impl TenantQueues {
    /// Waits until no other change of the tenant is in progress on this replica.
    pub async fn turn(&self, tenant: TenantId) -> Result<Turn, Busy> {
        let (place, turn) = self.enter(tenant)?;
        match timeout(WAIT, turn.acquire_owned()).await {
            Ok(Ok(permit)) => Ok(Turn {
                _permit: permit,
                _place: place,
            }),
            // The semaphore is never closed.
            Ok(Err(_)) | Err(_) => Err(Busy::TimedOut),
        }
    }

    fn enter(&self, tenant: TenantId) -> Result<(Place, Arc<Semaphore>), Busy> {
        let mut queues = self.0.lock();
        let queue = queues.entry(tenant).or_insert_with(|| Queue {
            turn: Arc::new(Semaphore::new(1)),
            places: 0,
        });
        if queue.places > WAITING {
            return Err(Busy::QueueFull);
        }
        queue.places += 1;
        let place = Place {
            queues: self.clone(),
            tenant,
        };
        Ok((place, queue.turn.clone()))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;

    use super::*;

    fn tenant(n: u128) -> TenantId {
        TenantId(uuid::Uuid::from_u128(n))
    }

    #[tokio::test(start_paused = true)]
    async fn changes_of_a_tenant_take_turns_in_order_and_other_tenants_do_not_wait() {
        let queues = TenantQueues::default();
        let first = queues.turn(tenant(1)).await.unwrap();
        let order = Mutex::new(Vec::new());
        let others = join_all((0..5).map(async |n| {
            let turn = queues.turn(tenant(1)).await.unwrap();
            order.lock().push(n);
            tokio::task::yield_now().await;
            drop(turn);
        }));
        let release = async {
            drop(queues.turn(tenant(2)).await.unwrap());
            assert!(order.lock().is_empty());
            drop(first);
        };
        tokio::join!(others, release);
        assert_eq!(*order.lock(), [0, 1, 2, 3, 4]);
        assert!(queues.0.lock().is_empty(), "nothing is left");
    }

    #[tokio::test(start_paused = true)]
    async fn queue_is_bounded_in_length_and_time() {
        let queues = TenantQueues::default();
        let first = queues.turn(tenant(1)).await.unwrap();
        let all = join_all((0..100).map(|_| queues.turn(tenant(1)))).await;
        let count = |busy| {
            all.iter()
                .filter(|it| it.as_ref().err() == Some(&busy))
                .count()
        };
        assert_eq!(count(Busy::TimedOut), WAITING);
        assert_eq!(count(Busy::QueueFull), 100 - WAITING);
        drop(first);
        assert!(queues.turn(tenant(1)).await.is_ok());
        assert!(queues.0.lock().is_empty(), "nothing is left");
    }

    #[tokio::test(start_paused = true)]
    async fn canceled_change_leaves_its_place() {
        let queues = TenantQueues::default();
        let first = queues.turn(tenant(1)).await.unwrap();
        for _ in 0..100 {
            let gone = timeout(Duration::from_millis(1), queues.turn(tenant(1))).await;
            assert!(gone.is_err());
        }
        drop(first);
        assert!(queues.0.lock().is_empty(), "nothing is left");
    }
}
