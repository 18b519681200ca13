use super::{counter::LONGEST, *};
use crate::clock::{TestClock, UnixNanos};

fn attempts(free: u32) -> (Arc<Attempts>, TestClock) {
    let clock = TestClock::at(UnixNanos::from_secs(1_785_738_360));
    let attempts = Attempts::new(
        free,
        &[1; 32],
        None,
        Arc::new(clock.clone()),
        Arc::default(),
    );
    (Arc::new(attempts), clock)
}

async fn fail(attempts: &Arc<Attempts>, email: &str, ip: &str) -> Result<Attempt, Duration> {
    let ip = ip.parse().unwrap();
    let tried = attempts.of_network(email, Some(ip)).await;
    let mut attempt = tried.map_err(|wait| wait.0)?;
    attempt.set_judgment(Judgment::Wrong);
    Ok(attempt)
}

async fn fail_on_device(
    attempts: &Arc<Attempts>,
    email: &str,
    device: &DeviceId,
) -> Result<Attempt, Wait> {
    let mut attempt = attempts.of_device(email, device).await?;
    attempt.set_judgment(Judgment::Wrong);
    Ok(attempt)
}

#[tokio::test]
async fn guessing_network_waits_longer_and_longer_and_no_other_does() {
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
    // Other networks and accounts are not affected.
    for _ in 0..10 {
        fail(&attempts, "a@example.com", "198.51.100.1")
            .await
            .unwrap();
    }
    fail(&attempts, "b@example.com", "192.0.2.1").await.unwrap();
}

