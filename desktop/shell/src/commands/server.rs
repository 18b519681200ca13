//! Calls to the server in use.

use quota_common::{
    call::Call,
    ipc::{CallError, CallResponse, TestResponse},
};
use secrecy::SecretString;
use tauri::State;

use crate::state::App;

#[tauri::command]
pub async fn call(app: State<'_, App>, call: Call) -> Result<CallResponse, CallError> {
    app.session()?.call(&call).await
}

#[tauri::command]
pub async fn try_key(app: State<'_, App>, key: SecretString) -> Result<TestResponse, CallError> {
    app.session()?.try_key(&key).await
}
