//! An account created for a test.

use anyhow::{Context as _, Result, ensure};
use reqwest::Client;
use serde_json::{Value, json};

const EMAIL: &str = "owner@example.com";
const PASSWORD: &str = "violet-harbour-quilt-93";

pub struct Account {
    base: String,
    token: String,
}

impl Account {
    pub async fn register(client: &Client, base: &str) -> Result<Self> {
        let account = json!({"email": EMAIL, "password": PASSWORD});
        let url = format!("{base}/api/auth/register");
        let answer = created(client.post(url).json(&account)).await?;
        Ok(Self {
            base: base.to_owned(),
            token: text(&answer["access_token"])?,
        })
    }

    /// Signs in, to check that the account exists.
    pub async fn sign_in(&self, client: &Client) -> Result<()> {
        let account = json!({"email": EMAIL, "password": PASSWORD});
        let url = format!("{}/api/auth/login", self.base);
        let status = client.post(url).json(&account).send().await?.status();
        ensure!(status == 200, "signing in: {status}");
        Ok(())
    }

    async fn create(&self, client: &Client, path: &str, body: Value) -> Result<Value> {
        let url = format!("{}/api/admin/{path}", self.base);
        created(client.post(url).bearer_auth(&self.token).json(&body)).await
    }

    /// Creates a key on a new plan. Returns the key's secret.
    pub async fn key(&self, client: &Client, plan: Value) -> Result<String> {
        let plan = self.create(client, "plans", plan).await?;
        let key = json!({"name": "test", "plan_id": plan["id"]});
        text(&self.create(client, "api-keys", key).await?["key"])
    }

    pub async fn service_token(&self, client: &Client) -> Result<String> {
        let token = json!({"name": "test"});
        text(&self.create(client, "service-tokens", token).await?["token"])
    }
}

async fn created(request: reqwest::RequestBuilder) -> Result<Value> {
    let response = request.send().await?;
    let status = response.status();
    let body = response.text().await?;
    ensure!(status == 201, "{status}: {body}");
    Ok(serde_json::from_str(&body)?)
}

fn text(value: &Value) -> Result<String> {
    value.as_str().map(str::to_owned).context("no text")
}
