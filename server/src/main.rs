//! `quota`: the one binary.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::{Parser, Subcommand};
use quota_server::{
    clock::{Clock, SystemClock},
    config::{self, Config, LogFormat, Settings},
    db::{self, Db, embedded::EmbeddedPostgres},
    demo,
    doctor::{self, Report},
    file_limit,
    health_check::Probe,
    jobs::Jobs,
    metering, openapi, router,
    serve::{self, BoundSocket, ServeSettings, serve},
    state::AppState,
    telemetry::log::Log,
    usage_report,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// From SIGTERM to when unused quota tokens must have been returned; the rest of 30 s is for the end itself.
const DRAINED_WITHIN: Duration = Duration::from_secs(25);
/// The time for that where requests in flight took all of it.
const DRAIN_MIN: Duration = Duration::from_millis(1500);

#[derive(Parser)]
#[command(
    name = "quota",
    version,
    about = "API keys, plans, rate limits and quotas on your own machines"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the server. Without DATABASE_URL it runs a PostgreSQL of its own
    Serve {
        #[command(flatten)]
        settings: Box<Settings>,
        /// Make a tenant, plan, key and service token once, and print them with a line to try
        #[arg(long)]
        demo: bool,
    },
    /// Apply the pending migrations, and end
    Migrate {
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Ask the server on this machine for its health. Exits with 0 if it is healthy, otherwise with 1
    Health {
        #[command(flatten)]
        settings: Box<Settings>,
        /// Ask only whether the process responds
        #[arg(long, conflicts_with = "serving")]
        live: bool,
        /// Ask whether it serves requests, which it does while PostgreSQL is unreachable
        #[arg(long)]
        serving: bool,
    },
    /// Check the settings and what the server depends on, and end
    Doctor {
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Accounts, for the operator
    #[command(subcommand)]
    User(UserCommand),
    /// Show the tenants and keys with the most requests, and what servers have not delivered yet
    #[command(args_conflicts_with_subcommands = true)]
    Usage {
        #[command(subcommand)]
        command: Option<UsageCommand>,
        #[command(flatten)]
        settings: Box<Settings>,
        /// Hours to look back
        #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u16).range(1..=8760))]
        hours: u16,
        /// Tenants and keys to list
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
        top: u16,
    },
    /// Print the OpenAPI document
    Openapi,
    /// Print every setting with its default and meaning, as .env.example has them
    EnvExample,
}

#[derive(Subcommand)]
enum UserCommand {
    /// Create a user with a tenant of their own; the password is read from standard input
    Create {
        #[command(flatten)]
        settings: Box<Settings>,
        /// The address to sign in with
        email: String,
        /// The tenant's name. Default: the address's part before the @
        #[arg(long)]
        tenant: Option<String>,
    },
    /// Set a user's password, read from standard input, and end their sessions
    SetPassword {
        #[command(flatten)]
        settings: Box<Settings>,
        /// The address that the user signs in with
        email: String,
    },
    /// List users and their tenants
    List {
        #[command(flatten)]
        settings: Box<Settings>,
    },
}

#[derive(Subcommand)]
enum UsageCommand {
    /// Write the usage that a replica has left behind to PostgreSQL. For a replica that does not come back: one that
    /// starts with the same QUOTA_DATA_DIR does this by itself. Running it twice, or while the replica runs, counts
    /// nothing twice
    Replay {
        #[command(flatten)]
        settings: Box<Settings>,
        /// A replica's directory in `usage`, or the `usage` directory itself for all of them
        directory: PathBuf,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Openapi => {
            print!("{}", openapi::text());
            Ok(())
        }
        Command::EnvExample => {
            print!("{}", config::env_example());
            Ok(())
        }
        Command::Serve { settings, demo } => {
            run(&settings, |config, log| serve_until_told(config, log, demo))
        }
        Command::Migrate { settings } => run(&settings, migrate),
        Command::Health {
            settings,
            live,
            serving,
        } => run(&settings, |config, _log| {
            let probe = match (live, serving) {
                (true, _) => Probe::Live,
                (_, true) => Probe::Serving,
                _ => Probe::Ready,
            };
            async move { probe.check(config.listen).await }
        }),
        Command::Doctor { settings } => run(&settings, doctor),
        Command::Usage {
            command:
                Some(UsageCommand::Replay {
                    settings,
                    directory,
                }),
            ..
        } => run(&settings, move |config, log| {
            replay_usage(config, log, directory)
        }),
        Command::Usage {
            command: None,
            settings,
            hours,
            top,
        } => run(&settings, move |config, _| usage(config, hours, top)),
        Command::User(command) => {
            let settings = match &command {
                UserCommand::Create { settings, .. }
                | UserCommand::SetPassword { settings, .. }
                | UserCommand::List { settings } => settings.clone(),
            };
            run(&settings, move |config, log| user(config, log, command))
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quota: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Reads the settings, starts the log and tokio, and runs.
fn run<F>(settings: &Settings, command: impl FnOnce(Config, Log) -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| {
            let value = value.to_string_lossy().into_owned();
            Some((name.into_string().ok()?, value))
        })
        .collect::<Vec<_>>();
    let unknown = config::unknown_variables(variables);
    let config = match Config::read(settings) {
        Ok(config) if unknown.is_empty() => config,
        read => {
            let faults = read.err().map(|faults| faults.0).unwrap_or_default();
            for fault in faults.iter().chain(&unknown) {
                eprintln!("{fault}");
            }
            anyhow::bail!("the settings are not valid; nothing was started");
        }
    };
    let log = Log::start(config.log_format);
    log.install(&config.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let done = runtime.block_on(command(config, log.clone()));
    log.stop();
    done
}

/// The database that the settings name, or the embedded one.
async fn database(config: &Config) -> anyhow::Result<(SecretString, Option<EmbeddedPostgres>)> {
    if let Some(url) = &config.database_url {
        Ok((url.clone(), None))
    } else {
        let embedded = EmbeddedPostgres::start(&config.data_dir).await?;
        Ok((SecretString::from(embedded.database_url()), Some(embedded)))
    }
}

/// Applies what is pending, waiting a while for a database that is just starting.
async fn apply_migrations(url: &SecretString) -> anyhow::Result<()> {
    let patience = Instant::now() + Duration::from_secs(30);
    loop {
        match db::migrate(url).await {
            Ok(applied) => {
                for version in applied {
                    tracing::info!(version, "applied a migration");
                }
                return Ok(());
            }
            Err(db::MigrateError::Connect(error)) if Instant::now() < patience => {
                tracing::warn!(error = %db::chain(&error), "PostgreSQL cannot be reached yet");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => anyhow::bail!("{}", db::chain(&error)),
        }
    }
}

/// Ends when the operator or the terminal says so. Listens from the call on, not from the first poll: a stop that
/// comes in between would end the process as if nobody listened.
fn told_to_stop() -> impl Future<Output = ()> {
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

async fn serve_until_told(mut config: Config, log: Log, with_demo: bool) -> anyhow::Result<()> {
    let file_limit = file_limit::raise();
    // Listened for from the first moment on, so that a stop during a slow start is a clean one.
    let mut stop = std::pin::pin!(told_to_stop());
    // Before the database is touched: a port that is in use is the most common mistake.
    let sockets = Sockets {
        public: serve::bind(config.listen)
            .with_context(|| format!("QUOTA_LISTEN: cannot listen on {}", config.listen))?,
        metrics: config
            .metrics_listen
            .map(|addr| {
                serve::bind(addr)
                    .with_context(|| format!("QUOTA_METRICS_LISTEN: cannot listen on {addr}"))
            })
            .transpose()?,
    };
    let metrics_listen = sockets.metrics.as_ref().map(BoundSocket::local_addr);
    config.listens_on(sockets.public.local_addr()?, metrics_listen.transpose()?);
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

/// The addresses that the server will listen on.
struct Sockets {
    public: BoundSocket,
    metrics: Option<BoundSocket>,
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
    doctor::warn_of_too_many_connections(config, url).await;
    if with_demo {
        let shown = demo::make_once(&state).await?;
        if config.log_format == LogFormat::Json {
            tracing::info!("made the demo");
        }
        println!("{shown}");
    }

    let public_settings = ServeSettings::public(&state, file_limit);
    // Only now: until it can decide, a server must not accept connections.
    let listener = sockets
        .public
        .listen()
        .with_context(|| format!("QUOTA_LISTEN: cannot listen on {}", config.listen))?;
    let metrics_listener = sockets
        .metrics
        .map(BoundSocket::listen)
        .transpose()
        .context("QUOTA_METRICS_LISTEN: cannot listen")?;
    let (stop_serving, stopping) = watch::channel(false);
    let until = |mut stopping: watch::Receiver<bool>| async move {
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    let public = tokio::spawn(serve(
        listener,
        router::public(&state),
        public_settings,
        until(stopping.clone()),
    ));
    let metrics = metrics_listener.map(|listener| {
        tokio::spawn(serve(
            listener,
            router::metrics(&state),
            ServeSettings::metrics(&state),
            until(stopping),
        ))
    });
    let metrics_listen = config.metrics_listen.map(tracing::field::display);
    tracing::info!(listen = %config.listen, metrics_listen, public_url = config.public_url, "ready");

    stop.await;
    tracing::info!("stopping");
    let stopping_at = Instant::now();
    state.drain();
    tokio::time::sleep(config.drain_delay).await;
    let _ = stop_serving.send(true);
    public.await?;
    if let Some(metrics) = metrics {
        metrics.await?;
    }
    // Unused tokens go back, so that other servers can hand them out.
    let left = DRAINED_WITHIN
        .saturating_sub(stopping_at.elapsed())
        .max(DRAIN_MIN);
    match tokio::time::timeout(left, state.limiter.drain()).await {
        Ok(drained) if drained.lost == 0 => {
            tracing::info!(tokens = drained.given_back, "returned unused quota tokens");
        }
        Ok(drained) => tracing::warn!(
            tokens = drained.lost,
            "some unused quota tokens could not be returned"
        ),
        Err(_) => tracing::warn!("unused quota tokens could not be returned in time"),
    }
    jobs.stop().await;
    state.db.close();
    tracing::info!("stopped");
    Ok(())
}

async fn migrate(config: Config, _log: Log) -> anyhow::Result<()> {
    let (url, embedded) = database(&config).await?;
    let applied = apply_migrations(&url).await;
    if let Some(embedded) = embedded {
        embedded.stop().await;
    }
    applied
}

/// Says of each thing that the server depends on whether it is as it should be.
async fn doctor(config: Config, _log: Log) -> anyhow::Result<()> {
    let mut report = Report::default();
    report.fine("settings", "valid");
    report.addresses(&config).await;
    report.connections(&config);
    match database(&config).await {
        Err(error) => report.fault("database", format!("{error:#}")),
        Ok((url, embedded)) => {
            report.dependencies(&config, &url).await;
            if let Some(embedded) = embedded {
                embedded.stop().await;
            }
        }
    }
    print!("{}", report.text);
    anyhow::ensure!(
        report.faults == 0,
        "{} of these need mending",
        report.faults
    );
    Ok(())
}

/// Prints what is recorded, and what is not yet.
async fn usage(config: Config, hours: u16, top: u16) -> anyhow::Result<()> {
    let (url, embedded) = database(&config).await?;
    let report = usage_report::report(&Db::new(&url, &config.database), hours, top).await;
    if let Some(embedded) = embedded {
        embedded.stop().await;
    }
    match report {
        Ok(report) => print!("{report}"),
        Err(error) => anyhow::bail!("cannot read usage: {}", db::chain(&error)),
    }
    Ok(())
}

async fn replay_usage(config: Config, _log: Log, directory: PathBuf) -> anyhow::Result<()> {
    let directories = metering::directories(&directory)
        .with_context(|| format!("cannot read {}", directory.display()))?;
    anyhow::ensure!(
        !directories.is_empty(),
        "{} is not a directory of usage",
        directory.display()
    );
    let (url, embedded) = database(&config).await?;
    let done = async {
        apply_migrations(&url).await?;
        let db = Db::new(&url, &config.database);
        for directory in directories {
            let replayed = replay_patiently(&config, &db, &directory).await?;
            let rest = if replayed.is_owned {
                ", the rest by the process that is using it"
            } else {
                ""
            };
            println!(
                "{}: {} records written{rest}",
                directory.display(),
                replayed.records
            );
        }
        anyhow::Ok(())
    };
    let done = done.await;
    if let Some(embedded) = embedded {
        embedded.stop().await;
    }
    done
}

/// The directory's owner, or another replay, may hold the cursor for longer than a lock is waited for.
async fn replay_patiently(
    config: &Config,
    db: &Db,
    directory: &Path,
) -> anyhow::Result<metering::Replayed> {
    let patience = Instant::now() + Duration::from_secs(30);
    loop {
        match metering::replay(config, db, directory).await {
            Ok(replayed) => return Ok(replayed),
            Err(metering::ShipError::Database(db::DbError::Unavailable(error)))
                if Instant::now() < patience =>
            {
                tracing::warn!(error = %db::chain(error.as_ref()), "PostgreSQL does not take usage now; trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => anyhow::bail!("{}", db::chain(&error)),
        }
    }
}

async fn user(config: Config, log: Log, command: UserCommand) -> anyhow::Result<()> {
    let (url, embedded) = database(&config).await?;
    let done = async {
        apply_migrations(&url).await?;
        let db = Db::new(&url, &config.database);
        let state = AppState::new(config.clone(), db, Arc::new(SystemClock::new()), log).await?;
        match command {
            UserCommand::Create { email, tenant, .. } => {
                let password = read_password()?;
                let made = state
                    .accounts
                    .create(&email, password.expose_secret(), tenant.as_deref())
                    .await?;
                println!("user {} of tenant {}", made.0, made.1);
            }
            UserCommand::SetPassword { email, .. } => {
                let password = read_password()?;
                state
                    .accounts
                    .reset_password(&email, password.expose_secret())
                    .await?;
                println!("set; their sessions have ended");
            }
            UserCommand::List { .. } => {
                for (email, tenant, role) in state.accounts.list().await? {
                    println!("{email}\t{role}\t{tenant}");
                }
            }
        }
        anyhow::Ok(())
    };
    let done = done.await;
    if let Some(embedded) = embedded {
        embedded.stop().await;
    }
    done
}

/// The first line of standard input: an argument would be seen by everyone on the machine.
fn read_password() -> anyhow::Result<SecretString> {
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .context("cannot read the password from standard input")?;
    Ok(SecretString::from(line.trim_end_matches(['\n', '\r'])))
}
