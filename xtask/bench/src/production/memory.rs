//! The memory of replicas and of Caddy.

use std::time::Duration;

use anyhow::Result;
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

use crate::memory::resident;

/// The processes whose memory is measured.
pub(super) struct Processes {
    pub(super) replicas: Vec<Pid>,
    pub(super) caddy: Option<Pid>,
}

/// Resident memory in bytes.
#[derive(Clone, Default)]
pub(super) struct Memory {
    pub(super) replicas: Vec<u64>,
    pub(super) caddy: u64,
}

impl Memory {
    pub(super) fn of(processes: &Processes) -> Result<Self> {
        Ok(Self {
            replicas: processes
                .replicas
                .iter()
                .map(|it| resident(*it))
                .collect::<Result<_>>()?,
            caddy: processes.caddy.map_or(Ok(0), resident)?,
        })
    }

    /// Returns the largest amount of memory that each process uses during `time`.
    pub(super) async fn watch(processes: &Processes, time: Duration) -> Result<Self> {
        let end = Instant::now() + time;
        let mut most = Self::of(processes)?;
        while Instant::now() < end {
            sleep(Duration::from_millis(100)).await;
            let now = Self::of(processes)?;
            for (most, now) in most.replicas.iter_mut().zip(now.replicas) {
                *most = (*most).max(now);
            }
            most.caddy = most.caddy.max(now.caddy);
        }
        Ok(most)
    }

    /// Returns the largest growth of a replica's memory.
    pub(super) fn growth(&self, before: &Self) -> u64 {
        let growth = self.replicas.iter().zip(&before.replicas);
        growth
            .map(|(most, before)| most.saturating_sub(*before))
            .max()
            .unwrap_or(0)
    }
}
