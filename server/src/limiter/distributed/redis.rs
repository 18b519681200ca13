//! The shared counters in Redis.
//!
//! This module contains the script (`take.lua`, which documents its arguments), the names of the Redis keys, and the
//! initial state of a new deployment. If Redis is not connected, every call fails immediately; if Redis does not
//! respond, calls to the script fail after [`CALL_DEADLINE`], or after `QUOTA_REDIS_TIMEOUT` if that is longer.
//!
//! | key | value |
//! |---|---|
//! | `{prefix}:{q7}:k:<tenant id>:<key id>` | a bucket of partition 7 |
//! | `{prefix}:{q7}:beat` | the bucket of heartbeats in partition 7, which is almost never stored |
//! | `{prefix}:{q7}:epoch` | the epoch of partition 7 |
//!
//! A partition is one hash slot with its own epoch. In a cluster, each partition may lose its state separately. A
//! single Redis, with or without Sentinel, is one partition.

use std::sync::Arc;

use async_trait::async_trait;

use super::calls::CALL_DEADLINE;
use crate::{
    clock::Nanos,
    limiter::rate::counters::{
        BucketName, BucketState, CounterError, CounterMicros, SharedCounters, TakeCall, TakeReply,
    },
    redis::{CallError, Redis, Script},
};

/// The number of partitions of a cluster: enough to distribute keys evenly over tens of nodes.
const CLUSTER_PARTITIONS: u16 = 256;

/// The maximum number of buckets deleted by one command: few enough that other calls do not wait long.
const DELETED_AT_ONCE: usize = 100;

const TAKE: &str = include_str!("take.lua");

/// Starts the first epoch of a new deployment in the past, so that its buckets are full. Does nothing if an epoch
/// exists.
const FIRST: &str = "
if redis.call('EXISTS', KEYS[1]) == 0 then
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  redis.call('HSET', KEYS[1], 'run', run, 's', '0', 'ok', '0')
end
return 0";

/// The shared counters in Redis. See the module documentation.
#[derive(Debug)]
pub struct RedisCounters {
    redis: Redis,
    take: Script,
    partitions: u16,
}

/// Redis returned a value that the script cannot return.
#[derive(Debug, thiserror::Error)]
#[error("the script returned an unexpected value: {0}")]
struct Unexpected(String);

impl RedisCounters {
    pub fn new(redis: Redis) -> Self {
        Self::with_script(redis, TAKE)
    }

    /// Creates counters that use a different script, with which tests control the time.
    #[doc(hidden)]
    pub fn with_script(redis: Redis, take: &'static str) -> Self {
        Self {
            partitions: if redis.is_cluster() {
                CLUSTER_PARTITIONS
            } else {
                1
            },
            take: Script::new("take", take),
            redis,
        }
    }

    #[doc(hidden)]
    pub fn script() -> &'static str {
        TAKE
    }

    /// Starts an epoch with full buckets if this Redis has no state. Call only once per deployment: after that, an
    /// empty Redis has lost its state.
    pub async fn begin(&self) -> Result<(), CounterError> {
        let first = Script::new("first_epoch", FIRST);
        for partition in 0..self.partitions {
            let key = self.epoch(partition);
            self.redis
                .eval(&first, &[&key], &[] as &[u64], None)
                .await
                .map_err(error)?;
        }
        Ok(())
    }

    fn bucket(&self, partition: u16, bucket: BucketName) -> String {
        let prefix = self.redis.prefix();
        match bucket {
            BucketName::Key(tenant, key) => format!(
                "{prefix}:{{q{partition}}}:k:{}:{}",
                tenant.0.simple(),
                key.0.simple()
            ),
            BucketName::Heartbeat => format!("{prefix}:{{q{partition}}}:beat"),
        }
    }

    fn epoch(&self, partition: u16) -> String {
        format!("{}:{{q{partition}}}:epoch", self.redis.prefix())
    }
}

fn error(failure: CallError) -> CounterError {
    Arc::new(failure)
}

#[async_trait]
impl SharedCounters for RedisCounters {
    fn partitions(&self) -> u16 {
        self.partitions
    }

    async fn take(&self, call: TakeCall) -> Result<TakeReply, CounterError> {
        let partition = call.partition;
        let bucket = self.bucket(partition, call.bucket);
        let answer = self
            .redis
            .eval(
                &self.take,
                &[&bucket, &self.epoch(partition)],
                &[
                    call.emission.0,
                    call.tau.0,
                    call.version,
                    call.need,
                    call.want,
                    call.back,
                    call.back_taken_at.0,
                    call.last_heard.0,
                    call.outage_since.0,
                    call.promised.0,
                    call.epoch_delay,
                    call.lease,
                    call.back_generation,
                    call.waiting,
                    call.deadline,
                ],
                Some(CALL_DEADLINE),
            )
            .await
            .map_err(error)?;
        let numbers: Vec<u64> = match redis::from_redis_value(answer) {
            Ok(numbers) => numbers,
            Err(error) => return Err(Arc::new(Unexpected(error.to_string()))),
        };
        let (at, state) = match numbers[..] {
            [0, at, granted, debt, generation] => (
                at,
                BucketState::Active {
                    granted,
                    debt: Nanos(debt),
                    generation,
                },
            ),
            [1, at, wait] => (at, BucketState::Initializing { wait }),
            _ => return Err(Arc::new(Unexpected(format!("{numbers:?}")))),
        };
        Ok(TakeReply {
            at: CounterMicros(at),
            state,
        })
    }

    async fn delete(&self, partition: u16, buckets: &[BucketName]) -> Result<(), CounterError> {
        for buckets in buckets.chunks(DELETED_AT_ONCE) {
            let mut unlink = redis::cmd("UNLINK");
            for bucket in buckets {
                unlink.arg(self.bucket(partition, *bucket));
            }
            // The key of the partition's epoch selects a connection to the partition's node.
            let epoch = self.epoch(partition);
            self.redis.query(&epoch, &unlink).await.map_err(error)?;
        }
        Ok(())
    }
}
