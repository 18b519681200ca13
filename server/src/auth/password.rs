//! Passwords: which are good enough, and their hashes (argon2id).
//!
//! Hashing takes two threads and 92 MiB at most, however many ask. Who waits for a thread waits in one of three
//! lanes, so that a flood of sign-ins does not keep others out: known devices and people who are signed in; networks
//! that have not failed lately; and the rest, which includes registrations. Each lane is bounded and gets its share of
//! the threads. Within a lane, callers take turns by account or network, and when it is full, the one that takes most
//! of it gives way first.
//!
//! New passwords are judged on the same threads, since that takes time as well.

use std::{
    collections::{HashMap, VecDeque},
    panic::catch_unwind,
    sync::{
        Arc,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    time::Duration,
};

use argon2::{
    Algorithm, Argon2, Params, PasswordHasher, PasswordVerifier, Version,
    password_hash::phc::PasswordHash,
};
use parking_lot::Mutex;
use quota_common::bounds::PASSWORD_BYTES;
use tokio::sync::oneshot;
use unicode_normalization::UnicodeNormalization;
use zxcvbn::Score;

use super::AuthError;
use crate::config::PasswordCost;

/// One hash takes about 50 ms and 46 MiB. So many at once.
const THREADS: usize = 2;
/// How many wait in each lane: the last of all waits for somewhat more than a second.
const WAITING: [usize; LANES] = [16, 24, 8];
const WAIT: Duration = Duration::from_secs(5);
const LANES: usize = 3;
/// Whose turn it is, again and again. A lane that is empty leaves its turn to the first that is not.
const TURNS: [Lane; 8] = [
    Lane::Known,
    Lane::Ordinary,
    Lane::Known,
    Lane::Ordinary,
    Lane::Known,
    Lane::Ordinary,
    Lane::Known,
    Lane::Suspect,
];

/// How many characters of a password are judged, without those that repeat others.
const JUDGED: usize = 64;
/// How many ways of reading symbols as letters are tried.
const READINGS: usize = 32;
/// The bound of what a judgement takes: characters squared, times readings. As many take about 4 ms.
const EFFORT: usize = 16 * 1024;
/// A text of this length that has occurred before makes a password no harder to guess.
const REPEATED: usize = 4;
/// The symbols that zxcvbn reads as a letter, for each letter.
const SYMBOLS: [&str; 12] = [
    "4@", "8", "({[<", "3", "69", "1!|", "1|7", "0", "$5", "+7", "%", "2",
];
/// How many parts of an email are looked for in its account's password.
const EMAIL_PARTS: usize = 16;

/// Where a password waits to be hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// A known device, or somebody who is signed in.
    Known,
    /// A network without failures lately.
    Ordinary,
    /// A network with failures lately, or a registration.
    Suspect,
}

/// A place in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    pub lane: Lane,
    /// Who takes turns with others: in the known lane an account, elsewhere a network. Any number that is the same for
    /// the same one.
    pub party: u64,
}

/// A password in its normal form (NFC): the same characters typed on another keyboard are the same bytes.
#[derive(Clone)]
pub struct Password(String);

impl std::fmt::Debug for Password {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Password")
    }
}

impl Password {
    pub fn new(text: &str) -> Self {
        Self(text.nfc().collect())
    }

    /// Whether its length is one that a password may have.
    pub fn check_length(&self) -> Result<(), AuthError> {
        if PASSWORD_BYTES.contains(&self.0.len()) {
            return Ok(());
        }
        let (min, max) = (PASSWORD_BYTES.start(), PASSWORD_BYTES.end());
        Err(AuthError::WeakPassword(format!(
            "must be {min}–{max} bytes"
        )))
    }

    /// Whether it may be a new password of the account with this email. Takes some milliseconds, whatever it holds: see
    /// [`windows`]. One part that is hard to guess makes the whole hard to guess.
    fn judge(&self, email: &str) -> Result<(), AuthError> {
        self.check_length()?;
        let mut known = vec![email, "quota"];
        let parts = email.split(['@', '.', '+', '-', '_']);
        known.extend(parts.filter(|part| part.len() > 2).take(EMAIL_PARTS));
        let mut warning = None;
        for part in windows(&self.0) {
            // What it cannot judge counts as easy.
            let judged = catch_unwind(|| {
                let estimate = zxcvbn::zxcvbn(&part, &known);
                let warning = estimate
                    .feedback()
                    .and_then(zxcvbn::feedback::Feedback::warning);
                (estimate.score(), warning)
            });
            match judged {
                Ok((score, _)) if score >= Score::Three => return Ok(()),
                Ok((_, this)) => warning = warning.or(this),
                Err(_) => {}
            }
        }
        let message = match warning {
            Some(warning) => format!("is too easy to guess: {warning}"),
            None => "is too easy to guess".to_owned(),
        };
        Err(AuthError::WeakPassword(message))
    }
}

