//! Tests the judge with handwritten logs.

use quota_common::plan::OnRedisFailure;

use super::{
    super::scene::{Change, Fault, FaultKind, Key, Load, Plan, Replicas, Scene},
    Answer, Entry, Facts, MS, over, under, under_in_outage,
};

/// The times at which the faults below begin new epochs.
const EPOCHS: [u64; 2] = [1550 * MS, 2850 * MS];

fn plan(from: u64, rpm: u32, burst: u32, strict: bool) -> Plan {
    Plan {
        from,
        rpm,
        burst,
        strict,
    }
}

fn scene(plans: Vec<Plan>) -> Scene {
    Scene {
        seed: 0,
        replicas: 2,
        round_trip: 0,
        partitions: 1,
        ledger_delay: 0,
        keys: vec![Key {
            on_failure: OnRedisFailure::Closed,
            plans,
            quotas: [None; 2],
            load: "by hand",
        }],
        changes: Vec::new(),
        faults: Vec::new(),
        length: 8000,
        load: Load(Vec::new()),
    }
}

fn outage(at: u64, lasts: u64) -> Fault {
    Fault {
        at,
        lasts,
        kind: FaultKind::Cut,
    }
}

/// Returns `of` requests that are sent at millisecond `at`. Of these requests, `admitted` are admitted.
fn requests(at: u64, admitted: usize, of: usize) -> impl Iterator<Item = Entry> {
    (0..of).map(move |n| Entry {
        key: 0,
        replica: 0,
        cost: 1,
        plan: 0,
        asked: at * MS,
        answered: at * MS,
        answer: if n < admitted {
            Answer::Admitted
        } else {
            Answer::Denied
        },
        retry_after: None,
        degraded: false,
        denied_by: [false; 2],
        granted: None,
    })
}

fn verdict(scene: &Scene, entries: &[Entry]) -> Option<String> {
    let facts = Facts {
        epochs: &EPOCHS,
        missed: &[],
        heard: &[],
        used: Vec::new(),
    };
    under(scene, &scene.keys[0], entries, &facts)
}

#[test]
fn a_fault_of_some_calls_loses_the_state_only_if_no_response_arrives() {
    let mut scene = scene(vec![plan(0, 6000, 100, true)]);
    scene.faults.push(Fault {
        at: 1400,
        lasts: 400,
        kind: FaultKind::Lost {
            replicas: Replicas(3),
            percent: 20,
        },
    });
    // If the counters lost their state, the bucket may be empty until 3.8 s, which is 2 s after the fault.
    let verdict = |heard: &[u64], admitted| {
        let log: Vec<_> = requests(4000, admitted, 100).collect();
        let facts = Facts {
            epochs: &EPOCHS,
            missed: &[],
            heard,
            used: Vec::new(),
        };
        under(&scene, &scene.keys[0], &log, &facts)
    };
    let heard: Vec<u64> = (1000..4000).step_by(110).map(|at| at * MS).collect();
    let silent: Vec<u64> = heard
        .iter()
        .copied()
        .filter(|at| !(1450 * MS..1700 * MS).contains(at))
        .collect();
    assert_eq!(verdict(&heard, 100), None);
    assert!(verdict(&heard, 20).is_some());
    assert_eq!(verdict(&silent, 20), None);
    assert!(verdict(&silent, 10).is_some());
}

#[test]
fn tokens_of_a_crashed_replica_are_lost() {
    let mut scene = scene(vec![plan(0, 60, 100, true)]);
    scene.changes.push((3010, Change::Crash(1)));
    let crashed = requests(3000, 0, 60).map(|it| Entry {
        replica: 1,
        answer: Answer::None,
        ..it
    });
    let crashed: Vec<_> = crashed.collect();
    let log = |admitted| {
        let mut log = crashed.clone();
        log.extend(requests(3000, admitted, 80));
        log
    };
    assert_eq!(verdict(&scene, &log(40)), None);
    assert!(verdict(&scene, &log(30)).is_some());
}

