//! Messages on a channel, by a connection of their own that is kept up.
//!
//! Redis keeps no message for who is not there: what is published while the connection is down, or faster than it
//! is taken, is lost. That it may have been is told ([`Event::Lost`]), never what.

use std::time::Duration;

use futures_util::StreamExt as _;
use redis::{
    Client,
    aio::{PubSub, PubSubSink, PubSubStream},
};
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

use super::keeper::{ConnectError, Pauses, Source, chain, probe_limit};
use crate::config::{RedisServers, RedisSettings};

/// How many messages wait to be taken.
const WAITING: usize = 4096;
/// How often the connection is probed.
const PROBE: Duration = Duration::from_millis(500);

/// What comes by a [`Subscription`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// From now on, everything that is published arrives.
    Subscribed,
    Message(Vec<u8>),
    /// Something may have been missed, and goes on being missed until `Subscribed`.
    Lost,
}

/// See [`super::Redis::subscribe`]. Ends with the value.
#[derive(Debug)]
pub struct Subscription {
    events: mpsc::Receiver<Event>,
    keeper: JoinHandle<()>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Subscription {
    pub(super) fn start(settings: RedisSettings, channel: String) -> Self {
        let (sender, events) = mpsc::channel(WAITING);
        Self {
            events,
            keeper: tokio::spawn(keep(settings, channel, sender)),
        }
    }

    /// Waits for the next. May be dropped while it waits, without losing any.
    pub async fn next(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            // The keeper ends only on settings that cannot be used at all.
            None => std::future::pending().await,
        }
    }
}

async fn keep(settings: RedisSettings, channel: String, events: mpsc::Sender<Event>) {
    let mut source = match Source::new(&settings) {
        Ok(source) => source,
        Err(error) => {
            tracing::error!(error = %error, "Redis cannot be connected to as it is set");
            return;
        }
    };
    let mut pauses = Pauses::new();
    for turn in 0.. {
        match connect(&mut source, &settings, &channel, turn).await {
            Ok((mut sink, stream)) => {
                pauses.well();
                if events.send(Event::Subscribed).await.is_err() {
                    return;
                }
                pass_on(&mut sink, stream, &events, probe_limit(&settings)).await;
                // With what waits before it, which was not lost.
                if events.send(Event::Lost).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                let error = chain(&error);
                tracing::debug!(channel, error, "cannot subscribe");
            }
        }
        pauses.pause().await;
    }
}

async fn connect(
    source: &mut Source,
    settings: &RedisSettings,
    channel: &str,
    turn: usize,
) -> Result<(PubSubSink, PubSubStream), ConnectError> {
    let limit = settings.connect_timeout;
    let client = match (source.client(limit).await?, &settings.servers) {
        (Some(client), _) => client,
        // A cluster passes a message on to every node, so any will do.
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

/// Until the connection ends, or says nothing when it is probed, or more arrives than is taken.
async fn pass_on(
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
                // Messages that arrive meanwhile wait in the stream.
                if !matches!(timeout(limit, sink.ping::<redis::Value>()).await, Ok(Ok(_))) {
                    return;
                }
            }
        }
    }
}
