use std::collections::BTreeMap;

use super::*;

const DAY: Seconds = 86_400;
const GRACE: Seconds = 7 * DAY;
const START: Seconds = 1_800_000_000;

/// How long paid plans work, based only on the subscription's status.
#[derive(Debug, Clone, Copy)]
enum Works {
    Not,
    /// Until a scheduled cancellation.
    UntilCanceled,
    /// During the grace period after the first unpaid invoice, but not past a scheduled cancellation.
    DuringGrace,
}

/// The access for each status, according to Stripe's documentation.
const TABLE: [(&str, &str, Works); 8] = [
    ("incomplete", "free", Works::Not),
    ("incomplete_expired", "free", Works::Not),
    ("trialing", "trialing", Works::UntilCanceled),
    ("active", "active", Works::UntilCanceled),
    ("past_due", "past_due", Works::DuringGrace),
    ("unpaid", "unpaid", Works::Not),
    ("canceled", "canceled", Works::Not),
    ("paused", "paused", Works::Not),
];

/// A subscription in Stripe, changed by random events.
#[derive(Debug, Clone)]
struct Life {
    status: &'static str,
    created: Seconds,
    trial_end: Option<Seconds>,
    cancel_at: Option<Seconds>,
    first_unpaid: Option<Seconds>,
}

impl Life {
    fn begun(now: Seconds) -> Self {
        Self {
            status: "incomplete",
            created: now,
            trial_end: None,
            cancel_at: None,
            first_unpaid: None,
        }
    }

    fn row(&self) -> (&'static str, Works) {
        let row = TABLE.iter().find(|(status, ..)| *status == self.status);
        let (_, access, works) = row.expect("every status has a row");
        (access, *works)
    }

    /// Returns whether paid plans work at `now` if nothing else happens to the subscription.
    fn works(&self, now: Seconds) -> bool {
        let scheduled = self.cancel_at.is_none_or(|end| now < end);
        match self.row().1 {
            Works::Not => false,
            Works::UntilCanceled => scheduled,
            Works::DuringGrace => {
                let unpaid = self.first_unpaid.expect("past due for an invoice");
                scheduled && now - unpaid < GRACE
            }
        }
    }

    /// Applies a random event that is possible in the current status.
    fn step(&mut self, rng: &mut fastrand::Rng, now: Seconds) {
        match (self.status, rng.u8(..6)) {
            ("incomplete" | "paused", 0 | 1) | ("trialing", 0) => self.status = "active",
            ("incomplete", 2) => {
                self.status = "trialing";
                self.trial_end = Some(now + 14 * DAY);
            }
            ("incomplete", 3) => self.status = "incomplete_expired",
            ("trialing", 1) => self.status = "paused",
            ("trialing" | "active", 2) => {
                self.status = "past_due";
                self.first_unpaid = Some(now);
            }
            ("past_due" | "unpaid", 0 | 1) => {
                self.status = "active";
                self.first_unpaid = None;
            }
            ("past_due", 2) => {
                self.status = "unpaid";
                self.first_unpaid = None;
            }
            ("trialing" | "active" | "past_due" | "unpaid" | "paused", 3) => {
                self.status = "canceled";
                self.cancel_at = Some(now);
                self.first_unpaid = None;
            }
            ("trialing" | "active" | "past_due", 4) => {
                self.cancel_at = Some(now + rng.i64(1..40) * DAY);
            }
            ("trialing" | "active" | "past_due", 5) => self.cancel_at = None,
            _ => {}
        }
    }
}

#[derive(Debug, Default)]
struct Customer {
    subscriptions: BTreeMap<String, Life>,
    reads: u64,
}

impl Customer {
    fn read(&mut self, now: Seconds) -> Observation {
        self.reads += 1;
        let subscriptions = self.subscriptions.iter().map(|(id, life)| Subscription {
            id: id.clone(),
            status: Status::named(life.status).expect("a status of Stripe's"),
            created: life.created,
            trial_end: life.trial_end,
            cancel_at: life.cancel_at,
            unpaid_since: life.first_unpaid,
        });
        Observation {
            read: self.reads,
            at: now,
            subscriptions: subscriptions.collect(),
        }
    }

