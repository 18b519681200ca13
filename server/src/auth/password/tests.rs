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
fn weak_passwords_are_rejected_and_strong_ones_accepted() {
    assert!(refused("short"));
    assert!(refused("password1234"));
    assert!(refused("aaaaaaaaaaaaaaaa"));
    assert!(refused("ada.lovelace@example.com"));
    assert!(refused(&"ö4$zK".repeat(60)));
    let judged = Password::new("password1234").judge("ada.lovelace@example.com");
    assert_eq!(
        judged.map_err(|it| it.to_string()),
        Err("this password is too common. Choose another.".to_owned())
    );
    assert!(!refused("violet-harbour-quilt-93"));
    assert!(!refused("correct horse battery staple"));
}

/// zxcvbn's running time grows with the number of ways to read symbols as letters, and zxcvbn overflows on long
/// keyboard patterns.
#[test]
fn costly_passwords_are_estimated_in_parts() {
    let costly = "4@8({[<369&#!1|0$5+7%2".repeat(5);
    let overflowing = "o0O0o0".repeat(17);
    let digits = "0123456789".repeat(8);
    for text in [&costly[..100], &overflowing[..100], &digits[..]] {
        for part in windows(text) {
            let part = part.chars().collect::<Vec<_>>();
            assert!(readings(&part) <= READINGS && part.len() <= JUDGED);
            assert!(part.len().pow(2) * readings(&part) <= EFFORT);
        }
    }
    assert_eq!(windows(&costly).concat(), &costly[..22]);
    assert_eq!(windows(&overflowing), ["o0O0o0"]);
    let ordinary = "correct horse battery staple 1!";
    assert_eq!(windows(ordinary), [ordinary]);
}

#[test]
fn weak_passwords_with_symbols_are_rejected() {
    for password in [
        "1234567890!@#$%^&*()",
        "qwertyuiop[]1234567890-=",
        "4@4@4@4@4@4@4@4@8(8(8(8(",
        "pa55w0rd!pa55w0rd!pa55w0rd!pa55w0rd!",
        "p@$$w0rd1!p@$$w0rd1!p@$$w0rd1!p@$$w",
        &"o0O0o0".repeat(17)[..100],
        &"12345678".repeat(12),
        &"pa55w0rd!".repeat(11)[..97],
    ] {
        assert!(refused(password), "{password}");
    }
    for password in [
        // Three random strings (of all printable characters, of digits and symbols, and of digits), and a passphrase.
        "k7(Q|2z$X9@v%e!R",
        "4[7!9$%0<2@8{5+|6",
        "83920174650938271640",
        "violet-harbour-quilt-93-{[<(!)>]}",
    ] {
        assert!(!refused(password), "{password}");
    }
}

fn turn(class: CallerClass, party: u64) -> Turn {
    Turn { class, party }
}

#[tokio::test]
async fn password_is_verified_in_any_normal_form() {
    let pool = PasswordPool::start(CHEAP, Counter::default()).unwrap();
    let place = &pool.enter(turn(CallerClass::Known, 0)).await.unwrap();
    let hash = pool
        .hash(
            Password::new("caf\u{e9} und Tee, violet harbour"),
            "ada@example.com",
            place,
        )
        .await
        .unwrap();
    assert!(hash.starts_with("$argon2id$v=19$m=64,t=1,p=1$"), "{hash}");
    let verify = async |password: &str, hash: Option<&String>| {
        let verified = pool.verify(Password::new(password), hash.cloned(), place);
        verified.await.unwrap()
    };
    assert!(verify("cafe\u{301} und Tee, violet harbour", Some(&hash)).await);
    assert!(!verify("cafe und Tee, violet harbour", Some(&hash)).await);
    assert!(!verify("anything", None).await);
}

#[tokio::test]
async fn flood_is_rejected_at_once_and_earlier_waiters_are_served() {
    let cost = PasswordCost {
        memory_kib: 8192,
        passes: 4,
    };
    let counted = Counter::default();
    let pool = PasswordPool::start(cost, counted.clone()).unwrap();
    let ordinary = turn(CallerClass::Ordinary, 1);
    let all = (0..200).map(async |_| {
        let place = pool.enter(ordinary).await?;
        pool.verify(Password::new("x"), None, &place).await
    });
    let all = futures_util::future::join_all(all).await;
    let busy = all
        .iter()
        .filter(|it| matches!(it, Err(AuthError::Busy)))
        .count();
    let served = all.iter().filter(|it| matches!(it, Ok(false))).count();
    assert_eq!(busy + served, 200);
    let room = WAITING[CallerClass::Ordinary as usize];
    assert!(served >= room, "{served} served");
    assert!(busy >= 200 - room - THREADS - 4, "{busy} rejected");
    assert_eq!(counted.get(), busy as u64);
}

