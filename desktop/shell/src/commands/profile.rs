//! The list of servers.

use quota_common::{
    FieldError, Problem, ProblemCode,
    shell::{Refusal, Standing},
};
use tauri::State;

use crate::{client::Client, server::Server, state::App};

#[tauri::command]
pub async fn standing(app: State<'_, App>) -> Result<Standing, Refusal> {
    app.standing().await
}

#[tauri::command]
pub async fn add_server(
    app: State<'_, App>,
    address: String,
    name: String,
) -> Result<Standing, Refusal> {
    let server = Server::parse(&address).map_err(|error| wrong(error.to_string()))?;
    if app.profiles.lock().is_full() {
        return Err(wrong("there is no room for another: remove one first"));
    }
    let client = Client::new(server.clone()).map_err(|_| Refusal::Unreachable)?;
    if !client.is_there().await {
        return Err(wrong(format!("no Quota server answers at {server}")));
    }
    app.profiles.lock().add(&server, &name);
    app.standing().await
}

#[tauri::command]
pub async fn use_server(app: State<'_, App>, address: String) -> Result<Standing, Refusal> {
    if !app.profiles.lock().choose(&address) {
        return Err(wrong("is not in the list"));
    }
    app.standing().await
}

#[tauri::command]
pub async fn forget_server(app: State<'_, App>, address: String) -> Result<Standing, Refusal> {
    if app.profiles.lock().has(&address) {
        let server = Server::parse(&address).map_err(|error| wrong(error.to_string()))?;
        app.forget(&server).await?;
        app.profiles.lock().remove(&address);
    }
    app.standing().await
}

/// Told like the server tells of a field that it refuses.
fn wrong(message: impl Into<String>) -> Refusal {
    let (code, message) = (ProblemCode::Invalid, message.into());
    Refusal::Problem {
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