/// Leaves out what has occurred before.
fn without_repeats(text: &str) -> String {
    let all = text.chars().collect::<Vec<_>>();
    let mut kept = String::new();
    let mut at = 0;
    while at < all.len() {
        let length = |from: usize| {
            let same = all[from..].iter().zip(&all[at..]);
            same.take_while(|(one, other)| one == other).count()
        };
        let longest = (0..at).map(length).max().unwrap_or(0);
        if longest >= REPEATED {
            at += longest;
        } else {
            kept.push(all[at]);
            at += 1;
        }
    }
    kept
}

/// Cuts a text into parts that can be judged in a bounded time, up to a length. zxcvbn tries every way of reading the
/// symbols of a text as letters, and their number is the product of those of each letter.
fn windows(text: &str) -> Vec<String> {
    let mut windows = Vec::new();
    let mut window = Vec::new();
    for c in without_repeats(text).chars().take(JUDGED) {
        window.push(c);
        let readings = readings(&window);
        if readings > READINGS || window.len().pow(2) * readings > EFFORT {
            window.pop();
            windows.push(window.iter().collect());
            window = vec![c];
        }
    }
    windows.push(window.iter().collect());
    windows
}

/// The most ways in which zxcvbn reads the symbols in this text as letters.
fn readings(text: &[char]) -> usize {
    let of_letter = |letter: &&str| letter.chars().filter(|c| text.contains(c)).count();
    let product: usize = SYMBOLS.iter().map(|it| of_letter(it).max(1)).product();
    // The symbols of `l` are those of `i` and `t` as well: each is read both ways.
    let is_shared = text.iter().any(|c| "1|7".contains(*c));
    if is_shared { 2 * product } else { product }
}

type Job = Box<dyn FnOnce(&Argon2<'static>) + Send>;

struct Waiter<T> {
    party: u64,
    /// How many of its party had to be served first when it came.
    round: u64,
    waiter: T,
}

/// Those who wait, by lane. In a lane, the first of every party comes before the second of any, and those of one round
/// are in the order of their coming.
struct Queue<T> {
    lanes: [VecDeque<Waiter<T>>; LANES],
    turn: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            lanes: std::array::from_fn(|_| VecDeque::new()),
            turn: 0,
        }
    }
}

impl<T> Queue<T> {
    /// Adds a waiter to its lane. If the lane is full, the party with the most waiters loses its newest; `false` if
    /// that would be the caller's own.
    fn push(&mut self, turn: Turn, waiter: T) -> bool {
        let lane = &mut self.lanes[turn.lane as usize];
        if lane.len() >= WAITING[turn.lane as usize] {
            let mut counts = HashMap::<u64, usize>::new();
            for it in &*lane {
                *counts.entry(it.party).or_default() += 1;
            }
            let own = counts.get(&turn.party).copied().unwrap_or(0);
            let Some((party, most)) = counts.into_iter().max_by_key(|(_, count)| *count) else {
                return false;
            };
            if most <= own + 1 {
                return false;
            }
            let newest = lane.iter().rposition(|it| it.party == party);
            // Dropped, which its caller notices.
            newest.and_then(|at| lane.remove(at));
        }
        let last = lane.iter().rfind(|it| it.party == turn.party);
        let round = last.map_or(0, |it| it.round + 1);
        // Rounds never fall along a lane.
        let at = lane.partition_point(|it| it.round <= round);
        let waiter = Waiter {
            party: turn.party,
            round,
            waiter,
        };
        lane.insert(at, waiter);
        true
    }

    fn pop(&mut self) -> Option<T> {
        let first = TURNS[self.turn % TURNS.len()] as usize;
        let lane = std::iter::once(first)
            .chain(0..LANES)
            .find(|lane| !self.lanes[*lane].is_empty())?;
        self.turn = self.turn.wrapping_add(1);
        self.lanes[lane].pop_front().map(|it| it.waiter)
    }
}

#[derive(Default)]
struct Places {
    taken: usize,
    waiting: Queue<oneshot::Sender<Place>>,
}

