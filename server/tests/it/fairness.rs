//! Tests that one tenant's burst of requests leaves database connections, delivery attempts and memory for other
//! tenants.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::TimeDelta;
use quota_server::secret_text::{Kind, SecretText};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

use crate::{
    support::{
        app::{Account, Answer, TestApp},
        http2,
        locks::{count_locks, wait_for_lock},
    },
    usage::now,
};

/// The number of concurrent requests: many times the number of database connections.
const BURST: usize = 64;
/// The number of changes that one tenant may have in progress or waiting on a replica.
const ADMITTED: usize = 33;

/// How long a change or read waits for its turn before it gets 503.
const TURN_WITHIN: Duration = Duration::from_secs(5);

/// Runs an attempt up to three times, until it does not return `None`, which means that it took longer than
/// [`TURN_WITHIN`]. On a busy machine, this can happen to some attempts. If one tenant delays another, it happens to
/// every attempt.
async fn within_a_turn(attempt: impl AsyncFn() -> Option<()>) {
    for _ in 0..3 {
        if attempt().await.is_some() {
            return;
        }
    }
    panic!("every attempt took too long");
}

/// Returns the first `count` responses. Stops waiting for further responses once [`TURN_WITHIN`] has passed since
/// `sent`.
async fn first(requests: &mut JoinSet<Answer>, count: usize, sent: Instant) -> Vec<Answer> {
    let mut answers = Vec::new();
    while answers.len() < count && sent.elapsed() < TURN_WITHIN {
        let answer = requests.join_next().await.expect("more requests");
        answers.push(answer.expect("a response"));
    }
    answers
}

fn assert_all(answers: &[Answer], status: u16) {
    for answer in answers {
        assert_eq!(answer.status, status, "{}", answer.text);
    }
}

/// Starts creating `count` plans.
fn create_plans(app: &Arc<TestApp>, account: &Arc<Account>, count: usize) -> JoinSet<Answer> {
    let mut creations = JoinSet::new();
    for n in 0..count {
        let (app, account) = (app.clone(), account.clone());
        creations.spawn(async move {
            let body = json!({"name": format!("Plan {n}"), "default_rpm": 60});
            app.act(&account, "POST", "/admin/plans", body).await
        });
    }
    creations
}

async fn patient() -> Arc<TestApp> {
    let app = TestApp::setup()
        .flag("--database-lock-timeout=20s")
        .flag("--database-statement-timeout=20s")
        .flag("--database-wait=10s");
    Arc::new(app.start().await)
}

