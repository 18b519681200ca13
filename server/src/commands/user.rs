//! `quota user`.

use std::sync::Arc;

use anyhow::Context;
use clap::Subcommand;
use quota_server::{
    clock::SystemClock,
    config::{Config, Settings},
    db::Db,
    state::AppState,
    telemetry::log::Log,
};
use secrecy::{ExposeSecret, SecretString};

use super::{apply_migrations, with_database};

#[derive(Subcommand)]
pub enum UserCommand {
    /// Create a user with their own tenant. The password is read from standard input
    Create {
        #[command(flatten)]
        settings: Box<Settings>,
        /// The email address to sign in with
        email: String,
        /// The tenant's name. Default: the part of the email address before the @
        #[arg(long)]
        tenant: Option<String>,
    },
    /// Set a user's password, which is read from standard input, and revoke the user's sessions
    SetPassword {
        #[command(flatten)]
        settings: Box<Settings>,
        /// The email address of the user
        email: String,
    },
    /// List users and their tenants
    List {
        #[command(flatten)]
        settings: Box<Settings>,
    },
}

impl UserCommand {
    pub fn settings(&self) -> &Settings {
        match self {
            Self::Create { settings, .. }
            | Self::SetPassword { settings, .. }
            | Self::List { settings } => settings,
        }
    }
}

pub async fn run(config: Config, log: Log, command: UserCommand) -> anyhow::Result<()> {
    with_database(&config, async |url| {
        apply_migrations(url).await?;
        let db = Db::new(url, &config.database);
        let state = AppState::new(config.clone(), db, Arc::new(SystemClock::new()), log).await?;
        match command {
            UserCommand::Create { email, tenant, .. } => {
                let password = read_password()?;
                let (user, tenant) = state
                    .accounts
                    .create(&email, password.expose_secret(), tenant.as_deref())
                    .await?;
                println!("created user {user} with tenant {tenant}");
            }
            UserCommand::SetPassword { email, .. } => {
                let password = read_password()?;
                state
                    .accounts
                    .reset_password(&email, password.expose_secret())
                    .await?;
                println!("password set; all of the user's sessions were revoked");
            }
            UserCommand::List { .. } => {
                for (email, tenant, role) in state.accounts.list().await? {
                    println!("{email}\t{role}\t{tenant}");
                }
            }
        }
        Ok(())
    })
    .await
}

/// Reads the first line of standard input. Passwords are not read from the command line, which all users of the machine
/// can see.
fn read_password() -> anyhow::Result<SecretString> {
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .context("cannot read the password from standard input")?;
    Ok(SecretString::from(line.trim_end_matches(['\n', '\r'])))
}
