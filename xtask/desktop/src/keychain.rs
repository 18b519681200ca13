//! Accesses the keychain in the same way as the app, in a separate process whose environment selects the keychain.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context as _, Result, bail};
use quota_common::call::Call;
use quota_desktop::{
    client::Client,
    keychain::{Keychain as _, SystemKeychain},
    server::Server,
    session::Session,
};
use secrecy::ExposeSecret as _;

pub fn print(server: &str) -> Result<()> {
    let token = SystemKeychain
        .get(server)?
        .context("the keychain has no entry")?;
    println!("{}", token.expose_secret());
    Ok(())
}

pub async fn refresh(server: &str, lock: PathBuf, times: u32) -> Result<()> {
    let client = Client::new(Server::parse(server)?)?;
    let session = Session::new(client, Arc::new(SystemKeychain), lock);
    for round in 1..=times {
        for call in [Call::Refresh, Call::Me] {
            if let Err(error) = session.call(&call).await {
                bail!("round {round}: {error:?}");
            }
        }
    }
    Ok(())
}
