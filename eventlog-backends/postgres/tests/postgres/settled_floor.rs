//! Ids are handed out before their transactions commit: what is read above the floor, and what a crash does to it.

use crate::fixture::{LONG, PostgresFixture, claim, done, drain, names, open, options, record};
use postrider_core::{
    Mailbox,
    log::{Claim, EventLogStore as _, Lent, LogSchema as _, Outcome, Settled, TransactionalLog as _},
};
use postrider_postgres::{PostgresLog, PostgresOptions};
use postrider_testkit::{run, server::Postgres};
use sqlx::{Connection as _, PgConnection};
use std::time::Duration;

async fn append_in(log: &PostgresLog, connection: &mut PgConnection, name: &str) {
    let batch = [record(Some("k"), name)];
    log.append_in(Lent::exclusive(connection), &Mailbox::outbox(), &batch)
        .await
        .unwrap();
}

async fn begin(log: &PostgresLog) -> PgConnection {
    let mut connection = log.pool().acquire().await.unwrap().detach();
    sqlx::raw_sql("BEGIN").execute(&mut connection).await.unwrap();
    connection
}

async fn say(connection: &mut PgConnection, sql: &'static str) {
    sqlx::raw_sql(sql).execute(connection).await.unwrap();
}

/// Time enough for a look at what is being written.
async fn a_moment() {
    tokio::time::sleep(Duration::from_millis(260)).await;
}

#[test]
fn a_late_commit_below_what_was_read_is_not_lost() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let log = &fixture.log;
        let session = open(log, options(LONG)).await;
        for how in [
            "commit",
            "rollback",
            "prepare early",
            "prepare late",
            "prepare late, with savepoints",
        ] {
            let mut late = begin(log).await;
            if how.ends_with("savepoints") {
                say(&mut late, "SAVEPOINT one; SAVEPOINT two").await;
            }
            append_in(log, &mut late, "late").await;
            log.append(&Mailbox::outbox(), &[record(Some("other"), "early")])
                .await
                .unwrap();
            if how == "prepare early" {
                say(&mut late, "PREPARE TRANSACTION 'late'").await;
            }
            // What is there is given at once; the open transaction holds nobody up.
            assert_eq!(drain(&*session).await, ["early"], "{how}");
            for n in 0..6 {
                a_moment().await;
                log.append(&Mailbox::outbox(), &[record(None, "more")]).await.unwrap();
                assert_eq!(drain(&*session).await, ["more"], "{how}");
                if how.starts_with("prepare late") && n == 2 {
                    // It goes on under another name.
                    say(&mut late, "PREPARE TRANSACTION 'late'").await;
                }
            }
            match how {
                "commit" => say(&mut late, "COMMIT").await,
                "rollback" => say(&mut late, "ROLLBACK").await,
                _ => say(&mut late, "COMMIT PREPARED 'late'").await,
            }
            let expected: &[&str] = if how == "rollback" { &[] } else { &["late"] };
            assert_eq!(drain(&*session).await, expected, "{how}");
            late.close().await.unwrap();
        }
    });
}

#[test]
fn an_open_transaction_that_wrote_nothing_matters_to_nobody() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let log = &fixture.log;
        let session = open(log, options(LONG)).await;
        let mut idle = begin(log).await;
        say(&mut idle, "SELECT 1").await;
        for n in 0..20 {
            log.append(&Mailbox::outbox(), &[record(Some("k"), &n.to_string())])
                .await
                .unwrap();
        }
        assert_eq!(drain(&*session).await.len(), 20);
        idle.close().await.unwrap();
    });
}

#[test]
fn rows_that_somebody_has_moved_are_settled_all_the_same() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let log = &fixture.log;
        let session = open(log, options(LONG)).await;
        let batch: Vec<_> = (0..30).map(|n| record(None, &n.to_string())).collect();
        log.append(&Mailbox::outbox(), &batch).await.unwrap();
        let first = claim(&*session).await.records;
        done(&*session, &first[..10]).await;
        // The rows lie elsewhere afterwards, some where others lay.
        fixture.sql("VACUUM FULL {event}").await;
        log.append(&Mailbox::outbox(), &batch).await.unwrap();
        assert!(done(&*session, &first[10..]).await.lost.is_empty());
        assert_eq!(
            fixture.number("SELECT count(*) FROM {event}").await,
            30,
            "nothing but those is gone"
        );
        assert_eq!(fixture.number("SELECT count(*) FROM {done}").await, 30);
        assert_eq!(drain(&*session).await.len(), 30);
    });
}

