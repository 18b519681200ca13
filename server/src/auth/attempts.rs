//! Limits failed password attempts without letting other people lock a user out. Also limits registrations.
//!
//! Attempts from unknown devices are counted by account *and* network, never only by account, so guessing from one
//! network slows down only that network. IPv4 attempts are counted by address and by /24 network; IPv6 attempts are
//! counted by /64, /56, and /48 network. Wider networks have higher limits. The attempts from each network are also
//! counted across all accounts, which slows down attacks with lists of leaked passwords. A known device
//! ([`super::device`]) has its own counter instead. In addition, all devices of an account share a counter with a
//! higher limit, so that collecting devices does not allow more guesses. Successful sign-ins from known devices are
//! counted too, with a much higher limit, because verifying correct passwords also takes time.
//!
//! Each of these counters allows a number of attempts without waiting (`QUOTA_LOGIN_FREE_FAILURES` or a multiple of
//! it). After that, the wait doubles with each attempt, and one attempt is forgiven at a fixed interval (for an account
//! and network, every five minutes). Therefore, a lockout lasts only slightly longer than this interval, and an
//! attacker gets about one guess per interval. An attempt is counted before its password is verified, so parallel
//! attempts have no advantage. If the attempt succeeds, the counters for the account and network, or for the device,
//! are cleared. The attempt is then taken back from the other counters that count only failures. If the password was
//! never verified, because too many requests were waiting or the client disconnected, the attempt is taken back from
//! all counters.
//!
//! Registrations are also counted, by network only. A network can create `QUOTA_REGISTRATIONS_PER_DAY` accounts without
//! waiting, and then the same number per day. Without this limit, a person could get around all other limits by
//! creating many accounts, because each account has its own limits.
//!
//! With Redis, a script in Redis counts the attempts of all replicas together. Each replica also counts attempts
//! locally. While Redis is unreachable, the local counters decide, and allow half as many attempts. No response to a
//! sign-in reveals whether an account exists, because unknown accounts are counted too.

mod attempt;
mod counter;

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use aws_lc_rs::hmac;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use parking_lot::Mutex;
use redis::Value;

pub use self::attempt::{Attempt, Judgment};
use self::counter::{Count, Counter, Name, OnSuccess, Waits, longest_wait};
use super::device::DeviceId;
use crate::{
    clock::{Clock, Monotonic},
    redis::{Redis, Script},
    telemetry::metrics::Metrics,
};

/// The interval at which one failed attempt on an account is forgiven.
const FORGIVE: Duration = Duration::from_mins(5);
/// The interval at which one attempt from a network, counted across all accounts, is forgiven.
const FORGIVE_NETWORK: Duration = Duration::from_mins(1);
/// The number of free attempts from a network across all accounts, as a multiple of the number for one account.
const ACCOUNTS: u32 = 5;
/// The number of free attempts for all known devices of an account together, as a multiple of the number for one
/// device.
const DEVICES: u32 = 5;
/// Like [`DEVICES`], but for the counter that also counts successful attempts.
const USES: u32 = 20;
/// The interval at which the counter limited by [`USES`] forgives one attempt.
const FORGIVE_USE: Duration = Duration::from_secs(6);
/// The time in which a network's registration limit is fully restored.
const DAY: Duration = Duration::from_hours(24);
/// A network with at least this many unforgiven attempts is no longer
/// [ordinary](super::password::CallerClass::Ordinary).
const CROWD: u64 = 3;
/// The maximum number of local counters. Each counter takes about 80 bytes.
const REMEMBERED: usize = 200_000;

const TAKE: &str = include_str!("attempts.lua");
/// KEYS contains the counters. The first value in ARGV is the number of counters to delete, starting with the first
/// one. The second value is the time when the attempt was counted. The script takes the attempt back from the other
/// counters, and ends any wait that the attempt started.
const FORGET: &str = "
for i, key in ipairs(KEYS) do
  if i <= tonumber(ARGV[1]) then
    redis.call('DEL', key)
  elseif redis.call('EXISTS', key) == 1 then
    redis.call('HINCRBYFLOAT', key, 'n', '-1')
    if redis.call('HGET', key, 'at') == ARGV[2] then
      redis.call('HSET', key, 'until', '0')
    end
  end
