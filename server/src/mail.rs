//! Sends email through an SMTP server. If no server is configured, writes emails to files in the data directory.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use lettre::{
    AsyncSmtpTransport, AsyncTransport, Message, Tokio1Executor,
    address::AddressError,
    message::{
        Mailbox, MultiPart,
        header::{HeaderName, HeaderValue},
    },
    transport::smtp::{
        authentication::Credentials,
        client::{Tls, TlsParameters},
    },
};
use secrecy::ExposeSecret;
use tokio::time::timeout;
use uuid::Uuid;

use crate::config::{Config, MailSettings, SmtpSettings, SmtpTls};

/// How long each SMTP command may take.
const TIMEOUT: Duration = Duration::from_secs(15);
/// How long sending an email may take.
pub const SEND_MAX: Duration = Duration::from_secs(25);
/// The maximum number of files. When there are more, the oldest are deleted.
const FILES_MAX: usize = 1000;

/// An email to one recipient.
#[derive(Debug, Clone)]
pub struct Mail<'a> {
    /// Identifies the email. Remains the same when the email is resent.
    pub id: Uuid,
    pub recipient: &'a str,
    pub subject: &'a str,
    pub text: &'a str,
    pub html: &'a str,
}

/// Why an email was not sent.
#[derive(Debug, thiserror::Error)]
pub enum MailError {
    #[error("the address is invalid: {0}")]
    Address(#[from] AddressError),
    #[error("the message cannot be built: {0}")]
    Message(#[from] lettre::error::Error),
    #[error("{0}")]
    Smtp(#[from] lettre::transport::smtp::Error),
    #[error("the mail server took too long")]
    TimedOut,
    #[error("cannot write the file: {0}")]
    File(#[from] io::Error),
}

impl MailError {
    /// Returns whether resending the email would be pointless, because the message or its recipient is invalid or was
    /// rejected.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Address(_) | Self::Message(_) => true,
            Self::Smtp(error) => error.status().is_some_and(|code| {
                ["550", "551", "552", "553", "554"].contains(&&*code.to_string())
            }),
            Self::TimedOut | Self::File(_) => false,
        }
    }
}

/// Sends email, or writes it to files if no SMTP server is configured.
#[derive(Debug, Clone)]
pub struct Mailer {
    from: Mailbox,
    transport: Transport,
}

#[derive(Debug, Clone)]
enum Transport {
    Smtp(AsyncSmtpTransport<Tokio1Executor>),
    /// The directory that contains the files.
    Files(PathBuf),
}

fn smtp(settings: &SmtpSettings) -> Result<AsyncSmtpTransport<Tokio1Executor>, MailError> {
    let parameters = || TlsParameters::new(settings.host.clone());
    let tls = match settings.tls {
        SmtpTls::Implicit => Tls::Wrapper(parameters()?),
        SmtpTls::StartTls => Tls::Required(parameters()?),
        SmtpTls::None => Tls::None,
    };
    let mut builder = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(&settings.host)
        .port(settings.port)
        .timeout(Some(TIMEOUT))
        .tls(tls);
    if let Some((user, password)) = &settings.credentials {
        let password = password.expose_secret().to_owned();
        builder = builder.credentials(Credentials::new(user.clone(), password));
    }
    Ok(builder.build())
}

impl Mailer {
    /// Creates a mailer from the settings.
    ///
    /// # Errors
    ///
    /// Fails if TLS cannot be set up.
    pub fn new(config: &Config) -> Result<Self, MailError> {
        let MailSettings { smtp: server, from } = &config.mail;
        let transport = match server {
            Some(settings) => Transport::Smtp(smtp(settings)?),
            None => Transport::Files(config.data_dir.join("mail")),
        };
        Ok(Self {
            from: from.clone(),
            transport,
        })
    }

    /// Returns whether emails are sent instead of being written to files.
    pub const fn has_server(&self) -> bool {
        matches!(self.transport, Transport::Smtp(_))
    }

    fn message(&self, mail: &Mail<'_>) -> Result<Message, MailError> {
        let auto_submitted = HeaderName::new_from_ascii_str("Auto-Submitted");
        let message = Message::builder()
            .from(self.from.clone())
            .to(Mailbox::new(None, mail.recipient.parse()?))
            .subject(one_line(mail.subject))
            .message_id(Some(format!(
                "<{}@{}>",
                mail.id.simple(),
                self.from.email.domain()
            )))
            // This prevents automatic replies, such as vacation notices.
            .raw_header(HeaderValue::new(
                auto_submitted,
                "auto-generated".to_owned(),
            ))
            .date_now();
        let (text, html) = (mail.text.to_owned(), mail.html.to_owned());
        Ok(message.multipart(MultiPart::alternative_plain_html(text, html))?)
    }

    pub async fn send(&self, mail: &Mail<'_>) -> Result<(), MailError> {
        let message = self.message(mail)?;
        match &self.transport {
            Transport::Smtp(transport) => {
                let sent = timeout(SEND_MAX, transport.send(message)).await;
                sent.map_err(|_| MailError::TimedOut)??;
            }
            Transport::Files(dir) => {
                let path = dir.join(format!("{}.eml", mail.id));
                // The write blocks, but only for a short time, and files are meant for small installations and tests.
                write(dir, &path, &message.formatted())?;
                tracing::info!(
                    path = %path.display(),
                    "SMTP_URL is not set, so an email was written to a file"
                );
            }
        }
        Ok(())
    }

    /// Connects to the SMTP server and signs in. Returns `None` if no server is configured.
    pub async fn test(&self) -> Option<Result<(), MailError>> {
        match &self.transport {
            Transport::Smtp(transport) => Some(match transport.test_connection().await {
                Ok(_) => Ok(()),
                Err(error) => Err(error.into()),
            }),
            Transport::Files(_) => None,
        }
    }
}

/// Replaces control characters, which could start another header field, with spaces, and shortens the text to 200
/// characters.
fn one_line(text: &str) -> String {
    let visible = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(200);
    visible.collect()
}

/// Writes a file completely or not at all. If there are too many files, deletes the oldest ones. The names of the files
/// are UUIDs of version 7, so they sort by time.
fn write(dir: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let temporary = path.with_extension("part");
    fs::write(&temporary, content)?;
    fs::rename(&temporary, path)?;
    let mut files: Vec<_> = fs::read_dir(dir)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|it| it == "eml"))
        .collect();
    if files.len() > FILES_MAX {
        files.sort_unstable();
        for path in &files[..files.len() - FILES_MAX] {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(dir: &Path) -> Mailer {
        Mailer {
            from: "Quota <quota@example.com>".parse().unwrap(),
            transport: Transport::Files(dir.to_owned()),
        }
    }

    fn mail(subject: &str) -> Mail<'_> {
        Mail {
            id: Uuid::now_v7(),
            recipient: "ada@example.com",
            subject,
            text: "Text",
            html: "<p>HTML</p>",
        }
    }

    #[tokio::test]
    async fn message_has_both_parts_and_no_header_from_its_subject() {
        let dir = tempfile::tempdir().unwrap();
        let subject = "Hello\r\nBcc: eve@example.com\r\n\r\nBody";
        files(dir.path()).send(&mail(subject)).await.unwrap();
        let [path] = <[_; 1]>::try_from(paths(dir.path())).unwrap();
        let text = fs::read_to_string(path).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("From: Quota <quota@example.com>"), "{head}");
        assert!(head.contains("To: ada@example.com"), "{head}");
        assert!(head.contains("Auto-Submitted: auto-generated"), "{head}");
        assert!(!head.lines().any(|line| line.starts_with("Bcc")), "{head}");
        assert!(
            body.contains("text/plain") && body.contains("text/html"),
            "{body}"
        );
    }

