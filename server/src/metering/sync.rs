//! Makes records survive a machine crash, with one `fdatasync` per segment for all waiting records.

use std::{io, sync::Arc, thread};

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use super::segment::Segment;

/// A group of records that are made durable together.
#[derive(Debug)]
struct Group {
    segments: Vec<Arc<Segment>>,
    /// `None` until the group has been written. Afterward, whether all of its segments were written.
    done: watch::Sender<Option<bool>>,
}

impl Default for Group {
    fn default() -> Self {
        Self {
            segments: Vec::new(),
            done: watch::channel(None).0,
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    next: Mutex<Next>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Next {
    group: Group,
    is_stopping: bool,
}

/// A thread that calls `fdatasync` when records are waiting to be made durable.
#[derive(Debug)]
pub(super) struct Syncer(Arc<Shared>);

impl Syncer {
    /// Starts the thread, which writes segments to disk with `write`. Calls `on_failure` once for each segment that
    /// could not be written.
    pub fn start(
        write: impl Fn(&Segment) -> io::Result<()> + Send + 'static,
        on_failure: impl Fn(&Segment, &io::Error) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let syncer = Self(shared.clone());
        thread::Builder::new()
            .name("usage-sync".into())
            .spawn(move || run(&shared, &write, &on_failure))?;
        Ok(syncer)
    }

    /// Waits until everything written to the segment so far is on disk. Returns `false` if writing this segment, or
    /// another segment of the same group, to disk has ever failed.
    pub async fn sync(&self, segment: Arc<Segment>) -> bool {
        let mut done = {
            let mut next = self.0.next.lock();
            let segments = &mut next.group.segments;
            if !segments.iter().any(|it| Arc::ptr_eq(it, &segment)) {
                segments.push(segment);
            }
            next.group.done.subscribe()
        };
        self.0.wake.notify_one();
        match done.wait_for(Option::is_some).await {
            Ok(synced) => *synced == Some(true),
            Err(_) => false,
        }
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.0.next.lock().is_stopping = true;
        self.0.wake.notify_one();
    }
}

fn run(
    shared: &Shared,
    write: &impl Fn(&Segment) -> io::Result<()>,
    on_failure: &impl Fn(&Segment, &io::Error),
) {
    loop {
        let group = {
            let mut next = shared.next.lock();
            while next.group.segments.is_empty() {
                if next.is_stopping {
                    return;
                }
                shared.wake.wait(&mut next);
            }
            std::mem::take(&mut next.group)
        };
        let mut synced = true;
        for segment in &group.segments {
            if segment.is_broken() {
                synced = false;
            } else if let Err(error) = write(segment) {
                // From now on, the check above fails every group that contains this segment.
                segment.has_broken();
                on_failure(segment, &error);
                synced = false;
            }
        }
        group.done.send_replace(Some(synced));
    }
}
