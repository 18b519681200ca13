//! Limits failed password attempts, without letting other people lock a user out.
//!
//! Attempts are counted per account *and* network, never per account only: guessing from one network slows down that
//! network. IPv4 counts by address and /24, IPv6 by /64, /56 and /48, the wider ones with more room. Each network
//! is also counted over all accounts, against lists of leaked passwords. A known device ([`super::device`]) has a
//! counter of its own and none of these; the devices of one account are counted together as well, with more room, so
//! that collecting them is no way to more guesses. So are its sign-ins from known devices that succeed, with much more
//! room: right passwords take time to verify too.
//!
//! Every counter allows a number of attempts without a wait (`QUOTA_LOGIN_RPM`, or a multiple). After those, each
//! attempt has to wait twice as long as the previous one, and one attempt is forgiven every few minutes. So a lockout
//! does not last much longer than that, and a guesser gets about one attempt in that time. An attempt is counted before
//! the password is verified, so parallel attempts gain nothing, and is removed if the password is correct.
//!
//! With Redis all replicas share the counters, by one script. Every replica also counts for itself: while Redis is
//! unreachable, that count decides, with half the attempts. Nothing here reveals whether an account exists.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use aws_lc_rs::hmac;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use parking_lot::Mutex;
use redis::Value;

use super::device::DeviceId;
use crate::{
    clock::Clock,
    redis::{Redis, Script},
    telemetry::metrics::Metrics,
};

/// The longest wait between two attempts.
const LONGEST: Duration = Duration::from_mins(15);
/// How long it takes until a failed attempt on one account is forgiven.
const FORGIVE: Duration = Duration::from_mins(5);
/// The same for attempts of a network on any account.
const FORGIVE_NETWORK: Duration = Duration::from_mins(1);
/// How many times as many attempts a network has over all accounts as on one.
const ACCOUNTS: u32 = 5;
/// How many times as many attempts the known devices of an account have together as one of them.
const DEVICES: u32 = 5;
/// How many times as many attempts a known account has, successful ones included.
const USES: u32 = 20;
/// How long it takes until one of these is forgiven: ten a minute.
const FORGIVE_USE: Duration = Duration::from_secs(6);
/// A widest network with this many unforgiven attempts is no longer [ordinary](super::password::Lane::Ordinary).
const CROWD: u64 = 3;
/// How many counters one replica remembers. One takes about 60 bytes.
const REMEMBERED: usize = 200_000;

const TAKE: &str = include_str!("attempts.lua");
/// KEYS: counters. ARGV: how many of them, from the first, to forget. Of the others one try is taken back.
const FORGET: &str = "
for i, key in ipairs(KEYS) do
  if i <= tonumber(ARGV[1]) then
    redis.call('DEL', key)
  elseif redis.call('EXISTS', key) == 1 then
    redis.call('HINCRBYFLOAT', key, 'n', '-1')
  end
end
return 0";

type Name = [u8; 16];

/// One counter.
#[derive(Debug, Clone, Copy)]
struct Counter {
    name: Name,
    /// Attempts without a wait.
    free: u32,
    forgive: Duration,
    on_success: OnSuccess,
}

/// What a correct password does to a counter. Counters of one attempt are in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnSuccess {
    /// Forgets everything that was counted.
    Clear,
    /// Forgets this attempt.
    TakeBack,
    /// Forgets nothing.
    Keep,
}

impl Counter {
    /// Returns the first wait: the interval of `free` attempts per minute.
    fn first_wait(&self) -> Duration {
        Duration::from_mins(1) / self.free.max(1)
    }
}

#[derive(Debug, Clone, Copy)]
struct Count {
    tries: f64,
    /// Monotonic nanoseconds.
    at: u64,
    until: u64,
}

impl Count {
    fn forgiven(&self, now: u64, forgive: Duration) -> f64 {
        let passed = Duration::from_nanos(now.saturating_sub(self.at));
        (self.tries - passed.as_secs_f64() / forgive.as_secs_f64()).max(0.0)
    }
}