    fn works(&self, now: Seconds) -> bool {
        self.subscriptions.values().any(|life| life.works(now))
    }
}

#[test]
fn every_status_has_the_access_of_the_table() {
    for status in Status::ALL {
        let life = Life {
            status: status.name(),
            first_unpaid: Some(START),
            ..Life::begun(START)
        };
        let mut customer = Customer::default();
        let expected = life.row().0;
        customer.subscriptions.insert("sub".to_owned(), life);
        let mut account = Account::default();
        assert!(account.apply(customer.read(START)));
        let access = account.access(GRACE);
        assert_eq!(access.name(), expected, "{status:?}");
        for now in [START, START + GRACE - 1, START + GRACE, START + 400 * DAY] {
            assert_eq!(
                access.paid().at(now),
                customer.works(now),
                "{status:?} after {} s",
                now - START
            );
        }
    }
    assert_eq!(Status::named("frozen"), None);
}

/// Subscriptions change, and changes cause reads. Responses arrive late, out of order, twice, or never. The known state
/// must always match the latest read whose response has arrived. After a final read, it must match the current state.
#[test]
fn random_schedules_agree_with_the_table() {
    let (mut worked, mut refused, mut dropped) = (0_u64, 0_u64, 0_u64);
    for seed in 0..100_000 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut customer = Customer::default();
        let mut account = Account::default();
        let mut now = START;
        // Reads in progress, each with the customer's state at the time when the read started.
        let mut under_way: Vec<(Observation, BTreeMap<String, Life>)> = Vec::new();
        let mut known = BTreeMap::new();
        let mut last_read = 0;
        for _ in 0..rng.u32(1..30) {
            now += rng.i64(0..4 * DAY);
            if customer.subscriptions.is_empty() || rng.u8(..12) == 0 {
                let id = format!("sub_{}", customer.subscriptions.len());
                customer.subscriptions.insert(id, Life::begun(now));
            } else if let Some(life) = rng.choice(customer.subscriptions.values_mut()) {
                life.step(&mut rng, now);
            }
            for _ in 0..rng.u8(..3) {
                let observation = customer.read(now);
                under_way.push((observation, customer.subscriptions.clone()));
            }
            while !under_way.is_empty() && rng.bool() {
                let position = rng.usize(..under_way.len());
                let (observation, seen) = if rng.u8(..4) == 0 {
                    under_way[position].clone()
                } else {
                    under_way.swap_remove(position)
                };
                let later = observation.read > last_read;
                assert_eq!(account.apply(observation.clone()), later, "seed {seed}");
                if later {
                    last_read = observation.read;
                    known = seen;
                } else {
                    dropped += 1;
                }
            }
            let paid = account.access(GRACE).paid();
            for later in [0, rng.i64(0..50 * DAY)] {
                let expected = known.values().any(|life: &Life| life.works(now + later));
                assert_eq!(paid.at(now + later), expected, "seed {seed}");
                if expected { worked += 1 } else { refused += 1 }
            }
        }
        account.apply(customer.read(now));
        let access = account.access(GRACE);
        assert_eq!(access.paid().at(now), customer.works(now), "seed {seed}");
        let deciding = account.subscription(GRACE).map(|it| it.status.name());
        let names = customer.subscriptions.values();
        assert!(
            names
                .filter(|life| Some(life.status) == deciding)
                .any(|life| life.row().0 == access.name()),
            "seed {seed}"
        );
    }
    // The schedules must reach every outcome.
    assert!(worked > 100_000 && refused > 100_000 && dropped > 100_000);
}

/// Calls `visit` with every permutation of the items.
fn each_order<T: Copy>(items: &mut [T], fixed: usize, visit: &mut impl FnMut(&[T])) {
    if fixed == items.len() {
        visit(items);
        return;
    }
    for next in fixed..items.len() {
        items.swap(fixed, next);
        each_order(items, fixed + 1, visit);
        items.swap(fixed, next);
    }
}

