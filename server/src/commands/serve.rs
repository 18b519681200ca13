//! `quota serve`: starts and stops a server.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use quota_server::{
    clock::{Clock, SystemClock},
    config::{Config, LogFormat},
    db::Db,
    demo, doctor, file_limit,
    jobs::Jobs,
    router,
    serve::{self, BoundSocket, ServeSettings, serve},
    state::AppState,
    telemetry::log::Log,
};
use secrecy::SecretString;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use super::{apply_migrations, database};

/// The maximum time from SIGTERM until unused tokens have been returned. Leaves 5 of the 30 seconds that service
/// managers usually allow.
const RETURN_TOKENS_WITHIN: Duration = Duration::from_secs(25);
/// The minimum time for returning tokens. Applies even if requests in flight have used up [`RETURN_TOKENS_WITHIN`].
const RETURN_TOKENS_MIN: Duration = Duration::from_millis(1500);

/// Returns a future that completes on SIGTERM or SIGINT. The call itself installs the signal handlers. If the first
/// poll installed them, a signal before that poll would kill the process.
fn stop_requested() -> impl Future<Output = ()> {
    let signals = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    );
    async move {
        let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

/// Runs the server until SIGTERM or SIGINT.
pub async fn run(mut config: Config, log: Log, with_demo: bool) -> anyhow::Result<()> {
    if let Some(stripe) = &config.stripe {
        anyhow::ensure!(
            !stripe.webhook_secrets.is_empty(),
            "STRIPE_WEBHOOK_SECRET: required with STRIPE_SECRET_KEY; `quota billing setup` prints it"
        );
    }
    let file_limit = file_limit::raise();
    // Install the handlers first, so that the server stops cleanly even during a slow startup.
    let mut stop = std::pin::pin!(stop_requested());
    // Bind before connecting to the database, because an occupied port is the most common mistake.
    let sockets = Sockets {
        public: bind("QUOTA_LISTEN", config.listen)?,
        metrics: config
            .metrics_listen
            .map(|addr| bind("QUOTA_METRICS_LISTEN", addr))
            .transpose()?,
        grpc: config
            .grpc_listen
            .map(|addr| bind("QUOTA_GRPC_LISTEN", addr))
            .transpose()?,
    };
    let metrics_listen = sockets.metrics.as_ref().map(BoundSocket::local_addr);
    let grpc_listen = sockets.grpc.as_ref().map(BoundSocket::local_addr);
    config.listens_on(
        sockets.public.local_addr()?,
        metrics_listen.transpose()?,
        grpc_listen.transpose()?,
    );
    let (url, embedded) = tokio::select! {
        database = database(&config) => database?,
        () = &mut stop => return Ok(()),
    };
    let served = serve_on(
        &config,
        log,
        with_demo,
        &url,
        sockets,
        file_limit,
        stop.as_mut(),
    )
    .await;
    if let Some(embedded) = embedded {
        embedded.stop().await;
    }
    served
}

/// Sockets that are bound but not listening yet.
struct Sockets {
    public: BoundSocket,
    metrics: Option<BoundSocket>,
    grpc: Option<BoundSocket>,
}

fn bind(variable: &str, addr: SocketAddr) -> anyhow::Result<BoundSocket> {
    serve::bind(addr).with_context(|| format!("{variable}: cannot listen on {addr}"))
}

async fn serve_on(
    config: &Config,
    log: Log,
    with_demo: bool,
    url: &SecretString,
    sockets: Sockets,
    file_limit: Option<usize>,
    mut stop: std::pin::Pin<&mut impl Future<Output = ()>>,
) -> anyhow::Result<()> {
    if config.migrate {
        tokio::select! {
            applied = apply_migrations(url) => applied?,
            () = &mut stop => return Ok(()),
        }
    }
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let db = Db::new(url, &config.database);
    let state = AppState::new(config.clone(), db, clock, log.clone()).await?;
    let jobs = Jobs::start(&state);
    doctor::warn_of_plaintext(url).await;
    doctor::warn_of_too_many_connections(config, url).await;
    if with_demo {
        let demo = demo::create_once(&state).await?;
        if demo.is_new && config.log_format == LogFormat::Json {
            tracing::info!("demo created");
        }
        println!("{}", demo.text);
    }

    let public_settings = ServeSettings::public(&state, file_limit);
    // Start listening only now, because the server must not accept connections before it can make decisions.
    let listener = sockets
        .public
        .listen()
        .with_context(|| format!("QUOTA_LISTEN: cannot listen on {}", config.listen))?;
    let metrics_listener = sockets
        .metrics
        .map(BoundSocket::listen)
        .transpose()
        .context("QUOTA_METRICS_LISTEN: cannot listen")?;
    let grpc_listener = sockets
        .grpc
        .map(BoundSocket::listen)
        .transpose()
        .context("QUOTA_GRPC_LISTEN: cannot listen")?;
    let (stop_serving, stopping) = watch::channel(false);
    let until = |mut stopping: watch::Receiver<bool>| async move {
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    let public = tokio::spawn(serve(
        listener,
        router::public(&state),
        router::direct(&state),
        public_settings,
        until(stopping.clone()),
    ));
    let metrics = metrics_listener.map(|listener| {
        tokio::spawn(serve(
            listener,
            router::metrics(&state),
            None::<Infallible>,
            ServeSettings::metrics(&state),
            until(stopping.clone()),
        ))
    });
    let grpc = grpc_listener.map(|listener| {
        tokio::spawn(serve(
            listener,
            router::grpc(&state),
            None::<Infallible>,
            ServeSettings::grpc(&state),
            until(stopping),
        ))
    });
    tracing::info!(
        listen = %config.listen,
        metrics_listen = config.metrics_listen.map(tracing::field::display),
        grpc_listen = config.grpc_listen.map(tracing::field::display),
        public_url = config.public_url,
        "ready"
    );

    stop.await;
    tracing::info!("stopping");
    let stopping_at = Instant::now();
    state.begin_draining();
    tokio::time::sleep(config.drain_delay).await;
    let _ = stop_serving.send(true);
    public.await?;
    for other in [metrics, grpc].into_iter().flatten() {
        other.await?;
    }
    // Return unused tokens, so that other replicas can use them.
    let left = RETURN_TOKENS_WITHIN
        .saturating_sub(stopping_at.elapsed())
        .max(RETURN_TOKENS_MIN);
    let stop_traces = async {
        if let Some(traces) = &state.traces {
            traces.stop().await;
        }
    };
    let drain = tokio::time::timeout(left, state.limiter.drain());
    let (drained, ()) = tokio::join!(drain, stop_traces);
    match drained {
        Ok(drained) if drained.lost == 0 => {
            tracing::info!(tokens = drained.given_back, "unused quota tokens returned");
        }
        Ok(drained) => tracing::warn!(
            tokens = drained.lost,
            "some unused quota tokens could not be returned"
        ),
        Err(_) => tracing::warn!("unused tokens could not be returned in time"),
    }
    jobs.stop().await;
    state.db.close();
    tracing::info!("stopped");
    Ok(())
}
