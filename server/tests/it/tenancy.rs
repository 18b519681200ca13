//! Tests that tenants are isolated in every operation of the OpenAPI document and in every table of the database.

use std::collections::{BTreeMap, HashMap};

use quota_server::secret_text::{Kind, SecretText};
use reqwest::Method;
use serde_json::{Value, json};
use tokio_postgres::{Client, error::SqlState};
use uuid::Uuid;

use crate::{
    every_endpoint::{Operation, operations, resolve},
    support::app::{Account, Answer, Key, PASSWORD, TestApp},
    usage,
};

/// A tenant with at least one resource of each kind, and several resources of each kind that can be listed.
struct Tenant {
    account: Account,
    plan: String,
    key: Key,
    service_token: String,
    /// The IDs of the tenant's resources, by parameter name.
    ids: HashMap<&'static str, String>,
}

impl Tenant {
    async fn new(app: &TestApp) -> Self {
        let account = app.register().await;
        let plan = app
            .plan(
                &account,
                json!({"daily_quota": 1000, "monthly_quota": 9000}),
            )
            .await;
        app.plan(&account, json!({})).await;
        let key = app.key(&account, &plan).await;
        app.key(&account, &plan).await;
        let external_id = format!("customer-{}", Uuid::now_v7());
        let named = app
            .request(Method::PATCH, &format!("/admin/api-keys/{}", key.id))
            .bearer(&account.access_token)
            .json(json!({"external_id": external_id}));
        assert_eq!(named.send().await.status, 200);
        let service_token = app.service_token(&account).await;
        app.service_token(&account).await;
        let tokens = app
            .get("/admin/service-tokens")
            .bearer(&account.access_token)
            .send()
            .await;

        // Sign in a second time. The test revokes the new session, because it must not revoke the caller's own.
        let login = json!({"email": account.email, "password": PASSWORD});
        assert_eq!(app.post("/auth/login", login).send().await.status, 200);
        let sessions = app
            .get("/auth/sessions")
            .bearer(&account.access_token)
            .send()
            .await;
        let sessions = sessions.body["items"].as_array().expect("a list").clone();
        let other = sessions
            .iter()
            .find(|it| it["current"] == false)
            .expect("the second session");

        // The tenant's activity: usage, an invalidation, and a request with an idempotency key.
        assert_eq!(app.echo(&key.text).await.status, 200);
        let path = format!("/admin/plans/{plan}");
        let patch = app.request(Method::PATCH, &path).json(json!({"burst": 7}));
        assert_eq!(patch.bearer(&account.access_token).send().await.status, 200);
        let once = app.post("/admin/service-tokens", json!({"name": "Once"}));
        let once = once
            .header("Idempotency-Key", "once")
            .bearer(&account.access_token);
        assert_eq!(once.send().await.status, 201);
        let record = usage::record(&account, &key.id, &plan, usage::now());
        let request_id = record.request_id.clone();
        let earlier = usage::record(&account, &key.id, &plan, usage::now());
        usage::append(app, &[record, earlier]).await;
        subscribe(app, &account).await;
        let webhook = app.webhook(&account).await;
        app.webhook(&account).await;
        let delivery = app.webhook_delivery(&account, &webhook).await;
        app.webhook_delivery(&account, &webhook).await;
        alert(app, &account, &key.id).await;

        let ids = HashMap::from([
            ("request_id", request_id),
            ("external_id", external_id),
            ("plan_id", plan.clone()),
            ("key_id", key.id.clone()),
            ("target_id", key.id.clone()),
            ("webhook_id", webhook),
            ("delivery_id", delivery),
            (
                "token_id",
                tokens.body["items"][0]["id"]
                    .as_str()
                    .expect("an id")
                    .to_owned(),
            ),
            (
                "session_id",
                other["id"].as_str().expect("an id").to_owned(),
            ),
        ]);
        Self {
            account,
            plan,
            key,
            service_token,
            ids,
        }
    }

    /// Returns this tenant's ID for the parameter or field `name`.
    fn id(&self, name: &str) -> &str {
        self.ids
            .get(name)
            .unwrap_or_else(|| panic!("add the resource that {name} identifies"))
    }