/// An attempt that may be made. Counts as failed unless its outcome is reported.
#[derive(Debug)]
pub struct Attempt {
    counters: Vec<Counter>,
    /// Whether the caller's network has failed lately.
    pub is_suspect: bool,
}

/// How long an attempt has to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait(pub Duration);

/// Counts. Cheap to share by reference.
#[derive(Debug)]
pub struct Attempts {
    /// 0: nothing is limited.
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
            take: Script::new(TAKE),
            forget: Script::new(FORGET),
            local: Mutex::default(),
            clock,
            metrics,
        }
    }

    /// Counts a sign-in from a network.
    pub async fn of_network(&self, email: &str, ip: Option<IpAddr>) -> Result<Attempt, Wait> {
        let networks = networks(ip);
        let counters = networks
            .iter()
            .map(|(network, room)| Counter {
                name: self.name(&[b"account", network.as_bytes(), email.as_bytes()]),
                free: self.free.saturating_mul(*room),
                forgive: FORGIVE,
                on_success: OnSuccess::Clear,
            })
            .chain(networks.iter().map(|(network, room)| Counter {
                name: self.name(&[b"network", network.as_bytes()]),
                free: self.free.saturating_mul(ACCOUNTS).saturating_mul(*room),
                forgive: FORGIVE_NETWORK,
                on_success: OnSuccess::TakeBack,
            }));
        self.take(counters.collect()).await
    }

    /// Counts a sign-in from a known device.
    pub async fn of_device(&self, email: &str, device: &DeviceId) -> Result<Attempt, Wait> {
        let email = email.as_bytes();
        let device = self.of_one(&[b"device", device, email], OnSuccess::Clear);
        let devices = Counter {
            free: self.free.saturating_mul(DEVICES),
            ..self.of_one(&[b"devices", email], OnSuccess::TakeBack)
        };
        self.take_known(vec![device, devices, self.uses(&[b"uses", email])])
            .await
    }

    /// Counts an attempt of a signed-in user, such as to change the password, which a stolen session must not be able to
    /// guess.
    pub async fn of_user(&self, user: &[u8]) -> Result<Attempt, Wait> {
        let own = self.of_one(&[b"user", user], OnSuccess::Clear);
        self.take_known(vec![own, self.uses(&[b"user uses", user])])
            .await
    }

    fn of_one(&self, name: &[&[u8]], on_success: OnSuccess) -> Counter {
        Counter {
            name: self.name(name),
            free: self.free,
            forgive: FORGIVE,
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

    async fn take_known(&self, counters: Vec<Counter>) -> Result<Attempt, Wait> {
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

    /// In one hash slot: that of the last counter, which is the widest network's.
    fn keys(redis: &Redis, counters: &[Counter]) -> Vec<String> {
        let text = |counter: &Counter| URL_SAFE_NO_PAD.encode(counter.name);
        let slot = counters.last().map(text).unwrap_or_default();
        let prefix = redis.prefix();
        let key = |counter| format!("{prefix}:login:{{{slot}}}:{}", text(counter));
        counters.iter().map(key).collect()
    }

    async fn take(&self, counters: Vec<Counter>) -> Result<Attempt, Wait> {
        if self.free == 0 {
            return Ok(Attempt {
                counters: Vec::new(),
                is_suspect: false,
            });
        }
        let here = self.take_here(&counters);
        let (wait, crowd) = match self.take_in_redis(&counters).await {
            Some(answer) => answer,
            None => here,
        };
        if wait > Duration::ZERO {
            self.metrics.guard_refusals.inc();
            return Err(Wait(wait));
        }
        Ok(Attempt {
            counters,
            is_suspect: crowd >= CROWD,
        })
    }

    /// `None` without Redis, or when it does not answer.
    async fn take_in_redis(&self, counters: &[Counter]) -> Option<(Duration, u64)> {
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
        args.push(millis(LONGEST));
        match redis.eval(&self.take, &keys, &args, None).await {
            Ok(Value::Array(answer)) => match &*answer {
                [Value::Int(wait), Value::Int(crowd)] => Some((
                    Duration::from_millis(u64::try_from(*wait).ok()?).min(LONGEST),
                    u64::try_from(*crowd).ok()?,
                )),
                _ => None,
            },
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(error = %error, "sign-ins are limited by this replica alone");
                None
            }
        }
    }

    /// What this replica has counted. Where Redis is configured it only decides while that is unreachable, and then
    /// with half the tries, since other replicas count for themselves as well.
    fn take_here(&self, counters: &[Counter]) -> (Duration, u64) {
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
        let (mut until, mut crowd) = (0, 0.0);
        for counter in counters {
            if let Some(count) = local.get(&counter.name) {
                until = until.max(count.until);
                crowd = count.forgiven(now, counter.forgive);
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
        if until > now {
            return (Duration::from_nanos(until - now), crowd);
        }
        if local.len() + counters.len() > REMEMBERED {
            let longest = FORGIVE.as_secs_f64();
            local.retain(|_, count| {
                count.until > now || count.tries * longest > seconds(now - count.at)
            });
            if local.len() + counters.len() > REMEMBERED {
                return (Duration::from_secs(1), crowd);
            }
        }
        for counter in counters {
            let tries = local
                .get(&counter.name)
                .map_or(0.0, |count| count.forgiven(now, counter.forgive))
                + 1.0;
            // A part of a try may have been forgiven between two that follow at once.
            let over = tries - free(counter);
            let wait = if over > -0.5 {
                let over = over.max(0.0);
                let wait = counter.first_wait().as_secs_f64() * over.min(30.0).exp2();
                Duration::from_secs_f64(wait.min(LONGEST.as_secs_f64()))
            } else {
                Duration::ZERO
            };
            let wait = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
            let count = Count {
                tries,
                at: now,
                until: now.saturating_add(wait),
            };
            local.insert(counter.name, count);
        }
        (Duration::ZERO, crowd)
    }

    /// The password was right: what was counted for this account is forgotten.
    pub async fn succeeded(&self, attempt: &Attempt) {
        let of = |what| move |counter: &&Counter| counter.on_success == what;
        let cleared = attempt.counters.iter().filter(of(OnSuccess::Clear)).count();
        let kept = attempt.counters.iter().filter(of(OnSuccess::Keep)).count();
        self.take_back(attempt, cleared, kept).await;
    }

    /// The password was not looked at.
    pub async fn not_made(&self, attempt: &Attempt) {
        self.take_back(attempt, 0, 0).await;
    }

    /// Clears the first counters, keeps the last ones, and takes one try back from those between.
    async fn take_back(&self, attempt: &Attempt, cleared: usize, kept: usize) {
        let changed = attempt.counters.len() - kept;
        if changed == 0 {
            return;
        }
        {
            let mut local = self.local.lock();
            for (n, counter) in attempt.counters[..changed].iter().enumerate() {
                if n < cleared {
                    local.remove(&counter.name);
                } else if let Some(count) = local.get_mut(&counter.name) {
                    count.tries = (count.tries - 1.0).max(0.0);
                }
            }
        }
        if let Some(redis) = &self.redis {
            let keys = Self::keys(redis, &attempt.counters);
            let keys = keys[..changed].iter().map(String::as_str);
            let keys = keys.collect::<Vec<_>>();
            // What is not taken back is forgiven in a while.
            let _ = redis.eval(&self.forget, &keys, &[cleared], None).await;
        }
    }

    /// Forgets the counters that are at rest.
    pub fn prune(&self) {
        let now = self.clock.monotonic();
        let longest = FORGIVE.as_secs_f64();
        let mut local = self.local.lock();
        local.retain(|_, count| {
            count.until > now || count.tries * longest > seconds(now.saturating_sub(count.at))
        });
        if local.capacity() > 4 * local.len() {
            local.shrink_to_fit();
        }
    }
}

fn seconds(nanos: u64) -> f64 {
    Duration::from_nanos(nanos).as_secs_f64()
}

/// The networks that an address is counted in, the narrowest first, and how many times as many tries each has. Callers
/// without an address are on this machine.
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

/// A number for the widest network of an address.
pub fn network_number(ip: Option<IpAddr>) -> u64 {
    number(&networks(ip).last())
}

/// A number for an account.
pub fn account_number(email: &str) -> u64 {
    number(&email)
}

fn number(of: &impl std::hash::Hash) -> u64 {
    use std::hash::BuildHasher as _;

    // The keys are this process's own: nobody can choose an email with the number of another's.
    static KEYS: std::sync::LazyLock<std::hash::RandomState> =
        std::sync::LazyLock::new(std::hash::RandomState::new);
    KEYS.hash_one(of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{TestClock, UnixNanos};

    fn attempts(free: u32) -> (Attempts, TestClock) {
        let clock = TestClock::at(UnixNanos::from_secs(1_785_738_360));
        let attempts = Attempts::new(
            free,
            &[1; 32],
            None,
            Arc::new(clock.clone()),
            Arc::default(),
        );
        (attempts, clock)
    }

    async fn fail(attempts: &Attempts, email: &str, ip: &str) -> Result<Attempt, Duration> {
        let ip = ip.parse().unwrap();
        let tried = attempts.of_network(email, Some(ip)).await;
        tried.map_err(|wait| wait.0)
    }

    #[tokio::test]
    async fn a_network_that_guesses_waits_longer_and_longer_and_no_other_does() {
        let (attempts, clock) = attempts(10);
        for _ in 0..10 {
            fail(&attempts, "a@example.com", "192.0.2.1").await.unwrap();
        }
        let mut waits = Vec::new();
        for _ in 0..6 {
            let wait = fail(&attempts, "a@example.com", "192.0.2.1").await;
            let wait = wait.unwrap_err();
            waits.push(wait.as_secs_f64());
            clock.advance(wait);
            fail(&attempts, "a@example.com", "192.0.2.1").await.unwrap();
        }
        assert!((waits[0] - 6.0).abs() < 0.01, "{waits:?}");
        assert!(
            waits.windows(2).all(|pair| pair[1] > 1.5 * pair[0]),
            "{waits:?}"
        );
        // Elsewhere, and for another account, nothing has happened.
        for _ in 0..10 {
            fail(&attempts, "a@example.com", "198.51.100.1")
                .await
                .unwrap();
        }
        fail(&attempts, "b@example.com", "192.0.2.1").await.unwrap();
    }

    #[tokio::test]
    async fn nobody_waits_for_long() {
        let (attempts, clock) = attempts(10);
        let mut slept = Duration::ZERO;
        let mut tries = 0;
        while slept < Duration::from_hours(24) {
            match fail(&attempts, "a@example.com", "192.0.2.1").await {
                Ok(_) => tries += 1,
                Err(wait) => {
                    assert!(wait <= LONGEST);
                    clock.advance(wait);
                    slept += wait;
                }
            }
        }
        // Ten at first, and then about one in five minutes.
        assert!((200..400).contains(&tries), "{tries} tries in a day");
    }

    #[tokio::test]
    async fn neighboring_networks_are_counted_together_with_more_room() {
        for (networks, end, room) in [
            ("192.0.2.", "", 20),
            ("2001:db8:1:", "::1", 20),
            ("2001:db8:1:", "00::1", 40),
        ] {
            let (attempts, _) = attempts(10);
            let mut tried = 0;
            for n in 0..100 {
                let ip = format!("{networks}{}{end}", n % 8 + 1);
                tried += u32::from(fail(&attempts, "a@example.com", &ip).await.is_ok());
            }
            assert_eq!(tried, room, "{networks}N{end}");
        }
    }

    #[tokio::test]
    async fn a_network_that_tries_many_accounts_waits_too() {
        let (attempts, _) = attempts(10);
        let mut tried = 0;
        for n in 0..200 {
            let email = format!("{n}@example.com");
            tried += u32::from(fail(&attempts, &email, "192.0.2.1").await.is_ok());
        }
        assert_eq!(tried, 10 * ACCOUNTS);
        fail(&attempts, "0@example.com", "198.51.100.1")
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn a_known_device_has_tries_of_its_own() {
        let (attempts, _) = attempts(10);
        while fail(&attempts, "a@example.com", "192.0.2.1").await.is_ok() {}
        for _ in 0..10 {
            let attempt = attempts.of_device("a@example.com", &[7; 16]).await;
            assert!(!attempt.unwrap().is_suspect);
        }
        assert!(attempts.of_device("a@example.com", &[7; 16]).await.is_err());
        assert!(attempts.of_device("a@example.com", &[8; 16]).await.is_ok());
    }

    #[tokio::test]
    async fn the_devices_of_an_account_have_a_limit_together() {
        let (attempts, _) = attempts(10);
        let mut tried = 0;
        for device in 0..100 {
            for _ in 0..10 {
                let attempt = attempts.of_device("a@example.com", &[device; 16]).await;
                tried += u32::from(attempt.is_ok());
            }
        }
        assert_eq!(tried, 10 * DEVICES);
        assert!(attempts.of_device("b@example.com", &[1; 16]).await.is_ok());
        fail(&attempts, "a@example.com", "192.0.2.1").await.unwrap();
    }

    #[tokio::test]
    async fn right_passwords_of_known_devices_have_a_generous_limit() {
        let (attempts, clock) = attempts(10);
        let sign_in = async |device: u8| {
            let attempt = attempts.of_device("a@example.com", &[device; 16]).await;
            if let Ok(attempt) = &attempt {
                attempts.succeeded(attempt).await;
            }
            attempt.is_ok()
        };
        let mut made = 0;
        for n in 0..250 {
            made += u32::from(sign_in(n).await);
        }
        assert_eq!(made, 200);
        // Then about ten a minute.
        let mut later = 0;
        for n in 0..600 {
            clock.advance(Duration::from_secs(1));
            later += u32::from(sign_in(u8::try_from(n % 200).unwrap()).await);
        }
        assert!((60..=130).contains(&later), "{later} in ten minutes");
        let other = attempts.of_device("b@example.com", &[1; 16]).await;
        assert!(other.is_ok());
    }

    #[tokio::test]
    async fn a_right_password_is_counted_nowhere() {
        let (attempts, _) = attempts(10);
        for _ in 0..500 {
            let attempt = fail(&attempts, "a@example.com", "192.0.2.1").await.unwrap();
            attempts.succeeded(&attempt).await;
            assert!(!attempt.is_suspect);
        }
        for _ in 0..500 {
            let attempt = fail(&attempts, "a@example.com", "192.0.2.1").await.unwrap();
            attempts.not_made(&attempt).await;
        }
    }

    #[tokio::test]
    async fn a_network_is_suspect_after_a_few_failures_and_not_for_long() {
        let (attempts, clock) = attempts(10);
        for n in 0..5 {
            let email = format!("{n}@example.com");
            let attempt = fail(&attempts, &email, "192.0.2.1").await.unwrap();
            assert_eq!(attempt.is_suspect, n >= CROWD, "{n}");
        }
        // Another address of the same /24 is; another network is not.
        let neighbor = fail(&attempts, "x@example.com", "192.0.2.2").await.unwrap();
        assert!(neighbor.is_suspect);
        let other = fail(&attempts, "x@example.com", "192.0.3.2").await.unwrap();
        assert!(!other.is_suspect);
        clock.advance(Duration::from_mins(4));
        let later = fail(&attempts, "y@example.com", "192.0.2.1").await.unwrap();
        assert!(!later.is_suspect);
    }

    #[tokio::test]
    async fn zero_switches_it_off() {
        let (attempts, _) = attempts(0);
        for _ in 0..1000 {
            fail(&attempts, "a@example.com", "192.0.2.1").await.unwrap();
        }
    }

    #[tokio::test]
    async fn counters_at_rest_are_forgotten() {
        let (attempts, clock) = attempts(10);
        for n in 0..100 {
            let ip = format!("10.{n}.0.1");
            fail(&attempts, "a@example.com", &ip).await.unwrap();
        }
        assert!(attempts.local.lock().len() >= 200);
        clock.advance(Duration::from_mins(10));
        attempts.prune();
        assert_eq!(attempts.local.lock().len(), 0);
    }
}
