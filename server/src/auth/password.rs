//! Passwords: their strength, and their hashes (argon2id).
//!
//! Hashing uses at most two threads and 92 MiB of memory, regardless of load. Callers that wait for a thread belong to
//! one of three classes: known devices and signed-in users; networks with few recent failures; and all other callers,
//! including registrations. The number of waiters in each class is limited, and each class gets a share of the threads,
//! so a flood of sign-ins does not lock out other users. Within a class, accounts or networks take turns. If a waiter
//! arrives when its class is full, the account or network with the most waiters loses one of them.
//!
//! The same threads estimate the strength of new passwords, because that also takes time.

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
use prometheus_client::metrics::counter::Counter;
use quota_common::bounds::PASSWORD_BYTES;
use tokio::sync::oneshot;
use unicode_normalization::UnicodeNormalization;
use zxcvbn::Score;

use super::AuthError;
use crate::config::PasswordCost;

/// The maximum number of concurrent hashes. Each takes about 50 ms and 46 MiB of memory.
const THREADS: usize = 2;
/// The maximum number of waiters in each class. If all classes are full, serving all waiters takes slightly more than a
/// second.
const WAITING: [usize; CLASSES] = [16, 24, 8];
const WAIT: Duration = Duration::from_secs(5);
const CLASSES: usize = 3;
/// The repeating order in which classes get threads. If a class has no waiters, its turn goes to the first class that
/// has some.
const TURNS: [CallerClass; 8] = [
    CallerClass::Known,
    CallerClass::Ordinary,
    CallerClass::Known,
    CallerClass::Ordinary,
    CallerClass::Known,
    CallerClass::Ordinary,
    CallerClass::Known,
    CallerClass::Suspect,
];

/// How many of a password's characters are used for the estimate, not counting repetitions.
const JUDGED: usize = 64;
/// The maximum number of ways in which zxcvbn may read the symbols in one part of a password as letters.
const READINGS: usize = 32;
/// The maximum cost of an estimate. An estimate of this cost takes about 4 ms. The cost is the square of the number of
/// characters, times the number of readings.
const EFFORT: usize = 16 * 1024;
/// A repetition of at least this length does not make a password harder to guess.
const REPEATED: usize = 4;
/// Each string contains the symbols that zxcvbn can read as one particular letter.
const SYMBOLS: [&str; 12] = [
    "4@", "8", "({[<", "3", "69", "1!|", "1|7", "0", "$5", "+7", "%", "2",
];
/// The maximum number of parts of the account's email address to search for in the password.
const EMAIL_PARTS: usize = 16;

/// The class of a caller that waits for a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallerClass {
    /// A known device or a signed-in user.
    Known,
    /// A network with few or no recent failures.
    Ordinary,
    /// A network with several recent failures, or a registration.
    Suspect,
}

/// What determines a caller's position in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    pub class: CallerClass,
    /// Identifies the account (for [`CallerClass::Known`]) or the network that takes turns with the others in its
    /// class.
    pub party: u64,
}

/// A password in Unicode normalization form NFC, so that typing the same characters on different keyboards results in
/// the same bytes.
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

    pub fn check_length(&self) -> Result<(), AuthError> {
        if PASSWORD_BYTES.contains(&self.0.len()) {
            return Ok(());
        }
        let (min, max) = (PASSWORD_BYTES.start(), PASSWORD_BYTES.end());
        Err(AuthError::WeakPassword(format!(
            "must be {min}–{max} bytes"
        )))
    }

    /// Checks that the password is strong enough for the account with this email address. Takes only a few milliseconds
    /// for any password; see [`windows`]. A password is hard to guess if one of its parts is hard to guess.
    fn judge(&self, email: &str) -> Result<(), AuthError> {
        self.check_length()?;
        let mut known = vec![email, "quota"];
        let parts = email.split(['@', '.', '+', '-', '_']);
        known.extend(parts.filter(|part| part.len() > 2).take(EMAIL_PARTS));
        for part in windows(&self.0) {
            // If zxcvbn panics, treat the part as easy to guess.
            let score = catch_unwind(|| zxcvbn::zxcvbn(&part, &known).score());
            if score.is_ok_and(|score| score >= Score::Three) {
                return Ok(());
            }
        }
        Err(AuthError::WeakPassword(
            "this password is too common. Choose another.".to_owned(),
        ))
    }
}

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

/// Splits a string into parts whose strength can be estimated in limited time. zxcvbn tries every combination of the
/// letters that a string's symbols can stand for, so long strings could take too long. Ignores characters beyond a
/// maximum length.
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

/// Returns an upper bound for the number of ways in which zxcvbn reads this string's symbols as letters.
fn readings(text: &[char]) -> usize {
    let of_letter = |letter: &&str| letter.chars().filter(|c| text.contains(c)).count();
    let product: usize = SYMBOLS.iter().map(|it| of_letter(it).max(1)).product();
    // The symbols for `l` can also stand for `i` and `t`, so they are read both ways.
    let is_shared = text.iter().any(|c| "1|7".contains(*c));
    if is_shared { 2 * product } else { product }
}

type Job = Box<dyn FnOnce(&Argon2<'static>) + Send>;

struct Waiter<T> {
    party: u64,
    /// One more than the round of the party's previous waiter in the queue, or 0 if the party had no waiters.
    round: u64,
    waiter: T,
}

/// Waiters by class. Within a class, the first waiter of every party comes before the second waiter of any party.
/// Waiters in the same round are in order of arrival.
struct Queue<T> {
    classes: [VecDeque<Waiter<T>>; CLASSES],
    turn: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            classes: std::array::from_fn(|_| VecDeque::new()),
            turn: 0,
        }
    }
}