#[test]
fn a_new_rate_counts_from_the_first_request_after_the_edit() {
    let mut scene = scene(vec![plan(0, 60, 100, true), plan(1000, 6000, 100, true)]);
    // Buckets may be empty until 2 s after the outage.
    scene.faults.push(outage(1500, 100));
    let log = |later| {
        let first = requests(500, 1, 1).chain(requests(5000, 1, 80));
        first.chain(requests(5500, later, 80)).collect::<Vec<_>>()
    };
    assert_eq!(verdict(&scene, &log(50)), None);
    assert!(verdict(&scene, &log(40)).is_some());
}

/// Redis learns of an edit only from a request that it decides. Until then, it applies the earlier plan, if it knows
/// this plan.
#[test]
fn redis_learns_of_an_edit_from_a_request_that_it_decides() {
    let mut scene = scene(vec![plan(0, 600, 100, true), plan(1000, 6000, 100, true)]);
    let restart = Fault {
        at: 1500,
        lasts: 100,
        kind: FaultKind::Restart,
    };
    let fail_over = Fault {
        at: 1650,
        lasts: 150,
        kind: FaultKind::FailOver,
    };
    let sent = |at, degraded| {
        let sent = requests(at, 0, 1);
        sent.map(|it| Entry { degraded, ..it }).collect::<Vec<_>>()
    };
    // Asserts that at least `due - 2` of the 150 requests at 5050 ms must be admitted.
    let mut assert_due = |faults: &[Fault], earlier: &[Vec<Entry>], due: usize| {
        scene.faults = faults.to_vec();
        let log = |admitted| {
            let earlier = earlier.iter().flatten().copied();
            earlier
                .chain(requests(5050, admitted, 150))
                .collect::<Vec<_>>()
        };
        assert_eq!(verdict(&scene, &log(due - 2)), None);
        assert!(verdict(&scene, &log(due - 3)).is_some());
    };
    // The bucket may be empty until 3600 ms. From then on, 10 tokens per second refill under the earlier plan.
    let cut = [outage(1500, 100)];
    let known = sent(500, false);
    assert_due(&cut, &[known.clone(), sent(3500, true)], 14);
    assert_due(&cut, &[known.clone(), sent(3500, false)], 99);
    // A request that was decided without Redis may have reached Redis.
    assert_due(&cut, &[sent(500, true), sent(3500, true)], 14);
    assert_due(&cut, &[sent(3500, true)], 99);
    assert_due(&cut, &[], 99);
    // After a restart, Redis does not know the earlier plan, unless a Redis server with older data takes over.
    assert_due(&[restart], &[known.clone(), sent(3500, true)], 99);
    assert_due(&[restart], std::slice::from_ref(&known), 99);
    assert_due(&[restart, fail_over], &[known, sent(3500, true)], 12);
}

#[test]
fn what_refilled_after_a_loss_is_spent_once() {
    let mut scene = scene(vec![plan(0, 12, 1, true), plan(5000, 600, 100, true)]);
    // Buckets may be empty until 2 s after the outage.
    scene.faults.push(outage(2800, 100));
    let log = |every: u64| {
        let times = (5000..8000).step_by(50);
        let each = times.flat_map(|at| {
            // Once the edit has taken effect everywhere, one request is admitted every `every` milliseconds.
            requests(at, usize::from(at > 6100 && at % every == 0), 1)
        });
        each.collect::<Vec<_>>()
    };
    assert_eq!(verdict(&scene, &log(100)), None);
    assert!(verdict(&scene, &log(200)).is_some());
}

#[test]
fn a_few_tokens_are_taken_together_and_not_one_by_one() {
    let scene = scene(vec![plan(0, 60_000, 600, false)]);
    // Two tokens are requested in the time in which one refills. All requests are admitted until `left` tokens are
    // left.
    let log = |left| {
        let times = (1000..1590).step_by(2);
        let each = times.flat_map(|at| {
            let there = 600 - (at - 1000);
            requests(at, if there > left { 4 } else { 0 }, 4)
        });
        each.collect::<Vec<_>>()
    };
    assert_eq!(verdict(&scene, &log(25)), None);
    assert!(verdict(&scene, &log(100)).is_some());
    // Requests that are sent at the same time can take all the tokens in the bucket.
    let at_once = |admitted| requests(1000, admitted, 700).collect::<Vec<_>>();
    assert_eq!(verdict(&scene, &at_once(600)), None);
    assert!(verdict(&scene, &at_once(580)).is_some());
}

