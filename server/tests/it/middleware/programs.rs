//! The applications that use the middleware. Each application has one route, `GET /orders/{id}`, which returns the
//! order and the key's plan.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use axum::{Extension, Router, extract::Path as PathParameter, routing::get};
use nix::fcntl::{Flock, FlockArg};
use quota_testkit::{Process, redis::free_port};
use quota_tower::{Decision, OnUnavailable, QuotaLayer};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// The maximum time that an application may take to start. This is long enough for a busy machine.
const STARTED_WITHIN: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Program {
    Rust,
    Python,
    TypeScript,
}

pub(super) struct Setting {
    pub(super) url: String,
    pub(super) token: String,
    /// The file with the certificate of the authority that the application trusts.
    pub(super) root: Option<PathBuf>,
    pub(super) allow_if_unavailable: bool,
}

/// A running application, which is killed when the value is dropped.
pub(super) struct Api {
    pub(super) url: String,
    _running: Running,
}

enum Running {
    Task { _task: JoinSet<()> },
    Process { _process: Process, _output: TempDir },
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy/middleware")
        .join(name)
}

impl Program {
    /// Returns the endpoint under which usage reports list the requests.
    pub(super) fn endpoint(self) -> &'static str {
        match self {
            Self::Rust => "GET /orders/{id}",
            Self::Python => "GET /orders/{order_id}",
            Self::TypeScript => "GET /orders/:id",
        }
    }

    /// Starts the application and waits until it listens.
    pub(super) async fn start(self, setting: &Setting) -> Api {
        let command = match self {
            Self::Rust => return in_process(setting).await,
            Self::Python => python,
            Self::TypeScript => typescript,
        };
        let output = tempfile::tempdir().expect("a directory");
        let log = output.path().join("log");
        // Retry, because another process may take the port before the program binds it.
        for _ in 0..5 {
            let port = free_port();
            let mut command = command(port);
            command
                .env("QUOTA_URL", &setting.url)
                .env("QUOTA_SERVICE_TOKEN", &setting.token)
                .env(
                    "QUOTA_ALLOW_IF_UNAVAILABLE",
                    setting.allow_if_unavailable.to_string(),
                );
            if let Some(root) = &setting.root {
                command
                    .env("SSL_CERT_FILE", root)
                    .env("NODE_EXTRA_CA_CERTS", root);
            }
            let mut process = Process::start(&command, &log).expect("the program is installed");
            let began = Instant::now();
            while process.ended().expect("a child process").is_none() {
                if TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
                    return Api {
                        url: format!("http://127.0.0.1:{port}"),
                        _running: Running::Process {
                            _process: process,
                            _output: output,
                        },
                    };
                }
                assert!(
                    began.elapsed() < STARTED_WITHIN,
                    "the program does not listen"
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        panic!("{}", fs::read_to_string(log).unwrap_or_default());
    }
}

async fn in_process(setting: &Setting) -> Api {
    let mut layer = QuotaLayer::builder(&setting.url, &setting.token).cache_denials(100);
    if setting.allow_if_unavailable {
        layer = layer.on_unavailable(OnUnavailable::Allow);
    }
    if let Some(root) = &setting.root {
        layer = layer.root_certificates(fs::read(root).expect("the certificate is there"));
    }
    let order = async |PathParameter(id): PathParameter<String>,
                       Extension(decision): Extension<Decision>| {
        json!({"order": id, "plan": decision.plan}).to_string()
    };
    let app = Router::new()
        .route("/orders/{id}", get(order))
        .layer(layer.build().expect("the settings are valid"));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!(
        "http://{}",
        listener.local_addr().expect("the socket is bound")
    );
    let mut task = JoinSet::new();
    task.spawn(async move { axum::serve(listener, app).await.expect("the server runs") });
    Api {
        url,
        _running: Running::Task { _task: task },
    }
}

fn python(port: u16) -> Command {
    let requirements = folder("python").join("requirements.txt");
    let packages = installed("middleware-python", &[requirements.as_path()], |dir| {
        run(Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--target"])
            .arg(dir)
            .arg("--requirement")
            .arg(&requirements));
    });
    let mut uvicorn = Command::new("python3");
    uvicorn
        .args(["-m", "uvicorn", "example:app", "--port", &port.to_string()])
        .current_dir(folder("python"))
        .env("PYTHONPATH", packages)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    uvicorn
}

fn typescript(port: u16) -> Command {
    let files = [
        "package.json",
        "package-lock.json",
        "tsconfig.json",
        "quota.ts",
        "example.ts",
    ]
    .map(|name| folder("typescript").join(name));
    let sources = files.each_ref().map(PathBuf::as_path);
    let compiled = installed("middleware-typescript", &sources, |dir| {
        for file in &files {
            let name = file.file_name().expect("files have names");
            fs::copy(file, dir.join(name)).expect("the file is copied");
        }
        run(Command::new("npm").current_dir(dir).args([
            "ci",
            "--no-audit",
            "--no-fund",
            "--loglevel=error",
        ]));
        run(Command::new("node")
            .current_dir(dir)
            .arg("node_modules/typescript/bin/tsc"));
    });
    let mut node = Command::new("node");
    node.arg("dist/example.js")
        .current_dir(compiled)
        .env("PORT", port.to_string());
    node
}

/// Returns a directory with installed packages, which later test runs reuse unless one of `sources` has changed.
fn installed(name: &str, sources: &[&Path], install: impl FnOnce(&Path)) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let stamp = dir.with_extension("stamp");
    // Several tests in separate processes may call this function at the same time.
    let lock = fs::File::create(dir.with_extension("lock")).expect("a file");
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).expect("no other error");
    let read = |path: &&Path| fs::read_to_string(path).expect("the file is there");
    let wanted: String = sources.iter().map(read).collect();
    if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return dir;
    }
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("a directory");
    install(&dir);
    fs::write(&stamp, wanted).expect("the file is written");
    dir
}

fn run(command: &mut Command) {
    let output = command.output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
