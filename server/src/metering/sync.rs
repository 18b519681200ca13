//! Makes records survive a machine crash, with one `fdatasync` per segment for all waiting records.

use std::{io, sync::Arc, thread};

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use super::segment::Segment;

/// A group of records that are made durable together.
#[derive(Debug)]
struct Group {
    segments: Vec<Arc<Segment>>,
    /// `None` until the group has been written. Afterward, whether each of `segments` was written, in the same order.
    done: watch::Sender<Option<Vec<bool>>>,
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

    /// Waits until everything written to the segment so far is on disk. Returns `false` if writing this segment to disk
    /// has ever failed.
    pub async fn sync(&self, segment: Arc<Segment>) -> bool {
        let (index, mut done) = {
            let mut next = self.0.next.lock();
            let segments = &mut next.group.segments;
            let found = segments.iter().position(|it| Arc::ptr_eq(it, &segment));
            let index = found.unwrap_or_else(|| {
                segments.push(segment);
                segments.len() - 1
            });
            (index, next.group.done.subscribe())
        };
        self.0.wake.notify_one();
        match done.wait_for(Option::is_some).await {
            Ok(synced) => synced.as_ref().is_some_and(|synced| synced[index]),
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
        let sync = |segment: &Arc<Segment>| {
            if segment.is_broken() {
                return false;
            }
            let result = write(segment);
            if let Err(error) = &result {
                // From now on, the check above fails this segment in every group.
                segment.has_broken();
                on_failure(segment, error);
            }
            result.is_ok()
        };
        let synced = group.segments.iter().map(sync).collect();
        group.done.send_replace(Some(synced));
    }
}
