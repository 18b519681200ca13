//! Makes every pair of changes concurrently on two replicas. Neither change causes a server error, each audited change
//! that succeeds is in the audit log once, and the result is the same as if the changes had been made one after the
//! other, in one of the two orders.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::support::app::{Account, Answer, Key, PASSWORD, TestApp};

const NEW_PASSWORD: &str = "granite-meadow-lantern-41";
/// How long a replica may take to apply a change.
const AT_MOST: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    /// Creates a key on the spare plan.
    CreateKey,
    /// Moves the key to the spare plan.
    MoveKey,
    DeactivateKey,
    RotateKey,
    DeleteKey,
    /// Creates a plan with the name that `RenamePlan` uses.
    CreatePlan,
    RenamePlan,
    /// Deletes the spare plan.
    DeletePlan,
    CreateToken,
    DeleteToken,
    UpdateTenant,
    /// This and the next two actions use the second session.
    Refresh,
    Logout,
    EndSession,
    /// Uses the first session. Ends all other sessions.
    ChangePassword,
    SignIn,
}

use Action::{
    ChangePassword, CreateKey, CreatePlan, CreateToken, DeactivateKey, DeleteKey, DeletePlan,
    DeleteToken, EndSession, Logout, MoveKey, Refresh, RenamePlan, RotateKey, SignIn, UpdateTenant,
};

const ALL: [Action; 16] = [
    CreateKey,
    MoveKey,
    DeactivateKey,
    RotateKey,
    DeleteKey,
    CreatePlan,
    RenamePlan,
    DeletePlan,
    CreateToken,
    DeleteToken,
    UpdateTenant,
    Refresh,
    Logout,
    EndSession,
    ChangePassword,
    SignIn,
];

/// Pairs in which exactly one action succeeds, regardless of which comes first.
const EXCLUSIVE: &[(Action, Action)] = &[
    (CreateKey, DeletePlan),
    (MoveKey, DeletePlan),
    (RotateKey, RotateKey),
    (DeleteKey, DeleteKey),
    (CreatePlan, CreatePlan),
    (CreatePlan, RenamePlan),
    (DeletePlan, DeletePlan),
    (DeleteToken, DeleteToken),
    (EndSession, EndSession),
    (ChangePassword, ChangePassword),
];

/// Pairs in which the first action fails if it comes after the second. In pairs that are in neither list, both succeed.
const ORDERED: &[(Action, Action)] = &[
    (MoveKey, DeleteKey),
    (DeactivateKey, DeleteKey),
    (RotateKey, DeleteKey),
    (RenamePlan, DeletePlan),
    (Refresh, Logout),
    (Refresh, EndSession),
    (Refresh, ChangePassword),
    (EndSession, Logout),
    (EndSession, ChangePassword),
    (SignIn, ChangePassword),
];

impl Action {
    /// Returns the action in the audit log. `None` if the change is not audited.
    const fn action(self) -> Option<&'static str> {
        Some(match self {
            CreateKey => "api_key.create",
            MoveKey | DeactivateKey => "api_key.update",
            RotateKey => "api_key.rotate",
            DeleteKey => "api_key.delete",
            CreatePlan => "plan.create",
            RenamePlan => "plan.update",
            DeletePlan => "plan.delete",
            CreateToken => "service_token.create",
            DeleteToken => "service_token.delete",
            UpdateTenant => "tenant.update",
            ChangePassword => "user.change_password",
            SignIn => "session.begin",
            EndSession => "session.end",
            // A refresh is never audited, and neither is signing out of a session that has already ended.
            Refresh | Logout => return None,
        })
    }
}

/// The resources that a pair of changes acts on.
struct World {
    account: Account,
    spare: String,
    key: Key,
    token_id: String,
    /// The tokens and the ID of the second session.
    refresh_token: String,
    access_token: String,
    session_id: String,
}

