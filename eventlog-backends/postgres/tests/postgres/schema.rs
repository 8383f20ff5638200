//! How the tables come to be, and who may do what.

use crate::fixture::{LONG, PostgresFixture, claim, done, drain, open, options, record};
use postrider_core::{
    ErrorKind, EventLog, Mailbox,
    log::{EventLogStore as _, LogSchema as _, Purge},
};
use postrider_postgres::{PostgresLog, PostgresOptions};
use postrider_testkit::{run, server::Postgres};
use sqlx::{AssertSqlSafe, PgPool};
use std::time::Duration;

fn fresh() -> PostgresOptions {
    PostgresOptions::default()
        .with_schema(Postgres::shared().fresh_name())
        .with_max_connections(3)
}

async fn connect(options: &PostgresOptions) -> PostgresLog {
    PostgresLog::connect_with(&Postgres::shared().url(), options.clone())
        .await
        .unwrap()
}

#[test]
fn many_nodes_migrate_at_once() {
    run(async {
        let options = fresh();
        let mut nodes = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let log = connect(&options).await;
            nodes.spawn(async move { log.migrate().await });
        }
        for migrated in nodes.join_all().await {
            migrated.unwrap();
        }
        let log = connect(&options).await;
        log.migrate().await.unwrap();
        log.check().await.unwrap();
        log.append(&Mailbox::outbox(), &[record(None, "1")]).await.unwrap();
    });
}

#[test]
fn tables_that_are_missing_older_or_newer_are_told_apart() {
    run(async {
        let options = fresh();
        let log = connect(&options).await;
        let session = crate::fixture::options(LONG);
        for error in [
            log.check().await.unwrap_err(),
            log.open(&Mailbox::outbox(), &session).await.unwrap_err(),
            log.append(&Mailbox::outbox(), &[record(None, "1")]).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Storage);
            assert!(error.to_string().contains("run `bus.migrate()`, or the SQL"), "{error}");
        }
        log.migrate().await.unwrap();
        let set = async |name: &str, value: i64| {
            let sql = format!(
                "UPDATE \"{}\".settings SET value = {value} WHERE name = '{name}'",
                options.schema
            );
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(log.pool()).await.unwrap();
        };
        // One newer, which says that this program may go on: a rolling deploy.
        set("schema_version", 2).await;
        log.check().await.unwrap();
        log.migrate().await.unwrap();
        // And one that says it may not.
        set("oldest_reader", 2).await;
        let error = connect(&options)
            .await
            .open(&Mailbox::outbox(), &session)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("update the program"), "{error}");
        set("schema_version", 0).await;
        let error = connect(&options)
            .await
            .open(&Mailbox::outbox(), &session)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("bus.migrate()"), "{error}");
    });
}

