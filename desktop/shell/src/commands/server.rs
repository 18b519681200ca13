//! Calls to the server in use.

use quota_common::{
    call::Call,
    shell::{Answered, Refusal, Tried},
};
use secrecy::SecretString;
use tauri::State;

use crate::state::App;

#[tauri::command]
pub async fn call(app: State<'_, App>, call: Call) -> Result<Answered, Refusal> {
    app.session()?.call(&call).await
}

#[tauri::command]
pub async fn try_key(app: State<'_, App>, key: SecretString) -> Result<Tried, Refusal> {
    app.session()?.try_key(&key).await
}
