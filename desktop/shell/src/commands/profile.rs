//! Commands for the list of servers.

use quota_common::{
    FieldError, Problem, ProblemCode,
    ipc::{CallError, HostStatus},
};
use tauri::State;

use crate::{client::Client, server::Server, state::App};

#[tauri::command]
pub async fn host_status(app: State<'_, App>) -> Result<HostStatus, CallError> {
    app.host_status().await
}

#[tauri::command]
pub async fn add_server(
    app: State<'_, App>,
    address: String,
    name: String,
) -> Result<HostStatus, CallError> {
    let server = Server::parse(&address).map_err(|error| invalid(error.to_string()))?;
    if app.profiles.lock().is_full() {
        return Err(invalid("The list is full. Remove a server first."));
    }
    let client = Client::new(server.clone()).map_err(|_| CallError::Unreachable)?;
    if !client.is_quota_server().await {
        return Err(invalid(format!("No Quota server found at {server}")));
    }
    app.profiles.lock().add(&server, &name);
    app.host_status().await
}

#[tauri::command]
pub async fn use_server(app: State<'_, App>, address: String) -> Result<HostStatus, CallError> {
    if !app.profiles.lock().select(&address) {
        return Err(invalid("This server is not in the list"));
    }
    app.host_status().await
}

#[tauri::command]
pub async fn forget_server(app: State<'_, App>, address: String) -> Result<HostStatus, CallError> {
    if app.profiles.lock().has(&address) {
        let server = Server::parse(&address).map_err(|error| invalid(error.to_string()))?;
        app.forget(&server).await?;
        app.profiles.lock().remove(&address);
    }
    app.host_status().await
}

/// Returns a validation error for the address field, in the same form as the server's errors.
fn invalid(message: impl Into<String>) -> CallError {
    let (code, message) = (ProblemCode::Invalid, message.into());
    CallError::Problem {
        problem: Box::new(Problem {
            kind: code.type_uri("").into_owned(),
            title: code.title().to_owned(),
            status: code.status(),
            detail: message.clone(),
            request_id: String::new(),
            errors: vec![FieldError {
                field: "server_address".to_owned(),
                message,
            }],
            violated_policies: Vec::new(),
        }),
    }
}
