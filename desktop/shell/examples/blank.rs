//! Opens an empty window, to measure the cost of WebKit and Tauri without the app.

use tauri::{WebviewUrl, WebviewWindowBuilder, http::Response};

/// Like the console's first page, this page reports when it has been painted.
const PAGE: &str = "<!doctype html><title>blank</title><script>
requestAnimationFrame(() => requestAnimationFrame(() => { document.title = 'painted'; }));
</script>";

fn main() -> tauri::Result<()> {
    tauri::Builder::default()
        .register_uri_scheme_protocol("blank", |_, _| {
            let page = Response::builder().header("content-type", "text/html");
            page.body(PAGE.as_bytes()).unwrap_or_default()
        })
        .setup(|app| {
            let page = WebviewUrl::CustomProtocol("blank://localhost/".parse()?);
            WebviewWindowBuilder::new(app, "main", page)
                .inner_size(1280.0, 840.0)
                .on_document_title_changed(|_, title| {
                    if title == "painted" {
                        println!("first page painted");
                    }
                })
                .build()?;
            Ok(())
        })
        .run(tauri::generate_context!())
}
