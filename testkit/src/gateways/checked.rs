//! The configurations from `deploy/gateways`, filled in for loopback.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{Checked, INNER, Program, READY_ROUTER, ROOT, caddyfile, folder, nginx, write};
use crate::redis::free_port;

/// Replaces all occurrences of `from`. Panics if there are none.
fn put(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from:?} is not in\n{text}");
    text.replace(from, to)
}

/// Removes the text from the first occurrence of `from` to the end of its line or, if `to_the_end` is set, to the end
/// of the text. Panics if `from` does not occur.
fn cut(text: &str, from: &str, to_the_end: bool) -> String {
    let start = text.find(from);
    let start = start.unwrap_or_else(|| panic!("{from:?} is not in\n{text}"));
    let end = text[start..].find('\n').filter(|_| !to_the_end);
    let end = end.map_or(text.len(), |it| start + it);
    format!("{}{}", &text[..start], &text[end..])
}

impl Checked<'_> {
    fn read(&self, file: &str, root: &Path) -> String {
        let text = fs::read_to_string(folder().join(file)).expect("the file is there");
        let text = put(&text, "qs_YOUR_SERVICE_TOKEN", self.token);
        let text = put(&text, "127.0.0.1:3000", &self.api.to_string());
        let address = format!("localhost:{}", self.quota_port);
        let scheme = if self.root.is_some() { "https" } else { "http" };
        text.replace("quota.example.com:443", &address)
            .replace(
                "https://quota.example.com",
                &format!("{scheme}://{address}"),
            )
            .replace("quota.example.com", "localhost")
            .replace(
                "/etc/ssl/certs/ca-certificates.crt",
                &root.display().to_string(),
            )
    }
}

impl Program {
    /// Writes the configuration, and returns the path of its file.
    pub(super) fn checked(self, dir: &Path, checked: &Checked<'_>, port: u16) -> PathBuf {
        let root = dir.join(ROOT);
        if let Some(trusted) = checked.root {
            fs::copy(trusted, &root).expect("the certificate is copied");
        }
        let is_plain = checked.root.is_none();
        let listen = format!("127.0.0.1:{port}");
        match self {
            Self::Caddy => {
                let text = checked.read("Caddyfile", &root);
                let site = put(&text, "api.example.com", &format!("http://{listen}"));
                write(dir, "Caddyfile", caddyfile(&site))
            }
            Self::Nginx => {
                let text = checked.read("nginx.conf", &root);
                let text = put(&text, "listen 80;", &format!("listen {listen};"));
                let mut text = put(&text, "api.example.com", "127.0.0.1");
                if is_plain {
                    text = put(&text, "https://quota/", "http://quota/");
                    let lines = text.lines().filter(|it| !it.contains("proxy_ssl_"));
                    text = lines.flat_map(|it| [it, "\n"]).collect();
                }
                write(dir, "nginx.conf", nginx(dir, &text))
            }
            Self::HaProxy => {
                let inner = format!("127.0.0.1:{}", free_port());
                write(dir, INNER, &inner);
                let script = fs::read_to_string(folder().join("quota.lua"));
                let mut script = put(
                    &script.expect("the script exists"),
                    "127.0.0.1:8404",
                    &inner,
                );
                if let Some((from, to)) = checked.script_fault {
                    script = put(&script, from, to);
                }
                let lua = write(dir, "quota.lua", script);
                let text = checked.read("haproxy.cfg", &root);
                let text = put(&text, "127.0.0.1:8404", &inner);
                let text = put(&text, "/etc/haproxy/quota.lua", &lua.display().to_string());
                let text = put(&text, "bind :80", &format!("bind {listen}"));
                let mut text = put(&text, "api.example.com", "127.0.0.1");
                if is_plain {
                    text = cut(&text, " ssl verify required", false);
                }
                write(dir, "haproxy.cfg", text)
            }
            Self::Envoy | Self::EnvoyRateLimit => {
                let (file, quota) = if self == Self::Envoy {
                    ("envoy.yaml", 443)
                } else {
                    ("envoy-ratelimit.yaml", 8081)
                };
                let socket = |host: &str, port: u16| format!("address: {host}, port_value: {port}");
                let mut text = checked.read(file, &root);
                // An address in Envoy's configuration has two parts.
                let api = socket(&checked.api.ip().to_string(), checked.api.port());
                for (from, to) in [
                    (socket("0.0.0.0", 80), socket("127.0.0.1", port)),
                    (socket("127.0.0.1", 3000), api),
                    (
                        socket("localhost", quota),
                        socket("localhost", checked.quota_port),
                    ),
                    ("api.example.com".into(), "127.0.0.1".into()),
                ] {
                    text = put(&text, &from, &to);
                }
                if is_plain && self == Self::Envoy {
                    text = cut(&text, "    transport_socket:", true);
                }
                write(dir, "envoy.yaml", text)
            }
            Self::Traefik => {
                let inner = format!("127.0.0.1:{}", free_port());
                write(dir, INNER, &inner);
                let text = checked.read("traefik.yml", &root);
                let text = put(&text, "http://127.0.0.1:8081", &format!("http://{inner}"));
                let text = put(&text, "api.example.com", "127.0.0.1");
                // Consumers connect without TLS.
                let text = put(&text, "[\"websecure\"]", "[\"web\"]");
                let text = put(&text, "      tls: {}\n", "");
                let text = put(&text, "  routers:\n", READY_ROUTER);
                write(dir, "traefik.yml", text)
            }
        }
    }
}
