//! Schedules, which determine when requests are sent, with which key, and to which replica. All functions are pure.

use std::time::Duration;

use super::drive::Arrival;

/// How requests are distributed across replicas.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Spread {
    /// Requests go to the replicas in turn.
    InTurn,
    /// Requests go to random replicas, chosen with this seed.
    Random(u64),
}

/// Requests of one key at a constant rate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Steady {
    pub(crate) key: usize,
    pub(crate) from: Duration,
    pub(crate) per_second: f64,
    pub(crate) count: usize,
    pub(crate) spread: Spread,
}

impl Steady {
    /// Sets the number of requests to as many as fit into the time span.
    pub(crate) fn lasting(mut self, time: Duration) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a load lasts only seconds"
        )]
        let count = (self.per_second * time.as_secs_f64()) as usize;
        self.count = count;
        self
    }

    pub(crate) fn end(&self) -> Duration {
        self.from + self.nth(self.count)
    }

    pub(crate) fn arrivals(self, replicas: usize) -> impl Iterator<Item = Arrival> {
        let mut rng = match self.spread {
            Spread::Random(seed) => fastrand::Rng::with_seed(seed),
            Spread::InTurn => fastrand::Rng::with_seed(0),
        };
        (0..self.count).map(move |n| Arrival {
            at: nanos(self.from + self.nth(n)),
            key: self.key,
            cost: 1,
            replica: match self.spread {
                Spread::InTurn => n % replicas,
                Spread::Random(_) => rng.usize(..replicas),
            },
        })
    }

    #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52")]
    fn nth(&self, n: usize) -> Duration {
        Duration::from_secs_f64(n as f64 / self.per_second)
    }
}

pub(crate) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Returns this many requests at the same moment, to one replica.
pub(crate) fn at_once(key: usize, at: Duration, replica: usize, count: u32) -> Vec<Arrival> {
    let one = Arrival {
        at: nanos(at),
        key,
        replica,
        cost: 1,
    };
    vec![one; count as usize]
}

/// Gives each request a random cost of 1 to 5, generated with this seed.
pub(crate) fn with_costs(arrivals: impl IntoIterator<Item = Arrival>, seed: u64) -> Vec<Arrival> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let arrivals = arrivals.into_iter();
    arrivals
        .map(|it| Arrival {
            cost: rng.u32(1..=5),
            ..it
        })
        .collect()
}

/// Merges schedules in order of time.
pub(crate) fn together(parts: impl IntoIterator<Item = Vec<Arrival>>) -> Vec<Arrival> {
    let mut all: Vec<Arrival> = parts.into_iter().flatten().collect();
    all.sort_unstable();
    all
}

/// Returns a burst that requests more tokens than a full bucket contains, followed by requests at a steady rate. For a
/// small bucket, the burst is larger than what all replicas together would allow without sharing the limit.
pub(crate) fn drained_then(
    steady: Steady,
    replicas: usize,
    limit: (u32, u32),
    blow_per_second: f64,
    time: Duration,
) -> Vec<Arrival> {
    let (rpm, burst) = limit;
    let rate = f64::from(rpm) / 60.0;
    // The bucket refills during the burst.
    #[expect(clippy::cast_precision_loss, reason = "a handful of replicas")]
    let over = if burst <= 10_000 {
        replicas as f64 + 1.0
    } else {
        1.1
    };
    let tokens = f64::from(burst) * over / (1.0 - rate / blow_per_second);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a burst of thousands"
    )]
    let blow = Steady {
        per_second: blow_per_second,
        count: tokens.ceil() as usize,
        spread: Spread::InTurn,
        ..steady
    };
    let after = Steady {
        from: blow.end(),
        ..steady
    }
    .lasting(time);
    blow.arrivals(replicas)
        .chain(after.arrivals(replicas))
        .collect()
}

/// Returns worst-case bursts for leases, and when they end. Each cycle first sends a steady stream of requests to one
/// replica, which prefetches many tokens. During the following pause of `phase`, these tokens remain unspent. Then the
/// cycle sends a burst to all other replicas and, at the same time, a smaller and slower burst to the first replica.
/// The next cycle begins with the next replica.
pub(crate) fn on_off(
    key: usize,
    from: Duration,
    replicas: usize,
    limit: (u32, u32),
    phase: Duration,
    cycles: usize,
) -> (Vec<Arrival>, Duration) {
    let (rpm, burst) = limit;
    let rate = f64::from(rpm) / 60.0;
    let mut arrivals = Vec::new();
    let mut now = from;
    for cycle in 0..cycles {
        let first = cycle % replicas;
        let stream = Steady {
            key,
            from: now,
            per_second: rate * 0.9,
            count: 0,
            spread: Spread::InTurn,
        }
        .lasting(Duration::from_millis(350));
        arrivals.extend(stream.arrivals(1).map(|it| Arrival {
            replica: first,
            ..it
        }));
        now += Duration::from_millis(350) + phase;
        let blow = Steady {
            key,
            from: now,
            per_second: (f64::from(burst) * 12.0).max(400.0),
            count: burst as usize + burst as usize / 4,
            spread: Spread::InTurn,
        };
        let others = replicas - 1;
        arrivals.extend(blow.arrivals(others.max(1)).map(|it| Arrival {
            replica: (first + usize::from(others > 0) + it.replica) % replicas,
            ..it
        }));
        let last = Steady {
            from: now,
            count: burst as usize / 5,
            per_second: blow.per_second / 4.0,
            ..blow
        };
        arrivals.extend(last.arrivals(1).map(|it| Arrival {
            replica: first,
            ..it
        }));
        now = blow.end() + Duration::from_millis(150);
    }
    arrivals.sort_unstable();
    (arrivals, now)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn steady() -> Steady {
        Steady {
            key: 1,
            from: SECOND,
            per_second: 10.0,
            count: 4,
            spread: Spread::InTurn,
        }
    }

    #[test]
    fn a_steady_load_is_even_and_takes_turns() {
        let arrivals: Vec<_> = steady().arrivals(3).collect();
        let at: Vec<_> = arrivals.iter().map(|it| it.at / 1_000_000).collect();
        assert_eq!(at, [1000, 1100, 1200, 1300]);
        let replicas: Vec<_> = arrivals.iter().map(|it| it.replica).collect();
        assert_eq!(replicas, [0, 1, 2, 0]);
        assert_eq!(steady().lasting(SECOND * 2).count, 20);
    }

    #[test]
    fn a_burst_exceeds_a_full_bucket_and_its_refill() {
        let rate = 5.0;
        let load = drained_then(steady(), 2, (300, 20), 20.0, SECOND);
        let blow = load.len() - 10;
        let took = Duration::from_nanos(load[blow].at - nanos(SECOND));
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let asked = blow as f64;
        assert!(asked >= 20.0 + rate * took.as_secs_f64() - 1e-9, "{asked}");
        assert!(load.is_sorted());
    }

    #[test]
    fn bursts_alternate_and_are_in_order() {
        let (load, end) = on_off(0, SECOND, 3, (600, 10), Duration::ZERO, 3);
        assert!(load.is_sorted());
        assert!(load.iter().all(|it| it.replica < 3));
        let first_of = |replica| load.iter().position(|it| it.replica == replica);
        assert_eq!(first_of(0), Some(0));
        assert!(nanos(end) > load.last().unwrap().at);
    }
}