#[tokio::test(flavor = "multi_thread")]
async fn burst_of_creations_by_one_tenant_does_not_delay_another() {
    let app = patient().await;
    within_a_turn(async || {
        let (a, b) = (Arc::new(app.register().await), app.register().await);
        // Simulates another replica that holds the lock that is required to count the resources of tenant `a`.
        let database = app.database.connect().await;
        let lock = format!(
            "SELECT pg_advisory_lock(hashtextextended('{}', 7226422))",
            a.tenant_id
        );
        database.batch_execute(&lock).await.unwrap();
        let sent = Instant::now();
        let mut creations = create_plans(&app, &a, BURST);
        let rejected = first(&mut creations, BURST - ADMITTED, sent).await;

        for _ in 0..10 {
            app.plan(&b, json!({})).await;
            let list = app.act(&b, "GET", "/admin/plans", Value::Null).await;
            assert_eq!(list.status, 200, "{}", list.text);
        }
        // The tenant itself can still read.
        let list = app.act(&a, "GET", "/admin/plans", Value::Null).await;
        assert_eq!((list.status, &list.body["total"]), (200, &json!(0)));

        let unlock = "SELECT pg_advisory_unlock_all()";
        database.batch_execute(unlock).await.unwrap();
        let created = creations.join_all().await;
        if sent.elapsed() >= TURN_WITHIN {
            return None;
        }
        assert_all(&rejected, 429);
        for answer in &rejected {
            assert_eq!(answer.problem(), "too-many-requests");
            assert!(answer.number("retry-after") >= 1);
        }
        assert_all(&created, 201);
        let list = app.act(&a, "GET", "/admin/plans", Value::Null).await;
        assert_eq!(list.body["total"], json!(ADMITTED));
        Some(())
    })
    .await;
    assert!(app.metric("quota_guard_rejections_total").await >= 31.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn burst_of_updates_of_one_plan_does_not_delay_another_tenant() {
    let app = patient().await;
    within_a_turn(async || {
        let (a, b) = (Arc::new(app.register().await), app.register().await);
        let plan = app.plan(&a, json!({})).await;
        let mut database = app.database.connect().await;
        let locked = database.transaction().await.unwrap();
        let lock = format!("SELECT FROM plans WHERE id = '{plan}' FOR UPDATE");
        locked.batch_execute(&lock).await.unwrap();
        let sent = Instant::now();
        let mut updates = JoinSet::new();
        for n in 1..=ADMITTED {
            let (app, a, path) = (app.clone(), a.clone(), format!("/admin/plans/{plan}"));
            updates.spawn(async move { app.act(&a, "PATCH", &path, json!({"burst": n})).await });
        }
        // Give all requests time to reach the lock or the queue.
        tokio::time::sleep(Duration::from_millis(300)).await;
        for _ in 0..10 {
            app.plan(&b, json!({})).await;
        }
        locked.rollback().await.unwrap();
        let updated = updates.join_all().await;
        if sent.elapsed() >= TURN_WITHIN {
            return None;
        }
        assert_all(&updated, 200);
        Some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_disconnected_clients_leave_the_queue() {
    let app = patient().await;
    within_a_turn(async || {
        let a = Arc::new(app.register().await);
        let database = app.database.connect().await;
        let lock = format!(
            "SELECT pg_advisory_lock(hashtextextended('{}', 7226422))",
            a.tenant_id
        );
        database.batch_execute(&lock).await.unwrap();
        let mut soonest = Duration::MAX;
        for _ in 0..3 {
            let sent = Instant::now();
            let mut creations = create_plans(&app, &a, BURST);
            let rejected = first(&mut creations, BURST - ADMITTED, sent).await;
            if sent.elapsed() >= TURN_WITHIN {
                return None;
            }
            assert_all(&rejected, 429);
            // Close the clients' connections.
            creations.shutdown().await;
            let began = Instant::now();
            while app.metric("quota_requests_in_flight").await > 0.0 {
                assert!(began.elapsed() < Duration::from_secs(60));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            soonest = soonest.min(began.elapsed());
        }
        // The requests have not merely timed out.
        assert!(soonest < TURN_WITHIN, "{soonest:?}");
        let unlock = "SELECT pg_advisory_unlock_all()";
        database.batch_execute(unlock).await.unwrap();
        let sent = Instant::now();
        let created = create_plans(&app, &a, ADMITTED).join_all().await;
        if sent.elapsed() >= TURN_WITHIN {
            return None;
        }
        assert_all(&created, 201);
        Some(())
    })
    .await;
}

/// Reads of usage and of long lists have to wait while PostgreSQL is slow. A locked table simulates this.
#[tokio::test(flavor = "multi_thread")]
async fn burst_of_reads_by_one_tenant_does_not_delay_another() {
    let app = patient().await;
    let (a, b) = (Arc::new(app.register().await), app.register().await);
    let webhook = app.webhook(&a).await;
    let deliveries = format!("/admin/webhooks/{webhook}/deliveries");
    for (path, table) in [
        (deliveries.as_str(), "webhook_deliveries"),
        ("/admin/alerts", "quota_alerts"),
        ("/billing", "billing_accounts"),
        ("/admin/usage", "usage_quarters"),
        ("/admin/stats", "usage_quarters"),
        ("/admin/decisions", "usage_tenants"),
        ("/admin/audit", "audit_events"),
    ] {
        within_a_turn(async || {
            let mut database = app.database.connect().await;
            let locked = database.transaction().await.unwrap();
            let lock = format!("LOCK TABLE {table}");
            locked.batch_execute(&lock).await.unwrap();
            let sent = Instant::now();
            let mut reads = JoinSet::new();
            for _ in 0..BURST {
                let (app, a, path) = (app.clone(), a.clone(), path.to_owned());
                reads.spawn(async move { app.act(&a, "GET", &path, Value::Null).await });
            }
            let mut answers = first(&mut reads, 16, sent).await;
            for _ in 0..10 {
                let list = app.act(&b, "GET", "/admin/plans", Value::Null).await;
                assert_eq!(list.status, 200, "{path}: {}", list.text);
            }
            locked.rollback().await.unwrap();
            answers.extend(reads.join_all().await);
            if sent.elapsed() >= TURN_WITHIN {
                return None;
            }
            let (mut answered, mut rejected) = (0, 0);
            for answer in answers {
                match answer.status {
                    200 => answered += 1,
                    429 => {
                        assert_eq!(answer.problem(), "too-many-requests");
                        rejected += 1;
                    }
                    _ => panic!("{path}: {}", answer.text),
                }
            }
            assert!(answered >= 33, "{path}: {answered}");
            assert!(rejected >= 16, "{path}: {rejected}");
            Some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn burst_of_webhook_tests_by_one_tenant_does_not_delay_another() {
    let app = patient().await;
    within_a_turn(async || {
        let (a, b) = (Arc::new(app.register().await), app.register().await);
        let webhook = app.webhook(&a).await;
        let mut database = app.database.connect().await;
        let locked = database.transaction().await.unwrap();
        let lock = format!("SELECT FROM webhooks WHERE id = '{webhook}' FOR UPDATE");
        locked.batch_execute(&lock).await.unwrap();
        let sent = Instant::now();
        let mut tests = JoinSet::new();
        for _ in 0..BURST {
            let (app, a, path) = (
                app.clone(),
                a.clone(),
                format!("/admin/webhooks/{webhook}/test"),
            );
            tests.spawn(async move { app.act(&a, "POST", &path, Value::Null).await });
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        for _ in 0..10 {
            app.plan(&b, json!({})).await;
        }
        locked.rollback().await.unwrap();
        let answers = tests.join_all().await;
        if sent.elapsed() >= TURN_WITHIN {
            return None;
        }
        let mut created = 0;
        for answer in answers {
            created += usize::from(answer.status == 201);
            assert!(matches!(answer.status, 201 | 429 | 503), "{}", answer.text);
        }
        assert!((1..BURST).contains(&created), "{created}");
        Some(())
    })
    .await;
}

/// A client with an account requests large responses and opens no flow-control window for them, so the server has to
/// keep them in memory.
#[tokio::test(flavor = "multi_thread")]
async fn unread_large_responses_of_a_tenant_are_limited() {
    const REQUESTS: u32 = 32;
    const WAITING: usize = 8;
    let app = TestApp::setup().without_jobs().start().await;
    let (a, b) = (app.register().await, app.register().await);
    let from = (now() - TimeDelta::days(40)).format("%Y-%m-%dT%H:%M:%SZ");
    let path = format!("/admin/usage?from={from}&bucket=hour");
    let large = app.act(&a, "GET", &path, Value::Null).await;
    assert_eq!(large.status, 200, "{}", large.text);
    assert!(large.text.len() > 64 * 1024, "{}", large.text.len());

    let mut requests = http2::hello(0);
    for n in 0..REQUESTS {
        let mut head = http2::head("GET", &path);
        head.extend(http2::field(
            "authorization",
            &format!("Bearer {}", a.access_token),
        ));
        requests.extend(http2::frame(
            http2::HEADERS,
            http2::END_HEADERS | 1,
            2 * n + 1,
            &head,
        ));
    }
    let mut stream = TcpStream::connect(app.addr)
        .await
        .expect("the server listens");
    stream.write_all(&requests).await.expect("the server reads");
    let (mut admitted, mut answered) = (0, 0);
    while answered < REQUESTS {
        let mut head = [0; 9];
        stream
            .read_exact(&mut head)
            .await
            .expect("an open connection");
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        stream
            .read_exact(&mut payload)
            .await
            .expect("an open connection");
        if head[3] == http2::HEADERS {
            answered += 1;
            // `:status: 200` from the static table of HPACK.
            admitted += usize::from(payload[0] == 0x88);
        }
    }
    assert_eq!(admitted, WAITING);
    let again = app.act(&a, "GET", &path, Value::Null).await;
    assert_eq!((again.status, again.problem()), (429, "too-many-requests"));
    // Small responses, and other tenants, are not affected.
    let list = app.act(&a, "GET", "/admin/plans", Value::Null).await;
    assert_eq!(list.status, 200, "{}", list.text);
    for _ in 0..2 * WAITING {
        assert_eq!(app.act(&b, "GET", &path, Value::Null).await.status, 200);
    }

    drop(stream);
    let began = Instant::now();
    while app.act(&a, "GET", &path, Value::Null).await.status != 200 {
        assert!(began.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lookups_of_unknown_keys_and_tokens_leave_a_connection_for_known_ones() {
    // A pool of six connections has two connections for lookups. Lookups of unknown keys and tokens may use only one of
    // them.
    let app = TestApp::setup()
        .flag("--database-pool=6")
        .flag("--database-lock-timeout=60s")
        .flag("--database-statement-timeout=60s")
        .flag("--database-wait=10s")
        .without_jobs();
    let app = Arc::new(app.start().await);
    let secret = |kind| SecretText::generate(kind).unwrap().reveal();
    let (key, token) = (secret(Kind::ApiKey), secret(Kind::ServiceToken));
    let (holder, observer) = (app.database.connect().await, app.database.connect().await);
    let lock = "BEGIN; LOCK TABLE api_keys, service_tokens IN ACCESS EXCLUSIVE MODE";
    holder.batch_execute(lock).await.unwrap();
    let mut requests = JoinSet::new();
    let by_key = app.clone();
    requests.spawn(async move { by_key.echo(&key).await });
    let by_token = app.clone();
    requests.spawn(async move {
        let check = by_token.post("/v1/check", json!({"key": "qk_1"}));
        check.bearer(&token).send().await
    });
    let waiting = "NOT granted AND relation IN ('api_keys'::regclass, 'service_tokens'::regclass)";
    wait_for_lock(&observer, waiting).await;
    // Give the other lookup time. It must wait for a connection, so it must not reach the lock.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(count_locks(&observer, waiting).await, 1);
    holder.batch_execute("ROLLBACK").await.unwrap();
    while let Some(answer) = requests.join_next().await {
        let answer = answer.unwrap();
        assert_eq!(answer.status, 401, "{}", answer.text);
    }
}