#[tokio::test]
async fn waits_are_never_long() {
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
    // Ten attempts at first, then about one every five minutes.
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
async fn network_that_tries_many_accounts_waits_too() {
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
async fn known_device_has_its_own_attempts() {
    let (attempts, _) = attempts(10);
    while fail(&attempts, "a@example.com", "192.0.2.1").await.is_ok() {}
    for _ in 0..10 {
        let attempt = fail_on_device(&attempts, "a@example.com", &[7; 16]).await;
        assert!(!attempt.unwrap().is_suspect);
    }
    let fails = async |device| {
        let attempt = fail_on_device(&attempts, "a@example.com", &[device; 16]).await;
        attempt.is_ok()
    };
    assert!(!fails(7).await);
    assert!(fails(8).await);
}

#[tokio::test]
async fn devices_of_an_account_share_a_limit() {
    let (attempts, _) = attempts(10);
    let mut tried = 0;
    for device in 0..100 {
        for _ in 0..10 {
            let attempt = fail_on_device(&attempts, "a@example.com", &[device; 16]).await;
            tried += u32::from(attempt.is_ok());
        }
    }
    assert_eq!(tried, 10 * DEVICES);
    assert!(attempts.of_device("b@example.com", &[1; 16]).await.is_ok());
    fail(&attempts, "a@example.com", "192.0.2.1").await.unwrap();
}

#[tokio::test]
async fn correct_passwords_of_known_devices_have_a_generous_limit() {
    let (attempts, clock) = attempts(10);
    let sign_in = async |device: u8| {
        let attempt = attempts.of_device("a@example.com", &[device; 16]).await;
        let is_allowed = attempt.is_ok();
        if let Ok(attempt) = attempt {
            attempt.succeeded().await;
        }
        is_allowed
    };
    let mut made = 0;
    for n in 0..250 {
        made += u32::from(sign_in(n).await);
    }
    assert_eq!(made, 200);
    // After that, about ten per minute.
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
async fn correct_password_is_not_counted() {
    let (attempts, _) = attempts(10);
    for _ in 0..500 {
        let attempt = fail(&attempts, "a@example.com", "192.0.2.1").await.unwrap();
        assert!(!attempt.is_suspect);
        attempt.succeeded().await;
    }
}

#[tokio::test]
async fn attempt_whose_password_was_never_verified_is_not_counted() {
    let (attempts, _) = attempts(10);
    for _ in 0..9 {
        fail(&attempts, "a@example.com", "192.0.2.1").await.unwrap();
    }
    for _ in 0..500 {
        let ip = Some("192.0.2.1".parse().unwrap());
        let attempt = attempts.of_network("a@example.com", ip).await;
        drop(attempt.expect("no wait"));
    }
    // An attempt with the correct password is not counted either, even if no session could be created.
    for _ in 0..500 {
        let ip = Some("192.0.2.1".parse().unwrap());
        let attempt = attempts.of_network("a@example.com", ip).await;
        attempt.expect("no wait").set_judgment(Judgment::Correct);
    }
    // Of the ten free attempts, only the nine failures were counted, so one is left.
    fail(&attempts, "a@example.com", "192.0.2.1").await.unwrap();
    assert!(fail(&attempts, "a@example.com", "192.0.2.1").await.is_err());
}

#[tokio::test]
async fn network_is_suspect_after_a_few_failures_and_not_for_long() {
    let (attempts, clock) = attempts(10);
    for n in 0..5 {
        let email = format!("{n}@example.com");
        let attempt = fail(&attempts, &email, "192.0.2.1").await.unwrap();
        assert_eq!(attempt.is_suspect, n >= CROWD, "{n}");
    }
    // Another address in the same /24 network shares the counter; an address in a different network does not.
    let neighbor = fail(&attempts, "x@example.com", "192.0.2.2").await.unwrap();
    assert!(neighbor.is_suspect);
    let other = fail(&attempts, "x@example.com", "192.0.3.2").await.unwrap();
    assert!(!other.is_suspect);
    clock.advance(Duration::from_mins(4));
    let later = fail(&attempts, "y@example.com", "192.0.2.1").await.unwrap();
    assert!(!later.is_suspect);
}

#[tokio::test]
async fn zero_disables_the_limit() {
    let (attempts, _) = attempts(0);
    for _ in 0..1000 {
        fail(&attempts, "a@example.com", "192.0.2.1").await.unwrap();
    }
}

#[tokio::test]
async fn forgiven_counters_are_removed() {
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

async fn register(attempts: &Arc<Attempts>, ip: &str) -> Result<(), Duration> {
    let counted = attempts.of_registration(Some(ip.parse().unwrap())).await;
    counted
        .map_err(|wait| wait.0)?
        .set_judgment(Judgment::Wrong);
    Ok(())
}

/// The limit is four registrations per day: after the first four, one is allowed every six hours.
#[tokio::test]
async fn network_registers_its_number_of_accounts_and_then_as_many_per_day() {
    let (attempts, clock) = attempts(4);
    for _ in 0..4 {
        register(&attempts, "192.0.2.1").await.unwrap();
    }
    let mut later = 0;
    for _ in 0..48 {
        clock.advance(Duration::from_hours(1));
        // Pruning must not remove the network's counter, which is in use.
        attempts.prune();
        if let Err(wait) = register(&attempts, "192.0.2.1").await {
            assert!(wait <= Duration::from_hours(6), "{wait:?}");
        } else {
            later += 1;
        }
    }
    assert!((7..=8).contains(&later), "{later} in two days");
    // Another network is not affected, and a wider network may create more accounts.
    register(&attempts, "198.51.100.1").await.unwrap();
    let mut neighbors = 0;
    for n in 2..100 {
        let neighbor = register(&attempts, &format!("198.51.100.{n}")).await;
        neighbors += u32::from(neighbor.is_ok());
    }
    assert_eq!(neighbors, 7);
}

#[tokio::test]
async fn registration_that_creates_no_account_does_not_count() {
    let (attempts, _) = attempts(2);
    let ip = Some("192.0.2.1".parse().unwrap());
    for _ in 0..10 {
        drop(attempts.of_registration(ip).await.unwrap());
    }
    register(&attempts, "192.0.2.1").await.unwrap();
    register(&attempts, "192.0.2.1").await.unwrap();
    register(&attempts, "192.0.2.1").await.unwrap_err();
}
