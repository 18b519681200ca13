//! Limits how many changes or large reads of each tenant are in progress.
//!
//! A change holds a database connection while it waits for a lock, and a tenant's changes mostly wait for each other. A
//! burst of one tenant's changes, or of its large reads, could take all of this replica's connections. Therefore,
//! changes and large reads wait in a queue before they take a connection. Each tenant has its own bounded queue, so
//! that tenants do not delay each other. Each replica has its own queues. Across replicas, database locks determine the
//! order.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use quota_common::TenantId;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// The maximum number of concurrent large reads per tenant.
const READS: usize = 2;
/// The maximum number of waiting changes or reads per tenant.
const WAITING: usize = 32;
/// The maximum time that a change or read waits for its turn.
const WAIT: Duration = Duration::from_secs(5);

/// Why a change or read cannot start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Busy {
    /// The tenant's queue is full.
    QueueFull,
    /// Earlier changes or reads took too long.
    TimedOut,
}

/// The queues of all tenants that have changes or reads in progress. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct TenantQueues {
    turns: usize,
    queues: Arc<Mutex<HashMap<TenantId, Queue>>>,
}

#[derive(Debug)]
struct Queue {
    turns: Arc<Semaphore>,
    /// The number of changes or reads that are in progress or waiting.
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
        let mut queues = self.queues.queues.lock();
        if let Some(queue) = queues.get_mut(&self.tenant) {
            queue.places -= 1;
            if queue.places == 0 {
                queues.remove(&self.tenant);
            }
        }
    }
}

/// Permission for one change or read. Released on drop.
#[derive(Debug)]
pub struct Turn {
    // The permit is declared first, so that it is dropped before the slot: dropping the last slot removes the queue.
    _permit: OwnedSemaphorePermit,
    _place: Place,
}

impl TenantQueues {
    /// Creates queues for changes, which run one at a time.
    pub fn of_changes() -> Self {
        Self::with_turns(1)
    }

    /// Creates queues for reads of usage, the audit log and long lists.
    pub fn of_reads() -> Self {
        Self::with_turns(READS)
    }

    fn with_turns(turns: usize) -> Self {
        Self {
            turns,
            queues: Arc::default(),
        }
    }

    /// Waits until fewer than the maximum number of the tenant's changes or reads are in progress on this replica.
    /// Fails if the queue is full, or if the wait takes longer than [`WAIT`].
    pub async fn turn(&self, tenant: TenantId) -> Result<Turn, Busy> {
        let (place, turns) = self.enter(tenant)?;
        match timeout(WAIT, turns.acquire_owned()).await {
            Ok(Ok(permit)) => Ok(Turn {
                _permit: permit,
                _place: place,
            }),
            // The semaphore is never closed.
            Ok(Err(_)) | Err(_) => Err(Busy::TimedOut),
        }
    }

    fn enter(&self, tenant: TenantId) -> Result<(Place, Arc<Semaphore>), Busy> {
        let mut queues = self.queues.lock();
        let queue = queues.entry(tenant).or_insert_with(|| Queue {
            turns: Arc::new(Semaphore::new(self.turns)),
            places: 0,
        });
        if queue.places >= WAITING + self.turns {
            return Err(Busy::QueueFull);
        }
        queue.places += 1;
        let place = Place {
            queues: self.clone(),
            tenant,
        };
        Ok((place, queue.turns.clone()))
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
        let queues = TenantQueues::of_changes();
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
        assert!(queues.queues.lock().is_empty(), "an entry was not removed");
    }

    #[tokio::test(start_paused = true)]
    async fn two_reads_of_a_tenant_are_in_progress_and_a_third_waits() {
        let queues = TenantQueues::of_reads();
        let first = queues.turn(tenant(1)).await.unwrap();
        let _second = queues.turn(tenant(1)).await.unwrap();
        let third = timeout(Duration::from_millis(10), queues.turn(tenant(1)));
        assert!(third.await.is_err());
        assert!(queues.turn(tenant(2)).await.is_ok());
        drop(first);
        assert!(queues.turn(tenant(1)).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn queue_is_bounded_in_length_and_time() {
        let queues = TenantQueues::of_changes();
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
        assert!(queues.queues.lock().is_empty(), "an entry was not removed");
    }

    #[tokio::test(start_paused = true)]
    async fn canceled_change_leaves_its_place() {
        let queues = TenantQueues::of_changes();
        let first = queues.turn(tenant(1)).await.unwrap();
        for _ in 0..100 {
            let gone = timeout(Duration::from_millis(1), queues.turn(tenant(1))).await;
            assert!(gone.is_err());
        }
        drop(first);
        assert!(queues.queues.lock().is_empty(), "an entry was not removed");
    }
}
