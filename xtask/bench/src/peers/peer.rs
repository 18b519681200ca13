//! How the other servers are started, and which requests are sent to them.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::unistd::Pid;
use quota_testkit::{Process, gateways::system, redis::free_port};
use serde_json::json;
use tempfile::TempDir;

use super::{Options, packages};
use crate::{http1, replica::tail};

const STARTED_WITHIN: Duration = Duration::from_secs(30);
/// The response that nginx serves, which is as long as that of `GET /v1/echo`.
const ANSWER: &str = r#"{"key_id":"019ab4e1-7c00-7000-8000-0000000000a1","plan":"ample","time":"2026-08-03T09:46:00Z"}"#;

/// A path whose limit is never reached.
pub(crate) const AMPLE: &str = "/ample";
/// A path with the limit to test.
pub(crate) const LIMITED: &str = "/limited";

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Program {
    Nginx,
    HaProxy,
    Fastify,
    /// FastAPI with this strategy of slowapi.
    FastApi(&'static str),
    /// limitador with this storage.
    Limitador(&'static str),
}

/// A running server, which is killed when the value is dropped.
pub(crate) struct Peer {
    process: Process,
    pub(crate) addr: SocketAddr,
    output: PathBuf,
    _dir: TempDir,
}

impl Peer {
    /// Starts a server and waits until it responds. `limit` is in requests per minute; `redis` is a URL.
    pub(crate) fn start(
        program: Program,
        options: &Options,
        limit: u32,
        redis: Option<&str>,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("quota-bench-peer-")
            .tempdir()?;
        let output = dir.path().join("output");
        fs::write(dir.path().join("answer.json"), ANSWER)?;
        let port = free_port();
        let mut command = program.command(options, dir.path(), port, limit)?;
        command.env("LIMIT", limit.to_string());
        if let Some(redis) = redis {
            command.env("REDIS_URL", redis);
            if matches!(program, Program::Limitador(_)) {
                command.arg(redis);
            }
        }
        let process = Process::start(&command, &output)
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let mut peer = Self {
            process,
            addr: SocketAddr::from(([127, 0, 0, 1], port)),
            output,
            _dir: dir,
        };
        peer.ready(match program {
            Program::Limitador(_) => "/status",
            _ => AMPLE,
        })?;
        Ok(peer)
    }

    /// Waits until the response to a request for `path` is 200.
    fn ready(&mut self, path: &str) -> Result<()> {
        let deadline = Instant::now() + STARTED_WITHIN;
        loop {
            if http1::call(self.addr, "GET", path, None, None).is_ok_and(|it| it.0 == 200) {
                return Ok(());
            }
            let log = || tail(&fs::read_to_string(&self.output).unwrap_or_default());
            if let Some(status) = self.process.ended()? {
                bail!("it exited with {status} instead of starting:\n{}", log());
            }
            ensure!(Instant::now() < deadline, "it does not respond:\n{}", log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Truncates the log.
    pub(crate) fn empty_log(&self) -> Result<()> {
        Ok(File::options().write(true).open(&self.output)?.set_len(0)?)
    }
}

impl Program {
    pub(crate) fn request(self, path: &str, key: &str) -> Vec<u8> {
        let Self::Limitador(_) = self else {
            return get(path, key);
        };
        // limitador does not read headers. Its clients send the key in the body.
        let namespace = path.trim_start_matches('/');
        let body = json!({"namespace": namespace, "values": {"key": key}, "delta": 1}).to_string();
        format!(
            "POST /check_and_report HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: quota-bench\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .into_bytes()
    }

    fn command(self, options: &Options, dir: &Path, port: u16, limit: u32) -> Result<Command> {
        let tools = &options.tools;
        let configuration = |name: &str| {
            let text = fs::read_to_string(packages::folder().join(name))?;
            let text = text
                .replace("DIR", &dir.display().to_string())
                .replace("PORT", &port.to_string())
                .replace("LIMIT", &limit.to_string());
            let file = dir.join(name);
            fs::write(&file, text)?;
            anyhow::Ok(file)
        };
        Ok(match self {
            Self::Nginx => {
                let mut nginx = system("nginx");
                nginx.arg("-p").arg(dir);
                nginx.arg("-c").arg(configuration("nginx.conf")?);
                nginx
            }
            Self::HaProxy => {
                let mut haproxy = system("haproxy");
                haproxy.arg("-db");
                haproxy.arg("-f").arg(configuration("haproxy.cfg")?);
                haproxy
            }
            Self::Fastify => {
                let mut node = Command::new("node");
                node.arg("server.js")
                    .current_dir(packages::fastify(tools)?)
                    .env("NODE_ENV", "production")
                    .env("PORT", port.to_string());
                node
            }
            Self::FastApi(strategy) => {
                let program = packages::fastapi(tools)?;
                let mut uvicorn = Command::new("python3");
                uvicorn
                    .args(["-m", "uvicorn", "server:app", "--port", &port.to_string()])
                    .env("PYTHONPATH", program.join("packages"))
                    .current_dir(program)
                    .env("STRATEGY", strategy);
                uvicorn
            }
            Self::Limitador(storage) => {
                let program = options.limitador.as_ref();
                let mut limitador = Command::new(program.context("there is no `--limitador`")?);
                limitador
                    .args(["--http-ip", "127.0.0.1", "--http-port", &port.to_string()])
                    .args(["--rls-ip", "127.0.0.1", "--rls-port"])
                    .arg(free_port().to_string())
                    .arg(configuration("limits.yaml")?)
                    .arg(storage);
                limitador
            }
        })
    }
}

pub(crate) fn get(path: &str, key: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: quota-bench\r\nAccept: */*\r\n\
         X-API-Key: {key}\r\n\r\n"
    )
    .into_bytes()
}
