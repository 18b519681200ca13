//! `--demo`: creates a tenant with a plan, a key and a service token, for trying out the server.
//!
//! The demo is created once for each database. Its secrets are stored in the data directory, in a file that only its
//! owner can read, so that later startups can show the secrets again. The database contains only their hashes. The file
//! is written first. If an error then occurs after the account has been created, the next startup completes this demo
//! instead of creating another one.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use quota_common::TenantId;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    auth::AuthError,
    cache::Unconfirmed,
    db::DbError,
    keys::LookupCaller,
    repo::{
        account,
        api_key::{self, NewApiKey},
        plan::{self, NewPlan},
        service_token::{self, NewServiceToken},
    },
    secret_text::{Kind, SecretText},
    state::AppState,
};

const FILE: &str = "demo.json";

#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error(transparent)]
    Auth(#[from] AuthError),
    #[error("cannot create the demo: {0}")]
    Db(#[from] DbError),
    #[error("cannot look up the demo: {0}")]
    Unconfirmed(#[from] Unconfirmed),
    #[error("cannot read the demo's secrets in the data directory")]
    Read(#[source] io::Error),
    #[error("cannot store the demo's secrets in the data directory")]
    Io(#[from] io::Error),
    #[error("cannot generate random numbers")]
    Random(#[from] getrandom::Error),
}

#[derive(Serialize, Deserialize)]
struct Demo {
    email: String,
    password: String,
    key: String,
    service_token: String,
}

pub struct Description {
    /// Contains the secrets.
    pub text: String,
    /// Whether this call created the demo.
    pub is_new: bool,
}

/// Creates the demo if it does not exist, and returns a description of it.
pub async fn create_once(state: &AppState) -> Result<Description, DemoError> {
    let file = state.config.data_dir.join(FILE);
    let stored = read(&file)?;
    let is_new = match &stored {
        Some(demo) => !is_known(state, demo).await?,
        None => true,
    };
    let demo = match stored {
        Some(demo) if !is_new => demo,
        Some(demo) => match complete(state, &file, demo).await? {
            Some(demo) => demo,
            None => create(state, &file).await?,
        },
        None => create(state, &file).await?,
    };
    let base = &state.config.public_url;
    let Demo {
        email,
        password,
        key,
        service_token,
    } = &demo;
    let lines = [
        String::new(),
        "A demo is ready. Its plan allows 60 requests per minute with a burst of 10.".to_owned(),
        String::new(),
        format!("  API key        {key}"),
        format!("  Service token  {service_token}"),
        format!("  Sign in        {email} {password}"),
        format!("  Console        {base}/console"),
        format!("  API            {base}/docs"),
        String::new(),
        "Send more than ten requests in a row:".to_owned(),
        String::new(),
        format!("  curl -i {base}/v1/echo -H 'X-API-Key: {key}'"),
        String::new(),
    ];
    Ok(Description {
        text: lines.join("\n"),
        is_new,
    })
}

/// Returns the stored demo, or `None` if the file does not exist or is damaged.
fn read(file: &Path) -> Result<Option<Demo>, DemoError> {
    match fs::read(file) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(DemoError::Read(error)),
    }
}

/// Returns whether the stored demo's key exists in this database.
async fn is_known(state: &AppState, demo: &Demo) -> Result<bool, Unconfirmed> {
    let Some(key) = SecretText::parse(Kind::ApiKey, demo.key.as_bytes()) else {
        return Ok(false);
    };
    let now = state.clock.monotonic();
    let found = state
        .keys
        .key(key.hash(), now, LookupCaller::default())
        .await?;
    Ok(found.is_some())
}

async fn create(state: &AppState, file: &Path) -> Result<Demo, DemoError> {
    let mut random = [0; 8];
    getrandom::fill(&mut random)?;
    let number = u64::from_le_bytes(random);
    let (key, token) = generate()?;
    let demo = Demo {
        email: format!("demo-{:08x}@example.com", number & 0xffff_ffff),
        // A part of a generated secret is random enough for a password.
        password: SecretText::generate(Kind::Refresh)?.reveal()[3..23].to_owned(),
        key: key.reveal(),
        service_token: token.reveal(),
    };
    write(file, &demo)?;
    let (_, tenant) = state
        .accounts
        .create(&demo.email, &demo.password, Some("Demo"))
        .await?;
    insert(state, tenant, &key, &token).await?;
    Ok(demo)
}

/// Generates the secrets of an API key and of a service token.
fn generate() -> Result<(SecretText, SecretText), getrandom::Error> {
    Ok((
        SecretText::generate(Kind::ApiKey)?,
        SecretText::generate(Kind::ServiceToken)?,
    ))
}

fn write(file: &Path, demo: &Demo) -> io::Result<()> {
    if let Some(directory) = file.parent() {
        fs::create_dir_all(directory)?;
    }
    // A new file is written and then renamed, so that an error while writing does not leave a damaged file.
    let new = file.with_extension("json.new");
    let _ = fs::remove_file(&new);
    let mut out = fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    out.write_all(&serde_json::to_vec_pretty(demo).map_err(io::Error::other)?)?;
    out.sync_all()?;
    fs::rename(new, file)
}

/// Completes a demo that has an account but no plan, because its creation was interrupted. Returns `None` if there is
/// no such demo. The key and the token get new secrets, because the stored key has just been looked up: replicas may
/// remember that this key does not exist.
async fn complete(
    state: &AppState,
    file: &Path,
    mut demo: Demo,
) -> Result<Option<Demo>, DemoError> {
    let mut tx = state.db.system().await?;
    let account = account::for_login(&mut tx, &demo.email).await?;
    tx.commit().await?;
    let Some(account) = account else {
        return Ok(None);
    };
    let tenant = TenantId(account.tenant_id);
    let mut tx = state.db.tenant(tenant).await?;
    let is_used = plan::any(&mut tx).await?;
    tx.commit().await?;
    if is_used {
        return Ok(None);
    }
    let (key, token) = generate()?;
    demo.key = key.reveal();
    demo.service_token = token.reveal();
    write(file, &demo)?;
    insert(state, tenant, &key, &token).await?;
    Ok(Some(demo))
}

async fn insert(
    state: &AppState,
    tenant: TenantId,
    key: &SecretText,
    token: &SecretText,
) -> Result<(), DbError> {
    let mut tx = state.db.tenant(tenant).await?;
    let plan = NewPlan {
        tenant_id: tenant.0,
        id: Uuid::now_v7(),
        name: "Demo",
        default_rpm: 60,
        burst: 10,
        daily_quota: Some(10_000),
        monthly_quota: None,
        strict: false,
        on_redis_failure: None,
        billing: "free",
    };
    let plan = plan::insert(&mut tx, &plan).await?;
    let new_key = NewApiKey {
        tenant_id: tenant.0,
        id: Uuid::now_v7(),
        plan_id: plan.id,
        name: "Demo key",
        prefix: &key.prefix(),
        key_hash: &key.hash(),
        expires_at: None,
        rpm_override: None,
        external_id: None,
        metadata: serde_json::json!({}),
    };
    api_key::insert(&mut tx, &new_key).await?;
    let new_token = NewServiceToken {
        tenant_id: tenant.0,
        id: Uuid::now_v7(),
        name: "Demo gateway",
        prefix: &token.prefix(),
        token_hash: &token.hash(),
    };
    service_token::insert(&mut tx, &new_token).await?;
    tx.commit().await?;
    state.keys.created(key);
    state.keys.created(token);
    Ok(())
}
