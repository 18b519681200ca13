//! Decisions, by every way in.

use serde_json::json;

use crate::support::app::TestApp;

#[tokio::test(flavor = "multi_thread")]
async fn a_valid_key_gets_200_with_its_limits() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app
        .plan(&account, json!({"default_rpm": 600, "daily_quota": 5000}))
        .await;
    let key = app.key(&account, &plan).await;

    let answer = app.echo(&key.text).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body["key_id"], json!(key.id));
    assert_eq!(answer.number("x-ratelimit-limit"), 600);
    assert_eq!(answer.number("x-ratelimit-remaining"), 599);
    assert_eq!(
        answer.header("ratelimit-policy"),
        Some("\"rpm\";q=600;w=60, \"daily\";q=5000;w=86400")
    );
    let now = chrono::DateTime::parse_from_rfc2822(answer.header("date").unwrap())
        .unwrap()
        .timestamp();
    let reset = i64::try_from(answer.number("x-ratelimit-reset")).unwrap();
    assert!(
        (now..=now + 2).contains(&reset),
        "{reset} is not soon after {now}"
    );
}