    #[tokio::test]
    async fn recipient_that_is_not_an_address_is_a_permanent_error() {
        let dir = tempfile::tempdir().unwrap();
        for recipient in ["ada", "ada@example.com\r\nRCPT TO:<eve@example.com>", ""] {
            let mail = Mail {
                recipient,
                ..mail("Hello")
            };
            let error = files(dir.path()).send(&mail).await.unwrap_err();
            assert!(error.is_permanent(), "{recipient:?}: {error}");
        }
        assert!(paths(dir.path()).is_empty());
    }

    #[test]
    fn number_of_files_is_bounded_and_the_newest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let name = |n: usize| dir.path().join(format!("{n:05}.eml"));
        fs::write(dir.path().join("note.txt"), "kept").unwrap();
        for n in 0..FILES_MAX + 5 {
            write(dir.path(), &name(n), b"x").unwrap();
        }
        let mut left = paths(dir.path());
        left.sort();
        assert_eq!(left.len(), FILES_MAX);
        assert_eq!(left.first(), Some(&name(5)));
        assert!(dir.path().join("note.txt").exists());
    }

    fn paths(dir: &Path) -> Vec<PathBuf> {
        let all = fs::read_dir(dir).unwrap().map(|it| it.unwrap().path());
        all.filter(|it| it.extension().is_some_and(|it| it == "eml"))
            .collect()
    }
}