/// The judge checks requests in windows of time. Requests that wait for a call to Redis and requests that arrive in the
/// meantime are decided together by the next call. So requests that are sent after the end of a window may be admitted
/// instead of requests from the window that are still waiting.
#[test]
fn tokens_may_go_to_later_requests_only_while_earlier_ones_wait() {
    // Returns whether too few requests are admitted in the window until 4000 ms. Of the 100 requests of the window,
    // which wait from 3990 to 4010 ms, 60 are admitted. Of the later requests, `later` are admitted. Because of the
    // outage, no later window is checked.
    let is_under = |burst, asked, answered, later| {
        let mut scene = scene(vec![plan(0, 60, burst, true)]);
        scene.faults.push(outage(4100, 100));
        let waited = requests(3990, 60, 100).map(|it| Entry {
            answered: 4010 * MS,
            ..it
        });
        let later = requests(asked, later, 50).map(|it| Entry {
            answered: answered * MS,
            ..it
        });
        let log: Vec<_> = waited.chain(later).collect();
        verdict(&scene, &log).is_some()
    };
    assert!(!is_under(100, 4000, 4010, 37) && is_under(100, 4000, 4010, 36));
    // Requests that are sent or answered after the waiting requests have been answered are decided after them.
    assert!(!is_under(100, 4009, 4010, 37) && is_under(100, 4010, 4010, 37));
    assert!(is_under(100, 4009, 4011, 37));
    // The bucket contains enough tokens for all requests.
    assert!(is_under(200, 4000, 4010, 50));
}

/// If a fifth of the calls are late just after an outage, one replica may use Redis again while another one still uses
/// its share. In all other cases, late calls are no reason to admit a share.
#[test]
fn shares_are_allowed_in_addition_only_while_replicas_return() {
    let mut scene = scene(vec![plan(0, 600, 10, true)]);
    scene.keys[0].on_failure = OnRedisFailure::Share;
    let late = Fault {
        at: 3000,
        lasts: 700,
        kind: FaultKind::Late {
            replicas: Replicas(3),
            by: 354,
            percent: 20,
        },
    };
    let is_over = |scene: &Scene, admitted: usize| {
        let log = (0..).zip(requests(3500, admitted, 30));
        let log = log.map(|(n, it)| Entry {
            degraded: n >= 10,
            ..it
        });
        let log: Vec<_> = log.collect();
        over(scene, &scene.keys[0], &log, &[]).is_some()
    };
    scene.faults = vec![late];
    assert!(!is_over(&scene, 10) && is_over(&scene, 11));
    for ends in [2500, 900] {
        scene.faults = vec![outage(500, ends - 500), late];
        let most = if ends == 2500 { 15 } else { 10 };
        assert!(!is_over(&scene, most) && is_over(&scene, most + 1));
    }
}

