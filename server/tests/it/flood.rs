//! What strangers can send without an account: keys that nobody ever created, and connections that send nothing.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use quota_server::{
    secret_text::{Kind, SecretText},
};
use reqwest::Client;

use crate::support::{
    app::TestApp,
    quota::{Quota, data_dir},
};

const KEYS: u32 = 100_000;
/// Requests that one connection sends before it reads the first answer.
const BATCH: u32 = 100;

/// A key in which all but the checksum is right.
fn forged(n: u32) -> String {
    let mut bytes = [7; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    let mut text = SecretText::from_bytes(Kind::ApiKey, &bytes).reveal();
    let last = text.pop();
    text.push(if last == Some('0') { '1' } else { '0' });
    text
}

fn count(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).filter(|it| *it == what).count()
}

/// Sends the keys from `first` on, and answers how many were refused with 401.
fn flood(server: SocketAddr, first: u32, keys: u32) -> usize {
    let mut refused = 0;
    for batch in (first..first + keys).step_by(BATCH as usize) {
        let mut stream = TcpStream::connect(server).expect("it listens");
        let patience = Some(Duration::from_secs(30));
        stream.set_read_timeout(patience).expect("a socket");
        let mut requests = String::new();
        for n in batch..batch + BATCH {
            requests += "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key: ";
            requests += &forged(n);
            requests += if n == batch + BATCH - 1 {
                "\r\nConnection: close\r\n\r\n"
            } else {
                "\r\n\r\n"
            };
        }
        stream.write_all(requests.as_bytes()).expect("it reads");
        let mut answers = Vec::new();
        stream.read_to_end(&mut answers).expect("it answers");
        refused += count(&answers, b"HTTP/1.1 401 ");
    }
    refused
}

#[tokio::test]
async fn a_flood_of_keys_with_wrong_checksums_looks_nothing_up() {
    const LOOK_UPS: [&str; 4] = [
        "quota_key_cache_hits_total",
        "quota_key_cache_negative_hits_total",
        "quota_key_loads_total",
        "quota_ledger_takes_total",
    ];
    let (data, http) = (data_dir(), Client::new());
    let quota = Quota::start(data.path());
    let malformed = "quota_keys_malformed_total";
    assert_eq!(quota.counter(&http, malformed).await, 0);
    let mut before = Vec::new();
    for name in LOOK_UPS {
        before.push(quota.counter(&http, name).await);
    }

    let server = quota.addr;
    let floods =
        [0, KEYS / 2].map(|first| std::thread::spawn(move || flood(server, first, KEYS / 2)));
    let mut refused = 0;
    for flood in floods {
        refused += flood.join().expect("it got its answers");
    }
    assert_eq!(refused, KEYS as usize);

    assert_eq!(quota.counter(&http, malformed).await, u64::from(KEYS));
    for (name, before) in LOOK_UPS.into_iter().zip(before) {
        assert_eq!(quota.counter(&http, name).await, before, "{name}");
    }
    quota.stop();
}

/// Anybody may ask whether the server is ready, and PostgreSQL is not asked each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_readiness_checks_asks_postgres_rarely() {
    let app = TestApp::setup().without_jobs().start().await;
    let client = app.database.connect().await;
    // What PostgreSQL itself counts, once it has written that down.
    let scans = async || {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let sql = "SELECT coalesce(sum(seq_scan + coalesce(idx_scan, 0)), 0)::bigint FROM pg_stat_user_tables \
                   WHERE relname = '__diesel_schema_migrations'";
        client
            .query_one(sql, &[])
            .await
            .expect("statistics")
            .get::<_, i64>(0)
    };
    assert_eq!(app.get("/health/ready").send().await.status, 200);
    let before = scans().await;
    let began = Instant::now();
    for _ in 0..20 {
        let all = (0..25).map(|_| async { app.get("/health/ready").send().await.status });
        let all = futures_util::future::join_all(all).await;
        assert!(all.iter().all(|status| *status == 200), "{all:?}");
    }
    let took = began.elapsed();
    let asked = scans().await - before;
    let at_most = i64::try_from(took.as_millis() / 250 + 2).expect("a short time");
    assert!((1..=at_most).contains(&asked), "{asked} times in {took:?}");
}
