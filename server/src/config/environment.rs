//! Detects environment variables that look like settings but are not.
//!
//! If a misspelled setting were ignored, a server that is supposed to use an external database might start its private
//! PostgreSQL. Therefore, the server does not start if a variable begins with `QUOTA_` but is not a setting, except for
//! the variables that Kubernetes sets for a service (`QUOTA_SERVICE_HOST`, `QUOTA_PORT_8080_TCP`, …). The server also
//! does not start if a variable is a setting's name followed by `_FILE` and that setting cannot be read from a file.

use super::example::variables;

const PREFIX: &str = "QUOTA_";
/// The minimum similarity (Jaro-Winkler, 0 to 1) at which a name is suggested.
const MIN_SIMILARITY: f64 = 0.85;

/// Returns one line for each unknown variable. The lines contain names but not values.
pub fn unknown_variables(environment: impl IntoIterator<Item = (String, String)>) -> Vec<String> {
    let known = variables();
    let is_known = |name: &str| known.iter().any(|it| it == name);
    let mut lines = Vec::new();
    for (name, value) in environment {
        if is_known(&name) {
            continue;
        }
        if let Some(setting) = name.strip_suffix("_FILE")
            && is_known(setting)
        {
            lines.push(format!(
                "{name}: {setting} cannot be read from a file; set {setting} itself"
            ));
        } else if name.starts_with(PREFIX) && !is_service_link(&name, &value) {
            let suggestion = suggestion(&name, &known)
                .map_or(String::new(), |it| format!("; did you mean {it}?"));
            lines.push(format!("{name}: unknown setting{suggestion}"));
        }
    }
    lines.sort_unstable();
    lines
}

fn suggestion<'a>(name: &str, known: &'a [String]) -> Option<&'a str> {
    // The prefix is ignored, since it would make all names similar.
    let plain = |name: &'a str| name.strip_prefix(PREFIX).unwrap_or(name);
    let own = name.strip_prefix(PREFIX).unwrap_or(name);
    known
        .iter()
        .map(|it| (strsim::jaro_winkler(own, plain(it)), it.as_str()))
        .filter(|(similarity, _)| *similarity >= MIN_SIMILARITY)
        .max_by(|one, other| one.0.total_cmp(&other.0))
        .map(|(_, it)| it)
}

/// Returns whether Kubernetes sets this variable for a service whose name is `quota` or starts with `quota-`.
fn is_service_link(name: &str, value: &str) -> bool {
    let is_address = ["tcp://", "udp://", "sctp://"]
        .iter()
        .any(|scheme| value.starts_with(scheme));
    let rest = &name[PREFIX.len() - 1..];
    if rest.ends_with("_SERVICE_HOST") {
        return value.parse::<std::net::IpAddr>().is_ok();
    }
    if let Some((_, port_name)) = rest.split_once("_SERVICE_PORT") {
        return (port_name.is_empty() || port_name.starts_with('_'))
            && value.parse::<u16>().is_ok();
    }
    if rest.ends_with("_PORT") && is_address {
        return true;
    }
    // QUOTA_PORT_8080_TCP, optionally followed by _PROTO, _PORT or _ADDR.
    let Some((_, port)) = rest.split_once("_PORT_") else {
        return false;
    };
    let mut parts = port.split('_');
    let number = parts.next().is_some_and(|it| it.parse::<u16>().is_ok());
    let protocol = parts
        .next()
        .is_some_and(|it| matches!(it, "TCP" | "UDP" | "SCTP"));
    let detail = match parts.next() {
        None => is_address,
        Some(detail) => matches!(detail, "PROTO" | "PORT" | "ADDR"),
    };
    number && protocol && detail && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unknown(variables: &[(&str, &str)]) -> Vec<String> {
        let owned = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        unknown_variables(owned)
    }

    #[test]
    fn misspelled_setting_is_reported_with_a_suggestion() {
        for (wrong, meant) in [
            ("QUOTA_LISTN", "QUOTA_LISTEN"),
            ("QUOTA_SECRETS", "QUOTA_SECRET"),
            ("QUOTA_DATABASE_URL", "DATABASE_URL"),
            ("QUOTA_REDIS_URL", "REDIS_URL"),
            ("QUOTA_TRUSTED_PROXY", "QUOTA_TRUSTED_PROXIES"),
            ("QUOTA_METRIC_LISTEN", "QUOTA_METRICS_LISTEN"),
        ] {
            let line = format!("{wrong}: unknown setting; did you mean {meant}?");
            assert_eq!(unknown(&[(wrong, "hunter2")]), [line]);
        }
        let line = "QUOTA_XYZZY: unknown setting".to_owned();
        assert_eq!(unknown(&[("QUOTA_XYZZY", "hunter2")]), [line]);
    }

    #[test]
    fn settings_and_variables_of_other_programs_are_accepted() {
        let fine = [
            ("QUOTA_LISTEN", "127.0.0.1:80"),
            ("QUOTA_SECRET_FILE", "/run/secrets/quota"),
            ("DATABASE_URL_FILE", "/run/secrets/database"),
            ("RUST_LOG", "info"),
            ("PATH", "/bin"),
            ("QUOTAS", "x"),
            ("POSTGRES_PASSWORD_FILE", "/run/secrets/x"),
        ];
        assert_eq!(unknown(&fine), Vec::<String>::new());
    }

    #[test]
    fn file_for_a_setting_that_takes_none_is_rejected() {
        for name in ["QUOTA_LISTEN", "ALLOWED_ORIGINS", "RUST_LOG"] {
            let variable = format!("{name}_FILE");
            let lines = unknown(&[(&variable, "/run/secrets/x")]);
            assert_eq!(lines.len(), 1);
            assert!(lines[0].starts_with(&format!("{variable}: ")), "{lines:?}");
        }
    }

    #[test]
    fn kubernetes_service_links_are_accepted_and_lookalikes_are_not() {
        let links = [
            ("QUOTA_SERVICE_HOST", "10.0.0.1"),
            ("QUOTA_SERVICE_PORT", "8080"),
            ("QUOTA_SERVICE_PORT_HTTP", "8080"),
            ("QUOTA_PORT", "tcp://10.0.0.1:8080"),
            ("QUOTA_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
            ("QUOTA_PORT_8080_TCP_PROTO", "tcp"),
            ("QUOTA_PORT_8080_TCP_PORT", "8080"),
            ("QUOTA_PORT_8080_TCP_ADDR", "10.0.0.1"),
            ("QUOTA_METRICS_SERVICE_HOST", "fd00::1"),
            ("QUOTA_METRICS_SERVICE_PORT_PROM", "9090"),
            ("QUOTA_METRICS_PORT", "tcp://10.0.0.2:9090"),
            ("QUOTA_METRICS_PORT_53_UDP", "udp://10.0.0.2:53"),
        ];
        assert_eq!(unknown(&links), Vec::<String>::new());
        for (name, value) in [
            ("QUOTA_PORT", "8080"),
            ("QUOTA_SERVICE_HOST", "example.com"),
            ("QUOTA_SERVICE_PORTS", "8080"),
            ("QUOTA_PORT_8080_TCP_X", "8080"),
            ("QUOTA_PORT_X_TCP", "tcp://10.0.0.1:8080"),
            ("QUOTA_LISTEN_PORT", "8080"),
        ] {
            assert_eq!(unknown(&[(name, value)]).len(), 1, "{name}={value}");
        }
    }
}
