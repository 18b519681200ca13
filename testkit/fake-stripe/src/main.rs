//! Runs the fake Stripe together with a program, usually the server, and sets the environment variables that make the
//! server bill through the fake Stripe.
//!
//! `fake-stripe [--listen ADDRESS] COMMAND…` listens on 127.0.0.1:12111 by default. Webhooks are sent to
//! `QUOTA_PUBLIC_URL`, or otherwise to the server's default address. The fake Stripe exits when the program exits.

use std::{env, process::ExitCode};

use hyper::Method;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use quota_fake_stripe::{FakeStripe, SECRET_KEY};
use tokio::{
    process::Command,
    signal::unix::{SignalKind, signal},
};

const ADDRESS: &str = "127.0.0.1:12111";
const SERVER: &str = "http://127.0.0.1:8080";

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1).peekable();
    let address = if arguments.next_if(|it| it == "--listen").is_some() {
        let address = arguments.next().and_then(|it| it.into_string().ok());
        address.unwrap_or_default()
    } else {
        ADDRESS.to_owned()
    };
    let Some(program) = arguments.next() else {
        eprintln!("usage: fake-stripe [--listen ADDRESS] COMMAND…");
        return ExitCode::FAILURE;
    };
    let mut fake = match FakeStripe::start_on(&address).await {
        Ok(fake) => fake,
        Err(error) => {
            eprintln!("fake-stripe: cannot listen on {address}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let server = server();
    let secret = set_up(&fake, &server);
    fake.deliver_immediately();
    println!("fake Stripe: {}; no money moves", fake.url());
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("STRIPE_SECRET_KEY", SECRET_KEY)
        .env("STRIPE_WEBHOOK_SECRET", secret)
        .env("STRIPE_API_BASE", fake.url());
    let mut terminated = match signal(SignalKind::terminate()) {
        Ok(terminated) => terminated,
        Err(error) => {
            eprintln!("fake-stripe: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("fake-stripe: {error}");
            return ExitCode::FAILURE;
        }
    };
    loop {
        tokio::select! {
            ended = child.wait() => {
                let code = ended.ok().and_then(|status| status.code());
                let code = code.and_then(|code| u8::try_from(code).ok());
                return code.map_or(ExitCode::FAILURE, ExitCode::from);
            }
            // An interrupt from the terminal reaches the program as well, and the program decides when to exit.
            _ = tokio::signal::ctrl_c() => {}
            _ = terminated.recv() => {
                if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
                }
            }
        }
    }
}

/// Returns the address of the server that receives the webhooks.
#[expect(
    clippy::disallowed_methods,
    reason = "a separate program, which passes the server's own settings on"
)]
fn server() -> String {
    env::var("QUOTA_PUBLIC_URL").unwrap_or_else(|_| SERVER.to_owned())
}

/// Creates the same objects as `quota billing setup`. Returns the secret of the webhook endpoint.
fn set_up(fake: &FakeStripe, server: &str) -> String {
    let post = |path: &str, form: &str| {
        let created = fake
            .request(&Method::POST, path, form)
            .expect("the fake creates the object");
        created["id"].as_str().unwrap_or_default().to_owned()
    };
    let product = post("products", "name=Quota");
    let price = "currency=usd&recurring[interval]=month";
    post(
        "prices",
        &format!(
            "{price}&product={product}&unit_amount=2900&lookup_key=quota_monthly&nickname=Quota"
        ),
    );
    let meter = post(
        "billing/meters",
        "default_aggregation[formula]=sum&display_name=Requests&event_name=quota_requests",
    );
    let metered = format!("recurring[usage_type]=metered&recurring[meter]={meter}");
    post(
        "prices",
        &format!(
            "{price}&{metered}&product={product}&unit_amount=1&lookup_key=quota_usage&nickname=Requests"
        ),
    );
    fake.add_endpoint(&format!("{server}/billing/stripe/webhook"))
        .1
}
