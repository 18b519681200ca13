//! A migrated database for each test, copied from a template.
//!
//! The tests use the cluster in `QUOTA_TEST_POSTGRES`, which `cargo xtask test` starts for the whole run. Without this
//! variable, each test process starts its own cluster, whose data is in the first free slot of a directory in `/tmp`.
//! The directory is kept between runs. Starting these clusters is slow with nextest, which runs each test in its own
//! process.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
    time::Duration,
};

use quota_server::db::embedded::{EmbeddedError, EmbeddedPostgres};
use tokio_postgres::{Client, Config, NoTls, error::SqlState};
use uuid::Uuid;

/// The advisory lock that is held while the template is created.
const TEMPLATE_LOCK: i64 = 0x7155_6f74_6154;

/// A database for a single test. Dropping the value drops the database.
#[derive(Debug)]
pub(crate) struct TestDatabase {
    name: String,
    url: String,
}

impl TestDatabase {
    /// Copies the template. The first test of a cluster creates the template by running `migrate` with the URL of an
    /// empty database.
    pub(crate) async fn create<F, E>(migrate: impl FnOnce(String) -> F) -> Self
    where
        F: Future<Output = Result<(), E>>,
        E: std::fmt::Debug,
    {
        let admin = connect(admin_url()).await;
        let template = format!("quota_template_{:016x}", migrations_hash());
        // The lock is held by the session, so it is released no matter how the test ends.
        admin
            .execute("SELECT pg_advisory_lock($1)", &[&TEMPLATE_LOCK])
            .await
            .expect("a lock");
        if !exists(&admin, &template).await {
            make_template(&admin, &template, migrate).await;
        }
        admin
            .execute("SELECT pg_advisory_unlock($1)", &[&TEMPLATE_LOCK])
            .await
            .expect("this session holds the lock");

        let name = format!("quota_test_{}", Uuid::now_v7().simple());
        run(
            &admin,
            &format!("CREATE DATABASE {name} TEMPLATE {template}"),
        )
        .await;
        Self {
            url: url_of(&name),
            name,
        }
    }

    /// Creates an empty database, for tests of migrations.
    pub(crate) async fn create_empty() -> Self {
        let admin = connect(admin_url()).await;
        let name = format!("quota_test_{}", Uuid::now_v7().simple());
        run(
            &admin,
            &format!("CREATE DATABASE {name} TEMPLATE template0"),
        )
        .await;
        Self {
            url: url_of(&name),
            name,
        }
    }

    /// Returns the URL for the superuser, who owns the tables.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Connects as the superuser, who bypasses row-level security.
    pub(crate) async fn connect(&self) -> Client {
        connect(&self.url).await
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let sql = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        // `drop` cannot wait on the test's runtime. Failures are ignored: leftovers are removed with the cluster, or by
        // the next process that uses the cluster's slot.
        let _ = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                if let Ok((client, connection)) = tokio_postgres::connect(admin_url(), NoTls).await
                {
                    tokio::spawn(connection);
                    let _ =
                        tokio::time::timeout(Duration::from_secs(10), client.batch_execute(&sql))
                            .await;
                }
            });
            io::Result::Ok(())
        })
        .join();
    }
}

async fn exists(admin: &Client, name: &str) -> bool {
    admin
        .query_opt("SELECT 1 FROM pg_database WHERE datname = $1", &[&name])
        .await
        .expect("the catalog is readable")
        .is_some()
}

/// Creates the template under another name and renames it when it is complete, so that an existing template is always
/// valid.
async fn make_template<F, E>(admin: &Client, template: &str, migrate: impl FnOnce(String) -> F)
where
    F: Future<Output = Result<(), E>>,
    E: std::fmt::Debug,
{
    let making = format!("{template}_making");
    run(
        admin,
        &format!("DROP DATABASE IF EXISTS {making} WITH (FORCE)"),
    )
    .await;
    run(
        admin,
        &format!("CREATE DATABASE {making} TEMPLATE template0"),
    )
    .await;
    migrate(url_of(&making))
        .await
        .expect("the migrations apply");
    run(
        admin,
        &format!("ALTER DATABASE {making} RENAME TO {template}"),
    )
    .await;
}

/// Runs SQL that needs exclusive access to a database. Retries for a few seconds while other sessions are closing.
async fn run(admin: &Client, sql: &str) {
    for _ in 0..200 {
        match admin.batch_execute(sql).await {
            Ok(()) => return,
            Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) => {
                tokio::time::sleep(Duration::from_millis(25)).await;
            }
            Err(error) => panic!("{sql}: {error:?}"),
        }
    }
    panic!("{sql}: the database is still in use");
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls)
        .await
        .unwrap_or_else(|error| panic!("cannot connect to {url}: {error:?}"));
    tokio::spawn(connection);
    client
}

/// Returns the URL of a database on the cluster.
fn url_of(database: &str) -> String {
    let (cluster, _) = admin_url()
        .rsplit_once('/')
        .expect("a URL ends in a database");
    format!("{cluster}/{database}")
}

/// Returns the URL of the maintenance database, for the superuser.
fn admin_url() -> &'static str {
    static URL: OnceLock<String> = OnceLock::new();
    URL.get_or_init(|| {
        #[expect(clippy::disallowed_methods, reason = "tests have no `Config`")]
        let shared = std::env::var("QUOTA_TEST_POSTGRES");
        let url = shared.unwrap_or_else(|_| start_own());
        url.parse::<Config>()
            .unwrap_or_else(|error| panic!("QUOTA_TEST_POSTGRES is not a PostgreSQL URL: {error}"));
        url
    })
}

