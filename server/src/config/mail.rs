//! Parses the settings for outgoing email.

use lettre::message::Mailbox;
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};
use url::{Host, Url};

use super::{MailSettings, Settings, SmtpSettings, SmtpTls, reader::Reader};

/// The default sender of emails that are written to files.
const FILE_SENDER: &str = "Quota <quota@localhost>";

/// Reads the settings for outgoing email. All of them are parsed even without SMTP_URL, so that errors are reported.
pub(super) fn read(r: &mut Reader, s: &Settings) -> MailSettings {
    let url = r.or_file("SMTP_URL", &s.smtp_url, &s.smtp_url_file);
    let smtp = url.value.as_ref().and_then(|text| {
        let parsed = smtp(text.expose_secret());
        parsed
            .map_err(|message| {
                // The value is not shown, because it may contain a password.
                let variable = &url.variable;
                r.0.push(format!("{variable}: {message}"));
            })
            .ok()
    });
    if smtp.is_some() && s.mail_from.trim().is_empty() {
        r.0.push("QUOTA_MAIL_FROM: required with SMTP_URL".to_owned());
    }
    let file_sender = || FILE_SENDER.parse().expect("an address");
    let from = r.read(
        "QUOTA_MAIL_FROM",
        &s.mail_from,
        file_sender(),
        |text| match text.trim() {
            "" => Ok(file_sender()),
            text => text
                .parse::<Mailbox>()
                .map_err(|_| "must be an address such as Quota <quota@example.com>".into()),
        },
    );
    MailSettings { smtp, from }
}

fn smtp(text: &str) -> Result<SmtpSettings, &'static str> {
    const EXPECTED: &str =
        "must be smtps://user:password@host:port or smtp://user:password@host:port";
    let url = Url::parse(text).map_err(|_| EXPECTED)?;
    let host = url.host_str().filter(|host| !host.is_empty());
    let host = host.ok_or(EXPECTED)?.trim_matches(['[', ']']).to_owned();
    let is_plain = matches!(url.path(), "" | "/") && url.query().is_none();
    if !is_plain || url.fragment().is_some() {
        return Err(EXPECTED);
    }
    let is_loopback = match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        // For schemes such as smtp, the URL parser treats an IPv4 address as a domain.
        Some(Host::Domain(name)) => {
            name == "localhost"
                || name
                    .parse::<std::net::IpAddr>()
                    .is_ok_and(|ip| ip.is_loopback())
        }
        None => false,
    };
    let (tls, port) = match url.scheme() {
        "smtps" => (SmtpTls::Implicit, 465),
        "smtp" if is_loopback => (SmtpTls::None, 587),
        "smtp" => (SmtpTls::StartTls, 587),
        _ => return Err(EXPECTED),
    };
    let decode = |text: &str| {
        let decoded = percent_decode_str(text).decode_utf8();
        decoded
            .map(String::from)
            .map_err(|_| "must have a user and password in UTF-8")
    };
    let credentials = match (url.username(), url.password()) {
        ("", None) => None,
        (user, Some(password)) if !user.is_empty() => {
            Some((decode(user)?, SecretString::from(decode(password)?)))
        }
        _ => return Err("must have both a user and a password, or neither"),
    };
    Ok(SmtpSettings {
        host,
        port: url.port().unwrap_or(port),
        tls,
        credentials,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_determines_port_encryption_and_credentials() {
        for (url, host, port, tls, user) in [
            (
                "smtps://mail.example.com",
                "mail.example.com",
                465,
                SmtpTls::Implicit,
                None,
            ),
            (
                "smtp://mail.example.com",
                "mail.example.com",
                587,
                SmtpTls::StartTls,
                None,
            ),
            (
                "smtp://mail.example.com:25/",
                "mail.example.com",
                25,
                SmtpTls::StartTls,
                None,
            ),
            (
                "smtp://127.0.0.1:2525",
                "127.0.0.1",
                2525,
                SmtpTls::None,
                None,
            ),
            ("smtp://localhost", "localhost", 587, SmtpTls::None, None),
            ("smtp://[::1]:25", "::1", 25, SmtpTls::None, None),
            (
                "smtps://a%40b.c:p%C3%A4%2F%25@mail.example.com",
                "mail.example.com",
                465,
                SmtpTls::Implicit,
                Some(("a@b.c", "pä/%")),
            ),
        ] {
            let it = smtp(url).unwrap();
            assert_eq!(
                (it.host.as_str(), it.port, it.tls),
                (host, port, tls),
                "{url}"
            );
            let credentials = it.credentials.as_ref();
            let credentials = credentials.map(|(user, it)| (user.as_str(), it.expose_secret()));
            assert_eq!(credentials, user, "{url}");
        }
    }

    #[test]
    fn other_urls_are_rejected() {
        for url in [
            "mail.example.com",
            "http://mail.example.com",
            "smtps://",
            "smtps://mail.example.com/path",
            "smtp://mail.example.com?tls=none",
            "smtps://user@mail.example.com",
            "smtps://:password@mail.example.com",
            "smtps://user:p%ff@mail.example.com",
        ] {
            assert!(smtp(url).is_err(), "{url}");
        }
    }
}