    /// Returns the strings that identify a row or response as this tenant's.
    fn marks(&self) -> Vec<&str> {
        let mut marks = self.ids.values().map(String::as_str).collect::<Vec<_>>();
        marks.extend([
            self.account.tenant_id.as_str(),
            self.account.user_id.as_str(),
            self.account.email.as_str(),
        ]);
        marks
    }
}

/// Adds the rows of a subscription to the database.
async fn subscribe(app: &TestApp, account: &Account) {
    let tenant = &account.tenant_id;
    let client = app.database.connect().await;
    let rows = format!(
        "INSERT INTO billing_accounts (tenant_id, customer_id, customer_email, customer_name, access, has_paid_access) \
             VALUES ('{tenant}', 'cus_{tenant}', '{}', 'Name', 'active', true); \
         INSERT INTO billing_subscriptions (tenant_id, id, status, started_at) \
             VALUES ('{tenant}', 'sub_{tenant}', 'active', now()); \
         INSERT INTO billing_usage (tenant_id, start, cost) VALUES ('{tenant}', date_trunc('hour', now()), 1); \
         INSERT INTO billing_reports (tenant_id, start, revision, until, value) \
             VALUES ('{tenant}', date_trunc('hour', now()), 0, now() + interval '1 hour', 1); \
         INSERT INTO billing_senders (tenant_id, until) VALUES ('{tenant}', now()); \
         INSERT INTO billing_meter_errors (event_id, tenant_id, code) VALUES ('evt_{tenant}', '{tenant}', 'code'); \
         INSERT INTO tenant_quota_usage (tenant_id, window_start, used) VALUES ('{tenant}', date_trunc('month', now()), 1)",
        account.email
    );
    client.batch_execute(&rows).await.expect("rows are added");
}

/// Adds alerts, the state of alert checks, and an email to the database.
async fn alert(app: &TestApp, account: &Account, key: &str) {
    let tenant = &account.tenant_id;
    let client = app.database.connect().await;
    let rows = format!(
        "INSERT INTO quota_alerts (tenant_id, id, key_id, key_name, policy, threshold, quota, used, window_start, \
             window_end, email_pending) \
             SELECT '{tenant}', gen_random_uuid(), '{key}', 'Key', 'daily', threshold, 100, threshold, now(), \
                 now() + interval '1 day', false FROM unnest(ARRAY[50, 80]) AS threshold; \
         INSERT INTO quota_alert_progress (tenant_id, seq) VALUES ('{tenant}', 1); \
         INSERT INTO mails (tenant_id, id, recipient, subject, text_body, html_body) \
             VALUES ('{tenant}', gen_random_uuid(), '{}', 'Subject', 'Text', 'HTML')",
        account.email
    );
    client.batch_execute(&rows).await.expect("rows are added");
}

/// Returns the tables of the database, except partitions and the table of applied migrations.
async fn tables(client: &Client) -> Vec<String> {
    let rows = client
        .query(
            "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace \
             AND relkind IN ('r', 'p') AND NOT relispartition AND relname <> '__diesel_schema_migrations' \
             ORDER BY relname",
            &[],
        )
        .await
        .expect("the catalog is readable");
    let tables = rows.iter().map(|row| row.get(0)).collect::<Vec<String>>();
    assert!(tables.len() >= 13, "{tables:?}");
    tables
}

/// Returns, for each table, the rows that mention the tenant, as text.
async fn rows_of(client: &Client, tenant: &Tenant) -> BTreeMap<String, Vec<String>> {
    let pattern = tenant.marks().join("|");
    let mut rows = BTreeMap::new();
    for table in tables(client).await {
        // Refresh tokens belong to a tenant only through their session.
        let sessions = if table == "refresh_tokens" {
            "OR session_id IN (SELECT id FROM sessions s WHERE to_jsonb(s)::text ~ $1)"
        } else {
            ""
        };
        let sql = format!(
            "SELECT to_jsonb(t)::text FROM {table} t WHERE to_jsonb(t)::text ~ $1 {sessions} ORDER BY 1"
        );
        let found = client
            .query(&sql, &[&pattern])
            .await
            .expect("a superuser sees all");
        rows.insert(table, found.iter().map(|row| row.get(0)).collect());
    }
    rows
}