end
return 0";

/// The result of counting an attempt.
#[derive(Debug, Clone, Copy)]
struct Taken {
    /// How long the caller must wait. Zero if the attempt was counted.
    wait: Duration,
    /// The number of earlier attempts on the last counter. For an attempt from a network, this is the counter of the
    /// widest network across all accounts.
    crowd: u64,
    /// When the attempt was counted, according to the clock of the counters: the local monotonic clock, or Redis's
    /// clock.
    at: u64,
}

/// How long the caller must wait before the next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait(pub Duration);

#[derive(Debug)]
pub struct Attempts {
    /// The number of attempts allowed before a wait is imposed. 0 means that attempts are not limited.
    free: u32,
    names: hmac::Key,
    redis: Option<Redis>,
    take: Script,
    forget: Script,
    local: Mutex<HashMap<Name, Count>>,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
}

impl Attempts {
    pub fn new(
        free: u32,
        names: &[u8; 32],
        redis: Option<Redis>,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            free,
            names: hmac::Key::new(hmac::HMAC_SHA256, names),
            redis,
            take: Script::new("attempts", TAKE),
            forget: Script::new("forget_attempts", FORGET),
            local: Mutex::default(),
            clock,
            metrics,
        }
    }

    /// Counts a sign-in attempt from a network.
    pub async fn of_network(
        self: &Arc<Self>,
        email: &str,
        ip: Option<IpAddr>,
    ) -> Result<Attempt, Wait> {
        let networks = networks(ip);
        let counters = networks
            .iter()
            .map(|(network, room)| Counter {
                name: self.name(&[b"account", network.as_bytes(), email.as_bytes()]),
                free: self.free.saturating_mul(*room),
                forgive: FORGIVE,
                waits: Waits::Doubling,
                on_success: OnSuccess::Clear,
            })
            .chain(networks.iter().map(|(network, room)| Counter {
                name: self.name(&[b"network", network.as_bytes()]),
                free: self.free.saturating_mul(ACCOUNTS).saturating_mul(*room),
                forgive: FORGIVE_NETWORK,
                waits: Waits::Doubling,
                on_success: OnSuccess::TakeBack,
            }));
        self.take(counters.collect()).await
    }

    /// Counts a sign-in attempt from a known device.
    pub async fn of_device(
        self: &Arc<Self>,
        email: &str,
        device: &DeviceId,
    ) -> Result<Attempt, Wait> {
        let email = email.as_bytes();
        let device = self.of_one(&[b"device", device, email], OnSuccess::Clear);
        let devices = Counter {
            free: self.free.saturating_mul(DEVICES),
            ..self.of_one(&[b"devices", email], OnSuccess::TakeBack)
        };
        self.take_known(vec![device, devices, self.uses(&[b"uses", email])])
            .await
    }

    /// Counts an attempt by a signed-in user to enter the password, for example to change it. This limits how often a
    /// stolen session can be used to guess the password.
    pub async fn of_user(self: &Arc<Self>, user: &[u8]) -> Result<Attempt, Wait> {
        let own = self.of_one(&[b"user", user], OnSuccess::Clear);
        self.take_known(vec![own, self.uses(&[b"user uses", user])])
            .await
    }

    /// Counts a registration from a network.
    pub async fn of_registration(self: &Arc<Self>, ip: Option<IpAddr>) -> Result<Attempt, Wait> {
        let counter = |(network, room): &(String, u32)| {
            let free = self.free.saturating_mul(*room);
            Counter {
                name: self.name(&[b"registration", network.as_bytes()]),
                free,
                forgive: DAY / free.max(1),
                waits: Waits::UntilForgiven,
                on_success: OnSuccess::Keep,
            }
        };
        self.take(networks(ip).iter().map(counter).collect()).await
    }

    fn of_one(&self, name: &[&[u8]], on_success: OnSuccess) -> Counter {
        Counter {
            name: self.name(name),
            free: self.free,
            forgive: FORGIVE,
            waits: Waits::Doubling,
            on_success,
        }
    }

    fn uses(&self, name: &[&[u8]]) -> Counter {
        Counter {
            free: self.free.saturating_mul(USES),
            forgive: FORGIVE_USE,
            ..self.of_one(name, OnSuccess::Keep)
        }
    }

    async fn take_known(self: &Arc<Self>, counters: Vec<Counter>) -> Result<Attempt, Wait> {
        let mut attempt = self.take(counters).await?;
        attempt.is_suspect = false;
        Ok(attempt)
    }

    fn name(&self, parts: &[&[u8]]) -> Name {
        let mut signing = hmac::Context::with_key(&self.names);
        for part in parts {
            signing.update(&(part.len() as u64).to_be_bytes());
            signing.update(part);
        }
        let mut name = Name::default();
        name.copy_from_slice(&signing.sign().as_ref()[..16]);
        name
    }

    /// Returns the keys of the counters in Redis. All keys are in the hash slot of the last counter.
    fn keys(redis: &Redis, counters: &[Counter]) -> Vec<String> {
        let text = |counter: &Counter| URL_SAFE_NO_PAD.encode(counter.name);
        let slot = counters.last().map(text).unwrap_or_default();
        let prefix = redis.prefix();
        let key = |counter| format!("{prefix}:login:{{{slot}}}:{}", text(counter));
        counters.iter().map(key).collect()
    }

    async fn take(self: &Arc<Self>, counters: Vec<Counter>) -> Result<Attempt, Wait> {
        if self.free == 0 {
            return Ok(Attempt {
                attempts: self.clone(),
                counters: Vec::new(),
                counted_here: None,
                counted_in_redis: None,
                judgment: Judgment::Missing,
                is_suspect: false,
            });
        }
        let attempts = self.clone();
        let count = async move { attempts.count(counters).await };
        if self.redis.is_none() {
            return count.await;
        }
        // Count in a separate task. Even if the caller is dropped, the task waits for the response from Redis, and
        // takes the attempt back in Redis only if Redis has counted it.
        let counted = tokio::spawn(count).await;
        counted.unwrap_or(Err(Wait(Duration::from_secs(1))))
    }

    async fn count(self: &Arc<Self>, counters: Vec<Counter>) -> Result<Attempt, Wait> {
        let here = self.take_here(&counters);
        let in_redis = self.take_in_redis(&counters).await;
        let counted_at = |taken: &Taken| taken.wait.is_zero().then_some(taken.at);
        let Taken { wait, crowd, .. } = in_redis.unwrap_or(here);
        let attempt = Attempt {
            attempts: self.clone(),
            counters,
            counted_here: counted_at(&here).map(Monotonic),
            counted_in_redis: in_redis.as_ref().and_then(counted_at),
            judgment: Judgment::Missing,
            is_suspect: crowd >= CROWD,
        };
        if wait > Duration::ZERO {
            self.metrics.guard_rejections.inc();
            return Err(Wait(wait));
        }
        Ok(attempt)
    }

    /// Counts an attempt in Redis. Returns `None` if Redis is not configured or does not respond.
    async fn take_in_redis(&self, counters: &[Counter]) -> Option<Taken> {
        let redis = self.redis.as_ref()?;
        let keys = Self::keys(redis, counters);
        let keys = keys.iter().map(String::as_str).collect::<Vec<_>>();
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let mut args = Vec::with_capacity(3 * counters.len() + 1);
        for counter in counters {
            args.push(u64::from(counter.free));
            args.push(millis(counter.forgive));
            args.push(millis(counter.first_wait()));
        }
        let longest = longest_wait(counters);
        args.push(millis(longest));
        match redis.eval(&self.take, &keys, &args, None).await {
            Ok(Value::Array(answer)) => match &*answer {
                [Value::Int(wait), Value::Int(crowd), Value::Int(at)] => Some(Taken {
                    wait: Duration::from_millis(u64::try_from(*wait).ok()?).min(longest),
                    crowd: u64::try_from(*crowd).ok()?,
                    at: u64::try_from(*at).ok()?,
                }),
                _ => None,
            },
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(error = %error, "cannot count a sign-in attempt in Redis; using the local count");
                None
            }
        }
    }

    /// Counts an attempt locally. If Redis is configured, this result is used only while Redis is unreachable. The
    /// local counters then allow half as many attempts, because other replicas also count locally.
    fn take_here(&self, counters: &[Counter]) -> Taken {
        let now = self.clock.monotonic();
        let free = |counter: &Counter| {
            let free = if self.redis.is_some() {
                counter.free / 2
            } else {
                counter.free
            };
            f64::from(free.max(1))
        };
        let mut local = self.local.lock();
        let (mut until, mut crowd) = (Monotonic::default(), 0.0);
        for counter in counters {
            if let Some(count) = local.get(&counter.name) {
                until = until.max(count.until);
                crowd = count.left(now);
            } else {
                crowd = 0.0;
            }
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "never negative, and the cast saturates"
        )]
        let crowd = crowd as u64;
        let taken = |wait| Taken {
            wait,
            crowd,
            at: now.0,
        };
        if until > now {
            return taken(until.saturating_since(now).into());
        }
        if local.len() + counters.len() > REMEMBERED {
            local.retain(|_, count| count.is_needed(now));
            if local.len() + counters.len() > REMEMBERED {
                return taken(Duration::from_secs(1));
            }
        }
        for counter in counters {
            let tries = local
                .get(&counter.name)
                .map_or(0.0, |count| count.left(now))
                + 1.0;
            // A fraction of an attempt is forgiven between two consecutive attempts. This must not postpone the first
            // wait.
            let over = tries - free(counter);
            let wait = if over > -0.5 {
                let over = over.max(0.0);
                let wait = counter.first_wait().as_secs_f64() * over.min(30.0).exp2();
                Duration::from_secs_f64(wait.min(counter.longest_wait().as_secs_f64()))
            } else {
                Duration::ZERO
            };
            let count = Count {
                tries,
                at: now,
                until: now.saturating_add(wait.into()),
                forgive: counter.forgive,
            };
            local.insert(counter.name, count);
        }
        taken(Duration::ZERO)
    }

    /// Removes counters whose attempts have all been forgiven.
    pub fn prune(&self) {
        let now = self.clock.monotonic();
        let mut local = self.local.lock();
        local.retain(|_, count| count.is_needed(now));
        if local.capacity() > 4 * local.len() {
            local.shrink_to_fit();
        }
    }
}

