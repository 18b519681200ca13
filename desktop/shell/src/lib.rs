//! Quota's console as a desktop app.
//!
//! The window shows the console, which is embedded in the app. The console passes its calls to [`commands`]. [`client`]
//! and [`session`] make the requests; these two modules do not depend on Tauri. The console never sees the session's
//! tokens, cannot navigate to other sites or open windows, and can call only the commands listed in
//! `capabilities/main.json`.

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

/// Approximately when the process started.
static STARTED: OnceLock<Instant> = OnceLock::new();

#[derive(Debug, Parser)]
#[command(
    name = "quota-desktop",
    version,
    about = "The Quota console as a desktop app"
)]
struct Arguments {
    /// Add this server and use it, for example `https://quota.example.com`
    #[arg(long, value_name = "ADDRESS", value_parser = server::Server::parse)]
    server: Option<server::Server>,
}

/// Returns the server in the arguments of a second launch. The first argument is the name of the program.
fn requested_server(arguments: &[String]) -> Option<server::Server> {
    Arguments::try_parse_from(arguments).ok()?.server
}

pub fn run() -> ExitCode {
    STARTED.get_or_init(Instant::now);
    let Arguments { server } = Arguments::parse();
    let app = tauri::Builder::default()
        // This plugin must come first, so that a second instance detects the running instance before it does anything
        // else.
        .plugin(tauri_plugin_single_instance::init(|app, arguments, _| {
            window::on_second_instance(app, requested_server(&arguments));
        }))
        .plugin(tauri_plugin_window_state::Builder::new().build())
        .invoke_handler(tauri::generate_handler![
            commands::server::call,
            commands::server::try_key,
            commands::server::open_billing,
            commands::profile::host_status,
            commands::profile::add_server,
            commands::profile::use_server,
            commands::profile::forget_server,
            commands::system::copy,
            commands::system::save_file,
            commands::notification::notify,
            commands::system::ready,
            commands::system::quit,
        ])
        .setup(move |app| {
            let paths = app.path();
            log::start(&paths.app_log_dir()?);
            let state = state::App::new(&paths.app_config_dir()?, &paths.app_data_dir()?)?;
            if let Some(server) = &server {
                state.profiles.lock().add_and_select(server);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_launch_accepts_the_arguments_of_a_first_launch() {
        let requested = |arguments: &[&str]| {
            let program = ["quota-desktop"].iter().chain(arguments);
            let all: Vec<String> = program.map(|it| (*it).to_owned()).collect();
            requested_server(&all).map(|it| it.to_string())
        };
        let expected = Some("https://quota.example.com".to_owned());
        assert_eq!(requested(&["--server", "quota.example.com"]), expected);
        assert_eq!(requested(&["--server=quota.example.com"]), expected);
        assert_eq!(requested(&[]), None);
    }
}