/// Returns a response without the parts that differ between requests.
fn bare(answer: &Answer) -> (u16, String, Vec<(String, String)>) {
    let id = answer
        .header("x-request-id")
        .expect("every response has an ID");
    let mut fields = answer
        .headers
        .iter()
        .filter(|(name, _)| !["date", "x-request-id"].contains(&name.as_str()))
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap_or("?").to_owned()))
        .collect::<Vec<_>>();
    fields.sort();
    (answer.status, answer.text.replace(id, "ID"), fields)
}

/// A function that creates a request body with the given ID.
type Body = Box<dyn Fn(&str) -> Option<Value>>;

/// A place where an operation takes an ID.
struct Attempt {
    operation: Operation,
    path: Box<dyn Fn(&str) -> String>,
    body: Body,
    /// The parameter or field that takes the ID.
    names: &'static str,
}

impl Attempt {
    async fn send(&self, app: &TestApp, caller: &Tenant, id: &str) -> Answer {
        let call = app.request(self.operation.method.clone(), &(self.path)(id));
        let call = call.bearer(&caller.account.access_token);
        match (self.body)(id) {
            Some(body) => call.json(body).send().await,
            None => call.send().await,
        }
    }
}

/// Returns a request for each ID that an operation takes in its path or body. All other IDs in the request belong to
/// `own`.
fn attempts(own: &Tenant) -> Vec<Attempt> {
    let mut all = Vec::new();
    for operation in operations() {
        let example = operation.body().map(|schema| schema["example"].clone());
        for name in operation.parameters("path") {
            let (path, body) = (operation.path, mine(example.clone(), own));
            all.push(Attempt {
                operation: Operation {
                    method: operation.method.clone(),
                    ..operation
                },
                path: Box::new(move |id| path.replace(&format!("{{{name}}}"), id)),
                body: Box::new(move |_| body.clone()),
                names: name,
            });
        }
        let fields = operation
            .body()
            .and_then(|schema| schema["properties"].as_object());
        for (name, field) in fields.into_iter().flatten() {
            if resolve(field)["format"] != "uuid" {
                continue;
            }
            let mut path = operation.path.to_owned();
            for parameter in operation.parameters("path") {
                path = path.replace(&format!("{{{parameter}}}"), own.id(parameter));
            }
            let example = example.clone();
            all.push(Attempt {
                operation: Operation {
                    method: operation.method.clone(),
                    ..operation
                },
                path: Box::new(move |_| path.clone()),
                body: Box::new(move |id| {
                    let mut body = example.clone().expect("a body with fields has an example");
                    body[name] = json!(id);
                    Some(body)
                }),
                names: name,
            });
        }
    }
    all
}

/// Returns whether a field contains the ID of another resource. `external_id` does not: tenants choose its value.
fn is_reference(field: &str) -> bool {
    field.ends_with("_id") && field != "external_id"
}

