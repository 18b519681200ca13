//! `quota billing`.

use anyhow::Context;
use clap::Subcommand;
use quota_server::{
    billing::{
        Billing,
        account::Switch,
        setup::{self, Finding, Offer},
    },
    config::{Config, Settings, StripeSettings},
    db::Db,
    stripe::Stripe,
    telemetry::log::Log,
};

use super::{apply_migrations, with_database};

#[derive(Subcommand)]
pub enum BillingCommand {
    /// Create the objects that Quota needs in Stripe if they do not exist: a product, its prices, a meter, and a
    /// webhook endpoint. Existing objects are not changed
    Setup {
        #[command(flatten)]
        settings: Box<Settings>,
        /// The price per month, in the smallest unit of the currency, such as 2900 for $29.00
        #[arg(long, value_name = "AMOUNT", value_parser = amount)]
        price: String,
        /// The additional price per unit of usage (a request with a cost of 1), in the same unit, such as 0.05 for
        /// $0.50 per 1,000 requests
        #[arg(long, value_name = "AMOUNT", value_parser = amount)]
        usage_price: Option<String>,
        /// The currency
        #[arg(long, default_value = "usd", value_parser = currency)]
        currency: stripe_types::Currency,
        /// The name of the product, as shown to customers
        #[arg(long, value_name = "NAME", default_value = "Quota")]
        product: String,
        /// Also switch billing to the secret key's account and mode, for example to move from test mode to live mode.
        /// This forgets the previous account's customers and subscriptions: tenants lose access to plans marked `paid`,
        /// and usage that has not been reported is not charged
        #[arg(long)]
        switch_account: bool,
    },
    /// Check that all objects that Quota needs in Stripe exist and are consistent
    Check {
        #[command(flatten)]
        settings: Box<Settings>,
    },
}

impl BillingCommand {
    pub fn settings(&self) -> &Settings {
        match self {
            Self::Setup { settings, .. } | Self::Check { settings } => settings,
        }
    }
}

/// Parses an amount. Stripe accepts up to 12 decimal places.
fn amount(text: &str) -> Result<String, String> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |part: &str| {
        !part.is_empty() && part.len() <= 12 && part.bytes().all(|it| it.is_ascii_digit())
    };
    if is_number(whole) && is_number(fraction) {
        Ok(text.to_owned())
    } else {
        Err("must be an amount such as 2900 or 0.05".to_owned())
    }
}

fn currency(text: &str) -> Result<stripe_types::Currency, String> {
    match text.parse() {
        Ok(stripe_types::Currency::Unknown(_)) | Err(_) => {
            Err("must be a currency code such as usd".to_owned())
        }
        Ok(currency) => Ok(currency),
    }
}

pub async fn run(config: Config, _log: Log, command: BillingCommand) -> anyhow::Result<()> {
    let settings: &StripeSettings = config
        .stripe
        .as_ref()
        .context("STRIPE_SECRET_KEY: set it to the secret key of your Stripe account")?;
    let stripe = Stripe::new(settings)?;
    let url = setup::webhook_url(&config.public_url);
    match command {
        BillingCommand::Setup {
            price,
            usage_price,
            currency,
            product,
            switch_account,
            ..
        } => {
            let offer = Offer {
                product_name: product,
                currency,
                price,
                usage_price,
            };
            let (findings, secret) = setup::set_up(&stripe, &offer, &url).await?;
            print(&findings)?;
            if let Some(secret) = secret {
                println!(
                    "\nSet this webhook secret on every replica. Later, you can find it only in the Stripe dashboard:"
                );
                println!("STRIPE_WEBHOOK_SECRET={secret}");
            }
            if switch_account {
                switch(&config, settings).await?;
            }
        }
        BillingCommand::Check { .. } => {
            let has_secret = !settings.webhook_secrets.is_empty();
            let account = account(&config, settings).await;
            let mut findings = vec![setup::account_finding(account)];
            findings.extend(setup::check(&stripe, &url, has_secret).await?);
            print(&findings)?;
        }
    }
    Ok(())
}

/// Returns a description of the account that the secret key belongs to. Fails if the customers belong to another
/// account.
async fn account(config: &Config, settings: &StripeSettings) -> anyhow::Result<String> {
    with_database(config, async |url| {
        let billing = Billing::new(settings, Db::new(url, &config.database))?;
        Ok(billing.verify_account().await?)
    })
    .await
}

async fn switch(config: &Config, settings: &StripeSettings) -> anyhow::Result<()> {
    with_database(config, async |url| {
        apply_migrations(url).await?;
        let billing = Billing::new(settings, Db::new(url, &config.database))?;
        match billing.switch_account().await? {
            Switch::AlreadyDone { account } => {
                println!("\nThis server already bills through {account}. No tenant lost access.");
            }
            Switch::Done { account, ended: 1 } => println!(
                "\nThis server now bills through {account}. 1 tenant lost access; it can subscribe again."
            ),
            Switch::Done { account, ended } => println!(
                "\nThis server now bills through {account}. {ended} tenants lost access; they can subscribe again."
            ),
        }
        Ok(())
    })
    .await
}

fn print(findings: &[Finding]) -> anyhow::Result<()> {
    for Finding { name, text, is_ok } in findings {
        println!(
            "{} {name}: {text}",
            if *is_ok { "ok    " } else { "failed" }
        );
    }
    match findings.iter().filter(|it| !it.is_ok).count() {
        0 => Ok(()),
        1 => anyhow::bail!("1 check failed"),
        failed => anyhow::bail!("{failed} checks failed"),
    }
}
