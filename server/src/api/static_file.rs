//! Files that are the same for every client. A client does not download a file again if it already has the current
//! version. All connections share one copy of a file's content in memory. The content is compressed at most once.

use std::{fmt::Write as _, io::Write as _, sync::Arc};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use poem::{
    Response,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    web::headers::{ETag, HeaderMapExt as _, IfNoneMatch},
};
use tokio::{sync::OnceCell, task};

use super::content_coding::{Coding, choose_coding, write_coding};

pub(super) struct StaticFile {
    plain: Bytes,
    gzip: Arc<OnceCell<Bytes>>,
    /// A hash of the content.
    hash: String,
    media_type: &'static str,
    cache: &'static str,
    csp: &'static str,
}

impl StaticFile {
    pub(super) fn new(
        content: String,
        media_type: &'static str,
        cache: &'static str,
        csp: &'static str,
    ) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, content.as_bytes());
        let mut hash = String::new();
        for byte in digest.as_ref().iter().take(16) {
            // Writing to memory does not fail.
            let _ = write!(hash, "{byte:02x}");
        }
        Self {
            hash,
            plain: content.into(),
            gzip: Arc::default(),
            media_type,
            cache,
            csp,
        }
    }

    /// Returns the response to a request with these header fields.
    pub(super) async fn respond(&self, request: &HeaderMap) -> Response {
        let (coding, body) = match choose_coding(request, &[Coding::Gzip]) {
            Coding::Gzip => self.gzip().await,
            Coding::Brotli | Coding::Identity => None,
        }
        .map_or_else(
            || (Coding::Identity, self.plain.clone()),
            |compressed| (Coding::Gzip, compressed),
        );
        let tag = format!("\"{}-{}\"", self.hash, coding.name());
        let tag = tag.parse::<ETag>().ok();
        let is_known = request
            .typed_get::<IfNoneMatch>()
            .zip(tag.as_ref())
            .is_some_and(|(known, tag)| !known.precondition_passes(tag));
        let mut response = respond(body, self.media_type, self.cache, self.csp);
        if is_known {
            response.set_status(StatusCode::NOT_MODIFIED);
            response.set_body(());
        }
        let headers = response.headers_mut();
        write_coding(coding, headers);
        if let Some(tag) = tag {
            headers.typed_insert(tag);
        }
        response
    }

    /// Returns the compressed content, or `None` if the server stops during the compression.
    async fn gzip(&self) -> Option<Bytes> {
        if let Some(known) = self.gzip.get() {
            return Some(known.clone());
        }
        let (gzip, plain) = (self.gzip.clone(), self.plain.clone());
        // Compress in a separate task, which continues if the request is canceled. Otherwise, clients that disconnect
        // immediately could start any number of compressions.
        let compressing = task::spawn(async move {
            let compressed = gzip.get_or_try_init(|| compress_aside(plain)).await;
            compressed.ok().cloned()
        });
        compressing.await.ok().flatten()
    }
}

/// Compresses on another thread. On this thread, the compression would block other tasks for many milliseconds.
#[expect(
    clippy::disallowed_methods,
    reason = "at most one call per file at a time, until one succeeds"
)]
fn compress_aside(content: Bytes) -> task::JoinHandle<Bytes> {
    task::spawn_blocking(move || compress(&content))
}

fn compress(content: &[u8]) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    // Writing to memory does not fail.
    let _ = encoder.write_all(content);
    encoder.finish().unwrap_or_default().into()
}

pub(super) fn respond(
    body: impl Into<poem::Body>,
    media_type: &'static str,
    cache: &'static str,
    csp: &'static str,
) -> Response {
    let mut response = Response::builder().body(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(cache));
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(csp),
    );
    response
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, time::Duration};

    use flate2::read::GzDecoder;

    use super::*;

    fn fields(fields: &[(header::HeaderName, &HeaderValue)]) -> HeaderMap {
        let fields = fields.iter();
        fields
            .map(|(name, value)| (name.clone(), (*value).clone()))
            .collect()
    }

    #[tokio::test]
    async fn client_gets_the_file_compressed_and_only_once() {
        let text = "the same for everyone\n".repeat(100);
        let file = StaticFile::new(text.clone(), "text/plain", "no-cache", "default-src 'none'");
        let gzip = HeaderValue::from_static("gzip, br");

        let plain = file.respond(&HeaderMap::new()).await;
        assert!(!plain.headers().contains_key(header::CONTENT_ENCODING));
        let plain_tag = plain.headers()[header::ETAG].clone();
        assert_eq!(plain.into_body().into_string().await.unwrap(), text);

        let accepted = fields(&[(header::ACCEPT_ENCODING, &gzip)]);
        let compressed = file.respond(&accepted).await;
        assert_eq!(compressed.headers()[header::CONTENT_ENCODING], "gzip");
        assert_eq!(compressed.headers()[header::VARY], "accept-encoding");
        let gzip_tag = compressed.headers()[header::ETAG].clone();
        assert_ne!(gzip_tag, plain_tag);
        let body = compressed.into_body().into_bytes().await.unwrap();
        let mut decompressed = String::new();
        let mut decoder = GzDecoder::new(&*body);
        decoder.read_to_string(&mut decompressed).unwrap();
        assert_eq!(decompressed, text);
        let again = file.respond(&accepted).await.into_body();
        let again = again.into_bytes().await.unwrap();
        assert_eq!(again.as_ptr(), body.as_ptr(), "it was compressed again");

        let known = fields(&[
            (header::ACCEPT_ENCODING, &gzip),
            (header::IF_NONE_MATCH, &gzip_tag),
        ]);
        let known = file.respond(&known).await;
        assert_eq!(known.status(), StatusCode::NOT_MODIFIED);
        assert_eq!(known.headers()[header::ETAG], gzip_tag);
        assert!(known.into_body().into_bytes().await.unwrap().is_empty());
        // The client has the file in another coding, or another version of the file.
        for tag in [gzip_tag, HeaderValue::from_static("\"another\"")] {
            let other = fields(&[(header::IF_NONE_MATCH, &tag)]);
            assert_eq!(file.respond(&other).await.status(), StatusCode::OK);
        }
    }

    /// If a compression ended with the request that started it, each abandoned request would start another compression.
    #[tokio::test]
    async fn compression_outlives_the_request_that_started_it() {
        let file = StaticFile::new("text".to_owned(), "text/plain", "no-cache", "");
        let gzip = HeaderValue::from_static("gzip");
        let accepted = fields(&[(header::ACCEPT_ENCODING, &gzip)]);
        let mut abandoned = Box::pin(file.respond(&accepted));
        assert!(futures_util::poll!(abandoned.as_mut()).is_pending());
        drop(abandoned);
        let compressed = async {
            while file.gzip.get().is_none() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), compressed)
            .await
            .expect("the compression was lost with its request");
    }
}
