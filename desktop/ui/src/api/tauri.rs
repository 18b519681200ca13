//! Calls within the desktop app: to the app, which makes the requests and alone holds the tokens.

use quota_common::{
    call::{Call, LIMIT_FIELDS},
    shell::{self, Answered, Refusal, Standing},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use wasm_bindgen::{JsValue, prelude::wasm_bindgen};

use super::{Answer, Failure, Tried};
use crate::shell as around;

#[wasm_bindgen]
extern "C" {
    #[wasm_bindgen(js_namespace = ["window", "__TAURI_INTERNALS__"], js_name = invoke, catch)]
    async fn invoke(command: &str, arguments: JsValue) -> Result<JsValue, JsValue>;
}

fn read<T: DeserializeOwned>(value: &JsValue) -> Option<T> {
    let text = js_sys::JSON::stringify(value).ok()?.as_string();
    // `undefined` has no text: an answer without anything in it.
    serde_json::from_str(text.as_deref().unwrap_or("null")).ok()
}

/// Asks the app; `arguments` is an object with those of the command.
async fn ask<T: DeserializeOwned>(command: &str, arguments: &impl Serialize) -> Answer<T> {
    let arguments = serde_json::to_string(arguments)
        .ok()
        .and_then(|text| js_sys::JSON::parse(&text).ok())
        .ok_or(Failure::Unreadable)?;
    match invoke(command, arguments).await {
        Ok(value) => read(&value).ok_or(Failure::Unreadable),
        Err(value) => Err(match read(&value) {
            Some(Refusal::Problem { problem }) => Failure::Problem(problem),
            Some(Refusal::Unreachable) => Failure::Unreachable,
            Some(Refusal::Unreadable) | None => Failure::Unreadable,
        }),
    }
}

/// The body of the answer.
pub async fn send(call: &Call) -> Answer<String> {
    let answer: Answer<Answered> = ask("call", &json!({ "call": call })).await;
    match &answer {
        Ok(answered) => around::heard(answered.loaded_at),
        Err(Failure::Unreachable) => {}
        // It is there, and says no.
        Err(_) => around::heard(None),
    }
    if matches!(call, Call::Login(_) | Call::Register(_)) {
        // Whether the session could be put into the keychain is known from now on.
        if let Ok(standing) = standing().await {
            around::stands(standing);
        }
    }
    answer.map(|answered| answered.body)
}

/// The app goes to servers over TLS, or to this machine.
pub const fn is_reachable_securely() -> bool {
    true
}

/// The server's address.
pub fn origin() -> String {
    around::current()
}

/// Sends a request as a consumer would: with the key and nothing of the session.
pub async fn try_key(key: &str) -> Answer<Tried> {
    let tried: shell::Tried = ask("try_key", &json!({ "key": key })).await?;
    let value = |name: &str| {
        let mut headers = tried.headers.iter();
        let (_, value) = headers.find(|(it, _)| it == name)?;
        Some(value.clone())
    };
    Ok(Tried {
        status: tried.status,
        headers: LIMIT_FIELDS
            .iter()
            .filter_map(|name| Some((*name, value(name)?)))
            .collect(),
    })
}

/// Puts text on the clipboard; whether that went well.
pub async fn copy(text: &str) -> bool {
    ask::<()>("copy", &json!({ "text": text })).await.is_ok()
}

pub async fn standing() -> Answer<Standing> {
    ask("standing", &json!({})).await
}

pub async fn add_server(address: &str, name: &str) -> Answer<Standing> {
    ask("add_server", &json!({ "address": address, "name": name })).await
}

pub async fn use_server(address: &str) -> Answer<Standing> {
    ask("use_server", &json!({ "address": address })).await
}

pub async fn forget_server(address: &str) -> Answer<Standing> {
    ask("forget_server", &json!({ "address": address })).await
}

/// Says that a person can begin.
pub async fn ready() {
    let _ = ask::<()>("ready", &json!({})).await;
}
