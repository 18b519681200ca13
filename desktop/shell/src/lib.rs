//! Quota's console as a desktop app.
//!
//! The page in the window is the console's own, embedded here. It hands its calls to [`commands`]; the requests are
//! made here, by [`client`] and [`session`], which know nothing of Tauri. The page never holds a token, goes nowhere
//! else, opens no window, and may ask for nothing but what `capabilities/main.json` names.

pub mod client;
mod commands;
pub mod keychain;
mod log;
mod menu;
mod profile;
pub mod server;
pub mod session;
mod state;
mod window;

use std::{process::ExitCode, sync::OnceLock, time::Instant};

use clap::Parser;
use tauri::Manager as _;

/// When the process began, as near as we can tell.
static BEGAN: OnceLock<Instant> = OnceLock::new();

#[derive(Debug, Parser)]
#[command(name = "quota-desktop", version, about = "Quota's console")]
struct Arguments {
    /// Add this server to the list and use it, such as https://quota.example.com
    #[arg(long, value_name = "ADDRESS", value_parser = server::Server::parse)]
    server: Option<server::Server>,
}

pub fn run() -> ExitCode {
    BEGAN.get_or_init(Instant::now);
    let Arguments { server } = Arguments::parse();
    let app = tauri::Builder::default()
        // First, so that a second start does nothing before it finds the first.
        .plugin(tauri_plugin_single_instance::init(|app, arguments, _| {
            window::started_again(app, &arguments);
        }))
        .plugin(tauri_plugin_window_state::Builder::new().build())
        .invoke_handler(tauri::generate_handler![
            commands::server::call,
            commands::server::try_key,
            commands::profile::standing,
            commands::profile::add_server,
            commands::profile::use_server,
            commands::profile::forget_server,
            commands::system::copy,
            commands::system::ready,
        ])
        .setup(move |app| {
            let paths = app.path();
            log::begin(&paths.app_log_dir()?);
            let state = state::App::new(&paths.app_config_dir()?, &paths.app_data_dir()?)?;
            if let Some(server) = &server {
                state.profiles.lock().add_and_choose(server);
            }
            app.manage(state);
            menu::set(app.handle())?;
            window::open(app.handle())?;
            tracing::info!(version = env!("CARGO_PKG_VERSION"), "started");
            Ok(())
        })
        .run(tauri::generate_context!());
    match app {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "could not start");
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