impl World {
    async fn new(app: &TestApp) -> Self {
        let account = app.register().await;
        let plan = app.plan(&account, json!({"default_rpm": 60_000})).await;
        let spare = app.plan(&account, json!({"default_rpm": 60_000})).await;
        let key = app.key(&account, &plan).await;
        let token = json!({"name": "Gateway"});
        let token = app.act(&account, "POST", "/admin/service-tokens", token);
        let token_id = token.await.body["service_token"]["id"].clone();
        let login = json!({"email": account.email, "password": PASSWORD});
        let other = app.post("/auth/login", login).send().await;
        assert_eq!(other.status, 200, "{}", other.text);
        let sessions = app.act(&account, "GET", "/auth/sessions", Value::Null);
        let sessions = sessions.await.body["items"].as_array().unwrap().clone();
        let second = sessions.iter().find(|it| it["current"] == false).unwrap();
        Self {
            spare,
            key,
            token_id: token_id.as_str().unwrap().to_owned(),
            refresh_token: other.text("refresh_token"),
            access_token: other.text("access_token"),
            session_id: second["id"].as_str().unwrap().to_owned(),
            account,
        }
    }

    async fn run(&self, app: &TestApp, change: Action) -> Answer {
        let key = format!("/admin/api-keys/{}", self.key.id);
        let spare = format!("/admin/plans/{}", self.spare);
        let refresh = || json!({"refresh_token": self.refresh_token});
        let (method, path, body) = match change {
            CreateKey => (
                "POST",
                "/admin/api-keys".to_owned(),
                json!({"name": "New", "plan_id": self.spare}),
            ),
            MoveKey => ("PATCH", key, json!({"plan_id": self.spare})),
            DeactivateKey => ("PATCH", key, json!({"is_active": false})),
            RotateKey => ("POST", format!("{key}/rotate"), json!({})),
            DeleteKey => ("DELETE", key, Value::Null),
            CreatePlan => (
                "POST",
                "/admin/plans".into(),
                json!({"name": "Shared", "default_rpm": 1}),
            ),
            RenamePlan => ("PATCH", spare, json!({"name": "Shared"})),
            DeletePlan => ("DELETE", spare, Value::Null),
            CreateToken => (
                "POST",
                "/admin/service-tokens".into(),
                json!({"name": "New"}),
            ),
            DeleteToken => (
                "DELETE",
                format!("/admin/service-tokens/{}", self.token_id),
                Value::Null,
            ),
            UpdateTenant => (
                "PATCH",
                "/auth/me".into(),
                json!({"tenant_name": "Renamed", "time_zone": "Asia/Tokyo"}),
            ),
            Refresh => return app.post("/auth/refresh", refresh()).send().await,
            Logout => return app.post("/auth/logout", refresh()).send().await,
            EndSession => (
                "DELETE",
                format!("/auth/sessions/{}", self.session_id),
                Value::Null,
            ),
            ChangePassword => (
                "POST",
                "/auth/password".into(),
                json!({"current_password": PASSWORD, "new_password": NEW_PASSWORD}),
            ),
            SignIn => {
                let body = json!({"email": self.account.email, "password": PASSWORD});
                return app.post("/auth/login", body).send().await;
            }
        };
        app.act(&self.account, method, &path, body).await
    }
}