impl<T> Queue<T> {
    /// Adds a waiter to its class. If the class is full, removes the newest waiter of the party with the most waiters.
    /// Returns `false` if the new waiter itself would be removed.
    fn push(&mut self, turn: Turn, waiter: T) -> bool {
        let class = &mut self.classes[turn.class as usize];
        if class.len() >= WAITING[turn.class as usize] {
            let mut counts = HashMap::<u64, usize>::new();
            for it in &*class {
                *counts.entry(it.party).or_default() += 1;
            }
            let own = counts.get(&turn.party).copied().unwrap_or(0);
            let Some((party, most)) = counts.into_iter().max_by_key(|(_, count)| *count) else {
                return false;
            };
            if most <= own + 1 {
                return false;
            }
            let newest = class.iter().rposition(|it| it.party == party);
            // Dropping the waiter notifies its caller.
            newest.and_then(|at| class.remove(at));
        }
        let last = class.iter().rfind(|it| it.party == turn.party);
        let round = last.map_or(0, |it| it.round + 1);
        // A class is sorted by round.
        let at = class.partition_point(|it| it.round <= round);
        let waiter = Waiter {
            party: turn.party,
            round,
            waiter,
        };
        class.insert(at, waiter);
        true
    }

    fn pop(&mut self) -> Option<T> {
        let first = TURNS[self.turn % TURNS.len()] as usize;
        let class = std::iter::once(first)
            .chain(0..CLASSES)
            .find(|class| !self.classes[*class].is_empty())?;
        self.turn = self.turn.wrapping_add(1);
        self.classes[class].pop_front().map(|it| it.waiter)
    }
}

#[derive(Default)]
struct Places {
    taken: usize,
    waiting: Queue<oneshot::Sender<Place>>,
}

/// A permit to use a thread. There are as many permits as threads. Hold it only as long as necessary. Callers also hold
/// it while they look up the account, so that a flood does not use up the database connections.
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
            // If this waiter has given up, sending drops the permit, and dropping the permit passes it on to the next
            // waiter.
            let _ = next.send(Self(self.0.clone()));
        }
    }
}

/// The threads that hash passwords. Cloning is cheap.
#[derive(Clone)]
pub struct PasswordPool {
    jobs: SyncSender<Job>,
    places: Arc<Mutex<Places>>,
    /// Counts callers that were turned away.
    busy: Counter,
    /// The hash of a random password. If the email address is unknown, the password is checked against this hash, so
    /// that the rejection takes as long as for a wrong password.
    dummy_hash: Arc<str>,
}

impl std::fmt::Debug for PasswordPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PasswordPool")
    }
}

impl PasswordPool {
    /// Starts the threads. `busy` counts callers that get [`AuthError::Busy`].
    pub fn start(cost: PasswordCost, busy: Counter) -> Result<Self, AuthError> {
        let internal = |error: &dyn std::fmt::Display| AuthError::Internal(error.to_string());
        let params =
            Params::new(cost.memory_kib, cost.passes, 1, Some(32)).map_err(|e| internal(&e))?;
        let argon = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let mut random = [0; 32];
        getrandom::fill(&mut random)?;
        let dummy_hash = argon
            .hash_password(&random)
            .map_err(|e| internal(&e))?
            .to_string();

        // The capacity exceeds the number of threads, because a dropped caller releases its permit while its hash is
        // still being computed.
        let (jobs, queue) = sync_channel::<Job>(4 * THREADS);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..THREADS {
            let (queue, argon) = (queue.clone(), argon.clone());
            let run = move || {
                loop {
                    // Hold the lock only while waiting for a job, not while running it.
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
            busy,
            dummy_hash: dummy_hash.into(),
        })
    }

    fn turn_away(&self) -> AuthError {
        self.busy.inc();
        AuthError::Busy
    }

    pub async fn enter(&self, turn: Turn) -> Result<Place, AuthError> {
        let granted = {
            let mut places = self.places.lock();
            if places.taken < THREADS {
                places.taken += 1;
                return Ok(Place(self.places.clone()));
            }
            let (grant, granted) = oneshot::channel();
            if !places.waiting.push(turn, grant) {
                return Err(self.turn_away());
            }
            granted
        };
        // Receiving fails if another party's waiter has displaced this one.
        match tokio::time::timeout(WAIT, granted).await {
            Ok(Ok(place)) => Ok(place),
            Ok(Err(_)) | Err(_) => Err(self.turn_away()),
        }
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Argon2<'static>) -> T + Send + 'static,
    ) -> Result<T, AuthError> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |argon| {
            // Skip the job if its caller was dropped.
            if !answer.is_closed() {
                let _ = answer.send(work(argon));
            }
        });
        match self.jobs.try_send(job) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(self.turn_away()),
            Err(TrySendError::Disconnected(_)) => {
                return Err(AuthError::Internal(
                    "all password threads have ended".into(),
                ));
            }
        }
        match tokio::time::timeout(WAIT, answered).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(_)) => Err(AuthError::Internal("a password thread panicked".into())),
            Err(_) => Err(self.turn_away()),
        }
    }

    /// Checks the strength of a new password for the account with this email address. Returns the hash to store, as a
    /// PHC string that includes the salt.
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

    /// Returns whether the password matches the hash. Without a hash, takes the same time and returns `false`.
    pub async fn verify(
        &self,
        password: Password,
        hash: Option<String>,
        _place: &Place,
    ) -> Result<bool, AuthError> {
        let exists = hash.is_some();
        let hash = hash.unwrap_or_else(|| self.dummy_hash.as_ref().to_owned());
        let right = self.run(move |argon| {
            PasswordHash::new(&hash)
                .is_ok_and(|hash| argon.verify_password(password.0.as_bytes(), &hash).is_ok())
        });
        Ok(right.await? && exists)
    }
}

#[cfg(test)]
mod tests;