/// Returns whether each arrival gets a place, and the order in which waiters are served.
fn order(turns: &[Turn]) -> (Vec<bool>, Vec<usize>) {
    let mut queue = Queue::default();
    let taken = turns.iter().enumerate();
    let taken = taken.map(|(n, turn)| queue.push(*turn, n)).collect();
    let served = std::iter::from_fn(|| queue.pop()).collect();
    (taken, served)
}

#[tokio::test]
async fn dropped_waiter_passes_its_place_to_the_next() {
    let pool = PasswordPool::start(CHEAP, Counter::default()).unwrap();
    let ordinary = turn(CallerClass::Ordinary, 1);
    let first = pool.enter(ordinary).await.unwrap();
    let second = pool.enter(ordinary).await.unwrap();
    for _ in 0..20 {
        let gone = tokio::time::timeout(Duration::from_millis(1), pool.enter(ordinary)).await;
        assert!(gone.is_err());
    }
    let (next, ()) = tokio::join!(pool.enter(turn(CallerClass::Suspect, 2)), async {
        drop(first);
    });
    drop((next.unwrap(), second));
    assert_eq!(pool.places.lock().taken, 0);
}

#[test]
fn full_class_makes_room_for_a_new_network() {
    let room = WAITING[CallerClass::Ordinary as usize];
    let mut turns = vec![turn(CallerClass::Ordinary, 1); room];
    // Another waiter from the same network is turned away. A waiter from a different network gets a place, and the
    // flood loses its newest waiter.
    turns.extend([
        turn(CallerClass::Ordinary, 1),
        turn(CallerClass::Ordinary, 2),
    ]);
    let (taken, done) = order(&turns);
    assert!(!taken[room] && taken[room + 1], "{taken:?}");
    assert_eq!(done.len(), room);
    assert!(done.contains(&(room + 1)) && !done.contains(&(room - 1)));
    assert!(
        done.contains(&0),
        "the waiter that has waited longest is served"
    );
}

#[test]
fn account_with_many_waiters_goes_last() {
    let room = WAITING[CallerClass::Known as usize];
    let mut turns = vec![turn(CallerClass::Known, 1); room - 2];
    turns.extend([turn(CallerClass::Known, 2), turn(CallerClass::Known, 3)]);
    // The class is full, so new arrivals displace waiters of the first account.
    turns.extend([
        turn(CallerClass::Known, 4),
        turn(CallerClass::Known, 1),
        turn(CallerClass::Known, 2),
    ]);
    let (taken, done) = order(&turns);
    let of_others = room - 2..room + 1;
    assert!(of_others.clone().all(|n| taken[n]) && !taken[room + 1] && taken[room + 2]);
    assert_eq!(done.len(), room);
    // The first waiter of each party is served, then the second one.
    assert_eq!(done[..6], [0, room - 2, room - 1, room, 1, room + 2]);
}

#[test]
fn no_class_starves_and_known_devices_wait_for_at_most_one_other() {
    let mut turns = Vec::new();
    for network in 0..24 {
        turns.push(turn(CallerClass::Ordinary, network));
    }
    turns.extend((0..8).map(|network| turn(CallerClass::Suspect, network)));
    let known = turns.len();
    turns.extend((0..4).map(|_| turn(CallerClass::Known, 99)));
    let (taken, done) = order(&turns);
    assert!(taken.iter().all(|taken| *taken));
    assert_eq!(done.len(), turns.len());
    let places = (known..known + 4).map(|n| done.iter().position(|it| *it == n).unwrap());
    assert_eq!(places.collect::<Vec<_>>(), [0, 2, 4, 6]);
    let first_suspect = done.iter().position(|n| (24..32).contains(n)).unwrap();
    assert_eq!(first_suspect, 7);
}
