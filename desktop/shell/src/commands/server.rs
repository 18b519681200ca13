//! Commands that call the server in use.

use quota_common::{
    call::Call,
    ipc::{BillingPage, CallError, CallResponse, TestResponse},
};
use secrecy::SecretString;
use serde::Deserialize;
use tauri::{State, Url};
use tauri_plugin_opener::open_url;

use crate::{
    server::{Server, is_loopback},
    state::App,
};

#[tauri::command]
pub async fn call(app: State<'_, App>, call: Call) -> Result<CallResponse, CallError> {
    app.session()?.call(&call).await
}

#[tauri::command]
pub async fn try_key(app: State<'_, App>, key: SecretString) -> Result<TestResponse, CallError> {
    app.session()?.try_key(&key).await
}

/// A response with the URL of a Stripe page.
#[derive(Deserialize)]
struct Page {
    url: Url,
}

/// Opens a Stripe page in the default browser. The URL comes from the server; the console cannot choose it.
#[tauri::command]
pub async fn open_billing(state: State<'_, App>, page: BillingPage) -> Result<(), CallError> {
    let response = state.session()?.call(&page.call()).await?;
    let Page { url } = serde_json::from_str(&response.body).map_err(|_| CallError::Unreadable)?;
    if !may_open(&url, &state.server()?) {
        tracing::warn!(scheme = url.scheme(), "address not opened");
        return Err(CallError::Unreadable);
    }
    open_url(url, None::<&str>).map_err(|error| {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "cannot open the browser"
        );
        CallError::NoBrowser
    })
}

/// Returns whether a URL from a server may be opened. It must be an HTTPS URL, or an HTTP URL on this computer that
/// comes from a server on this computer.
fn may_open(url: &Url, server: &Server) -> bool {
    match url.scheme() {
        "https" => true,
        "http" => server.is_loopback() && is_loopback(url),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_web_pages_are_opened() {
        let opens = |url: &str, server: &str| {
            let server = Server::parse(server).expect("a server");
            may_open(&url.parse().expect("an address"), &server)
        };
        let (remote, local) = ("https://quota.example.com", "http://localhost:8080");
        for server in [remote, local] {
            assert!(opens("https://checkout.stripe.com/c/pay/cs_1#f", server));
            for url in [
                "http://checkout.stripe.com/c/pay/cs_1",
                "file:///etc/passwd",
                "mailto:a@example.com",
                "ssh://example.com",
                "javascript:alert(1)",
            ] {
                assert!(!opens(url, server), "{url} from {server}");
            }
        }
        let stand_in = "http://127.0.0.1:12111/pay/cs_1";
        assert!(opens(stand_in, local));
        assert!(!opens(stand_in, remote));
    }
}
