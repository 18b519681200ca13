//! Tests migrations: up and down, concurrently, and with a restricted role.

use std::sync::Arc;

use quota_server::db;
use secrecy::SecretString;
use tokio_postgres::Client;

use crate::support::{app::TestApp, postgres::TestDatabase};

async fn migrate(url: &str) -> Vec<String> {
    db::migrate(&SecretString::from(url))
        .await
        .expect("the migrations apply")
}

/// Applies the migrations in a separate task, because [`migrate`] blocks.
async fn migrate_apart(url: &str) -> Vec<String> {
    let url = url.to_owned();
    tokio::spawn(async move { migrate(&url).await })
        .await
        .expect("the task does not panic")
}

/// Returns a description of what migrations create: columns, constraints, indexes, policies, row-level security,
/// functions, triggers, privileges and the comments of tables.
async fn shape(client: &Client) -> Vec<String> {
    let sql = "
        SELECT format('column %s.%s %s %s %s', c.relname, a.attname, format_type(a.atttypid, a.atttypmod),
            a.attnotnull, pg_get_expr(d.adbin, d.adrelid))
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
        UNION ALL SELECT format('constraint %s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace
        UNION ALL SELECT format('index %s', indexdef) FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL SELECT format('policy %s %s %s %s %s %s', tablename, policyname, roles, cmd, qual, with_check)
        FROM pg_policies WHERE schemaname = 'public'
        UNION ALL SELECT format('function %s %s', proname, prosrc) FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace
        UNION ALL SELECT format('trigger %s', pg_get_triggerdef(oid)) FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL SELECT format('right %s %s %s', table_name, grantee, privilege_type)
        FROM information_schema.role_table_grants WHERE grantee LIKE 'quota%'
        UNION ALL SELECT format('secured %s %s %s', relname, relrowsecurity, relforcerowsecurity)
        FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')
        UNION ALL SELECT format('comment %s %s', objoid::regclass, description) FROM pg_description
        WHERE classoid = 'pg_class'::regclass AND objoid::regclass::text !~ '^pg_|\\.'
        ORDER BY 1";
    let rows = client
        .query(sql, &[])
        .await
        .expect("the catalog is readable");
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn up_after_down_restores_the_schema() {
    let database = TestDatabase::create_empty().await;
    let client = database.connect().await;
    let empty = shape(&client).await;
    let applied = migrate(database.url()).await;
    assert_eq!(applied, db::versions());
    let up = shape(&client).await;
    assert!(up.len() > 100, "{}", up.len());
    assert_eq!(
        migrate(database.url()).await,
        Vec::<String>::new(),
        "a second time does nothing"
    );

    db::revert_all(&SecretString::from(database.url()))
        .await
        .expect("the migrations can be reverted");
    let down = shape(&client).await;
    let left = down
        .iter()
        .filter(|it| !it.contains("__diesel_schema_migrations"));
    assert_eq!(
        left.collect::<Vec<_>>(),
        empty.iter().collect::<Vec<_>>(),
        "nothing is left"
    );

    assert_eq!(migrate(database.url()).await, db::versions());
    assert_eq!(shape(&client).await, up);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_migrations_both_succeed() {
    let database = TestDatabase::create_empty().await;
    let (one, other, third) = tokio::join!(
        migrate_apart(database.url()),
        migrate_apart(database.url()),
        migrate_apart(database.url())
    );
    let mut applied = [one, other, third].concat();
    applied.sort();
    assert_eq!(
        applied,
        db::versions(),
        "each migration is applied exactly once"
    );
}

/// Roles belong to the cluster, and the migrations of two databases in the cluster create the roles concurrently.
#[tokio::test(flavor = "multi_thread")]
async fn two_databases_in_one_cluster_do_not_interfere() {
    let (one, other) = tokio::join!(TestDatabase::create_empty(), TestDatabase::create_empty());
    tokio::join!(migrate_apart(one.url()), migrate_apart(other.url()));
    // Reverting the migrations of one database does not affect the other database.
    db::revert_all(&SecretString::from(one.url()))
        .await
        .expect("the migrations can be reverted");
    let app = TestApp::setup().database(Arc::new(other)).start().await;
    app.register().await;
    app.stop().await;
    drop(one);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_constraint_is_named_and_every_table_has_a_comment() {
    let database = TestDatabase::create_empty().await;
    migrate(database.url()).await;
    let client = database.connect().await;
    // NOT NULL constraints are not named in migrations, but as of PostgreSQL 18, they are constraints in the catalog.
    // Partitions have the constraints of the table that they belong to.
    let sql = "SELECT conrelid::regclass::text, conname::text FROM pg_constraint \
        WHERE connamespace = 'public'::regnamespace AND contype <> 'n' \
        AND conrelid <> '__diesel_schema_migrations'::regclass \
        AND conrelid NOT IN (SELECT inhrelid FROM pg_inherits)";
    let constraints = client
        .query(sql, &[])
        .await
        .expect("the catalog is readable");
    assert!(constraints.len() > 40, "{}", constraints.len());
    let written = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../migrations"))
        .expect("there are migrations")
        .map(|entry| entry.expect("a readable entry").path().join("up.sql"))
        .map(|path| std::fs::read_to_string(path).unwrap_or_default())
        .collect::<String>();
    for row in constraints {
        let (table, name): (&str, &str) = (row.get(0), row.get(1));
        assert!(
            written.contains(&format!("CONSTRAINT {name} "))
                || written.contains(&format!("CONSTRAINT {name}\n")),
            "{table}: PostgreSQL has named {name} itself"
        );
        assert!(
            name.starts_with(table),
            "{table}: {name} does not name its table"
        );
    }
    let sql = "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace \
        AND relkind IN ('r', 'p') AND relname <> '__diesel_schema_migrations' \
        AND coalesce(length(obj_description(oid, 'pg_class')), 0) < 10";
    let silent = client
        .query(sql, &[])
        .await
        .expect("the catalog is readable");
    let silent = silent
        .iter()
        .map(|row| row.get::<_, &str>(0))
        .collect::<Vec<_>>();
    assert!(silent.is_empty(), "without a comment: {silent:?}");

    // Without an index on a foreign key, every delete of a referenced row reads the whole table with the foreign key.
    let sql = "SELECT conname::text FROM pg_constraint f WHERE contype = 'f' \
        AND connamespace = 'public'::regnamespace AND NOT EXISTS (SELECT FROM pg_index i \
            WHERE i.indrelid = f.conrelid AND f.conkey @> (i.indkey::int2[])[0:cardinality(f.conkey) - 1] \
            AND (i.indkey::int2[])[0:cardinality(f.conkey) - 1] @> f.conkey)";
    let bare = client
        .query(sql, &[])
        .await
        .expect("the catalog is readable");
    let bare = bare
        .iter()
        .map(|row| row.get::<_, &str>(0))
        .collect::<Vec<_>>();
    // These foreign keys need no such index: users are never deleted individually, and the plans of keys have a
    // separate index.
    let known = [
        "api_keys_plan_fkey",
        "audit_events_user_fkey",
        "sessions_membership_fkey",
    ];
    let bare = bare
        .into_iter()
        .filter(|it| !known.contains(it))
        .collect::<Vec<_>>();
    assert!(bare.is_empty(), "without an index: {bare:?}");
}

/// Simulates hosted PostgreSQL: the owner of the database may create roles but is not a superuser.
#[tokio::test(flavor = "multi_thread")]
async fn role_without_superuser_migrates_and_serves() {
    let database = TestDatabase::create_empty().await;
    let admin = database.connect().await;
    let role = format!("quota_owner_{}", uuid::Uuid::now_v7().simple());
    let name: String = admin
        .query_one("SELECT current_database()::text", &[])
        .await
        .expect("the query succeeds")
        .get(0);
    // If another role has created `quota_app` and `quota_system`, the owner must be made a member of both, as described
    // in the migration.
    let version: i32 = admin
        .query_one("SELECT current_setting('server_version_num')::int", &[])
        .await
        .expect("the query succeeds")
        .get(0);
    admin
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN CREATEROLE PASSWORD 'own-er';
             ALTER DATABASE {name} OWNER TO {role};"
        ))
        .await
        .expect("a superuser can create roles");
    for shared in ["quota_app", "quota_system"] {
        let admin_option = if version >= 160_000 {
            "WITH ADMIN OPTION"
        } else {
            ""
        };
        let there = admin
            .query_opt("SELECT 1 FROM pg_roles WHERE rolname = $1", &[&shared])
            .await
            .expect("the query succeeds");
        if there.is_some() {
            let grant = format!("GRANT {shared} TO {role} {admin_option}");
            admin
                .batch_execute(&grant)
                .await
                .expect("a superuser can grant roles");
        }
    }
    let url = as_role(database.url(), &role);
    assert_eq!(migrate(&url).await, db::versions());

    let database = Arc::new(database);
    let app = TestApp::setup()
        .database(database.clone())
        .url(&url)
        .start()
        .await;
    let account = app.register().await;
    let plan = app
        .plan(&account, serde_json::json!({"daily_quota": 100}))
        .await;
    let key = app.key(&account, &plan).await;
    assert_eq!(app.echo(&key.text).await.status, 200);
    assert_eq!(app.get("/health/ready").send().await.status, 200);
    let owner: String = admin
        .query_one(
            "SELECT tableowner::text FROM pg_tables WHERE tablename = 'plans'",
            &[],
        )
        .await
        .expect("the query succeeds")
        .get(0);
    assert_eq!(owner, role);
    app.stop().await;
    db::revert_all(&SecretString::from(url))
        .await
        .expect("the role can revert the migrations");
    let drop =
        format!("REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role}; DROP ROLE {role}");
    admin
        .batch_execute(&drop)
        .await
        .expect("the roles own nothing anymore");
}

/// Returns the URL of the same database, with another role.
fn as_role(url: &str, role: &str) -> String {
    let mut url = url.to_owned();
    if let Ok(mut parsed) = url::Url::parse(&url)
        && parsed.set_username(role).is_ok()
        && parsed.set_password(Some("own-er")).is_ok()
    {
        url = parsed.to_string();
    }
    assert!(url.contains(role), "{url} cannot name a role");
    url
}
