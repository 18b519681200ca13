//! Tests that many rows in memory do not delay requests, neither when unneeded data is searched for nor when rows change.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use chrono::DateTime;
use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;
use quota_server::{
    clock::{Clock, Monotonic, SystemClock, UnixNanos},
    jobs,
    keys::LookupCaller,
    repo::invalidation::{Invalidation, Target},
    secret_text::{Kind, SecretText},
};
use uuid::Uuid;

use crate::support::app::TestApp;

/// How long a blocked call waits to be released, and how long changes may take, before the test fails.
const PATIENCE: Duration = Duration::from_secs(10);

/// A clock that can block the thread of the next call.
#[derive(Debug)]
struct HoldingClock {
    clock: SystemClock,
    hold: Mutex<Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>>,
    was_released: AtomicBool,
}

impl HoldingClock {
    fn pass(&self) {
        let hold = self.hold.lock().take();
        if let Some((begun, release)) = hold {
            begun.send(()).expect("the test waits");
            let is_released = release.recv_timeout(PATIENCE).is_ok();
            self.was_released.store(is_released, Ordering::SeqCst);
        }
    }
}

impl Clock for HoldingClock {
    fn now(&self) -> UnixNanos {
        self.pass();
        self.clock.now()
    }

    fn monotonic(&self) -> Monotonic {
        self.pass();
        self.clock.monotonic()
    }
}

/// The runtime has one thread for tasks, which could not serve the request if the search ran on that thread.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn requests_are_served_while_unneeded_data_is_searched_for() {
    let clock = Arc::new(HoldingClock {
        clock: SystemClock::new(),
        hold: Mutex::default(),
        was_released: AtomicBool::new(false),
    });
    let app = TestApp::setup()
        .clock(clock.clone())
        .without_jobs()
        .start()
        .await;
    let (begun, has_begun) = mpsc::channel();
    let (release, released) = mpsc::channel();
    *clock.hold.lock() = Some((begun, released));
    let state = app.state.clone();
    let search = tokio::spawn(async move { jobs::prune(&state).await });
    while has_begun.try_recv().is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let answer = app.get("/health/live").send().await;
    assert_eq!(answer.status, 200);
    let _ = release.send(());
    search.await.expect("no panic");
    assert!(
        clock.was_released.load(Ordering::SeqCst),
        "the request waited for the search"
    );
}

/// Changes are applied on a thread of the runtime, so they must not search all rows in memory.
#[tokio::test(flavor = "multi_thread")]
async fn changes_take_the_same_time_with_many_service_tokens_in_memory() {
    const TOKENS: usize = 5_000;
    const CHANGES: usize = 50_000;
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let generate = || SecretText::generate(Kind::ServiceToken).expect("random bytes");
    let secrets = std::iter::repeat_with(generate);
    let secrets = secrets.take(TOKENS).collect::<Vec<_>>();
    let hashes = secrets.iter().map(|it| it.hash().to_vec());
    let hashes = hashes.collect::<Vec<_>>();
    let insert = "INSERT INTO service_tokens (tenant_id, id, name, prefix, token_hash) \
         SELECT $1::text::uuid, gen_random_uuid(), 'Token', '', hash FROM unnest($2::bytea[]) hash";
    let client = app.database.connect().await;
    let inserted = client.execute(insert, &[&account.tenant_id, &hashes]).await;
    assert_eq!(inserted.expect("valid SQL"), TOKENS as u64);
    let keys = &app.state.keys;
    let find = |secret: &SecretText| keys.service_token(secret.hash(), LookupCaller::default());
    let mut found = stream::iter(&secrets).map(find).buffer_unordered(20);
    while let Some(token) = found.next().await {
        assert!(token.expect("a lookup").is_some());
    }

    let change = Invalidation {
        seq: 1,
        tenant: Uuid::now_v7(),
        target: Some(Target::Tenant),
        at: DateTime::UNIX_EPOCH,
    };
    let began = Instant::now();
    for _ in 0..CHANGES {
        app.state.forget(std::slice::from_ref(&change));
        assert!(began.elapsed() < PATIENCE);
    }
}
