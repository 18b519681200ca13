//! What was spent stays spent, however the server ends.

use quota_server::clock::{Clock as _, SystemClock};
use reqwest::Client;
use serde_json::{Value, json};

use crate::support::quota::{Quota, data_dir};

const QUOTA: u64 = 1000;
/// Of what one run spends. The last run spends all that is left.
const PART: u64 = 250;

/// Spends up to `most`, and answers how many requests were served.
async fn spend(quota: &Quota, http: &Client, key: &str, most: u64) -> u64 {
    let url = format!("http://{}/v1/echo", quota.addr);
    for served in 0..most {
        let answer = http.get(&url).header("X-API-Key", key).send().await;
        let answer = answer.expect("it answers");
        match answer.status().as_u16() {
            200 => {}
            429 => {
                let denial: Value = answer.json().await.expect("JSON");
                assert_eq!(denial["violated-policies"], json!(["daily"]));
                return served;
            }
            status => panic!("{status}: {:?}", answer.text().await),
        }
    }
    most
}

async fn spend_through_restarts() -> u64 {
    let (data, http) = (data_dir(), Client::new());
    let plan = json!({"name": "daily", "default_rpm": 1_000_000, "daily_quota": QUOTA});

    let quota = Quota::start(data.path());
    let key = quota.key_on(&http, plan).await;
    let mut served = spend(&quota, &http, &key, PART).await;
    quota.stop();

    let quota = Quota::start(data.path());
    served += spend(&quota, &http, &key, PART).await;
    quota.kill();

    let quota = Quota::start(data.path());
    served += spend(&quota, &http, &key, PART).await;
    quota.stop();
    assert_eq!(served, 3 * PART);

    let quota = Quota::start(data.path());
    served += spend(&quota, &http, &key, 2 * QUOTA).await;
    assert_eq!(spend(&quota, &http, &key, QUOTA).await, 0);
    quota.stop();
    served
}

#[tokio::test]
async fn a_daily_quota_is_neither_forgotten_nor_doubled_by_restarts_and_a_kill() {
    let clock = SystemClock::new();
    let today = || clock.now().secs() / 86_400;
    loop {
        let day = today();
        let served = spend_through_restarts().await;
        // A new day has a quota of its own, and says nothing of this.
        if today() == day {
            assert!(served <= QUOTA, "{served} of {QUOTA} were served");
            assert!(
                served >= QUOTA * 99 / 100,
                "{served} of {QUOTA} were served"
            );
            return;
        }
    }
}