/// Seven events arrive in every possible order while the subscription keeps changing. Each event causes one to three
/// reads. Every order must end with the access for the subscription's last status.
#[test]
fn every_order_of_events_ends_in_the_same_state() {
    const STATUSES: [&str; 7] = [
        "incomplete",
        "trialing",
        "active",
        "past_due",
        "unpaid",
        "active",
        "canceled",
    ];
    let mut rng = fastrand::Rng::with_seed(7);
    // Each iteration tests a history that is one status longer.
    for last in 1..=STATUSES.len() {
        let mut orders = 0;
        let mut finals = Vec::new();
        each_order(&mut [0, 1, 2, 3, 4, 5, 6], 0, &mut |order| {
            orders += 1;
            let mut customer = Customer::default();
            let mut life = Life::begun(START);
            let mut happened = 0;
            let mut account = Account::default();
            let mut under_way = Vec::new();
            for &event in order {
                // An event cannot arrive before it has happened, and all earlier events must have happened too.
                while happened <= event.min(last - 1) {
                    life.status = STATUSES[happened];
                    life.first_unpaid = (life.status == "past_due").then_some(START + 3 * DAY);
                    happened += 1;
                }
                customer
                    .subscriptions
                    .insert("sub".to_owned(), life.clone());
                for _ in 0..rng.u8(1..4) {
                    under_way.push(customer.read(START + 4 * DAY));
                }
            }
            rng.shuffle(&mut under_way);
            for observation in under_way {
                account.apply(observation.clone());
                account.apply(observation);
            }
            finals.push(account.access(GRACE));
        });
        assert_eq!(orders, 5_040);
        let expected = TABLE.iter().find(|row| row.0 == STATUSES[last - 1]);
        assert!(finals.iter().all(|access| *access == finals[0]));
        assert_eq!(finals[0].name(), expected.expect("a row").1);
    }
}

#[test]
fn an_older_read_is_dropped() {
    let mut customer = Customer::default();
    let mut life = Life::begun(START);
    life.status = "active";
    customer
        .subscriptions
        .insert("sub".to_owned(), life.clone());
    let old = customer.read(START);
    life.status = "canceled";
    customer.subscriptions.insert("sub".to_owned(), life);
    let new = customer.read(START);

    let mut account = Account::default();
    assert!(account.apply(new.clone()));
    assert!(!account.apply(old));
    assert!(!account.apply(new));
    assert_eq!(account.access(GRACE), Access::Canceled);
}

#[test]
fn a_scheduled_cancellation_ends_access_on_its_date_without_another_read() {
    let subscription = Subscription {
        id: "sub".to_owned(),
        status: Status::Active,
        created: START,
        trial_end: None,
        cancel_at: Some(START + 30 * DAY),
        unpaid_since: None,
    };
    let paid = subscription.access(START, GRACE).paid();
    assert!(paid.at(START + 30 * DAY - 1));
    assert!(!paid.at(START + 30 * DAY));
    // Undoing the cancellation restores access.
    let renewed = Subscription {
        cancel_at: None,
        ..subscription
    };
    assert_eq!(renewed.access(START, GRACE).paid(), Paid::Always);
}

#[test]
fn a_lasting_trial_counts_more_than_a_subscription_that_is_about_to_end() {
    let subscription = |id: &str, status, cancel_at| Subscription {
        id: id.to_owned(),
        status,
        created: START,
        trial_end: None,
        cancel_at,
        unpaid_since: None,
    };
    let both = [
        subscription("ending", Status::Active, Some(START + DAY)),
        subscription("trial", Status::Trialing, None),
        subscription("old", Status::Canceled, Some(START - DAY)),
    ];
    let chosen = deciding(&both, START, GRACE).expect("there are subscriptions");
    assert_eq!(chosen.id, "trial");
    assert!(deciding(&[], START, GRACE).is_none());
}