#[test]
fn a_role_without_rights_is_told_what_to_run() {
    run(async {
        let (options, name) = (fresh(), Postgres::shared().fresh_name());
        let (role, producer) = (format!("{name}_relay \"x\""), format!("{name}_producer"));
        let admin = PgPool::connect(&Postgres::shared().url()).await.unwrap();
        let quoted = |role: &str| format!("\"{}\"", role.replace('"', "\"\""));
        for role in [&role, &producer] {
            let sql = format!("CREATE ROLE {} LOGIN", quoted(role));
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&admin).await.unwrap();
        }
        let as_role = |role: &str| {
            let connect = (*admin.connect_options()).clone().username(role);
            let pool = sqlx::postgres::PgPoolOptions::new()
                .max_connections(3)
                .connect_lazy_with(connect);
            PostgresLog::on_pool(pool, options.clone()).unwrap()
        };
        let log = as_role(&role);
        let error = log.migrate().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("migration_sql()"), "{error}");
        // An administrator runs what is printed.
        let sql = PostgresLog::migration_sql(&options);
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&admin).await.unwrap();
        let error = log.append(&Mailbox::outbox(), &[record(None, "1")]).await.unwrap_err();
        assert!(error.to_string().contains("grants_sql(role)"), "{error}");
        let grants = PostgresLog::grants_sql(&options, &role);
        sqlx::raw_sql(AssertSqlSafe(grants)).execute(&admin).await.unwrap();
        // With these it does everything there is to do at run time.
        log.migrate().await.unwrap();
        let batch = [
            record(None, "1"),
            record(Some("k"), "2"),
            record(None, "3").after(Duration::from_millis(900)),
        ];
        log.append(&Mailbox::outbox(), &batch).await.unwrap();
        let session = open(&log, crate::fixture::options(LONG)).await;
        let records = claim(&*session).await.records;
        assert!(done(&*session, &records).await.lost.is_empty());
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(drain(&*session).await, ["3"]);
        session.close().await.unwrap();
        let admin_part = EventLog::from(log.clone());
        admin_part.admin().unwrap().stats().await.unwrap();
        let old = format!(
            "UPDATE \"{}\".done SET finished_at = now() - interval '3 days', slot = (slot + 3) % 16",
            options.schema
        );
        sqlx::raw_sql(AssertSqlSafe(old)).execute(&admin).await.unwrap();
        log.purge(&Purge::new(Mailbox::outbox(), 10).succeeded_after(Duration::from_secs(24 * 3600)))
            .await
            .unwrap();
        let left = format!("SELECT count(*) FROM \"{}\".done", options.schema);
        let left: i64 = sqlx::query_scalar(AssertSqlSafe(left)).fetch_one(&admin).await.unwrap();
        assert_eq!(left, 0, "slots are emptied without a right to create or drop");
        assert_eq!(log.history_failures(), 0);
        // A producer in another language needs two lines of it, and can do nothing else.
        let lines: Vec<String> = PostgresLog::grants_sql(&options, &producer)
            .lines()
            .map(str::to_owned)
            .collect();
        let last = lines[lines.len() - 2..].join("\n");
        sqlx::raw_sql(AssertSqlSafe(last)).execute(&admin).await.unwrap();
        let producing = as_role(&producer);
        let append = format!("SELECT \"{}\".append('t', 't.v1', '{{}}')", options.schema);
        sqlx::raw_sql(AssertSqlSafe(append))
            .execute(producing.pool())
            .await
            .unwrap();
        let read = format!("SELECT * FROM \"{}\".event", options.schema);
        assert!(
            sqlx::raw_sql(AssertSqlSafe(read))
                .execute(producing.pool())
                .await
                .is_err()
        );
    });
}

#[test]
fn hostile_names_are_names() {
    run(async {
        let name = Postgres::shared().fresh_name();
        for (schema, prefix) in [
            (
                format!("{name} \"; DROP TABLE x; --"),
                "it's \"{event}\" $1 % \\".to_owned(),
            ),
            (format!("{name}_ÄÖ"), "select".to_owned()),
            (format!("{name}$postgres$"), "a.b_".to_owned()),
        ] {
            let fixture =
                PostgresFixture::with(PostgresOptions::default().with_schema(schema).with_prefix(prefix)).await;
            let session = open(&fixture.log, options(LONG)).await;
            let batch = [
                record(Some("k"), "1"),
                record(None, "2").after(Duration::from_millis(700)),
            ];
            fixture.log.append(&Mailbox::outbox(), &batch).await.unwrap();
            assert_eq!(drain(&*session).await, ["1"]);
            tokio::time::sleep(Duration::from_millis(800)).await;
            assert_eq!(drain(&*session).await, ["2"]);
            fixture
                .log
                .purge(&Purge::new(Mailbox::outbox(), 10).succeeded_after(Duration::ZERO))
                .await
                .unwrap();
            session.close().await.unwrap();
        }
        for options in [
            PostgresOptions::default().with_schema(""),
            PostgresOptions::default().with_schema("pg_mine"),
            PostgresOptions::default().with_schema("x".repeat(64)),
            PostgresOptions::default().with_prefix("x".repeat(50)),
            PostgresOptions::default().with_prefix("a\0b"),
            PostgresOptions::default().with_schema("a$postrider$b"),
            PostgresOptions::default().with_max_connections(0),
        ] {
            let error = PostgresLog::connect_with(&Postgres::shared().url(), options)
                .await
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        }
    });
}

#[test]
fn what_cannot_be_reached_is_said_without_the_password() {
    run(async {
        for (url, kind) in [
            ("postgres://u:geheim@127.0.0.1:1/x", ErrorKind::Unavailable),
            ("nonsense://u:geheim@h/x", ErrorKind::Config),
            ("postgres://u:geheim@127.0.0.1:port/x", ErrorKind::Config),
        ] {
            let options = PostgresOptions::default().with_acquire_timeout(Duration::from_millis(300));
            let error = PostgresLog::connect_with(url, options).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(
                !error.to_chain().contains("geheim") && !format!("{error:?}").contains("geheim"),
                "{error:?}"
            );
        }
        let log = connect(&fresh()).await;
        assert!(format!("{log:?}").contains("schema"), "{log:?}");
    });
}
