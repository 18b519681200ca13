//! The `quota` binary: its command line.

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use quota_server::{
    config::{self, Config, Settings},
    health_check::Probe,
    heap, openapi,
    telemetry::log::Log,
};

use self::commands::{
    billing, billing::BillingCommand, loadtest, loadtest::LoadTest, serve, usage,
    usage::UsageCommand, user, user::UserCommand,
};

#[derive(Parser)]
#[command(
    name = "quota",
    version,
    about = "Self-hosted API keys, plans, rate limits and quotas"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the server, with a private PostgreSQL if DATABASE_URL is not set
    Serve {
        #[command(flatten)]
        settings: Box<Settings>,
        /// Create a demo tenant with a plan, a key and a service token if they do not exist, and print them with a
        /// command to try
        #[arg(long)]
        demo: bool,
    },
    /// Apply pending migrations and exit
    Migrate {
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Check the health of the server on this machine. Exits with 0 if it is healthy, otherwise with 1
    Health {
        #[command(flatten)]
        settings: Box<Settings>,
        /// Check only whether the process responds
        #[arg(long, conflicts_with = "serving")]
        live: bool,
        /// Check whether the server serves requests, which it does even while PostgreSQL is unreachable
        #[arg(long)]
        serving: bool,
    },
    /// Check the settings and dependencies, and exit
    Doctor {
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Manage accounts
    #[command(subcommand)]
    User(UserCommand),
    /// Set up and check billing through Stripe
    #[command(subcommand)]
    Billing(BillingCommand),
    /// Show the tenants and keys with the most requests, and usage that replicas have not shipped yet
    #[command(args_conflicts_with_subcommands = true)]
    Usage {
        #[command(subcommand)]
        command: Option<UsageCommand>,
        #[command(flatten)]
        settings: Box<Settings>,
        /// Number of hours to look back
        #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u16).range(1..=8760))]
        hours: u16,
        /// Number of tenants and keys to list
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
        top: u16,
    },
    /// Send requests to a running installation at a fixed rate, and compare the allowed requests with the rate limits
    Loadtest(LoadTest),
    /// Print the OpenAPI document
    Openapi,
    /// Print every setting with its default and description, as in .env.example
    EnvExample,
}

fn main() -> ExitCode {
    heap::configure();
    let done = match Cli::parse().command {
        Command::Openapi => {
            print!("{}", openapi::text());
            Ok(())
        }
        Command::EnvExample => {
            print!("{}", config::env_example());
            Ok(())
        }
        Command::Loadtest(test) => runtime().and_then(|it| it.block_on(loadtest::run(test))),
        Command::Serve { settings, demo } => {
            run(&settings, |config, log| serve::run(config, log, demo))
        }
        Command::Migrate { settings } => run(&settings, commands::migrate),
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
        Command::Doctor { settings } => run(&settings, commands::doctor),
        Command::Usage {
            command:
                Some(UsageCommand::Replay {
                    settings,
                    directory,
                }),
            ..
        } => run(&settings, move |config, log| {
            usage::replay(config, log, directory)
        }),
        Command::Usage {
            command:
                Some(UsageCommand::Forget {
                    settings,
                    directory_id,
                }),
            ..
        } => run(&settings, move |config, _| {
            usage::forget(config, directory_id)
        }),
        Command::Usage {
            command: None,
            settings,
            hours,
            top,
        } => run(&settings, move |config, _| {
            usage::report(config, hours, top)
        }),
        Command::Billing(command) => {
            let settings = command.settings().clone();
            run(&settings, move |config, log| {
                billing::run(config, log, command)
            })
        }
        Command::User(command) => {
            let settings = command.settings().clone();
            run(&settings, move |config, log| {
                user::run(config, log, command)
            })
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

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    Ok(builder.enable_all().build()?)
}

/// Reads the settings, starts the log and the runtime, and runs a command.
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
            let errors = read.err().map(|errors| errors.0).unwrap_or_default();
            for error in errors.iter().chain(&unknown) {
                eprintln!("{error}");
            }
            anyhow::bail!("invalid settings");
        }
    };
    let log = Log::start(config.log_format);
    log.install(&config.log)?;
    let runtime = runtime()?;
    let done = runtime.block_on(command(config, log.clone()));
    log.stop();
    done
}
