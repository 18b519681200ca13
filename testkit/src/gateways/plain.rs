//! The same gateways as plain proxies: minimal configurations that forward every request over persistent connections.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use super::{Parsing, Program, READY_ROUTER, caddyfile, nginx, write};

impl Program {
    /// Writes the configuration, and returns the path of its file.
    pub(super) fn plain(self, dir: &Path, api: SocketAddr, port: u16) -> PathBuf {
        match self {
            Self::Caddy => {
                let site = format!("http://127.0.0.1:{port} {{\n\treverse_proxy {api}\n}}\n");
                write(dir, "Caddyfile", caddyfile(&site))
            }
            Self::Nginx => {
                let servers = format!(
                    "upstream api {{ server {api}; keepalive 64; }}\n\
                     server {{\nlisten 127.0.0.1:{port};\nlocation / {{\nproxy_pass http://api;\n\
                     proxy_http_version 1.1;\nproxy_set_header Connection \"\";\n}}\n}}\n"
                );
                write(dir, "nginx.conf", nginx(dir, &servers))
            }
            Self::HaProxy => {
                let text = format!(
                    "defaults\n    mode http\n    timeout connect 1s\n    timeout client 30s\n    \
                     timeout server 30s\nfrontend api\n    bind 127.0.0.1:{port}\n    \
                     default_backend api\nbackend api\n    server api {api}\n"
                );
                write(dir, "haproxy.cfg", text)
            }
            Self::Envoy | Self::EnvoyRateLimit => {
                let text = ENVOY
                    .replace("LISTEN", &port.to_string())
                    .replace("HOST", &api.ip().to_string())
                    .replace("PORT", &api.port().to_string());
                write(dir, "envoy.yaml", text)
            }
            Self::Traefik => {
                let text = format!(
                    "http:\n{READY_ROUTER}    api:\n      rule: \"PathPrefix(`/`)\"\n      \
                     entryPoints: [\"web\"]\n      service: api\n  services:\n    api:\n      \
                     loadBalancer:\n        servers:\n          - url: \"http://{api}\"\n    unavailable:\n      \
                     loadBalancer:\n        servers: []\n"
                );
                write(dir, "traefik.yml", text)
            }
        }
    }
}

/// Options with which nginx and HAProxy forward malformed requests and incomplete bodies.
const LENIENT_NGINX: &str = "ignore_invalid_headers off;\nunderscores_in_headers on;\n\
    proxy_request_buffering off;\n";
const LENIENT_HAPROXY: &str = "    option accept-invalid-http-request\n";

impl Program {
    /// Writes the configuration of a proxy whose consumers share connections to the API, and returns the path of its
    /// file.
    ///
    /// # Panics
    ///
    /// Panics for programs other than Caddy, nginx and HAProxy.
    pub(super) fn shared(
        self,
        dir: &Path,
        api: SocketAddr,
        parsing: Parsing,
        port: u16,
    ) -> PathBuf {
        let is_lenient = parsing == Parsing::Lenient;
        let options = |options| if is_lenient { options } else { "" };
        match self {
            // Caddy has no lenient mode. By default, it reuses the most recently used connection, so consumers share
            // connections.
            Self::Caddy => {
                let site = format!("http://:{port} {{\n\treverse_proxy {api}\n}}\n");
                write(dir, "Caddyfile", caddyfile(&site))
            }
            Self::Nginx => {
                let servers = format!(
                    "upstream api {{ server {api}; keepalive 64; }}\n{}\
                     server {{\nlisten 127.0.0.1:{port};\nlocation / {{\nproxy_pass http://api;\n\
                     proxy_http_version 1.1;\nproxy_set_header Connection \"\";\n}}\n}}\n",
                    options(LENIENT_NGINX)
                );
                write(dir, "nginx.conf", nginx(dir, &servers))
            }
            Self::HaProxy => {
                let text = format!(
                    "defaults\n    mode http\n    timeout connect 1s\n    timeout client 30s\n    \
                     timeout server 30s\nfrontend api\n    bind 127.0.0.1:{port}\n{}    \
                     default_backend api\nbackend api\n    http-reuse always\n    server api {api}\n",
                    options(LENIENT_HAPROXY)
                );
                write(dir, "haproxy.cfg", text)
            }
            Self::Envoy | Self::EnvoyRateLimit | Self::Traefik => {
                panic!("{self:?} is not supported")
            }
        }
    }
}

const ENVOY: &str = r#"static_resources:
  listeners:
  - name: api
    address: { socket_address: { address: 127.0.0.1, port_value: LISTEN } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: api
          use_remote_address: true
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
              suppress_envoy_headers: true
          route_config:
            virtual_hosts:
            - name: api
              domains: ["*"]
              routes: [{ match: { prefix: "/" }, route: { cluster: api } }]
  clusters:
  - name: api
    type: STATIC
    load_assignment:
      cluster_name: api
      endpoints: [{ lb_endpoints: [{ endpoint: { address: { socket_address: { address: HOST, port_value: PORT } } } }] }]
"#;