/// Whoever sets the server's clock back moves due times behind those that have been looked up.
#[test]
fn what_becomes_due_after_a_step_back_of_the_clock_is_given() {
    run(async {
        let fixture = PostgresFixture::new().await;
        fixture.set_ahead(Duration::from_secs(60)).await;
        let log = &fixture.log;
        let session = open(log, options(LONG)).await;
        for _ in 0..3 {
            let later = record(None, "1").after(Duration::from_millis(1));
            log.append(&Mailbox::outbox(), &[later]).await.unwrap();
            a_moment().await;
            assert_eq!(drain(&*session).await, ["1"]);
        }
        fixture.set_ahead(Duration::ZERO).await;
        let later = record(None, "2").after(Duration::from_millis(1));
        log.append(&Mailbox::outbox(), &[later]).await.unwrap();
        let mut got = Vec::new();
        for _ in 0..20 {
            got.extend(drain(&*session).await);
            if !got.is_empty() {
                break;
            }
            a_moment().await;
        }
        assert_eq!(got, ["2"]);
    });
}

/// Ids that a rolled-back transaction was given are forgotten by a crash, and given again: a floor that outlived the
/// server would pass over what is committed then.
#[test]
fn the_floor_dies_with_the_server() {
    run(async {
        // Whatever else commits in between writes the position to disk, too: then it is tried once more.
        for _ in 0..5 {
            if the_server_forgets().await {
                return;
            }
        }
        panic!("the server has never forgotten: this shows nothing");
    });
}

async fn the_server_forgets() -> bool {
    // The position is written to disk only with a commit.
    let mut server = Postgres::start_with(&["fsync=off", "wal_writer_delay=10s", "autovacuum=off"]);
    let log = PostgresLog::connect_with(&server.url(), PostgresOptions::default().with_max_connections(3))
        .await
        .unwrap();
    log.migrate().await.unwrap();
    let session = open(&log, options(LONG)).await;
    log.append(&Mailbox::outbox(), &[record(None, "1")]).await.unwrap();
    assert_eq!(drain(&*session).await, ["1"]);
    let held = [record(Some("k"), "held")];
    log.append(&Mailbox::outbox(), &held).await.unwrap();
    let held = claim(&*session).await.records;
    let mut undone = begin(&log).await;
    // More than the server notes in advance.
    say(
        &mut undone,
        // As an INSERT takes its ids, with so little besides that nothing of it is written before a commit.
        "SELECT nextval('postrider.position') FROM generate_series(1, 100)",
    )
    .await;
    say(&mut undone, "ROLLBACK").await;
    a_moment().await;
    // A look that sees the position up there, with nobody writing: everything below is settled.
    assert!(claim(&*session).await.records.is_empty());
    let before: i64 = sqlx::query_scalar("SELECT last_value FROM postrider.position")
        .fetch_one(log.pool())
        .await
        .unwrap();
    assert!(before > 100);
    server.kill();
    server.restart();
    let mut tries = 0;
    while log.append(&Mailbox::outbox(), &[record(None, "after")]).await.is_err() {
        tries += 1;
        assert!(tries < 100);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let after: i64 = sqlx::query_scalar("SELECT max(id) FROM postrider.event")
        .fetch_one(log.pool())
        .await
        .unwrap();
    if after >= before {
        return false;
    }
    let mut got = Vec::new();
    for _ in 0..40 {
        // The connection is lost once; then everything is read again.
        if let Ok(claimed) = session.claim(&Claim::new(100)).await {
            let done: Vec<_> = claimed
                .records
                .iter()
                .map(|r| Settled {
                    tag: r.tag,
                    outcome: Outcome::Done,
                })
                .collect();
            if session.settle(&done).await.is_ok_and(|report| report.lost.is_empty()) {
                got.extend(names(&claimed.records));
            }
        }
        if got.len() == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    got.sort();
    assert_eq!(got, ["after", "held"]);
    assert_eq!(
        done(&*session, &held).await.lost.len(),
        1,
        "what was claimed before the crash belongs to that life"
    );
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM postrider.event")
        .fetch_one(log.pool())
        .await
        .unwrap();
    assert_eq!(left, 0);
    drop(undone);
    true
}
