//! Tests which members get emails about alerts, and how emails are sent despite failures of the mail server.

use std::time::Duration;

use quota_testkit::smtp::{ReceivedMail, SmtpServer};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::app::{Account, PASSWORD, Setup, TestApp};

struct World {
    app: TestApp,
    smtp: SmtpServer,
    account: Account,
}

pub(crate) fn with_smtp(setup: Setup, smtp: &SmtpServer, credentials: &str) -> Setup {
    setup
        .flag(format!("--smtp-url=smtp://{credentials}{}", smtp.addr))
        .flag("--mail-from=Quota <quota@example.com>")
        .flag("--public-url=https://quota.example.com")
}

impl World {
    /// Starts a server without background jobs, so that the test decides when emails are written and sent.
    async fn new() -> Self {
        let smtp = SmtpServer::start().await;
        let app = with_smtp(TestApp::setup(), &smtp, "").without_jobs();
        let app = app.start().await;
        let account = app.register().await;
        Self { app, smtp, account }
    }

    /// Adds a member to the tenant.
    async fn member(&self, role: &str) -> Account {
        let member = self.app.register().await;
        let client = self.app.database.connect().await;
        client
            .execute(
                "INSERT INTO memberships (tenant_id, user_id, role) VALUES ($1::text::uuid, $2::text::uuid, $3)",
                &[&self.account.tenant_id, &member.user_id, &role],
            )
            .await
            .expect("a membership");
        member
    }

    /// Creates an alert whose email is pending.
    async fn alert(&self, name: &str) {
        let client = self.app.database.connect().await;
        client
            .execute(
                "INSERT INTO quota_alerts (tenant_id, id, key_id, key_name, policy, threshold, quota, used, \
                     window_start, window_end, email_pending) \
                 VALUES ($1::text::uuid, $2::text::uuid, gen_random_uuid(), $3, 'daily', 80, 100, 80, now(), \
                     now() + interval '1 day', true)",
                &[
                    &self.account.tenant_id,
                    &Uuid::now_v7().to_string(),
                    &name,
                ],
            )
            .await
            .expect("an alert");
    }

    /// Writes and sends emails. Returns how many emails were sent, postponed and abandoned.
    async fn send(&self) -> (u64, u64, u64) {
        let state = &self.app.state;
        let url = &state.config.public_url;
        state.alerts.write_emails(url, 0).await.expect("emails");
        let sent = state.alerts.send_emails(&state.mailer).await;
        let sent = sent.expect("a round");
        (sent.sent, sent.postponed, sent.failed)
    }

    fn recipients(&self) -> Vec<String> {
        let received = self.smtp.received().into_iter();
        let mut all: Vec<_> = received.flat_map(|mail| mail.to).collect();
        all.sort();
        all
    }

    async fn settings(&self, change: Value) {
        let path = "/admin/alert-settings";
        let answer = self.app.act(&self.account, "PATCH", path, change).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(answer.body["can_email"], true);
    }

    async fn sql(&self, statement: &str) {
        let client = self.app.database.connect().await;
        client.execute(statement, &[]).await.expect("valid SQL");
    }
}

