//! Tests of the demo that `quota serve --demo` creates.

use std::fs;

use quota_server::demo;

use crate::support::app::TestApp;

#[tokio::test(flavor = "multi_thread")]
async fn demo_is_created_once_even_if_its_key_cannot_be_looked_up() {
    let data = tempfile::tempdir().unwrap();
    let first = TestApp::setup().data_dir(data.path()).start().await;
    let shown = demo::create_once(&first.state).await.unwrap();
    let file = data.path().join("demo.json");
    let stored = fs::read(&file).unwrap();
    let database = first.database.clone();
    first.stop().await;

    // After a restart, the key is not cached.
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
    let count = holder.query_one("SELECT count(*) FROM users", &[]).await;
    assert_eq!(count.unwrap().get::<_, i64>(0), 1);
    assert_eq!(fs::read(&file).unwrap(), stored);
    // The links contain the server's port.
    let again = demo::create_once(&second.state).await.unwrap();
    let key = |text: &str| {
        text.lines()
            .find(|it| it.contains("API key"))
            .map(str::to_owned)
    };
    assert_eq!(key(&again), key(&shown));
}
