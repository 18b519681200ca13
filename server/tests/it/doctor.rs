//! `quota doctor`: what is well it says, what is not it names, and passwords it keeps to itself.

use std::{fs, net::SocketAddr, path::Path, process::Command, sync::Arc};

use quota_server::db;
use quota_testkit::redis::{RedisCluster, RedisServer, SentinelGroup, free_port};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use secrecy::SecretString;

use crate::support::{app::TestApp, postgres::TestDatabase};

struct Seen {
    text: String,
    status: Option<i32>,
}

impl Seen {
    #[track_caller]
    fn says(&self, what: &str) -> &Self {
        assert!(self.text.contains(what), "no {what:?} in\n{}", self.text);
        self
    }

    #[track_caller]
    fn well(&self) {
        assert_eq!(self.status, Some(0), "{}", self.text);
    }

    #[track_caller]
    fn needs_mending(&self) {
        assert_eq!(self.status, Some(1), "{}", self.text);
    }
}

async fn database() -> TestDatabase {
    let migrate =
        |url: String| async move { db::migrate(&SecretString::from(url)).await.map(drop) };
    TestDatabase::create(migrate).await
}

async fn doctor(database: &TestDatabase, settings: &[(&str, &str)]) -> Seen {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quota"));
    command
        .arg("doctor")
        .env_clear()
        .env("DATABASE_URL", database.url())
        .env("QUOTA_LISTEN", "127.0.0.1:0")
        .env("QUOTA_METRICS_LISTEN", "off")
        // A machine that is busy with other tests connects late.
        .env("QUOTA_REDIS_CONNECT_TIMEOUT", "5s")
        .envs(settings.iter().copied());
    let output = tokio::task::spawn(async move { command.output() })
        .await
        .expect("it does not panic")
        .expect("the binary runs");
    let text = [output.stdout, output.stderr].concat();
    Seen {
        text: String::from_utf8_lossy(&text).into_owned(),
        status: output.status.code(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_replica_needs_a_database_that_its_connections_fit() {
    let database = database().await;
    let seen = doctor(&database, &[]).await;
    seen.says("settings: valid\n")
        .says("redis: none: limits are kept in this process")
        .says("database: PostgreSQL ")
        .says("migrations applied")
        .says("database: 16 connections a replica, times 1: 16 of the ")
        .says("waits 500ms for a connection, 2s to connect, 2s for a statement, 1s for a lock")
        .well();
    let seen = doctor(&database, &[("QUOTA_DATABASE_POOL", "1000")]).await;
    seen.says(": too many\n").needs_mending();
    let seen = doctor(&database, &[("QUOTA_REPLICAS", "2")]).await;
    seen.says("2 replicas need a REDIS_URL").needs_mending();
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_are_counted_and_so_are_their_connections() {
    let server = RedisServer::start().await;
    let database = Arc::new(database().await);
    let url = server.url();
    let redis = ("REDIS_URL", url.as_str());
    let seen = doctor(&database, &[redis, ("QUOTA_REPLICAS", "3")]).await;
    seen.says("redis: single: 127.0.0.1:")
        .says(": Redis ")
        .says(", standalone, answers in ")
        .says("maxmemory-policy noeviction")
        .says("persistence: append-only file off, no snapshots")
        .says("redis: replicas connected: 0\n")
        .says("16 connections a replica, times 3: 48 of the ")
        .well();
    let seen = doctor(&database, &[redis, ("QUOTA_REPLICAS", "1000")]).await;
    seen.says("too many").needs_mending();

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
    let seen = doctor(&database, &[redis]).await;
    seen.says("warning: 127.0.0.1:")
        .says("maxmemory-policy allkeys-lru: counters may be thrown away")
        .says("redis: replicas connected: 2\n")
        .says("more replicas are connected than QUOTA_REPLICAS says: 2, not 1")
        .says("16 connections a replica, times 2: 32 of the ")
        .well();
    for replica in replicas {
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_would_not_do_needs_mending() {
    let server = RedisServer::start().await;
    let database = database().await;
    let url = server.url();
    let redis = ("REDIS_URL", url.as_str());
    server.command("CONFIG SET maxclients 20").await;
    let seen = doctor(&database, &[redis, ("QUOTA_REPLICAS", "9")]).await;
    seen.says("takes 20 connections (maxclients), and the replicas need ")
        .needs_mending();
    server.command("ACL SETUSER default -eval").await;
    let seen = doctor(&database, &[redis]).await;
    seen.says("does not run scripts with TIME and INFO")
        .says("NoPerm")
        .needs_mending();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_away_or_not_ours_needs_mending_and_its_password_stays_unsaid() {
    let database = database().await;
    let locked = RedisServer::start_with(&["--requirepass", "hunter2"]).await;
    doctor(&database, &[("REDIS_URL", &locked.url())])
        .await
        .says("redis: replicas connected: 0\n")
        .well();
    for url in [
        format!("redis://:hunter3@{}", locked.addr()),
        format!("redis://:hunter2@127.0.0.1:{}", free_port()),
        format!("redis+sentinel://:hunter2@{}/main", locked.addr()),
    ] {
        let seen = doctor(&database, &[("REDIS_URL", &url)]).await;
        assert!(!seen.text.contains("hunter"), "{}", seen.text);
        seen.says("redis: ").needs_mending();
    }
    let port = locked.addr().port().to_string();
    let options = ["--replicaof", "127.0.0.1", &port, "--masterauth", "hunter2"];
    let replica = RedisServer::start_with(&options).await;
    doctor(&database, &[("REDIS_URL", &replica.url())])
        .await
        .says(" is a slave, and no master")
        .needs_mending();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_master_behind_sentinel_is_looked_at() {
    let database = database().await;
    let group = SentinelGroup::start().await;
    doctor(&database, &[("REDIS_URL", &group.url())])
        .await
        .says("redis: sentinel: the master of main by ")
        .says(&format!("{}: Redis ", group.servers[0].addr()))
        .says("min-replicas-to-write is 0")
        .well();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nodes_of_a_cluster_are_looked_at() {
    let database = database().await;
    let mut cluster = RedisCluster::start().await;
    let seen = doctor(&database, &[("REDIS_URL", &cluster.url())]).await;
    seen.says("redis: cluster: the cluster of ").well();
    for node in &cluster.nodes {
        seen.says(&format!("{}: Redis ", node.addr()));
    }
    let one = format!("redis://{}", cluster.nodes[0].addr());
    doctor(&database, &[("REDIS_URL", &one)])
        .await
        .says("is of a cluster: name it as redis+cluster://")
        .needs_mending();
    cluster.nodes[1].kill().await;
    doctor(&database, &[("REDIS_URL", &cluster.url())])
        .await
        .says(&format!("warning: {}", cluster.nodes[1].addr()))
        .well();
}

/// A certificate of an authority of the test's own, in files.
fn certificate(dir: &Path) {
    let mut authority = CertificateParams::new(Vec::new()).expect("no names");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate().expect("chance");
    let root = authority.self_signed(&authority_key).expect("it signs");
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().expect("chance");
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let params = CertificateParams::new(names).expect("names");
    let certificate = params.signed_by(&key, &issuer).expect("it signs");
    fs::write(dir.join("root.pem"), root.pem()).expect("written");
    fs::write(dir.join("redis.pem"), certificate.pem()).expect("written");
    fs::write(dir.join("key.pem"), key.serialize_pem()).expect("written");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_spoken_to_a_redis_that_the_machine_trusts_and_to_no_other() {
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
        .says(", by TLS\n")
        .says(": Redis ")
        .well();
    doctor(&database, &[("REDIS_URL", &url), ("SSL_CERT_FILE", &own)])
        .await
        .needs_mending();
}
