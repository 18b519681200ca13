//! Tests that queries and the server apply the same rule for access to paid plans.

use chrono::DateTime;
use quota_server::{
    clock::UnixNanos,
    repo::paid_access::{IS_CURRENT, PaidAccess},
};

use crate::support::app::TestApp;

#[tokio::test(flavor = "multi_thread")]
async fn queries_and_the_server_apply_the_same_rule() {
    let app = TestApp::setup().without_jobs().start().await;
    let client = app.database.connect().await;
    let sql = format!(
        "SELECT {IS_CURRENT} AS is_current, has_paid_access, now.micros, \
             (extract(epoch FROM paid_access_until) * 1000000)::bigint AS until \
         FROM (VALUES (true), (false)) granted (has_paid_access), \
             (VALUES (NULL), (now()), (now() - interval '1 microsecond'), (now() + interval '1 microsecond'), \
                 (now() - interval '1 year'), (now() + interval '1 year'), ('1901-01-01'), ('1970-01-01 00:00:00Z'), \
                 ('1970-01-01 00:00:00.000001Z'), ('3000-01-01')) ends (paid_access_until), \
             (SELECT (extract(epoch FROM now()) * 1000000)::bigint AS micros) now"
    );
    let rows = client.query(&sql, &[]).await.expect("valid SQL");
    assert_eq!(rows.len(), 20);
    let (mut current, mut not_current) = (0, 0);
    for row in rows {
        let until: Option<i64> = row.get("until");
        let until = until.map(|it| DateTime::from_timestamp_micros(it).expect("a time"));
        let now: i64 = row.get("micros");
        let now = UnixNanos(u64::try_from(now).expect("after 1970") * 1000);
        let access = PaidAccess::new(row.get("has_paid_access"), until);
        let is_current = access.is_current(|| now);
        assert_eq!(is_current, row.get::<_, bool>("is_current"), "{row:?}");
        *if is_current {
            &mut current
        } else {
            &mut not_current
        } += 1;
    }
    assert_eq!((current, not_current), (4, 16));
}