/// A bucket learns of a higher rate with the first request after the edit. If Redis has lost its state, the higher rate
/// counts from the start of the new epoch, unless Redis has since decided a request under the earlier plan. Redis may
/// have admitted or denied this request.
#[test]
fn a_lost_bucket_refills_at_the_rate_of_its_next_request() {
    let mut scene = scene(vec![plan(0, 60, 200, true), plan(3000, 6000, 100, true)]);
    let restart = Fault {
        at: 1500,
        lasts: 1000,
        kind: FaultKind::Restart,
    };
    let is_over = |scene: &Scene, later: usize, epochs: &[u64]| {
        let later = requests(6000, later, 400).map(|it| Entry { plan: 1, ..it });
        let log: Vec<_> = requests(1000, 200, 400).chain(later).collect();
        over(scene, &scene.keys[0], &log, epochs).is_some()
    };
    // For 5 s, one token per second refills.
    assert!(!is_over(&scene, 5, &[]) && is_over(&scene, 6, &[]));
    scene.faults.push(restart);
    // The epoch starts at 5.5 s. From then on, 100 tokens per second refill.
    assert!(!is_over(&scene, 54, &[4900 * MS]) && is_over(&scene, 55, &[4900 * MS]));
    // A request under the earlier plan is denied at `at`, after a wait of `waits` milliseconds.
    let is_over = |at: u64, waits: u64, degraded: bool, later: usize| {
        let later = requests(6000, later, 400).map(|it| Entry { plan: 1, ..it });
        let denied = requests(at, 0, 1).map(|it| Entry {
            answered: it.asked + waits * MS,
            degraded,
            ..it
        });
        let early = requests(1000, 200, 400).chain(denied);
        let log: Vec<_> = early.chain(later).collect();
        over(&scene, &scene.keys[0], &log, &[4900 * MS]).is_some()
    };
    assert!(!is_over(5400, 5, false, 54) && is_over(5400, 5, false, 55));
    assert!(!is_over(5750, 5, false, 5) && is_over(5750, 5, false, 6));
    // Redis does not learn of a request that a replica denies immediately or without Redis.
    assert!(!is_over(5750, 0, false, 54) && is_over(5750, 0, false, 55));
    assert!(!is_over(5750, 5, true, 54) && is_over(5750, 5, true, 55));
    // This also applies if a replica still follows the earlier plan after the first request under the later plan.
    assert!(!is_over(6500, 0, false, 54) && is_over(6500, 0, false, 55));
}

/// A rate that is raised after the start of the epoch also counts from the start, unless Redis knows the earlier plan.
#[test]
fn a_lost_bucket_also_refills_at_a_rate_from_after_the_loss() {
    let mut scene = scene(vec![plan(0, 60, 200, true), plan(3000, 6000, 100, true)]);
    scene.faults.push(Fault {
        at: 1100,
        lasts: 400,
        kind: FaultKind::Restart,
    });
    // The epoch starts at 2500 ms. A request under the earlier plan is denied at `at`.
    let is_over = |at: u64, later: usize| {
        let denied = requests(at, 0, 1).map(|it| Entry {
            answered: it.asked + 5 * MS,
            ..it
        });
        let later = requests(3050, later, 400).map(|it| Entry { plan: 1, ..it });
        let log: Vec<_> = requests(1000, 200, 400)
            .chain(denied)
            .chain(later)
            .collect();
        over(&scene, &scene.keys[0], &log, &[1900 * MS]).is_some()
    };
    // At 3050 ms, 1.5 tokens have refilled under the earlier plan and 55 under the later one.
    assert!(!is_over(2490, 56) && is_over(2490, 57));
    assert!(!is_over(2510, 2) && is_over(2510, 3));
}

/// A request that waits for Redis when an outage begins is decided later than it was sent. Until it is decided, a full
/// bucket does not refill any further.
#[test]
fn requests_that_waited_take_their_tokens_when_they_are_answered() {
    let mut scene = scene(vec![plan(0, 6000, 100, true)]);
    scene.keys[0].on_failure = OnRedisFailure::Open;
    scene.faults.push(outage(1000, 3000));
    // Checks a log of requests that waited for 60 ms until `answered`, and of requests that did not wait. Of the
    // requests that waited, `waited` are admitted. Of the requests that did not wait, `later` are admitted. In the
    // outage, only responses from 1500 ms on are counted.
    let is_under = |answered: u64, waited: usize, later: usize| {
        let waited = requests(answered - 60, waited, 110).map(|it| Entry {
            answered: answered * MS,
            ..it
        });
        let log = waited.chain(requests(1525, later, 20)).map(|it| Entry {
            degraded: true,
            ..it
        });
        let log: Vec<_> = log.collect();
        under_in_outage(&scene, &scene.keys[0], &log).is_some()
    };
    // One token refills in 10 ms, so 6 tokens refill between 1460 and 1525 ms.
    assert!(!is_under(1460, 100, 6) && is_under(1460, 100, 3));
    assert!(!is_under(1400, 100, 12) && is_under(1400, 100, 9));
    assert!(!is_under(1510, 100, 1) && is_under(1510, 90, 1));
}
