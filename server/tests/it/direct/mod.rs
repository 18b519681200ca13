//! Checks that direct responses equal those of hyper: what a client receives, how many tokens its requests cost, and
//! what is recorded and logged do not depend on `QUOTA_DIRECT_RESPONSES`.

mod corpus;
mod grammar;
mod pair;
mod smuggling;

use std::time::Duration;

use self::{grammar::case, pair::Pair};

const CASES: u64 = 1000;
/// The number of cases after which records are compared.
const ROUND: u64 = 20_000;

/// Reads a number from the environment. For example, `DIFFERENTIAL_CASES=1000000` runs more cases, and
/// `DIFFERENTIAL_FIRST=7` starts with seed 7.
#[expect(
    clippy::disallowed_methods,
    reason = "the length of a test is not a setting of the server"
)]
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |number| number.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn direct_responses_are_those_of_hyper() {
    let (cases, first) = (
        number("DIFFERENTIAL_CASES", CASES),
        number("DIFFERENTIAL_FIRST", 0),
    );
    let pair = Pair::start().await;
    let (mut responses, mut records) = (0, 0);
    let before = pair.direct.direct_responses();
    for seed in first..first + cases {
        let received = pair
            .compare(&format!("seed {seed}"), &case(seed, &pair.world))
            .await;
        responses += received.matches("HTTP/1.1 ").count();
        pair.advance(Duration::from_millis(seed % 40));
        if (seed - first + 1).is_multiple_of(ROUND) {
            records += pair.compare_records().await;
            println!("{} cases", seed - first + 1);
        }
    }
    records += pair.compare_records().await;
    let direct = pair.direct.direct_responses() - before;
    println!(
        "{cases} cases, {responses} responses, {direct} of them direct, {records} usage records"
    );
    assert_eq!(pair.hyper.direct_responses(), 0);
    // Most cases get direct responses and are recorded.
    assert!(direct >= cases / 2, "{direct}");
    assert!(records as u64 >= cases / 2, "{records}");
}
