//! `cargo xtask bench`: the measurements and long tests. CONTRIBUTING.md lists them. Most of them are in `xtask/bench`;
//! the others are tests or benchmarks of the server, or part of `xtask/desktop`.

use std::{
    ffi::OsString,
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    cargo, desktop, instructions, machine,
    optimized::{self, Linking},
    postgres::{self, Throwaway},
    root, say, succeed, target, test_server, up,
};

/// The default number of seeds for the simulation.
const SEEDS: &str = "20000";
/// The test that runs the seeds.
const SIMULATION: &str = "limiter_shared::simulation::every_guarantee_holds_in_every_seed";

/// The default number of cases for the comparison of direct responses.
const CASES: &str = "1000000";
/// The test that runs the cases.
const DIFFERENTIAL: &str = "direct::direct_responses_are_those_of_hyper";

/// The default number of malformed requests.
const MALFORMED_REQUESTS: &str = "100000";
/// The test that sends malformed requests.
const MALFORMED: &str = "malformed::malformed_requests_are_refused_and_nothing_fails";

/// The test that measures usage.
const USAGE: &str = "usage::bench::ten_million_rows";
/// The test that measures lists of keys.
const KEYS: &str = "key_lists::three_hundred_thousand_keys";

/// The test that measures webhooks from Stripe.
const WEBHOOKS: &str = "billing_flood::webhooks_per_second";

