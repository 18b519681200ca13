//! The baseline: servers that return the same JSON for every request, without checking anything.

use std::{convert::Infallible, io::Write as _, net::Ipv4Addr};

use anyhow::Result;
use bytes::Bytes;
use http::{Request, Response, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use poem::{EndpointExt as _, Route, endpoint::make_sync, get, listener::TcpAcceptor, web::Json};
use serde::Serialize;
use tokio::net::TcpListener;

/// A response that is as long as that of `GET /v1/echo`.
#[derive(Serialize)]
struct Echo {
    key_id: &'static str,
    plan: &'static str,
    time: &'static str,
}

const ECHO: Echo = Echo {
    key_id: "019ab4e1-7c00-7000-8000-0000000000a1",
    plan: crate::rounds::PLAN,
    time: "2026-08-03T09:46:00Z",
};

/// Serves on a free port, and prints the address. Uses the same kind of runtime as `quota`.
pub(crate) fn serve<F: Future<Output = Result<()>>>(serve: fn(TcpListener) -> F) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        println!("listening on {}", listener.local_addr()?);
        std::io::stdout().flush()?;
        serve(listener).await
    })
}

pub(crate) async fn poem(listener: TcpListener) -> Result<()> {
    let echo = Route::new().at("/v1/echo", get(make_sync(|_| Json(ECHO)).map_to_response()));
    let acceptor = TcpAcceptor::from_tokio(listener)?;
    poem::Server::new_with_acceptor(acceptor).run(echo).await?;
    Ok(())
}

pub(crate) async fn hyper(listener: TcpListener) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|_: Request<Incoming>| async {
                let body = serde_json::to_vec(&ECHO).unwrap_or_default();
                let mut response = Response::new(Full::new(Bytes::from(body)));
                response.headers_mut().insert(
                    header::CONTENT_TYPE,
                    header::HeaderValue::from_static("application/json"),
                );
                Ok::<_, Infallible>(response)
            });
            let builder = auto::Builder::new(TokioExecutor::new());
            // A client that disconnects is not an error.
            let _ = builder
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}
