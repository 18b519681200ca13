//! Subscribes to a channel on a separate connection.
//!
//! Redis does not store messages. Messages are lost if they are published while the connection is down, or if they
//! arrive faster than they are consumed. [`Event::Lost`] says that messages may have been lost, but does not say which
//! ones.

use std::time::Duration;

use futures_util::StreamExt as _;
use redis::{
    Client,
    aio::{PubSub, PubSubSink, PubSubStream},
};
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

use super::{
    source::{ConnectError, ServerSource},
    supervisor::{Backoff, probe_limit},
};
use crate::{
    config::{RedisServers, RedisSettings},
    error_chain::chain,
};

/// The maximum number of messages that wait to be consumed.
const WAITING: usize = 4096;
/// How often the connection is probed.
const PROBE: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// All messages that are published after this event arrive, unless [`Lost`](Self::Lost) follows.
    Subscribed,
    Message(Vec<u8>),
    /// Messages may have been lost. More may be lost until the next `Subscribed`.
    Lost,
}

/// A subscription from [`super::Redis::subscribe`]. The subscription ends when this value is dropped.
#[derive(Debug)]
pub struct Subscription {
    events: mpsc::Receiver<Event>,
    supervisor: JoinHandle<()>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

impl Subscription {
    pub(super) fn start(settings: RedisSettings, channel: String) -> Self {
        let (sender, events) = mpsc::channel(WAITING);
        Self {
            events,
            supervisor: tokio::spawn(supervise(settings, channel, sender)),
        }
    }

    /// Waits for the next event. Cancel safe.
    pub async fn next(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            // The supervisor ends only if the settings are unusable.
            None => std::future::pending().await,
        }
    }
}

async fn supervise(settings: RedisSettings, channel: String, events: mpsc::Sender<Event>) {
    let mut source = match ServerSource::new(&settings) {
        Ok(source) => source,
        Err(error) => {
            tracing::error!(error = %error, "invalid Redis settings");
            return;
        }
    };
    let mut backoff = Backoff::new();
    for turn in 0.. {
        match connect(&mut source, &settings, &channel, turn).await {
            Ok((mut sink, stream)) => {
                backoff.reset();
                if events.send(Event::Subscribed).await.is_err() {
                    return;
                }
                forward(&mut sink, stream, &events, probe_limit(&settings)).await;
                // This event is queued after the messages that have already arrived.
                if events.send(Event::Lost).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                let error = chain(&error);
                tracing::debug!(channel, error, "cannot subscribe");
            }
        }
        backoff.pause().await;
    }
}

async fn connect(
    source: &mut ServerSource,
    settings: &RedisSettings,
    channel: &str,
    turn: usize,
) -> Result<(PubSubSink, PubSubStream), ConnectError> {
    let limit = settings.connect_timeout;
    let client = match (source.client(limit).await?, &settings.servers) {
        (Some(client), _) => client,
        // A cluster forwards messages to all nodes, so any node will do.
        (None, RedisServers::Cluster(nodes)) => Client::open(nodes[turn % nodes.len()].clone())?,
        (None, _) => return Err(ConnectError::Late(limit)),
    };
    let subscribe = async {
        let mut pubsub: PubSub = client.get_async_pubsub().await?;
        pubsub.subscribe(channel).await?;
        Ok(pubsub.split())
    };
    timeout(limit, subscribe)
        .await
        .map_err(|_| ConnectError::Late(limit))?
}

/// Forwards messages until the connection ends, a probe gets no response, or messages arrive faster than they are
/// consumed.
async fn forward(
    sink: &mut PubSubSink,
    mut stream: PubSubStream,
    events: &mpsc::Sender<Event>,
    limit: Duration,
) {
    let mut probes = tokio::time::interval(PROBE);
    loop {
        tokio::select! {
            biased;
            message = stream.next() => {
                let Some(message) = message else { return };
                let message = Event::Message(message.get_payload_bytes().to_vec());
                if events.try_send(message).is_err() {
                    return;
                }
            }
            _ = probes.tick() => {
                // Messages that arrive during the probe wait in the stream.
                if !matches!(timeout(limit, sink.ping::<redis::Value>()).await, Ok(Ok(_))) {
                    return;
                }
            }
        }
    }
}
