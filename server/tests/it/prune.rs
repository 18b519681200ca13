//! Tests that the periodic search for unneeded data does not delay requests.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use parking_lot::Mutex;
use quota_server::{
    clock::{Clock, Monotonic, SystemClock, UnixNanos},
    jobs,
};

use crate::support::app::TestApp;

/// How long a blocked call waits to be released before the test fails.
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