/// One of as many places as there are threads. Whoever holds one may hash, and should do only what belongs to that:
/// a look-up in the database waits here as well, so that a flood does not take all of its connections.
pub struct Place(Arc<Mutex<Places>>);

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.0.lock();
        let next = places.waiting.pop();
        if next.is_none() {
            places.taken -= 1;
        }
        drop(places);
        if let Some(next) = next {
            // A waiter that has gone returns it, which drops it again.
            let _ = next.send(Self(self.0.clone()));
        }
    }
}

/// The threads that hash. Cheap to clone.
#[derive(Clone)]
pub struct PasswordPool {
    jobs: SyncSender<Job>,
    places: Arc<Mutex<Places>>,
    /// The hash of a password that nobody has: unknown emails take as long as wrong passwords.
    nobody: Arc<str>,
}

impl std::fmt::Debug for PasswordPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PasswordPool")
    }
}

impl PasswordPool {
    pub fn start(cost: PasswordCost) -> Result<Self, AuthError> {
        let internal = |error: &dyn std::fmt::Display| AuthError::Internal(error.to_string());
        let params =
            Params::new(cost.memory_kib, cost.passes, 1, Some(32)).map_err(|e| internal(&e))?;
        let argon = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let mut random = [0; 32];
        getrandom::fill(&mut random)?;
        let nobody = argon
            .hash_password(&random)
            .map_err(|e| internal(&e))?
            .to_string();

        // A caller that goes away leaves its place while its hash is still computed.
        let (jobs, queue) = sync_channel::<Job>(4 * THREADS);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..THREADS {
            let (queue, argon) = (queue.clone(), argon.clone());
            let run = move || {
                loop {
                    // The lock is held while waiting only, and released before the work begins.
                    let next = queue.lock().recv();
                    match next {
                        Ok(job) => job(&argon),
                        Err(_) => return,
                    }
                }
            };
            std::thread::Builder::new()
                .name("password".into())
                .spawn(run)
                .map_err(|e| internal(&e))?;
        }
        Ok(Self {
            jobs,
            places: Arc::default(),
            nobody: nobody.into(),
        })
    }

    /// Waits for a place.
    pub async fn enter(&self, turn: Turn) -> Result<Place, AuthError> {
        let granted = {
            let mut places = self.places.lock();
            if places.taken < THREADS {
                places.taken += 1;
                return Ok(Place(self.places.clone()));
            }
            let (grant, granted) = oneshot::channel();
            if !places.waiting.push(turn, grant) {
                return Err(AuthError::Busy);
            }
            granted
        };
        // A waiter that gave way to another party is dropped without a place.
        match tokio::time::timeout(WAIT, granted).await {
            Ok(Ok(place)) => Ok(place),
            Ok(Err(_)) | Err(_) => Err(AuthError::Busy),
        }
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Argon2<'static>) -> T + Send + 'static,
    ) -> Result<T, AuthError> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |argon| {
            // Nothing is done for a caller that has gone.
            if !answer.is_closed() {
                let _ = answer.send(work(argon));
            }
        });
        match self.jobs.try_send(job) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(AuthError::Busy),
            Err(TrySendError::Disconnected(_)) => {
                return Err(AuthError::Internal("no password threads".into()));
            }
        }
        match tokio::time::timeout(WAIT, answered).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(_)) => Err(AuthError::Internal("a password thread died".into())),
            Err(_) => Err(AuthError::Busy),
        }
    }

    /// Judges a new password of the account with this email. Returns the hash to store, as a PHC string with a salt of
    /// its own.
    pub async fn hash(
        &self,
        password: Password,
        email: &str,
        _place: &Place,
    ) -> Result<String, AuthError> {
        let email = email.to_owned();
        let hash = self.run(move |argon| {
            password.judge(&email)?;
            argon
                .hash_password(password.0.as_bytes())
                .map(|hash| hash.to_string())
                .map_err(|error| AuthError::Internal(error.to_string()))
        });
        hash.await?
    }

    /// Whether the password is the one with this hash. Without one it takes as long, and is not.
    pub async fn verify(
        &self,
        password: Password,
        hash: Option<String>,
        _place: &Place,
    ) -> Result<bool, AuthError> {
        let exists = hash.is_some();
        let hash = hash.unwrap_or_else(|| self.nobody.as_ref().to_owned());
        let right = self.run(move |argon| {
            PasswordHash::new(&hash)
                .is_ok_and(|hash| argon.verify_password(password.0.as_bytes(), &hash).is_ok())
        });
        Ok(right.await? && exists)
    }
}

#[cfg(test)]
mod tests;
