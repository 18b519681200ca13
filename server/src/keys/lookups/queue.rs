//! The lookups of one kind of secret that wait for a batch.

use std::collections::{HashMap, VecDeque};

use quota_common::TenantId;
use tokio::sync::oneshot;

use crate::{cache::Unconfirmed, client_guard::ClientNetwork, secret_text::Hash, spans::Parent};

/// The caller to whom a lookup is attributed. Without a tenant and an address, the caller is the server itself or a
/// client without an address, such as one on a Unix socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct LookupCaller {
    /// The owner of the service token in the request.
    pub tenant: Option<TenantId>,
    /// The network that the request came from.
    pub address: Option<ClientNetwork>,
}

pub(super) struct Waiting<V> {
    pub(super) id: u64,
    pub(super) hash: Hash,
    pub(super) answer: oneshot::Sender<Result<Option<V>, Unconfirmed>>,
    /// The span that the lookup belongs to, if its request is traced.
    pub(super) span: Option<Parent>,
}

pub(super) struct Queue<V> {
    pub(super) next_id: u64,
    pub(super) known: VecDeque<Waiting<V>>,
    pub(super) unknown: HashMap<LookupCaller, VecDeque<Waiting<V>>>,
    /// The callers in `unknown`, in the order of their turns.
    pub(super) turns: VecDeque<LookupCaller>,
    /// For each caller, the number of its lookups of unknown secrets in progress, including lookups that are not queued
    /// yet.
    pub(super) started: HashMap<LookupCaller, usize>,
    /// The sum of `started`.
    pub(super) started_total: usize,
    pub(super) workers: usize,
    /// The number of workers whose batch contains unknown secrets.
    pub(super) on_unknown: usize,
    /// Whether a worker waits until it may use another connection for unknown secrets.
    pub(super) is_waiting: bool,
}

impl<V> Default for Queue<V> {
    fn default() -> Self {
        Self {
            next_id: 0,
            known: VecDeque::new(),
            unknown: HashMap::new(),
            turns: VecDeque::new(),
            started: HashMap::new(),
            started_total: 0,
            workers: 0,
            on_unknown: 0,
            is_waiting: false,
        }
    }
}

impl<V> Queue<V> {
    /// Removes and returns the next lookup of the caller whose turn it is.
    pub(super) fn next_unknown(&mut self) -> Option<Waiting<V>> {
        while let Some(caller) = self.turns.pop_front() {
            let Some(waiting) = self.unknown.get_mut(&caller) else {
                continue;
            };
            let next = waiting.pop_front();
            if waiting.is_empty() {
                self.unknown.remove(&caller);
            } else {
                self.turns.push_back(caller);
            }
            if next.is_some() {
                return next;
            }
        }
        None
    }

    pub(super) fn push(&mut self, caller: Option<LookupCaller>, waiting: Waiting<V>) {
        let Some(caller) = caller else {
            self.known.push_back(waiting);
            return;
        };
        let own = self.unknown.entry(caller).or_default();
        if own.is_empty() {
            self.turns.push_back(caller);
        }
        own.push_back(waiting);
    }

    /// Removes a waiting lookup. Returns whether the lookup was still waiting.
    pub(super) fn remove(&mut self, caller: Option<LookupCaller>, id: u64) -> bool {
        let waiting = match caller {
            None => Some(&mut self.known),
            Some(caller) => self.unknown.get_mut(&caller),
        };
        let Some(waiting) = waiting else {
            return false;
        };
        // Search from the front: the lookup that has waited longest is the first to give up.
        let Some(at) = waiting.iter().position(|it| it.id == id) else {
            return false;
        };
        waiting.remove(at);
        if let Some(caller) = caller
            && self.unknown.get(&caller).is_some_and(VecDeque::is_empty)
        {
            self.unknown.remove(&caller);
            self.turns.retain(|it| *it != caller);
        }
        true
    }
}