/// Returns an example body with the tenant's own IDs.
fn mine(body: Option<Value>, own: &Tenant) -> Option<Value> {
    let mut body = body?;
    for (name, value) in body.as_object_mut().into_iter().flatten() {
        if is_reference(name) {
            *value = json!(own.id(name));
        }
    }
    Some(body)
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_id_is_like_one_that_never_existed_and_changes_nothing() {
    let app = TestApp::setup().without_jobs().start().await;
    let (a, b) = (Tenant::new(&app).await, Tenant::new(&app).await);
    let database = app.database.connect().await;
    let before = rows_of(&database, &a).await;
    let attempts = attempts(&b);
    assert!(attempts.len() >= 11, "{}", attempts.len());
    for attempt in &attempts {
        let theirs = attempt.send(&app, &b, a.id(attempt.names)).await;
        let missing = attempt.send(&app, &b, &Uuid::now_v7().to_string()).await;
        let random = attempt
            .send(&app, &b, &Uuid::from_u128(rand()).to_string())
            .await;
        let id = attempt.operation.id;
        assert_eq!(
            theirs.status, 404,
            "{id} by {}: {}",
            attempt.names, theirs.text
        );
        assert_eq!(bare(&theirs), bare(&missing), "{id} by {}", attempt.names);
        assert_eq!(bare(&theirs), bare(&random), "{id} by {}", attempt.names);
        for mark in a.marks() {
            assert!(
                !theirs.text.contains(mark),
                "{id} shows {mark}: {}",
                theirs.text
            );
        }
    }
    assert_eq!(before, rows_of(&database, &a).await);

    // The same requests with A's own token succeed, so the tenant was the reason for the 404 above.
    for attempt in attempts
        .iter()
        .filter(|it| it.operation.method != Method::DELETE)
    {
        if (attempt.path)("x").contains('x') {
            let own = attempt.send(&app, &a, a.id(attempt.names)).await;
            assert_ne!(own.status, 401, "{}", attempt.operation.id);
            let foreign_plan = attempt.operation.id == "update_api_key" && own.status == 404;
            assert!(
                own.status < 300 || foreign_plan,
                "{}: {}",
                attempt.operation.id,
                own.text
            );
        }
    }
}

/// Returns a random ID that does not exist.
fn rand() -> u128 {
    Uuid::now_v7()
        .as_u128()
        .wrapping_mul(0x2545_F491_4F6C_DD1D_2545_F491_4F6C_DD1D)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_treats_another_tenants_id_like_one_that_never_existed() {
    let app = TestApp::setup().without_jobs().start().await;
    let (a, b) = (Tenant::new(&app).await, Tenant::new(&app).await);
    let database = app.database.connect().await;
    let before = rows_of(&database, &a).await;
    for operation in operations() {
        for name in operation.parameters("path") {
            let path = |id: &str| operation.path.replace(&format!("{{{name}}}"), id);
            for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
                for body in ["{}", "{\"broken", "[]"] {
                    let send = async |id: &str| {
                        let method: Method = method.parse().expect("a method");
                        let call = app.request(method, &path(id));
                        call.bearer(&b.account.access_token)
                            .body("application/json", body)
                            .send()
                            .await
                    };
                    let theirs = send(a.id(name)).await;
                    let missing = send(&Uuid::now_v7().to_string()).await;
                    assert_eq!(
                        bare(&theirs),
                        bare(&missing),
                        "{method} {} {body}",
                        operation.path
                    );
                    assert!(theirs.status >= 400, "{method} {}", operation.path);
                }
            }
        }
    }
    assert_eq!(before, rows_of(&database, &a).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_show_nothing_of_another_tenant_by_filter_or_cursor() {
    let app = TestApp::setup().without_jobs().start().await;
    let (a, b) = (Tenant::new(&app).await, Tenant::new(&app).await);
    let list = async |who: &Tenant, path: &str, query: &str| {
        let path = path.replace("{webhook_id}", who.id("webhook_id"));
        let call = app
            .get(&format!("{path}?{query}"))
            .bearer(&who.account.access_token);
        let answer = call.send().await;
        assert_eq!(answer.status, 200, "{path}?{query}: {}", answer.text);
        answer
    };
    let mut lists = 0;
    for operation in operations() {
        let parameters = operation.parameters("query");
        if parameters.contains(&"cursor") {
            lists += 1;
            let own = list(&b, operation.path, "limit=100").await;
            let mut theirs = list(&a, operation.path, "limit=1").await;
            let ours = own.body["items"].as_array().expect("items").clone();
            assert!(!ours.is_empty(), "{}", operation.id);
            // B uses all of A's cursors.
            let mut cursors = 0;
            while let Some(cursor) = theirs.body["next_cursor"].as_str().map(str::to_owned) {
                cursors += 1;
                let seen = list(&b, operation.path, &format!("limit=100&cursor={cursor}")).await;
                assert_eq!(seen.body["total"], own.body["total"], "{}", operation.id);
                for item in seen.body["items"].as_array().expect("items") {
                    assert!(ours.contains(item), "{} shows {item}", operation.id);
                }
                for mark in a.marks() {
                    assert!(!seen.text.contains(mark), "{} shows {mark}", operation.id);
                }
                theirs = list(&a, operation.path, &format!("limit=1&cursor={cursor}")).await;
            }
            assert!(cursors > 0, "{} has only one page", operation.id);
        }
        // Usage and streams are not lists; their own tests cover filters.
        let is_list = parameters.contains(&"cursor");
        let ids = parameters
            .iter()
            .filter(|name| is_list && name.ends_with("_id"));
        for name in ids {
            let theirs = list(&b, operation.path, &format!("{name}={}", a.id(name))).await;
            let missing = list(&b, operation.path, &format!("{name}={}", Uuid::now_v7())).await;
            assert_eq!(bare(&theirs), bare(&missing), "{} by {name}", operation.id);
            assert_eq!(theirs.body["total"], 0, "{} by {name}", operation.id);
            let own = list(&b, operation.path, &format!("{name}={}", b.id(name))).await;
            assert_ne!(own.body["total"], 0, "{} by {name}", operation.id);
        }
    }
    assert!(lists >= 4, "{lists} lists with cursors");
    let sessions = app
        .get("/auth/sessions")
        .bearer(&b.account.access_token)
        .send()
        .await;
    assert!(
        !a.marks().iter().any(|mark| sessions.text.contains(mark)),
        "{}",
        sessions.text
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn idempotency_keys_of_tenants_are_separate() {
    let app = TestApp::setup().without_jobs().start().await;
    let (a, b) = (Tenant::new(&app).await, Tenant::new(&app).await);
    let mut tried = 0;
    for operation in operations() {
        // Starting a checkout requires Stripe, so `billing.rs` tests it.
        let is_checkout = operation.id == "start_checkout";
        if is_checkout || !operation.parameters("header").contains(&"Idempotency-Key") {
            continue;
        }
        tried += 1;
        let example = operation.body().map(|schema| schema["example"].clone());
        let send = async |who: &Tenant| {
            let body = mine(example.clone(), who)
                .expect("an operation that creates a resource has a body");
            let path = match operation.parameters("path").first() {
                Some(name) => operation.path_with(who.id(name)),
                None => operation.path.to_owned(),
            };
            let call = app.post(&path, body).header("Idempotency-Key", "shared");
            call.bearer(&who.account.access_token).send().await
        };
        let first = send(&a).await;
        let success = if operation.parameters("path").is_empty() {
            201
        } else {
            200
        };
        assert_eq!(first.status, success, "{}: {}", operation.id, first.text);
        let theirs = send(&b).await;
        assert_eq!(theirs.status, success, "{}: {}", operation.id, theirs.text);
        let id = |answer: &Answer| {
            let body = &answer.body;
            let all = [
                &body["id"],
                &body["api_key"]["id"],
                &body["service_token"]["id"],
                &body["webhook"]["id"],
            ];
            all.into_iter()
                .find_map(Value::as_str)
                .expect("an id")
                .to_owned()
        };
        assert_ne!(
            id(&first),
            id(&theirs),
            "{} replayed another's",
            operation.id
        );
        assert_eq!(
            id(&first),
            id(&send(&a).await),
            "{}: the tenant's own response is not replayed",
            operation.id
        );
        assert_eq!(
            id(&theirs),
            id(&send(&b).await),
            "{}: the tenant's own response is not replayed",
            operation.id
        );
    }
    assert!(tried >= 4, "{tried}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_key_is_unknown_to_a_gateway_and_not_charged() {
    let app = TestApp::start().await;
    let (a, b) = (Tenant::new(&app).await, Tenant::new(&app).await);
    let remaining = async || app.echo(&a.key.text).await.number("x-ratelimit-remaining");
    let before = remaining().await;
    let never = SecretText::generate(Kind::ApiKey)
        .expect("random bytes")
        .reveal();
    for _ in 0..3 {
        let check = async |key: &str| {
            let call = app
                .post("/v1/check", json!({"key": key}))
                .bearer(&b.service_token);
            bare(&call.send().await)
        };
        let theirs = check(&a.key.text).await;
        assert_eq!(theirs.0, 200);
        assert!(theirs.1.contains("\"unknown_key\""), "{}", theirs.1);
        assert_eq!(theirs, check(&never).await);

        let forward = async |key: &str| {
            let call = app.get("/v1/forward-auth").header("X-API-Key", key);
            let call = call.header("X-Service-Token", &b.service_token);
            bare(&call.send().await)
        };
        let theirs = forward(&a.key.text).await;
        assert_eq!(theirs.0, 401);
        assert_eq!(theirs, forward(&never).await);
    }
    // At most one token has refilled since `before` was read.
    assert!(remaining().await + 1 >= before, "the key was charged");
    let own = app
        .post("/v1/check", json!({"key": b.key.text}))
        .bearer(&b.service_token);
    assert_eq!(own.send().await.body["allowed"], true);
    let plan = app
        .get(&format!("/admin/plans/{}", a.plan))
        .bearer(&a.account.access_token);
    assert_eq!(plan.send().await.status, 200);
}

// In the database: row-level security blocks rows that a query forgets to exclude. ---------------------------------

/// Returns how many rows a statement affects as `quota_app` for a tenant, and rolls back. Returns `None` if the
/// statement is denied.
async fn as_app(client: &mut Client, tenant: Option<&str>, sql: &str) -> Option<u64> {
    let transaction = client.transaction().await.expect("a transaction");
    transaction
        .batch_execute("SET LOCAL ROLE quota_app")
        .await
        .expect("the role is there");
    if let Some(tenant) = tenant {
        let set = format!("SET LOCAL quota.tenant = '{tenant}'");
        transaction
            .batch_execute(&set)
            .await
            .expect("the setting is accepted");
    }
    match transaction.execute(sql, &[]).await {
        Ok(rows) => Some(rows),
        Err(error) => {
            let refused = error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE);
            assert!(refused, "{sql}: {error:?}");
            None
        }
    }
}

/// Tables that contain no tenant's data.
const OF_NO_TENANT: [&str; 9] = [
    "billing_events",
    "billing_stripe_account",
    "quota_returns",
    "replicas",
    "server_secrets",
    "shared_counters",
    "usage_forgotten_segments",
    "usage_segments",
    "usage_shippers",
];

#[tokio::test(flavor = "multi_thread")]
async fn database_denies_a_tenant_every_row_of_another() {
    let app = TestApp::setup().without_jobs().start().await;
    let (a, b) = (Tenant::new(&app).await, Tenant::new(&app).await);
    let mut client = app.database.connect().await;
    let theirs = rows_of(&client, &a).await;
    let tenant_b = b.account.tenant_id.as_str();
    let pattern = a.marks().join("|");
    let mut reachable = 0;
    for (table, rows) in &theirs {
        // An empty table would not prove anything. When you add a table, also add rows for it to the tenants of this
        // test.
        assert!(
            !rows.is_empty() || OF_NO_TENANT.contains(&table.as_str()),
            "{table} has no row of A's"
        );
        let column: String = client
            .query_one(
                "SELECT attname::text FROM pg_attribute WHERE attrelid = $1::text::regclass \
                 AND attnum > 0 AND NOT attisdropped AND attidentity = '' ORDER BY attnum LIMIT 1",
                &[table],
            )
            .await
            .expect("a table has columns")
            .get(0);
        let whose = format!("to_jsonb(t)::text ~ '{pattern}'");
        let select = format!("SELECT 1 FROM {table} t WHERE {whose}");
        let update = format!("UPDATE {table} t SET {column} = {column} WHERE {whose}");
        let delete = format!("DELETE FROM {table} t WHERE {whose}");
        for sql in [&select, &update, &delete] {
            let touched = as_app(&mut client, Some(tenant_b), sql).await;
            assert!(touched.unwrap_or(0) == 0, "{sql}: {touched:?}");
        }
        for row in rows {
            let row = row.replace('\'', "''");
            let insert = format!(
                "INSERT INTO {table} OVERRIDING SYSTEM VALUE \
                 SELECT * FROM jsonb_populate_record(NULL::{table}, '{row}')"
            );
            assert_eq!(
                as_app(&mut client, Some(tenant_b), &insert).await,
                None,
                "{insert}"
            );
        }

        // Without a tenant, no rows are visible. With a tenant, its own rows are visible.
        let all = format!("SELECT 1 FROM {table}");
        for unset in [None, Some("")] {
            assert!(
                as_app(&mut client, unset, &all).await.unwrap_or(0) == 0,
                "{all}"
            );
        }
        reachable += usize::from(as_app(&mut client, Some(tenant_b), &all).await > Some(0));

        // B cannot move one of its own rows to another tenant either.
        if column == "tenant_id" {
            let tenant_a = &a.account.tenant_id;
            let give = format!("UPDATE {table} SET tenant_id = '{tenant_a}'");
            assert_eq!(
                as_app(&mut client, Some(tenant_b), &give).await,
                None,
                "{give}"
            );
        }
    }
    assert!(
        reachable >= 8,
        "a tenant sees its own rows in {reachable} tables"
    );
    assert_eq!(theirs, rows_of(&client, &a).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_table_has_row_level_security_that_binds_the_servers_roles() {
    let app = TestApp::setup().without_jobs().start().await;
    let client = app.database.connect().await;
    for table in tables(&client).await {
        let row = client
            .query_one(
                "SELECT relrowsecurity, relforcerowsecurity, pg_get_userbyid(relowner)::text \
                 FROM pg_class WHERE oid = $1::text::regclass",
                &[&table],
            )
            .await
            .expect("the table exists");
        assert!(
            row.get::<_, bool>(0),
            "{table}: row-level security is not enabled"
        );
        assert!(
            row.get::<_, bool>(1),
            "{table}: row-level security is not forced"
        );
        let owner: &str = row.get(2);
        assert!(
            !["quota_app", "quota_system"].contains(&owner),
            "{table} is owned by {owner}"
        );
    }
    let roles = client
        .query(
            "SELECT rolname::text, rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolcanlogin \
             FROM pg_roles WHERE rolname IN ('quota_app', 'quota_system')",
            &[],
        )
        .await
        .expect("the catalog is readable");
    assert_eq!(roles.len(), 2);
    for role in roles {
        assert!(
            !role.get::<_, bool>(1),
            "{} has too many privileges",
            role.get::<_, &str>(0)
        );
    }
    // Neither role is a member of another role, so neither can gain the privileges of another role.
    let member = client
        .query_one(
            "SELECT count(*) FROM pg_auth_members WHERE member IN ('quota_app'::regrole, 'quota_system'::regrole)",
            &[],
        )
        .await
        .expect("the catalog is readable");
    assert_eq!(member.get::<_, i64>(0), 0);
    // A view or function that runs as its owner would bypass row-level security. Only functions that create and drop
    // partitions do so. They return no rows, and only the server itself may call them.
    let ways_around = client
        .query(
            "SELECT proname::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosecdef \
             UNION ALL SELECT relname::text FROM pg_class \
             WHERE relnamespace = 'public'::regnamespace AND relkind IN ('v', 'm') ORDER BY 1",
            &[],
        )
        .await
        .expect("the catalog is readable");
    let ways_around = ways_around
        .iter()
        .map(|row| row.get(0))
        .collect::<Vec<String>>();
    assert_eq!(
        ways_around,
        [
            "usage_create_partition",
            "usage_create_partitions",
            "usage_delete_unpartitioned",
            "usage_drop_partitions"
        ]
    );
    let callers = client
        .query_one(
            "SELECT bool_or(has_function_privilege('quota_app', oid, 'EXECUTE')), \
             bool_and(has_function_privilege('quota_system', oid, 'EXECUTE')) \
             FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosecdef",
            &[],
        )
        .await
        .expect("the catalog is readable");
    assert!(!callers.get::<_, bool>(0), "a tenant may drop partitions");
    assert!(
        callers.get::<_, bool>(1),
        "the server may not drop partitions"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_is_reached_through_its_table_alone() {
    let app = TestApp::setup().without_jobs().start().await;
    let tenant = Tenant::new(&app).await;
    let mut client = app.database.connect().await;
    client
        .batch_execute("SELECT usage_create_partitions(current_date, current_date + 1)")
        .await
        .expect("the superuser may create partitions");
    let partitions = client
        .query(
            "SELECT relname::text, relrowsecurity FROM pg_class WHERE relnamespace = 'public'::regnamespace \
             AND relkind IN ('r', 'p') AND relispartition",
            &[],
        )
        .await
        .expect("the catalog is readable");
    // Each of the three partitioned tables has three partitions: the default partition, today's and tomorrow's.
    assert_eq!(partitions.len(), 9);
    let own = tenant.account.tenant_id.as_str();
    for row in partitions {
        let (name, secured): (&str, bool) = (row.get(0), row.get(1));
        assert!(secured, "{name}: row-level security is not enabled");
        let sql = format!("SELECT 1 FROM {name}");
        assert_eq!(as_app(&mut client, Some(own), &sql).await, None, "{sql}");
    }
    // The rows that were inserted before the partitions existed have been moved to them.
    let sql = "SELECT 1 FROM usage_log WHERE tableoid <> 'usage_log_default'::regclass";
    assert_eq!(as_app(&mut client, Some(own), sql).await, Some(2));
}