/// Returns the decoded text of a message, whose parts are quoted-printable.
fn text(mail: &ReceivedMail) -> String {
    let joined = mail.message.replace("=\r\n", "");
    joined.replace("=3D", "=")
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_and_admins_get_an_email_with_both_parts_and_a_link() {
    let world = World::new().await;
    let admin = world.member("admin").await;
    for role in ["developer", "billing", "viewer"] {
        world.member(role).await;
    }
    world.app.register().await;
    world.alert("Mobile app").await;
    assert_eq!(world.send().await, (2, 0, 0));
    let mut expected = [world.account.email.clone(), admin.email.clone()];
    expected.sort();
    assert_eq!(world.recipients(), expected);
    for mail in world.smtp.received() {
        assert_eq!(mail.from, "quota@example.com");
        assert_eq!(
            mail.to.len(),
            1,
            "members do not see each other's addresses"
        );
        let text = text(&mail);
        assert!(
            text.contains("Subject: API key \"Mobile app\" has used 80% of its daily quota"),
            "{text}"
        );
        assert!(
            text.contains("text/plain") && text.contains("text/html"),
            "{text}"
        );
        assert!(
            text.contains("https://quota.example.com/console/api-keys/"),
            "{text}"
        );
    }
    assert_eq!(world.send().await, (0, 0, 0), "nothing is sent twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_decide_who_gets_email() {
    let world = World::new().await;
    let viewer = world.member("viewer").await;
    world.settings(json!({"email_roles": ["viewer"]})).await;
    world.alert("A").await;
    assert_eq!(world.send().await, (1, 0, 0));
    assert_eq!(world.recipients(), std::slice::from_ref(&viewer.email));
    world.settings(json!({"email": false})).await;
    world.alert("B").await;
    assert_eq!(world.send().await, (0, 0, 0));
    // Alerts from the time when emails were off are not sent later.
    world.settings(json!({"email": true})).await;
    assert_eq!(world.send().await, (0, 0, 0));
    world.alert("C").await;
    assert_eq!(world.send().await, (1, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_are_collected_and_the_number_of_emails_is_limited() {
    let world = World::new().await;
    for n in 0..30 {
        world.alert(&format!("Key {n}")).await;
    }
    assert_eq!(world.send().await, (1, 0, 0));
    let mail = world.smtp.received().remove(0);
    assert!(text(&mail).contains("30 quota alerts"), "{}", mail.message);
    for n in 1..6 {
        world.alert(&format!("Later {n}")).await;
        assert_eq!(world.send().await, (1, 0, 0), "{n}");
    }
    world.alert("Seventh").await;
    assert_eq!(
        world.send().await,
        (0, 0, 0),
        "at most six emails are sent in an hour"
    );
    world.alert("Eighth").await;
    world
        .sql("UPDATE mails SET created_at = created_at - interval '1 hour'")
        .await;
    assert_eq!(world.send().await, (1, 0, 0));
    let last = world.smtp.received().pop().expect("an email");
    let text = text(&last);
    assert!(
        text.contains("Seventh") && text.contains("Eighth"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn temporary_refusal_is_retried_and_a_permanent_one_is_not() {
    let world = World::new().await;
    world.smtp.refuse("451 Try again later");
    world.alert("A").await;
    assert_eq!(world.send().await, (0, 1, 0));
    assert_eq!(
        world.send().await,
        (0, 0, 0),
        "no retry before the pause ends"
    );
    world
        .sql("UPDATE mails SET due_at = now() WHERE due_at IS NOT NULL")
        .await;
    assert_eq!(world.send().await, (1, 0, 0));
    assert_eq!(world.smtp.received().len(), 1);

    world.smtp.refuse("550 No such user");
    world.alert("B").await;
    assert_eq!(world.send().await, (0, 0, 1));
    let client = world.app.database.connect().await;
    let row = client
        .query_one("SELECT error FROM mails WHERE status = 'failed'", &[])
        .await
        .expect("one failed");
    let error: &str = row.get(0);
    assert!(error.contains("No such user"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_password_is_an_outage_and_the_right_one_is_sent() {
    let smtp = SmtpServer::start().await;
    // "\0ada\0p@ss" in Base64.
    smtp.require_credentials("AGFkYQBwQHNz");
    let wrong = with_smtp(TestApp::setup(), &smtp, "ada:wrong@").without_jobs();
    let app = wrong.start().await;
    let account = app.register().await;
    let world = World { app, smtp, account };
    world.alert("A").await;
    assert_eq!(world.send().await, (0, 1, 0));
    world.sql("UPDATE mails SET due_at = now()").await;
    let right = with_smtp(TestApp::setup(), &world.smtp, "ada:p%40ss@").without_jobs();
    let right = right.database(world.app.database.clone()).start().await;
    let state = &right.state;
    let sent = state.alerts.send_emails(&state.mailer).await;
    assert_eq!(sent.expect("a round").sent, 1);
    assert_eq!(world.smtp.received().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_write_and_send_each_email_once() {
    let world = World::new().await;
    let second = with_smtp(TestApp::setup(), &world.smtp, "").without_jobs();
    let second = second.database(world.app.database.clone()).start().await;
    world.alert("A").await;
    let mut rounds = tokio::task::JoinSet::new();
    for i in 0..12 {
        let state = if i % 2 == 0 { &world.app } else { &second }.state.clone();
        rounds.spawn(async move {
            let url = &state.config.public_url;
            state.alerts.write_emails(url, 0).await.expect("emails");
            let sent = state.alerts.send_emails(&state.mailer).await;
            sent.expect("a round").sent
        });
    }
    let sent: u64 = rounds.join_all().await.into_iter().sum();
    assert_eq!(sent, 1);
    assert_eq!(world.smtp.received().len(), 1);
}

/// Without a limit on the total number of emails, someone who creates many accounts could make the server send any
/// number of them.
#[tokio::test(flavor = "multi_thread")]
async fn emails_to_all_tenants_are_limited_and_the_others_wait() {
    let world = World::new().await;
    let state = &world.app.state;
    let others = [world.app.register().await, world.app.register().await];
    world.alert("A").await;
    for other in &others {
        let copy = format!(
            "INSERT INTO quota_alerts (tenant_id, id, key_id, key_name, policy, threshold, quota, used, window_start, \
                 window_end, email_pending) \
             SELECT '{}', gen_random_uuid(), key_id, key_name, policy, threshold, quota, used, window_start, window_end, \
                 true FROM quota_alerts WHERE tenant_id = '{}'",
            other.tenant_id, world.account.tenant_id
        );
        world.sql(&copy).await;
    }
    let url = &state.config.public_url;
    for round in 0..2 {
        let written = state.alerts.write_emails(url, 2).await.expect("emails");
        assert!(written.is_limited, "round {round}");
    }
    let sent = state.alerts.send_emails(&state.mailer).await;
    assert_eq!(sent.expect("a round").sent, 2);
    // An hour later, the third email is sent.
    world
        .sql("UPDATE mails SET created_at = created_at - interval '61 minutes'")
        .await;
    let written = state.alerts.write_emails(url, 2).await.expect("emails");
    assert!(!written.is_limited);
    let sent = state.alerts.send_emails(&state.mailer).await;
    assert_eq!(sent.expect("a round").sent, 1);
    assert_eq!(world.smtp.received().len(), 3);
}

/// Covers all steps from a request to the email. The test does not trigger any of the steps in between.
#[tokio::test(flavor = "multi_thread")]
async fn email_arrives_by_itself_when_a_quota_is_used_up() {
    let smtp = SmtpServer::start().await;
    let app = with_smtp(TestApp::setup(), &smtp, "").start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({"daily_quota": 1})).await;
    let key = app.key(&account, &plan).await;
    assert_eq!(app.echo(&key.text).await.status, 200);
    let began = std::time::Instant::now();
    while smtp.received().is_empty() {
        assert!(began.elapsed() < Duration::from_secs(60), "no email");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(Duration::from_secs(6)).await;
    let received = smtp.received();
    assert_eq!(received.len(), 1, "only the highest threshold");
    assert!(text(&received[0]).contains("has used up its daily quota"));
    assert_eq!(received[0].to, std::slice::from_ref(&account.email));
    assert!(!received[0].message.contains(PASSWORD));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_mail_server_emails_are_files() {
    let data = crate::support::quota::data_dir();
    let app = TestApp::setup().data_dir(data.path()).without_jobs();
    let app = app.start().await;
    let account = app.register().await;
    let smtp = SmtpServer::start().await;
    let world = World { app, smtp, account };
    world.alert("Mobile app").await;
    assert_eq!(world.send().await, (1, 0, 0));
    let files = std::fs::read_dir(data.path().join("mail")).expect("a directory");
    let files: Vec<_> = files.map(|it| it.expect("an entry").path()).collect();
    assert_eq!(files.len(), 1);
    let content = std::fs::read_to_string(&files[0]).expect("a file");
    assert!(
        content.contains(&world.account.email) && content.contains("Mobile app"),
        "{content}"
    );
    assert!(world.smtp.received().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn tenant_whose_emails_cannot_be_written_does_not_delay_others() {
    let world = World::new().await;
    world.alert("A").await;
    let other = World {
        account: world.app.register().await,
        ..world
    };
    other.alert("B").await;
    let own = &other.account.email;
    other
        .sql(&format!(
            "ALTER TABLE mails ADD CONSTRAINT only_one CHECK (recipient = '{own}')"
        ))
        .await;
    assert_eq!(other.send().await, (1, 0, 0));
    assert_eq!(other.recipients(), std::slice::from_ref(own));
    other
        .sql("ALTER TABLE mails DROP CONSTRAINT only_one")
        .await;
    assert_eq!(other.send().await, (1, 0, 0));
}

/// The mail server eventually accepts the message, but by then, another replica may have sent it.
#[tokio::test(flavor = "multi_thread")]
async fn mail_server_that_takes_too_long_is_an_outage() {
    let world = World::new().await;
    world.alert("A").await;
    // Each response arrives within the time limit for one command, but all of them together take too long.
    world.smtp.delay(Duration::from_secs(9));
    let began = std::time::Instant::now();
    assert_eq!(world.send().await, (0, 1, 0));
    let took = began.elapsed();
    assert!(took < Duration::from_secs(35), "{took:?}");
    world.smtp.delay(Duration::ZERO);
    world.sql("UPDATE mails SET due_at = now()").await;
    assert_eq!(world.send().await, (1, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_emails_of_one_tenant_do_not_delay_others() {
    let world = World::new().await;
    let tenant = &world.account.tenant_id;
    world
        .sql(&format!(
            "INSERT INTO mails (tenant_id, id, recipient, subject, text_body, html_body, due_at) \
             SELECT '{tenant}', gen_random_uuid(), 'many@example.com', 'Hello', 'Text', '<p>HTML</p>', \
                 now() - interval '1 hour' FROM generate_series(1, 50)"
        ))
        .await;
    let other = World {
        account: world.app.register().await,
        ..world
    };
    other.alert("Mobile app").await;
    let (sent, ..) = other.send().await;
    assert!(sent < 50, "{sent}");
    let recipients = other.recipients();
    assert!(recipients.contains(&other.account.email), "{recipients:?}");
    assert!(recipients.len() > 2, "{recipients:?}");
}
