//! Tests that `quota doctor` reports what works and what does not, and never prints a password.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::Path,
    process::Command,
    sync::Arc,
};

use quota_server::db;
use quota_testkit::{
    redis::{RedisServer, free_port},
    redis_group::{RedisCluster, SentinelGroup},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use secrecy::SecretString;

use crate::support::{
    app::TestApp,
    postgres::TestDatabase,
    quota::{Quota, data_dir},
};

struct Output {
    text: String,
    status: Option<i32>,
}

impl Output {
    #[track_caller]
    fn says(&self, text: &str) -> &Self {
        assert!(self.text.contains(text), "no {text:?} in\n{}", self.text);
        self
    }

    #[track_caller]
    fn succeeds(&self) {
        assert_eq!(self.status, Some(0), "{}", self.text);
    }

    #[track_caller]
    fn fails(&self) {
        assert_eq!(self.status, Some(1), "{}", self.text);
    }
}

async fn database() -> TestDatabase {
    let migrate =
        |url: String| async move { db::migrate(&SecretString::from(url)).await.map(drop) };
    TestDatabase::create(migrate).await
}

async fn doctor(database: &TestDatabase, settings: &[(&str, &str)]) -> Output {
    let mut all = vec![
        ("DATABASE_URL", database.url()),
        ("QUOTA_LISTEN", "127.0.0.1:0"),
        ("QUOTA_METRICS_LISTEN", "off"),
        // Connecting may be slow while other tests run.
        ("QUOTA_REDIS_CONNECT_TIMEOUT", "5s"),
    ];
    all.extend(settings);
    run(&all).await
}

/// Returns the value of `PATH`, so that `quota doctor` can find `initdb` and `postgres`.
#[expect(clippy::disallowed_methods, reason = "the path is not a setting")]
fn programs() -> String {
    std::env::var("PATH").unwrap_or_default()
}

/// Runs `quota doctor` with only these settings.
async fn run(settings: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quota"));
    command
        .arg("doctor")
        .env_clear()
        .envs(settings.iter().copied());
    let output = tokio::task::spawn(async move { command.output() })
        .await
        .expect("no panic")
        .expect("the binary runs");
    let text = [output.stdout, output.stderr].concat();
    Output {
        text: String::from_utf8_lossy(&text).into_owned(),
        status: output.status.code(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn single_replica_needs_a_database_that_allows_its_connections() {
    let database = database().await;
    let output = doctor(&database, &[]).await;
    output.says("settings: valid\n")
        .says("redis: not configured: limits are kept in memory")
        .says("database: PostgreSQL ")
        .says("migrations applied")
        .says("database: 16 connections per replica × 1: 16 of ")
        .says("timeouts: 500ms for a free connection, 2s to connect, 2s for a statement, 1s for a lock")
        .succeeds();
    let output = doctor(&database, &[("QUOTA_DATABASE_POOL", "1000")]).await;
    output.says(": too many\n").fails();
    let output = doctor(&database, &[("QUOTA_REPLICAS", "2")]).await;
    output.says("2 replicas need REDIS_URL").fails();
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_and_their_connections_are_counted() {
    let server = RedisServer::start().await;
    let database = Arc::new(database().await);
    let url = server.url();
    let redis = ("REDIS_URL", url.as_str());
    let output = doctor(&database, &[redis, ("QUOTA_REPLICAS", "3")]).await;
    output
        .says("redis: single: 127.0.0.1:")
        .says(": Redis ")
        .says(", standalone, responds in ")
        .says("maxmemory-policy noeviction")
        .says("persistence: append-only file off, no snapshots")
        .says("redis: replicas connected: 0\n")
        .says("16 connections per replica × 3: 48 of ")
        .succeeds();
    let output = doctor(&database, &[redis, ("QUOTA_REPLICAS", "1000")]).await;
    output.says("too many").fails();

    server
        .command("CONFIG SET maxmemory-policy allkeys-lru")
        .await;
    let mut replicas = Vec::new();
    for _ in 0..2 {
        let setup = TestApp::setup().database(database.clone());
        replicas.push(setup.flag(format!("--redis-url={url}")).start().await);
    }
    let channel = "PUBSUB NUMSUB quota:revoked";
    while !server.command(channel).await.contains(":2\r\n") {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let output = doctor(&database, &[redis]).await;
    output
        .says("warning: 127.0.0.1:")
        .says("maxmemory-policy allkeys-lru: counters may be evicted")
        .says("redis: replicas connected: 2\n")
        .says("2 replicas are connected, but QUOTA_REPLICAS is 1")
        .says("16 connections per replica × 2: 32 of ")
        .succeeds();
    // Enough for one replica, but not for two.
    server.command("CONFIG SET maxclients 17").await;
    let output = doctor(&database, &[redis, ("QUOTA_REDIS_CONNECTIONS", "8")]).await;
    output
        .says("allows 17 connections (maxclients), but the replicas need 18")
        .fails();
    for replica in replicas {
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unsuitable_redis_fails_the_check() {
    let server = RedisServer::start().await;
    let database = database().await;
    let url = server.url();
    let redis = ("REDIS_URL", url.as_str());
    server.command("CONFIG SET maxclients 20").await;
    let output = doctor(&database, &[redis, ("QUOTA_REPLICAS", "9")]).await;
    output
        .says("allows 20 connections (maxclients), but the replicas need ")
        .fails();
    server.command("ACL SETUSER default -eval").await;
    let output = doctor(&database, &[redis]).await;
    output
        .says("rejects scripts that call TIME and INFO")
        .says("NoPerm")
        .fails();
}

#[tokio::test(flavor = "multi_thread")]
async fn almost_full_redis_is_a_warning() {
    let server = RedisServer::start().await;
    let database = database().await;
    let url = server.url();
    let redis = ("REDIS_URL", url.as_str());
    doctor(&database, &[redis])
        .await
        .says(" MiB used, no maxmemory\n")
        .succeeds();
    server.command("CONFIG SET maxmemory 1gb").await;
    doctor(&database, &[redis])
        .await
        .says(" MiB used, maxmemory is 1024 MiB\n")
        .succeeds();
    let memory = server.command("INFO memory").await;
    let used = memory
        .lines()
        .find_map(|it| it.strip_prefix("used_memory:"));
    let used: u64 = used.expect("a number").trim().parse().expect("a number");
    server
        .command(&format!("CONFIG SET maxmemory {}", used + used / 10))
        .await;
    doctor(&database, &[redis])
        .await
        .says("warning: 127.0.0.1:")
        .says(": when the memory is full, Redis rejects writes, as in an outage; raise maxmemory\n")
        .succeeds();
}

#[tokio::test(flavor = "multi_thread")]
async fn hidden_properties_of_redis_are_reported_as_unknown() {
    let server = RedisServer::start().await;
    let database = database().await;
    let url = server.url();
    let redis = ("REDIS_URL", url.as_str());
    server
        .command("ACL SETUSER default -pubsub|numsub -config|get")
        .await;
    doctor(&database, &[redis])
        .await
        .says("persistence: append-only file off, snapshots unknown\n")
        .says("redis: replicas connected: unknown\n")
        .succeeds();
    // The counters require INFO, so this check fails.
    server.command("ACL SETUSER default -info").await;
    let output = doctor(&database, &[redis]).await;
    output
        .says("rejects scripts that call TIME and INFO")
        .says(": unknown version, unknown mode, responds in ")
        .says(": unknown role: it must be a master\n")
        .says(": unknown maxmemory-policy: it must be noeviction\n")
        .says(": memory: unknown\n")
        .says("persistence: append-only file unknown, snapshots unknown\n")
        .fails();
    assert!(!output.text.contains("is a "), "{}", output.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_or_foreign_redis_fails_the_check_and_no_password_is_shown() {
    let database = database().await;
    let locked = RedisServer::start_with(&["--requirepass", "hunter2"]).await;
    doctor(&database, &[("REDIS_URL", &locked.url())])
        .await
        .says("redis: replicas connected: 0\n")
        .succeeds();
    for url in [
        format!("redis://:hunter3@{}", locked.addr()),
        format!("redis://:hunter2@127.0.0.1:{}", free_port()),
        format!("redis+sentinel://:hunter2@{}/main", locked.addr()),
    ] {
        let output = doctor(&database, &[("REDIS_URL", &url)]).await;
        assert!(!output.text.contains("hunter"), "{}", output.text);
        output.says("redis: ").fails();
    }
    let port = locked.addr().port().to_string();
    let options = ["--replicaof", "127.0.0.1", &port, "--masterauth", "hunter2"];
    let replica = RedisServer::start_with(&options).await;
    doctor(&database, &[("REDIS_URL", &replica.url())])
        .await
        .says(" is a slave, not a master")
        .fails();
}

#[tokio::test(flavor = "multi_thread")]
async fn master_behind_sentinel_is_checked() {
    let database = database().await;
    let group = SentinelGroup::start().await;
    let url = group.url();
    let redis = ("REDIS_URL", url.as_str());
    doctor(&database, &[redis])
        .await
        .says("redis: sentinel: the master of main, via sentinels ")
        .says(&format!("{}: Redis ", group.servers[0].addr()))
        .says("min-replicas-to-write is 0")
        .succeeds();
    let master = &group.servers[0];
    master.command("CONFIG SET min-replicas-to-write 1").await;
    doctor(&database, &[redis])
        .await
        .says("min-replicas-max-lag is 10, so a partitioned master keeps accepting writes for 10 seconds")
        .succeeds();
    master.command("CONFIG SET min-replicas-max-lag 1").await;
    let output = doctor(&database, &[redis]).await;
    output.succeeds();
    assert!(!output.text.contains("min-replicas"), "{}", output.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_a_cluster_are_checked() {
    let database = database().await;
    let mut cluster = RedisCluster::start().await;
    let output = doctor(&database, &[("REDIS_URL", &cluster.url())]).await;
    output.says("redis: cluster: the cluster ").succeeds();
    for node in &cluster.nodes {
        output.says(&format!("{}: Redis ", node.addr()));
    }
    let one = format!("redis://{}", cluster.nodes[0].addr());
    doctor(&database, &[("REDIS_URL", &one)])
        .await
        .says("is a cluster node: use redis+cluster://")
        .fails();
    cluster.nodes[1].kill().await;
    doctor(&database, &[("REDIS_URL", &cluster.url())])
        .await
        .says(&format!("warning: {}", cluster.nodes[1].addr()))
        .succeeds();
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_may_be_in_use_only_by_a_running_server() {
    let database = database().await;
    let other = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = other.local_addr().expect("an address").to_string();
    doctor(&database, &[("QUOTA_LISTEN", &addr)])
        .await
        .says(&format!("QUOTA_LISTEN: cannot listen on {addr}: "))
        .fails();
}

#[tokio::test(flavor = "multi_thread")]
async fn running_server_with_a_private_postgres_passes() {
    let dir = data_dir();
    let path = dir.path().display().to_string();
    let server = Quota::start(dir.path());
    let (addr, metrics) = (server.addr.to_string(), server.metrics_addr.to_string());
    let programs = programs();
    let settings = [
        ("PATH", programs.as_str()),
        ("QUOTA_DATA_DIR", &path),
        ("QUOTA_LISTEN", &addr),
        ("QUOTA_METRICS_LISTEN", &metrics),
    ];
    let output = run(&settings).await;
    output
        .says(&format!(
            "QUOTA_LISTEN: {addr} is in use; a server is running\n"
        ))
        .says(&format!(
            "QUOTA_METRICS_LISTEN: {metrics} is in use; a server is running\n"
        ))
        .says("redis: not configured")
        .says("database: the running server uses the private PostgreSQL, and is ready\n")
        .succeeds();
    server.stop();
    run(&settings)
        .await
        .says(&format!("QUOTA_LISTEN: {addr} is available\n"))
        .says("database: PostgreSQL ")
        .succeeds();
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_settings_are_named() {
    run(&[("QUOTA_LISTEN", "8080")])
        .await
        .says("QUOTA_LISTEN: ")
        .says("invalid settings\n")
        .fails();
}

#[tokio::test(flavor = "multi_thread")]
async fn private_postgres_is_not_created() {
    let dir = data_dir();
    let path = dir.path().join("data").display().to_string();
    let programs = programs();
    let settings = [
        ("PATH", programs.as_str()),
        ("QUOTA_DATA_DIR", &path),
        ("QUOTA_LISTEN", "127.0.0.1:0"),
        ("QUOTA_METRICS_LISTEN", "off"),
    ];
    run(&settings)
        .await
        .says("database: PostgreSQL is installed; the server creates its private database at the first startup\n")
        .says("redis: not configured")
        .succeeds();
    assert!(!Path::new(&path).exists());
}

/// Writes a certificate, and the certificate of the authority that issued it.
fn certificate(dir: &Path) {
    let mut authority = CertificateParams::new(Vec::new()).expect("no names");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate().expect("a key");
    let root = authority
        .self_signed(&authority_key)
        .expect("a signed certificate");
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().expect("a key");
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let params = CertificateParams::new(names).expect("names");
    let certificate = params
        .signed_by(&key, &issuer)
        .expect("a signed certificate");
    fs::write(dir.join("root.pem"), root.pem()).expect("written");
    fs::write(dir.join("redis.pem"), certificate.pem()).expect("written");
    fs::write(dir.join("key.pem"), key.serialize_pem()).expect("written");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_accepts_only_certificates_that_the_system_trusts() {
    let dir = tempfile::tempdir().expect("a directory");
    certificate(dir.path());
    let file = |name: &str| dir.path().join(name).display().to_string();
    let (root, own, key) = (file("root.pem"), file("redis.pem"), file("key.pem"));
    let port = free_port();
    let _server = RedisServer::start_with(&[
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        &own,
        "--tls-key-file",
        &key,
        "--tls-ca-cert-file",
        &root,
        "--tls-auth-clients",
        "no",
    ])
    .await;
    let database = database().await;
    let url = format!("rediss://{}", SocketAddr::from(([127, 0, 0, 1], port)));
    doctor(&database, &[("REDIS_URL", &url), ("SSL_CERT_FILE", &root)])
        .await
        .says(" over TLS\n")
        .says(": Redis ")
        .succeeds();
    doctor(&database, &[("REDIS_URL", &url), ("SSL_CERT_FILE", &own)])
        .await
        .fails();
}

#[tokio::test(flavor = "multi_thread")]
async fn unencrypted_connection_over_a_public_network_is_a_warning() {
    let database = database().await;
    // Nothing listens at this address, which is reserved for documentation.
    let public = "postgres://quota@203.0.113.7:5432/quota?connect_timeout=1";
    doctor(&database, &[("DATABASE_URL", public)])
        .await
        .says("database: warning: the connection to 203.0.113.7 is not encrypted");
    let encrypted = format!("{public}&sslmode=require");
    let output = doctor(&database, &[("DATABASE_URL", &encrypted)]).await;
    assert!(!output.text.contains("is not encrypted"), "{}", output.text);
    let local = doctor(&database, &[]).await;
    assert!(!local.text.contains("is not encrypted"), "{}", local.text);
}
