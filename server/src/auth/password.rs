//! Passwords: which are good enough, and their hashes (argon2id).

use std::{
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

/// One hash takes about 50 ms and 46 MiB. So many at once, and so many waiting: the last of them waits about a
/// second.
const THREADS: usize = 2;
const QUEUE: usize = 32;
const WAIT: Duration = Duration::from_secs(5);

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

    /// Whether it may be a new password of the account with this email.
    pub fn judge(&self, email: &str) -> Result<(), AuthError> {
        if !PASSWORD_BYTES.contains(&self.0.len()) {
            let (min, max) = (PASSWORD_BYTES.start(), PASSWORD_BYTES.end());
            return Err(AuthError::WeakPassword(format!(
                "must be {min}–{max} bytes"
            )));
        }
        let mut known = vec![email, "quota"];
        known.extend(
            email
                .split(['@', '.', '+', '-', '_'])
                .filter(|part| part.len() > 2),
        );
        // It looks at the first hundred characters; longer ones are not easier to guess.
        let estimate = zxcvbn::zxcvbn(&self.0, &known);
        if estimate.score() >= Score::Three {
            return Ok(());
        }
        let mut message = "is too easy to guess".to_owned();
        if let Some(warning) = estimate
            .feedback()
            .and_then(zxcvbn::feedback::Feedback::warning)
        {
            message = format!("{message}: {warning}");
        }
        Err(AuthError::WeakPassword(message))
    }
}

type Job = Box<dyn FnOnce(&Argon2<'static>) + Send>;

/// The threads that hash. Cheap to clone.
#[derive(Clone)]
pub struct PasswordPool {
    jobs: SyncSender<Job>,
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
        let mut chance = [0; 32];
        getrandom::fill(&mut chance)?;
        let nobody = argon
            .hash_password(&chance)
            .map_err(|e| internal(&e))?
            .to_string();

        let (jobs, queue) = sync_channel::<Job>(QUEUE);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..THREADS {
            let (queue, argon) = (queue.clone(), argon.clone());
            let run = move || {
                loop {
                    // The lock is for waiting alone: it is let go before the work begins.
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
            nobody: nobody.into(),
        })
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Argon2<'static>) -> T + Send + 'static,
    ) -> Result<T, AuthError> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |argon| {
            // A caller that went away is not worked for.
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

    /// The hash to store, as a PHC string with a salt of its own.
    pub async fn hash(&self, password: Password) -> Result<String, AuthError> {
        let hash = self.run(move |argon| {
            argon
                .hash_password(password.0.as_bytes())
                .map(|hash| hash.to_string())
        });
        hash.await?
            .map_err(|error| AuthError::Internal(error.to_string()))
    }

    /// Whether the password is the one with this hash. Without one it takes as long, and is not.
    pub async fn verify(
        &self,
        password: Password,
        hash: Option<String>,
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
mod tests {
    use super::*;

    const CHEAP: PasswordCost = PasswordCost {
        memory_kib: 64,
        passes: 1,
    };

    fn refused(password: &str) -> bool {
        matches!(
            Password::new(password).judge("ada.lovelace@example.com"),
            Err(AuthError::WeakPassword(_))
        )
    }

    #[test]
    fn easy_passwords_are_refused_and_hard_ones_are_not() {
        assert!(refused("short"));
        assert!(refused("password1234"));
        assert!(refused("aaaaaaaaaaaaaaaa"));
        assert!(refused("ada.lovelace@example.com"));
        assert!(refused(&"ö4$zK".repeat(60)));
        assert!(!refused("violet-harbour-quilt-93"));
        assert!(!refused("correct horse battery staple"));
    }

    #[tokio::test]
    async fn a_password_is_verified_in_any_normal_form() {
        let pool = PasswordPool::start(CHEAP).unwrap();
        let hash = pool.hash(Password::new("caf\u{e9} und Tee")).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=64,t=1,p=1$"), "{hash}");
        assert!(
            pool.verify(Password::new("cafe\u{301} und Tee"), Some(hash.clone()))
                .await
                .unwrap()
        );
        assert!(
            !pool
                .verify(Password::new("cafe und Tee"), Some(hash))
                .await
                .unwrap()
        );
        assert!(!pool.verify(Password::new("anything"), None).await.unwrap());
    }

    #[tokio::test]
    async fn a_flood_is_turned_away_at_once_and_those_inside_are_served() {
        let pool = PasswordPool::start(PasswordCost {
            memory_kib: 8192,
            passes: 4,
        })
        .unwrap();
        let all = (0..200).map(|_| pool.verify(Password::new("x"), None));
        let all = futures_util::future::join_all(all).await;
        let busy = all
            .iter()
            .filter(|it| matches!(it, Err(AuthError::Busy)))
            .count();
        let served = all.iter().filter(|it| matches!(it, Ok(false))).count();
        assert_eq!(busy + served, 200);
        assert!(served >= QUEUE, "{served} served");
        assert!(busy >= 200 - QUEUE - THREADS - 4, "{busy} turned away");
    }
}
