//! Tests, with real processes under faketime, that limits hold for replicas whose clocks are wrong by two minutes. The
//! simulation in `limiter_shared` covers such clocks in many more schedules.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use quota_server::{
    clock::{Clock as _, SystemClock},
    db,
};
use quota_testkit::{
    envelope::{Envelope, Span},
    redis::RedisServer,
};
use reqwest::Client;
use secrecy::SecretString;
use serde_json::{Value, json};

use crate::support::{
    app::PASSWORD,
    postgres::TestDatabase,
    quota::{Quota, data_dir},
};

/// By how much the replicas' clocks are wrong, in faketime's format.
const CLOCKS: [&str; 3] = ["+0s", "+120s", "-120s"];
const RPM: u32 = 3000;
const BURST: u32 = 60;
const DAILY: usize = 300;
/// The time that is added to each window as a tolerance for leased keys: the default `QUOTA_LEASE_TTL` plus [`EXACT`].
const LEASED: Duration = Duration::from_nanos(100_002_000);
/// The tolerance for strict plans: one microsecond, the resolution of Redis's clock, at each end of a window.
const EXACT: Duration = Duration::from_nanos(2_000);
/// The smallest acceptable share of what one exact bucket would have allowed, in percent.
const SERVED: usize = 90;
const LOAD: Duration = Duration::from_secs(4);
/// A time limit for sending the requests that a test needs, even on a busy machine.
const SENT_WITHIN: Duration = Duration::from_secs(120);
const CLIENTS_PER_REPLICA: usize = 4;

/// Returns the path of the library that faketime uses to change a process's clock.
fn faketime() -> PathBuf {
    let libraries = std::fs::read_dir("/usr/lib").expect("it is readable");
    libraries
        .map(|entry| entry.expect("an entry").path())
        .map(|it| it.join("faketime/libfaketimeMT.so.1"))
        .find(|it| it.exists())
        .expect("faketime is installed")
}

struct World {
    replicas: Vec<Quota>,
    http: Client,
    token: String,
}

impl World {
    async fn post(&self, path: &str, body: Value) -> Value {
        let url = format!("http://{}{path}", self.replicas[0].addr);
        let request = self.http.post(url).bearer_auth(&self.token).json(&body);
        let response = request.send().await.expect("it responds");
        let status = response.status();
        let body: Value = response.json().await.expect("JSON");
        assert_eq!(status, 201, "{path}: {body}");
        body
    }

    async fn key(&self, plan: Value) -> String {
        let plan = self.post("/admin/plans", plan).await;
        let key = json!({"name": "it", "plan_id": plan["id"]});
        let key = self.post("/admin/api-keys", key).await;
        key["key"].as_str().expect("a secret").to_owned()
    }

