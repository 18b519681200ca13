//! Tests of the demo that `quota serve --demo` creates.

use std::{fs, os::unix::fs::symlink};

use quota_server::demo;

use crate::support::app::TestApp;

async fn users(app: &TestApp) -> i64 {
    let database = app.database.connect().await;
    let count = database.query_one("SELECT count(*) FROM users", &[]).await;
    count.unwrap().get(0)
}

fn key(text: &str) -> &str {
    let line = text.lines().find(|it| it.contains("API key")).unwrap();
    line.split_whitespace().last().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn demo_is_created_once_even_if_its_key_cannot_be_looked_up() {
    let data = tempfile::tempdir().unwrap();
    let first = TestApp::setup().data_dir(data.path()).start().await;
    let shown = demo::create_once(&first.state).await.unwrap();
    assert!(shown.is_new);
    let file = data.path().join("demo.json");
    let stored = fs::read(&file).unwrap();
    let database = first.database.clone();
    first.stop().await;

    // A server that has just started has to look up the key in PostgreSQL.
    let second = TestApp::setup()
        .database(database.clone())
        .data_dir(data.path())
        .flag("--database-lock-timeout=100ms")
        .without_jobs()
        .start()
        .await;
    let holder = database.connect().await;
    let lock = "BEGIN; LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE";
    holder.batch_execute(lock).await.unwrap();
    assert!(demo::create_once(&second.state).await.is_err());
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(users(&second).await, 1);
    assert_eq!(fs::read(&file).unwrap(), stored);
    // Compare only the keys, because the text also contains links with the server's port.
    let again = demo::create_once(&second.state).await.unwrap();
    assert_eq!(key(&again.text), key(&shown.text));
    assert!(!again.is_new);
}

#[tokio::test(flavor = "multi_thread")]
async fn demo_is_not_created_if_its_secrets_cannot_be_stored() {
    let parent = tempfile::tempdir().unwrap();
    let (data, moved) = (parent.path().join("data"), parent.path().join("moved"));
    fs::create_dir(&data).unwrap();
    let app = TestApp::setup().data_dir(&data).start().await;
    // No file can be created in a directory whose path is a broken symbolic link, even by root.
    fs::rename(&data, &moved).unwrap();
    symlink(parent.path().join("missing"), &data).unwrap();
    assert!(demo::create_once(&app.state).await.is_err());
    assert_eq!(users(&app).await, 0);

    fs::remove_file(&data).unwrap();
    fs::rename(&moved, &data).unwrap();
    assert!(demo::create_once(&app.state).await.unwrap().is_new);
    assert_eq!(users(&app).await, 1);
}

/// The account and the key are inserted in two transactions. The second one fails.
#[tokio::test(flavor = "multi_thread")]
async fn incomplete_demo_is_completed_at_the_next_startup() {
    let data = tempfile::tempdir().unwrap();
    let app = TestApp::setup()
        .data_dir(data.path())
        .flag("--database-lock-timeout=100ms")
        .without_jobs()
        .start()
        .await;
    let holder = app.database.connect().await;
    let lock = "BEGIN; LOCK TABLE service_tokens IN EXCLUSIVE MODE";
    holder.batch_execute(lock).await.unwrap();
    assert!(demo::create_once(&app.state).await.is_err());
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(users(&app).await, 1);

    let stored = fs::read_to_string(data.path().join("demo.json")).unwrap();
    let shown = demo::create_once(&app.state).await.unwrap();
    assert!(shown.is_new);
    assert_eq!(users(&app).await, 1);
    // Other replicas may remember that the stored key does not exist, so another key was created.
    assert!(!stored.contains(key(&shown.text)));
    let echo = app.get("/v1/echo").header("X-API-Key", key(&shown.text));
    assert_eq!(echo.send().await.status, 200);
    let again = demo::create_once(&app.state).await.unwrap();
    assert_eq!(key(&again.text), key(&shown.text));
    assert!(!again.is_new);
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_demo_is_replaced_by_one_with_new_secrets() {
    let data = tempfile::tempdir().unwrap();
    let app = TestApp::setup()
        .data_dir(data.path())
        .without_jobs()
        .start()
        .await;
    let first = demo::create_once(&app.state).await.unwrap();
    let database = app.database.connect().await;
    database
        .batch_execute("DELETE FROM api_keys")
        .await
        .unwrap();
    app.state.keys.forget_all();
    let second = demo::create_once(&app.state).await.unwrap();
    assert!(second.is_new);
    assert_ne!(key(&second.text), key(&first.text));
    let status = async |key: &str| {
        let echo = app.get("/v1/echo").header("X-API-Key", key);
        echo.send().await.status
    };
    assert_eq!(status(key(&first.text)).await, 401);
    assert_eq!(status(key(&second.text)).await, 200);
}