/// Returns the networks for which attempts from an address are counted, narrowest first. Each network comes with a
/// multiplier for its number of free attempts. Callers without an address are on this machine.
fn networks(ip: Option<IpAddr>) -> Vec<(String, u32)> {
    let prefixes: &[(u8, u32)] = match ip.map(|ip| ip.to_canonical()) {
        None => return vec![("local".to_owned(), 1)],
        Some(IpAddr::V4(_)) => &[(32, 1), (24, 2)],
        Some(IpAddr::V6(_)) => &[(64, 1), (56, 2), (48, 4)],
    };
    let network = |(length, room): &(u8, u32)| {
        let ip = ip?.to_canonical();
        let network = ipnet::IpNet::new(ip, *length).ok()?.trunc();
        Some((network.to_string(), *room))
    };
    prefixes.iter().filter_map(network).collect()
}

/// Returns a per-process hash of the widest network for which attempts from the address are counted.
pub fn network_number(ip: Option<IpAddr>) -> u64 {
    number(&networks(ip).last())
}

/// Returns a per-process hash of the email address.
pub fn account_number(email: &str) -> u64 {
    number(&email)
}

fn number(of: &impl std::hash::Hash) -> u64 {
    use std::hash::BuildHasher as _;

    // The hash keys are random for each process, so attackers cannot find an email address that has the same hash as
    // the address of another account.
    static KEYS: std::sync::LazyLock<std::hash::RandomState> =
        std::sync::LazyLock::new(std::hash::RandomState::new);
    KEYS.hash_one(of)
}

#[cfg(test)]
mod tests;
