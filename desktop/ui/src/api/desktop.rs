//! Sends calls through the desktop app, which stores the tokens and makes the requests.

use quota_common::{
    call::{Call, LIMIT_FIELDS},
    ipc::{self, BillingPage, CallResponse, HostStatus},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use wasm_bindgen::{JsValue, prelude::wasm_bindgen};

use super::error::{CallError, CallResult, TestResponse};
use crate::host;

#[wasm_bindgen]
extern "C" {
    #[wasm_bindgen(js_namespace = ["window", "__TAURI_INTERNALS__"], js_name = invoke, catch)]
    async fn tauri_invoke(command: &str, arguments: JsValue) -> Result<JsValue, JsValue>;
}

fn parse<T: DeserializeOwned>(value: &JsValue) -> Option<T> {
    let json = js_sys::JSON::stringify(value).ok()?.as_string();
    // `JSON.stringify(undefined)` returns `undefined`. In that case, the command returned no value.
    serde_json::from_str(json.as_deref().unwrap_or("null")).ok()
}

/// Calls a command of the app. `arguments` must serialize to an object whose fields are the command's parameters.
async fn invoke<T: DeserializeOwned>(command: &str, arguments: &impl Serialize) -> CallResult<T> {
    let arguments = serde_json::to_string(arguments)
        .ok()
        .and_then(|json| js_sys::JSON::parse(&json).ok())
        .ok_or(CallError::Unreadable)?;
    match tauri_invoke(command, arguments).await {
        Ok(value) => parse(&value).ok_or(CallError::Unreadable),
        Err(value) => Err(match parse(&value) {
            Some(ipc::CallError::Problem { problem }) => CallError::Problem(problem),
            Some(ipc::CallError::Unreachable) => CallError::Unreachable,
            Some(ipc::CallError::NoResponse) => CallError::NoResponse,
            Some(ipc::CallError::Incomplete) => CallError::Incomplete,
            Some(ipc::CallError::NoBrowser) => CallError::NoBrowser,
            Some(ipc::CallError::Unreadable) | None => CallError::Unreadable,
        }),
    }
}

pub async fn send(call: &Call) -> CallResult<String> {
    let result: CallResult<CallResponse> = invoke("call", &json!({ "call": call })).await;
    match &result {
        Ok(response) => host::set_stored(response.stored),
        Err(CallError::Unreachable | CallError::NoResponse | CallError::Incomplete) => {}
        // Even an error response proves that the server is reachable.
        Err(_) => host::set_stored(None),
    }
    if matches!(call, Call::Login(_) | Call::Register(_)) {
        // At sign-in, the app finds out whether the keychain can store the session.
        if let Ok(status) = host_status().await {
            host::set_status(status);
        }
    }
    result.map(|response| response.body)
}

/// The app connects only over TLS or to the local computer, so sessions can always be stored.
pub const fn is_secure() -> bool {
    true
}

pub fn origin() -> String {
    host::server_address()
}

/// Sends a request as an API client would: with the key and without the session.
pub async fn try_key(key: &str) -> CallResult<TestResponse> {
    let response: ipc::TestResponse = invoke("try_key", &json!({ "key": key })).await?;
    let value = |name: &str| {
        let mut headers = response.headers.iter();
        let (_, value) = headers.find(|(it, _)| it == name)?;
        Some(value.clone())
    };
    Ok(TestResponse {
        status: response.status,
        headers: LIMIT_FIELDS
            .iter()
            .filter_map(|name| Some((*name, value(name)?)))
            .collect(),
        problem: response.problem,
    })
}

/// Copies text to the clipboard. Returns whether this succeeded.
pub async fn copy(text: &str) -> bool {
    invoke::<()>("copy", &json!({ "text": text })).await.is_ok()
}

/// Saves a file in the user's downloads folder and returns its path.
pub async fn save_file(name: &str, text: &str) -> CallResult<Option<String>> {
    invoke("save_file", &json!({ "name": name, "text": text }))
        .await
        .map(Some)
}

/// Shows a notification of the operating system, unless the window has focus.
pub async fn notify(text: &str) {
    // A failure does not matter, because a toast shows the same text.
    let _ = invoke::<()>("notify", &json!({ "text": text })).await;
}

pub async fn host_status() -> CallResult<HostStatus> {
    invoke("host_status", &json!({})).await
}

pub async fn add_server(address: &str, name: &str) -> CallResult<HostStatus> {
    invoke("add_server", &json!({ "address": address, "name": name })).await
}

pub async fn use_server(address: &str) -> CallResult<HostStatus> {
    invoke("use_server", &json!({ "address": address })).await
}

pub async fn forget_server(address: &str) -> CallResult<HostStatus> {
    invoke("forget_server", &json!({ "address": address })).await
}

/// Tells the app that the first page is ready for use.
pub async fn ready() {
    let _ = invoke::<()>("ready", &json!({})).await;
}

/// Quits the app without asking the user.
pub async fn quit() {
    let _ = invoke::<()>("quit", &json!({})).await;
}

/// Opens a Stripe page in the default browser.
pub async fn open_billing(page: BillingPage) -> CallResult<()> {
    invoke("open_billing", &json!({ "page": page })).await
}
