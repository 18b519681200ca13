//! The keychain as the app uses it, in a process of its own: which keychain that is, the environment decides.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context as _, Result, bail};
use quota_common::call::Call;
use quota_desktop::{
    client::Client,
    keychain::{Keychain as _, OfSystem},
    server::Server,
    session::Session,
};
use secrecy::ExposeSecret as _;

pub fn print(server: &str) -> Result<()> {
    let token = OfSystem.get(server)?.context("there is no entry")?;
    println!("{}", token.expose_secret());
    Ok(())
}

pub async fn renew(server: &str, lock: PathBuf, times: u32) -> Result<()> {
    let client = Client::new(Server::parse(server)?)?;
    let session = Session::new(client, Arc::new(OfSystem), lock);
    for turn in 1..=times {
        for call in [Call::Refresh, Call::Me] {
            if let Err(refusal) = session.call(&call).await {
                bail!("turn {turn}: {refusal:?}");
            }
        }
    }
    Ok(())
}