async fn audited(database: &Client, tenant: &str) -> BTreeMap<String, i64> {
    let sql = format!(
        "SELECT action, count(*) FROM audit_events WHERE tenant_id = '{tenant}' GROUP BY action"
    );
    let rows = database.query(&sql, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// Waits until every replica responds with the given status to a request with a key or token.
async fn becomes(replicas: [&TestApp; 2], status: u16, pair: (Action, Action), call: Call<'_>) {
    for app in replicas {
        let began = Instant::now();
        loop {
            let answer = match call {
                Call::Key(key) => app.echo(key).await,
                Call::Session(token) => app.get("/auth/me").bearer(token).send().await,
            };
            if answer.status == status {
                break;
            }
            assert!(
                began.elapsed() < AT_MOST,
                "{pair:?}: {} for {call:?}",
                answer.text
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Call<'a> {
    Key(&'a str),
    Session(&'a str),
}

async fn race(replicas: [&TestApp; 2], database: &Client, pair: (Action, Action)) {
    let world = World::new(replicas[0]).await;
    let tenant = &world.account.tenant_id;
    let before = audited(database, tenant).await;
    let answers = tokio::join!(
        world.run(replicas[0], pair.0),
        world.run(replicas[1], pair.1),
    );
    let answers = [(pair.0, &answers.0), (pair.1, &answers.1)];
    for (change, answer) in answers {
        assert!(
            answer.status < 500,
            "{pair:?}: {change:?}: {} {}",
            answer.status,
            answer.text
        );
    }
    let succeeded = answers.map(|(_, answer)| answer.status < 300);
    let is = |list: &[(Action, Action)]| list.contains(&pair) || list.contains(&(pair.1, pair.0));
    let both = succeeded == [true, true];
    if is(EXCLUSIVE) {
        assert!(succeeded[0] != succeeded[1], "{pair:?}: {answers:?}");
    } else if is(ORDERED) {
        let second_of_order = |change| {
            ORDERED
                .iter()
                .any(|it| it.1 == change && (it.0 == pair.0 || it.0 == pair.1))
        };
        for (at, (change, _)) in answers.iter().enumerate() {
            assert!(
                succeeded[at] || !second_of_order(*change),
                "{pair:?}: {answers:?}"
            );
        }
    } else {
        assert!(both, "{pair:?}: {answers:?}");
    }

    let mut expected = before;
    for (change, answer) in answers {
        if let Some(action) = change.action().filter(|_| answer.status < 300) {
            *expected.entry(action.to_owned()).or_default() += 1;
        }
    }
    let mut after = audited(database, tenant).await;
    if pair.0 == Logout || pair.1 == Logout {
        // The end of a session is recorded once, by the change that ended it.
        let ended = after.remove("session.end").unwrap_or(0);
        let by_other = expected.remove("session.end").unwrap_or(0);
        assert!(ended <= 1 && ended >= by_other, "{pair:?}: {ended}");
        let is_ended_silently = pair.0 == ChangePassword || pair.1 == ChangePassword;
        assert!(ended == 1 || is_ended_silently, "{pair:?}");
    }
    assert_eq!(after, expected, "{pair:?}: {answers:?}");

    let success_of = |wanted: Action| {
        let found = answers.iter().zip(succeeded);
        let mut found = found.filter(|((change, _), success)| *success && *change == wanted);
        found.next().map(|((_, answer), _)| *answer)
    };
    let is_usable = success_of(DeleteKey).is_none() && success_of(DeactivateKey).is_none();
    let status = if is_usable { 200 } else { 401 };
    becomes(replicas, status, pair, Call::Key(&world.key.text)).await;
    if let Some(rotated) = success_of(RotateKey) {
        let secret = rotated.text("key");
        becomes(replicas, status, pair, Call::Key(&secret)).await;
    }
    if let Some(created) = success_of(CreateKey) {
        let secret = created.text("key");
        becomes(replicas, 200, pair, Call::Key(&secret)).await;
    }
    let is_ended = [Logout, EndSession, ChangePassword]
        .into_iter()
        .any(|it| success_of(it).is_some());
    let status = if is_ended { 401 } else { 200 };
    becomes(replicas, status, pair, Call::Session(&world.access_token)).await;
    if let Some(refreshed) = success_of(Refresh) {
        let token = refreshed.text("access_token");
        becomes(replicas, status, pair, Call::Session(&token)).await;
    }
    if let Some(signed_in) = success_of(SignIn) {
        let is_ended = success_of(ChangePassword).is_some();
        let status = if is_ended { 401 } else { 200 };
        let token = signed_in.text("access_token");
        becomes(replicas, status, pair, Call::Session(&token)).await;
    }
    // The session that made the changes remains active.
    let own = Call::Session(&world.account.access_token);
    becomes(replicas, 200, pair, own).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_concurrent_pair_of_changes_has_the_result_of_one_order() {
    let one = TestApp::start().await;
    let other = TestApp::setup()
        .database(one.database.clone())
        .start()
        .await;
    let database = one.database.connect().await;
    let pairs = ALL
        .iter()
        .enumerate()
        .flat_map(|(at, first)| ALL[at..].iter().map(move |second| (*first, *second)))
        .collect::<Vec<_>>();
    assert_eq!(pairs.len(), 136);
    // A few pairs run at a time, so that they also compete for connections and for the order of invalidations.
    let mut races = stream::iter(&pairs)
        .map(|pair| race([&one, &other], &database, *pair))
        .buffer_unordered(4);
    while races.next().await.is_some() {}
}