/// Runs a measurement that is a test of the server. The test reads its arguments from the environment variables
/// `variables`.
fn measure(name: &str, variables: &[&str], arguments: &[OsString]) -> Result<ExitCode> {
    machine::install(&[machine::POSTGRES])?;
    let mut test = cargo();
    test.args(["test", "--release", "--quiet", "--package", "quota-server"])
        .args([
            "--test",
            "it",
            "--",
            "--ignored",
            "--exact",
            name,
            "--nocapture",
        ]);
    test.envs(variables.iter().zip(arguments));
    let status = test.status().context("cannot run the measurement")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Compares direct responses with those of hyper. The arguments are the number of cases and the first seed.
fn differential(arguments: &[OsString]) -> Result<ExitCode> {
    machine::install(&[machine::POSTGRES])?;
    let cases = arguments
        .first()
        .map_or_else(|| OsString::from(CASES), OsString::clone);
    let mut test = cargo();
    test.args(["test", "--release", "--quiet", "--package", "quota-server"])
        .args(["--test", "it", "--", "--exact", DIFFERENTIAL, "--nocapture"])
        .env("DIFFERENTIAL_CASES", cases);
    if let Some(first) = arguments.get(1) {
        test.env("DIFFERENTIAL_FIRST", first);
    }
    let status = test.status().context("cannot run the comparison")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs a test without optimizations. The test reads its arguments from the environment variables `variables`; the
/// first argument has a default.
fn debug_test(
    name: &str,
    variables: [&str; 2],
    default: &str,
    arguments: &[OsString],
) -> Result<ExitCode> {
    let first = arguments
        .first()
        .map_or_else(|| OsString::from(default), OsString::clone);
    let mut test = cargo();
    test.args(["test", "--quiet", "--package", "quota-server"])
        .args(["--test", "it", "--", "--exact", name, "--nocapture"])
        .env(variables[0], first);
    if let Some(second) = arguments.get(1) {
        test.env(variables[1], second);
    }
    let status = test.status().context("cannot run the test")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs the simulation. The arguments are the number of seeds and the first seed.
fn simulation(arguments: &[OsString]) -> Result<ExitCode> {
    debug_test(
        SIMULATION,
        ["QUOTA_SEEDS", "QUOTA_FIRST_SEED"],
        SEEDS,
        arguments,
    )
}

/// Sends malformed requests. The arguments are the number of requests and the first seed.
fn malformed(arguments: &[OsString]) -> Result<ExitCode> {
    machine::install(&[machine::POSTGRES])?;
    let variables = ["MALFORMED_REQUESTS", "MALFORMED_FIRST"];
    debug_test(MALFORMED, variables, MALFORMED_REQUESTS, arguments)
}

/// Builds the server that is measured: with all optimizations, or as an ordinary release build if the arguments contain
/// `--ordinary`. Returns the other arguments, and the path of the server.
fn server(arguments: &[OsString]) -> Result<(Vec<OsString>, PathBuf)> {
    let mut others = arguments.to_vec();
    others.retain(|it| it != "--ordinary");
    let release = target().join("release/quota");
    if arguments.iter().any(|it| it == "--server") {
        // Another binary is measured instead of this version.
        return Ok((others, release));
    }
    if others.len() == arguments.len() {
        return Ok((others, optimized::build(Linking::Dynamic)?));
    }
    let mut build = cargo();
    build.args(["build", "--release", "--quiet"]);
    succeed(build.args(["--package", "quota-server", "--bin", "quota"]))?;
    Ok((others, release))
}

pub(crate) fn bench(arguments: &[OsString]) -> Result<ExitCode> {
    if let Some((first, rest)) = arguments.split_first()
        && first == "desktop"
    {
        machine::install(&[&[machine::POSTGRES], &desktop::JOURNEY_NEEDS[..]].concat())?;
        return test_server::on_server(|server| desktop::bench(server, rest));
    }
    if let Some((first, rest)) = arguments.split_first()
        && first == "simulation"
    {
        return simulation(rest);
    }
    if let Some((first, rest)) = arguments.split_first()
        && first == "differential"
    {
        return differential(rest);
    }
    if let Some((first, rest)) = arguments.split_first()
        && first == "malformed"
    {
        return malformed(rest);
    }
    if let Some((first, rest)) = arguments.split_first()
        && first == "instructions"
    {
        return instructions::run(rest).map(|()| ExitCode::SUCCESS);
    }
    if let Some((first, rest)) = arguments.split_first()
        && first == "usage"
    {
        return measure(USAGE, &["QUOTA_USAGE_ROWS"], rest);
    }
    if let Some((first, rest)) = arguments.split_first()
        && first == "keys"
    {
        return measure(KEYS, &["QUOTA_KEYS"], rest);
    }
    if let Some((first, rest)) = arguments.split_first()
        && first == "webhooks"
    {
        return measure(WEBHOOKS, &["QUOTA_WEBHOOKS", "QUOTA_SECONDS"], rest);
    }
    let is = |name: &str| arguments.first().is_some_and(|it| it == name);
    let replicas = is("replicas");
    if is("restarts") {
        machine::install(&machine::PRODUCTION)?;
    } else if is("slow-clients") {
        machine::install(&[&machine::PRODUCTION[..], &[machine::SLOWHTTPTEST]].concat())?;
    } else if is("gateways") {
        machine::install(&[&[machine::POSTGRES], &machine::GATEWAYS[..]].concat())?;
    } else if is("peers") {
        machine::install(&[&[machine::POSTGRES], &machine::PEERS[..]].concat())?;
    } else {
        machine::install(&[machine::POSTGRES, machine::REDIS])?;
    }
    say("building the benchmarks for release (a first build takes a few minutes)");
    let mut build = cargo();
    build.args(["build", "--release", "--quiet"]);
    build.args(["--package", "quota-bench", "--bin", "quota-bench"]);
    succeed(&mut build)?;
    let given = arguments;
    let (arguments, quota) = server(given)?;
    let mut command = Command::new(target().join("release/quota-bench"));
    let database = if replicas {
        let database = Throwaway::start()?;
        command
            .arg("replicas")
            .arg(quota)
            .args(["--postgres", &database.url()])
            .args(&arguments[1..]);
        Some(database)
    } else if is("crash") || is("outage") || is("memory") || is("scale") {
        let programs = postgres::binaries().context("no PostgreSQL is installed")?;
        command
            .arg(&arguments[0])
            .arg("--programs")
            .arg(programs)
            .arg(quota)
            .args(&arguments[1..]);
        None
    } else if is("restarts") || is("slow-clients") {
        command
            .arg(&arguments[0])
            .arg(quota)
            .args(up::production_arguments()?)
            .args(&arguments[1..]);
        None
    } else if is("gateways") {
        command
            .arg("gateways")
            .arg(quota)
            .arg("--tools")
            .arg(target().join("tools"))
            .args(&arguments[1..]);
        None
    } else if is("peers") {
        let database = Throwaway::start()?;
        command
            .arg("peers")
            .arg(quota)
            .args(["--postgres", &database.url()])
            .arg("--tools")
            .arg(target().join("tools"));
        let is_given = |name: &str| given.iter().any(|it| it == name);
        if !is_given("--output") {
            // By default, this overwrites the page in the repository, which compares all servers with Quota as it
            // ships.
            for option in ["--only", "--ordinary"] {
                ensure!(
                    !is_given(option),
                    "`{option}` requires `--output DIRECTORY`"
                );
            }
            command.arg("--output").arg(root().join("docs/bench"));
        }
        command.args(&arguments[1..]);
        Some(database)
    } else if is("metering") || is("tracing") || is("latency") {
        command.arg(&arguments[0]).arg(quota).args(&arguments[1..]);
        None
    } else {
        command.arg("run").arg(quota).args(arguments);
        None
    };
    let status = command.status().context("cannot run the measurement")?;
    drop(database);
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