/// Starts a cluster that stops when this process exits, and returns the URL of the cluster's maintenance database. The
/// cluster runs on its own thread, because its runtime must outlive the runtimes of the tests.
fn start_own() -> String {
    let (url, started) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let postgres = first_free_slot().await;
            let template = postgres.database_url();
            let (cluster, _) = template.rsplit_once('/').expect("a URL ends in a database");
            let admin = format!("{cluster}/postgres");
            drop_leftovers(&admin).await;
            url.send(admin).expect("the test waits for the URL");
            std::future::pending::<()>().await;
            drop(postgres);
        });
    });
    started.recv().expect("the cluster starts")
}

async fn first_free_slot() -> EmbeddedPostgres {
    let settings = [
        ("fsync", "off"),
        ("synchronous_commit", "off"),
        ("full_page_writes", "off"),
        ("max_connections", "400"),
    ];
    let slots = slots();
    for slot in 0..256 {
        match EmbeddedPostgres::start_with(&slots.join(slot.to_string()), &settings).await {
            Ok(postgres) => return postgres,
            Err(EmbeddedError::InUse(_)) => {}
            Err(error) => panic!("the test database does not start: {error}"),
        }
    }
    panic!("256 test processes already have a cluster each");
}

/// Returns the directory of the slots, which must belong to this user: anyone can create files in `/tmp`.
fn slots() -> PathBuf {
    let me = nix::unistd::geteuid();
    let path = PathBuf::from(format!("/tmp/quota-test-slots-{me}"));
    match fs::DirBuilder::new().mode(0o711).create(&path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => panic!("cannot create {}: {error}", path.display()),
    }
    let metadata = fs::symlink_metadata(&path).expect("the directory exists");
    assert!(
        metadata.is_dir() && metadata.uid() == me.as_raw(),
        "{} belongs to another user: remove it",
        path.display()
    );
    path
}

/// Drops databases that an earlier process in the same slot left behind, and templates of other versions of the
/// migrations.
async fn drop_leftovers(admin_url: &str) {
    let admin = connect(admin_url).await;
    let template = format!("quota_template_{:016x}", migrations_hash());
    let rows = admin
        .query(
            "SELECT datname::text FROM pg_database WHERE datname ~ '^quota_(test|template)_'",
            &[],
        )
        .await
        .expect("the catalog is readable");
    for name in rows.iter().map(|row| row.get::<_, String>(0)) {
        if name != template {
            run(&admin, &format!("DROP DATABASE {name} WITH (FORCE)")).await;
        }
    }
}

/// Returns the directory of the migrations. Searches all parent directories, because the benchmarks include this file
/// in a crate at another depth.
fn migrations() -> PathBuf {
    let mut folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let found = folders.find_map(|it| Some(it.join("migrations")).filter(|it| it.is_dir()));
    found.expect("there are migrations")
}

/// Returns a hash (FNV-1a) that changes with any migration, so that no test uses an outdated template. The hash covers
/// the versions of the migrations that are compiled into this binary, and the content of the migration files, which may
/// be newer.
fn migrations_hash() -> u64 {
    let dir = migrations();
    let mut files: Vec<PathBuf> = fs::read_dir(&dir)
        .expect("there are migrations")
        .map(|entry| entry.expect("a readable entry").path().join("up.sql"))
        .collect();
    files.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for version in quota_server::db::versions() {
        add(version.as_bytes());
    }
    for file in files {
        let name = file
            .strip_prefix(&dir)
            .expect("the file is in the directory");
        add(name.as_os_str().as_encoded_bytes());
        add(&fs::read(&file).unwrap_or_default());
    }
    hash
}

#[tokio::test]
async fn each_database_is_a_copy_of_the_migrated_template() {
    async fn migrate(url: String) -> Result<(), tokio_postgres::Error> {
        let client = connect(&url).await;
        let dir = migrations();
        let mut files: Vec<PathBuf> = fs::read_dir(dir)
            .expect("there are migrations")
            .map(|entry| entry.expect("a readable entry").path().join("up.sql"))
            .collect();
        files.sort();
        for file in files {
            let sql = fs::read_to_string(&file).expect("readable");
            client.batch_execute(&sql).await?;
        }
        Ok(())
    }
    let (one, other) = tokio::join!(TestDatabase::create(migrate), TestDatabase::create(migrate));
    one.connect()
        .await
        .batch_execute("CREATE TABLE only_here (); SELECT count(*) FROM plans")
        .await
        .expect("the tables are there");
    let there = other
        .connect()
        .await
        .query_one("SELECT to_regclass('only_here')::text", &[])
        .await;
    assert_eq!(
        there.expect("the query succeeds").get::<_, Option<&str>>(0),
        None
    );

    let name = one.name.clone();
    drop(one);
    assert!(
        !exists(&connect(admin_url()).await, &name).await,
        "the database was dropped"
    );
}

#[tokio::test]
async fn empty_database_has_no_tables() {
    let database = TestDatabase::create_empty().await;
    let client = connect(database.url()).await;
    let row = client
        .query_one("SELECT to_regclass('plans')::text", &[])
        .await
        .expect("the query succeeds");
    assert_eq!(row.get::<_, Option<&str>>(0), None);
}
