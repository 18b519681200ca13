//! Tests of Caddy's TLS with the repository's `Caddyfile`: which versions and cipher suites clients can use. The client
//! is OpenSSL, because rustls cannot offer obsolete versions and suites.

use std::process::{Command, Stdio};

use quota_testkit::{Process, redis::free_port};

use crate::support::caddy::Caddy;

/// Options that select every cipher suite with encryption that OpenSSL still implements, however weak.
const ALL: [&str; 2] = ["-cipher", "ALL:@SECLEVEL=0"];

/// The version and cipher suite that a client and a server agreed on.
#[derive(Debug, PartialEq, Eq)]
struct Session {
    version: String,
    suite: String,
}

/// Connects with these options. If the server refuses the connection, returns OpenSSL's output as the error.
fn connect(port: u16, options: &[&str]) -> Result<Session, String> {
    let output = Command::new("openssl")
        .args(["s_client", "-brief", "-servername", "localhost", "-connect"])
        .arg(format!("127.0.0.1:{port}"))
        .args(options)
        .stdin(Stdio::null())
        .output()
        .expect("OpenSSL is installed");
    // `-brief` writes to standard error.
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map(|it| it.trim().to_owned())
    };
    match (field("Protocol version:"), field("Ciphersuite:")) {
        (Some(version), Some(suite)) => Ok(Session { version, suite }),
        _ => Err(text),
    }
}

/// Starts a server that accepts every version that OpenSSL implements, and the cipher suites in [`ALL`]. Returns the
/// process and its port.
async fn lax_server(dir: &std::path::Path) -> (Process, u16) {
    let (key, certificate) = (dir.join("key.pem"), dir.join("certificate.pem"));
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-noenc",
            "-subj",
            "/CN=localhost",
        ])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .expect("OpenSSL is installed");
    assert!(made.status.success(), "{made:?}");
    let port = free_port();
    let mut server = Command::new("openssl");
    server
        .args(["s_server", "-quiet", "-accept"])
        .arg(format!("127.0.0.1:{port}"))
        .args(ALL)
        .arg("-key")
        .arg(&key)
        .arg("-cert")
        .arg(&certificate);
    let output = dir.join("output");
    let process = Process::start(&server, &output).expect("OpenSSL is installed");
    for _ in 0..600 {
        if connect(port, &[]).is_ok() {
            return (process, port);
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("{}", std::fs::read_to_string(output).unwrap_or_default());
}

#[tokio::test(flavor = "multi_thread")]
async fn caddy_speaks_only_tls_1_2_and_1_3() {
    let caddy = Caddy::start(free_port(), &[]).await;
    let dir = tempfile::tempdir().expect("a directory");
    let (_server, lax) = lax_server(dir.path()).await;

    for (option, version) in [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")] {
        let session = connect(caddy.https, &[option]).expect("it is supported");
        assert_eq!(session.version, version);
    }
    for (option, version) in [("-tls1", "TLSv1"), ("-tls1_1", "TLSv1.1")] {
        let options = [&[option][..], &ALL].concat();
        // The client supports this version, so the refusal below comes from Caddy.
        assert_eq!(connect(lax, &options).expect("it is lax").version, version);
        let refused = connect(caddy.https, &options).expect_err("obsolete");
        assert!(refused.contains("alert protocol version"), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn caddy_uses_only_forward_secrecy_and_authenticated_encryption() {
    let caddy = Caddy::start(free_port(), &[]).await;
    let dir = tempfile::tempdir().expect("a directory");
    let (_server, lax) = lax_server(dir.path()).await;

    for suite in [
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
    ] {
        let session = connect(caddy.https, &["-tls1_2", "-cipher", suite]);
        assert_eq!(session.expect("it is supported").suite, suite);
    }
    // Suites without authenticated encryption, and suites without forward secrecy.
    for suites in ["ECDHE+SHA1:ECDHE+SHA256:ECDHE+SHA384", "kRSA"] {
        let weak = format!("{suites}:@SECLEVEL=0");
        let options = ["-tls1_2", "-cipher", &weak];
        connect(lax, &options).expect("it is lax");
        let refused = connect(caddy.https, &options).expect_err("weak");
        assert!(refused.contains("alert handshake failure"), "{refused}");
    }
}
