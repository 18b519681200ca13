//! The shared counters in Redis.
//!
//! Owns the script (`take.lua`, which tells its arguments), the names of its keys, and what a new deployment
//! begins with. Knows no key's handle. When Redis is away every call fails at once, when it is silent after
//! [`CALL_DEADLINE`]; the store decides what is done meanwhile.
//!
//! | key | what |
//! |---|---|
//! | `{prefix}:{q7}:k:<tenant id>:<key id>` | a bucket of partition 7 |
//! | `{prefix}:{q7}:epoch` | since when the partition's buckets are to be believed |
//!
//! A partition is one hash slot, with an epoch of its own: in a cluster each may lose its state alone. One Redis,
//! with or without Sentinel, is one partition.

use std::sync::Arc;

use async_trait::async_trait;

use super::calls::CALL_DEADLINE;
use crate::{
    limiter::rate::counters::{
        BucketName, BucketState, CounterError, CounterMicros, SharedCounters, TakeCall, TakeReply,
    },
    redis::{CallError, Redis, Script},
};

/// Enough that the keys of a cluster are spread evenly over some tens of nodes.
const CLUSTER_PARTITIONS: u16 = 256;

/// Microseconds from a loss to the new beginning, at least: longer than the counters are unprobed, so that all
/// replicas know of it before it comes.
const EPOCH_DELAY: CounterMicros = 600_000;
/// Of these, what is not for the answer to a probe.
const UNPROBED: CounterMicros = 350_000;

const TAKE: &str = include_str!("take.lua");

/// Begins the first epoch of a new deployment in the past: its buckets are full. Changes nothing where an epoch has
/// begun.
const FIRST: &str = "
if redis.call('EXISTS', KEYS[1]) == 0 then
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  redis.call('HSET', KEYS[1], 'run', run, 's', '0', 'ok', '0')
end
return 0";

/// See the module.
#[derive(Debug)]
pub struct RedisCounters {
    redis: Redis,
    take: Script,
    partitions: u16,
    /// From a loss to the new beginning.
    delay: CounterMicros,
}

/// Redis answered something else than the script does.
#[derive(Debug, thiserror::Error)]
#[error("the script answered {0}")]
struct Unexpected(String);

impl RedisCounters {
    pub fn new(redis: Redis) -> Self {
        let timeout = redis.settings().timeout.as_micros();
        let timeout = CounterMicros::try_from(timeout).unwrap_or(CounterMicros::MAX / 2);
        Self {
            delay: EPOCH_DELAY.max(UNPROBED + timeout),
            ..Self::with_script(redis, TAKE)
        }
    }

    /// For tests, which bring their own time.
    #[doc(hidden)]
    pub fn with_script(redis: Redis, take: &'static str) -> Self {
        Self {
            partitions: if redis.is_cluster() {
                CLUSTER_PARTITIONS
            } else {
                1
            },
            take: Script::new(take),
            delay: EPOCH_DELAY,
            redis,
        }
    }

    /// The script's text.
    #[doc(hidden)]
    pub fn script() -> &'static str {
        TAKE
    }

    /// Begins with full buckets, where nothing has ever been kept in this Redis. To be called once in the life of a
    /// deployment: afterwards an empty Redis is one that lost its state.
    pub async fn begin(&self) -> Result<(), CounterError> {
        let first = Script::new(FIRST);
        for partition in 0..self.partitions {
            let key = self.epoch(partition);
            self.redis
                .eval(&first, &[&key], &[] as &[u64], None)
                .await
                .map_err(error)?;
        }
        Ok(())
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
        let prefix = self.redis.prefix();
        let bucket = match call.bucket {
            BucketName::Key(tenant, key) => format!(
                "{prefix}:{{q{partition}}}:k:{}:{}",
                tenant.0.simple(),
                key.0.simple()
            ),
            BucketName::Heartbeat => format!("{prefix}:{{q{partition}}}:beat"),
        };
        let answer = self
            .redis
            .eval(
                &self.take,
                &[&bucket, &self.epoch(partition)],
                &[
                    call.emission,
                    call.tau,
                    call.version,
                    call.need,
                    call.want,
                    call.back,
                    call.back_taken_at,
                    call.last_heard,
                    call.away_since,
                    call.promised,
                    self.delay,
                    call.lease,
                    call.back_generation,
                    call.waiting,
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
                    debt,
                    generation,
                },
            ),
            [1, at, wait] => (at, BucketState::Initializing { wait }),
            _ => return Err(Arc::new(Unexpected(format!("{numbers:?}")))),
        };
        Ok(TakeReply { at, state })
    }
}