    /// Sends requests to all replicas from several clients, for [`LOAD`] or longer, until at least `least` requests
    /// have been sent. Returns when each request was sent, and the time span of each admitted request.
    async fn load(&self, key: &str, least: usize) -> (Vec<(u64, u32)>, Vec<Span>) {
        let began = Instant::now();
        let total = &AtomicUsize::new(0);
        let nanos = move || u64::try_from(began.elapsed().as_nanos()).expect("a short test");
        let clients = self
            .replicas
            .iter()
            .flat_map(|it| [it; CLIENTS_PER_REPLICA]);
        let clients = clients.map(|replica| async move {
            let url = format!("http://{}/v1/echo", replica.addr);
            let (mut sent_at, mut admitted) = (Vec::new(), Vec::new());
            while began.elapsed() < LOAD || total.load(Ordering::Relaxed) < least {
                assert!(began.elapsed() < SENT_WITHIN, "too few requests were sent");
                total.fetch_add(1, Ordering::Relaxed);
                let sent = nanos();
                let request = self.http.get(&url).header("x-api-key", key);
                let response = request.send().await.expect("it responds");
                assert!(!response.headers().contains_key("x-quota-degraded"));
                sent_at.push((sent, 1));
                match response.status().as_u16() {
                    200 => admitted.push(Span {
                        sent,
                        answered: nanos(),
                        cost: 1,
                    }),
                    429 => {}
                    503 => {
                        // If PostgreSQL is paused, a request may not get its quota tokens in time.
                        let problem = response.text().await.expect("a body");
                        assert!(problem.contains("temporary-reduced-capacity"), "{problem}");
                    }
                    other => panic!("{other}: {response:?}"),
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            (sent_at, admitted)
        });
        let (mut sent_at, mut admitted) = (Vec::new(), Vec::new());
        for (sent, spans) in join_all(clients).await {
            sent_at.extend(sent);
            admitted.extend(spans);
        }
        (sent_at, admitted)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_with_wrong_clocks_admit_what_the_limits_allow() {
    let migrate =
        |url: String| async move { db::migrate(&SecretString::from(url)).await.map(drop) };
    let database = Arc::new(TestDatabase::create(migrate).await);
    let (redis, dir) = (RedisServer::start().await, data_dir());
    let (redis, library) = (redis.url(), faketime());
    let start = |clock| {
        Quota::start_with(
            dir.path(),
            &[
                ("DATABASE_URL", database.url()),
                ("REDIS_URL", &redis),
                // Other tests may keep the machine busy, and this test is not about slow responses of Redis.
                ("QUOTA_REDIS_TIMEOUT", "5s"),
                ("QUOTA_REDIS_CONNECT_TIMEOUT", "5s"),
                ("QUOTA_DATABASE_WAIT", "10s"),
                ("QUOTA_DATABASE_STATEMENT_TIMEOUT", "30s"),
                ("LD_PRELOAD", library.to_str().expect("a path")),
                ("FAKETIME", clock),
                ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ],
        )
    };
    let mut world = World {
        replicas: CLOCKS.map(start).into(),
        http: Client::new(),
        token: String::new(),
    };
    let account = json!({"email": "owner@example.com", "password": PASSWORD});
    let account = world.post("/auth/register", account).await;
    world.token = account["access_token"]
        .as_str()
        .expect("a token")
        .to_owned();
    // In this time zone, midnight is hours away. Otherwise, one replica's day could begin during the test.
    let hour = SystemClock::new().now().secs() / 3600 % 24;
    let zone = if (6..18).contains(&hour) {
        "UTC"
    } else {
        "Asia/Kamchatka"
    };
    let me = world
        .http
        .patch(format!("http://{}/auth/me", world.replicas[0].addr))
        .bearer_auth(&world.token)
        .json(&json!({"time_zone": zone}));
    assert_eq!(me.send().await.expect("it responds").status(), 200);

    let plan = |name: &str, is_strict| json!({"name": name, "default_rpm": RPM, "burst": BURST, "strict": is_strict});
    for (is_strict, slack) in [(false, LEASED), (true, EXACT)] {
        let key = world
            .key(plan(&format!("strict: {is_strict}"), is_strict))
            .await;
        let (sent_at, admitted) = world.load(&key, 0).await;
        let worst = Envelope::new(RPM, BURST, slack).worst(&admitted);
        let worst = worst.expect("something was admitted");
        assert!(worst.excess <= 0.0, "strict: {is_strict}: {worst:?}");
        let exact = Envelope::new(RPM, BURST, Duration::ZERO).exact(sent_at);
        let exact = usize::try_from(exact).expect("it fits");
        assert!(
            admitted.len() * 100 >= exact * SERVED,
            "strict: {is_strict}: {} of {exact}",
            admitted.len()
        );
    }

    let daily = json!({"name": "daily", "default_rpm": 60_000_000, "daily_quota": DAILY});
    let daily = world.key(daily).await;
    let (_, admitted) = world.load(&daily, 2 * DAILY + 1).await;
    // At most 1% of a quota is in a block that another replica cannot use.
    assert!(
        (DAILY * 99 / 100..=DAILY).contains(&admitted.len()),
        "{}",
        admitted.len()
    );

    // Make sure that the clocks were actually wrong.
    let key = world
        .key(json!({"name": "free", "default_rpm": 60_000}))
        .await;
    let mut shown = Vec::new();
    for replica in &world.replicas {
        let url = format!("http://{}/v1/echo", replica.addr);
        let response = world.http.get(url).header("x-api-key", &key).send().await;
        let date = response.expect("it responds").headers()["date"].clone();
        let date = DateTime::parse_from_rfc2822(date.to_str().expect("text")).expect("a date");
        shown.push(date.with_timezone(&Utc));
    }
    assert!((shown[1] - shown[0]).num_seconds() > 60, "{shown:?}");
    assert!((shown[0] - shown[2]).num_seconds() > 60, "{shown:?}");
}
